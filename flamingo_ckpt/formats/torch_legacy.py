"""The stream of pickles that `torch.save` wrote from 0.1.10 to 1.5, and can still write.

Five pickles (magic number, protocol version, system facts, the object, the sorted storage keys),
then per key an int64 element count and the raw elements, back to back. No checksum exists.
Source: `_legacy_save` in torch/serialization.py.
"""

from __future__ import annotations

from typing import Any

from flamingo_ckpt.errors import Finding, FormatError
from flamingo_ckpt.formats.pickle_globals import STORAGE_DTYPES, storage_class
from flamingo_ckpt.formats.pickle_machine import Pickled, read_pickle
from flamingo_ckpt.formats.pickle_nodes import Global, Mapping
from flamingo_ckpt.formats.torch_nodes import describe, is_natural
from flamingo_ckpt.formats.torch_objects import TorchObjects
from flamingo_ckpt.formats.torch_zip import classify_globals, unknown_findings
from flamingo_ckpt.formats.wrapper import select_weights
from flamingo_ckpt.tensors import DTYPES, ByteSource, Manifest, Storage, escape

_MAGIC = 0x1950A86A20F9469CFC6C
#: The number as every protocol from 2 on holds it.
MAGIC_BYTES = _MAGIC.to_bytes(10, "little")
#: The first pickle, whole, as torch writes it by default: PROTO 2, LONG1 of ten bytes, STOP.
MAGIC_PICKLE = b"\x80\x02\x8a\x0a" + MAGIC_BYTES + b"."
_PROTOCOL = 1001
_MAX_STORAGES = 1_000_000


def read_torch_legacy(source: ByteSource, *, wrapper_key: str | None = None) -> Manifest:
    """The manifest of a legacy stream.

    Raises:
        FormatError: FC102, FC103 or FC110.
        UnsafeError: FC501 or FC502.
    """
    where = source.name
    pickled, objects, little_writer, num_storages = _read_stream(source)
    select = select_weights(pickled.value, objects, wrapper_key, where)
    no_checksum = Finding(
        code="FC114",
        severity="info",
        detail="the legacy format carries no checksum: damage in the source cannot be noticed",
    )
    return Manifest(
        uri=where,
        format="torch-legacy",
        tensors=select.tensors,
        files=((where, source.size),),
        wrapper=select.key,
        pickle_globals=classify_globals(pickled),
        beside=select.beside,
        findings=(no_checksum, *unknown_findings(select.unknown_classes)),
        details={
            "byteorder": "little",
            "written_on": "little-endian" if little_writer else "big-endian",
            "num_storages": num_storages,
        },
        sources=(source,),
    )


def read_legacy_pickle(source: ByteSource) -> tuple[Pickled, TorchObjects]:
    """The object of a legacy stream, read inertly, and what gives its tensors.

    Raises:
        FormatError, UnsafeError: as for `read_torch_legacy`.
    """
    pickled, objects, _, _ = _read_stream(source)
    return pickled, objects


def _read_stream(source: ByteSource) -> tuple[Pickled, TorchObjects, bool, int]:
    where = source.name
    at = 0
    parts: list[Pickled] = []
    for label in ("magic number", "protocol version", "system facts", "object", "storage keys"):
        parts.append(read_pickle(source, at, source.size, f"{where}: {label}"))
        at = parts[-1].end
    magic, protocol, facts, pickled, keys = parts
    if magic.value != _MAGIC or protocol.value != _PROTOCOL:
        raise _bad("the magic number or protocol version is another", where)
    little_writer = _little_endian_writer(facts.value, where)
    extents = _declared_extents(pickled, where)
    storages = _lay_out(source, at, keys.value, extents)

    def find(key: str, num_bytes: int) -> Storage:
        if key not in storages or storages[key].num_bytes != num_bytes:
            raise _bad(f"storage `{escape(key)}` is not in the file at the size expected", where)
        return storages[key]

    # A big-endian machine swaps while it writes this format, so the elements are always little.
    objects = TorchObjects(find, "little", where)
    return pickled, objects, little_writer, len(storages)


def _little_endian_writer(facts: Any, where: str) -> bool:
    pairs = facts.pairs if isinstance(facts, Mapping) else []
    little = [value for key, value in pairs if key == "little_endian"]
    if len(little) != 1 or type(little[0]) is not bool:
        raise _bad("the system facts do not say the byte order", where)
    return bool(little[0])


def _declared_extents(pickled: Pickled, where: str) -> dict[str, tuple[int, int]]:
    """(elements, bytes an element) of each storage, from the persistent ids of the object."""
    extents: dict[str, tuple[int, int]] = {}
    for item in pickled.persistent:
        pid = item.id
        if type(pid) is tuple and pid and pid[0] in ("module", b"module"):
            continue
        if type(pid) is not tuple or len(pid) not in (5, 6) or type(pid[2]) is not str:
            raise _bad("a storage id is malformed", where)
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, Global) or not is_natural(numel):
            raise _bad(f"the id of storage `{escape(key)}` is malformed", where)
        extent = (numel, _width(kind, key, where))
        if extents.setdefault(key, extent) != extent:
            raise _bad(f"storage `{escape(key)}` is described in two ways", where)
    return extents


# Quantized elements are sized too, so that the storages behind them can be found.
_QUANTIZED_WIDTHS = {"QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1}


def _width(kind: Global, key: str, where: str) -> int:
    short = storage_class(kind.module, kind.name)
    if short == "Untyped":
        return 1
    if short in STORAGE_DTYPES:
        return DTYPES[STORAGE_DTYPES[short]].bits // 8
    if short in _QUANTIZED_WIDTHS:
        return _QUANTIZED_WIDTHS[short]
    raise _bad(f"storage `{escape(key)}` is of the unknown class `{escape(str(kind))}`", where)


def _lay_out(
    source: ByteSource,
    at: int,
    keys: Any,
    extents: dict[str, tuple[int, int]],
) -> dict[str, Storage]:
    where = source.name
    if type(keys) is not list or len(keys) > _MAX_STORAGES:
        raise _bad("the storage keys are not a list", where)
    storages: dict[str, Storage] = {}
    for key in keys:
        if type(key) is not str or key not in extents or key in storages:
            raise _bad(f"the storage key `{escape(describe(key))}` is unknown or repeated", where)
        stored = int.from_bytes(source.read(at, 8), "little")
        numel, width = extents[key]
        if stored != numel:
            raise _bad(f"storage `{escape(key)}` has {stored} elements, {numel} expected", where)
        begin, length = at + 8, numel * width
        if begin + length > source.size:
            raise FormatError(
                f"storage `{escape(key)}` ends at byte {begin + length}, the file at {source.size}",
                code="FC102",
                where=where,
                hint="the file is truncated; copy or download it again",
            )
        storages[key] = Storage(
            key=key,
            num_bytes=length,
            locate=lambda begin=begin: (source, begin),  # type: ignore[misc]
            where=f"{where}: storage {escape(key)}",
        )
        at = begin + length
    if at != source.size:
        raise _bad(f"{source.size - at} bytes follow the last storage", where)
    if missing := sorted(extents.keys() - storages.keys()):
        raise _bad(f"storage `{escape(missing[0])}` is referred to and not there", where)
    return storages


def _bad(message: str, where: str) -> FormatError:
    return FormatError(
        message, code="FC110", where=where, hint="the file is damaged or was altered"
    )
