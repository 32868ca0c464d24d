"""Flamingos of the zoo as files, and what a conversion of them should hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.formats import open_checkpoint
from tests import zoo
from tests.support import Facts, cli_ok, torch_facts

#: Computed when the model is built, and never carried.
BUFFER = re.compile(r"\.(inv_freq|masked_bias|attention\.bias|position_ids)$")
FAMILIES = [
    *(pytest.param(family, "now", id=f"{family}-now") for family in zoo.FAMILIES),
    *(pytest.param(f, "2023", id=f"{f}-2023") for f in ("mpt7b", "gpt_neox", "llama")),
]
each_model = pytest.mark.parametrize(("family", "era"), FAMILIES)


class Files:
    """The zoo's models as files in one folder, each written when it is first asked for.

    Args:
        folder: where they go.
        options: of the zoo's models, unless a call says otherwise.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options

    def write(self, what: str, family: str, era: str = "now", **options: Any) -> Path:
        """`partial`, `full`, `clip` or `language` of upstream's model, by torch.save."""
        options = {**self.options, **options}
        path = self._path(".pt", what, family, era, options)
        if not path.exists():
            model = zoo.openflamingo(family, era=era, **options)
            zoo.save_torch(getattr(model, what), path)
        return path

    def config(self, family: str, **options: Any) -> Path:
        options = {**self.options, **options}
        path = self._path(".json", "config", family, "", options)
        path.write_text(json.dumps(zoo.openflamingo(family, **options).config))
        return path

    def bases(self, family: str, era: str = "now", **options: Any) -> list[Any]:
        clip = self.write("clip", family, era, **options)
        language = self.write("language", family, era, **options)
        return ["--base-vision", clip, "--base-language", language]

    def whole(self, family: str, era: str = "now", **options: Any) -> Path:
        """The self-contained Hugging Face folder, made by the command line of all its parts."""
        options = {**self.options, **options}
        path = self._path("", "hf", family, era, options)
        if not path.exists():
            cli_ok(
                *("convert", self.write("partial", family, era, **options), path),
                *("--to", "hf-flamingo", "--config", self.config(family, **options)),
                *self.bases(family, era, **options),
            )
        return path

    def _path(self, suffix: str, what: str, family: str, era: str, options: Any) -> Path:
        return self.folder / ("-".join(map(str, (what, family, era, *options.values()))) + suffix)


def carried(state: Mapping[str, Any]) -> dict[str, Facts]:
    """What any layout carries of a state dict: all but the buffers."""
    return {name: one for name, one in torch_facts(state).items() if not BUFFER.search(name)}


def on_disk(state: Mapping[str, Any]) -> dict[str, Facts]:
    """`carried`, with GPT-NeoX's head under the name that its files have."""
    is_neox = any(".gpt_neox." in name for name in state)
    return {
        name.replace("lang_encoder.lm_head.", "lang_encoder.embed_out.") if is_neox else name: one
        for name, one in carried(state).items()
    }


def without_rows(facts: Facts, rows: int) -> Facts:
    """The first rows of a tensor."""
    size = len(facts.data) // facts.shape[0]
    return Facts(facts.dtype, (rows, *facts.shape[1:]), facts.data[: rows * size])


def metadata(path: Path) -> Mapping[str, str]:
    return open_checkpoint(str(path)).metadata


def assert_same(found: Mapping[str, Facts], wanted: Mapping[str, Facts]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
