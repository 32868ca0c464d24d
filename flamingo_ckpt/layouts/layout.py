"""A layout: one way of naming the tensors of a kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from flamingo_ckpt.layouts.families import FAMILIES, LanguageFamily
from flamingo_ckpt.layouts.rules import Rule, Table

#: For layouts that contain a language model, rules by family; for others, by nothing.
RulesOf = Callable[[LanguageFamily], tuple[Rule, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One naming, as data.

    Attributes:
        name: what `--to` and `--from` call it.
        title: one line for people.
        space: which kind of model it names; conversions stay inside one space.
        rules: where the layout contains no language model of several families.
        rules_of: where it does.
        sentinels: templates, one of which only this layout has; detection asks for one of them.
        min_share: of the keys that have to fit for it to be considered; for layouts whose names are
            common ones.
        never_has: templates, none of which this layout has.
        needs: templates of canonical names without which it is not the layout of what is written.
        zero_fill: key that a class of this layout wants although it says nothing -> the key whose
            rows it has; written as zeros where no source has it.
        ends_with_tokens: whether its vocabulary ends with the last token, where its relatives' is
            padded to a multiple of 64.
        withheld: group -> why a file in this layout does not hold it; only for writing.
        writes_aliases: whether a file holds every name of a tensor (the whole state dict).
        lossy: what a conversion to or from it loses; "" where it is a bijection.
        read_only: why it is never written.
        refused: why its tensors are not interchangeable with any other layout's.
        hf_config: whether a folder in this layout is described by a `config.json`.
    """

    name: str
    title: str
    space: str
    rules: tuple[Rule, ...] = ()
    rules_of: RulesOf | None = None
    sentinels: tuple[str, ...] = ()
    min_share: float = 0.0
    never_has: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    zero_fill: Mapping[str, str] = field(default_factory=dict)
    ends_with_tokens: bool = False
    withheld: Mapping[str, str] = field(default_factory=dict)
    writes_aliases: bool = False
    lossy: str = ""
    read_only: str = ""
    refused: str = ""
    hf_config: bool = False

    @property
    def families(self) -> tuple[str, ...]:
        """Language-model families that it has a table for; `("",)` where it needs none."""
        return tuple(FAMILIES) if self.rules_of else ("",)

    def table(self, family: str = "") -> Table:
        """Its rules, compiled; built once."""
        return _table(family, self.rules, self.rules_of)


@cache
def _table(family: str, rules: tuple[Rule, ...], rules_of: RulesOf | None) -> Table:
    return Table(rules if rules_of is None else rules_of(FAMILIES[family]))


#: group -> the base that supplies it where it is absent by design.
BASE_OF_GROUP: Mapping[str, str] = {
    "vision": "vision",
    "lm.layers": "language",
    "lm.rest": "language",
}


def group_of(canonical: str) -> str:
    """The part of a model that a canonical name belongs to.

    >>> group_of("lm.layers.3.self_attn.q_proj.weight"), group_of("lm.head.weight")
    ('lm.layers', 'lm.rest')
    """
    first, _, rest = canonical.partition(".")
    if first != "lm":
        return first
    second = rest.partition(".")[0]
    if second == "layers":
        return "lm.layers"
    return "lm.embed" if second.startswith("embed_") else "lm.rest"
