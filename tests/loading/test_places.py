"""Local paths, ids of repositories, and what open_clip writes before either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.places import (
    HF_WEIGHTS,
    Access,
    config_folder,
    fetch_file,
    fetch_weights,
    local_path,
)
from tests.hub_server import HubServer, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as hub:
        yield hub


def code_of(place: str) -> str:
    with pytest.raises(CkptError) as caught:
        local_path(place, "model")
    return caught.value.code


def test_what_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("owner/name", "./owner/name", str(tmp_path / "owner")):
        assert local_path(place, "model") == place
        assert local_path(f"local-dir:{place}", "model") == place
    assert local_path("~/owner", "model") == str(tmp_path / "owner")
    assert local_path("other/name", "model") is None
    assert local_path("hf-hub:owner/name", "model") is None  # though such a folder is there
    for place in ("./other/name", "local-dir:other/name", "a/b/c", ""):
        assert code_of(place) == "FC450"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    with pytest.raises(CkptError) as caught:
        config_folder(str(tmp_path / "x"), Access(), "tokenizer")
    assert caught.value.code == "FC450"
    assert "a tokenizer is a folder" in caught.value.message


def test_weights_are_of_the_commit_of_the_config(server: HubServer, tmp_path: Path) -> None:
    """Whatever is pushed in between; and safetensors before pickles."""
    access = Access(cache_dir=tmp_path)
    files = {"config.json": b"{}", "pytorch_model.bin": b"old"}
    server.push("a/b", files | {"model.safetensors": b"first"})
    folder = config_folder("a/b", access, "model")
    server.push("a/b", files | {"model.safetensors": b"second"})
    path = Path(fetch_weights("a/b", folder, access, HF_WEIGHTS))
    assert path.parent == Path(folder)
    assert path.read_bytes() == b"first"


def test_all_shards_of_an_index_come_along(server: HubServer, tmp_path: Path) -> None:
    index = {"weight_map": {"x": "model-00001-of-00002.bin", "y": "model-00002-of-00002.bin"}}
    files = {"sub/pytorch_model.bin.index.json": json.dumps(index).encode(), "other.bin": b"3"}
    files |= {f"sub/{name}": name.encode() for name in index["weight_map"].values()}
    server.push("a/b", files)
    path = Path(fetch_file("a/b", "sub/pytorch_model.bin.index.json", Access(cache_dir=tmp_path)))
    found = sorted(one.name for one in path.parent.iterdir())
    assert found == [*sorted(index["weight_map"].values()), "pytorch_model.bin.index.json"]


def test_an_index_names_no_file_elsewhere(server: HubServer, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"x": "../../../secret"}}).encode()
    server.push("a/b", {"model.safetensors.index.json": index})
    with pytest.raises(CkptError) as caught:
        fetch_file("a/b", "model.safetensors.index.json", Access(cache_dir=tmp_path))
    assert caught.value.code == "FC503"
