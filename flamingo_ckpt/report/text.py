"""Reports as text for people. Hostile strings are escaped; every symbol has a word beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.fold import fold
from flamingo_ckpt.report.words import count, sentence
from flamingo_ckpt.tensors import escape, format_shape

_MAX_LISTED = 10
_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(num_bytes: int) -> str:
    """Decimal units, as disks and the hub count.

    >>> format_bytes(4188067327)
    '4.19 GB'
    """
    value, unit = float(num_bytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


#: verb -> (module of this room, function) where its text is made of more than counts and findings.
_RENDERERS: Mapping[str, tuple[str, str]] = {
    "inspect": ("text", "render_inspect"),
    "convert": ("text", "render_convert"),
    "verify": ("text", "render_verify"),
    "diff": ("diff_text", "render_diff"),
    "parity": ("parity_text", "render_parity"),
    "layouts": ("layouts_text", "render_layouts"),
    "explain": ("explain_text", "render_explain"),
    "check": ("check_text", "render_check"),
    "pull": ("transfer_text", "render_pull"),
    "push": ("transfer_text", "render_push"),
}


def render(report: Report, *, verbose: bool = False) -> list[str]:
    """The lines of a report: of its inputs first, then what its verb has to say."""
    if not report.summary:
        return render_error(report.findings[0], report.extra.get("where"))
    module, name = _RENDERERS.get(report.command, ("text", "render_counts"))
    function = getattr(importlib.import_module(f"flamingo_ckpt.report.{module}"), name)
    lines: list[str] = function(report, verbose=verbose)
    return [*(_input_line(one) for one in report.inputs), *lines]


def render_counts(report: Report, *, verbose: bool = False) -> list[str]:
    """What any verb's report can be told as: its numbers and words, then its findings."""
    told = [(name, value) for name, value in report.summary.items() if not _is_nested(value)]
    width = max((len(name) for name, _ in told), default=0)
    lines = [f"{name.replace('_', ' '):<{width}}  {escape(str(value))}" for name, value in told]
    return [*lines, *render_findings(report.findings, verbose)]


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def render_error(finding: Finding, where: str | None) -> list[str]:
    """`error:`, the place, and the way on."""
    lines = [f"error: {finding.detail}"]
    if where:
        lines.append(f"  --> {escape(where)}")
    if finding.hint:
        lines.append(f"hint: {finding.hint}")
    return lines


def _input_line(one: Mapping[str, Any]) -> str:
    parts = [escape(one["uri"]), format_bytes(one["num_bytes"])]
    if one["format"]:
        parts += [one["format"], count(one["num_tensors"], "tensor")]
    if one["layout"]:
        parts.append(f"layout `{one['layout']}`")
    if one["wrapper"]:
        parts.append(f"under `{escape(one['wrapper'])}`")
    if one["prefix"]:
        parts.append(f"prefix `{one['prefix']}`")
    if one.get("remote"):
        parts.append(_remote(one["remote"]))
    return "   ".join(parts)


def _remote(cost: Mapping[str, Any]) -> str:
    """What a checkpoint on the hub has cost, and the commit that was read."""
    at = f"at {escape(str(cost.get('revision')))[:12]}"
    if cost.get("downloaded"):
        return f"downloaded {at}"
    total = cost.get("num_bytes_total")
    of = "" if total is None else f" of {format_bytes(total)}"
    return f"read {format_bytes(cost.get('num_bytes_read', 0))}{of} {at}"


