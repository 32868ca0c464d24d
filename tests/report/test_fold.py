"""Folding is lossless, merges only equal facts, and its rendering can be read back."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ckpt.report.fold import fold

_ESCAPABLE = "\\{},-.ab01"
_components = (
    st.integers(0, 12).map(str)
    | st.sampled_from(["weight", "bias", "00", "-1", "1-3", "{0-2}", "a,b", "\\", "", "+1", "²"])
    | st.text(_ESCAPABLE.replace(".", ""), max_size=3)
)
_keys = st.lists(_components, min_size=1, max_size=4).map(".".join)
_entries = st.lists(st.tuples(_keys, st.integers(0, 2)), max_size=30, unique_by=lambda e: e[0])


def regular(layers: int, heads: int) -> list[tuple[str, int]]:
    return [
        (f"blocks.{layer}.{part}.{head}.{leaf}", len(leaf))
        for layer in range(layers)
        for part in ("attn", "mlp")
        for head in range(heads)
        for leaf in ("weight", "bias")
    ]


@settings(max_examples=300)
@given(_entries)
def test_expanding_gives_the_keys_back(entries: list[tuple[str, int]]) -> None:
    rows = fold(entries)
    expanded = [(key, row.facts) for row in rows for key in row.keys()]  # noqa: SIM118
    assert sorted(expanded) == sorted(entries)
    assert sum(row.count for row in rows) == len(entries)


@settings(max_examples=300)
@given(_entries)
def test_no_two_rows_look_alike(entries: list[tuple[str, int]]) -> None:
    patterns = [row.pattern() for row in fold(entries)]
    assert len(set(patterns)) == len(patterns)


def parse(pattern: str) -> list[str]:
    """The keys that a reader takes a pattern to mean; the inverse of the rendering."""
    alternatives: list[list[str]] = [[""]]  # of the pieces seen so far
    group: list[str] | None = None
    quoted = False  # whether the piece in a group had an escape: then it is no range
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
            char, quoted, literal = pattern[at], True, True
        else:
            literal = False
        if literal or char not in "{},":
            if group is None:
                alternatives.append([char])
            else:
                group[-1] += char
        elif char == "{":
            group, quoted = [""], False
        elif char == ",":
            assert group is not None
            group.append("")
        else:
            assert group is not None
            alternatives.append(
                group if quoted else [text for piece in group for text in spread(piece)]
            )
            group = None
        at += 1
    return ["".join(parts) for parts in itertools.product(*alternatives)]


def spread(piece: str) -> list[str]:
    first, dash, last = piece.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and first.isascii() and last.isascii():
        return [str(number) for number in range(int(first), int(last) + 1)]
    return [piece]


def test_the_parser_of_this_test() -> None:
    assert parse("a.{0-2,5}.{w,b}") == [
        f"a.{n}.{leaf}" for n in (0, 1, 2, 5) for leaf in ("w", "b")
    ]
    assert parse("x\\{1\\}") == ["x{1}"]


@settings(max_examples=400)
@given(_entries)
def test_the_rendering_can_be_read_back(entries: list[tuple[str, int]]) -> None:
    for row in fold(entries):
        assert sorted(parse(row.pattern())) == sorted(row.keys())


@given(st.integers(1, 6), st.integers(1, 4))
def test_regular_models_fold_to_few_rows(layers: int, heads: int) -> None:
    rows = fold(regular(layers, heads))
    assert len(rows) == 2
    assert {row.facts for row in rows} == {4, 6}


def test_only_equal_facts_stand_in_one_row() -> None:
    rows = fold([("a.0.w", "F32"), ("a.1.w", "BF16"), ("a.2.w", "F32")])
    assert {(row.pattern(), row.facts) for row in rows} == {("a.{0,2}.w", "F32"), ("a.1.w", "BF16")}


def test_ranges_are_exact() -> None:
    rows = fold([(f"l.{n}", 0) for n in (0, 1, 2, 5, 7, 8)])
    assert [row.pattern() for row in rows] == ["l.{0-2,5,7-8}"]


def test_numbers_with_leading_zeros_are_words() -> None:
    rows = fold([("l.00", 0), ("l.01", 0), ("l.1", 0)])
    assert sorted(key for row in rows for key in row.keys()) == ["l.00", "l.01", "l.1"]  # noqa: SIM118


def test_rows_come_in_the_order_of_their_first_key() -> None:
    rows = fold([("z", 0), ("b.1", 0), ("a", 1), ("b.0", 0)])
    assert next(row.keys()[0] for row in rows) == "z"
    assert fold([]) == []
