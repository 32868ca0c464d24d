"""Plain values with tensors among them: written for torch, read without running anything."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.layout import OutTensor
from flamingo_ckpt.formats.torch_values import read_torch_values
from flamingo_ckpt.formats.torch_writer import TensorRef, layout_torch_values
from flamingo_ckpt.loading.optimizer_state import read_tensor
from flamingo_ckpt.tensors import DTYPES, TensorInfo
from tests.support import load_torch


def write(root: Any, path: Path) -> Path:
    """Plain values, without a tensor."""
    layout = layout_torch_values(path.name, root, [])
    data = bytearray(layout.num_bytes)
    for offset, part in layout.finish({}):
        data[offset : offset + len(part)] = part
    path.write_bytes(data)
    return path


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=9)
)
keys = st.text(max_size=5) | st.integers(-9, 1 << 40)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(value=values)
def test_torch_and_we_read_what_was_written(
    value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write({"x": value}, tmp_path_factory.mktemp("v") / "a.pt")
    assert load_torch(path) == {"x": value}
    assert read_torch_values(str(path), ["x"]) == {"x": value}


def test_dicts_of_the_standard_library_keep_their_kind(tmp_path: Path) -> None:
    root = {
        "order": OrderedDict(b=1, a=2),
        "counts": Counter({3: 2, 10: 1}),
        "empty": OrderedDict(),
    }
    loaded = load_torch(write(root, tmp_path / "a.pt"))
    assert loaded == root
    assert [type(one) for one in loaded.values()] == [OrderedDict, Counter, OrderedDict]
    read = read_torch_values(str(tmp_path / "a.pt"), root)
    assert read == {"order": {"b": 1, "a": 2}, "counts": {3: 2, 10: 1}, "empty": {}}


def test_infinities_and_nan(tmp_path: Path) -> None:
    root = {"high": float("inf"), "low": -float("inf"), "none": float("nan"), "zero": -0.0}
    path = write(root, tmp_path / "a.pt")
    assert str(load_torch(path)) == str(root) == str(read_torch_values(str(path), root))


def test_a_tensor_may_stand_in_several_places() -> None:
    tensor = OutTensor(name="a", dtype=DTYPES["F32"], shape=(2,), num_bytes=8, aliases=("b",))
    root = {"x": [TensorRef("a"), TensorRef("b")], "y": TensorRef("a")}
    assert list(layout_torch_values("a.pt", root, [tensor]).offsets) == ["a"]


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Custom(), "`x.0` is of the type `Custom`"),
        ({1, 2}, "`x.0` is of the type `set`"),
        (1 << 63, "`x.0` is of the type `int`"),
        (b"raw", "`x.0` is of the type `bytes`"),
        (torch.ones(1), "`x.0` is of the type `Tensor`"),
    ],
    ids=["object", "set", "large", "bytes", "tensor"],
)
def test_what_is_not_plain_is_not_written(value: Any, message: str) -> None:
    with pytest.raises(CkptError, match=message) as caught:
        layout_torch_values("a.pt", {"x": [value]}, [])
    assert caught.value.code == "FC460"


def test_a_value_that_holds_itself_is_not_written() -> None:
    root: dict[str, Any] = {}
    root["again"] = root
    with pytest.raises(CkptError, match="nests more than 32 levels"):
        layout_torch_values("a.pt", root, [])


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_tensors_are_described_and_read_on_demand(new: bool, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {0: {"step": torch.tensor(3.0), "turned": base.reshape(3, 4).t(), "tail": base[9:]}}
    torch.save({"opt": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    found = read_torch_values(str(tmp_path / "a.pt"), ["opt"])["opt"][0]
    for name, tensor in state[0].items():
        info = found[name]
        assert isinstance(info, TensorInfo)
        assert torch.equal(read_tensor(info, "here"), tensor)


def test_only_what_is_asked_for_is_looked_at(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "args": Custom(), "other": {1}}, tmp_path / "a.pt")
    assert read_torch_values(str(tmp_path / "a.pt"), ["epoch", "absent"]) == {"epoch": 3}
    for key, message in (("args", "no plain value but: object tests"), ("other", "no plain value")):
        with pytest.raises(CkptError, match=f"`{key}` is {message}") as caught:
            read_torch_values(str(tmp_path / "a.pt"), [key])
        assert caught.value.code == "FC460"


def test_nothing_of_a_hostile_file_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"epoch": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(CkptError) as caught:
        read_torch_values(str(tmp_path / "a.pt"), ["epoch"])
    assert caught.value.code == "FC501"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_values_that_repeat_or_nest_without_end_are_refused(tmp_path: Path) -> None:
    wide: Any = [1]
    for _ in range(30):
        wide = [wide, wide]
    torch.save({"x": wide}, tmp_path / "wide.pt")
    loop: list[Any] = []
    loop.append(loop)
    torch.save({"x": loop}, tmp_path / "loop.pt")
    for name in ("wide", "loop"):
        with pytest.raises(CkptError, match="nest or repeat without end") as caught:
            read_torch_values(str(tmp_path / f"{name}.pt"), ["x"])
        assert caught.value.code == "FC111"


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    torch.save({"x": {(1, 2): 3}}, tmp_path / "a.pt")
    with pytest.raises(CkptError, match="`x` has a key that is no text") as caught:
        read_torch_values(str(tmp_path / "a.pt"), ["x"])
    assert caught.value.code == "FC460"


def test_a_view_that_expands_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
    info = read_torch_values(str(tmp_path / "a.pt"), ["x"])["x"]
    with pytest.raises(CkptError, match="an expanded view of 4 stored bytes") as caught:
        read_tensor(info, "here")
    assert caught.value.code == "FC307"


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    torch.save({"x": torch.full((50,), 3.0)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(torch.full((50,), 3.0).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    info = read_torch_values(str(tmp_path / "a.pt"), ["x"])["x"]
    with pytest.raises(CkptError) as caught:
        read_tensor(info, "here")
    assert caught.value.code == "FC105"


def test_what_is_no_dict_or_no_torch_file_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"\x00" * 64)
    for name, message in (("a", "holds no dict but: list of 2"), ("b", "and this is none")):
        with pytest.raises(CkptError, match=message) as caught:
            read_torch_values(str(tmp_path / f"{name}.pt"), ["x"])
        assert caught.value.code == "FC112"
