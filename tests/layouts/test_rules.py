"""Tables of rules: what they match, what they refuse to be built from, and hostile names."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flamingo_ckpt.layouts.describe import example_key
from flamingo_ckpt.layouts.registry import LAYOUTS
from flamingo_ckpt.layouts.rules import Rule, Table, dropped, prefixed, rename, split_numbers

BLOCKS = Table(
    (
        *rename(
            {
                "embed.weight": "lm.embed_tokens.weight",
                "blocks.{layer}.norm{n:1|2}.{p:weight|bias}": "vision.layers.{layer}.norm{n}.{p}",
                "blocks.{layer}.mlp.{m:0=fc1|2=fc2}.weight": "vision.layers.{layer}.mlp.{m}.weight",
            }
        ),
        Rule(
            native="blocks.{layer}.qkv.weight",
            canonical="vision.layers.{layer}.attn.{part:q|k|v}.weight",
            axes="(part r) c -> r c",
        ),
        Rule(native="stack/w", canonical="text.layers.{layer}.w", axes="layer a b -> b a"),
        Rule(native="old.{layer}.w", canonical="text.layers.{layer}.w", mode="read"),
        Rule(native="twin.{layer}.w", canonical="text.layers.{layer}.w", mode="alias"),
        *dropped({"blocks.{layer}.buffer": "computed"}),
    )
)
TABLES = [(name, family) for name, layout in LAYOUTS.items() for family in layout.families]


def canonical(key: str, **index: int) -> str | None:
    match = BLOCKS.match(key)
    return None if match is None else match.canonical(index)


@pytest.mark.parametrize("layer", [0, 9, 10, 11, 99, 100, 123456])
def test_numbers_of_any_length(layer: int) -> None:
    key, name = f"blocks.{layer}.norm2.bias", f"vision.layers.{layer}.norm2.bias"
    assert canonical(key) == name
    place = BLOCKS.place(name)
    assert place is not None
    assert place.name == key


def test_words_stand_for_other_words() -> None:
    assert canonical("blocks.12.mlp.0.weight") == "vision.layers.12.mlp.fc1.weight"
    place = BLOCKS.place("vision.layers.12.mlp.fc2.weight")
    assert place is not None
    assert place.name == "blocks.12.mlp.2.weight"
    assert canonical("blocks.12.mlp.1.weight") is None


def test_parts_of_a_fused_tensor() -> None:
    names = [canonical("blocks.3.qkv.weight", part=part) for part in range(3)]
    assert names == [f"vision.layers.3.attn.{m}.weight" for m in "qkv"]
    for at, name in enumerate(names):
        place = BLOCKS.place(str(name))
        assert place is not None
        assert (place.name, dict(place.index), place.num_parts) == (
            "blocks.3.qkv.weight",
            {"part": at},
            3,
        )


def test_layers_of_a_stack() -> None:
    assert canonical("stack/w", layer=11) == "text.layers.11.w"
    place = BLOCKS.place("text.layers.11.w")
    assert place is not None
    assert (place.name, dict(place.index)) == ("stack/w", {"layer": 11})


def test_what_is_read_or_an_alias_is_never_written() -> None:
    assert canonical("old.4.w") == canonical("twin.4.w") == "text.layers.4.w"
    assert BLOCKS.aliases("text.layers.4.w") == ["twin.4.w"]
    assert BLOCKS.aliases("vision.layers.4.norm1.bias") == []


def test_a_dropped_key_matches_and_has_its_reason() -> None:
    match = BLOCKS.match("blocks.7.buffer")
    assert match is not None
    assert match.rule.drop == "computed"
    assert match.rule.kind == "drop"


@pytest.mark.parametrize(
    "key",
    [
        "blocks.03.norm1.bias",
        "blocks.-1.norm1.bias",
        "blocks.+1.norm1.bias",
        "blocks. 1.norm1.bias",
        "blocks.1 .norm1.bias",
        "blocks.1_0.norm1.bias",
        "blocks.1e1.norm1.bias",
        "blocks.0x1.norm1.bias",
        "blocks.1.0.norm1.bias",
        "blocks..norm1.bias",
        "blocks.norm1.bias",
        "blocks.#.norm1.bias",
        "blocks.{layer}.norm1.bias",
        "blocks.\0layer\0.norm1.bias",
        "blocks.1234567890.norm1.bias",
        "blocks.\u0663.norm1.bias",
        "blocks.\uff13.norm1.bias",
        "blocks.²3.norm1.bias",
        "blocks.3.norm3.bias",
        "blocks.3.norm1.bias\n",
        "\nblocks.3.norm1.bias",
        "blocks.3.norm1.bias.",
        ".blocks.3.norm1.bias",
        "xblocks.3.norm1.bias",
        "blocks.3.norm1.biasx",
        "Blocks.3.norm1.bias",
        "blocks/3.norm1.bias",
        "blocks.3.norm1.bias/3",
        "module.blocks.3.norm1.bias",
        "embed.weight\0",
        "",
    ],
)
def test_keys_are_matched_as_a_whole(key: str) -> None:
    assert BLOCKS.match(key) is None
    assert BLOCKS.place(key) is None


@pytest.mark.parametrize(
    "native", ["a.b.w", "a.{layer}.w", "a.{m:b|c}.w", "a.{m:x=b|c}.w", "a.7.w"]
)
def test_two_rules_for_one_key_are_an_error_of_the_table(native: str) -> None:
    other = {"a.{layer}.w": "a.{other}.w", "a.7.w": "a.{layer}.w"}
    other |= {"a.{m:b|c}.w": "a.{k:c|d}.w", "a.{m:x=b|c}.w": "a.c.w"}
    rules = rename({native: "one.{layer}" if "{layer}" in native else "one"})
    if "{m" in native:
        rules = rename({native: "one.{m}"})
    twin = Rule(native=other.get(native, native), drop="no reason")
    with pytest.raises(ValueError, match="two rules for one key"):
        Table((*rules, twin))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Rule(native="a", canonical="x"), Rule(native="b", canonical="x")),
        (
            Rule(native="a.{layer}", canonical="x.{layer}"),
            Rule(native="b", canonical="x.{layer}", axes="layer c -> c"),
        ),
        (
            Rule(native="a", canonical="x.{part:q|k}", axes="(part r) -> r"),
            Rule(native="b", canonical="x.k"),
        ),
        (Rule(native="a.{m:0=q|1=k}", canonical="x.{m}"), Rule(native="b", canonical="x.q")),
    ],
)
def test_two_rules_for_one_canonical_name_are_an_error(first: Rule, second: Rule) -> None:
    with pytest.raises(ValueError, match="two rules for one canonical name"):
        Table((first, second)).place("x")
    # but not where only one of them is written
    place = Table((first, *prefixed((second,), mode="read"))).place("x")
    assert place is None or place.rule is first


def test_a_number_that_is_no_component_of_its_own_is_an_error() -> None:
    with pytest.raises(ValueError, match="a number must be a component of its own"):
        Table(rename({"blocks{layer}.w": "x.{layer}"}))


def test_axes_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="does not name the same axes"):
        Table((Rule(native="a", canonical="b", axes="r c -> c d"),))


def test_numbers_in_a_key_are_components_of_their_own() -> None:
    assert split_numbers("a.11.b2.0/7") == ("a.#.b2.#/#", ("11", "0", "7"))
    assert split_numbers("encoderblock_12/x") == ("encoderblock_#/x", ("12",))
    assert split_numbers("007.08") == ("007.08", ())


hostile = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789./_#{}\0\u0663x-", max_size=60),
    st.lists(st.sampled_from(["blocks", "norm1", "3", "10", "03", "", "bias"]), max_size=12).map(
        ".".join
    ),
)


@given(hostile)
@example("." * 100_000)
@example("0." * 50_000)
@example("9" * 100_000)
@example("blocks." + "1" * 5000 + ".norm1.bias")
@example("{layer}" * 10_000)
@example("\0" * 1000)
@example("\ud800.weight")
def test_hostile_names_neither_crash_nor_match_by_accident(name: str) -> None:
    leaves = r"norm[12]\.(weight|bias)|mlp\.[02]\.weight|qkv\.weight|buffer"
    pattern = rf"blocks\.(0|[1-9][0-9]{{0,8}})\.({leaves})"
    pattern += r"|(old|twin)\.(0|[1-9][0-9]{0,8})\.w|stack/w|embed\.weight"
    assert (BLOCKS.match(name) is not None) == bool(re.fullmatch(pattern, name))
    BLOCKS.place(name)
    BLOCKS.aliases(name)


@given(hostile)
@example("." * 10_000)
@example("module." * 2000)
def test_hostile_names_in_every_table(name: str) -> None:
    for layout, family in TABLES:
        table = LAYOUTS[layout].table(family)
        match = table.match(name)
        if match is not None and match.rule.canonical:
            index = match.arrangement.index if match.arrangement else ()
            assert match.canonical(dict.fromkeys(index, 0))


@pytest.mark.parametrize(("layout", "family"), TABLES)
def test_every_rule_leads_there_and_back(layout: str, family: str) -> None:
    """A key's canonical names are placed under that key again, where its rule is written."""
    table = LAYOUTS[layout].table(family)
    for rule in table.rules:
        key = example_key(rule.native)
        match = table.match(key)
        assert match is not None, key
        assert match.rule is rule
        if rule.drop:
            assert not rule.canonical
            continue
        index = match.arrangement.index if match.arrangement else ()
        for part in range(max(len(match.parts), 1)):
            at = {name: part if name == "part" else 11 for name in index}
            name = match.canonical(at)
            assert "{" not in name
            place = table.place(name)
            if rule.mode == "both":
                assert place is not None
                assert (place.name, dict(place.index)) == (key, at)
            elif rule.mode == "alias":
                assert key in table.aliases(name)
            else:
                assert place is None or place.name != key
