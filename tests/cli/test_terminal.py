"""Colour, pipes, and hostile names on the way to a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support import FIXTURES, cli, cli_ok, cli_process

SRC = FIXTURES / "torch-bare.pt"
ESCAPE = "\x1b"


def on_a_terminal(*arguments: object, env: dict[str, str] | None = None) -> str:
    """What a process shows where stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "flamingo_ckpt", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=follower,
            env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **(env or {})},
        )
        os.close(follower)
        shown = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:  # the last writer closed its end
                break
            if not block:
                break
            shown += block
        process.wait()
    finally:
        os.close(leader)
    return shown.decode()


def test_no_colour_into_pipes(tmp_path: Path) -> None:
    for arguments in (["inspect", tmp_path / "absent"], ["verify", SRC, FIXTURES / "arrays.npz"]):
        outcome = cli_process(*arguments)
        assert ESCAPE not in outcome.out + outcome.err


def test_colour_always(tmp_path: Path) -> None:
    outcome = cli_process("inspect", tmp_path / "absent", "--color", "always")
    assert ESCAPE in outcome.err
    outcome = cli_process("verify", SRC, FIXTURES / "arrays.npz", "--color", "always")
    assert ESCAPE in outcome.out
    outcome = cli_process("verify", SRC, FIXTURES / "arrays.npz", "--color", "always", "--json")
    assert ESCAPE not in outcome.out


def test_colour_on_a_terminal_only_where_it_is_wanted(tmp_path: Path) -> None:
    arguments = ("inspect", tmp_path / "absent")
    env = {"TERM": "xterm-256color"}
    assert ESCAPE in on_a_terminal(*arguments, env=env)
    assert ESCAPE not in on_a_terminal(*arguments, env=env | {"NO_COLOR": "1"})
    assert ESCAPE not in on_a_terminal(*arguments, "--color", "never", env=env)


def test_progress_is_on_a_terminal_only_and_can_be_silenced(tmp_path: Path) -> None:
    env = {"TERM": "xterm-256color"}
    arguments = ("convert", SRC, tmp_path / "out", "--overwrite")
    assert "writing" in on_a_terminal(*arguments, env=env)
    assert "writing" not in on_a_terminal(*arguments, "--no-progress", env=env)
    assert "writing" not in on_a_terminal(*arguments, "-q", env=env)
    assert "writing" not in cli_process(*arguments).err


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    torch.save({f"layer{i}.{'x' * 50}": torch.ones(i) for i in range(3000)}, tmp_path / "src.pt")
    for options in ([], ["--json", "--tensors"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "flamingo_ckpt", "inspect", tmp_path / "src.pt", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait() == 0
        assert err == b""


HOSTILE = {
    "ansi": "a\x1b[31mred",
    "newline": "a\nerror: all is lost",
    "bidi": "a\u202eknat",
    "zero width": "a\u200bb",
    "return": "a\rb",
    "bell": "a\x07",
    "c1": "a\x9b31m",
    "markup": "[bold]a[/bold]",
    "html": "<script>alert(1)</script>",
    "pipe": "a|b`c`*d*_e_",
}


def raw(text: str) -> set[str]:
    return {char for char in text if not char.isprintable() and char != "\n"}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_in_text_and_markdown(name: str, tmp_path: Path) -> None:
    torch.save({name: torch.ones(2), "fine": torch.ones(3)}, tmp_path / "src.pt")
    report = tmp_path / "report.md"
    outcome = cli("inspect", tmp_path / "src.pt", "-v", "--output", report)
    markdown = report.read_text()
    assert outcome.code == 0
    assert raw(outcome.out) == raw(markdown) == set()
    assert "\nerror: all is lost" not in outcome.out
    assert "<script>" not in markdown
    document = cli("inspect", tmp_path / "src.pt", "--json", "--tensors").document
    assert document["tensors"][0]["name"] == name  # JSON is exact
    converted = cli("convert", tmp_path / "src.pt", tmp_path / "out", "--output", report)
    assert raw(converted.out + converted.err + report.read_text()) == set()
    json_out = cli("inspect", tmp_path / "src.pt", "--json", "--tensors").out
    assert raw(json_out) == set()
    assert "\x9b" not in json_out


def test_a_name_cannot_break_out_of_a_markdown_table(tmp_path: Path) -> None:
    for index, name in enumerate(("a|b|c", "a`|`b", "a\\|b", "|")):
        src = tmp_path / f"src{index}.pt"
        torch.save({name: torch.ones(2), f"{name}.epoch": 3}, src)
        report = tmp_path / "report.md"
        cli_ok("convert", src, tmp_path / f"out{index}", "--output", report)
        rows = [line for line in report.read_text().splitlines() if "FC209" in line]
        assert rows
        for row in rows:
            bars = row.replace("\\\\", "").replace("\\|", "").count("|")
            assert bars == 6, row


def test_hostile_metadata_is_escaped(tmp_path: Path) -> None:
    metadata = {"format": "pt", "note\x1b[2J": "\x1b]0;title\x07<script>"}
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata)
    outcome = cli_ok("inspect", tmp_path / "a.safetensors")
    assert raw(outcome.out) == set()
    document = cli_ok("inspect", tmp_path / "a.safetensors", "--json").document
    assert document["metadata"] == metadata


@pytest.mark.parametrize("name", ["\x1b[31mred.pt", "a\nb.pt", "\u202ename.pt"])
def test_hostile_paths(name: str, tmp_path: Path) -> None:
    for arguments in (
        ["inspect", tmp_path / name],
        ["convert", SRC, tmp_path / "absent" / name],
        ["inspect", SRC, "--output", tmp_path / name],
    ):
        # click removes what looks like ANSI from pipes, which would hide that it was printed
        outcome = cli(*arguments, "--color", "always")
        assert outcome.code == 2
        assert name not in outcome.out + outcome.err
        plain = cli(*arguments)
        assert raw(plain.out + plain.err) == set(), arguments


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_in_refusals(name: str, tmp_path: Path) -> None:
    """The name stands in an error, a hint and a finding."""
    torch.save({f"module.{name}": torch.ones(2), name: torch.ones(3)}, tmp_path / "twice.pt")
    torch.save({name: torch.ones(1, dtype=torch.complex128)}, tmp_path / "dtype.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pt")
    for arguments in (
        ["convert", tmp_path / "twice.pt", tmp_path / "out"],
        ["convert", tmp_path / "dtype.pt", tmp_path / "out"],
        ["verify", tmp_path / "other.pt", tmp_path / "dtype.pt"],
        ["inspect", tmp_path / "dtype.pt", "--wrapper-key", name],
    ):
        outcome = cli(*arguments, "--color", "always")
        assert outcome.code in (1, 2)
        shown = outcome.out + outcome.err
        if raw(name) or "\n" in name:
            assert name not in shown, arguments
        assert raw(cli(*arguments).err + cli(*arguments).out) == set(), arguments
