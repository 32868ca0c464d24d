"""What travels between the rooms: dtype, tensor facts, manifest. Standard library only.

A `TensorInfo` is a header fact plus the place of the bytes. It never holds tensor data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flamingo_ckpt.errors import CkptError, Finding


@dataclass(frozen=True, slots=True)
class DType:
    """An element type, spelled as safetensors spells it.

    Attributes:
        name: `F32`, `BF16`, ...
        bits: size of one element.
        rank: position in safetensors' own sort order, or None where safetensors lacks the dtype.
        torch: the attribute of `torch`, or None where torch lacks it.
        swap_bytes: width of the unit that byte order applies to (4 for `C64`: two floats).
    """

    name: str
    bits: int
    rank: int | None
    torch: str | None
    swap_bytes: int

    @property
    def is_real_float(self) -> bool:
        """Whether `--dtype` applies: real floating point, one or more whole bytes."""
        return self.name in _REAL_FLOATS

    def __str__(self) -> str:
        return self.name


# The rank is safetensors' enum order (tensor.rs, `Dtype`); writers sort by it, descending.
_TABLE: tuple[DType, ...] = (
    DType("BOOL", 8, 0, "bool", 1),
    DType("F4", 4, 1, "float4_e2m1fn_x2", 1),
    DType("F6_E2M3", 6, 2, None, 1),
    DType("F6_E3M2", 6, 3, None, 1),
    DType("U8", 8, 4, "uint8", 1),
    DType("I8", 8, 5, "int8", 1),
    DType("F8_E5M2", 8, 6, "float8_e5m2", 1),
    DType("F8_E4M3", 8, 7, "float8_e4m3fn", 1),
    DType("F8_E8M0", 8, 8, "float8_e8m0fnu", 1),
    DType("F8_E4M3FNUZ", 8, 9, "float8_e4m3fnuz", 1),
    DType("F8_E5M2FNUZ", 8, 10, "float8_e5m2fnuz", 1),
    DType("I16", 16, 11, "int16", 2),
    DType("U16", 16, 12, "uint16", 2),
    DType("F16", 16, 13, "float16", 2),
    DType("BF16", 16, 14, "bfloat16", 2),
    DType("I32", 32, 15, "int32", 4),
    DType("U32", 32, 16, "uint32", 4),
    DType("F32", 32, 17, "float32", 4),
    DType("C64", 64, 18, "complex64", 4),
    DType("F64", 64, 19, "float64", 8),
    DType("I64", 64, 20, "int64", 8),
    DType("U64", 64, 21, "uint64", 8),
    DType("C32", 32, None, "complex32", 2),
    DType("C128", 128, None, "complex128", 8),
)
_REAL_FLOATS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)

#: Every dtype by its safetensors name.
DTYPES: Mapping[str, DType] = {dtype.name: dtype for dtype in _TABLE}
#: Every dtype by its torch name.
TORCH_DTYPES: Mapping[str, DType] = {dtype.torch: dtype for dtype in _TABLE if dtype.torch}


class ByteSource(Protocol):
    """Bytes that can be asked for by range: a file, a decompressed record, a file on the hub."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; raises `FormatError` (FC102) past the end."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raises as `read` does."""


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of bytes that one or more tensors live in. Compared by identity.

    Attributes:
        key: its name inside the file.
        num_bytes: length.
        locate: gives (source, offset of the first byte); the structure around the bytes is checked
            on the first call, so that a key listing need not touch every record of a remote file.
        crc32: what the container says the CRC-32 of the whole run is; None where it says nothing.
    """

    key: str
    num_bytes: int
    locate: Callable[[], tuple[ByteSource, int]]
    crc32: int | None = None
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One named tensor.

    Attributes:
        name: as stored, or as mapped by a plan.
        dtype: element type.
        shape: logical shape; `()` for a scalar.
        storage: where its bytes are; None for a tensor that a model expects and no file holds.
        offset_bytes: of the first element in the storage.
        strides: in elements; None means row-major contiguous.
        byteorder: `little` or `big`.
        file: name of the file (of a folder) that holds it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    storage: Storage | None = None
    offset_bytes: int = 0
    strides: tuple[int, ...] | None = None
    byteorder: str = "little"
    file: str = ""

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Logical size, as it would be stored contiguously."""
        return self.num_elements * self.dtype.bits // 8

    @property
    def is_plain(self) -> bool:
        """Whether the stored bytes are the logical bytes: contiguous and little-endian."""
        return self.strides is None and (self.byteorder == "little" or self.dtype.swap_bytes == 1)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two names of one tensor: same bytes, read the same way."""
        if self.storage is None:
            return (id(self),)
        return (id(self.storage), self.offset_bytes, self.dtype.name, self.shape, self.strides)

    def describe(self) -> str:
        """`BF16 64x1024`, for messages."""
        return f"{self.dtype} {format_shape(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Something in the file that is not among the chosen weights."""

    path: str
    kind: str  # "int 3", "mapping of 12", "argparse.Namespace", ...
    num_tensors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known of a checkpoint without touching tensor data.

    Attributes:
        uri: what the user named.
        format: `torch-zip`, `torch-legacy`, `torchscript`, `safetensors`, `npz`, `npy`.
        tensors: every name in the file's own order; tied names are separate entries that share an
            `identity`.
        files: the files that hold them, in order, with their sizes in bytes.
        wrapper: the key under which the weights lay, or None for a bare state dict.
        metadata: the string metadata of safetensors.
        pickle_globals: `module name` of each global a pickle refers to -> `table`, `inert`.
        beside: what lies beside the weights.
        folder: the folder, when a folder was opened.
        carried: files of the folder beside the weights, relative names, sorted.
        check: walks the whole structure (record headers, payload ranges) of a local file; raises.
        open_beside: opens a file of the folder by its name, such as a config; None where there is
            no folder, or no such file in it.
        remote: of a checkpoint on the hub, the `remote` field of a report's input, as of now.
    """

    uri: str
    format: str
    tensors: tuple[TensorInfo, ...]
    files: tuple[tuple[str, int], ...]
    wrapper: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    pickle_globals: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[Beside, ...] = ()
    findings: tuple[Finding, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None
    sources: tuple[ByteSource, ...] = ()
    check: Callable[[], None] = lambda: None
    open_beside: Callable[[str], ByteSource | None] = lambda _: None
    remote: Callable[[], Mapping[str, Any]] | None = None

    @property
    def is_local(self) -> bool:
        """Whether its bytes are on this machine; on the hub they are not read for a hint."""
        return self.remote is None or bool(self.remote().get("downloaded"))

    def by_name(self) -> dict[str, TensorInfo]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def tied_groups(self) -> list[list[str]]:
        """Names that share one tensor, in file order; only groups of two or more."""
        return tied_groups(self.tensors)


def tied_groups(tensors: Iterable[TensorInfo]) -> list[list[str]]:
    """Group names by `TensorInfo.identity`, keeping groups of two or more in order."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.identity, []).append(tensor.name)
    return [names for names in groups.values() if len(names) > 1]


