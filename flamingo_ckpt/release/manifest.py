"""Manifest: SHA-256 of every file, in the form that `sha256sum -c` reads, and of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flamingo_ckpt import __version__
from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.plan import Step
from flamingo_ckpt.release.folder import read_text
from flamingo_ckpt.release.result import FileFact, Outcome, failed, skipped
from flamingo_ckpt.release.statistics import check_expansion
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.stream import Derived, OnBytes, check_unchanged, derive, run_tasks
from flamingo_ckpt.tensors import Manifest, distinct, escape, is_tensor_name

SUMS_NAME: Final = "SHA256SUMS"
TENSORS_NAME: Final = "manifest.json"
#: What is made after the sums, or holds them.
SIGNATURE_NAMES: Final = ("model.sig", "SHA256SUMS.sig")
NOT_COVERED: Final = (SUMS_NAME, *SIGNATURE_NAMES)
#: `./` in front of a name is what `find . -type f | xargs sha256sum` writes.
_LINE: Final = re.compile(r"(?P<digest>[0-9A-Fa-f]{64}) [ *](?:\./)?(?P<name>.+)")
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFact:
    """A tensor: name, dtype, shape, and SHA-256 of its bytes, row-major and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def tensor_digests(manifest: Manifest, on_bytes: OnBytes = lambda _: None) -> list[TensorFact]:
    """The SHA-256 of every tensor, by name; tied names have the same one.

    Raises:
        CkptError: FC307 as `check_expansion`; where the checkpoint cannot be read or changes
            meanwhile.
    """
    check_expansion(manifest)
    steps = [
        Step(source=tensor, name=tensor.name, dtype=tensor.dtype)
        for tensor in distinct(manifest.tensors)
    ]

    def work(step: Step, buffer: bytearray, stop: threading.Event) -> str:
        digest = hashlib.sha256()
        for block in derive(step, buffer, Derived()):
            digest.update(block)
            on_bytes(len(block))
            if stop.is_set():
                break
        return digest.hexdigest()

    digests = dict(
        zip((step.source.identity for step in steps), run_tasks(steps, work), strict=True)
    )
    check_unchanged(manifest)
    return [
        TensorFact(
            name=tensor.name,
            dtype=tensor.dtype.name,
            shape=tensor.shape,
            sha256=digests[tensor.identity],
        )
        for tensor in sorted(manifest.tensors, key=lambda one: one.name)
    ]


def is_covered(path: str) -> bool:
    """Whether a file of the folder is one that the sums are of."""
    return path not in NOT_COVERED


def sums_text(files: Sequence[FileFact]) -> str:
    """What `sha256sum -c` reads.

    Raises:
        CkptError: FC505 for a name with control characters, which would need escapes.
    """
    for one in files:
        if not is_tensor_name(one.path) or "\\" in one.path:
            raise CkptError(
                f"`{escape(one.path)}` cannot be listed: its name is not UTF-8, or has control "
                "characters or `\\`",
                code="FC505",
                key=one.path,
                hint="rename the file",
            )
    return "".join(f"{one.sha256}  {one.path}\n" for one in files)