def render_inspect(report: Report, *, verbose: bool = False) -> list[str]:
    """Every tensor, folded, then what the file has besides."""
    extra = report.extra
    lines = [""]
    if "tensors" in extra:
        lines += [*_tensor_rows(extra["tensors"]), ""]
    summary = report.summary
    dtypes = ", ".join(f"{name} {number}" for name, number in summary["dtypes"].items())
    lines.append(
        f"total      {count(summary['num_tensors'], 'tensor')}, "
        f"{summary['num_parameters']} parameters, {format_bytes(summary['num_bytes'])}; "
        f"by dtype: {dtypes or 'none'}"
    )
    if "num_checkpoint_tensors" in summary:
        lines.append(
            f"release    {count(summary['num_checkpoint_tensors'], 'tensor')}, "
            f"{summary['num_checkpoint_parameters']} parameters: what a checkpoint of it holds"
        )
    for path, number in extra["details"].get("alias_trees", {}).items():
        lines.append(f"alias      {count(number, 'name')} under `{path}` in the whole state dict")
    lines += _settings(extra["details"].get("settings", {}))
    if extra.get("layout"):
        lines += _layout_evidence(extra["layout"], verbose)
    for group in _some(extra["tied"], verbose):
        lines.append("tied       " + " = ".join(f"`{escape(name)}`" for name in group))
    if len(extra["files"]) > 1:
        lines.append(f"files      {len(extra['files'])}, " + _span(extra["files"]))
    for item in _some(extra["beside"], verbose):
        holds = f", {count(item['num_tensors'], 'tensor')} in it" if item["num_tensors"] else ""
        lines.append(f"beside     {escape(item['path'])}: {escape(item['kind'])}{holds}")
    if len(extra["beside"]) > _MAX_LISTED and not verbose:
        lines.append(f"           and {len(extra['beside']) - _MAX_LISTED} more, see -v")
    if extra["metadata"]:
        for key, value in extra["metadata"].items():
            shown = escape(value[:100]) + ("..." if len(value) > 100 else "")
            lines.append(f"metadata   {escape(key)}: {shown}")
    if extra["pickle_globals"]:
        lines += _globals(extra["pickle_globals"])
    return [*lines, *render_findings(report.findings, verbose)]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """One line for each part of the model: what no tensor shows."""
    parts: dict[str, list[str]] = {}
    for name, value in settings.items():
        part, _, field = name.partition(".")
        parts.setdefault(part, []).append(f"{field} {escape(str(value))}")
    return [f"settings   {part}: " + ", ".join(told) for part, told in parts.items()]


def _layout_evidence(layout: Mapping[str, Any], verbose: bool) -> list[str]:
    lines = [f"layout     {layout['name']}: {layout['title']}; {layout['evidence']}"]
    unknown = layout["unknown"]
    if unknown:
        told = ", ".join(f"`{escape(name)}`" for name in _some(unknown, verbose))
        more = len(unknown) - len(_some(unknown, verbose))
        lines.append(
            f"           no rule for {told}" + (f" and {more} more, see -v" if more else "")
        )
    return lines


def _globals(names: Mapping[str, str]) -> list[str]:
    known = [name for name, kind in names.items() if kind == "table"]
    inert = [name for name, kind in names.items() if kind != "table"]
    lines = [f"pickle     {count(len(names), 'global')}; known: " + _listed(known)]
    if inert:
        lines.append("           inert, never built: " + _listed(inert))
    return lines


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(escape(name) for name in names[:_MAX_LISTED])
    more = len(names) - _MAX_LISTED
    return (shown or "none") + (f" and {more} more" if more > 0 else "")


