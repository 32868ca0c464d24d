"""Safety: nothing that could run, that leads elsewhere, or that tells what nobody should know."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.release.container import OF_SAFETY
from flamingo_ckpt.release.folder import ReleaseFile, read_windows
from flamingo_ckpt.release.leaks import find_paths, find_secrets
from flamingo_ckpt.release.result import Outcome, finding_of
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import escape, has_control

#: Files that are vocabularies: what looks like a path or a token in them is a piece of text.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"})
#: Programs by their first bytes, whatever their names are.
_PROGRAMS: tuple[tuple[bytes, str], ...] = (
    (b"\x7fELF", "a Linux program"),
    (b"MZ", "a Windows program"),
    (b"#!", "a script"),
    (b"\xcf\xfa\xed\xfe", "a macOS program"),
    (b"\xca\xfe\xba\xbe", "a program"),
)
_MAX_PER_FILE = 5
_MAX_HEADER = 100 << 20


def check_safety(subject: Subject) -> Outcome:
    """Pickles, code, links, names, secrets and paths of machines, in every file."""
    findings: list[Finding] = []
    if subject.unreadable is not None and subject.unreadable.code.startswith(OF_SAFETY):
        findings.append(finding_of(subject.unreadable))
    if subject.manifest is not None:
        findings += [one for one in subject.manifest.findings if one.code.startswith(OF_SAFETY)]
        findings += _tensor_names(subject)
    texts = 0
    for file in subject.files:
        findings += _name(file)
        if file.is_link:
            findings.append(_link(file))
        if not file.is_here:
            findings += _by_name(file)
        if not file.is_regular or file.leads_out:
            continue
        findings += _pickle(file, subject)
        findings += _code(file)
        if file.suffix == ".safetensors":  # also those that are no part of the checkpoint
            findings += _metadata(_header_metadata(file), file.path)
        leaks = _leaks(file)
        texts += leaks is not None
        findings += leaks or []
    if subject.manifest is not None:  # of files that are not here, and of other formats
        findings += _metadata(subject.manifest.metadata)
    findings += _remote_code(subject)
    unseen = sum(not one.is_here for one in subject.files)
    sentence = f"every file looked at ({len(subject.files)}), text searched ({texts})"
    if unseen:
        sentence = (
            f"{len(subject.files) - unseen} files looked at, {unseen} that stayed on the hub "
        )
        sentence += f"by their names alone, text searched ({texts})"
    elif not findings:
        sentence += ": no pickle, no code, no links, no secrets"
    return Outcome(name="safety", sentence=sentence, findings=tuple(findings))


def _tensor_names(subject: Subject) -> Iterator[Finding]:
    assert subject.manifest is not None
    for tensor in subject.manifest.tensors:
        if has_control(tensor.name) or not tensor.name.isprintable():
            yield Finding(
                code="FC505",
                severity="error",
                key=tensor.name,
                detail=f"the name `{escape(tensor.name)}` holds control or invisible characters",
                hint="rename it where the checkpoint is written",
            )


def _header_metadata(file: ReleaseFile) -> Mapping[str, str]:
    """What one file of safetensors says of itself; that of a broken one is told elsewhere."""
    with contextlib.closing(FileSource(file.full)) as source:
        length = int.from_bytes(source.read(0, min(8, source.size)), "little")
        if not 2 <= length <= min(source.size - 8, _MAX_HEADER):
            return {}
        try:
            header = json.loads(source.read(8, length))
        except (ValueError, RecursionError):
            return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in texts if isinstance(value, str)}


def _metadata(metadata: Mapping[str, str], file: str | None = None) -> Iterator[Finding]:
    """The string metadata of safetensors, which travels with the file and is seldom looked at."""
    for key, value in metadata.items():
        where = f"the metadata `{escape(key)}`"
        for leak in islice(find_secrets(f"{key}={json.dumps(value)}\n{value}"), 1):
            yield _secret(f"{where} holds what looks like {leak.what}: {leak.shown}", key, file)
        for leak in islice(find_paths(value), 1):
            told = f"{where} holds a path of a machine: `{escape(leak.shown)}`"
            yield _machine(told, key, file)


def _name(file: ReleaseFile) -> Iterator[Finding]:
    if has_control(file.path) or not file.path.isprintable():
        yield Finding(
            code="FC505",
            severity="error",
            key=file.path,
            detail=f"the file name `{escape(file.path)}` holds control or invisible characters",
            hint="rename it",
            data={"file": file.path},
        )


def _link(file: ReleaseFile) -> Finding:
    if file.leads_out:
        return Finding(
            code="FC503",
            severity="error",
            key=file.path,
            detail=f"`{escape(file.path)}` is a link that leads out of the folder",
            hint="put the file itself there, or remove the link",
            data={"file": file.path},
        )
    what = "a symbolic link" if file.is_regular else "a symbolic link to nothing, or to a folder"
    return Finding(
        code="FC510",
        severity="warning" if file.is_regular else "error",
        key=file.path,
        detail=f"`{escape(file.path)}` is {what}; an upload puts its content there",
        hint="put the file itself there",
        data={"file": file.path},
    )


def _by_name(file: ReleaseFile) -> Iterator[Finding]:
    """Of a file that stayed on the hub; who downloads the repository gets it."""
    code = "FC508" if file.is_code else "FC507" if file.may_be_pickle else None
    if code is not None:
        what = "a program, a script or a notebook" if file.is_code else "a pickle"
        yield Finding(
            code=code,
            severity="warning",
            key=file.path,
            detail=f"`{escape(file.path)}` is {what} by its name; it was not downloaded",
            hint="`flamingo-ckpt pull` with an --include of it gets it to be looked at",
            data={"file": file.path},
        )


def _pickle(file: ReleaseFile, subject: Subject) -> Iterator[Finding]:
    head = _head(file)
    is_torch = file.may_be_pickle and head[:2] in (b"PK", b"\x80\x02")
    is_pickle = head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5 and file.suffix != ".npz"
    if not (is_torch or is_pickle or file.is_surely_pickle):
        return
    is_read = file.path in subject.read_files
    has_safe = any(one.suffix == ".safetensors" for one in subject.files)
    yield Finding(
        code="FC507",
        severity="warning" if is_read and not has_safe else "error",
        key=file.path,
        detail=f"`{escape(file.path)}` is a pickle, which can run code where others load it"
        + ("; the release has safetensors beside it" if has_safe else ""),
        hint="`flamingo-ckpt convert` writes the same weights as safetensors"
        if is_read
        else "remove it, or publish what it holds in a form that is only data",
        data={"file": file.path},
    )


def _code(file: ReleaseFile) -> Iterator[Finding]:
    head = _head(file)
    what = next((word for magic, word in _PROGRAMS if head.startswith(magic)), "")
    if file.suffix in (".py", ".ipynb", ".pyc"):
        what = what or "Python code"
    elif file.is_code:
        what = what or "a program or script"
    if what:
        yield Finding(
            code="FC508",
            severity="error" if "program" in what else "warning",
            key=file.path,
            detail=f"`{escape(file.path)}` is {what}; who loads the release with "
            "trust_remote_code, or runs it, runs this",
            hint="leave it out, or waive it after a review",
            data={"file": file.path},
        )


def _remote_code(subject: Subject) -> Iterator[Finding]:
    """Configs that name classes to be fetched and run."""
    for file in subject.files:
        if file.suffix != ".json" or not file.is_regular or file.name in _VOCABULARIES:
            continue
        name = file.path
        try:
            named = [*_classes(subject.json_of(name))]
        except CkptError:
            continue  # told by the check that reads it; loaders refuse it too
        if not named:
            continue
        foreign = [one for one in named if "--" in one]
        yield Finding(
            code="FC508",
            severity="error" if foreign else "warning",
            key=f"{name}: auto_map",
            detail=f"`{name}` has an `auto_map` that names "
            + (
                f"code of another repository: `{escape(foreign[0])}`"
                if foreign
                else f"code to run: `{escape(named[0])}`"
            ),
            hint="remove it where transformers has the class itself; else review the code, pin it, "
            "and waive this",
            data={"file": name},
        )


def _classes(document: Any) -> Iterator[str]:
    """What the `auto_map` of a config names, and of configs within it."""
    if isinstance(document, list):
        for one in document:
            yield from _classes(one)
    if isinstance(document, Mapping):
        for name, value in document.items():
            yield from _words(value) if name == "auto_map" else _classes(value)


def _words(value: Any) -> Iterator[str]:
    """All texts in a value: old tokenizers have a list in place of a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _words(one)


