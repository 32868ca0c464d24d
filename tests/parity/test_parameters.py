"""How a tensor came to differ, told by its bits alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from flamingo_ckpt.parity import elements, explaining
from flamingo_ckpt.parity.elements import first_difference
from flamingo_ckpt.parity.explaining import Difference, explain, swapped
from flamingo_ckpt.parity.parameters import Parameters, compare_parameters

DIM = 12
NAME, NEAR, FAR = "lm.layers.0.mlp.weight", "lm.layers.0.attn.weight", "lm.layers.1.mlp.weight"


class Shell:
    """As much of a side as the comparison asks for: canonical names, each in a file of its own."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.atoms = {name: _piece(tensor) for name, tensor in tensors.items()}
        self.targets = [_Target(name) for name in tensors]
        self.steps = dict.fromkeys(tensors)
        self.released: list[str] = []
        self.unused: frozenset[str] = frozenset()

    def atom(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def target_of(self, name: str) -> _Target:
        return next(one for one in self.targets if one.key == name)

    def release(self, name: str) -> None:
        self.released.append(name)


class _Target:
    def __init__(self, key: str) -> None:
        self.key = key


def _piece(tensor: torch.Tensor) -> Any:
    class Shaped:
        shape = tuple(tensor.shape)

    return Shaped()


def told(ours: torch.Tensor, theirs: torch.Tensor, **others: torch.Tensor) -> Difference:
    """What is said of one tensor; the first side may hold others."""
    names = {"near": NEAR, "far": FAR}
    a = Shell({NAME: ours, **{names[name]: tensor for name, tensor in others.items()}})
    b: Any = Shell({NAME: theirs})
    first: Any = a
    return explain(first, b, [NAME])[NAME]


def matrix(rows: int = DIM, columns: int = DIM, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- kinds of difference --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["lowest", "highest", "sign"])
def test_a_bit(dtype: torch.dtype, which: str) -> None:
    ours = matrix().to(dtype)
    width = 8 * dtype.itemsize
    bit = {"lowest": 0, "highest": width - 2, "sign": width - 1}[which]
    theirs = ours.clone()
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    flipped = (1 << bit) - (1 << width) * (bit == width - 1)
    theirs.view(as_bits)[3, 5] ^= flipped
    found = told(ours, theirs)
    assert found.kind == "bit"
    assert found.words.startswith(f"one bit, number {bit}, at [3, 5]: ")


def test_two_bits_of_one_element_are_no_flipped_bit() -> None:
    ours, theirs = matrix(), matrix()
    theirs.view(torch.int32)[3, 5] ^= 0b101
    assert told(ours, theirs).kind != "bit"
    theirs = matrix()
    theirs.view(torch.int32)[3, 5] ^= 1
    theirs.view(torch.int32)[3, 6] ^= 1
    assert told(ours, theirs).kind != "bit"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_initial_value(value: float) -> None:
    ours = matrix()[0]
    found = told(ours, torch.full_like(ours, value))
    assert found.kind == "constant"
    assert found.words.startswith(f"{value:g} everywhere in B")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_number_is_no_initial_value_because_it_differs(shape: tuple[int, ...]) -> None:
    """A temperature, or a gate: there is nothing else in it that could be another one."""
    found = told(torch.full(shape, 2.5), torch.full(shape, 2.6))
    assert (found.kind, found.words) == (
        "values",
        f"1 of 1 elements, first at [{', '.join('0' * len(shape))}]: 2.5 in A, "
        f"{torch.tensor(2.6).item()} in B",
    )
    assert told(torch.full(shape, 2.5), torch.zeros(shape)).kind == "constant"


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "bfloat16"), ("float16", "float16")])
@pytest.mark.parametrize("stays", [True, False])
def test_rounding(dtype: str, name: str, stays: bool) -> None:
    """In the narrow dtype, or widened again after it."""
    ours = matrix()
    theirs = ours.to(getattr(torch, dtype))
    theirs = theirs if stays else theirs.float()
    assert told(ours, theirs) == Difference(kind="rounded", words=f"B's is A's rounded to {name}")
    assert told(theirs, ours) == Difference(kind="rounded", words=f"A's is B's rounded to {name}")


