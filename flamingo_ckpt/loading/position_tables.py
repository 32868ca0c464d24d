"""Which tables of positions a module has, and for what grid each was built.

A table is found by how its module is built, never by its name alone: open_clip's towers, timm's
trunks, the embeddings of transformers' CLIP and SigLIP (and modules written like them), and the
pooling attention of CLIP's ResNets. Positions of language models are none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flamingo_ckpt.layouts.prefixes import strip_wrappers

if TYPE_CHECKING:
    from torch import nn

#: (height, width) in patches.
Grid: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionTable:
    """One learned table of positions, as its module wants it.

    Attributes:
        kind: `image`, positions on a grid; `text`, positions on a line.
        shape: of the parameter: [rows, width], [1, rows, width] or [1, height, width, channels].
        num_positions: rows that stand for a place, without class tokens.
        grid: (height, width) in patches; None for text.
        num_prefix: rows before the positions (class token, registers).
        num_suffix: rows after them (the class token of CoCa's text tower).
    """

    kind: Literal["image", "text"]
    shape: tuple[int, ...]
    num_positions: int
    grid: Grid | None = None
    num_prefix: int = 0
    num_suffix: int = 0

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.shape[-1]


def position_tables(module: nn.Module) -> Mapping[str, PositionTable]:
    """The tables of positions below `module`, by the name of their parameter.

    Names are those of `module.state_dict()` without the components that training wrappers add
    (`module.`, `_orig_mod.` and the FSDP ones). Only shapes are read: meta tensors will do.
    """
    found: dict[str, PositionTable] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for probe in _PROBES:
            hit = probe(part)
            if hit is None:
                continue
            leaf, table = hit
            found[strip_wrappers(f"{path}.{leaf}" if path else leaf)[0]] = table
    return found


_Hit: TypeAlias = tuple[str, PositionTable] | None


def _shape_of(part: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of a parameter or buffer of `part` itself, None where it has none."""
    # not by getattr: a compiled module answers for the one inside
    for slots in (part._parameters, part._buffers):
        if name in slots:
            tensor = slots[name]
            return None if tensor is None else tuple(tensor.shape)
    return None


def _child(part: nn.Module, name: str) -> nn.Module | None:
    """A submodule of `part` itself."""
    # those of a scripted module have no `get`
    return part._modules[name] if name in part._modules else None  # noqa: SIM401


def _pair(size: Any) -> Grid | None:
    """(height, width) of an int or a pair of ints; None for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2:
        height, width = size
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None


def _image(shape: tuple[int, ...], grid: Grid | None, prefixes: tuple[int, ...]) -> Any:
    """A table of `grid` whose rows leave one of the numbers in `prefixes`, or None."""
    if grid is None or len(shape) not in (2, 3):
        return None
    num_positions = grid[0] * grid[1]
    num_prefix = shape[-2] - num_positions
    if num_prefix not in prefixes:
        return None
    return PositionTable(
        kind="image",
        shape=shape,
        num_positions=num_positions,
        grid=grid,
        num_prefix=num_prefix,
    )


def _text(shape: tuple[int, ...], num_suffix: int = 0) -> PositionTable:
    return PositionTable(
        kind="text", shape=shape, num_positions=shape[0] - num_suffix, num_suffix=num_suffix
    )


def _open_clip_vision(part: nn.Module) -> _Hit:
    """`VisionTransformer` of open_clip, or of OpenAI's package (which keeps no grid)."""
    name = "positional_embedding"
    shape = _shape_of(part, name)
    if shape is None:
        return None
    grid = _pair(getattr(part, "grid_size", None)) or _grid_of_pixels(part, "input_resolution")
    has_class = _shape_of(part, "class_embedding") is not None
    table = _image(shape, grid, (1,) if has_class else (0,))
    return None if table is None else (name, table)


def _grid_of_pixels(part: nn.Module, attribute: str) -> Grid | None:
    pixels = _pair(getattr(part, attribute, None))
    patch = _pair(getattr(getattr(part, "conv1", None), "kernel_size", None))
    if pixels is None or patch is None:
        return None
    return pixels[0] // patch[0], pixels[1] // patch[1]


def _open_clip_text(part: nn.Module) -> _Hit:
    """The flat text tower of open_clip's `CLIP`, and its `TextTransformer`."""
    name = "positional_embedding"
    shape = _shape_of(part, name)
    if shape is None or len(shape) != 2 or "token_embedding" not in part._modules:
        return None
    return name, _text(shape, 0 if _shape_of(part, "cls_emb") is None else 1)


def _resnet_pool(part: nn.Module) -> _Hit:
    """`AttentionPool2d` of open_clip's `ModifiedResNet`: the mean, then a square of positions."""
    name = "positional_embedding"
    shape = _shape_of(part, name)
    if shape is None or not {"q_proj", "k_proj", "v_proj", "c_proj"} <= part._modules.keys():
        return None
    side = math.isqrt(shape[0] - 1)  # the class knows no other form
    table = _image(shape, (side, side), (1,))
    return None if table is None else (name, table)


def _timm(part: nn.Module) -> _Hit:
    """A timm trunk (`pos_embed` beside `patch_embed`) or its `AttentionPool2d`."""
    name = "pos_embed"
    shape = _shape_of(part, name)
    if shape is None:
        return None
    patches = _child(part, "patch_embed")
    if patches is None:
        table = _image(shape, _pair(getattr(part, "feat_size", None)), (1,))
    else:
        # a trunk may keep its class token out of the table (`no_embed_class`)
        num_prefix = int(getattr(part, "num_prefix_tokens", 0))
        grid = _pair(getattr(patches, "grid_size", None))
        table = _image(shape, grid, (0, num_prefix))
    return None if table is None else (name, table)


def _timm_naflex(part: nn.Module) -> _Hit:
    """The embeddings of timm's `NaFlexVit`: the grid is in the shape."""
    name = "pos_embed"
    shape = _shape_of(part, name)
    if shape is None or len(shape) != 4 or getattr(part, "pos_embed_grid_size", None) is None:
        return None
    grid = shape[1], shape[2]
    return name, PositionTable(
        kind="image", shape=shape, num_positions=grid[0] * grid[1], grid=grid
    )


def _hf_embeddings(part: nn.Module) -> _Hit:
    """The embeddings of transformers' CLIP and SigLIP, vision and text."""
    inner = _child(part, "position_embedding")
    shape = None if inner is None else _shape_of(inner, "weight")
    if shape is None or len(shape) != 2:
        return None
    name = "position_embedding.weight"
    if "token_embedding" in part._modules:
        return name, _text(shape)
    if "patch_embedding" not in part._modules:
        return None
    pixels, patch = (_pair(getattr(part, size, None)) for size in ("image_size", "patch_size"))
    # SigLIP 2 knows the side alone
    grid = _pair(getattr(part, "position_embedding_size", None))
    if pixels is not None and patch is not None:
        grid = pixels[0] // patch[0], pixels[1] // patch[1]
    table = _image(shape, grid, (0, 1))
    return None if table is None else (name, table)


_PROBES: tuple[Callable[[Any], _Hit], ...] = (
    _open_clip_vision,
    _open_clip_text,
    _resnet_pool,
    _timm,
    _timm_naflex,
    _hf_embeddings,
)
