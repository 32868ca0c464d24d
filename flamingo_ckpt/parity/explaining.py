"""How a tensor came to differ, as far as its content tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.elements import first_difference, index_of, shape_of
from flamingo_ckpt.parity.shell import Shell
from flamingo_ckpt.parity.stages import part_of
from flamingo_ckpt.parity.trace import digest_of

if TYPE_CHECKING:
    import torch

# Tensors of the first side that are digested to find where content went, at most.
_MAX_DIGESTED_BYTES = 4 << 30
# Relative difference of two resizes of one table, by different kernels of the same kind.
_RESIZED = 1e-2
# How small what a scale leaves has to be, beside what the scale changes.
_SCALE_SHARE = 0.1
# Above this size only what takes one pass is tried.
_MAX_EXPLAINED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs in one tensor.

    Attributes:
        kind: `bit`, `constant`, `rounded`, `moved`, `transposed`, `negated`, `scaled`, `rows`,
            `reordered`, `shape` or `values`.
        words: for people, without the name of the tensor.
        other: canonical name of the first side's tensor whose content is here, for `moved`.
    """

    kind: str
    words: str
    other: str = ""


def has_tensor(shell: Shell, name: str) -> bool:
    """Whether a side's weights fill a canonical name."""
    return shell.target_of(name).key in shell.steps


class Contents:
    """Where content of the first side stands: digests of its tensors, made when they are wanted."""

    def __init__(self, a: Shell) -> None:
        self._a = a
        self._digests: dict[tuple[str, torch.dtype], str] = {}
        self._bytes = 0

    def find(self, name: str, tensor: torch.Tensor) -> str:
        """The first side's tensor whose content is `tensor`; "" where there is none but `name`.

        Looked at are those of its layer first, then those of the same kind in other layers.
        """
        wanted = digest_of(tensor)
        hits = [
            one
            for one in self._candidates(name, tensor)
            if self._digest(one, tensor.dtype) == wanted
        ]
        return hits[0] if hits and name not in hits else ""

    def _candidates(self, name: str, tensor: torch.Tensor) -> list[str]:
        shape, atoms = tuple(tensor.shape), self._a.atoms
        leaf = name.removeprefix(part_of(name))
        same = [
            one for one, piece in atoms.items() if piece.shape == shape and has_tensor(self._a, one)
        ]
        near = [one for one in same if part_of(one) == part_of(name)]
        far = [one for one in same if one not in near and one.endswith(leaf)]
        return [*near, *far]

    def _digest(self, name: str, dtype: torch.dtype) -> str:
        """Of a tensor in the dtype that the second side has: it may have been rounded too."""
        if (name, dtype) not in self._digests:
            atom = self._a.atom(name)
            self._bytes += atom.nbytes
            if self._bytes > _MAX_DIGESTED_BYTES:
                return ""
            self._digests[name, dtype] = digest_of(atom.to(dtype))
        return self._digests[name, dtype]


def explain(a: Shell, b: Shell, names: Iterable[str]) -> dict[str, Difference]:
    """How each of some differing tensors came to differ, as far as its content tells."""
    contents = Contents(a)
    return {name: _explained(name, a, b, contents) for name in names}


def _explained(name: str, a: Shell, b: Shell, contents: Contents) -> Difference:
    ours, theirs = a.atom(name), b.atom(name)
    if ours.shape != theirs.shape:
        return Difference(kind="shape", words=_ofshape_of(name, ours, theirs))
    told = first_difference(ours, theirs) or ""
    if not ours.is_floating_point() or ours.nbytes > _MAX_EXPLAINED_BYTES:
        return Difference(kind="values", words=told)
    for rule in _RULES:
        found = rule(name, ours, theirs, contents)
        if found is not None:
            return found
    return Difference(kind="values", words=told)


_Rule = Callable[[str, "torch.Tensor", "torch.Tensor", Contents], Difference | None]


