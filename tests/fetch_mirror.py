"""Set up the third-party mirror of the hub that `tests/hub/test_mirror.py` downloads from.

    python tests/fetch_mirror.py

olah (a mirror server, from the package index) and what it needs go into `.cache/mirror`, in exactly
the versions of `tests/mirror_requirements.txt`, and not beside the package: it asks for an older
psutil than that has. Where it is there already, nothing is done. Exits with 1, and says why, where
it cannot be had: the tests need it.
"""

# ruff: noqa: T201 - it is a program

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

WANTED = Path(__file__).resolve().parent / "mirror_requirements.txt"
FOLDER = WANTED.parent.parent / ".cache" / "mirror"
#: How the server is started, before its options.
COMMAND = (sys.executable, "-c", "from olah.server import cli; cli()")
#: What it has to find there.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(FOLDER)}
_STAMP = FOLDER / "installed"


def main() -> int:
    """Install what is missing; the exit code."""
    if is_ready():
        print("mirror: it is set up")
        return 0
    shutil.rmtree(FOLDER, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--no-deps", "--target", str(FOLDER), "--requirement", str(WANTED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()[-5:]
        print("error: pip cannot install the mirror:\n  " + "\n  ".join(told), file=sys.stderr)
        print(
            "hint: the tests need it once; check pip's index and proxy settings, then run the same "
            "command again",
            file=sys.stderr,
        )
        return 1
    _STAMP.write_text(_digest())
    print("mirror: set up")
    return 0


def is_ready() -> bool:
    """Whether the versions that are wanted are there."""
    return _STAMP.is_file() and _STAMP.read_text() == _digest()


def _digest() -> str:
    return hashlib.sha256(WANTED.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
