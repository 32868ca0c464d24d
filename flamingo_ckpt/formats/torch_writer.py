"""Lay out the zip that `torch.load(weights_only=True)` reads, memory-mapped or not.

The pickle is assembled from a fixed set of opcodes: an OrderedDict of tensors, tied names on one
storage; or, for a training checkpoint, plain Python values with tensors among them. Record order,
alignment and flags are torch's own (2.13).
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.checksum import crc32
from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.formats.pickle_globals import STORAGE_DTYPES
from flamingo_ckpt.formats.zip_layout import ZipLayout
from flamingo_ckpt.tensors import contiguous_strides, escape, is_tensor_name

_ALIGNMENT = 64
_STORAGE_CLASSES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
# An optimizer's state has four levels; what nests deeper refers to itself.
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The place of a tensor among plain values.

    Attributes:
        name: of the `OutTensor` that stands there, or an alias of it; places share its storage.
    """

    name: str


def layout_torch(file: str, tensors: Iterable[OutTensor]) -> FileLayout:
    """Lay out a torch zip.

    Raises:
        CkptError: FC305 for a dtype that torch lacks.
    """
    tensors = list(tensors)
    return _lay_out(file, _pickle_state_dict(tensors), tensors)


def layout_torch_values(file: str, root: object, tensors: Iterable[OutTensor]) -> FileLayout:
    """Lay out a torch zip of plain values: a training checkpoint.

    Args:
        file: its name.
        root: dicts, lists, tuples, text, numbers, truth values and None, exactly of these types,
            `OrderedDict` or `Counter`, with a `TensorRef` wherever a tensor stands.
        tensors: those that are referred to.

    Raises:
        CkptError: FC305 for a dtype that torch lacks, FC460 for a value of any other type.
    """
    tensors = list(tensors)
    return _lay_out(file, _pickle_values(root, tensors), tensors)


def _lay_out(file: str, data: bytes, tensors: list[OutTensor]) -> FileLayout:
    # torch names the folder inside after the file, without its last suffix.
    root = file.rpartition(".")[0] or file
    if not is_tensor_name(root):
        root = "archive"  # a file name need not be text; torch reads any folder name
    archive = ZipLayout(_ALIGNMENT)
    archive.add(f"{root}/data.pkl", data)
    archive.add(f"{root}/.format_version", b"1")
    archive.add(f"{root}/.storage_alignment", b"64")
    archive.add(f"{root}/byteorder", b"little")
    for index, tensor in enumerate(tensors):
        archive.add(f"{root}/data/{index}", b"", tensor=tensor.name, num_bytes=tensor.num_bytes)
    archive.add(f"{root}/version", b"3\n")
    # torch stores a hash of names and contents here; ours is of the pickle, so it is deterministic.
    archive.add(f"{root}/.data/serialization_id", b"%040d" % crc32(data))
    return archive.lay_out(file)


