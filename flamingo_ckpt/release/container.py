"""Container: the bytes are what their formats ask for, and nothing else lies in the folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.folder import ReleaseFile
from flamingo_ckpt.release.result import Outcome, failed, finding_of
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import escape

_CODES = ("FC1", "FC202", "FC207", "FC209")
#: What the check of safety tells, also where it is why nothing could be read.
OF_SAFETY = ("FC5",)
#: Everybody may read a published file.
_READABLE = 0o444
_EXECUTABLE = 0o111


def check_container(subject: Subject) -> Outcome:
    """Structure of the checkpoint, its index, modes of the files, stray files."""
    findings = [*_modes(subject), *_strays(subject)]
    manifest = subject.manifest
    if manifest is None:
        assert subject.unreadable is not None
        outcome = failed("container", subject.unreadable)
        told = () if subject.unreadable.code.startswith(OF_SAFETY) else outcome.findings
        return replace(outcome, findings=(*told, *findings))
    try:
        manifest.check()
    except CkptError as fault:
        findings.append(finding_of(fault))
    index = manifest.details.get("index")
    for one in manifest.findings:
        if one.code.startswith(_CODES):
            is_of_index = one.code == "FC107" and one.key is None and index is not None
            findings.append(_about(one, str(index)) if is_of_index else one)
    error = subject.unreadable
    if error is not None and not error.code.startswith(OF_SAFETY):
        # it was read, and its names make no checkpoint
        findings.append(finding_of(error))
    sure = [f"{_count(len(manifest.files), 'file')} of {manifest.format}, no holes, no overlaps"]
    if index:
        sure.append("index and headers agree")
    sure.append(f"{_count(len(subject.files), 'file')} in all")
    sentence = ", ".join(sure)
    if findings:
        sentence = f"{len(manifest.tensors)} tensors in {sure[0].partition(',')[0]}"
    return Outcome(name="container", sentence=sentence, findings=tuple(findings))


def _about(finding: Finding, file: str) -> Finding:
    return replace(finding, key=file, data={"file": file, **finding.data})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _modes(subject: Subject) -> Iterator[Finding]:
    for file in subject.files:
        if not file.is_regular or file.is_link:
            continue
        wrong = wanted_mode(file)
        if wrong is None:
            continue
        what = (
            "not everybody may read it"
            if file.mode & _READABLE != _READABLE
            else "it can be executed"
        )
        yield Finding(
            code="FC115",
            severity="warning",
            key=file.path,
            detail=f"`{escape(file.path)}` has mode {file.mode:04o}: {what}",
            hint=f"chmod {wrong:o}; `check --fix --yes` does it",
            data={"file": file.path},
        )


def wanted_mode(file: ReleaseFile) -> int | None:
    """The mode that a file should have, or None where it has it. Scripts may be executed."""
    mode = file.mode | _READABLE
    if not file.is_code:
        mode &= ~_EXECUTABLE
    return None if mode == file.mode else mode


def _strays(subject: Subject) -> Iterator[Finding]:
    read = subject.read_files
    for file in subject.files:
        if not file.is_regular and file.is_here:
            if not file.is_link:
                yield _stray(file, "error", "is neither a file nor a folder", "remove it")
            continue
        if file.path in read:
            continue
        if file.num_bytes == 0 and file.name not in (".gitkeep", "__init__.py"):
            yield _stray(file, "warning", "is empty", "remove it, or write it again")
        elif file.is_leftover:
            yield _stray(
                file,
                "warning",
                "was left behind by a tool and is no part of a release",
                "remove it",
            )
        elif file.is_archive:
            yield _stray(
                file,
                "warning",
                "is an archive, and nothing here looks at what is in it",
                "put its files into the folder, or leave it out",
            )
        elif file.is_weights and "/" in file.path:
            yield _stray(
                file,
                "warning",
                "looks like weights in a folder within, and nothing here looks at what is in it",
                "check that folder by itself, and waive this; or leave it out",
            )
        elif file.is_weights and subject.manifest is not None:
            yield _stray(
                file,
                "error",
                "looks like weights, and is not among those that a loader of the folder reads",
                "remove it, or name it in the index: some loaders take it instead",
            )


def _stray(file: ReleaseFile, severity: str, what: str, hint: str) -> Finding:
    return Finding(
        code="FC116",
        severity=severity,
        key=file.path,
        detail=f"`{escape(file.path)}` {what}",
        hint=hint,
        data={"file": file.path},
    )
