"""A folder whose weights were cast states their new dtype in its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.models.stated_dtype import with_dtype
from tests.layout_support import Files
from tests.models.hf_support import load, quiet_transformers
from tests.support import cli_ok

_quiet = pytest.fixture(autouse=True)(quiet_transformers)


@pytest.mark.parametrize("to", [(), ("--to", "hf-flamingo")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_folder_loads_as_it_is(to: tuple[str, ...], dtype: str, tmp_path: Path) -> None:
    folder = Files(tmp_path).whole("llama")
    before = json.loads((folder / "config.json").read_text())
    cli_ok("convert", folder, tmp_path / "cast", *to, "--dtype", dtype)
    after = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert after == with_dtype(before, dtype) != before
    assert load(tmp_path / "cast").dtype is getattr(torch, dtype)
    cli_ok("verify", folder, tmp_path / "cast", *to, "--dtype", dtype)


def test_what_is_not_cast_keeps_its_config(tmp_path: Path) -> None:
    folder = Files(tmp_path).whole("llama")
    cli_ok("convert", folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_config_that_states_none_or_is_none(tmp_path: Path) -> None:
    folder = Files(tmp_path).whole("llama")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.endswith("dtype")}
    for at, text in enumerate((json.dumps(config), "[]", "{")):
        (folder / "config.json").write_text(text)
        cli_ok("convert", folder, tmp_path / f"{at}", "--dtype", "bfloat16")
        assert (tmp_path / f"{at}" / "config.json").read_text() == text
