"""Rules that tie a layout's own key to canonical ones, and the table that looks keys up in them.

A pattern is a whole key with captures: `{layer}` is a number, `{p:weight|bias}` one of some words,
and `{m:c_fc=fc1|c_proj=fc2}` words of the layout with their canonical counterparts. On the
canonical side `{part:q|k|v}` numbers the tensors that a stored one is made of. A table is built
once: two rules for one key, or for one canonical name, are an error there and not at a user's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from flamingo_ckpt.layouts.axes import Arrangement

_CAPTURE = re.compile(r"\{([a-z]+)(?::([^{}]*))?\}")
# Whole components of digits, and the layer number of big_vision's unstacked blocks.
_NUMBER = re.compile(r"(?:(?<![^./])|(?<=encoderblock_))(?:0|[1-9][0-9]{0,8})(?![^./])")
#: What stands for a number in a template.
_HOLE = "#"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One kind of key.

    Attributes:
        native: pattern of the layout's own key.
        canonical: pattern of the canonical names; empty for a key that is dropped.
        axes: how the stored tensor is made of canonical ones, `stored -> canonical`; empty: as is.
        also: further ways in which the tensor is met, `stored -> canonical`: only read, and only
            where one fits its shape.
        mode: `both` directions, `read` only, or `alias`: a second name of a tensor that another
            rule stores.
        drop: why the tensor is left out, where it is.
        loss: why a layout that has no place for it may leave it out; "" where that is an error.
    """

    native: str
    canonical: str = ""
    axes: str = ""
    also: tuple[str, ...] = ()
    mode: str = "both"
    drop: str = ""
    loss: str = ""

    @property
    def kind(self) -> str:
        """The transform, for people: `rename`, `transpose`, `split`, `stack`, `reshape`, ..."""
        if self.drop:
            return "drop"
        if self.mode == "alias":
            return "alias"
        if not self.axes:
            return "rename"
        form = Arrangement.parse(self.axes)
        if form.index:
            return "split" if form.index == ("part",) else "unstack"
        ours = [name for group in form.native for name in group]
        theirs = [name for group in form.canonical for name in group]
        return "reshape" if ours == theirs else "transpose"


