"""What the tests of hostile input share: run a verb, expect a refusal, read a result back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fixtures import handmade as hm
from flamingo_ckpt.cli.main import run


def run_verb(*argv: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([os.fspath(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def run_json(*argv: str | Path) -> tuple[int, dict[str, Any]]:
    """(exit code, the report) of one command line."""
    code, out, err = run_verb(*argv, "--json")
    assert err == "", "with --json nothing is talked about"
    document: dict[str, Any] = json.loads(out)
    assert document["exit_code"] == code
    return code, document


def error_code(document: dict[str, Any]) -> str:
    """The code of a report that is a refusal."""
    assert document["verdict"] == "error", document
    (finding,) = document["findings"]
    assert finding["detail"]
    return str(finding["code"])


def refused(src: Path, code: str | Iterable[str], *options: str, inspect: bool = True) -> str:
    """`convert` (and, unless told otherwise, `inspect`) refuses `src`; returns the error text.

    The destination lies in a fresh folder beside `src`, which must be empty afterwards: neither a
    result nor a staging file.
    """
    codes = {code} if isinstance(code, str) else set(code)
    out = src.parent / f"out-of-{src.name}"
    out.mkdir()
    text = ""
    destinations = [out / "model.safetensors", out / "folder"]
    command_lines = [("convert", src, destination) for destination in destinations]
    if inspect:
        command_lines.append(("inspect", src))
    for argv in command_lines:
        exit_code, document = run_json(*argv, *options)
        assert exit_code == 2
        assert error_code(document) in codes, document["findings"]
        exit_code, stdout, text = run_verb(*argv, *options)
        assert exit_code == 2
        assert stdout == ""
        assert text.startswith("error: ")
        assert src.name in text, "the message names the file"
        assert is_printable(text)
    assert sorted(os.listdir(out)) == []
    out.rmdir()
    return text


def is_printable(text: str) -> bool:
    """Whether a terminal shows the text as it is: no control, bidi or invisible character."""
    return all(char.isprintable() or char == "\n" for char in text)


def converted(src: Path, *options: str) -> dict[str, tuple[str, list[int], bytes]]:
    """`convert` accepts `src`: name -> (dtype, shape, bytes) of the result."""
    destination = src.parent / f"good-{src.name}.safetensors"
    exit_code, document = run_json("convert", src, destination, *options)
    assert exit_code == 0, document["findings"]
    return read_back(destination)


def read_back(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """A safetensors file, read by the dozen lines that the format needs and not by the package."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (one["dtype"], one["shape"], data[slice(*one["data_offsets"])])
        for name, one in header.items()
    }


def inspected(src: Path, *options: str) -> dict[str, Any]:
    """`inspect` lists `src`; returns the report."""
    exit_code, document = run_json("inspect", src, "--tensors", *options)
    assert exit_code == 0, document["findings"]
    return document


def finding_codes(document: dict[str, Any]) -> set[str]:
    """The codes of a report's findings."""
    return {finding["code"] for finding in document["findings"]}


def put_file(folder: Path, data: bytes, name: str = "model.pt") -> Path:
    """A file with these bytes."""
    path = folder / name
    path.write_bytes(data)
    return path


def put_folder(folder: Path, files: dict[str, bytes], name: str = "release") -> Path:
    """A folder with these files."""
    path = folder / name
    path.mkdir()
    for file, data in files.items():
        (path / file).write_bytes(data)
    return path


class Leaves:
    """A payload that makes a file when it is run: harmless, and seen."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "payload-was-run"

    def opcodes(self) -> bytes:
        """`os.system` on a shell command that leaves the mark, as REDUCE."""
        return hm.call(hm.named("posix", "system"), hm.text(self.command))

    @property
    def command(self) -> str:
        """What the payload asks the shell for."""
        return f"touch '{self.mark}'"

    def works(self) -> bool:
        """Whether the payload would have left its mark, had anybody run it."""
        pickle.loads(hm.pickled(self.opcodes()))
        ran = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return ran


def doubled_tuples(levels: int) -> bytes:
    """A tuple of tuples of tuples: `levels` times doubled, so it has 2**levels leaves."""
    again = (hm.put(n) + b"0" + hm.get(n) + hm.get(n) + b"\x86" for n in range(levels))
    return hm.text("ha") + b"".join(again)
