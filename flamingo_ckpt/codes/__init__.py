"""The table of findings: every code that a user can meet, with its page for `explain`.

One file for each theme; `docs/findings.md` is made from them. Standard library only.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from flamingo_ckpt.codes import (
    building,
    container,
    environment,
    hub,
    keys,
    layouts,
    loading,
    models,
    parity,
    release,
    safety,
    training,
    values,
)
from flamingo_ckpt.codes.code import Code, Theme

#: (name, heading, whether `check` can find them, rows); in the order in which they are listed.
_THEMES = (
    ("environment", "Usage, destination, environment", False, environment.CODES),
    ("container", "Containers: the bytes", True, container.CODES),
    ("keys", "Names, shapes and dtypes", True, keys.CODES),
    ("values", "Bits and numbers", True, values.CODES),
    ("models", "Configs and models", True, models.CODES),
    ("layouts", "Layouts, maps and bases", True, layouts.CODES),
    ("loading", "Loading into a module", False, loading.CODES),
    ("building", "Building a model from a release", False, building.CODES),
    ("training", "Training state", False, training.CODES),
    ("hub", "The hub", False, hub.CODES),
    ("parity", "Behaviour: what is computed", True, parity.CODES),
    ("safety", "Safety", True, safety.CODES),
    ("release", "The release", True, release.CODES),
)
THEMES: Final = tuple(
    Theme(
        name=name,
        title=title,
        of_check=of_check,
        codes=tuple(sorted(codes, key=lambda one: one.code)),
    )
    for name, title, of_check, codes in _THEMES
)
#: code -> its row, in the order of the codes.
TABLE: Final = MappingProxyType(
    {
        one.code: one
        for one in sorted(
            (one for theme in THEMES for one in theme.codes), key=lambda one: one.code
        )
    }
)
#: code -> its theme.
THEME_OF: Final = MappingProxyType({one.code: theme for theme in THEMES for one in theme.codes})
#: What no policy lets pass: code that could run, files from elsewhere, the policy's own faults.
UNWAIVABLE: Final = frozenset({"FC501", "FC502", "FC503", "FC620", "FC621", "FC623"})
#: Of the themes that `check` is about, but told by `push`.
_OF_PUSH = frozenset({"FC609", "FC630", "FC631"})


def is_of_check(code: str) -> bool:
    """Whether a code can stand among the findings of `check`."""
    return THEME_OF[code].of_check and code not in _OF_PUSH


__all__ = ["TABLE", "THEMES", "THEME_OF", "UNWAIVABLE", "Code", "Theme", "is_of_check"]
