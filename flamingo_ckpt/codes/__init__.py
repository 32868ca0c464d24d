"""The table of findings: every code that a user can meet, with its page for `explain`.

One file for each theme; `docs/findings.md` is made from them. Standard library only.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from flamingo_ckpt.codes import (
    container,
    environment,
    hub,
    keys,
    loading,
    models,
    parity,
    release,
    safety,
    values,
)
from flamingo_ckpt.codes.code import Code

_THEMES = (
    environment,
    container,
    keys,
    values,
    models,
    loading,
    hub,
    parity,
    safety,
    release,
)
#: code -> its row, in the order of the codes.
TABLE: Final = MappingProxyType(
    {
        one.code: one
        for one in sorted(
            (one for theme in _THEMES for one in theme.CODES), key=lambda one: one.code
        )
    }
)

__all__ = ["TABLE", "Code"]
