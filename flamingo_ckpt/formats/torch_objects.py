"""What the inert nodes of a torch pickle mean: storages, tensors, dicts.

Sources: `torch/_utils.py`, `torch/serialization.py` of torch 0.4 to 2.13, for names and argument
orders. Every argument is type-checked and every extent computed before a `TensorInfo` exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import FormatError, UnsafeError
from flamingo_ckpt.formats.pickle_globals import (
    PLAIN_TENSOR_TYPES,
    QUANTIZED_STORAGES,
    REBUILDERS,
    STORAGE_DTYPES,
    UNSUPPORTED_TENSORS,
    storage_class,
)
from flamingo_ckpt.formats.pickle_nodes import Global, Inert, Mapping, Persistent
from flamingo_ckpt.formats.torch_nodes import calls, describe, is_natural
from flamingo_ckpt.tensors import (
    DTYPES,
    TORCH_DTYPES,
    DType,
    Storage,
    TensorInfo,
    escape,
    is_contiguous,
)

_MAX_DIMS = 64
_MAX_NESTING = 100
_MAX_METADATA = 16
# Settable attributes of torch.Tensor that replace its content.
_BYTES_OF_A_TENSOR = frozenset({"data", "grad", "imag", "real"})


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage as the pickle describes it.

    Attributes:
        storage: where the bytes are.
        dtype: of its elements; None for an untyped storage.
        first_byte: where this storage begins in `storage` (legacy storage views).
        num_bytes: its length.
    """

    storage: Storage
    dtype: DType | None
    first_byte: int
    num_bytes: int


#: Gives the bytes of a storage: (key, number of bytes the pickle expects) -> Storage.
StorageFinder = Callable[[str, int], Storage]


