"""Arrangements of axes: the elements that numpy's own operations give, in both directions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from flamingo_ckpt.layouts.axes import Arrangement, AxesError, Strided

NAMES = "abcde"


def walk(view: Strided, flat: Any) -> Any:
    """The elements in the order in which a view walks over them, by numpy."""
    offset, sizes, strides = view.flat()
    step = flat.itemsize
    there = as_strided(flat[offset:], sizes, [stride * step for stride in strides])
    return there.reshape(view.shape)


def split(array: Any, groups: tuple[tuple[str, ...], ...], sizes: dict[str, int]) -> Any:
    return array.reshape([sizes[name] for group in groups for name in group])


def canonical_parts(form: Arrangement, array: Any, sizes: dict[str, int]) -> dict[Any, Any]:
    """What the arrow says, by numpy: cut every axis, move them, merge them."""
    ours = [name for group in form.native for name in group]
    theirs = [name for group in form.canonical for name in group]
    order = [ours.index(name) for name in (*form.index, *theirs)]
    moved = split(array, form.native, sizes).transpose(order)
    shape = [math.prod(sizes[name] for name in group) for group in form.canonical]
    return {
        at: moved[at].reshape(shape)
        for at in itertools.product(*(range(sizes[name]) for name in form.index))
    }


@st.composite
def grouped(draw: Any, names: list[str]) -> tuple[tuple[str, ...], ...]:
    """Names as axes: alone, merged, and now and then an axis of 1 without a name."""
    groups: list[tuple[str, ...]] = [(names[0],)]
    for name in names[1:]:
        if draw(st.booleans()):
            groups.append((name,))
        else:
            groups[-1] = (*groups[-1], name)
    if draw(st.booleans()):
        groups.insert(draw(st.integers(0, len(groups))), ())
    return tuple(groups)


def spelled(groups: tuple[tuple[str, ...], ...]) -> str:
    return " ".join("1" if not g else g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


@st.composite
def cases(draw: Any) -> tuple[str, dict[str, int]]:
    names = list(NAMES[: draw(st.integers(1, 5))])
    index = draw(st.integers(0, min(2, len(names) - 1)))
    native = draw(grouped(names))
    canonical = draw(grouped(draw(st.permutations(names[index:]))))
    sizes = {name: draw(st.sampled_from([1, 2, 2, 3, 4, 6, 0])) for name in names}
    return f"{spelled(native)} -> {spelled(canonical)}", sizes


@st.composite
def strided(draw: Any, shape: tuple[int, ...]) -> tuple[Strided, Any, Any]:
    """A view of `shape` that lies in a larger array: (view, its elements, the array, flat)."""
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    room = [size * step + draw(st.integers(0, 1)) for size, step in zip(shape, steps, strict=True)]
    flat = np.arange(math.prod(room) + 3, dtype=np.int32)
    start = draw(st.integers(0, 3))
    whole = flat[start : start + math.prod(room)].reshape([room[at] for at in order])
    whole = whole.transpose(np.argsort(order))
    taken = whole[tuple(slice(0, n * k, k) for n, k in zip(shape, steps, strict=True))]
    strides = tuple(stride // flat.itemsize for stride in taken.strides)
    view = Strided.over(shape, strides)
    return Strided(start, view.axes), taken, flat


@given(st.data())
def test_parts_are_what_numpy_makes_of_them(data: st.DataObject) -> None:
    text, sizes = data.draw(cases())
    form = Arrangement.parse(text)
    view, array, flat = data.draw(strided(form.shape(sizes, native=True)))
    wanted = canonical_parts(form, array, sizes)
    found = dict(form.parts(view, sizes))
    assert found.keys() == wanted.keys()
    for at, part in found.items():
        assert part.shape == wanted[at].shape == form.shape(sizes, native=False)
        assert np.array_equal(walk(part, flat), wanted[at])


@given(st.data())
def test_the_inverse_gives_back_every_element(data: st.DataObject) -> None:
    text, sizes = data.draw(cases())
    form = Arrangement.parse(text)
    view, array, flat = data.draw(strided(form.shape(sizes, native=True)))
    runs = [walk(form.stored(part, sizes), flat).ravel() for _, part in form.parts(view, sizes)]
    joined = np.concatenate(runs) if runs else np.empty(0, np.int32)
    assert np.array_equal(joined.reshape(array.shape), array)


@given(st.data())
def test_from_canonical_tensors_numpy_makes_the_same_stored_one(data: st.DataObject) -> None:
    text, sizes = data.draw(cases())
    form = Arrangement.parse(text)
    shape = form.shape(sizes, native=False)
    runs, arrays = [], {}
    for at in itertools.product(*(range(sizes[name]) for name in form.index)):
        view, array, flat = data.draw(strided(shape))
        array = array + 1000 * (1 + len(arrays))
        runs.append(walk(form.stored(view, sizes), flat + 1000 * (1 + len(arrays))).ravel())
        arrays[at] = array
    stored = np.concatenate(runs).reshape(form.shape(sizes, native=True)) if runs else None
    if stored is not None:
        again = canonical_parts(form, stored, sizes)
        assert all(np.array_equal(again[at], arrays[at]) for at in arrays)


@given(st.data())
def test_sizes_are_solved_from_either_side(data: st.DataObject) -> None:
    text, sizes = data.draw(cases())
    form = Arrangement.parse(text)
    for native in (True, False):
        groups = form.native if native else form.canonical
        here = {name for group in groups for name in group}
        # all but the last name of each axis has to be known
        known = {name: sizes[name] for group in groups for name in group[:-1]}
        shape = form.shape(sizes, native=native)
        if 0 in known.values():
            with pytest.raises(AxesError, match="cannot be divided by 0"):
                form.solve(shape, known, native=native)
        else:
            solved = form.solve(shape, known, native=native)
            assert solved == {name: sizes[name] for name in here}


@given(st.data())
def test_narrow_takes_rows(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    view, array, flat = data.draw(strided(shape))
    start = data.draw(st.integers(0, shape[0]))
    length = data.draw(st.integers(0, shape[0] - start))
    rows = view.narrow(start, length)
    assert rows.shape == (length, *shape[1:])
    assert np.array_equal(walk(rows, flat), array[start : start + length])


@given(st.integers(-9, 9), st.integers(-9, 9))
@example(0, 5)
@example(-1, 1)
def test_narrow_stays_inside(start: int, length: int) -> None:
    view = Strided.over((4, 3), (3, 1))
    if 0 <= start <= start + length <= 4:
        assert view.narrow(start, length).shape[0] == length
    else:
        with pytest.raises(AxesError, match=r"rows -?\d+ to -?\d+ of 4"):
            view.narrow(start, length)


def test_rows_that_are_not_evenly_spaced_are_refused() -> None:
    form = Arrangement.parse("a b -> (b a)")
    ((_, part),) = form.parts(Strided.over((2, 3), (3, 1)), {"a": 2, "b": 3})
    with pytest.raises(AxesError, match="not evenly spaced"):
        part.narrow(0, 1)


def test_a_contiguous_tensor_is_one_run_wherever_it_is_cut() -> None:
    form = Arrangement.parse("(part r) c -> r c")
    whole = Strided.over((6, 5), (5, 1))
    parts = [part for _, part in form.parts(whole, {"part": 3, "r": 2, "c": 5})]
    assert [part.flat() for part in parts] == [
        (0, (10,), (1,)),
        (10, (10,), (1,)),
        (20, (10,), (1,)),
    ]
    assert whole.flat() == (0, (30,), (1,))
    assert Strided.over((), ()).flat() == (0, (), ())


@pytest.mark.parametrize("text", ["(part r) c -> r c", "layer a b -> b a", "a h b -> (a h) b"])
def test_empty_tensors_stay_empty(text: str) -> None:
    """An empty axis is no axis of 1: nothing lies behind it."""
    form = Arrangement.parse(text)
    names = {name for group in form.native for name in group}
    for empty in names - {*form.index}:
        sizes = dict.fromkeys(names, 2) | {empty: 0}
        shape = form.shape(sizes, native=True)
        for _, part in form.parts(Strided.over(shape, (1,) * len(shape)), sizes):
            assert part.shape == form.shape(sizes, native=False)
            assert 0 in part.shape


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a b -> b c", "does not name the same axes"),
        ("a a -> a", "does not name the same axes"),
        ("a b -> b b a", "does not name the same axes"),
        ("a b -> a", "must be the outermost axes"),
        ("(a part) b -> a b", "must be the outermost axes"),
    ],
)
def test_arrangements_that_make_no_sense_are_refused_where_they_are_written(
    text: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Arrangement.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "known", "told"),
    [
        ("a b -> b a", (2, 3, 4), {}, "2 axes wanted, 3 found"),
        ("a b -> b a", (), {}, "2 axes wanted, 0 found"),
        ("(part r) c -> r c", (7, 4), {"part": 2}, "an axis of 7 cannot be divided by 2"),
        ("(a b) c -> a b c", (6, 4), {}, "the sizes of `a` and `b` are not known"),
        ("1 a -> a", (2, 4), {}, "an axis of 1 wanted, 2 found"),
        ("(a b) c -> a b c", (6, 4), {"a": 2, "b": 4}, "an axis of 8 wanted, 6 found"),
        ("(a b) -> a b", (6,), {"a": 0}, "an axis of 6 cannot be divided by 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    text: str, shape: tuple[int, ...], known: dict[str, int], told: str
) -> None:
    with pytest.raises(AxesError, match=told):
        Arrangement.parse(text).solve(shape, known, native=True)


def test_a_view_of_another_shape_than_its_sizes_is_refused() -> None:
    form = Arrangement.parse("a b -> b a")
    with pytest.raises(AxesError, match="an axis of 5 wanted, 2 found"):
        list(form.parts(Strided.over((2, 3), (3, 1)), {"a": 5, "b": 3}))
    with pytest.raises(AxesError, match="2 axes wanted, 1 found"):
        list(form.parts(Strided.over((2,), (1,)), {"a": 2, "b": 3}))