def _one_bit(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    import torch

    if a.dtype != b.dtype:
        return None
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if as_bits is None:
        return None
    x, y = (one.reshape(-1).view(as_bits) for one in (a, b))
    odd = (x != y).nonzero()
    if len(odd) != 1:
        return None
    at = int(odd[0])
    flipped = (int(x[at]) ^ int(y[at])) & ((1 << 8 * a.element_size()) - 1)
    if flipped.bit_count() != 1:
        return None
    place = ", ".join(map(str, index_of(at, tuple(a.shape))))
    values = f"{a.reshape(-1)[at].item()!r} in A, {b.reshape(-1)[at].item()!r} in B"
    return Difference(
        kind="bit", words=f"one bit, number {flipped.bit_length() - 1}, at [{place}]: {values}"
    )


def _constant(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    flat = b.reshape(-1)
    first = flat[:1]
    if not len(flat) or bool((flat != first).any()) or bool((a == first).all()):
        return None
    if len(flat) == 1 and bool(first.any()):
        return None  # a temperature, or a gate that is open: there is nothing else in it
    return Difference(
        kind="constant",
        words=f"{first.item():g} everywhere in B, as before training: it was not loaded",
    )


def _rounded(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    import torch

    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if _same(a.to(dtype), b) and not _same(a, b):
            return Difference(kind="rounded", words=f"B's is A's rounded to {name}")
        if _same(b.to(dtype), a) and not _same(a, b):
            return Difference(kind="rounded", words=f"A's is B's rounded to {name}")
    return None


def _moved(name: str, _: torch.Tensor, b: torch.Tensor, contents: Contents) -> Difference | None:
    other = contents.find(name, b)
    if not other:
        return None
    return Difference(kind="moved", words=f"B has here what A has at `{other}`", other=other)


def _transposed(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not _same(a.T, b):
        return None
    return Difference(kind="transposed", words="B's is A's transposed")


def _scaled(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    if _same(-a, b):
        return Difference(kind="negated", words="B's is A's with the other sign")
    x, y = a.double(), b.double()
    norm = float((x * x).sum())
    factor = float((x * y).sum()) / norm if norm else math.nan
    if not math.isfinite(factor) or factor == 0 or a.numel() < 2:
        return None
    distance = float((y - factor * x).norm()) / (abs(factor) * math.sqrt(norm))
    if distance > (1e-6 if min(a.element_size(), b.element_size()) > 2 else 1e-2):
        return None
    if distance > _SCALE_SHARE * abs(factor - 1):
        return None  # noise has a best factor too
    # what was rounded besides tells its factor no better
    digits = 6 if min(a.element_size(), b.element_size()) > 2 else 3
    return Difference(kind="scaled", words=f"B's is A's times {factor:.{digits}g}")


def _rows(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    """Some rows alone, such as those of added tokens."""
    if a.ndim < 2:
        return None
    odd = (a.reshape(len(a), -1) != b.reshape(len(b), -1)).any(dim=1).nonzero().flatten().tolist()
    if not odd or len(odd) * 2 > len(a) or odd != list(range(odd[0], odd[-1] + 1)):
        return None
    rows = f"row {odd[0]}" if len(odd) == 1 else f"rows {odd[0]} to {odd[-1]}"
    zero = " (zero in B)" if not bool(b[odd[0] : odd[-1] + 1].any()) else ""
    return Difference(kind="rows", words=f"{rows} of {len(a)} differ{zero}, the others are equal")


def _reordered(_: str, a: torch.Tensor, b: torch.Tensor, __: Contents) -> Difference | None:
    """The same rows, or the same elements, in another order."""
    if a.ndim == 2 and len(a) > 1:
        ours, theirs = (sorted(digest_of(row) for row in one) for one in (a, b.to(a.dtype)))
        if ours == theirs:
            told = _order_of_rows(a, b) or "the same rows in another order"
            return Difference(kind="reordered", words=told)
    x, y = (one.reshape(-1).sort().values for one in (a, b.to(a.dtype)))
    if a.numel() > 1 and _same(x, y):
        return Difference(kind="reordered", words="the same elements in another order")
    return None


_ORDERS = {
    (1, 0, 2): "query and key are swapped in it",
    (0, 2, 1): "key and value are swapped in it",
    (2, 1, 0): "query and value are swapped in it",
    (1, 2, 0): "query, key and value stand in another order in it",
    (2, 0, 1): "query, key and value stand in another order in it",
}
_MAX_HEADS = 256


def _order_of_rows(a: torch.Tensor, b: torch.Tensor) -> str:
    """What a permutation of rows means in an attention; "" where it is none of the usual ones."""
    rows = len(a)
    divisors = [n for n in range(1, min(rows, _MAX_HEADS) + 1) if rows % n == 0]
    for heads in (n for n in divisors if rows % (3 * n) == 0):
        ours, theirs = (one.reshape(heads, 3, -1) for one in (a, b))
        for order, words in _ORDERS.items():
            if _same(ours[:, list(order)], theirs):
                return words
        if heads > 1:
            apart = a.reshape(3, heads, -1)
            if _same(apart.transpose(0, 1).reshape(b.shape), b):
                return "query, key and value head by head in B, one after the other in A"
            if _same(ours.transpose(0, 1).reshape(b.shape), b):
                return "query, key and value one after the other in B, head by head in A"
    for heads in (n for n in divisors if rows % (2 * n) == 0 and rows // n > 2):
        for words, shape in (
            ("rotary pairs are halves in B, neighbours in A", (heads, -1, 2)),
            ("rotary pairs are neighbours in B, halves in A", (heads, 2, rows // heads // 2)),
        ):
            turned = a.reshape(*shape, a.shape[1]).transpose(1, 2).reshape(a.shape)
            if _same(turned, b):
                return words
    return ""


#: In the order in which they are asked; the first that knows has the word.
_RULES: tuple[_Rule, ...] = (
    _one_bit,
    _moved,
    _transposed,
    _constant,
    _rounded,
    _scaled,
    _rows,
    _reordered,
)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as numbers, whatever the dtypes."""
    return a.shape == b.shape and bool((a.double() == b.double()).all())


def _ofshape_of(name: str, a: torch.Tensor, b: torch.Tensor) -> str:
    told = f"{shape_of(a)} in A, {shape_of(b)} in B"
    if name.endswith("position_embedding.weight") and name.startswith("vision."):
        for one, other, words in (
            (a, b, "A's is B's, resized to its grid: B was not resized"),
            (b, a, "B's is A's, resized to its grid"),
        ):
            if _is_resized(one, other):
                return f"{told}: {words}"
    if a.ndim != b.ndim or not a.ndim or a.shape[1:] != b.shape[1:]:
        return told
    rows = min(len(a), len(b))
    same = _same(a[:rows], b[:rows])
    less = "B" if len(b) < len(a) else "A"
    if same:
        return f"{told}: {less} was not resized, the first {rows} rows are equal"
    return f"{told}: {less} was not resized"


def _is_resized(table: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a table of image positions is another one at its own grid, as loaders resize it."""
    from flamingo_ckpt.loading.resize import PositionTable, plan_resize, resize_table

    shape = tuple(table.shape)
    if table.ndim != 2 or source.ndim != 2 or shape[1] != source.shape[1]:
        return False
    for prefix in (0, 1):
        side = math.isqrt(max(shape[0] - prefix, 0))
        if side * side != shape[0] - prefix:
            continue
        wanted = PositionTable(
            kind="image",
            shape=shape,
            num_positions=side * side,
            grid=(side, side),
            num_prefix=prefix,
        )
        try:
            change = plan_resize("", tuple(source.shape), wanted)
        except CkptError:
            continue
        if change is not None:
            made = resize_table(source.float(), change).double()
            return float((made - table.double()).norm()) <= _RESIZED * float(table.double().norm())
    return False


def swapped(found: Mapping[str, Difference]) -> list[tuple[str, str]]:
    """Pairs of tensors that stand in each other's place."""
    return [
        (name, one.other)
        for name, one in found.items()
        if one.kind == "moved"
        and one.other in found
        and found[one.other].other == name
        and name < one.other
    ]