def test_another_tensors_content() -> None:
    ours, other = matrix(), matrix(seed=1)
    near = told(ours, other, near=other)
    assert (near.kind, near.other) == ("moved", NEAR)
    far = told(ours, other, far=other)
    assert (far.kind, far.other) == ("moved", FAR)
    assert told(ours, other, near=other, far=other).other == NEAR
    assert told(ours, other, far=other.T.contiguous()).kind != "moved"
    assert told(ours, other, near=matrix(4)).kind != "moved"


def test_content_that_is_moved_and_widened() -> None:
    """In float32 here and in bfloat16 there, of the same values."""
    other = matrix(seed=1).bfloat16()
    found = told(matrix().bfloat16(), other.float(), near=other)
    assert (found.kind, found.other) == ("moved", NEAR)


def test_transposed() -> None:
    ours = matrix()
    assert told(ours, ours.T.contiguous()).kind == "transposed"
    assert told(ours, ours.T).kind == "transposed"


def test_a_symmetric_matrix_is_not_transposed() -> None:
    ours = matrix() + matrix().T
    theirs = ours.clone()
    theirs[0, 1] += 1
    assert told(ours, theirs).kind != "transposed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_another_sign_or_scale(dtype: torch.dtype) -> None:
    ours = matrix().to(dtype)
    assert told(ours, -ours).kind == "negated"
    found = told(ours, ours * 4)
    assert (found.kind, found.words) == ("scaled", "B's is A's times 4")
    assert told(ours, ours * -3).words.startswith("B's is A's times -3")  # rounded, in bfloat16
    assert told(ours, ours + 0.01 * matrix(seed=1).to(dtype)).kind == "values"


def test_a_scale_of_a_vector() -> None:
    ours = matrix()[0]
    assert told(ours, ours * 48**-0.5).words == f"B's is A's times {48**-0.5:.6g}"


@pytest.mark.parametrize("size", [3e-7, 1e-6, 1e-3])
def test_noise_is_no_scale(size: float) -> None:
    ours = matrix()
    found = told(ours, ours * (1 + size * matrix(seed=1)))
    assert found.kind == "values"


def test_a_scale_that_is_next_to_one() -> None:
    ours = matrix().double()
    assert told(ours, ours * (1 + 1e-5)).words == "B's is A's times 1.00001"


def test_rows() -> None:
    ours = matrix()
    theirs = ours.clone()
    theirs[9:] = 0
    found = told(ours, theirs)
    assert (found.kind, found.words) == (
        "rows",
        "rows 9 to 11 of 12 differ (zero in B), the others are equal",
    )
    theirs[9:] = matrix(seed=1)[9:]
    assert told(ours, theirs).words == "rows 9 to 11 of 12 differ, the others are equal"
    theirs = ours.clone()
    theirs[4] += 1
    assert told(ours, theirs).words == "row 4 of 12 differ, the others are equal"
    theirs[7] += 1  # not one after the other
    assert told(ours, theirs).kind == "values"


def test_two_rows_that_changed_places() -> None:
    ours = matrix()
    theirs = ours[[0, 2, 1, *range(3, DIM)]]
    assert told(ours, theirs).words == "rows 1 to 2 of 12 differ, the others are equal"


def test_the_same_rows_or_elements_in_another_order() -> None:
    ours = matrix()
    flipped = told(ours, ours.flip(0))
    assert (flipped.kind, flipped.words) == ("reordered", "the same rows in another order")
    columns = told(ours, ours.flip(1))
    assert (columns.kind, columns.words) == ("reordered", "the same elements in another order")
    assert told(ours[0], ours[0].flip(0)).words == "the same elements in another order"


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((1, 0, 2), "query and key are swapped in it"),
        ((0, 2, 1), "key and value are swapped in it"),
        ((2, 1, 0), "query and value are swapped in it"),
        ((1, 2, 0), "query, key and value stand in another order in it"),
        ((2, 0, 1), "query, key and value stand in another order in it"),
    ],
)
def test_the_order_of_a_fused_matrix(heads: int, order: tuple[int, int, int], words: str) -> None:
    ours = matrix(3 * 16, 16)
    parts = ours.reshape(heads, 3, -1, 16)[:, list(order)]
    assert told(ours, parts.reshape(ours.shape)) == Difference(kind="reordered", words=words)


