"""Names that training wrappers add: `module.`, `_orig_mod.` and the FSDP ones.

They are whole dotted components and are removed as such, wherever they stand: a wrapped submodule
puts them in the middle of a key. (timm and open_clip cut characters, and tear other keys apart.)
"""

from __future__ import annotations

import re

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

#: What DDP and DataParallel, torch.compile, FSDP and activation checkpointing insert.
WRAPPER_COMPONENTS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
_FLAT_COMPONENTS = ("_flat_param", "flat_param")
#: One of them before the last component; most names have none, and are looked at no further.
_WRAPPED = re.compile(rf"(?:^|\.)(?:{'|'.join(sorted(WRAPPER_COMPONENTS))})\.")


def strip_wrappers(name: str) -> tuple[str, tuple[str, ...]]:
    """The name without wrapper components, and those that were removed, in order.

    The last component is the parameter's own name and always stays.

    >>> strip_wrappers("module.layers.0._checkpoint_wrapped_module.weight")
    ('layers.0.weight', ('module', '_checkpoint_wrapped_module'))
    >>> strip_wrappers("submodule.module_list.weight")
    ('submodule.module_list.weight', ())
    """
    if _WRAPPED.search(name) is None:
        return name, ()
    *path, leaf = name.split(".")
    removed = tuple(part for part in path if part in WRAPPER_COMPONENTS)
    return ".".join((*(part for part in path if part not in WRAPPER_COMPONENTS), leaf)), removed


def refuse_flat_parameter(name: str, where: str) -> None:
    """Raise FC208 for a flat parameter of FSDP1: many tensors in one vector, shapes unknown."""
    if "flat_param" in name and any(part.startswith(_FLAT_COMPONENTS) for part in name.split(".")):
        raise CkptError(
            f"`{escape(name)}` is a flat parameter of FSDP: the shapes of its tensors are not "
            "in the file",
            code="FC208",
            where=where,
            key=name,
            hint="save with `StateDictType.FULL_STATE_DICT`, where the model can be built",
        )


def describe_prefixes(removed: set[tuple[str, ...]]) -> str | None:
    """`module.` for the report; several kinds separated by commas; None for none."""
    kinds = sorted(".".join(parts) + "." for parts in removed if parts)
    return ", ".join(kinds) or None