def tensors_text(files: Sequence[FileFact], tensors: Sequence[TensorFact]) -> str:
    """The JSON manifest: files without itself, and tensors."""
    document = {
        "schema_version": "1.0",
        "tool": {"name": "flamingo-ckpt", "version": __version__},
        "files": [
            {"path": one.path, "num_bytes": one.num_bytes, "sha256": one.sha256}
            for one in files
            if one.path != TENSORS_NAME
        ],
        "tensors": [
            {
                "name": one.name,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "sha256": one.sha256,
            }
            for one in tensors
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def parse_sums(text: str, where: str) -> dict[str, str]:
    """SHA-256 by path.

    Raises:
        CkptError: FC607 for a line that is none of its.
    """
    found: dict[str, str] = {}
    # by line feeds alone, as sha256sum, which lets a carriage return before one pass
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match is None or match["name"] in found:
            raise CkptError(
                f"line {number} of `{where}` is no line of sha256sum, or names a file twice: "
                f"`{escape(line)[:80]}`",
                code="FC607",
                where=where,
                hint="`flamingo-ckpt manifest` writes it again",
            )
        found[match["name"]] = match["digest"].lower()
    return found


def read_sums(path: str) -> dict[str, str]:
    """The sums of a file.

    Raises:
        CkptError: FC612 where there is none, FC607 where it is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse_sums(file.read(_MAX_BYTES), path)
    except FileNotFoundError:
        raise CkptError(
            f"there is no `{path}` to compare with",
            code="FC612",
            where=path,
            hint="`flamingo-ckpt manifest` without --check writes it",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CkptError(
            f"the manifest cannot be read: {escape(str(error))[:200]}", code="FC002", where=path
        ) from error


def write(
    sums_path: str,
    tensors_path: str,
    files: Sequence[FileFact],
    tensors: Sequence[TensorFact],
    *,
    is_folder: bool,
) -> tuple[FileFact, ...]:
    """Write both files, the sums last; they list the other one too. Gives what they list.

    Raises:
        CkptError: FC505 for a name that cannot be listed, FC004 where they cannot be written.
    """
    from flamingo_ckpt.formats.staging import staged_file, write_at_path

    listed = tuple(files)
    content = tensors_text(files, tensors).encode("utf-8")
    if is_folder:
        own = FileFact(
            path=TENSORS_NAME,
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        listed = tuple(sorted((*files, own), key=lambda one: one.path))
    sums = sums_text(listed).encode("utf-8")
    for path, data in ((tensors_path, content), (sums_path, sums)):
        with staged_file(path, overwrite=True) as staging:
            write_at_path(staging, data)
    return listed


def compare(sums: Mapping[str, str], files: Sequence[FileFact]) -> Iterator[Finding]:
    """FC607 for each file that is not as the sums say, not there, or not in them."""
    there = {one.path: one.sha256 for one in files if is_covered(one.path)}
    for path in sorted({*sums, *there}):
        if path not in there:
            yield _stale(path, "is in the manifest and not in the folder")
        elif path not in sums:
            yield _stale(path, "is in the folder and not in the manifest")
        elif sums[path] != there[path]:
            yield _stale(path, "is not the file that the manifest was made of")


def _stale(path: str, what: str) -> Finding:
    return Finding(
        code="FC607",
        severity="error",
        key=path,
        detail=f"`{escape(path)}` {what}",
        hint="look at what changed; then `flamingo-ckpt manifest` writes it again",
        data={"file": path},
    )


def check_manifest(subject: Subject, files: Sequence[FileFact]) -> Outcome:
    """The sums in the folder against its files as they are."""
    if not subject.is_folder:
        return skipped("manifest", "a single file has no manifest; check the folder")
    file = subject.by_path.get(SUMS_NAME)
    if file is not None and not file.is_here:
        return skipped(
            "manifest", f"`{SUMS_NAME}` stayed on the hub; `--include` of pull brings it"
        )
    if file is None or not file.is_regular:
        note = Finding(
            code="FC612",
            severity="info",
            key=SUMS_NAME,
            detail=f"there is no `{SUMS_NAME}`",
            hint="`flamingo-ckpt manifest` writes it",
        )
        return skipped("manifest", f"the folder has no `{SUMS_NAME}`", note)
    try:
        sums = parse_sums(read_text(file, _MAX_BYTES), SUMS_NAME)
    except CkptError as error:
        return failed("manifest", error)
    findings = (*compare(sums, files), *_of_tensors(subject, files))
    sentence = (
        f"{len(findings)} of {len({*sums})} files are not as `{SUMS_NAME}` says"
        if findings
        else f"all {len(sums)} files are as `{SUMS_NAME}` says"
    )
    return Outcome(name="manifest", sentence=sentence, findings=findings)


def _of_tensors(subject: Subject, files: Sequence[FileFact]) -> Iterator[Finding]:
    """FC607 where `manifest.json` tells of other files or other tensors than there are."""
    try:
        document = subject.json_of(TENSORS_NAME, _MAX_BYTES)
    except CkptError:
        return  # of somebody else, like one of another form
    tool = document.get("tool") if isinstance(document, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("name") != "flamingo-ckpt":
        return
    there = {
        (one.path, one.sha256) for one in files if one.path not in (TENSORS_NAME, *NOT_COVERED)
    }
    if _rows(document, "files", "path", "sha256") != there:
        yield _stale(TENSORS_NAME, "lists other files than there are")
        return
    if subject.manifest is None:
        return
    held = {(one.name, one.dtype.name, str(list(one.shape))) for one in subject.manifest.tensors}
    if _rows(document, "tensors", "name", "dtype", "shape") != held:
        yield _stale(TENSORS_NAME, "lists other tensors than there are")


def _rows(document: Mapping[str, Any], field: str, *names: str) -> set[tuple[str, ...]]:
    """Some fields of every entry of a list, as texts."""
    entries = document.get(field)
    return {
        tuple(str(one.get(name)) for name in names)
        for one in (entries if isinstance(entries, list) else ())
        if isinstance(one, Mapping)
    }


def content_digest(rows: Sequence[tuple[str, str, Sequence[int], str]]) -> str:
    """One digest of all weights: of (name, dtype, shape, XXH3-128 of the bytes), by name.

    It is the one that `convert` writes into what it makes.
    """
    from flamingo_ckpt.formats.checksum import new_digest

    digest = new_digest()
    for name, dtype, shape, content in sorted(rows):
        digest.update(json.dumps([name, dtype, list(shape), content]).encode("ascii"))
    return f"xxh3-128:{digest.hexdigest()}"


def paths_for(root: str) -> tuple[str, str]:
    """(sums, tensors): in a folder, or beside a single file."""
    if os.path.isdir(root):
        return os.path.join(root, SUMS_NAME), os.path.join(root, TENSORS_NAME)
    return f"{root}.sha256", f"{root}.manifest.json"


def summary_of(files: Sequence[FileFact], tensors: Sequence[TensorFact]) -> dict[str, Any]:
    """The counts of the JSON report."""
    return {
        "num_files": len(files),
        "num_bytes": sum(one.num_bytes for one in files),
        "num_tensors": len(tensors),
    }
