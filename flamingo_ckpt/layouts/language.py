"""The language models under Flamingo in their own files: what `--base-language` takes.

Both spellings of a GPT-NeoX head are read. Every layout here is one family's own naming, so that
nothing is left to convert between them.
"""

from __future__ import annotations

from flamingo_ckpt.layouts.families import LanguageFamily
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Rule


def _own_names(family: LanguageFamily) -> tuple[Rule, ...]:
    return family.rules()


LAYOUTS = (
    Layout(
        name="language-model",
        title="a language model's own names: MPT, GPT-NeoX, LLaMA, OPT, GPT-J",
        space="flamingo",
        rules_of=_own_names,
        # `transformer.wte.weight` alone makes no GPT-J
        min_share=0.5,
        never_has=("perceiver.", "lang_encoder.", "vision_tower."),
    ),
)
