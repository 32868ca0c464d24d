"""Tensors in memory as a checkpoint: a manifest whose bytes are read from the tensors themselves.

What converts, verifies and compares files then does the same with a model that is being trained.
Nothing is copied before its bytes are asked for, and then one tensor at a time for each thread that
asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.tensors import TORCH_DTYPES, ByteSource, DType, Manifest, Storage, TensorInfo

if TYPE_CHECKING:
    import torch

#: Gives a tensor with all of its values, wherever they are.
Fetch = Callable[["torch.Tensor"], "torch.Tensor"]


class MemorySource:
    """The bytes of one tensor that lies in main memory, row-major.

    Args:
        tensor: on the CPU and contiguous; kept alive as long as the source is.
        name: what to call it in messages.
    """

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        self._name = name
        self._bytes = bytes_of(tensor)

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self._name

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self._bytes)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        return bytes(self._slice(offset, size))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        buffer[:] = self._slice(offset, len(buffer))

    def _slice(self, offset: int, size: int) -> memoryview:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise FormatError(
                f"bytes {offset} to {offset + size} are asked for, the tensor has {self.size}",
                code="FC102",
                where=self._name,
            )
        return self._bytes[offset : offset + size]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, writable where the tensor's memory is."""
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def manifest_of(
    tensors: Iterable[tuple[str, torch.Tensor]], where: str, fetch: Fetch | None = None
) -> Manifest:
    """The manifest of named tensors in memory.

    Args:
        tensors: (name, tensor); the same tensor under two names is one tensor with two names.
        where: what to call the whole in messages.
        fetch: gives the values of a tensor that does not lie here whole; by default, it does.

    Raises:
        CkptError: FC306 for a tensor that is not dense, or has no values (on the meta device),
            FC305 for a dtype that no format here has.
    """
    storages: dict[object, Storage] = {}
    infos = []
    for name, tensor in tensors:
        dtype, shape = dtype_and_shape(tensor, name, where)
        storage = storages.setdefault(
            identity(tensor), _storage(tensor, name, dtype, where, fetch or (lambda one: one))
        )
        infos.append(TensorInfo(name=name, dtype=dtype, shape=shape, storage=storage))
    return Manifest(uri=where, format="memory", tensors=tuple(infos), files=())


def identity(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are one: the same memory, read the same way."""
    import torch

    has_memory = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    if is_split(tensor) or not has_memory or tensor.numel() == 0:
        return id(tensor)
    place = (str(tensor.device), tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def is_split(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies in parts with several processes (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def dtype_and_shape(tensor: torch.Tensor, name: str, where: str) -> tuple[DType, tuple[int, ...]]:
    """How a file would describe the tensor; raises as `manifest_of` does."""
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "not dense"
        raise _unwritable(f"`{name}` is {kind}, which no format here holds", name).at(where)
    if tensor.is_meta:
        raise _unwritable(f"`{name}` is on the meta device: it has no values", name).at(where)
    dtype = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CkptError(
            f"`{name}` is {tensor.dtype}, which no format here holds",
            code="FC305",
            where=where,
            key=name,
        )
    shape = tuple(tensor.shape)
    if dtype.bits < 8:  # torch counts the bytes, two elements each
        shape = (*shape[:-1], shape[-1] * 2)
    return dtype, shape


def _unwritable(message: str, name: str) -> CkptError:
    return CkptError(message, code="FC306", key=name)


def _storage(tensor: torch.Tensor, name: str, dtype: DType, where: str, fetch: Fetch) -> Storage:
    def locate() -> tuple[ByteSource, int]:
        # Lazy conjugate and negative views: what counts is the value.
        whole = fetch(tensor).detach().cpu().resolve_conj().resolve_neg().contiguous()
        # A single element keeps any stride, with which its bytes cannot be viewed.
        return MemorySource(whole.as_strided((whole.numel(),), (1,)), name), 0

    num_bytes = tensor.numel() * max(dtype.bits // 8, 1)
    return Storage(key=name, num_bytes=num_bytes, locate=locate, where=f"{where}: {name}")
