"""Faults that can be mended without touching a weight: modes, totals of an index, stated dtypes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.release.config import dtype_faults
from flamingo_ckpt.release.container import wanted_mode
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import TORCH_DTYPES, distinct


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """One thing that can be mended.

    Attributes:
        path: of the file, in the release.
        what: is done to it.
        apply: does it; atomic.
    """

    path: str
    what: str
    apply: Callable[[], None]


def plan_fixes(subject: Subject) -> tuple[Fix, ...]:
    """What can safely be mended. Nothing is changed."""
    return (*_modes(subject), *_totals(subject), *_dtypes(subject))


def _modes(subject: Subject) -> list[Fix]:
    found = []
    for file in subject.files:
        if not file.is_regular or file.is_link:
            continue
        mode = wanted_mode(file)
        if mode is not None:
            found.append(
                Fix(
                    path=file.path,
                    what=f"mode {file.mode:04o} becomes {mode:04o}",
                    apply=_chmod(file.full, mode),
                )
            )
    return found


def _chmod(path: str, mode: int) -> Callable[[], None]:
    def apply() -> None:
        try:
            os.chmod(path, mode)
        except OSError as error:
            raise CkptError(
                f"cannot change the mode of `{path}`: {error.strerror}", code="FC004", where=path
            ) from error

    return apply


def _is_own(subject: Subject, name: str) -> bool:
    """Whether it is a file of the folder, and not one elsewhere that a link leads to."""
    file = subject.by_path.get(name)
    return subject.is_folder and file is not None and file.is_regular and not file.is_link


def _totals(subject: Subject) -> list[Fix]:
    manifest = subject.manifest
    name = manifest.details.get("index") if manifest is not None else None
    if manifest is None or name is None or not _is_own(subject, str(name)):
        return []
    document = subject.json_of(str(name))
    metadata = document.get("metadata")
    held = sum(tensor.num_bytes for tensor in distinct(manifest.tensors))
    every = sum(tensor.num_bytes for tensor in manifest.tensors)
    said = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if said is None or said in (held, every):
        return []
    mended = {**document, "metadata": {**document["metadata"], "total_size": held}}
    return [
        Fix(
            path=str(name),
            what=f"`total_size` {said} becomes {held}",
            apply=_rewrite(subject.by_path[str(name)].full, mended),
        )
    ]


def _dtypes(subject: Subject) -> list[Fix]:
    faults = dtype_faults(subject)
    if not faults or subject.config_path is None:
        return []
    name = subject.relative(subject.config_path)
    if not _is_own(subject, name):
        return []
    document = dict(subject.json_of(name))
    told = []
    for field, said, held in faults:
        torch_name = next(one.torch for one in TORCH_DTYPES.values() if one.name == held)
        document[field] = torch_name
        told.append(f"`{field}` {said} becomes {torch_name}")
    return [
        Fix(path=name, what=", ".join(told), apply=_rewrite(subject.by_path[name].full, document))
    ]


def _rewrite(path: str, document: Mapping[str, Any]) -> Callable[[], None]:
    def apply() -> None:
        from flamingo_ckpt.formats.staging import staged_file, write_at_path

        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        mode = os.stat(path).st_mode & 0o777
        with staged_file(path, overwrite=True) as staging:
            write_at_path(staging, text.encode("utf-8"))
            os.chmod(staging, mode)

    return apply
