"""Lay out a zip of stored records whose checksums are known only after the data is written.

As torch writes it: sizes and CRC-32 stand in a data descriptor after each payload and in the
central directory, and an extra field `FB` pads the payload to an alignment. Zip64 where a size or
an offset asks for it. Spec: PKWARE APPNOTE 6.3.10; caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.checksum import crc32, crc32_combine
from flamingo_ckpt.formats.layout import Checksums, FileLayout
from flamingo_ckpt.tensors import escape

_FLAGS = 0x0808  # descriptor follows, names are UTF-8
_DATE_1980 = 0x0021
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Record:
    name: bytes
    head: bytes  # known bytes at the start of the payload
    tensor: str | None  # the tensor that follows them
    tensor_bytes: int
    header_offset: int
    local: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.head) + self.tensor_bytes

    @property
    def payload_offset(self) -> int:
        return self.header_offset + len(self.local)

    @property
    def descriptor_bytes(self) -> int:
        if self.num_bytes == 0:
            return 0
        return 24 if max(self.num_bytes, self.header_offset) >= _MASK32 else 16

    @property
    def end(self) -> int:
        return self.payload_offset + self.num_bytes + self.descriptor_bytes


class ZipLayout:
    """Records in the order they are added.

    Args:
        alignment: of every payload, in bytes; 1 for none.
    """

    def __init__(self, alignment: int = 1) -> None:
        self._alignment = alignment
        self._records: list[_Record] = []

    def add(self, name: str, head: bytes, *, tensor: str | None = None, num_bytes: int = 0) -> None:
        """Add a record: known bytes, and behind them those of a tensor."""
        encoded = name.encode("utf-8", "surrogatepass")
        if len(encoded) > 0xFFFF:
            raise CkptError(
                f"the name `{escape(name[:60])}...` is too long for a zip record", code="FC505"
            )
        at = self._records[-1].end if self._records else 0
        wide = len(head) + num_bytes >= _MASK32
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) if wide else b""
        if self._alignment > 1:
            # The padding field's own four bytes stand before what it pads.
            begin = at + 30 + len(encoded) + len(extra) + 4
            extra += struct.pack("<2sH", b"FB", -begin % self._alignment)
            extra += b"Z" * (-begin % self._alignment)
        local = struct.pack(
            "<4sHHHHHIIIHH",
            *(
                b"PK\3\4",
                45 if wide else 0,
                _FLAGS,
                0,
                0,
                _DATE_1980 if self._alignment == 1 else 0,
            ),
            *(0, 0, 0, len(encoded), len(extra)),
        )
        local += encoded + extra
        self._records.append(_Record(encoded, head, tensor, num_bytes, at, local))

    def lay_out(self, file: str) -> FileLayout:
        """The finished layout."""
        offsets: dict[str, int] = {}
        copies: dict[str, tuple[int, ...]] = {}
        for record in self._records:
            if record.tensor is None:
                continue
            place = record.payload_offset + len(record.head)
            if record.tensor in offsets:
                copies[record.tensor] = (*copies.get(record.tensor, ()), place)
            else:
                offsets[record.tensor] = place
        zeros = {record.tensor: 0 for record in self._records if record.tensor}
        (at, tail) = self._directory(zeros)
        return FileLayout(
            file=file,
            num_bytes=at + len(tail),
            offsets=offsets,
            copies=copies,
            finish=self._finish,
            needs_crc=True,
        )

    def _finish(self, checksums: Checksums) -> Sequence[tuple[int, bytes]]:
        parts: list[tuple[int, bytes]] = []
        for record in self._records:
            parts.append((record.header_offset, record.local + record.head))
            if record.descriptor_bytes:
                layout = "<4sIQQ" if record.descriptor_bytes == 24 else "<4sIII"
                size = record.num_bytes
                descriptor = struct.pack(layout, b"PK\7\x08", _crc(record, checksums), size, size)
                parts.append((record.end - len(descriptor), descriptor))
        parts.append(self._directory(checksums))
        return parts

    def _directory(self, checksums: Checksums) -> tuple[int, bytes]:
        begin = self._records[-1].end if self._records else 0
        entries = b"".join(_central(record, _crc(record, checksums)) for record in self._records)
        count, length = len(self._records), len(entries)
        end = b""
        if count >= 0xFFFF or begin >= _MASK32 or length >= _MASK32:
            end += struct.pack(
                "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, begin
            )
            end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + length, 1)
        end += struct.pack(
            "<4sHHHHIIH",
            *(b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF)),
            *(min(length, _MASK32), min(begin, _MASK32), 0),
        )
        return begin, entries + end


def _crc(record: _Record, checksums: Checksums) -> int:
    head = crc32(record.head)
    if record.tensor is None or not record.tensor_bytes:
        return head
    return crc32_combine(head, checksums[record.tensor], record.tensor_bytes)


def _central(record: _Record, crc: int) -> bytes:
    size, offset, extra = record.num_bytes, record.header_offset, b""
    if size >= _MASK32:
        extra += struct.pack("<QQ", size, size)
    if offset >= _MASK32:
        extra += struct.pack("<Q", offset)
    if extra:
        extra = struct.pack("<HH", 1, len(extra)) + extra
    date = struct.unpack_from("<H", record.local, 12)[0]
    fixed = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        *(b"PK\1\2", 45 if extra else 0, 45 if extra else 0, _FLAGS, 0, 0, date, crc),
        *(min(size, _MASK32), min(size, _MASK32), len(record.name), len(extra), 0, 0, 0, 0),
        min(offset, _MASK32),
    )
    return fixed + record.name + extra
