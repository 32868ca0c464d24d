"""The files of a release: all that an upload would take, and what each of them is.

Nothing is followed out of the folder and nothing is opened that is not a regular file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.folder import WEIGHT_FILES
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.release.result import FileFact
from flamingo_ckpt.tensors import escape

#: What git and the hub's own download keep in a folder; an upload never takes it.
NEVER_UPLOADED: Final = (".git", ".cache")
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".ot", ".tflite"),
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
_CODE_SUFFIXES = (".py", ".pyc", ".ipynb", ".sh", ".bat", ".ps1", ".so", ".dll", ".exe", ".dylib")
#: Of these every file is told, whatever its first bytes are: old protocols begin with any letter.
_ALWAYS_PICKLE = (".pkl", ".pickle", ".joblib", ".dill")
_ARCHIVE_SUFFIXES = frozenset(
    {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".jar", ".mar"}
)
#: What editors, systems, training and other tools leave behind, and no release wants.
_LEFTOVERS = re.compile(
    r"(\.DS_Store|Thumbs\.db|desktop\.ini|.*~|.*\.(swp|swo|tmp|temp|bak|orig|rej|part|partial|lock)"
    r"|.*\.incomplete|#.*#|\._.*|\.flamingo-staging-.*|\.flamingo-replaced-.*|.*\.aria2"
    r"|training_args\.bin|optimizer\.(pt|bin)|scheduler\.(pt|bin)|scaler\.pt|rng_state.*\.pth"
    r"|random_states.*\.pkl|trainer_state\.json|events\.out\.tfevents\..*|nohup\.out|.*\.log)"
)
_LEFTOVER_FOLDERS = frozenset(
    {"__pycache__", ".ipynb_checkpoints", "wandb", "runs", "logs", ".pytest_cache", ".idea"}
    | {".vscode", ".mypy_cache", ".ruff_cache", ".venv", "venv"}
)
_HIDDEN_KEPT = frozenset({".gitattributes", ".gitignore", ".flamingo-pull.json"})
_BLOCK = 1 << 20
#: Of a file, so much is looked at to see whether it is a text.
_SNIFFED = 8 << 10
#: Texts are searched in pieces of this size; what is searched for is far shorter than an overlap.
_WINDOW = 4 << 20
_OVERLAP = 4 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFile:
    """One entry of the folder.

    Attributes:
        path: in the folder, with `/`.
        full: on this machine.
        num_bytes: length; of a link, that of its target where it has one.
        mode: permission bits.
        is_link: whether it is a symbolic link.
        is_regular: whether it is a regular file, or a link to one.
        leads_out: whether it is a link to somewhere outside the folder.
        is_here: whether it is on this machine; of a file that stayed on the hub only the name and
            the size are known.
        stamp: what changes with its content: which file, how long, when written.
    """

    path: str
    full: str
    num_bytes: int
    mode: int
    is_link: bool = False
    is_regular: bool = True
    leads_out: bool = False
    is_here: bool = True
    stamp: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """In lower case, with its dot."""
        return os.path.splitext(self.name)[1].lower()

    @property
    def is_weights(self) -> bool:
        """Whether its name is one that weights, shards or indexes have."""
        return bool(WEIGHT_FILES.fullmatch(self.name)) or self.suffix in _WEIGHT_SUFFIXES

    @property
    def is_code(self) -> bool:
        """Whether it is a program, a script or a notebook, by its name."""
        return self.suffix in _CODE_SUFFIXES

    @property
    def may_be_pickle(self) -> bool:
        """Whether its name is one that pickles have."""
        return self.suffix in _PICKLE_SUFFIXES

    @property
    def is_surely_pickle(self) -> bool:
        """Whether its name is one that nothing but pickles have."""
        return self.suffix in _ALWAYS_PICKLE

    @property
    def is_archive(self) -> bool:
        """Whether it holds other files, by its name."""
        return self.suffix in _ARCHIVE_SUFFIXES

    @property
    def is_leftover(self) -> bool:
        """Whether it is something that was left lying about."""
        folders = self.path.split("/")[:-1]
        if any(one in _LEFTOVER_FOLDERS for one in folders):
            return True
        is_hidden = any(one.startswith(".") for one in self.path.split("/"))
        return bool(_LEFTOVERS.fullmatch(self.name)) or (
            is_hidden and self.path not in _HIDDEN_KEPT
        )


def list_files(root: str, skip: Collection[str] = ()) -> tuple[ReleaseFile, ...]:
    """Every entry below a folder, sorted by path; or the one file.

    Args:
        root: a folder or a file.
        skip: full paths that do not count, such as the report that is written into the folder.

    Raises:
        CkptError: FC002 where a folder cannot be listed.
    """
    if not os.path.isdir(root):
        return (_describe(os.path.dirname(root) or ".", root, os.path.basename(root)),)
    left_out = {os.path.realpath(one) for one in skip}
    found: list[ReleaseFile] = []
    for folder, names, files in os.walk(root, onerror=_refuse):
        inside = os.path.relpath(folder, root)
        inside = "" if inside == "." else inside.replace(os.sep, "/") + "/"
        linked = [name for name in names if os.path.islink(os.path.join(folder, name))]
        names[:] = sorted(
            name
            for name in names
            if name not in linked and not (not inside and name in NEVER_UPLOADED)
        )
        for name in (*files, *linked):
            full = os.path.join(folder, name)
            if os.path.realpath(full) not in left_out:
                found.append(_describe(root, full, inside + name))
    return tuple(sorted(found, key=lambda one: one.path))


def _refuse(error: OSError) -> None:
    raise CkptError(
        f"cannot list `{escape(str(error.filename))}`: {error.strerror}",
        code="FC002",
        where=str(error.filename),
    ) from error


def not_here(path: str, num_bytes: int) -> ReleaseFile:
    """A file of a repository that was not downloaded."""
    return ReleaseFile(
        path=path, full="", num_bytes=num_bytes, mode=0o644, is_regular=False, is_here=False
    )


def _describe(root: str, full: str, path: str) -> ReleaseFile:
    try:
        there = os.lstat(full)
    except OSError as error:  # it was there when the folder was listed
        raise CkptError(
            f"`{escape(path)}` is gone, or cannot be looked at: {error.strerror}",
            code="FC007",
            where=full,
        ) from error
    is_link = stat.S_ISLNK(there.st_mode)
    if is_link and is_of_cache(root, full):
        full, is_link = os.path.realpath(full), False
        there = os.lstat(full)
    leads_out = False
    if is_link:
        real_root, real = os.path.realpath(root), os.path.realpath(full)
        leads_out = os.path.commonpath([real_root, real]) != real_root
        try:
            there = os.stat(full)
        except OSError:
            return ReleaseFile(
                path=path, full=full, num_bytes=0, mode=0, is_link=True, is_regular=False,
                leads_out=leads_out,
            )  # fmt: skip
    return ReleaseFile(
        path=path,
        full=full,
        num_bytes=there.st_size,
        mode=stat.S_IMODE(there.st_mode),
        is_link=is_link,
        is_regular=stat.S_ISREG(there.st_mode),
        leads_out=leads_out,
        stamp=_stamp(there),
    )


def _stamp(there: os.stat_result) -> tuple[int, ...]:
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns


def check_same(files: Collection[ReleaseFile]) -> None:
    """What was checked is what is there.

    Raises:
        CkptError: FC007 for the first file that is not the one that was listed.
    """
    for file in files:
        try:
            is_same = not file.stamp or _stamp(os.stat(file.full)) == file.stamp
        except OSError:
            is_same = False
        if not is_same:
            raise CkptError(
                f"`{escape(file.path)}` changed while the release was checked",
                code="FC007",
                where=file.full,
                hint="check again when nothing writes into the folder any more",
            )


def is_of_cache(root: str, full: str) -> bool:
    """Whether a link is one of the hub's cache, which keeps content in `blobs` beside snapshots."""
    parts = os.path.abspath(root).split(os.sep)
    if "snapshots" not in parts:
        return False
    home = os.sep.join(parts[: len(parts) - 1 - parts[::-1].index("snapshots")])
    return os.path.dirname(os.path.realpath(full)) == os.path.join(os.path.realpath(home), "blobs")


