"""numpy's `.npz` and `.npy`: how big_vision publishes weights. Never a pickled object.

Spec: numpy/lib/format.py (versions 1.0 to 3.0 of the format).
"""

from __future__ import annotations

import ast
import math
import re
import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.formats.zip_archive import ZipArchive
from flamingo_ckpt.formats.zip_layout import ZipLayout
from flamingo_ckpt.tensors import DTYPES, ByteSource, DType, Manifest, Storage, TensorInfo, escape

NPY_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER = 10_000
_CODES: dict[str, str] = {
    "b1": "BOOL",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "u1": "U8",
    "u2": "U16",
    "u4": "U32",
    "u8": "U64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
    "c8": "C64",
    "c16": "C128",
}
_DESCR = re.compile(r"([<>|=])([?a-zA-Z])(\d*)")
#: Written as raw bytes of the element's width, since numpy has no code for them.
_VOID_CODES = {"BF16": "|V2"}


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
    tensors = []
    for record, entry in archive.entries.items():
        name = record.removesuffix(".npy")
        if not name:
            raise FormatError("an array has no name", code="FC106", where=source.name)
        tensors.append(
            _read_array(
                partial(archive.locate, record),
                entry.num_bytes,
                name=name,
                where=f"{source.name}: {escape(record)}",
                crc=entry.crc32,
                bfloat16=bfloat16,
            )
        )
    return Manifest(
        uri=source.name,
        format="npz",
        tensors=tuple(tensors),
        files=((source.name, source.size),),
        sources=(source,),
        check=archive.check,
    )


def read_npy(source: ByteSource, *, bfloat16: bool = False) -> Manifest:
    """The manifest of one array; it is named `arr_0`, as `numpy.savez` would."""
    tensor = _read_array(
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
        tensors=(tensor,),
        files=((source.name, source.size),),
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
) -> TensorInfo:
    header, header_bytes = _read_header(*locate(), length, where)
    dtype, byteorder = _read_dtype(header["descr"], name, where, bfloat16)
    shape, fortran = header["shape"], header["fortran_order"]
    if (
        type(shape) is not tuple
        or len(shape) > 64
        or any(type(size) is not int or not 0 <= size < 1 << 63 for size in shape)
        or type(fortran) is not bool
    ):
        raise FormatError("the header has no valid shape or order", code="FC101", where=where)
    needed = math.prod(shape) * dtype.bits // 8
    if header_bytes + needed != length:
        raise FormatError(
            f"{dtype} {list(shape)} needs {needed} bytes, {length - header_bytes} are there",
            code="FC102" if header_bytes + needed > length else "FC103",
            where=where,
        )
    # The checksum covers the header too, so the storage is the whole record.
    storage = Storage(
        key=name,
        num_bytes=length,
        locate=locate,
        crc32=crc or None,
        where=where,
    )
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=shape,
        storage=storage,
        offset_bytes=header_bytes,
        strides=_fortran_strides(shape) if fortran else None,
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


def _read_header(
    source: ByteSource, offset: int, length: int, where: str
) -> tuple[dict[str, Any], int]:
    head = source.read(offset, min(12, length))
    if len(head) < 10 or not head.startswith(NPY_MAGIC):
        raise FormatError("it is not a numpy array", code="FC101", where=where)
    major = head[6]
    if major not in (1, 2, 3):
        raise FormatError(f"numpy format {major} is not known", code="FC112", where=where)
    prefix = 10 if major == 1 else 12
    if len(head) < prefix:
        raise FormatError("the header is truncated", code="FC102", where=where)
    (size,) = struct.unpack_from("<H" if major == 1 else "<I", head, 8)
    if size > _MAX_NPY_HEADER:
        raise FormatError(
            f"the header claims {size} bytes, at most {_MAX_NPY_HEADER} are read",
            code="FC111",
            where=where,
        )
    if prefix + size > length:
        raise FormatError("the header runs past the end", code="FC102", where=where)
    raw = source.read(offset + prefix, size)
    try:
        header = ast.literal_eval(raw.decode("utf-8" if major == 3 else "latin-1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise FormatError("the header is not the dict that numpy writes", code="FC101", where=where)
    return header, prefix + size


def _read_dtype(descr: Any, name: str, where: str, bfloat16: bool) -> tuple[DType, str]:
    match = _DESCR.fullmatch(descr) if isinstance(descr, str) else None
    shown = escape(str(descr))[:60]
    if match is None:
        raise FormatError(
            f"`{escape(name)}` has the dtype {shown}: only plain numbers are read",
            code="FC306",
            where=where,
            hint="structured and object arrays can hold pickles; save plain arrays",
        )
    order, kind, width = match.groups()
    if kind == "O":
        raise FormatError(
            f"`{escape(name)}` is an object array, which is a pickle",
            code="FC501",
            where=where,
            hint="save plain arrays: `numpy.savez(..., allow_pickle=False)`",
        )
    if kind == "V" and width == "2":
        if not bfloat16:
            raise CkptError(
                f"`{escape(name)}` has 2-byte elements of no stated type",
                code="FC206",
                where=where,
                hint="if they are bfloat16, say so: `--npy-bfloat16`",
            )
        return DTYPES["BF16"], "little"
    code = "b1" if kind == "?" else f"{kind}{width}"
    if code not in _CODES:
        raise FormatError(
            f"`{escape(name)}` has the dtype {shown}, which is not a tensor dtype",
            code="FC306",
            where=where,
        )
    return DTYPES[_CODES[code]], "big" if order == ">" else "little"


def npy_header(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 array, padded so that the data is 64-byte aligned.

    Raises:
        CkptError: FC305 for a dtype that numpy has no code for.
    """
    codes = {name: code for code, name in _CODES.items()}
    if dtype.name in _VOID_CODES:
        descr = _VOID_CODES[dtype.name]
    elif dtype.name in codes:
        code = codes[dtype.name]
        descr = ("|" if dtype.bits == 8 else "<") + code
    else:
        raise CkptError(f"numpy has no {dtype}", code="FC305")
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    padding = -(len(NPY_MAGIC) + 4 + len(text) + 1) % 64
    body = text.encode("ascii") + b" " * padding + b"\n"
    return NPY_MAGIC + b"\x01\x00" + struct.pack("<H", len(body)) + body


def layout_npz(file: str, tensors: Iterable[OutTensor], *, bfloat16: bool = False) -> FileLayout:
    """Lay out an uncompressed npz; it knows no sharing, so each tied name gets its own copy.

    Raises:
        CkptError: FC305 for a dtype that numpy lacks, or bfloat16 without the flag.
    """
    archive = ZipLayout()
    for tensor in tensors:
        if tensor.dtype.name in _VOID_CODES and not bfloat16:
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