def _tensor_rows(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    entries = [(t["name"], (t["dtype"], tuple(t["shape"]), t["num_bytes"])) for t in tensors]
    table: list[tuple[str, ...]] = []
    for row in fold(entries):
        facts: Any = row.facts
        dtype, shape, num_bytes = facts
        times = f"x{row.count}" if row.count > 1 else ""
        table.append(
            (
                escape(row.pattern()),
                times,
                dtype,
                format_shape(shape),
                format_bytes(num_bytes * row.count),
            )
        )
    widths = [min(max((len(line[i]) for line in table), default=0), 100) for i in range(4)]
    return [
        "  "
        + "  ".join(
            (
                line[0].ljust(widths[0]),
                line[1].rjust(widths[1]),
                line[2].ljust(widths[2]),
                line[3].ljust(widths[3]),
                line[4],
            )
        ).rstrip()
        for line in table
    ]


def _span(files: Sequence[Mapping[str, Any]]) -> str:
    return f"`{escape(files[0]['path'])}` to `{escape(files[-1]['path'])}`"


def render_convert(report: Report, *, verbose: bool = False) -> list[str]:
    """The plan, what was written, and whether it was read back."""
    summary, extra = report.summary, report.extra
    lines = []
    why = f" ({extra['prefix']} removed)" if extra["prefix"] else ""
    what = [f"{summary['renamed']} renamed{why}" if summary["renamed"] else "names kept"]
    if summary["transformed"]:
        what.append(f"{summary['transformed']} rearranged")
    what.append(f"{summary['cast']} cast to {extra['dtype']}" if summary["cast"] else "no cast")
    if extra["layout"]:
        layout = extra["layout"]
        lines.append(
            f"layout     {layout['from']} to {layout['to']}; {layout['evidence']}"
            + ("; the result is partial" if extra["partial"] else "")
        )
    lines.append(
        f"plan       {count(summary['num_tensors'], 'tensor')}, "
        f"{format_bytes(summary['num_bytes'])} as {extra['format']}; " + ", ".join(what)
    )
    verb = "would write" if extra["dry_run"] else "wrote"
    for file in _some(summary["files"], verbose):
        lines.append(
            f"{verb:<10} {escape(_joined(extra['dst'], file['path'], extra['is_folder']))}   "
            f"{format_bytes(file['num_bytes'])}"
        )
    if len(summary["files"]) > _MAX_LISTED and not verbose:
        lines.append(f"           and {len(summary['files']) - _MAX_LISTED} more files, see -v")
    if extra["dry_run"]:
        lines += ["", *_tensor_rows(extra["plan"]), "", "nothing written (--dry-run)"]
    elif extra["verified"]:
        lines.append(
            f"verified   {summary['verified']}/{summary['num_tensors']} tensors read back and "
            "compared with the source bit for bit" + (" after the cast" if summary["cast"] else "")
        )
    else:
        lines.append("verified   not run (--no-verify)")
    if extra.get("record"):
        lines.append(f"record     {escape(extra['record'])}: source, map and verdict")
    return [*lines, *render_findings(report.findings, verbose)]


def _joined(dst: str, name: str, is_folder: bool) -> str:
    return f"{dst.rstrip('/')}/{name}" if is_folder else dst


def render_verify(report: Report, *, verbose: bool = False) -> list[str]:
    """The counts, the verdict in words, and every difference."""
    summary = report.summary
    total = sum(summary[name] for name in ("bit_exact", "cast", "different", "missing"))
    rows = [
        ("bit-exact", summary["bit_exact"]),
        ("cast", summary["cast"]),
        ("different", summary["different"]),
        ("missing", summary["missing"]),
        ("unexpected", summary["unexpected"]),
    ]
    lines = [f"{count(total, 'tensor')} derived again from the source"]
    lines += [f"  {name:<11}{number}" for name, number in rows if number or name == "bit-exact"]
    unverified = len(report.extra["unverified"])
    if unverified:
        lines.append(f"  not checked {unverified}: a base supplied them, and none is given here")
    if report.verdict == "incomplete":
        lines.append(
            "incomplete: what the source holds is there; --base-vision and --base-language name "
            "what the rest is compared with"
        )
    else:
        lines.append(sentence(report))
    return [*lines, *render_findings(report.findings, verbose)]


def render_findings(findings: Sequence[Finding], verbose: bool) -> list[str]:
    """Errors and warnings one by one, the informative ones counted by kind unless asked for."""
    lines: list[str] = []
    for severity in ("error", "warning"):
        found = [
            finding
            for finding in findings
            # counted by `verify` itself, which names the bases once
            if finding.severity == severity and (verbose or finding.code != "FC215")
        ]
        for finding in _some(found, verbose):
            lines.append(f"{severity} {finding.code}  {finding.detail}")
            if finding.hint:
                lines.append(f"  hint: {finding.hint}")
        if len(found) > _MAX_LISTED and not verbose:
            lines.append(f"and {len(found) - _MAX_LISTED} more {severity}s, see --json")
    notes: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.severity == "info":
            notes.setdefault(finding.code, []).append(finding)
    for group in notes.values():
        if verbose or len(group) <= 3:
            lines += [f"note {finding.code}  {finding.detail}" for finding in group]
            continue
        names = _listed([f"`{escape(f.key)}`" if f.key else f.detail for f in group[:3]])
        lines.append(
            f"note {group[0].code}  {group[0].title}: {names} and {len(group) - 3} more, "
            "see -v or --json"
        )
    return lines


def _some(items: Sequence[Any], verbose: bool) -> Sequence[Any]:
    return items if verbose else items[:_MAX_LISTED]
