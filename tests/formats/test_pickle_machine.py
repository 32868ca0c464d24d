"""The pickle machine builds what Python's pickler wrote, inertly, for every protocol."""

from __future__ import annotations

import collections
import pickle
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import pickle_machine
from flamingo_ckpt.formats.pickle_globals import is_dangerous
from flamingo_ckpt.formats.pickle_machine import read_pickle
from tests.support import MemorySource


def machine(data: bytes) -> Any:
    return read_pickle(MemorySource(data), 0, len(data), "memory")


def rebuilt(node: Any) -> Any:
    """Plain Python values of a node graph, for comparison."""
    kind = type(node).__name__
    if kind == "Mapping":
        return {rebuilt(key): rebuilt(value) for key, value in node.pairs}
    if kind == "Collection":
        return {rebuilt(item) for item in node.items}
    if kind == "Inert":
        name = str(node.function)
        assert name in ("builtins.set", "__builtin__.set", "builtins.frozenset"), name
        return set(map(rebuilt, node.args[0]))
    if isinstance(node, list):
        return [rebuilt(item) for item in node]
    if isinstance(node, tuple):
        return tuple(map(rebuilt, node))
    return node


_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
        | st.sets(st.integers(), max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("protocol", range(6))
@given(value=_values)
def test_plain_values_of_every_protocol(protocol: int, value: Any) -> None:
    data = pickle.dumps(value, protocol)
    pickled = machine(data)
    assert pickled.end == len(data)
    assert rebuilt(pickled.value) == value


@given(data=st.binary(max_size=40))
def test_bytes(data: bytes) -> None:
    for protocol in (3, 4, 5):
        assert machine(pickle.dumps(data, protocol)).value == data


def test_bytes_of_protocol_2_stay_a_call() -> None:
    node = machine(pickle.dumps(b"\xff\x00", 2)).value
    assert str(node.function) == "_codecs.encode"
    assert node.args == ("ÿ\x00", "latin1")


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_cyclic_values(protocol: int) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    node = machine(pickle.dumps(loop, protocol)).value
    assert node[0] == 1
    assert node[1] is node
    shared = ["x"]
    first, second = machine(pickle.dumps((shared, shared), protocol)).value
    assert first is second


class Thing:
    """Pickled by reference to a class that no table knows."""

    def __init__(self) -> None:
        self.value = 3


@pytest.mark.parametrize("protocol", range(6))
def test_objects_stay_inert(protocol: int) -> None:
    pickled = machine(pickle.dumps(Thing(), protocol))
    names = [str(name) for name in pickled.globals]
    assert any(name.endswith("test_pickle_machine.Thing") for name in names)
    assert type(pickled.value).__name__ == "Inert"
    assert rebuilt(pickled.value.states[0]) == {"value": 3}


@pytest.mark.parametrize("protocol", range(6))
def test_ordered_dicts_keep_their_order(protocol: int) -> None:
    ordered = collections.OrderedDict([("z", 1), ("a", 2)])
    node = machine(pickle.dumps(ordered, protocol)).value
    assert str(node.function) == "collections.OrderedDict"
    assert node.pairs == [("z", 1), ("a", 2)] or node.args == ([["z", 1], ["a", 2]],)


def test_a_repeated_key_keeps_both_pairs() -> None:
    assert machine(b"\x80\x02}X\1\0\0\0aK\1sX\1\0\0\0aK\2s.").value.pairs == [("a", 1), ("a", 2)]


def test_nothing_is_imported() -> None:
    data = b"\x80\x02c_a_module_that_is_not_there\nthing\n)R."
    before = set(sys.modules)
    node = machine(data).value
    assert str(node.function) == "_a_module_that_is_not_there.thing"
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cposix\nsystem\n.",
        b"cbuiltins\neval\n.",
        b"cbuiltins\ngetattr\n.",
    ],
)
def test_names_that_could_run_code_refuse_the_whole_pickle(data: bytes) -> None:
    with pytest.raises(CkptError) as refused:
        machine(data)
    assert refused.value.code == "FC501"


def test_the_table_of_names() -> None:
    assert is_dangerous("os", "path.join")
    assert is_dangerous("torch", "serialization.os.system")
    assert not is_dangerous("collections", "OrderedDict")
    assert not is_dangerous("argparse", "Namespace")
    assert not is_dangerous("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "FC102"),
        (b"\x80\x02", "FC102"),
        (b"\x80\x06N.", "FC110"),
        (b".", "FC110"),
        (b"NN.", "FC110"),
        (b"(N.", "FC110"),
        (b"N0.", "FC110"),
        (b"h\x05.", "FC110"),
        (b"Nr\xff\xff\xff\xff.", None),
        (b"X\xff\xff\xff\x7fabc.", "FC102"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "FC102"),
        (b"\x82\x01.", "FC110"),
        (b"Pid\n.", "FC110"),
        (b"\x97.", "FC110"),
        (b"]Nb.", "FC110"),
        (b"]NNs.", "FC110"),
        (b"}Na.", "FC110"),
        (b"(Nd.", "FC110"),
        (b"NNR.", "FC110"),
        (b"K\x01K\x02\x93.", "FC110"),
        (b"Iseven\n.", "FC110"),
        (b"Vnever ends", "FC102"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else str(value),
)
def test_malformed_pickles(data: bytes, code: str | None) -> None:
    if code is None:  # a large memo index is an entry of a dict and costs nothing
        assert machine(data).value is None
        return
    with pytest.raises(CkptError) as refused:
        machine(data)
    assert refused.value.code in (code, "FC110")


def test_opcodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 50)
    with pytest.raises(CkptError) as refused:
        machine(b"N0" * 60 + b"N.")
    assert refused.value.code == "FC111"


def test_what_follows_the_pickle_is_left_alone() -> None:
    pickled = machine(b"\x80\x02K\x07.and more")
    assert (pickled.value, pickled.end) == (7, 5)