def test_a_fused_matrix_head_by_head() -> None:
    together = matrix(3 * 16, 16)
    apart = together.reshape(3, 4, 4, 16).transpose(0, 1).reshape(together.shape)
    words = "query, key and value head by head in B, one after the other in A"
    assert told(together, apart).words == words
    back = "query, key and value one after the other in B, head by head in A"
    assert told(apart, together).words == back


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_order_of_rotary_pairs(heads: int) -> None:
    neighbours = matrix(32, 16)
    halves = neighbours.reshape(heads, -1, 2, 16).transpose(1, 2).reshape(32, 16)
    assert told(neighbours, halves).words == "rotary pairs are halves in B, neighbours in A"
    assert told(halves, neighbours).words == "rotary pairs are neighbours in B, halves in A"


def test_shapes() -> None:
    ours = matrix()
    longer = torch.cat((ours, matrix(2)))
    words = told(longer, ours).words
    assert words == "14x12 in A, 12x12 in B: B was not resized, the first 12 rows are equal"
    words = told(ours, longer).words
    assert words == "12x12 in A, 14x12 in B: A was not resized, the first 12 rows are equal"
    assert told(longer, matrix(seed=3)).words == "14x12 in A, 12x12 in B: B was not resized"
    assert told(ours, ours[:, :5]).words == "12x12 in A, 12x5 in B"
    assert told(ours, ours[0]).words == "12x12 in A, 12 in B"
    assert told(torch.ones(()), torch.ones(1)).words == "scalar in A, 1 in B"


def test_integers_are_told_by_their_values_alone() -> None:
    ours = torch.arange(6)
    assert told(ours, ours.flip(0)).kind == "values"


