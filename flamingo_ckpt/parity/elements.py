"""Two tensors element by element, by their bits, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Elements of both sides that are looked at at a time.
_BLOCK = 1 << 24


def first_difference(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """How many elements differ and where the first is; None where all are equal."""
    count, first = 0, -1
    for at, x, y in _blocks(a, b):
        odd = _unequal(x, y)
        if odd is None:
            continue
        if first < 0:
            first = at + int(odd.to(dtype=_uint8()).argmax())
        count += int(odd.sum())
    if not count:
        return None
    index = index_of(first, tuple(a.shape))
    ours, theirs = (one.reshape(-1)[first].item() for one in (a, b))
    place = ", ".join(map(str, index))
    return f"{count} of {a.numel()} elements, first at [{place}]: {ours!r} in A, {theirs!r} in B"


def _uint8() -> torch.dtype:
    import torch

    return torch.uint8


def _blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(number of the first element, flat elements of both), in order."""
    if not a.numel():
        return
    if a.ndim == 0:
        yield 0, a.reshape(1), b.reshape(1)
        return
    width = max(1, a[0].numel())
    step = max(1, _BLOCK // width)
    for row in range(0, a.shape[0], step):
        x, y = (one[row : row + step].reshape(-1) for one in (a, b))
        yield row * width, x, y


def _unequal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """Which elements differ, as bits where the dtype is one; None where none does."""
    import torch

    if x.dtype == y.dtype and not x.dtype.is_complex:
        as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x, y = (one.view(as_bits[one.element_size()]) for one in (x, y))
        return None if torch.equal(x, y) else x != y
    if x.dtype.is_complex or y.dtype.is_complex:
        # a complex number is two real ones, and equal where both are
        x, y = (torch.view_as_real(one.to(torch.complex128)) for one in (x, y))
        apart = _unequal(x, y)
        return None if apart is None else apart.any(dim=-1)
    x, y = x.double(), y.double()
    odd = ~((x == y) & (x.signbit() == y.signbit()) | (x.isnan() & y.isnan()))
    return odd if bool(odd.any()) else None


def index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element by its place in row-major order."""
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))


def shape_of(tensor: torch.Tensor) -> str:
    """`64x1024`, or `scalar`."""
    return "x".join(map(str, tensor.shape)) or "scalar"
