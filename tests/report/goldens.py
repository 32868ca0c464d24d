"""Golden reports: what each verb's `--json` says of the files in fixtures/, as files to open.

`pytest tests/report --update-goldens` runs the verbs again and writes what they say now.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import FIXTURES, cli

GOLDEN = Path(__file__).parent / "golden"
ROOT = FIXTURES.parent
Words = list[object]


def release(tmp: Path) -> Path:
    """A folder with modes that do not depend on the checkout."""
    folder = tmp / "release"
    shutil.copytree(FIXTURES / "hf-bin", folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def flipped(tmp: Path) -> Path:
    """A file with another bit here and there in the last tensors."""
    data = bytearray((FIXTURES / "tiny.safetensors").read_bytes())
    data[-3] ^= 0x40
    data[-20:-16] = b"\x00\x00\x80\x3f"
    path = tmp / "flipped.safetensors"
    path.write_bytes(data)
    return path


#: On the hub of `tests.hub_server`, which every golden run has.
REPO = "someone/tiny"


def pushed(tmp: Path) -> Path:
    """A folder, and the same one on the hub but for its card."""
    folder = release(tmp)
    (folder / "README.md").write_text("# Another card\n")
    return folder


TINY = "fixtures/tiny.safetensors"
#: name of the file -> the command line, run in the root of the repository.
CASES: dict[str, Callable[[Path], Words]] = {
    "inspect": lambda tmp: ["inspect", "fixtures/torch-bare.pt", "--tensors"],
    "inspect-sharded": lambda tmp: ["inspect", "fixtures/sharded"],
    "inspect-error": lambda tmp: ["inspect", "fixtures/broken/st-hole.safetensors"],
    "convert": lambda tmp: ["convert", "fixtures/torch-wrapped.pt", tmp / "out"],
    "convert-dry-run": lambda tmp: ["convert", "fixtures/torch-wrapped.pt", "x", "--dry-run"],
    "verify": lambda tmp: ["verify", TINY, TINY],
    "verify-fail": lambda tmp: ["verify", TINY, flipped(tmp)],
    "diff": lambda tmp: ["diff", TINY, "fixtures/torch-bare.pt"],
    "diff-bits": lambda tmp: ["diff", TINY, flipped(tmp), "--level", "bits"],
    "check": lambda tmp: ["check", release(tmp)],
    "check-headers": lambda tmp: ["check", release(tmp), "--level", "headers"],
    "manifest": lambda tmp: ["manifest", release(tmp), "--dry-run"],
    "pull": lambda tmp: ["pull", f"hf://{REPO}", tmp / "pulled", "--dry-run"],
    "push": lambda tmp: ["push", pushed(tmp), f"hf://{REPO}", "--no-check", "--dry-run"],
    "layouts": lambda tmp: ["layouts"],
    "layouts-one": lambda tmp: ["layouts", "open_clip"],
    "explain": lambda tmp: ["explain", "FC301"],
    "sign-error": lambda tmp: ["sign", "fixtures/tiny.safetensors"],
    "verify-signature-error": lambda tmp: ["verify-signature", "fixtures/tiny.safetensors"],
    "report-error": lambda tmp: ["report", "render", "fixtures/README.md"],
    "usage-error": lambda tmp: ["verify", "a", "b", "--color", "sometimes"],
}


def run(name: str, tmp: Path) -> tuple[dict[str, Any], int]:
    """The document that a case gives now, without what differs from run to run."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        outcome = cli(*CASES[name](tmp), "--json")
    finally:
        os.chdir(before)
    text = outcome.out.replace(str(tmp), "TMP")
    return normal(json.loads(text)), outcome.code


def normal(document: dict[str, Any]) -> dict[str, Any]:
    """Without durations, versions and the words of the pages of codes, which have tests."""

    def walk(value: Any, field: str = "") -> Any:
        if isinstance(value, dict):
            return {key: walk(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if field in ("seconds", "duration_seconds"):
            return 0.0
        if field in ("meaning", "hint") and document["command"]["name"] == "explain":
            return re.sub(r"\w+", "word", str(value))
        return value

    told: dict[str, Any] = walk(document)
    told["tool"]["version"] = "VERSION"
    told.pop("environment", None)  # of the machine
    return told


def write(name: str, document: dict[str, Any]) -> None:
    (GOLDEN / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def stored() -> dict[str, dict[str, Any]]:
    """Every golden report, also those that no case of this file makes."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}
