"""One report, as whatever reads it wants it: by the name of a format, or by a file's suffix."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping

from flamingo_ckpt.report.document import Report, to_document

#: Suffix of a file -> format.
SUFFIXES: Mapping[str, str] = {
    ".json": "json",
    ".md": "markdown",
    ".html": "html",
    ".sarif": "sarif",
    ".xml": "junit",
}
#: format -> (module of this room, function of a report); `text` and `json` are made here.
_RENDERERS: Mapping[str, tuple[str, str]] = {
    "markdown": ("markdown", "to_markdown"),
    "html": ("html", "to_html"),
    "sarif": ("sarif", "to_sarif"),
    "junit": ("junit", "to_junit"),
    "github": ("github", "to_annotations"),
    "step-summary": ("github", "to_step_summary"),
}
FORMATS = ("text", "json", *_RENDERERS)


def format_of(path: str) -> str | None:
    """The format that a file's suffix stands for; None where it stands for none."""
    return SUFFIXES.get(os.path.splitext(path)[1].lower())


def render_as(report: Report, format: str, *, verbose: bool = False) -> str:
    """The whole of a rendering, with a newline at its end.

    Args:
        report: what is rendered.
        format: one of `FORMATS`.
        verbose: for `text`, whether nothing is folded away.
    """
    if format == "json":
        return json.dumps(to_document(report), indent=2) + "\n"
    if format == "text":
        from flamingo_ckpt.report.text import render
        from flamingo_ckpt.tensors import escape

        return "".join(f"{escape(line)}\n" for line in render(report, verbose=verbose))
    module, name = _RENDERERS[format]
    function = getattr(importlib.import_module(f"flamingo_ckpt.report.{module}"), name)
    content: str = function(report)
    return content if content.endswith("\n") else content + "\n"
