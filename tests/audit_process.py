"""Open many files while an audit hook writes down what the interpreter does; a process of its own.

    python -m tests.audit_process LIST

LIST is a JSON file: `warm` (good files, opened before the hook looks), `files` (hostile ones) and
`payload` (a pickle that is run at the end, in hexadecimal, to show that the hook sees it). Prints
JSON: how each file ended, what the hook saw while they were open, and what it saw of the payload.

An audit hook cannot be removed or got around from Python, and CPython reports to it every import,
every compiled or executed code object, every new process and every socket, from C code too.
"""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil
import sys
from pathlib import Path
from typing import Any

# Everything but reading files and listing folders, which is how checkpoints are opened.
_HARMLESS = frozenset({"builtins.id", "os.listdir", "os.scandir", "sys._getframe"})
_READING = ("r", "rb", None)


class Recorder:
    """The hook: writes down, while it is told to, what no reader of weights has any use for."""

    def __init__(self) -> None:
        self.watching = False
        self.file = ""
        self.seen: list[tuple[str, str, str]] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching or event in _HARMLESS:
            return
        if event == "open" and args[1] in _READING and not _writes(args[2]):
            return
        self.watching = False  # what follows here is the hook's own doing
        try:
            self.seen.append((self.file, event, repr(args)[:300]))
        finally:
            self.watching = True


def _writes(flags: int) -> bool:
    """Whether the flags of os.open allow anything but reading."""
    import os

    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def look(path: str) -> str:
    """Everything that reads a source: open, check, inspect, plan; the code of a refusal."""
    from flamingo_ckpt.errors import CkptError
    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.inspection import inspect, tensor_rows
    from flamingo_ckpt.plan import make_plan
    from flamingo_ckpt.selection import PlanOptions

    try:
        manifest = open_checkpoint(path)
        manifest.check()
        inspect(manifest)
        tensor_rows(manifest)
        make_plan(manifest, PlanOptions())
    except CkptError as error:
        return error.code
    return "listed"


def main(wanted: dict[str, Any]) -> dict[str, Any]:
    """Warm up, watch, look at every file, run the payload."""
    import flamingo_ckpt.formats

    for found in pkgutil.iter_modules(flamingo_ckpt.formats.__path__, "flamingo_ckpt.formats."):
        importlib.import_module(found.name)
    recorder = Recorder()
    for path in wanted["warm"]:
        look(path)
    sys.addaudithook(recorder)
    ends: dict[str, str] = {}
    recorder.watching = True
    for path in wanted["files"]:
        recorder.file = path
        ends[path] = look(path)
    recorder.watching = False
    events = list(recorder.seen)
    recorder.seen.clear()
    recorder.file, recorder.watching = "payload", True
    try:
        pickle.loads(bytes.fromhex(wanted["payload"]))
    finally:
        recorder.watching = False
    return {"ends": ends, "events": events, "payload": recorder.seen}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