@dataclass(frozen=True, slots=True)
class Match:
    """A key and the rule that it fits.

    Attributes:
        values: of the captures; numbers as text.
    """

    rule: Rule
    values: Mapping[str, str]
    arrangement: Arrangement | None
    parts: tuple[str, ...]

    def canonical(self, index: Mapping[str, int]) -> str:
        """The canonical name at one place of the stored tensor."""
        values = {**self.values, **{name: str(at) for name, at in index.items()}}
        if self.parts:
            values["part"] = self.parts[index["part"]]
        return _CAPTURE.sub(lambda match: values[match[1]], self.rule.canonical)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a canonical tensor belongs in a layout.

    Attributes:
        name: the layout's own key.
        index: place in the stored tensor, by axis name; empty where it is the whole.
    """

    name: str
    rule: Rule
    arrangement: Arrangement | None
    index: Mapping[str, int]
    num_parts: int


@dataclass(frozen=True, slots=True)
class _Entry:
    rule: Rule
    arrangement: Arrangement | None
    parts: tuple[str, ...]
    #: for each number of the template: the number that must stand there, or the capture it fills
    numbers: tuple[str, ...]
    fixed: Mapping[str, str]
    part: int = 0


class Table:
    """Rules, compiled for lookup in both directions.

    Args:
        rules: of one layout, for one language model where it has several.

    Raises:
        ValueError: two rules fit one key, or write one canonical name.
    """

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self._native: dict[str, list[_Entry]] = {}
        for rule in rules:
            for template, entry in _expand(rule, rule.native, side="native"):
                _put(self._native, template, entry, "key")

    @cached_property
    def _canonical(self) -> dict[str, list[_Entry]]:
        table: dict[str, list[_Entry]] = {}
        for rule in self.rules:
            if rule.mode == "both" and not rule.drop:
                for template, entry in _expand(rule, rule.canonical, side="canonical"):
                    _put(table, template, entry, "canonical name")
        return table

    @cached_property
    def _aliases(self) -> dict[str, list[_Entry]]:
        table: dict[str, list[_Entry]] = {}
        for rule in self.rules:
            if rule.mode == "alias":
                for template, entry in _expand(rule, rule.canonical, side="canonical"):
                    table.setdefault(template, []).append(entry)
        return table

    def match(self, name: str, split: tuple[str, tuple[str, ...]] | None = None) -> Match | None:
        """The rule for a key, or None. `split` is `split_numbers(name)` where it is known."""
        template, numbers = split or split_numbers(name)
        for entry in self._native.get(template, ()):
            values = _fill(entry, numbers)
            if values is not None:
                return Match(entry.rule, values, entry.arrangement, entry.parts)
        return None

    def place(self, canonical: str) -> Place | None:
        """Where a canonical name belongs, or None where the layout has no place for it."""
        return next(self._places(self._canonical, canonical), None)

    def aliases(self, canonical: str) -> list[str]:
        """Further keys under which a layout with aliases holds a canonical tensor."""
        return [place.name for place in self._places(self._aliases, canonical)]

    def _places(self, table: Mapping[str, list[_Entry]], canonical: str) -> Iterator[Place]:
        template, numbers = split_numbers(canonical)
        for entry in table.get(template, ()):
            values = _fill(entry, numbers)
            if values is None:
                continue
            index = entry.arrangement.index if entry.arrangement else ()
            at = {name: entry.part if name == "part" else int(values[name]) for name in index}
            yield Place(
                _render_native(entry.rule.native, values),
                entry.rule,
                entry.arrangement,
                at,
                len(entry.parts),
            )


def split_numbers(name: str) -> tuple[str, tuple[str, ...]]:
    """A key with its numbered components taken out.

    >>> split_numbers("blocks.11.mlp.0.weight")
    ('blocks.#.mlp.#.weight', ('11', '0'))
    """
    if _HOLE in name:  # no template has two of them side by side, so such a key fits none
        name = name.replace(_HOLE, _HOLE * 2)
    numbers = tuple(_NUMBER.findall(name))
    return (_NUMBER.sub(_HOLE, name), numbers) if numbers else (name, ())


def _words(spec: str, side: str) -> list[tuple[str, str]]:
    """(text on this side, text on the other) of each alternative."""
    pairs = [(word.split("=")[0], word.split("=")[-1]) for word in spec.split("|")]
    return pairs if side == "native" else [(theirs, ours) for ours, theirs in pairs]


def _expand(rule: Rule, pattern: str, *, side: str) -> Iterator[tuple[str, _Entry]]:
    """Every template of a pattern: its words written out, its numbers as holes."""
    arrangement = Arrangement.parse(rule.axes) if rule.axes else None
    parts = _parts(rule)
    specs = {match[1]: match[2] for match in _CAPTURE.finditer(rule.native) if match[2]}
    if parts and side == "canonical":
        specs["part"] = "|".join(parts)
    names = [name for name in specs if re.search(r"\{" + name + r"\b", pattern)]
    for chosen in itertools.product(*(_words(specs[name], side) for name in names)):
        here = dict(zip(names, (text for text, _ in chosen), strict=True))
        there = dict(zip(names, (text for _, text in chosen), strict=True))
        text = _written_out(pattern, here)
        template, numbers = _template(text)
        yield (
            template,
            _Entry(
                rule,
                arrangement,
                parts,
                numbers,
                # On a match from the native side the canonical words are wanted, and the reverse.
                there,
                parts.index(here["part"]) if "part" in here else 0,
            ),
        )


def _written_out(pattern: str, words: Mapping[str, str]) -> str:
    """The pattern with its words; what is left are numbers, marked for `_template`."""
    return _CAPTURE.sub(lambda match: words.get(match[1], f"\0{match[1]}\0"), pattern)


def _template(text: str) -> tuple[str, tuple[str, ...]]:
    """Literal numbers and captures as holes; captures are told apart by a leading `{`."""
    names = re.findall("\0([a-z]+)\0", text)
    # a number that no key has stands for the capture while literal numbers are found
    marked = re.sub("\0[a-z]+\0", "999999999", text)
    template, numbers = split_numbers(marked)
    left = iter(names)
    filled = tuple("{" + next(left) if one == "999999999" else one for one in numbers)
    if next(left, None) is not None:
        raise ValueError(f"`{text}`: a number must be a component of its own")
    return template, filled


def _parts(rule: Rule) -> tuple[str, ...]:
    found = [match[2] for match in _CAPTURE.finditer(rule.canonical) if match[1] == "part"]
    return tuple(found[0].split("|")) if found else ()


def _fill(entry: _Entry, numbers: tuple[str, ...]) -> dict[str, str] | None:
    values = dict(entry.fixed)
    for wanted, found in zip(entry.numbers, numbers, strict=True):
        if wanted[0] == "{":
            if values.setdefault(wanted[1:], found) != found:
                return None
        elif wanted != found:
            return None
    return values


def _put(table: dict[str, list[_Entry]], template: str, entry: _Entry, what: str) -> None:
    for other in table.setdefault(template, []):
        if all(
            a[0] == "{" or b[0] == "{" or a == b
            for a, b in zip(other.numbers, entry.numbers, strict=True)
        ):
            raise ValueError(
                f"two rules for one {what}: `{other.rule.native}` and `{entry.rule.native}`"
            )
    table[template].append(entry)


def _render_native(pattern: str, values: Mapping[str, str]) -> str:
    return _CAPTURE.sub(lambda match: values[match[1]], pattern)


def rename(pairs: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules that only rename: native -> canonical."""
    return tuple(Rule(native=native, canonical=canonical) for native, canonical in pairs.items())


def dropped(reasons: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for keys that no conversion carries: native -> reason."""
    return tuple(Rule(native=native, drop=reason) for native, reason in reasons.items())


def prefixed(
    rules: Iterable[Rule], native: str = "", *, canonical: str = "", mode: str = ""
) -> tuple[Rule, ...]:
    """The same rules one level further down, on either side."""
    return tuple(
        replace(
            rule,
            native=native + rule.native,
            canonical=canonical + rule.canonical if rule.canonical else "",
            mode=mode or rule.mode,
        )
        for rule in rules
    )
