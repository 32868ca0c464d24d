"""Putting files and folders in place: atomically, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flamingo_ckpt.errors import WriteError
from flamingo_ckpt.formats import staging
from tests.support import cli, cli_ok, facts_at, names_in, torch_facts, tree

# Holds every write until a signal arrives, so that one arrives in the middle of a conversion,
# however busy the machine is. The interpreter itself writes to the pipe, whatever it is doing.
SLOW = """
import os, select, signal, sys
arrived, pipe = os.pipe()
os.set_blocking(pipe, False)
signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
from flamingo_ckpt.formats import staging
import {module} as target
write_all = staging.write_all
def slow(fd, block, offset):
    write_all(fd, block, offset)
    os.write(1, b"writing\\n")
    select.select([arrived], [], [], {seconds})
target.write_all = slow
from flamingo_ckpt.cli.main import main
sys.argv = ["flamingo-ckpt", *sys.argv[1:]]
main()
"""


@pytest.fixture(params=[True, False], ids=["renameat2", "fallback"])
def _rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to exchange: the system call, and what stands in where there is none."""
    if not request.param:
        monkeypatch.setattr(staging, "renameat2", lambda *_: False)


@pytest.fixture(params=[0o022, 0o077], ids=["022", "077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def checkpoint(tmp_path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    path = tmp_path / f"src{seed}.pt"
    torch.save({f"layer.{i}": torch.randn(10, 10) for i in range(4)}, path)
    return path


def start_slow(seconds: float, *arguments: object) -> subprocess.Popen[str]:
    """A conversion that waits after each write; returns once the first bytes are written."""
    import flamingo_ckpt.convert as convert_module

    code = SLOW.format(module=convert_module.__name__, seconds=seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_killed_in_the_middle(target: str, tmp_path: Path) -> None:
    src = checkpoint(tmp_path)
    process = start_slow(60, "convert", src, tmp_path / target)
    staged = [name for name in names_in(tmp_path) if name != src.name]
    assert len(staged) == 1
    assert staged[0].startswith(".")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / target).exists()
    assert names_in(tmp_path) == sorted([src.name, *staged])
    cli_ok("convert", src, tmp_path / target)
    assert names_in(tmp_path) == sorted([src.name, target])
    assert facts_at(tmp_path / target) == facts_at(src)


def test_killed_while_overwriting_leaves_what_was_there(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path, 0), checkpoint(tmp_path, 1)
    for target in ("out.safetensors", "out"):
        cli_ok("convert", old, tmp_path / target)
        process = start_slow(60, "convert", new, tmp_path / target, "--overwrite")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert facts_at(tmp_path / target) == facts_at(old)
        cli_ok("convert", new, tmp_path / target, "--overwrite")
        assert facts_at(tmp_path / target) == facts_at(new)
    assert names_in(tmp_path) == sorted([old.name, new.name, "out", "out.safetensors"])


def test_a_live_neighbour_is_left_alone(tmp_path: Path) -> None:
    """Two runs to one place: the second does not remove what the first still writes."""
    src = checkpoint(tmp_path)
    process = start_slow(60, "convert", src, tmp_path / "out.safetensors")
    try:
        staged = [name for name in names_in(tmp_path) if name.startswith(".")]
        cli_ok("convert", src, tmp_path / "out.safetensors")
        assert [name for name in names_in(tmp_path) if name.startswith(".")] == staged
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted(number: signal.Signals, code: int, word: str, tmp_path: Path) -> None:
    src = checkpoint(tmp_path)
    process = start_slow(60, "convert", src, tmp_path / "out")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert f"error: {word}" in err
    assert "Traceback" not in err
    assert names_in(tmp_path) == [src.name]


@pytest.mark.usefixtures("_rename")
@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_an_existing_destination_needs_overwrite(target: str, tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path, 0), checkpoint(tmp_path, 1)
    cli_ok("convert", old, tmp_path / target)
    before = tree(tmp_path)
    outcome = cli("convert", new, tmp_path / target, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC003"])
    assert "--overwrite" in outcome.document["findings"][0]["hint"]
    assert tree(tmp_path) == before
    cli_ok("convert", new, tmp_path / target, "--overwrite")
    assert facts_at(tmp_path / target) == facts_at(new)
    assert names_in(tmp_path) == sorted([old.name, new.name, target])


@pytest.mark.usefixtures("_rename")
def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    cli_ok("convert", checkpoint(tmp_path), tmp_path / "out")
    assert names_in(tmp_path / "out") == ["model.safetensors"]


@pytest.mark.usefixtures("_rename")
def test_overwriting_a_folder_keeps_what_no_writer_made(tmp_path: Path) -> None:
    src, out = checkpoint(tmp_path), tmp_path / "out"
    cli_ok("convert", src, out, "--max-shard-size", 500)
    stale = set(names_in(out))
    assert len(stale) == 5
    (out / "README.md").write_text("# by hand\n")
    (out / "tokenizer.json").write_text("{}\n")
    (out / "pictures").mkdir()
    (out / "pictures" / "one.png").write_bytes(b"png")
    (out / "pytorch_model.bin.index.json").write_text("{}")
    (out / "pytorch_model-00001-of-00009.bin").write_bytes(b"stale")
    cli_ok("convert", src, out, "--overwrite")
    assert set(names_in(out)) == {"README.md", "tokenizer.json", "pictures", "model.safetensors"}
    assert tree(out)["pictures/one.png"] == b"png"
    assert (out / "README.md").read_text() == "# by hand\n"
    cli_ok("convert", src, out, "--overwrite", "--format", "torch", "--max-shard-size", 900)
    assert "model.safetensors" not in names_in(out)
    assert facts_at(out) == facts_at(src)


@pytest.mark.usefixtures("_rename")
def test_what_the_source_carries_replaces_what_was_kept(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    checkpoint(tmp_path).rename(src / "pytorch_model.bin")
    (src / "config.json").write_text('{"new": 1}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"old": 1}')
    (tmp_path / "out" / "notes.txt").write_text("mine")
    cli_ok("convert", src, tmp_path / "out", "--overwrite")
    assert tree(tmp_path / "out")["config.json"] == b'{"new": 1}'
    assert tree(tmp_path / "out")["notes.txt"] == b"mine"


def test_a_run_killed_between_two_renames_is_mended(tmp_path: Path) -> None:
    """Without renameat2 the old folder stands aside for a moment; the next run finds it."""
    src, out = checkpoint(tmp_path), tmp_path / "out"
    cli_ok("convert", src, out)
    (out / "README.md").write_text("kept\n")
    out.rename(tmp_path / f".out{staging._ASIDE}0123456789ab")
    outcome = cli("convert", src, out, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC003"])
    assert (out / "README.md").read_text() == "kept\n"
    out.rename(tmp_path / f".out{staging._ASIDE}0123456789ab")
    cli_ok("convert", src, out, "--overwrite")
    assert (out / "README.md").read_text() == "kept\n"
    assert names_in(tmp_path) == sorted([src.name, "out"])


@pytest.mark.parametrize("target", ["out.safetensors", "out", "out.pt", "out.npz"])
def test_modes_follow_the_umask(target: str, umask: int, tmp_path: Path) -> None:
    src = checkpoint(tmp_path)
    options = ["--max-shard-size", 500] if target == "out" else []
    cli_ok("convert", src, tmp_path / target, *options)
    path = tmp_path / target
    modes = {stat.S_IMODE(one.stat().st_mode) for one in path.iterdir()} if path.is_dir() else set()
    assert modes <= {0o666 & ~umask}
    base = 0o777 if path.is_dir() else 0o666
    assert stat.S_IMODE(path.stat().st_mode) == base & ~umask


@pytest.mark.parametrize("place", ["absent/out", "file/out", "absent/out.safetensors"])
def test_places_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    src = checkpoint(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    before = tree(tmp_path)
    outcome = cli("convert", src, tmp_path / place, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/out.safetensors", "/proc/out"])
def test_a_filesystem_that_takes_no_files(place: str, tmp_path: Path) -> None:
    outcome = cli("convert", checkpoint(tmp_path), place, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert outcome.document["where"] == place


def test_a_file_and_a_folder_are_not_mixed_up(tmp_path: Path) -> None:
    src = checkpoint(tmp_path)
    (tmp_path / "out.safetensors").mkdir()
    (tmp_path / "plain").write_text("a file")
    for target in ("out.safetensors", "plain"):
        outcome = cli("convert", src, tmp_path / target, "--overwrite", "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC003"])


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_a_destination_that_is_a_link_is_refused(target: str, tmp_path: Path) -> None:
    src = checkpoint(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    if target == "out":
        elsewhere.mkdir()
        (elsewhere / "config.json").write_text("{}")
    else:
        elsewhere.write_text("precious")
    (tmp_path / target).symlink_to(elsewhere)
    before = tree(tmp_path)
    outcome = cli("convert", src, tmp_path / target, "--overwrite", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert tree(tmp_path) == before
    assert (tmp_path / target).is_symlink()


def test_a_full_disk_is_seen_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 1, 512

    src = checkpoint(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    outcome = cli("convert", src, tmp_path / "out", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert "512 free" in outcome.document["findings"][0]["detail"]
    assert names_in(tmp_path) == [src.name]


@pytest.mark.parametrize("target", ["out.safetensors", "out", "out.pt"])
def test_a_disk_that_fills_up_on_the_way(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = checkpoint(tmp_path)
    written = []
    pwrite = os.pwrite

    def fills_up(fd: int, data: memoryview, offset: int) -> int:
        written.append(offset)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fills_up)
    outcome = cli("convert", src, tmp_path / target, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert "No space left" in outcome.document["findings"][0]["detail"]
    assert "another disk" in outcome.document["findings"][0]["hint"]
    assert names_in(tmp_path) == [src.name]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = checkpoint(tmp_path)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    cli_ok("convert", src, tmp_path / "out.pt")
    assert facts_at(tmp_path / "out.pt") == facts_at(src)


@pytest.mark.parametrize("how", ["grows", "touched", "replaced", "removed"])
def test_a_source_that_changes_under_the_copy(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flamingo_ckpt.convert as convert_module

    src, other = checkpoint(tmp_path, 0), checkpoint(tmp_path, 1)
    write_all = convert_module.write_all

    def meddle(fd: int, block: memoryview, offset: int) -> None:
        write_all(fd, block, offset)
        if how == "grows":
            with open(src, "ab") as file:
                file.write(b"\0")
        elif how == "touched":
            os.utime(src, ns=(1, time.time_ns()))
        elif how == "replaced":
            with contextlib.suppress(FileNotFoundError):  # another thread did it already
                os.replace(other, src)
        else:
            src.unlink(missing_ok=True)

    monkeypatch.setattr(convert_module, "write_all", meddle)
    outcome = cli("convert", src, tmp_path / "out", "--no-verify", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC007"])
    assert not (tmp_path / "out").exists()
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("how", ["itself", "hard link", "through a link", "its folder"])
def test_the_destination_is_not_the_source(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    src = folder / "pytorch_model.bin"
    checkpoint(tmp_path).rename(src)
    before = torch_facts(torch.load(src, weights_only=True))
    if how == "itself":
        dst = src
    elif how == "hard link":
        dst = tmp_path / "other.pt"
        os.link(src, dst)
    elif how == "through a link":
        (tmp_path / "link").symlink_to(folder)
        dst = tmp_path / "link" / "pytorch_model.bin"
    else:
        dst = folder
    outcome = cli("convert", src, dst, "--overwrite", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC005"])
    assert facts_at(src) == before


def test_a_folder_is_not_converted_onto_itself(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    checkpoint(tmp_path).rename(src / "pytorch_model.bin")
    for dst in (src, f"{src}/", src / "."):
        outcome = cli("convert", src, dst, "--overwrite", "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC005"])
    assert names_in(src) == ["pytorch_model.bin"]


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    for open_stage in (
        lambda: staging.staged_file(str(tmp_path / "a"), overwrite=False),
        lambda: staging.staged_folder(str(tmp_path / "b"), overwrite=False, keep=lambda _: True),
    ):
        with pytest.raises(ZeroDivisionError), open_stage():
            raise ZeroDivisionError
    assert names_in(tmp_path) == []


def stage_while_another_run_finishes(tmp_path: Path, *, folder: bool) -> None:
    target = tmp_path / "a"
    if folder:
        with staging.staged_folder(str(target), overwrite=False, keep=lambda _: True):
            target.mkdir()
            (target / "model.safetensors").write_text("first")
    else:
        with staging.staged_file(str(target), overwrite=False):
            target.write_text("first")


@pytest.mark.usefixtures("_rename")
@pytest.mark.parametrize("folder", [False, True])
def test_a_destination_that_comes_into_being_meanwhile_is_kept(
    folder: bool, tmp_path: Path
) -> None:
    with pytest.raises(WriteError) as refused:
        stage_while_another_run_finishes(tmp_path, folder=folder)
    assert refused.value.code == "FC003"
    assert tree(tmp_path) == {"a/model.safetensors" if folder else "a": b"first"}
