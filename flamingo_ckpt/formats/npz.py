"""numpy's `.npz` and `.npy`: how big_vision publishes weights. Never a pickled object."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.formats.npy import VOID_CODES, npy_header, read_dtype, read_npy_header
from flamingo_ckpt.formats.zip_archive import ZipArchive, no_checksums
from flamingo_ckpt.formats.zip_layout import ZipLayout
from flamingo_ckpt.tensors import Beside, ByteSource, Manifest, Storage, TensorInfo, escape


def is_npz(archive: ZipArchive) -> bool:
    """Whether every record of a zip is an array."""
    return bool(archive.entries) and all(name.endswith(".npy") for name in archive.entries)


def read_npz(source: ByteSource, archive: ZipArchive, *, bfloat16: bool = False) -> Manifest:
    """The manifest of an npz file.

    Args:
        source: the file.
        archive: its records.
        bfloat16: read `|V2` elements as BF16 (`--npy-bfloat16`).

    Raises:
        FormatError, CkptError: naming the array.
    """
    tensors: list[TensorInfo] = []
    beside: list[Beside] = []
    for record, entry in archive.entries.items():
        name = record.removesuffix(".npy")
        if not name:
            raise FormatError("an array has no name", code="FC106", where=source.name)
        found = _read_array(
            partial(archive.locate, record),
            entry.num_bytes,
            name=name,
            where=f"{source.name}: {escape(record)}",
            crc=entry.crc32,
            bfloat16=bfloat16,
        )
        if isinstance(found, TensorInfo):
            tensors.append(found)
        else:
            beside.append(found)
    return Manifest(
        uri=source.name,
        format="npz",
        tensors=tuple(tensors),
        files=((source.name, source.size),),
        beside=tuple(beside),
        findings=tuple(no_checksums(source.name, archive.without_checksum())),
        sources=(source,),
        check=archive.check,
    )


def read_npy(source: ByteSource, *, bfloat16: bool = False) -> Manifest:
    """The manifest of one array; it is named `arr_0`, as `numpy.savez` would."""
    found = _read_array(
        lambda: (source, 0),
        source.size,
        name="arr_0",
        where=source.name,
        crc=None,
        bfloat16=bfloat16,
    )
    return Manifest(
        uri=source.name,
        format="npy",
        tensors=(found,) if isinstance(found, TensorInfo) else (),
        files=((source.name, source.size),),
        beside=(found,) if isinstance(found, Beside) else (),
        sources=(source,),
    )


def _read_array(
    locate: Callable[[], tuple[ByteSource, int]],
    length: int,
    *,
    name: str,
    where: str,
    crc: int | None,
    bfloat16: bool,
) -> TensorInfo | Beside:
    header = read_npy_header(*locate(), length, where)
    if header.is_text:
        return Beside(path=name, kind=f"numpy array of text or dates {list(header.shape)}")
    dtype, byteorder = read_dtype(header.descr, name, where, bfloat16)
    needed = math.prod(header.shape) * dtype.bits // 8
    if header.num_bytes + needed != length:
        raise FormatError(
            f"{dtype} {list(header.shape)} needs {needed} bytes, "
            f"{length - header.num_bytes} are there",
            code="FC102" if header.num_bytes + needed > length else "FC103",
            where=where,
        )
    # The checksum covers the header too, so the storage is the whole record.
    storage = Storage(key=name, num_bytes=length, locate=locate, crc32=crc or None, where=where)
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=header.shape,
        storage=storage,
        offset_bytes=header.num_bytes,
        strides=_fortran_strides(header.shape) if header.fortran_order else None,
        byteorder=byteorder,
    )


def _fortran_strides(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if sum(size > 1 for size in shape) < 2 or 0 in shape:
        return None  # both orders are the same
    strides, step = [], 1
    for size in shape:
        strides.append(step)
        step *= size
    return tuple(strides)


def layout_npz(file: str, tensors: Iterable[OutTensor], *, bfloat16: bool = False) -> FileLayout:
    """Lay out an uncompressed npz; it knows no sharing, so each tied name gets its own copy.

    Raises:
        CkptError: FC305 for a dtype that numpy lacks, or bfloat16 without the flag.
    """
    archive = ZipLayout()
    for tensor in tensors:
        if tensor.dtype.name in VOID_CODES and not bfloat16:
            raise CkptError(
                f"`{escape(tensor.name)}` is {tensor.dtype}, for which numpy has no code",
                code="FC305",
                key=tensor.name,
                hint="`--npy-bfloat16` writes it as 2-byte voids, `--dtype float32` casts it",
            )
        try:
            header = npy_header(tensor.dtype, tensor.shape)
        except CkptError as error:
            raise CkptError(
                f"`{escape(tensor.name)}` is {tensor.dtype}, which npz cannot hold",
                code="FC305",
                key=tensor.name,
                hint="`--format torch` or `--format safetensors` keeps it",
            ) from error
        for name in (tensor.name, *tensor.aliases):
            archive.add(f"{name}.npy", header, tensor=tensor.name, num_bytes=tensor.num_bytes)
    return archive.lay_out(file)
