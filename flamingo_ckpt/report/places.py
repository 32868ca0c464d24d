"""Where a finding is: the file that code hosts show it beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report


@dataclass(frozen=True, slots=True)
class Place:
    """A file as the command line named it, and a line of it where one is known."""

    path: str
    line: int | None = None


def place_of(report: Report, finding: Finding) -> Place | None:
    """The file that a finding is about; None where it names none, or one that is not here."""
    data: Mapping[str, Any] = finding.data
    file, line = data.get("file"), data.get("line")
    if not isinstance(file, str) or not file:
        return None
    folder = report.inputs[0]["uri"] if report.inputs else ""
    if "://" in folder or folder.startswith("model:"):
        return None
    return Place(_joined(folder, file), line if isinstance(line, int) else None)


def input_place(report: Report) -> Place | None:
    """The first input, for findings that are about all of it."""
    uri = report.inputs[0]["uri"] if report.inputs else report.extra.get("where")
    if not isinstance(uri, str) or "://" in uri or uri.startswith("model:"):
        return None
    return Place(uri.rstrip("/") or uri)


def _joined(folder: str, file: str) -> str:
    """`release/README.md`; the input itself where it is that very file."""
    folder = folder.rstrip("/")
    if not folder or folder == file or folder.endswith("/" + file):
        return folder or file
    return file if folder == "." else f"{folder.removeprefix('./')}/{file}"