def digest_of(path: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, hexadecimal, in bounded memory.

    Raises:
        CkptError: FC002 where it cannot be read, FC007 where it changed meanwhile.
    """
    source = FileSource(path)
    digest, buffer, at = hashlib.sha256(), memoryview(bytearray(_BLOCK)), 0
    while at < source.size:
        block = buffer[: min(_BLOCK, source.size - at)]
        source.read_into(at, block)
        digest.update(block)
        at += len(block)
        on_bytes(len(block))
    source.check_unchanged()
    source.close()
    return digest.hexdigest()


def digests(
    files: Collection[ReleaseFile], on_bytes: Callable[[int], None] = lambda _: None
) -> tuple[FileFact, ...]:
    """Path, size and SHA-256 of the regular files, sorted by path; links out are left out."""
    from concurrent.futures import ThreadPoolExecutor

    wanted = [one for one in files if one.is_regular and not one.leads_out]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda one: digest_of(one.full, on_bytes), wanted)
        facts = [
            FileFact(path=one.path, num_bytes=one.num_bytes, sha256=digest)
            for one, digest in zip(wanted, found, strict=True)
        ]
    return tuple(sorted(facts, key=lambda one: one.path))


def read_text(file: ReleaseFile, limit: int) -> str:
    """The text of a small file; what is not UTF-8 is replaced, what is beyond `limit` left."""
    with contextlib.closing(FileSource(file.full)) as source:
        return source.read(0, min(source.size, limit)).decode("utf-8", "replace")


def read_windows(file: ReleaseFile) -> Iterator[tuple[int, str]]:
    """The text of a file of any size in windows that overlap, each with the line that it begins in.

    Nothing is given of a file whose first bytes are those of no text.
    """
    with contextlib.closing(FileSource(file.full)) as source:
        coding = _coding(source.read(0, min(source.size, _SNIFFED)))
        at, line = 0, 1
        while coding is not None and at < source.size:
            raw = source.read(at, min(source.size - at, _WINDOW))
            yield line, raw.decode(coding, "replace")
            step = len(raw) if at + len(raw) == source.size else len(raw) - _OVERLAP
            line += raw[:step].count(b"\n")
            at += step


def _coding(head: bytes) -> str | None:
    """How a text is encoded, by its beginning; None where it is none."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return None if b"\0" in head else "utf-8"
