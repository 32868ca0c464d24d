"""safetensors: a strict header reader, and the layout of a file to be written.

Spec: the README and `tensor.rs` of safetensors 0.8.0. The reader is stricter than the library: the
header must begin with `{`, a key may occur once at every level, no field is unknown, and no name
holds control characters. The layout is byte for byte what the library's `save_file` writes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding, FormatError
from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.tensors import (
    DTYPES,
    ByteSource,
    DType,
    Manifest,
    Storage,
    TensorInfo,
    escape,
    is_tensor_name,
)

MAX_HEADER_BYTES = 100_000_000
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_METADATA = "__metadata__"
#: Where our writer keeps the names that share a tensor: JSON, `{alias: name that is stored}`.
ALIASES_KEY = "flamingo_ckpt.aliases"


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file can only be a safetensors header."""
    if len(head) < 9:
        return False
    (length,) = struct.unpack_from("<Q", head)
    return head[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES


def read_safetensors(source: ByteSource) -> Manifest:
    """The manifest of one safetensors file.

    Raises:
        FormatError: FC101 to FC104, naming the tensor.
    """
    where = source.name
    header, data_start = _read_header(source)
    metadata = _check_metadata(header.pop(_METADATA, {}), where)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        begin, end, tensor = _read_entry(source, name, entry, data_start)
        spans.append((begin, end, name))
        tensors[name] = tensor
    _check_tiling(spans, source.size - data_start, where)
    # The data section is in offset order; the header need not be.
    ordered = [tensors[name] for _, _, name in sorted(spans)]
    findings = [] if metadata.get("format") == "pt" else [_no_format(where)]
    return Manifest(
        uri=where,
        format="safetensors",
        tensors=tuple(_with_aliases(ordered, metadata, where)),
        files=((where, source.size),),
        metadata=metadata,
        findings=tuple(findings),
        details={"header_bytes": data_start - 8},
        sources=(source,),
    )


def _no_format(where: str) -> Finding:
    return Finding(
        code="FC101",
        severity="info",
        detail=f"`{where}` has no `format: pt` in its metadata; some loaders refuse it",
        hint="`convert` writes it",
    )


def _read_header(source: ByteSource) -> tuple[dict[str, Any], int]:
    where = source.name
    if source.size < 10:
        raise FormatError(f"{source.size} bytes cannot hold a header", code="FC102", where=where)
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed",
            code="FC101",
            where=where,
        )
    if 8 + length > source.size:
        raise FormatError(
            f"the header claims {length} bytes, the file has {source.size - 8} after its length",
            code="FC102",
            where=where,
            hint="the file is truncated; copy or download it again",
        )
    raw = source.read(8, length)
    if not raw.startswith(b"{"):
        raise FormatError("the header does not begin with `{`", code="FC101", where=where)
    return parse_json_object(raw, where), 8 + length


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from hostile bytes: UTF-8, no repeated key, no lone surrogate, bounded depth.

    Raises:
        FormatError: FC101, or FC104 for a repeated key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            seen: set[str] = set()
            repeated = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise FormatError(
                f"the key `{escape(repeated)}` occurs twice", code="FC104", where=where
            )
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"not valid JSON: {escape(reason)}", code="FC101", where=where) from None
    if not isinstance(parsed, dict):
        raise FormatError("not a JSON object", code="FC101", where=where)
    return parsed


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _check_metadata(metadata: Any, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            "`__metadata__` is not a map from strings to strings", code="FC101", where=where
        )
    for text in (*metadata, *metadata.values()):
        _check_unicode(text, where)
    return metadata


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(
            f"`{escape(text[:80])}` holds half a surrogate pair", code="FC101", where=where
        ) from None


