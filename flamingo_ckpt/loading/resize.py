"""Tables of positions for another grid or length: first decided on shapes, then done on a tensor.

Grids are compared, not numbers of rows: 2x8 and 4x4 have as many cells and mean different places.
The source's grid is told by the caller or follows from the number of rows where only one reading
is sensible; everything else is refused. The kernels are those of open_clip (`resize_pos_embed`:
bicubic with antialias; `resize_text_pos_embed`: linear) and of timm (`resample_abs_pos_embed`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.loading.position_tables import Grid, PositionTable, position_tables

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Grid",
    "PositionTable",
    "Resized",
    "plan_resize",
    "position_tables",
    "resize_table",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """How one table of positions is (or was) brought to another size.

    Attributes:
        key: of the table in the module.
        kind: `image` or `text`.
        src_grid: the source's positions, (height, width) or (length,).
        dst_grid: the module's, likewise.
        kernel: `bicubic, antialias`, `linear` or `truncate`.
        num_prefix: rows before the positions, kept bit for bit.
        num_suffix: rows after them, kept bit for bit.
        inferred: whether the source's grid was concluded from the number of rows.
    """

    key: str
    kind: Literal["image", "text"]
    src_grid: tuple[int, ...]
    dst_grid: tuple[int, ...]
    kernel: str
    num_prefix: int = 0
    num_suffix: int = 0
    inferred: bool = False

    def as_finding(self) -> Finding:
        """The same as a finding of severity `info`."""
        hint = None
        if self.inferred:
            hint = f"image_grid=(height, width) if the source's grid is not {_by(self.src_grid)}"
        elif self.kernel == "linear":
            hint = (
                'every position moves; text_positions="truncate" keeps the first ones as they are'
            )
        return Finding(
            code="FC446",
            severity="info",
            detail=f"{self.kind} positions resized from {_by(self.src_grid)} to "
            f"{_by(self.dst_grid)} ({self.kernel})",
            key=self.key,
            hint=hint,
            data={
                "src_grid": list(self.src_grid),
                "dst_grid": list(self.dst_grid),
                "kernel": self.kernel,
                "inferred": self.inferred,
            },
        )


def plan_resize(
    key: str,
    shape: Sequence[int],
    table: PositionTable,
    *,
    image_grid: Grid | None = None,
    text_positions: str = "linear",
    where: str | None = None,
) -> Resized | None:
    """Decide how a source table of `shape` becomes `table`; None where it is used as it is.

    Args:
        key: the name of the table in the module.
        shape: of the source's tensor, in the module's arrangement of axes.
        table: what the module has there.
        image_grid: (height, width) of the source's image table; None where nothing tells it.
        text_positions: `linear` as open_clip, or `truncate`: keep the first rows.
        where: the source, for messages.

    Raises:
        CkptError: FC440 the source's grid cannot be told, FC441 another width, FC442 a class row
            on one side only, FC443 text cannot be brought to this length, FC444 `image_grid` does
            not fit the source, FC445 not a table of positions.
    """
    shape = tuple(shape)
    context = _Context(key=key, shape=shape, table=table, where=where)
    context.check_arrangement()
    if table.kind == "text":
        return _plan_text(context, text_positions)
    return _plan_image(context, image_grid)


def resize_table(tensor: Tensor, resized: Resized) -> Tensor:
    """The table of another size; a new tensor, the source's dtype and device kept.

    Args:
        tensor: [rows, width], [1, rows, width] or [1, height, width, channels].
        resized: from `plan_resize` on the tensor's shape.
    """
    import torch

    if tensor.ndim == 4:
        return _interpolate(tensor.permute(0, 3, 1, 2), resized).permute(0, 2, 3, 1).contiguous()
    rows = tensor if tensor.ndim == 2 else tensor[0]
    stop = len(rows) - resized.num_suffix
    before, middle, after = (
        rows[: resized.num_prefix],
        rows[resized.num_prefix : stop],
        rows[stop:],
    )
    if resized.kernel == "truncate":
        middle = middle[: resized.dst_grid[0]]
    else:
        width = middle.shape[-1]
        # [positions, width] -> [1, width, *grid] and back
        field = middle.reshape(1, *resized.src_grid, width).movedim(-1, 1)
        middle = _interpolate(field, resized).movedim(1, -1).reshape(-1, width)
    found = torch.cat([before, middle, after])
    return found if tensor.ndim == 2 else found[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """One table and its source, and how to refuse."""

    key: str
    shape: tuple[int, ...]
    table: PositionTable
    where: str | None

    @property
    def rows(self) -> int:
        """Rows of the source, class tokens and all."""
        return self.shape[-2]

    @property
    def positions(self) -> int:
        """Rows of the source that stand for a place, if it has the module's class tokens."""
        return self.rows - self.table.num_prefix - self.table.num_suffix

    def check_arrangement(self) -> None:
        """Refuse another number of axes, another width, or no row for any place."""
        shape, table = self.shape, self.table
        if len(shape) != len(table.shape) or (len(shape) > 2 and shape[0] != 1):
            raise self.refusal(
                "FC445",
                f"the source has shape {list(shape)}, a table of positions like the model's "
                f"{list(table.shape)} is wanted",
                "is the file of another kind of model? `inspect` shows what is in it",
            )
        if shape[-1] != table.width:
            raise self.refusal(
                "FC441",
                f"rows of {shape[-1]} channels (source {list(shape)}) into rows of {table.width} "
                f"(model {list(table.shape)}): positions can be resized, their width cannot",
                f"build the model with width {shape[-1]}, or leave the table out with exclude=",
            )
        if len(shape) < 4 and self.positions <= 0:
            raise self.refusal(
                "FC445",
                f"the source has {self.rows} row(s) (shape {list(shape)}), none of them a position",
                "is the file of another kind of model? `inspect` shows what is in it",
            )

    def refusal(self, code: str, message: str, hint: str) -> CkptError:
        """What to raise, with the table's name."""
        return CkptError(
            f"`{self.key}`: {message}", code=code, where=self.where, key=self.key, hint=hint
        )


