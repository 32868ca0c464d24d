"""No hostile file makes the process start a program, open a socket, import or compile anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures import handmade as hm
from fixtures import make_broken
from tests.fetch_corpus import ASSETS
from tests.test_corpus import corpus_files, wrapped

ROOT = Path(__file__).resolve().parent.parent


def _warm_files(folder: Path) -> list[Path]:
    """Good files of every format, and one with every kind of text that a pickle can hold."""
    texts = b"(Vtext\nS'text'\nU\x02abT\x02\0\0\0ab\x8c\x02ab" + hm.text("x") + b"I1\nF1.5\nL3L\nt"
    kinds = {
        "torch.pt": hm.torch_zip(hm.state_dict(note=texts)),
        # shown escaped, for which Python imports a codec once
        "odd-name.pt": hm.torch_zip(hm.mapping([("weight\n", hm.tensor())])),
        "legacy.pt": hm.legacy(hm.state_dict()),
        "script.pt": hm.script_zip(hm.module("Net", [("weight", hm.tensor())])),
        "one.safetensors": hm.safetensors({"a": hm.entry()}),
        "one.npy": hm.npy(),
        "two.npz": hm.npz({"a": hm.npy()}),
        "old-names.npz": hm.zipped([hm.Record(name="a.npy", data=hm.npy(), flags=0)]),
    }
    for name, data in kinds.items():
        (folder / name).write_bytes(data)
    sharded = folder / "sharded"
    sharded.mkdir()
    (sharded / "model.safetensors.index.json").write_bytes(hm.index({"a": "one.safetensors"}))
    (sharded / "one.safetensors").write_bytes(kinds["one.safetensors"])
    return [*(folder / name for name in kinds), sharded]


def _watch(files: list[Path], tmp_path: Path) -> dict[str, Any]:
    warm = tmp_path / "warm"
    warm.mkdir()
    payload = hm.pickled(hm.call(hm.named("posix", "system"), hm.text("true")))
    wanted = {
        "warm": [str(path) for path in _warm_files(warm)],
        "files": [str(path) for path in files],
        "payload": payload.hex(),
    }
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, "-m", "tests.audit_process", str(plan)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert len(answer["ends"]) == len(files)
    # The hook works: it saw what the payload did, in the same process, right after the files.
    assert {"pickle.find_class", "os.system"} <= {event for _, event, _ in answer["payload"]}
    return answer


def _broken_files() -> list[Path]:
    inside = [path for path in make_broken.HERE.rglob("*") if path.is_file()]
    return sorted([*inside, *(path for path in make_broken.HERE.iterdir() if path.is_dir())])


def test_broken_files_do_nothing(tmp_path: Path) -> None:
    answer = _watch(_broken_files(), tmp_path)
    assert answer["events"] == []
    assert set(answer["ends"].values()) > {"listed", "FC501", "FC103", "FC101"}


@pytest.mark.parametrize("container", ["zip", "legacy", "beside"])
def test_corpus_pickles_inside_a_torch_file_do_nothing(container: str, tmp_path: Path) -> None:
    files = []
    for number, path in enumerate(corpus_files("*.pkl")):
        files.append(tmp_path / f"{number}-{path.name}")
        files[-1].write_bytes(wrapped(path.read_bytes(), container))
    answer = _watch(files, tmp_path)
    assert answer["events"] == []
    assert "FC501" in answer["ends"].values()


def test_corpus_files_do_nothing(tmp_path: Path) -> None:
    answer = _watch([*corpus_files("*"), ASSETS], tmp_path)
    assert answer["events"] == []
    assert "FC501" in answer["ends"].values()


@pytest.mark.parametrize(
    ("module", "name", "event"),
    [
        ("posix", "fork", "os.fork"),
        ("_socket", "socket", "socket.__new__"),
        ("builtins", "compile", "compile"),
        ("builtins", "exec", "exec"),
        ("antigravity", "x", "import"),
        ("ctypes", "CDLL", "ctypes.dlopen"),
        ("subprocess", "Popen", "subprocess.Popen"),
        ("builtins", "open", "open"),
    ],
)
def test_the_hook_records_everything_that_it_should(module: str, name: str, event: str) -> None:
    """By raising what CPython raises: an event of each kind is written down."""
    from tests.audit_process import Recorder

    recorder = Recorder()
    args = ("x", "w", 1) if event == "open" else (f"{module}.{name}",)
    recorder(event, args)
    assert recorder.seen == []
    recorder.watching = True
    recorder(event, args)
    assert [seen for _, seen, _ in recorder.seen] == [event]
    recorder("open", ("x", "rb", 0))
    assert len(recorder.seen) == 1