def _leaks(file: ReleaseFile) -> list[Finding] | None:
    """What a text tells that it should not, the first few of each; None where it is no text."""
    secrets: dict[tuple[str, int], Finding] = {}
    paths: dict[tuple[str, int], Finding] = {}
    is_text, is_vocabulary = False, file.name in _VOCABULARIES
    for first_line, text in read_windows(file):
        is_text = True
        for leak in islice(find_secrets(text, is_vocabulary=is_vocabulary), _MAX_PER_FILE):
            line = first_line + leak.line - 1
            told = f"`{escape(file.path)}`, line {line}, holds what looks like {leak.what}: "
            told += escape(leak.shown)
            secrets.setdefault((told, line), _secret(told, file.path, file.path, line))
        for leak in () if is_vocabulary else islice(find_paths(text), _MAX_PER_FILE):
            line = first_line + leak.line - 1
            told = f"`{escape(file.path)}`, line {line}, names a path of a machine: "
            told += f"`{escape(leak.shown)}`"
            paths.setdefault((told, line), _machine(told, file.path, file.path, line))
    found = [*islice(secrets.values(), _MAX_PER_FILE), *islice(paths.values(), _MAX_PER_FILE)]
    return found if is_text else None


def _secret(detail: str, key: str, file: str | None = None, line: int = 0) -> Finding:
    return Finding(
        code="FC509",
        severity="error",
        key=key,
        detail=detail,
        hint="revoke it where it was issued, then remove it: what was once public stays so",
        data=_place(file, line),
    )


def _place(file: str | None, line: int) -> dict[str, Any]:
    return {**({"file": file} if file else {}), **({"line": line} if line else {})}


def _machine(detail: str, key: str, file: str | None = None, line: int = 0) -> Finding:
    return Finding(
        code="FC511",
        severity="warning",
        key=key,
        detail=detail,
        hint="replace it by the id of a repository, or remove the field",
        data=_place(file, line),
    )


def _head(file: ReleaseFile) -> bytes:
    source = FileSource(file.full)
    head = source.read(0, min(8, source.size))
    source.close()
    return head