def test_a_bit_of_a_large_tensor_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a limit no rule is asked, and how many elements differ is still said."""
    monkeypatch.setattr(explaining, "_MAX_EXPLAINED_BYTES", 100)
    found = told(matrix(), -matrix())
    assert found.kind == "values"
    assert found.words.startswith("144 of 144 elements, first at [0, 0]")


def test_tensors_in_each_others_place() -> None:
    found = {
        "b": Difference(kind="moved", words="", other="a"),
        "a": Difference(kind="moved", words="", other="b"),
        "c": Difference(kind="moved", words="", other="a"),
        "d": Difference(kind="values", words=""),
    }
    assert swapped(found) == [("a", "b")]


# --- bits -----------------------------------------------------------------------------------------


def from_bits(*bits: int) -> torch.Tensor:
    wrapped = [bit - (1 << 32) * (bit >> 31) for bit in bits]
    return torch.tensor(wrapped, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (0x7FC00001, 0x7FC00000),  # NaN of another payload
        (0x7F800001, 0x7FC00001),  # signalling and quiet
        (0x80000000, 0x00000000),  # -0
        (0x00000001, 0x00000000),  # the smallest denormal
        (0x7F800000, 0xFF800000),
    ],
)
def test_bits_and_not_numbers(ours: int, theirs: int) -> None:
    one, other = from_bits(1, ours, 3), from_bits(1, theirs, 3)
    found = first_difference(one, other)
    assert found is not None
    assert found.startswith("1 of 3 elements, first at [1]: ")
    assert first_difference(one, one.clone()) is None


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.uint16),
    ],
)
def test_first_difference_in_every_dtype(dtype: torch.dtype) -> None:
    ours = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(dtype)
    theirs = torch.tensor([[0, 1, 0], [0, 1, 1]]).to(dtype)
    assert first_difference(ours, ours.clone()) is None
    found = first_difference(ours, theirs)
    assert found is not None
    assert found.startswith("2 of 6 elements, first at [1, 0]: ")


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_equal_values_in_two_dtypes(narrow: torch.dtype) -> None:
    ours = torch.tensor([1.5, -0.0, 0.0, math.inf, math.nan, 0.25])
    assert first_difference(ours, ours.to(narrow)) is None
    assert first_difference(ours.to(narrow), ours.double()) is None
    other = ours.clone()
    other[1] = 0.0
    found = first_difference(ours.to(narrow), other)
    assert found is not None
    assert found.startswith("1 of 6 elements, first at [1]: -0.0 in A, 0.0 in B")
    assert first_difference(ours.to(narrow), other + 1e-4) is not None


def test_views_with_any_stride() -> None:
    base = matrix()
    for change in (
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[::3],
        lambda t: t[1:, 2:],
        lambda t: t.reshape(3, 4, 12).permute(2, 0, 1),
    ):
        ours, theirs = change(base), change(base.clone())
        assert first_difference(ours, theirs) is None
        assert first_difference(ours, theirs.contiguous()) is None
        changed = theirs.clone()
        changed[tuple(size - 1 for size in changed.shape)] += 1
        at = ", ".join(str(size - 1) for size in ours.shape)
        found = first_difference(ours, changed)
        assert found is not None
        assert found.startswith(f"1 of {ours.numel()} elements, first at [{at}]: ")


@pytest.mark.parametrize("block", [1, 5, 12, 30, 1 << 20])
def test_blocks_do_not_change_the_answer(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "_BLOCK", block)
    ours, theirs = matrix(), matrix()
    for row, column in ((4, 11), (5, 0), (11, 11)):
        theirs[row, column] += 1
    found = first_difference(ours, theirs)
    assert found is not None
    assert found.startswith("3 of 144 elements, first at [4, 11]: ")


def test_nothing_and_a_scalar() -> None:
    assert first_difference(torch.empty(0, 3), torch.empty(0, 3)) is None
    found = first_difference(torch.tensor(1.0), torch.tensor(2.0))
    assert found == "1 of 1 elements, first at []: 1.0 in A, 2.0 in B"


# --- both sides -----------------------------------------------------------------------------------


def test_all_tensors_of_both_sides() -> None:
    ours = {
        NAME: matrix(),
        NEAR: matrix(seed=1),
        FAR: matrix(seed=2),
        "text.final_norm.x": matrix(),
    }
    theirs = {NAME: -matrix(), NEAR: matrix(seed=1).double(), "vision.pre_norm.x": matrix()}
    theirs[FAR] = matrix(seed=2)
    a: Any = Shell(ours)
    b: Any = Shell(theirs)
    found = compare_parameters(a, b)
    assert found == Parameters(
        num_compared=3,
        different={NAME: found.different[NAME]},
        cast=(NEAR,),
        only_a=("text.final_norm.x",),
        only_b=("vision.pre_norm.x",),
    )
    assert found.different[NAME].startswith("B's is A's with the other sign (144 of 144 elements")
    # what was read is let go of again
    assert set(a.released) == set(b.released) == {NAME, NEAR, FAR}


def test_many_tensors_that_differ_are_all_told() -> None:
    """The first ones are explained; of all it is said how many elements differ."""
    names = [f"lm.layers.{at}.mlp.weight" for at in range(40)]
    a: Any = Shell({name: matrix(4, 4, seed=at) for at, name in enumerate(names)})
    b: Any = Shell({name: -matrix(4, 4, seed=at) for at, name in enumerate(names)})
    found = compare_parameters(a, b)
    assert set(found.different) == set(names)
    assert all("16 of 16 elements" in words for words in found.different.values())
    explained = [words for words in found.different.values() if "other sign" in words]
    assert len(explained) == 32


def test_no_kind_is_without_words() -> None:
    """Whatever is told of a tensor can be put into a sentence."""
    from flamingo_ckpt.parity.blame import describe_differences

    ours = matrix()
    pairs = itertools.chain(
        [ours.T.contiguous(), -ours, ours * 2, ours.flip(0), ours.bfloat16(), matrix(seed=5)],
        [torch.ones_like(ours), ours[:4]],
    )
    for theirs in pairs:
        words = describe_differences({NAME: told(ours, theirs)})
        assert f"`{NAME}`" in words
