"""Hostile JSON: safetensors headers, indexes and the folders around them, strings for the eye."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fixtures import handmade as hm
from tests.attacks_support import (
    converted,
    inspected,
    is_printable,
    put_file,
    put_folder,
    refused,
    run_json,
    run_verb,
)

INDEX = "model.safetensors.index.json"
HOSTILE = "a\x1b[2J\x1b]0;x\x07\r\n<script>alert(1)</script>\u202e\u2066|`*\u200b\x9b31m\0end"


def shard(*names: str) -> bytes:
    """A safetensors file with these tensors."""
    header = {name: hm.entry(16 * n, 16 * n + 16) for n, name in enumerate(names)}
    return hm.safetensors(header, hm.WEIGHT * len(names))


# -- safetensors


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_a_header_length_that_lies(length: int, tmp_path: Path) -> None:
    data = hm.safetensors({"a": hm.entry()}, length=length)
    refused(put_file(tmp_path, data, "m.safetensors"), {"FC001", "FC101", "FC102"})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"{}{}",
        b"{}\0",
        b"\xef\xbb\xbf{}",
        b'\xff{"a":1}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":NaN}',
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
        b'{"__metadata__":{"k":"1","k":"2"}}',
        b'{"__metadata__":{},"__metadata__":{}}',
        b'{"__metadata__":null}',
        b'{"__metadata__":{"k":"\\udc80"}}',
    ],
)
def test_a_header_that_is_not_strict_json(raw: bytes, tmp_path: Path) -> None:
    path = put_file(tmp_path, hm.safetensors(raw), "m.safetensors")
    refused(path, {"FC001", "FC101", "FC103", "FC104"})


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"dtype": "F32", "shape": [2, 2]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "offset": 0},
        {"dtype": "F33", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "C128", "shape": [1], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2, True], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1] * 65 + [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 62] * 2, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 62] * 40, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 64, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 1 << 63]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]},
        {"dtype": "F4", "shape": [31], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
    ],
)
def test_an_entry_that_no_writer_writes(entry: Any, tmp_path: Path) -> None:
    path = put_file(tmp_path, hm.safetensors({"a": entry}), "m.safetensors")
    refused(path, {"FC101", "FC103"})


@pytest.mark.parametrize("name", ["", "a\0", "a\nb", "a\x1b[0m", "\x7f", "\x9b31m", "\r", "\ud800"])
def test_a_name_that_is_no_name(name: str, tmp_path: Path) -> None:
    path = put_file(tmp_path, hm.safetensors({name: hm.entry()}), "m.safetensors")
    refused(path, {"FC101", "FC505"})


@pytest.mark.parametrize(
    "aliases",
    ["[]", "nonsense", '{"b":"ghost"}', '{"a":"a"}', '{"b":["a"]}', '{"b":{}}', '{"b":1}',
     '{"b\\u0000":"a"}', '{"b":"a","b":"a"}', '{"\\ud800":"a"}', '{"":"a"}'],
)  # fmt: skip
def test_recorded_aliases_that_do_not_fit(aliases: str, tmp_path: Path) -> None:
    header = {"__metadata__": {"flamingo_ckpt.aliases": aliases}, "a": hm.entry()}
    path = put_file(tmp_path, hm.safetensors(header), "m.safetensors")
    refused(path, {"FC101", "FC104", "FC505"})


@pytest.mark.parametrize("place", ["between", "start", "overlap", "same", "end"])
def test_data_that_does_not_tile(place: str, tmp_path: Path) -> None:
    spans = {
        "between": ((0, 16), (20, 36), 36),
        "start": ((4, 20), (20, 36), 36),
        "overlap": ((0, 16), (8, 24), 24),
        "same": ((0, 16), (0, 16), 16),
        "end": ((0, 16), (16, 32), 33),
    }
    first, second, size = spans[place]
    header = {"a": hm.entry(*first), "b": hm.entry(*second)}
    refused(put_file(tmp_path, hm.safetensors(header, bytes(size)), "m.safetensors"), "FC103")


# -- strings for the eye


def test_hostile_metadata_is_shown_escaped_and_kept_exactly(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", HOSTILE: HOSTILE}, "a": hm.entry()}
    path = put_file(tmp_path, hm.safetensors(header), "m.safetensors")
    code, shown, _ = run_verb("inspect", path)
    assert code == 0
    assert is_printable(shown)
    assert "\\x1b[2J" in shown
    code, raw, _ = run_verb("inspect", path, "--json")
    assert is_printable(raw)
    assert json.loads(raw)["metadata"] == {"format": "pt", HOSTILE: HOSTILE}
    report = tmp_path / "report.md"
    assert run_verb("inspect", path, "--output", report)[0] == 0
    assert is_printable(report.read_text())
    assert "<script>" not in report.read_text()
    code, shown, talk = run_verb("convert", path, tmp_path / "out")
    assert code == 0
    assert is_printable(shown + talk)


def test_hostile_names_are_shown_escaped_and_not_written(tmp_path: Path) -> None:
    names = [HOSTILE, "back\\slash", "brace{1,2}", "\u202eright", "x" * 5000, "ünïcode"]
    pairs = [(name, hm.tensor()) for name in names]
    pairs.append((f"note{HOSTILE}", hm.call(hm.stack_named(f"my{HOSTILE}", HOSTILE))))
    path = put_file(tmp_path, hm.torch_zip(hm.mapping(pairs)))
    for options in ((), ("-v",)):
        code, shown, talk = run_verb("inspect", path, *options)
        assert code == 0
        assert is_printable(shown + talk)
    assert [tensor["name"] for tensor in inspected(path)["tensors"]] == names
    report = tmp_path / "report.md"
    assert run_verb("inspect", path, "--output", report)[0] == 0
    assert is_printable(report.read_text())
    assert "<script>" not in report.read_text()
    refused(path, "FC505", inspect=False)
    kept = converted(path, "--exclude", f"{HOSTILE[0]}\x1b*")
    assert set(kept) <= set(names[1:])


@pytest.mark.parametrize(
    "body",
    [
        hm.stack_named(HOSTILE, HOSTILE),
        hm.call(hm.stack_named(HOSTILE, HOSTILE), hm.tensor()),
        hm.mapping([("w", hm.call(hm.stack_named(f"{HOSTILE}\udc80", "x"), hm.tensor()))]),
        hm.mapping([("w", hm.tensor(hm.storage(key=HOSTILE)))]),
        hm.mapping([("w", hm.tensor(hm.storage(key="\udcff")))]),
        hm.mapping([(HOSTILE, hm.tensor()), (HOSTILE, hm.tensor(hm.storage("1")))]),
        hm.mapping([(HOSTILE, hm.state_dict()), (f"{HOSTILE}2", hm.state_dict())]),
        hm.mapping([("w", hm.tensor()), (f"w{HOSTILE}", hm.state_dict())]),
        hm.stack_named("os", HOSTILE),
        hm.text(HOSTILE),
    ],
)
@pytest.mark.parametrize("container", ["zip", "legacy", "script"])
def test_errors_show_hostile_strings_escaped(container: str, body: bytes, tmp_path: Path) -> None:
    make = {"zip": hm.torch_zip, "legacy": hm.legacy, "script": hm.script_zip}[container]
    codes = {"FC102", "FC104", "FC110", "FC201", "FC207", "FC501", "FC502"}
    refused(put_file(tmp_path, make(body)), codes)


@pytest.mark.parametrize(
    "name", ["\x07\x1b[2J.safetensors", "\u202em.safetensors", "\udcff.safetensors"]
)
def test_hostile_file_names(name: str, tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "np"}, "a": hm.entry()}
    folder = put_folder(tmp_path, {name: hm.safetensors(header)})
    for src in (folder / name, folder):
        code, shown, talk = run_verb("inspect", src)
        assert code == 0
        assert is_printable(shown + talk)
        code, document = run_json("convert", src, tmp_path / f"out-{src.suffix or 'folder'}")
        assert code == 0, document["findings"]
    broken = put_folder(tmp_path, {name: hm.safetensors(header)[:-1]}, "broken")
    for src in (broken / name, broken):
        code, shown, talk = run_verb("inspect", src)
        assert code == 2
        assert is_printable(shown + talk)


# -- indexes


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/hostname", "sub/one.safetensors", "./one.safetensors", "..",
     ".", "", "one.safetensors\0", "https://example.org/one.safetensors", "file:one.safetensors",
     "hf://org/repo/one.safetensors", "..\\outside.safetensors", "C:\\one.safetensors",
     "%2e%2e%2fone.safetensors", "one.safetensors\n", 7, None, ["one.safetensors"]],
)  # fmt: skip
def test_an_index_names_plain_files_only(name: Any, tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(shard("a"))
    folder = put_folder(tmp_path, {INDEX: hm.index({"a": name}), "one.safetensors": shard("a")})
    (folder / "sub").mkdir()
    (folder / "sub" / "one.safetensors").write_bytes(shard("a"))
    refused(folder, "FC503")
    refused(folder / INDEX, "FC503")


@pytest.mark.parametrize("target", ["outside.safetensors", "/etc/hostname", "nowhere", "loop"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_a_link_out_of_the_folder(
    target: str, indexed: bool, tmp_path: Path
) -> None:
    (tmp_path / "outside.safetensors").write_bytes(shard("a"))
    folder = put_folder(tmp_path, {INDEX: hm.index({"a": "model.safetensors"})} if indexed else {})
    link = folder / "model.safetensors"
    link.symlink_to({"loop": link, "nowhere": "../gone"}.get(target, Path("..") / target))
    refused(folder, {"FC001", "FC002", "FC107", "FC503"})


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "deadbeef").write_bytes(shard("a"))
    (snapshot / "model.safetensors").symlink_to("../../blobs/deadbeef")
    assert list(converted(snapshot)) == ["a"]


@pytest.mark.parametrize(
    ("index", "files", "code"),
    [
        (hm.index({"a": "one.safetensors", "b": "gone.safetensors"}), {"one": ["a"]}, "FC107"),
        (hm.index({"a": "one.safetensors", "b": "one.safetensors"}), {"one": ["a"]}, "FC107"),
        (hm.index({"a": "one.safetensors"}), {"one": ["a", "b"]}, "FC107"),
        (hm.index({"a": "two.safetensors", "b": "one.safetensors"}),
         {"one": ["a"], "two": ["b"]}, "FC107"),
        (hm.index({"a": "one.safetensors", "b": "two.safetensors"}),
         {"one": ["a"], "two": ["a", "b"]}, "FC202"),
        (b'{"weight_map":{"a":"one.safetensors","a":"one.safetensors"}}', {"one": ["a"]}, "FC104"),
        (b'{"weight_map":{}}', {"one": ["a"]}, "FC101"),
        (b'{"weight_map":[["a","one.safetensors"]]}', {"one": ["a"]}, "FC101"),
        (b'{"metadata":{}}', {"one": ["a"]}, "FC101"),
        (b"[]", {"one": ["a"]}, "FC101"),
        (b"", {"one": ["a"]}, "FC101"),
        (b'{"weight_map":{"a":"one.safetensors"}} trailing', {"one": ["a"]}, "FC101"),
        (b'{"weight_map":{"a":' + b"[" * 100_000, {"one": ["a"]}, "FC101"),
    ],
)  # fmt: skip
def test_index_and_shards_must_agree(
    index: bytes, files: dict[str, list[str]], code: str, tmp_path: Path
) -> None:
    shards = {f"{name}.safetensors": shard(*names) for name, names in files.items()}
    folder = put_folder(tmp_path, {INDEX: index, **shards})
    codes = {code, "FC102"} if not index else code
    refused(folder, codes)


def test_every_way_of_cutting_an_index(tmp_path: Path) -> None:
    whole = hm.index({"a": "one.safetensors"})
    folder = put_folder(tmp_path, {INDEX: whole, "one.safetensors": shard("a")})
    assert list(converted(folder)) == ["a"]
    for length in range(len(whole)):
        (folder / INDEX).write_bytes(whole[:length])
        code, document = run_json("inspect", folder)
        assert code == 2
        assert document["findings"][0]["code"] in ("FC101", "FC102")


# -- folders


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "FC001"),
        ({"notes.txt": b"x", "run.py": b"import os"}, "FC001"),
        ({"config.json": b"{}", "training_args.bin": hm.torch_zip(hm.state_dict())}, "FC001"),
        ({"model-00001-of-00002.safetensors": shard("a")}, "FC107"),
        ({"model-00001-of-99999.safetensors": shard("a")}, "FC107"),
        ({"a.safetensors": shard("a"), "b.safetensors": shard("a")}, "FC202"),
        ({"a.pt": hm.torch_zip(hm.state_dict()), "b.pt": hm.torch_zip(hm.state_dict())}, "FC207"),
        ({"model.safetensors": b""}, "FC102"),
        ({"model.safetensors": shard("a"), INDEX: hm.index({"a": "one.safetensors"})}, "FC207"),
    ],
)
def test_folders_that_are_no_checkpoint(files: dict[str, bytes], code: str, tmp_path: Path) -> None:
    refused(put_folder(tmp_path, files), code)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_not_a_regular_file(kind: str, tmp_path: Path) -> None:
    folder = put_folder(tmp_path, {INDEX: hm.index({"a": "one.safetensors"})})
    odd = folder / "one.safetensors"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to("/dev/zero")
    refused(folder, {"FC002", "FC503"})
    if kind == "fifo":
        refused(odd, "FC002")