def _read_entry(
    source: ByteSource, name: str, entry: Any, data_start: int
) -> tuple[int, int, TensorInfo]:
    where, shown = source.name, escape(name)
    _check_unicode(name, where)
    if not is_tensor_name(name):
        raise FormatError(
            f"`{shown}` is empty or holds control characters: not a tensor name",
            code="FC505",
            where=where,
            key=name,
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise FormatError(
            f"`{shown}` should have exactly dtype, shape and data_offsets",
            code="FC101",
            where=where,
            key=name,
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None or dtype.rank is None:
        raise FormatError(
            f"`{shown}` has the dtype {escape(str(entry['dtype']))[:40]!r}, "
            "which safetensors lacks",
            code="FC101",
            where=where,
            key=name,
        )
    shape = _naturals(entry["shape"], f"the shape of `{shown}`", where)
    offsets = _naturals(entry["data_offsets"], f"the offsets of `{shown}`", where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            f"the offsets of `{shown}` are {list(offsets)[:4]}", code="FC103", where=where, key=name
        )
    begin, end = offsets
    bits = math.prod(shape) * dtype.bits
    if bits % 8 or bits // 8 != end - begin:
        raise FormatError(
            f"`{shown}` ({dtype} {list(shape)}) needs {bits} bits, its offsets span "
            f"{(end - begin) * 8}",
            code="FC103",
            where=where,
            key=name,
        )
    start = data_start + begin
    storage = Storage(
        key=name,
        num_bytes=end - begin,
        locate=lambda: (source, start),
        where=f"{where}: {shown}",
    )
    return begin, end, TensorInfo(name=name, dtype=dtype, shape=shape, storage=storage)


def _naturals(value: Any, what: str, where: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > 64
        or any(type(item) is not int or not 0 <= item < 1 << 63 for item in value)
    ):
        raise FormatError(f"{what} is not a list of natural numbers", code="FC101", where=where)
    return tuple(value)


def _check_tiling(spans: list[tuple[int, int, str]], available: int, where: str) -> None:
    """The tensors follow each other without hole or overlap, and end with the file."""
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            kind = "a hole before" if begin > at else "an overlap with"
            raise FormatError(
                f"there is {kind} `{escape(name)}`: it begins at byte {begin} of the data, the one "
                f"before ends at {at}",
                code="FC103",
                where=where,
                key=name,
            )
        at = end
    if at > available:
        raise FormatError(
            f"the tensors need {at} bytes of data, the file has {available} "
            f"({at - available} short)",
            code="FC102",
            where=where,
            hint="the file is truncated; copy or download it again",
        )
    if at < available:
        raise FormatError(
            f"{available - at} bytes follow the last tensor", code="FC103", where=where
        )


def _with_aliases(
    tensors: list[TensorInfo], metadata: Mapping[str, str], where: str
) -> Iterable[TensorInfo]:
    """Add the names that share a stored tensor.

    Ours lie as JSON under `ALIASES_KEY`; safetensors' own `save_model` writes each as a metadata
    entry `alias: stored name`.
    """
    stored = {tensor.name: tensor for tensor in tensors}
    aliases: dict[str, Any] = {}
    if ALIASES_KEY in metadata:
        aliases = parse_json_object(
            metadata[ALIASES_KEY].encode("utf-8"), f"{where}: {ALIASES_KEY}"
        )
        if not all(
            isinstance(name, str)
            and name in stored
            and alias not in stored
            and is_tensor_name(alias)
            for alias, name in aliases.items()
        ):
            raise FormatError(
                "the recorded aliases do not fit the tensors of the file",
                code="FC101",
                where=f"{where}: {ALIASES_KEY}",
            )
    else:
        for alias, name in metadata.items():
            usable = alias != "format" and is_tensor_name(alias)
            if usable and alias not in stored and name in stored:
                aliases[alias] = name
    following: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        following.setdefault(name, []).append(alias)
    for tensor in tensors:
        yield tensor
        for alias in following.get(tensor.name, ()):
            yield TensorInfo(
                name=alias,
                dtype=tensor.dtype,
                shape=tensor.shape,
                storage=tensor.storage,
                offset_bytes=tensor.offset_bytes,
            )


def sort_key(tensor: tuple[str, DType]) -> tuple[int, bytes]:
    """Safetensors' order: dtype rank descending, then name by bytes."""
    name, dtype = tensor
    return (-(dtype.rank or 0), name.encode("utf-8"))


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Lay out one file.

    Args:
        tensors: (name, dtype, shape, num_bytes) in any order.
        metadata: written in sorted order, so that the same input gives the same bytes.

    Returns:
        The header with its length, the offset of each tensor in the file, and the file's size.
    """
    fields: dict[str, Any] = {}
    if metadata:
        fields[_METADATA] = {key: metadata[key] for key in sorted(metadata)}
    at, begins = 0, {}
    for name, dtype, shape, num_bytes in sorted(tensors, key=lambda t: sort_key((t[0], t[1]))):
        begins[name] = at
        fields[name] = {
            "dtype": dtype.name,
            "shape": list(shape),
            "data_offsets": [at, at + num_bytes],
        }
        at += num_bytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    start = len(header)
    return header, {name: start + begin for name, begin in begins.items()}, start + at


def layout_safetensors(
    file: str, tensors: Iterable[OutTensor], metadata: Mapping[str, str]
) -> FileLayout:
    """Lay out one safetensors file; tied names go into the metadata.

    Raises:
        CkptError: FC305 for a dtype that safetensors lacks, FC505 for a name it cannot hold.
    """
    tensors = list(tensors)
    for tensor in tensors:
        if tensor.dtype.rank is None:
            raise CkptError(
                f"`{escape(tensor.name)}` is {tensor.dtype}, which safetensors cannot hold",
                code="FC305",
                key=tensor.name,
                hint="`--format torch` keeps it, `--exclude` leaves it out",
            )
        if _METADATA in (tensor.name, *tensor.aliases):
            raise CkptError(
                f"`{_METADATA}` cannot be the name of a tensor in safetensors",
                code="FC505",
                key=_METADATA,
                hint="leave it out with --exclude",
            )
    aliases = {alias: tensor.name for tensor in tensors for alias in tensor.aliases}
    fields = dict(metadata)
    fields.pop(ALIASES_KEY, None)
    if aliases:
        fields[ALIASES_KEY] = json.dumps(aliases, sort_keys=True, separators=(",", ":"))
    header, offsets, size = build_header(
        ((t.name, t.dtype, t.shape, t.num_bytes) for t in tensors), fields
    )
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise CkptError(
            f"the header would have {len(header) - 8} bytes, readers accept {MAX_HEADER_BYTES}",
            code="FC111",
            hint="write shards: --max-shard-size",
        )
    return FileLayout(
        file=file,
        num_bytes=size,
        offsets=offsets,
        finish=lambda _: [(0, header)],
        copies={},
    )
