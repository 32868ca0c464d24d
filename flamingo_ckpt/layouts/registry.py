"""Every layout by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.layouts import clip, flamingo, foreign, language, paligemma, siglip, timm_clip
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.tensors import escape

#: In the order in which `flamingo-ckpt layouts` lists them.
LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for module in (flamingo, clip, siglip, timm_clip, paligemma, language, foreign)
    for layout in module.LAYOUTS
}


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        CkptError: FC410 where there is none.
    """
    layout = LAYOUTS.get(name)
    if layout is None:
        near = [one for one in LAYOUTS if name and name in one]
        near = near or difflib.get_close_matches(name, LAYOUTS, n=1)
        raise CkptError(
            f"there is no layout `{escape(name)}`; there are " + ", ".join(LAYOUTS),
            code="FC410",
            hint="did you mean " + " or ".join(f"`{one}`" for one in near) + "?"
            if near
            else "`flamingo-ckpt layouts` lists them",
        )
    return layout
