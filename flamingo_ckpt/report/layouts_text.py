"""The list of layouts, and one layout's rules, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.report.document import Report


def render_layouts(report: Report, *, verbose: bool = False) -> list[str]:  # noqa: ARG001
    """One line a layout, or one line a rule."""
    layouts, rules = report.extra["layouts"], report.extra["rules"]
    if rules or len(layouts) == 1:
        return _rules(layouts[0], rules)
    lines: list[str] = []
    for space in dict.fromkeys(one["space"] for one in layouts):
        lines += [space, *(_layout(one) for one in layouts if one["space"] == space), ""]
    lines.append(
        "A layout is converted to any other of its group, where no mark says otherwise; "
        "`layouts NAME` prints the rules."
    )
    return lines


def _layout(one: Mapping[str, Any]) -> str:
    notes = [word for word in ("lossy", "read_only", "refused") if one[word]]
    note = " [" + ", ".join(notes).replace("_", " ").replace("refused", "not convertible") + "]"
    return f"  {one['name']:<22}{one['title']}" + (note if notes else "")


def _rules(layout: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{layout['name']}: {layout['title']}"]
    for word, told in (
        ("lossy", "lossy"),
        ("read_only", "never written"),
        ("refused", "not convertible"),
    ):
        if layout[word]:
            lines.append(f"{told}: {layout[word]}")
    lines.append("")
    width = min(max((len(rule["example"]) for rule in rules), default=0), 78)
    for rule in rules:
        # a reason that holds for the whole layout stands above
        why = "" if rule["reason"] == layout["refused"] else f": {rule['reason']}"
        becomes = ", ".join(rule["becomes"]) or f"left out{why}"
        transform = rule["axes"] or (
            "" if rule["transform"] in ("rename", "drop") else rule["transform"]
        )
        models = f"  [{', '.join(rule['language_models'])}]" if rule["language_models"] else ""
        lines.append(f"  {rule['key']}{models}")
        lines.append(
            f"      {rule['example'].ljust(width)}  ->  {becomes}"
            + (f"   ({transform})" if transform else "")
        )
    return lines