class _PickleWriter:
    """The few opcodes of protocol 2 that a state dict needs; globals are memoised."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[object, int] = {}

    def remember(self, key: object) -> None:
        self._memo[key] = len(self._memo)
        self.out += b"r" + struct.pack("<I", self._memo[key])

    def recall(self, key: object) -> bool:
        if key not in self._memo:
            return False
        self.out += b"j" + struct.pack("<I", self._memo[key])
        return True

    def name(self, module: str, name: str) -> None:
        if not self.recall((module, name)):
            self.out += f"c{module}\n{name}\n".encode("ascii")
            self.remember((module, name))

    def text(self, value: str) -> None:
        encoded = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(encoded)) + encoded

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(9, "little", signed=True)
            self.out += b"\x8a" + bytes([len(raw)]) + raw

    def integers(self, values: tuple[int, ...]) -> None:
        self.out += b"("
        for value in values:
            self.integer(value)
        self.out += b"t"


def _pickle_state_dict(tensors: list[OutTensor]) -> bytes:
    writer = _PickleWriter()
    writer.name("collections", "OrderedDict")
    writer.out += b")R("
    for index, tensor in enumerate(tensors):
        for name in (tensor.name, *tensor.aliases):
            writer.text(name)
            _write_tensor(writer, index, tensor)
    writer.out += b"u."
    return bytes(writer.out)


def _pickle_values(root: object, tensors: list[OutTensor]) -> bytes:
    writer = _PickleWriter()
    places = {
        name: index
        for index, tensor in enumerate(tensors)
        for name in (tensor.name, *tensor.aliases)
    }

    def write(value: object, path: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise CkptError(
                f"`{escape(path[:80])}...` nests more than {_MAX_DEPTH} levels deep", code="FC460"
            )
        if isinstance(value, TensorRef):
            index = places[value.name]
            _write_tensor(writer, index, tensors[index])
        elif not _write_scalar(writer, value) and not _write_container(
            writer, value, lambda part, key: write(part, f"{path}.{key}".lstrip("."), depth + 1)
        ):
            raise CkptError(
                f"`{escape(path)}` is of the type `{type(value).__name__}`: a checkpoint holds "
                "plain values and tensors",
                code="FC460",
                key=path,
                hint="keep what a loader may build without running code",
            )

    write(root, "", 0)
    writer.out += b"."
    return bytes(writer.out)


def _write_scalar(writer: _PickleWriter, value: object) -> bool:
    # The exact type: a subclass would come back as something else.
    if value is None or type(value) is bool:
        writer.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif type(value) is int and -(1 << 63) <= value < 1 << 63:
        writer.integer(value)
    elif type(value) is float:
        writer.out += b"G" + struct.pack(">d", value)
    elif type(value) is str:
        writer.text(value)
    else:
        return False
    return True


def _write_container(
    writer: _PickleWriter, value: object, write: Callable[[object, str], None]
) -> bool:
    if type(value) is tuple or type(value) is list:
        writer.out += b"(" if type(value) is tuple else b"]("
        for position, part in enumerate(value):
            write(part, str(position))
        writer.out += b"t" if type(value) is tuple else b"e"
        return True
    if type(value) is not dict and type(value) is not OrderedDict and type(value) is not Counter:
        return False
    if type(value) is dict:
        writer.out += b"}"
    else:
        writer.name("collections", type(value).__name__)
        writer.out += b")R"
    writer.out += b"("
    for key, part in value.items():
        write(key, "(key)")
        write(part, str(key))
    writer.out += b"u"
    return True


def _write_tensor(writer: _PickleWriter, index: int, tensor: OutTensor) -> None:
    dtype, shape = tensor.dtype, tensor.shape
    if dtype.torch is None:
        raise CkptError(
            f"`{escape(tensor.name)}` is {dtype}, which torch cannot hold",
            code="FC305",
            key=tensor.name,
            hint="`--format safetensors` keeps it",
        )
    if dtype.bits < 8 and (not shape or shape[-1] % 2):
        raise CkptError(
            f"`{escape(tensor.name)}` is {dtype} with an odd last dimension, "
            "which torch cannot hold",
            code="FC305",
            key=tensor.name,
            hint="`--format safetensors` keeps it",
        )
    if dtype.bits < 8:  # two elements a byte; torch counts the bytes
        shape = (*shape[:-1], shape[-1] // 2)
    legacy = _STORAGE_CLASSES.get(dtype.name)
    writer.name("torch._utils", "_rebuild_tensor_v2" if legacy else "_rebuild_tensor_v3")
    writer.out += b"("
    _write_storage(writer, index, tensor, legacy)
    writer.integer(0)
    writer.integers(shape)
    writer.integers(contiguous_strides(shape))
    writer.out += b"\x89"  # requires_grad=False
    writer.name("collections", "OrderedDict")
    writer.out += b")R"  # no hooks
    if not legacy:
        writer.name("torch", dtype.torch)
    writer.out += b"tR"


def _write_storage(
    writer: _PickleWriter, index: int, tensor: OutTensor, legacy: str | None
) -> None:
    """The persistent id; the same tuple again for a tied name, so that torch shares the storage."""
    if not writer.recall(("storage", index)):
        writer.out += b"("
        writer.text("storage")
        if legacy:
            writer.name("torch", f"{legacy}Storage")
        else:
            writer.name("torch.storage", "UntypedStorage")
        writer.text(str(index))
        writer.text("cpu")
        width = tensor.dtype.bits // 8 if legacy else 1
        writer.integer(tensor.num_bytes // width)
        writer.out += b"t"
        writer.remember(("storage", index))
    writer.out += b"Q"
