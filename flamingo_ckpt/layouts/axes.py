"""Where the elements of a tensor lie, and how naming its axes moves them. Sizes only, no data.

An arrangement is written as einops writes it, `(part row) column -> row column`: the left side is
the tensor as a layout stores it, the right side one canonical tensor. Axes of the left side that
the right side lacks number the canonical tensors that are stacked in it. Reading the arrow the
other way gives the inverse, so there is nothing to keep in step by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

#: (size, stride in elements)
Factor = tuple[int, int]
#: One axis as nested factors, outermost first: merged axes keep the strides that they had.
Axis = tuple[Factor, ...]

_TOKEN = re.compile(r"\(([a-z0-9 ]*)\)|([a-z]+|1)")


class AxesError(ValueError):
    """A tensor does not have the axes that its layout gives it. Says only what is wrong."""


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor as a way to walk over a flat run of elements.

    Attributes:
        offset: of the first element, in elements.
        axes: outermost first.
    """

    offset: int
    axes: tuple[Axis, ...]

    @classmethod
    def over(cls, shape: tuple[int, ...], strides: tuple[int, ...]) -> Strided:
        """A tensor with plain strides, in elements."""
        return cls(0, tuple((factor,) for factor in zip(shape, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(_size(axis) for axis in self.axes)

    def flat(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(offset, sizes, strides) of plain axes that are walked in the same order.

        Neighbours that can be walked as one are, so a contiguous tensor has one axis.
        """
        sizes: list[int] = []
        strides: list[int] = []
        for axis in self.axes:
            for size, stride in axis:
                if size == 1:
                    continue
                if strides and strides[-1] == size * stride:
                    sizes[-1], strides[-1] = sizes[-1] * size, stride
                else:
                    sizes.append(size)
                    strides.append(stride)
        return self.offset, tuple(sizes), tuple(strides)

    def narrow(self, start: int, length: int) -> Strided:
        """Rows `start` to `start + length` of the first axis.

        Raises:
            AxesError: where the rows are not evenly spaced.
        """
        (first, *rest) = self.axes
        ((size, stride),) = _merged(first) or ((1, 0),)
        if not 0 <= start <= start + length <= size:
            raise AxesError(f"rows {start} to {start + length} of {size}")
        return Strided(self.offset + start * stride, (((length, stride),), *rest))


def _size(axis: Axis) -> int:
    return math.prod(size for size, _ in axis)


def _merged(axis: Axis) -> Axis:
    """The axis with as few factors as can walk it; one or none, or it is not evenly spaced."""
    _, sizes, strides = Strided(0, (axis,)).flat()
    if len(sizes) > 1:
        raise AxesError("the first axis is not evenly spaced")
    return tuple(zip(sizes, strides, strict=True))


def _split(axis: Axis, sizes: tuple[int, ...]) -> list[Axis]:
    """Cut one axis into several, outermost first. The product of `sizes` is its size."""
    if 0 in (_size(axis), *sizes):
        # nothing is walked, so any stride will do, but every size has to stay what it is
        return [((size, 0),) for size in sizes]
    left = list(axis)
    found: list[Axis] = []
    for size in reversed(sizes):
        taken: list[Factor] = []
        need = size
        while need > 1:
            if not left:
                raise AxesError("sizes do not divide")
            have, stride = left.pop()
            if have == 1:
                continue
            common = math.gcd(have, need)
            if common == 1 or (common != have and common != need):
                raise AxesError("sizes do not divide")
            taken.insert(0, (common, stride))
            if have > common:
                left.append((have // common, stride * common))
            need //= common
        found.insert(0, tuple(taken))
    if any(size != 1 for size, _ in left):
        raise AxesError("sizes do not divide")
    return found


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a stored tensor is made of one or more canonical ones.

    Attributes:
        native: axis names of the stored tensor; each entry is one axis of one or more names.
        canonical: the same of a canonical tensor.
        index: names that only the stored tensor has, outermost first: they number the canonical
            tensors in it.
    """

    native: tuple[tuple[str, ...], ...]
    canonical: tuple[tuple[str, ...], ...]
    index: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Arrangement:
        """Read `native -> canonical`.

        >>> Arrangement.parse("(part r) c -> r c").index
        ('part',)

        Raises:
            ValueError: where the two sides do not name the same axes, or an index is not outermost.
        """
        left, right = (tuple(_groups(side)) for side in text.split("->"))
        ours = [name for group in left for name in group]
        theirs = [name for group in right for name in group]
        index = tuple(name for name in ours if name not in theirs)
        plain = [name for name in theirs if name not in ours]
        if plain or len({*ours}) != len(ours) or len({*theirs}) != len(theirs):
            raise ValueError(f"`{text}` does not name the same axes on both sides")
        if tuple(ours[: len(index)]) != index:
            raise ValueError(f"`{text}`: {index} must be the outermost axes")
        return cls(left, right, index)

    def solve(
        self, shape: tuple[int, ...], known: Mapping[str, int], *, native: bool
    ) -> dict[str, int]:
        """The size of every axis name, from a shape of one side and some sizes that are known.

        Raises:
            AxesError: the shape has another number of axes, does not divide, or tells too little.
        """
        groups = self.native if native else self.canonical
        if len(shape) != len(groups):
            raise AxesError(f"{len(groups)} axes wanted, {len(shape)} found")
        sizes: dict[str, int] = {}
        for group, size in zip(groups, shape, strict=True):
            unknown = [name for name in group if name not in known]
            product = math.prod(known[name] for name in group if name in known)
            if len(unknown) > 1:
                raise AxesError(
                    "the sizes of "
                    + " and ".join(f"`{name}`" for name in unknown)
                    + " are not known"
                )
            if not unknown and product != size:
                raise AxesError(f"an axis of {product} wanted, {size} found")
            if product == 0 or size % product:
                raise AxesError(f"an axis of {size} cannot be divided by {product}")
            sizes |= {name: known[name] for name in group if name in known}
            sizes |= dict.fromkeys(unknown, size // product)
        return sizes

    def shape(self, sizes: Mapping[str, int], *, native: bool) -> tuple[int, ...]:
        """The shape of one side."""
        groups = self.native if native else self.canonical
        return tuple(math.prod(sizes[name] for name in group) for group in groups)

    def parts(
        self, stored: Strided, sizes: Mapping[str, int]
    ) -> Iterator[tuple[tuple[int, ...], Strided]]:
        """(index, canonical tensor) of everything in a stored one."""
        axes = _named(stored, self.native, sizes)
        for index in _indices([sizes[name] for name in self.index]):
            offset = stored.offset
            for name, at in zip(self.index, index, strict=True):
                offset += _distance(axes[name], at)
            yield index, Strided(offset, _gathered(axes, self.canonical))

    def stored(self, canonical: Strided, sizes: Mapping[str, int]) -> Strided:
        """A canonical tensor walked in the order in which the stored one holds it."""
        axes = _named(canonical, self.canonical, sizes)
        inner = tuple(
            kept
            for group in self.native
            if (kept := tuple(name for name in group if name not in self.index)) or not group
        )
        return Strided(canonical.offset, _gathered(axes, inner))


def _groups(side: str) -> Iterator[tuple[str, ...]]:
    for match in _TOKEN.finditer(side):
        names = match[1].split() if match[1] is not None else [match[2]]
        yield tuple(name for name in names if name != "1")


def _named(
    tensor: Strided, groups: tuple[tuple[str, ...], ...], sizes: Mapping[str, int]
) -> dict[str, Axis]:
    if len(tensor.axes) != len(groups):
        raise AxesError(f"{len(groups)} axes wanted, {len(tensor.axes)} found")
    axes: dict[str, Axis] = {}
    for axis, group in zip(tensor.axes, groups, strict=True):
        wanted = tuple(sizes[name] for name in group)
        if math.prod(wanted) != _size(axis):
            raise AxesError(f"an axis of {math.prod(wanted)} wanted, {_size(axis)} found")
        axes |= dict(zip(group, _split(axis, wanted), strict=True))
    return axes


def _gathered(axes: Mapping[str, Axis], groups: tuple[tuple[str, ...], ...]) -> tuple[Axis, ...]:
    return tuple(tuple(factor for name in group for factor in axes[name]) for group in groups)


def _distance(axis: Axis, index: int) -> int:
    """Elements from the first entry of an axis to entry `index`."""
    distance = 0
    for size, stride in reversed(axis):
        index, at = divmod(index, size)
        distance += at * stride
    return distance


def _indices(sizes: list[int]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for head in range(sizes[0]):
        for tail in _indices(sizes[1:]):
            yield (head, *tail)
