"""The second time is instant, and nothing in the cache can make an answer wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flamingo_ckpt.models import cache, construct
from flamingo_ckpt.models.config import ModelConfig, read_config
from flamingo_ckpt.models.expectation import Expectation, expect
from tests.support import python

NAME = "model:vit-b-32"
CHECK = """
import sys
from flamingo_ckpt.models.config import read_config
from flamingo_ckpt.models.expectation import expect
found = expect(read_config(sys.argv[1]))
heavy = {"torch", "transformers", "open_clip", "timm", "numpy", "torchvision"} & set(sys.modules)
print(len(found.tensors), sorted(heavy))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flamingo_ckpt"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layouts that were really constructed."""
    calls: list[str] = []
    real = construct.construct

    def counted(config: ModelConfig, layout: str) -> object:
        calls.append(layout)
        return real(config, layout)

    monkeypatch.setattr(construct, "construct", counted)
    return calls


def test_the_second_time_needs_no_library(folder: Path) -> None:
    wanted = expect(read_config(NAME))
    done = python(CHECK, NAME)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(wanted.tensors)} []"


def test_what_is_kept_is_what_was_built(folder: Path, built: list[str]) -> None:
    config = read_config("openflamingo-9b-vitl-mpt7b")
    first, second = expect(config), expect(config)
    assert first == second
    assert first is not second
    assert built == ["openflamingo"]


def test_an_entry_for_each_config_and_layout(folder: Path, built: list[str]) -> None:
    for name in ("vit-b-32", "vit-b-16"):
        for layout in ("open_clip", "hf-clip"):
            assert expect(read_config(name), layout).layout == layout
    assert len(built) == 4
    assert len(os.listdir(folder)) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"",
        lambda raw: b"{",
        lambda raw: b"[]\n[]",
        lambda raw: b"\xff" + raw,
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw.replace(b"F32", b"F16", 1),
        lambda raw: raw.replace(b"[768", b"[769", 1),
        lambda raw: raw.replace(b'"schema": 1', b'"schema": 2', 1),
        lambda raw: raw.replace(b'"layout": "open_clip"', b'"layout": "hf-clip"', 1),
    ],
)
def test_a_spoiled_entry_is_built_again(
    folder: Path, built: list[str], spoil: Callable[[bytes], bytes]
) -> None:
    first = expect(read_config(NAME))
    (entry,) = folder.iterdir()
    raw = entry.read_bytes()
    assert spoil(raw) != raw
    entry.write_bytes(spoil(raw))
    assert expect(read_config(NAME)) == first
    assert len(built) == 2
    assert entry.read_bytes() == raw


def test_rows_of_a_wrong_form_are_ignored_even_with_a_digest(folder: Path) -> None:
    expect(read_config(NAME))
    (path,) = folder.iterdir()
    entry = cache.entry_for(read_config(NAME).digest, "open_clip")
    assert entry.path == str(path)
    row = ["a", "F32", [1], "parameter", None, "vision", None, True]
    for rows in ([["a"]], [1], {"a": 1}, 3, [[*row[:1], "F33", *row[2:]]], [[1, *row[1:]]]):
        body = json.dumps(rows).encode()
        path.write_bytes(json.dumps(cache._head(entry, body)).encode() + b"\n" + body)
        assert cache.load(entry, "open_clip") is None
    body = json.dumps([row]).encode()
    path.write_bytes(json.dumps(cache._head(entry, body)).encode() + b"\n" + body)
    assert cache.load(entry, "open_clip") is not None


def test_another_version_of_a_library_is_another_entry(
    folder: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(read_config(NAME))
    versions = {"torch": "1.0", "timm": None}
    monkeypatch.setattr(cache, "_version", lambda name: versions.get(name, "0"))
    expect(read_config(NAME))
    assert len(built) == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert len(expect(read_config(NAME)).tensors) == 302
    assert file.read_text() == "in the way"


def test_an_interrupted_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(src: str, dst: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    entry = cache.entry_for("digest", "open_clip")
    with pytest.raises(KeyboardInterrupt):
        cache.store(entry, Expectation(layout="open_clip", tensors=()))
    assert list(folder.iterdir()) == []


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        path = cache.entry_for("digest", "open_clip").path
        assert path.startswith(str(tmp_path / ".cache" / "flamingo_ckpt") + "/")
