"""Which layout a file is in, by evidence: keys that only one layout has, and how many keys fit.

Never by a version string or a file name. Where two layouts explain the same keys and mean different
tensors by them, the answer is an error that asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from flamingo_ckpt.errors import CkptError, name_some
from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.registry import LAYOUTS
from flamingo_ckpt.layouts.rules import Match, split_numbers
from flamingo_ckpt.tensors import escape

_Split = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What a file's keys say.

    Attributes:
        layout: the one that explains most.
        families: of the language model in it; several where its keys fit them equally, none where
            the layout has no language model.
        num_fit: keys that fit one of its rules.
        num_keys: keys in all.
        unknown: keys that fit none.
        runner_up: name of the next best layout and its number of keys, or None.
        elsewhere: of the unknown keys, those that another layout knows, and which.
    """

    layout: Layout
    families: tuple[str, ...]
    num_fit: int
    num_keys: int
    unknown: tuple[str, ...] = ()
    runner_up: tuple[str, int] | None = None
    elsewhere: tuple[str, tuple[str, ...]] | None = None

    @property
    def family(self) -> str:
        """The first of the families: any of them maps these keys alike."""
        return self.families[0] if self.families else ""

    @property
    def title(self) -> str:
        """`openflamingo (llama)`."""
        told = 0 < len(self.families) < len(FAMILIES)
        return self.layout.name + (f" ({' or '.join(self.families)})" if told else "")

    @property
    def evidence(self) -> str:
        """`334 of 334 keys fit; next: hf-flamingo with 61`."""
        next_best = (
            f"; next best: {self.runner_up[0]}, {self.runner_up[1]}" if self.runner_up else ""
        )
        return f"{self.num_fit} of {self.num_keys} keys fit{next_best}"


@dataclass(frozen=True, slots=True)
class _Candidate:
    layout: Layout
    families: tuple[str, ...]
    matches: tuple[Match | None, ...]

    @property
    def num_fit(self) -> int:
        return sum(match is not None for match in self.matches)

    def meaning(self) -> list[tuple[str, str] | None]:
        """What each key is taken for; equal for two layouts that differ only in other keys."""
        return [
            None if match is None else (_first_canonical(match), match.rule.axes)
            for match in self.matches
        ]


def _first_canonical(match: Match) -> str:
    index = match.arrangement.index if match.arrangement else ()
    return match.canonical(dict.fromkeys(index, 0)) if match.rule.canonical else ""


def detect(names: Iterable[str], where: str, *, among: Sequence[str] = ()) -> Detection:
    """Find the layout of a set of keys (wrapper prefixes removed).

    Args:
        names: the keys.
        where: the file, for messages.
        among: layouts to choose from; empty: all of them. One name is what `--from` gives.

    Raises:
        CkptError: FC411 where no layout has any evidence, FC412 where two have the same.
    """
    try:
        return _detected(tuple(dict.fromkeys(names)), tuple(among))
    except CkptError as error:
        raise error.at(where) from None


@lru_cache(maxsize=8)  # both sides of a comparison are looked at several times
def _detected(keys: tuple[str, ...], among: tuple[str, ...]) -> Detection:
    splits = [split_numbers(key) for key in keys]
    candidates = sorted(
        _candidates(splits, [LAYOUTS[name] for name in among or LAYOUTS], bool(among)),
        key=lambda one: -one.num_fit,
    )
    if not candidates:
        raise CkptError(
            "no layout has any evidence in these keys: "
            + name_some([escape(key) for key in keys], 3),
            code="FC411",
            hint="`flamingo-ckpt layouts` lists what is known; --from names one",
        )
    best = candidates[0]
    others = [one for one in candidates if one.layout is not best.layout]
    rivals = [one for one in others if one.num_fit == best.num_fit]
    meaning = best.meaning()
    differing = [one for one in rivals if one.meaning() != meaning]
    if differing and not among:
        raise CkptError(
            f"the keys fit `{best.layout.name}` and `{differing[0].layout.name}` equally well "
            f"({best.num_fit} of {len(keys)})",
            code="FC412",
            hint=f"say which: --from {best.layout.name}, or --from {differing[0].layout.name}",
        )
    unknown = [at for at, match in enumerate(best.matches) if match is None]
    return Detection(
        layout=best.layout,
        families=best.families,
        num_fit=best.num_fit,
        num_keys=len(keys),
        unknown=tuple(keys[at] for at in unknown),
        runner_up=(others[0].layout.name, others[0].num_fit) if others else None,
        elsewhere=_elsewhere(keys, unknown, others),
    )


def _candidates(
    splits: Sequence[_Split], layouts: Sequence[Layout], forced: bool
) -> list[_Candidate]:
    templates = {template for template, _ in splits}
    found: list[_Candidate] = []
    for layout in layouts:
        if not forced and not _has_evidence(layout, templates):
            continue
        best: _Candidate | None = None
        for family in layout.families:
            table = layout.table(family)
            named = (family,) if family else ()
            one = _Candidate(layout, named, tuple(table.match("", split) for split in splits))
            if best is None or one.num_fit > best.num_fit:
                best = one
            elif one.num_fit == best.num_fit and one.meaning() == best.meaning():
                best = _Candidate(layout, (*best.families, family), best.matches)
        enough = best is not None and best.num_fit > layout.min_share * len(splits)
        if best is not None and (enough or forced):
            found.append(best)
    return found


def _has_evidence(layout: Layout, templates: Iterable[str]) -> bool:
    names = list(templates)
    wanted = not layout.sentinels or any(name.startswith(layout.sentinels) for name in names)
    return wanted and not any(
        name.startswith(layout.never_has) for name in names if layout.never_has
    )


def _elsewhere(
    keys: Sequence[str], unknown: Sequence[int], others: Sequence[_Candidate]
) -> tuple[str, tuple[str, ...]] | None:
    """The layout that knows most of the keys that the best one does not."""
    found: tuple[str, tuple[str, ...]] | None = None
    for other in others:
        known = tuple(keys[at] for at in unknown if other.matches[at] is not None)
        if known and (found is None or len(known) > len(found[1])):
            found = other.layout.name, known
    return found