class TorchObjects:
    """Reads tensors out of one pickle's node graph.

    Args:
        find_storage: gives the bytes of a storage by its key.
        byteorder: of the file.
        where: what to call the file in messages.
    """

    def __init__(self, find_storage: StorageFinder, byteorder: str, where: str) -> None:
        self._find_storage = find_storage
        self._byteorder = byteorder
        self._where = where
        self._storages: dict[int, StorageRef] = {}

    @property
    def byteorder(self) -> str:
        """Of the file: `little` or `big`."""
        return self._byteorder

    def tensor(self, node: Any, name: str) -> TensorInfo | None:
        """The tensor that `node` describes, or None when it describes something else.

        Raises:
            FormatError: arguments that no writer writes, or a tensor kind that is not dense.
            UnsafeError: FC502, a tensor inside a call of an unknown class.
        """
        try:
            return self._tensor(node, name, 0)
        except (FormatError, UnsafeError) as error:
            error.key = error.key or name
            raise error.at(self._where) from None

    def _tensor(self, node: Any, name: str, depth: int) -> TensorInfo | None:
        if not isinstance(node, Inert) or not isinstance(node.function, Global):
            return None
        pair = (node.function.module, node.function.name)
        if pair in UNSUPPORTED_TENSORS:
            raise FormatError(
                f"`{escape(name)}` is a {UNSUPPORTED_TENSORS[pair]} tensor, "
                "which no dense format holds",
                code="FC306",
                hint="where it was trained, make it a plain tensor with data (`.to_dense()`, "
                "`.dequantize()`, `.full_tensor()`) and save again",
            )
        reader = REBUILDERS.get(pair)
        if reader is None:
            return None
        if node.states or node.items or node.pairs:
            raise self._bad(f"`{escape(name)}` is changed after it was rebuilt")
        if depth > _MAX_NESTING:
            raise self._bad(f"`{escape(name)}` is wrapped more than {_MAX_NESTING} times")
        args = node.args
        if reader == "inner":
            return self._inner(args, name, depth)
        if reader == "typed":
            return self._typed(args, name, depth)
        return self._rebuild(reader, args, name)

    def _inner(self, args: tuple[Any, ...], name: str, depth: int) -> TensorInfo:
        if len(args) > 3:
            self._refuse_state(args[3], name)
        found = self._tensor(args[0], name, depth + 1) if args else None
        if found is None:
            raise self._depends(name, args[0] if args else None)
        return found

    def _typed(self, args: tuple[Any, ...], name: str, depth: int) -> TensorInfo:
        """`_rebuild_from_type_v2(func, type, args, state)`: a tensor with attributes."""
        if len(args) != 4 or not isinstance(args[1], Global) or type(args[2]) is not tuple:
            raise self._bad(f"`{escape(name)}` has malformed arguments")
        self._refuse_state(args[3], name)
        kind = args[1]
        if (kind.module, kind.name) not in PLAIN_TENSOR_TYPES:
            raise UnsafeError(
                f"`{escape(name)}` is of the unknown tensor class `{escape(str(kind))}`",
                code="FC502",
                hint="its bytes may mean something else; save plain tensors",
            )
        found = self._tensor(Inert(args[0], args[2]), name, depth + 1)
        if found is None:
            raise self._depends(name, args[0])
        return found

    def _rebuild(self, reader: str, args: tuple[Any, ...], name: str) -> TensorInfo:
        least, most = {"tensor_v1": (4, 4), "tensor_v2": (4, 7), "tensor_v3": (7, 8)}[reader]
        if not least <= len(args) <= most:
            raise self._bad(f"`{escape(name)}` is rebuilt from {len(args)} arguments")
        ref = self.storage(args[0], name)
        offset, shape, strides = args[1], self._ints(args[2], name), self._ints(args[3], name)
        if not is_natural(offset):
            raise self._bad(
                f"`{escape(name)}` has a storage offset that is not a natural number", "FC103"
            )
        if len(shape) != len(strides) or len(shape) > _MAX_DIMS:
            raise self._bad(f"`{escape(name)}` has {len(shape)} sizes and {len(strides)} strides")
        self._refuse_lazy(args[most - 1] if len(args) == most and most > 4 else None, name)
        dtype = self._dtype_of(args[6], name) if reader == "tensor_v3" else ref.dtype
        if dtype is None:
            raise self._bad(f"`{escape(name)}` has an untyped storage and no dtype")
        return self._info(ref, dtype, offset, shape, strides, name)

    def _info(
        self,
        ref: StorageRef,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        name: str,
    ) -> TensorInfo:
        # torch's packed 4-bit type counts bytes; safetensors counts the elements in them.
        unit = max(dtype.bits // 8, 1)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        needed = 0 if 0 in shape else (last + 1) * unit
        if needed > ref.num_bytes or offset * unit > ref.num_bytes:
            raise FormatError(
                f"`{escape(name)}` needs {max(needed, offset * unit)} bytes of a storage that has "
                f"{ref.num_bytes}",
                code="FC103",
                hint="the file is damaged or was altered",
            )
        plain = is_contiguous(shape, strides)
        if dtype.bits < 8:
            if not plain or not shape:
                raise FormatError(f"`{escape(name)}` is a strided {dtype} view", code="FC306")
            shape = (*shape[:-1], shape[-1] * 2)
        return TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            storage=ref.storage,
            offset_bytes=ref.first_byte + offset * unit,
            strides=None if plain else strides,
            byteorder=self._byteorder,
        )

    def storage(self, node: Any, name: str) -> StorageRef:
        """The storage that a persistent id refers to."""
        if isinstance(node, Inert) and isinstance(node.function, Global):
            # `torch.storage.TypedStorage` and friends wrap the untyped one in some writers.
            raise self._depends(name, node)
        if not isinstance(node, Persistent):
            raise self._bad(f"`{escape(name)}` does not refer to a storage")
        if id(node.id) not in self._storages:
            self._storages[id(node.id)] = self._read_storage(node.id, name)
        return self._storages[id(node.id)]

    def _read_storage(self, pid: Any, name: str) -> StorageRef:
        if (
            type(pid) is not tuple
            or len(pid) not in (5, 6)
            or pid[0] not in ("storage", b"storage")
        ):
            raise self._bad(f"`{escape(name)}` has a storage id that torch does not write")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, Global) or type(key) is not str:
            raise self._bad(f"`{escape(name)}` has a malformed storage id")
        if not is_natural(numel):
            raise self._bad(
                f"`{escape(name)}` has a storage of {describe(numel)} elements", "FC103"
            )
        dtype = self._storage_dtype(kind, name)
        width = dtype.bits // 8 if dtype else 1
        storage = self._find_storage(key, numel * width)
        first, length = 0, numel * width
        if len(pid) == 6 and pid[5] is not None:
            first, length = self._storage_view(pid[5], width, length, name)
        return StorageRef(storage, dtype, first, length)

    def _storage_view(self, view: Any, width: int, length: int, name: str) -> tuple[int, int]:
        """Legacy files: (key, offset, size) of a storage that is a window of another."""
        if type(view) is not tuple or len(view) != 3:
            raise self._bad(f"`{escape(name)}` has a malformed storage view")
        offset, size = view[1], view[2]
        if not is_natural(offset) or not is_natural(size):
            raise self._bad(f"`{escape(name)}` has a malformed storage view")
        if (offset + size) * width > length:
            raise self._bad(f"`{escape(name)}` is a view past the end of its storage", "FC103")
        return offset * width, size * width

    def _storage_dtype(self, kind: Global, name: str) -> DType | None:
        short = storage_class(kind.module, kind.name)
        if short == "Untyped":
            return None
        if short in STORAGE_DTYPES:
            return DTYPES[STORAGE_DTYPES[short]]
        if short in QUANTIZED_STORAGES:
            raise FormatError(f"`{escape(name)}` is quantized ({kind})", code="FC306")
        raise UnsafeError(
            f"`{escape(name)}` lives in a storage of the unknown class `{escape(str(kind))}`",
            code="FC502",
        )

    def _dtype_of(self, node: Any, name: str) -> DType:
        if isinstance(node, Global) and node.module == "torch" and node.name in TORCH_DTYPES:
            return TORCH_DTYPES[node.name]
        raise FormatError(
            f"`{escape(name)}` has the dtype `{escape(describe(node))}`, which is not known",
            code="FC306",
        )

    def _ints(self, node: Any, name: str) -> tuple[int, ...]:
        """A tuple of natural numbers; `torch.Size` wraps one."""
        if calls(node, {("torch", "Size")}) and len(node.args) == 1:
            node = node.args[0]
        values = tuple(node) if type(node) is list else node
        if type(values) is not tuple or any(type(value) is not int for value in values):
            raise self._bad(f"`{escape(name)}` has a shape or strides that are not integers")
        if not all(is_natural(value) for value in values):
            raise self._bad(f"`{escape(name)}` has a negative or too large size or stride", "FC103")
        return tuple(values)

    def _refuse_state(self, state: Any, name: str) -> None:
        """Torch sets each entry as an attribute; some attributes are the tensor's own bytes."""
        parts = state if type(state) is tuple else (state,)
        for part in parts:
            if part is None:
                continue
            if not isinstance(part, Mapping) or any(
                type(key) is not str or key in _BYTES_OF_A_TENSOR for key, _ in part.pairs
            ):
                raise self._bad(f"`{escape(name)}` has state that would change the tensor")

    def _refuse_lazy(self, metadata: Any, name: str) -> None:
        """Conjugate and negative views: the bytes are not the value."""
        if metadata is None:
            return
        if not isinstance(metadata, Mapping):
            raise self._bad(f"`{escape(name)}` has malformed tensor metadata")
        if len(metadata.pairs) > _MAX_METADATA:
            raise self._bad(f"`{escape(name)}` has malformed tensor metadata")
        lazy = {"conj", "neg"}
        bits = [key for key, on in metadata.pairs if type(key) is str and key in lazy and on]
        if bits:
            raise FormatError(
                f"`{escape(name)}` is a lazy {' and '.join(bits)} view: "
                "its bytes are not its value",
                code="FC306",
                hint="call `.resolve_conj().resolve_neg()` before saving",
            )

    def _depends(self, name: str, node: Any) -> UnsafeError:
        return UnsafeError(
            f"`{escape(name)}` depends on `{escape(describe(node))}`, whose meaning is not known",
            code="FC502",
            hint="save plain tensors: `torch.save(model.state_dict(), ...)`",
        )

    def _bad(self, message: str, code: str = "FC110") -> FormatError:
        return FormatError(message, code=code)
