"""Fetch the third-party corpus of hostile models that `tests/test_corpus.py` reads.

    python tests/fetch_corpus.py

The corpus is the test assets in the source distribution of modelaudit (MIT), a scanner of model
files. pip downloads it by hash into `.cache/corpus/`; nothing of it is installed or imported, and
only files below its `tests/assets` are unpacked. Where all of that is there already, nothing is
done. Exits with 1, and says why, where the corpus cannot be had: the tests need it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

NAME, VERSION = "modelaudit", "0.2.54"
SHA256 = "87ffdef31b0a0f9f0bf65c1fbc920c3217300a8924a87d9b95715dd7ed70a5dc"
FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "corpus"
ARCHIVE = FOLDER / f"{NAME}-{VERSION}.tar.gz"
#: Where the files are.
ASSETS = FOLDER / "assets"
_INSIDE = PurePosixPath(f"{NAME}-{VERSION}/tests/assets")
_MAX_FILES, _MAX_BYTES = 1000, 64 << 20


class CorpusError(Exception):
    """The corpus cannot be had."""


def main() -> int:
    """Fetch and unpack what is missing; the exit code."""
    try:
        if not _is_right(ARCHIVE):
            _download()
        number, new = _unpack()
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        print(
            "hint: the tests need this file once; check pip's index and proxy settings, "
            "then run the same command again",
            file=sys.stderr,
        )
        return 1
    print(f"corpus: {number} files of {NAME} {VERSION}, {new} of them new")
    return 0


def _is_right(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def _download() -> None:
    """By pip, so that its settings apply. pip checks the hash before it opens the archive."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--quiet", "--no-deps", "--no-binary", NAME, "--require-hashes"]
        command += ["--requirement", str(wanted), "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(scratch) / ARCHIVE.name
        if done.returncode or not fetched.is_file():
            told = (done.stderr or done.stdout).strip().splitlines()[-5:]
            raise CorpusError(f"pip cannot download {NAME} {VERSION}:\n  " + "\n  ".join(told))
        if not _is_right(fetched):
            raise CorpusError(f"{ARCHIVE.name} has another SHA-256 than the one pinned here")
        fetched.replace(ARCHIVE)


def _unpack() -> tuple[int, int]:
    """Write the assets that are not there; (how many there are, how many were written).

    Members are read one by one and written here: links, folders and devices are never made, and a
    name that is not a plain path below the assets ends the run.
    """
    number = new = num_bytes = 0
    with tarfile.open(ARCHIVE, "r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if not path.is_relative_to(_INSIDE) or not member.isfile():
                continue
            parts = path.relative_to(_INSIDE).parts
            if not parts or any(part in ("..", ".") or "\\" in part for part in parts):
                raise CorpusError(f"a member of the archive is named {member.name!r}")
            number, num_bytes = number + 1, num_bytes + member.size
            if number > _MAX_FILES or num_bytes > _MAX_BYTES:
                raise CorpusError("the archive is larger than it should be")
            held = archive.extractfile(member)
            data = held.read(member.size) if held else b""
            target = ASSETS.joinpath(*parts)
            if target.is_file() and target.read_bytes() == data:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            new += 1
    return number, new


if __name__ == "__main__":
    sys.exit(main())
