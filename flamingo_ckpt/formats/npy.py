"""The header of a numpy array file, read without evaluating anything.

Spec: numpy/lib/format.py, versions 1.0 to 3.0. numpy evaluates the header as a Python literal; here
its three fields are matched, and anything else in it is refused.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.tensors import DTYPES, ByteSource, DType, escape

NPY_MAGIC = b"\x93NUMPY"
#: numpy's own bound.
MAX_HEADER_BYTES = 10_000
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
#: Written as raw bytes of the element's width, since numpy has no code for them.
VOID_CODES = {"BF16": "|V2"}
_DESCR = re.compile(r"([<>|=]?)([?a-zA-Z])(\d*)(?:\[\w+\])?", re.ASCII)
_FIELD = re.compile(
    r"""\s*(?P<quote>['"])(?P<name>descr|fortran_order|shape)(?P=quote)\s*:\s*
    (?:(?P<text>'[^'\\]{1,40}'|"[^"\\]{1,40}")
      |(?P<structured>\[.*?\](?=\s*,\s*['"](?:fortran_order|shape)|\s*,?\s*\}))
      |(?P<truth>True|False)
      |\((?P<sizes>[\s\dL,]*)\))
    \s*(?:,|(?=\}))""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NpyHeader:
    """What an array file says of itself.

    Attributes:
        descr: numpy's code of the element type; for structured types, the text of their list.
        fortran_order: column-major where true.
        shape: of the array.
        num_bytes: length of everything before the data.
    """

    descr: str
    fortran_order: bool
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def is_text(self) -> bool:
        """Whether the elements are strings, dates or durations: plain bytes, but no tensor."""
        match = _DESCR.fullmatch(self.descr)
        return match is not None and match[2] in "USMm"


def read_npy_header(source: ByteSource, offset: int, length: int, where: str) -> NpyHeader:
    """The header of the array in `length` bytes from `offset`.

    Raises:
        FormatError: FC101, FC102, FC111 or FC112.
    """
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
    if size > MAX_HEADER_BYTES:
        raise FormatError(
            f"the header claims {size} bytes, at most {MAX_HEADER_BYTES} are read",
            code="FC111",
            where=where,
        )
    if prefix + size > length:
        raise FormatError("the header runs past the end", code="FC102", where=where)
    raw = source.read(offset + prefix, size)
    return _parse(raw.decode("utf-8" if major == 3 else "latin-1", "replace"), prefix + size, where)


def _parse(text: str, num_bytes: int, where: str) -> NpyHeader:
    bad = FormatError("the header is not the dict that numpy writes", code="FC101", where=where)
    text = text.strip()
    if not text.startswith("{"):
        raise bad
    fields: dict[str, re.Match[str]] = {}
    at = 1
    while match := _FIELD.match(text, at):
        if match["name"] in fields:
            raise bad
        fields[match["name"]] = match
        at = match.end()
    if text[at:].strip() != "}" or len(fields) != 3:
        raise bad
    descr, order, sizes = (fields[name] for name in ("descr", "fortran_order", "shape"))
    if order["truth"] is None or sizes["sizes"] is None:
        raise bad
    if descr["text"] is None and descr["structured"] is None:
        raise bad
    return NpyHeader(
        descr=descr["text"][1:-1] if descr["text"] else descr["structured"],
        fortran_order=order["truth"] == "True",
        shape=_parse_shape(sizes["sizes"], bad),
        num_bytes=num_bytes,
    )


def _parse_shape(text: str, bad: FormatError) -> tuple[int, ...]:
    """`3, 4` or `3,`; Python 2 wrote `3L`."""
    parts = [part.strip().removesuffix("L") for part in text.split(",")]
    if parts[-1] == "":
        parts.pop()
    if len(parts) > 64 or any(not part.isdigit() or len(part) > 19 for part in parts):
        raise bad
    shape = tuple(int(part) for part in parts)
    if any(size >= 1 << 63 for size in shape):
        raise bad
    return shape


def read_dtype(descr: str, name: str, where: str, bfloat16: bool) -> tuple[DType, str]:
    """(dtype, byte order) of a numpy type code.

    Raises:
        FormatError: FC306 for structured types, FC501 for objects, which are pickles.
        CkptError: FC206 for 2-byte voids without `bfloat16`.
    """
    shown = escape(descr)[:60]
    match = _DESCR.fullmatch(descr)
    is_object = match is not None and match[2] == "O"
    if is_object or (match is None and re.search(r"""['"][<>|=]?O\d*['"]""", descr)):
        raise FormatError(
            f"`{escape(name)}` holds Python objects, which are a pickle",
            code="FC501",
            where=where,
            hint="save plain arrays: `numpy.savez(..., allow_pickle=False)`",
        )
    if match is None:
        raise FormatError(
            f"`{escape(name)}` has the structured dtype {shown}: only plain numbers are read",
            code="FC306",
            where=where,
            hint="save one plain array per field",
        )
    order, kind, width, *_ = match.groups()
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
    if dtype.name in VOID_CODES:
        descr = VOID_CODES[dtype.name]
    elif dtype.name in codes:
        descr = ("|" if dtype.bits == 8 else "<") + codes[dtype.name]
    else:
        raise CkptError(f"numpy has no {dtype}", code="FC305")
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    padding = -(len(NPY_MAGIC) + 4 + len(text) + 1) % 64
    body = text.encode("ascii") + b" " * padding + b"\n"
    return NPY_MAGIC + b"\x01\x00" + struct.pack("<H", len(body)) + body