def _plan_text(context: _Context, text_positions: str) -> Resized | None:
    if text_positions not in ("linear", "truncate"):
        raise context.refusal(
            "FC443",
            f"text_positions is {text_positions!r}",
            'one of "linear", "truncate"',
        )
    src, dst = context.positions, context.table.num_positions
    if src == dst:
        return None
    if text_positions == "truncate" and src < dst:
        raise context.refusal(
            "FC443",
            f"{src} text positions cannot be cut to {dst}",
            f'build the model for {src} tokens, or text_positions="linear" to stretch the table',
        )
    return Resized(
        key=context.key,
        kind="text",
        src_grid=(src,),
        dst_grid=(dst,),
        kernel=text_positions,
        num_prefix=context.table.num_prefix,
        num_suffix=context.table.num_suffix,
    )


def _plan_image(context: _Context, image_grid: Grid | None) -> Resized | None:
    table = context.table
    assert table.grid is not None
    inferred = False
    if len(context.shape) == 4:
        src = context.shape[1], context.shape[2]
    elif image_grid is not None:
        src = _told(context, image_grid)
    else:
        src, inferred = _inferred(context, table.grid), True
    if src == table.grid:
        return None
    return Resized(
        key=context.key,
        kind="image",
        src_grid=src,
        dst_grid=table.grid,
        kernel="bicubic, antialias",
        num_prefix=table.num_prefix,
        inferred=inferred,
    )


def _told(context: _Context, image_grid: Grid) -> Grid:
    """The caller's grid, if it fits the source's rows."""
    height, width = image_grid
    if min(height, width) > 0:
        if height * width == context.positions:
            return height, width
        _check_class_row(context, height * width)
    raise context.refusal(
        "FC444",
        f"image_grid=({height}, {width}) does not fit the source, whose {context.rows} rows are "
        f"{context.table.num_prefix} class row(s) and {context.positions} positions",
        f"image_grid=(height, width) with height x width = {context.positions}",
    )


def _inferred(context: _Context, dst: Grid) -> Grid:
    """The only sensible reading of the source's rows, or a refusal."""
    count, cells = context.positions, dst[0] * dst[1]
    side = math.isqrt(count)
    is_square = side * side == count
    if is_square and dst[0] == dst[1]:
        return side, side
    if not is_square and count == cells:
        return dst
    if not is_square:
        _check_class_row(context, cells)
    raise context.refusal(
        "FC440",
        f"the source has {context.table.num_prefix} class row(s) and {count} positions (shape "
        f"{list(context.shape)}), the model a grid of {_by(dst)}: nothing tells the source's grid",
        _grid_hint(context, side if is_square else None),
    )


def _grid_hint(context: _Context, side: int | None) -> str:
    if side is not None:
        return f"image_grid=({side}, {side}) if the file's grid is square, else its (height, width)"
    square = math.isqrt(context.rows)
    if context.table.num_prefix > 0 and square * square == context.rows:
        return (
            f"image_grid=(height, width) of the file; if that is ({square}, {square}), it has no "
            "class row, which this model needs"
        )
    return "image_grid=(height, width) of the file"


def _check_class_row(context: _Context, cells: int) -> None:
    """Refuse a source of `cells` positions with a class row where the model has none, and without.

    There is nothing to put into a missing row, and what a model learned with one is not the same
    without.
    """
    rows, num_prefix = context.rows, context.table.num_prefix
    if num_prefix > 0 and rows == cells:
        raise context.refusal(
            "FC442",
            f"the source's {rows} rows are positions alone, the model's table "
            f"{list(context.table.shape)} begins with {num_prefix} class row(s)",
            "nothing can be put there: add the class row to the file's table, or leave the table "
            "out with exclude=",
        )
    if num_prefix == 0 and rows == cells + 1:
        raise context.refusal(
            "FC442",
            f"the source's {rows} rows are a class row and {cells} positions, the model's table "
            f"{list(context.table.shape)} has no class row",
            "build the model with a class token, or take the first row out of the file's table",
        )


def _interpolate(field: Tensor, resized: Resized) -> Tensor:
    """[1, channels, *src_grid] -> [1, channels, *dst_grid], in float32 where it is narrower."""
    import torch
    from torch.nn import functional

    dtype = field.dtype
    # torch has no antialias for 16 bits on a CPU, and their sums would round at each step
    wide = field if dtype == torch.float64 else field.to(torch.float32)
    if resized.kind == "text":
        done = functional.interpolate(
            wide, size=list(resized.dst_grid), mode="linear", align_corners=False
        )
    else:
        done = functional.interpolate(
            wide, size=list(resized.dst_grid), mode="bicubic", align_corners=False, antialias=True
        )
    return done.to(dtype)


def _by(grid: tuple[int, ...]) -> str:
    """`4x4`, or `77` for text."""
    return "x".join(map(str, grid))