def distinct(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The first of each tied group, and every untied tensor, in order."""
    seen: dict[tuple[object, ...], TensorInfo] = {}
    for tensor in tensors:
        seen.setdefault(tensor.identity, tensor)
    return list(seen.values())


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides are row-major, ignoring dimensions of size 1 and empty tensors."""
    if 0 in shape:
        return True
    wanted = contiguous_strides(shape)
    return all(
        size == 1 or stride == want
        for size, stride, want in zip(shape, strides, wanted, strict=True)
    )


def format_shape(shape: tuple[int, ...]) -> str:
    """`64x1024`; `scalar` for `()`."""
    return "x".join(map(str, shape)) if shape else "scalar"


def escape(text: str) -> str:
    r"""Make hostile text printable: controls, bidi and other invisible characters are escaped.

    >>> escape("a\x1b[31m")
    'a\\x1b[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode("ascii")
        for char in text
    )


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def has_control(text: str) -> bool:
    """Whether a name holds C0 or C1 control characters (NUL, ESC, newline, ...)."""
    return _CONTROL.search(text) is not None


def is_tensor_name(text: str) -> bool:
    """Whether a name can be written: not empty, no control characters, no half surrogate pair."""
    return bool(text) and _NOT_IN_NAMES.search(text) is None


__all__ = [
    "DTYPES",
    "TORCH_DTYPES",
    "Beside",
    "ByteSource",
    "CkptError",
    "DType",
    "Finding",
    "Manifest",
    "Storage",
    "TensorInfo",
    "contiguous_strides",
    "distinct",
    "escape",
    "format_shape",
    "has_control",
    "is_contiguous",
    "is_tensor_name",
    "tied_groups",
]
