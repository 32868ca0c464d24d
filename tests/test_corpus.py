"""A corpus of hostile models that we did not write: every file is listed or refused, none is run.

`make test` fetches it first (`tests/fetch_corpus.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures import handmade as hm
from flamingo_ckpt.errors import CODES
from tests.attacks_support import put_file, refused, run_json
from tests.fetch_corpus import ASSETS

NUM_FILES = 108
#: The only files that are listed, and why that is right. They hold numbers and strings, no code.
HARMLESS = {
    # Its metadata holds the text of an import statement: shown, never run.
    "samples/safetensors/malicious_import.safetensors",
    "samples/safetensors/safe_model.safetensors",
    # A plain array of numbers; the scenario is about its licence.
    "scenarios/license_scenarios/unlicensed_dataset/embeddings.npy",
}
#: Pickles that hold plain data: strings, numbers, and other pickles as text or bytes, which no
#: reader runs unless told to. All others name something that could run code.
PLAIN_DATA = {
    "decode_exec_chain.pkl",
    "malicious_model_realistic.pkl",
    "mixed_model.pkl",
    "model_weights.pkl",
    "nested_pickle_base64.pkl",
    "nested_pickle_hex.pkl",
    "nested_pickle_multistage.pkl",
    "nested_pickle_raw.pkl",
    "safe_data.pkl",
    "safe_large_model.pkl",
    "safe_model_with_binary.pkl",
    "safe_model_with_encoding.pkl",
    "safe_model_with_tokens.pkl",
    "safe_nested_structure.pkl",
    "simple_nested.pkl",
}
#: An object of an unknown class, which could only run code where that class is installed.
UNKNOWN_CLASS = {"agpl_model.pkl"}
#: Harmless first pickle, the payload in a second one behind it.
TWO_PICKLES = {"multiple_stream_attack.pkl"}
_BATCHES = 4


def corpus_files(pattern: str) -> list[Path]:
    """The files of the corpus; fails where it is not there."""
    found = sorted(path for path in ASSETS.rglob(pattern) if path.is_file())
    if not found:
        pytest.fail("the corpus of hostile models is not there; run `make test`, which fetches it")
    return found


def wrapped(pickled: bytes, container: str) -> bytes:
    """The pickle where torch keeps its own, or as bytes of a good one's beside the weights."""
    if container == "zip":
        data_pkl = hm.Record(name="m/data.pkl", data=pickled)
        return hm.zipped([data_pkl, *hm.torch_records(b"")[1:]])
    if container == "legacy":
        parts = hm.legacy_parts(hm.state_dict())
        return b"".join([*parts[:3], pickled, *parts[4:]])
    # Without its header and its STOP a pickle is a value: here, of an entry beside the weights.
    head = 2 if pickled[:1] == b"\x80" else 0
    body = pickled[head:].rstrip(b"\n").removesuffix(b".")
    pairs = [("state_dict", hm.state_dict()), ("note", body)]
    return hm.zipped(
        [
            hm.Record(name="m/data.pkl", data=hm.pickled(hm.mapping(pairs), protocol=4)),
            *hm.torch_records(b"")[1:],
        ]
    )


def test_the_corpus_is_whole() -> None:
    files = corpus_files("*")
    assert len(files) == NUM_FILES
    names = {str(path.relative_to(ASSETS)) for path in files}
    assert names >= HARMLESS
    assert {path.name for path in files} >= PLAIN_DATA | UNKNOWN_CLASS | TWO_PICKLES


_INSPECT_EACH = """
import contextlib, io, json, sys
from flamingo_ckpt.cli.main import run
ends = []
for path in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(["inspect", path, "--json"])
    ends.append([code, json.loads(out.getvalue())])
print(json.dumps(ends))
"""


@pytest.mark.parametrize("batch", range(_BATCHES))
def test_every_file_is_listed_or_refused(batch: int) -> None:
    files = corpus_files("*")[batch::_BATCHES]
    done = subprocess.run(
        [sys.executable, "-c", _INSPECT_EACH, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    ends: list[tuple[int, dict[str, Any]]] = json.loads(done.stdout)
    assert len(ends) == len(files)
    for path, (code, document) in zip(files, ends, strict=True):
        name = str(path.relative_to(ASSETS))
        if name in HARMLESS:
            assert code == 0, name
            continue
        assert code == 2, name
        (finding,) = document["findings"]
        assert finding["code"] in CODES.keys() - {"FC008"}, name
        assert document["where"].startswith(str(path)), name


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_files_convert(name: str, tmp_path: Path) -> None:
    corpus_files("*")
    code, document = run_json("convert", ASSETS / name, tmp_path / "out")
    assert code == 0, document["findings"]
    assert document["summary"]["verified"] == document["summary"]["num_tensors"] >= 1


def test_convert_writes_nothing_of_what_it_refuses(tmp_path: Path) -> None:
    for path in corpus_files("*"):
        if str(path.relative_to(ASSETS)) in HARMLESS:
            continue
        code, document = run_json("convert", path, tmp_path / "out.safetensors")
        assert code == 2, path
        assert document["findings"][0]["code"] != "FC008", path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_exploits_in_the_place_of_torchs_own_pickle(container: str, tmp_path: Path) -> None:
    for number, path in enumerate(corpus_files("*.pkl")):
        src = put_file(tmp_path, wrapped(path.read_bytes(), container), f"{number}-{path.name}")
        if path.name in PLAIN_DATA:
            refused(src, {"FC201", "FC110"})
        elif path.name in UNKNOWN_CLASS:
            refused(src, {"FC201", "FC502", "FC110"})
        elif path.name in TWO_PICKLES:
            refused(src, {"FC110", "FC501"})
        else:
            refused(src, "FC501")


def test_exploits_beside_good_weights(tmp_path: Path) -> None:
    for number, path in enumerate(corpus_files("*.pkl")):
        src = put_file(tmp_path, wrapped(path.read_bytes(), "beside"), f"{number}-{path.name}")
        if path.name in PLAIN_DATA | UNKNOWN_CLASS:
            # Data that is listed, and dropped.
            code, document = run_json("inspect", src)
            assert code == 0, (path.name, document["findings"])
            assert document["inputs"][0]["wrapper"] == "state_dict"
            assert [item["path"] for item in document["beside"]] == ["note"]
        elif path.name in TWO_PICKLES:
            refused(src, {"FC110", "FC501"})
        else:
            refused(src, "FC501")
