"""What `diff` says about settings that no tensor shows, where both sides have a config."""

from __future__ import annotations

from collections.abc import Iterable

from flamingo_ckpt.diff.sides import Side
from flamingo_ckpt.diff.views import are_comparable
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.models.settings import differing
from flamingo_ckpt.tensors import escape


def settings_findings(a: Side, b: Side) -> Iterable[Finding]:
    """One finding for each setting that both sides tell, and not alike."""
    if not are_comparable(a, b):
        return  # of two kinds of model
    for name, (ours, theirs) in differing(a.settings, b.settings).items():
        yield setting_differs(name, ours, theirs)


def setting_differs(name: str, ours: object, theirs: object) -> Finding:
    """The finding for one setting that the two sides tell, and not alike."""
    return Finding(
        code="FC407",
        severity="error",
        detail=f"`{name}` is {escape(repr(ours))} in A and {escape(repr(theirs))} in B: with "
        "equal weights the two compute differently",
        data={"setting": name, "a": ours, "b": theirs},
    )
