"""A strict reader of zip archives that torch and numpy write.

Every reader of zip files takes some shortcut, and each shortcut lets two programs see two different
archives in one file. Here the central directory is the authority, and the local header of a record
must say the same before a byte of it is used. Spec: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from flamingo_ckpt.errors import Finding, FormatError
from flamingo_ckpt.formats.checksum import crc32
from flamingo_ckpt.formats.source import InflatedSource
from flamingo_ckpt.tensors import ByteSource, escape

LOCAL_MAGIC = b"PK\3\4"
_CENTRAL_MAGIC = b"PK\1\2"
_END_MAGIC = b"PK\5\6"
_END64_MAGIC = b"PK\6\6"
_LOCATOR64_MAGIC = b"PK\6\7"
_STORED, _DEFLATED = 0, 8
_DESCRIPTOR_FLAG, _UTF8_FLAG, _DEFLATE_OPTION_FLAGS = 0x0008, 0x0800, 0x0006
_KNOWN_FLAGS = _DESCRIPTOR_FLAG | _UTF8_FLAG | _DEFLATE_OPTION_FLAGS
_MAX_ENTRIES = 1_000_000
_MAX_DIRECTORY_BYTES = 256 << 20
#: An archive may inflate to at most this many times its size. Trained weights stay below 2, zeros
#: reach deflate's limit of 1032.
MAX_INFLATE_RATIO = 200
# What a small archive may hold of zeros besides.
_FREE_INFLATED_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One record, as the central directory states it."""

    name: str
    method: int
    flags: int
    crc32: int
    stored_bytes: int
    num_bytes: int
    header_offset: int


class ZipArchive:
    """The records of an archive, by name.

    Args:
        source: the file.

    Raises:
        FormatError: FC102, FC103, FC104, FC106, FC109 or FC111, naming the record.
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self._where = source.name
        if source.size < 22:
            raise self._bad(f"{source.size} bytes cannot hold a zip archive", "FC102")
        if source.read(0, 4) != LOCAL_MAGIC:
            raise self._bad("it does not begin with a zip record")
        self._directory_offset, directory, count = self._find_directory()
        self.entries = self._parse_directory(directory, count)
        self._check_total()
        self._limits = self._lay_out()
        self._begins: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def locate(self, name: str) -> tuple[ByteSource, int]:
        """(source, offset) of a record's bytes, after its local header has been checked."""
        entry = self.entries[name]
        begin = self._begins.get(name)
        if begin is None:
            begin = self._begins[name] = self._find_payload(entry)
        if entry.method == _STORED:
            return self.source, begin
        # A new one each time: a decompressor's window is not kept for every record.
        label = f"{self._where}:{escape(name)}"
        return InflatedSource(self.source, begin, entry.stored_bytes, entry.num_bytes, label), 0

    def read(self, name: str, limit: int) -> bytes:
        """A whole small record, its CRC checked. Raises FC111 above `limit` bytes."""
        entry = self.entries[name]
        if entry.num_bytes > limit:
            raise self._bad(
                f"record `{escape(name)}` has {entry.num_bytes} bytes, at most {limit} are read",
                "FC111",
            )
        source, offset = self.locate(name)
        data = source.read(offset, entry.num_bytes)
        if entry.crc32 and crc32(data) != entry.crc32:
            raise self._bad(
                f"record `{escape(name)}` fails its CRC-32: stored {entry.crc32:08x}, "
                f"computed {crc32(data):08x}",
                "FC105",
            )
        return data

    def without_checksum(self) -> list[str]:
        """Records with content whose CRC-32 the writer left out: 0 stands there."""
        return [name for name, one in self.entries.items() if one.num_bytes and not one.crc32]

    def check(self) -> None:
        """Check the local header of every record."""
        for name in self.entries:
            self.locate(name)

    # -- central directory

    def _find_directory(self) -> tuple[int, bytes, int]:
        size = self.source.size
        tail_bytes = 22
        tail = self.source.read(size - tail_bytes, tail_bytes)
        if tail.rfind(_END_MAGIC) != 0:  # a comment follows, which may be as long as this
            tail_bytes = min(size, 22 + 0xFFFF)
            tail = self.source.read(size - tail_bytes, tail_bytes)
        at = tail.rfind(_END_MAGIC)
        if at < 0 or len(tail) - at < 22:
            raise FormatError(
                "the end of the zip directory is not there: the file is truncated, "
                "or has bytes after its end",
                code="FC102",
                where=self._where,
                hint="copy or download the file again",
            )
        disk, start_disk, here, count, length, offset, comment = struct.unpack_from(
            "<HHHHIIH", tail, at + 4
        )
        end = size - tail_bytes + at
        if end + 22 + comment != size:
            raise self._bad(f"{size - end - 22 - comment} bytes follow the end of the archive")
        locator = end - 20
        if locator >= 0 and self.source.read(locator, 4) == _LOCATOR64_MAGIC:
            return self._find_directory64(locator, (count, length, offset))
        if disk or start_disk or here != count:
            raise self._bad("it spans several disks")
        if count == 0xFFFF or 0xFFFFFFFF in (length, offset):
            raise self._bad("zip64 sizes are announced, but there is no zip64 record")
        return self._read_directory(offset, length, count, end)

    def _find_directory64(
        self, locator: int, narrow: tuple[int, int, int]
    ) -> tuple[int, bytes, int]:
        disk, offset64, disks = struct.unpack("<IQI", self.source.read(locator + 4, 16))
        if disk or disks != 1 or offset64 + 56 > locator:
            raise self._bad("the zip64 locator points outside, or to another disk")
        record = self.source.read(offset64, 56)
        magic, record_size = struct.unpack_from("<4sQ", record)
        disk, start_disk, here, count, length, offset = struct.unpack_from("<IIQQQQ", record, 16)
        if magic != _END64_MAGIC or offset64 + 12 + record_size != locator:
            raise self._bad("the zip64 end record is not where its locator says")
        if disk or start_disk or here != count:
            raise self._bad("it spans several disks")
        for wide, small, mask in zip(
            (count, length, offset), narrow, (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True
        ):
            if small not in (mask, wide):
                raise self._bad("the zip64 end record contradicts the end record")
        return self._read_directory(offset, length, count, offset64)

    def _read_directory(
        self, offset: int, length: int, count: int, end: int
    ) -> tuple[int, bytes, int]:
        if offset + length != end:
            raise self._bad(f"the directory should end at byte {end}, it ends at {offset + length}")
        if length > _MAX_DIRECTORY_BYTES or count > _MAX_ENTRIES:
            raise self._bad(f"{count} records in a directory of {length} bytes", "FC111")
        return offset, self.source.read(offset, length), count

    def _parse_directory(self, directory: bytes, count: int) -> dict[str, ZipEntry]:
        entries: dict[str, ZipEntry] = {}
        at = 0
        for _ in range(count):
            entry, at = self._parse_central(directory, at)
            if entry.name in entries:
                raise self._bad(f"two records are named `{escape(entry.name)}`", "FC104")
            entries[entry.name] = entry
        if at != len(directory):
            raise self._bad(f"the directory has {len(directory) - at} bytes too many")
        return entries

    def _parse_central(self, directory: bytes, at: int) -> tuple[ZipEntry, int]:
        if len(directory) - at < 46 or directory[at : at + 4] != _CENTRAL_MAGIC:
            raise self._bad("the directory ends before its last record, or is damaged")
        fields = struct.unpack_from("<HHHHHHIIIHHHHHII", directory, at + 4)
        _, _, flags, method, _, _, crc, stored, size, name_len, extra_len, comment_len = fields[:12]
        disk, header_offset = fields[12], fields[15]
        end = at + 46 + name_len + extra_len + comment_len
        if end > len(directory):
            raise self._bad("a record of the directory runs past its end")
        name = self._decode_name(directory[at + 46 : at + 46 + name_len], flags)
        extra = directory[at + 46 + name_len : at + 46 + name_len + extra_len]
        size, stored, header_offset = self._widen(name, extra, (size, stored, header_offset))
        entry = ZipEntry(name, method, flags, crc, stored, size, header_offset)
        self._check_entry(entry, disk)
        return entry, end

    def _check_entry(self, entry: ZipEntry, disk: int) -> None:
        name = escape(entry.name)
        if disk not in (0, 0xFFFF):
            raise self._bad(f"record `{name}` lies on another disk")
        if entry.flags & ~_KNOWN_FLAGS:
            raise self._bad(
                f"record `{name}` has flags 0x{entry.flags:04x}: encrypted or of an unknown kind"
            )
        if entry.method not in (_STORED, _DEFLATED):
            raise self._bad(f"record `{name}` is compressed by method {entry.method}")
        if entry.method == _STORED and entry.stored_bytes != entry.num_bytes:
            raise self._bad(
                f"record `{name}` is stored, but {entry.stored_bytes} bytes are said to be "
                f"{entry.num_bytes}"
            )

    def _check_total(self) -> None:
        """The records together may not inflate too far; one of zeros among others may."""
        total = sum(entry.num_bytes for entry in self.entries.values())
        if total > _FREE_INFLATED_BYTES + self.source.size * MAX_INFLATE_RATIO:
            raise FormatError(
                f"the archive inflates from {self.source.size} to {total} bytes, more than "
                f"{MAX_INFLATE_RATIO} times",
                code="FC109",
                where=self._where,
                hint="if it is not a bomb, unpack it and pack it again without compression",
            )

    def _lay_out(self) -> dict[str, int]:
        """Where each record must end at the latest: at the next header, or at the directory."""
        ordered = sorted(self.entries.values(), key=lambda entry: entry.header_offset)
        limits: dict[str, int] = {}
        for entry, following in zip(ordered, [*ordered[1:], None], strict=True):
            limit = following.header_offset if following else self._directory_offset
            if entry.header_offset + 30 + entry.stored_bytes > limit:
                raise self._overlap(entry)
            limits[entry.name] = limit
        if ordered and ordered[0].header_offset != 0:
            raise self._bad(f"{ordered[0].header_offset} bytes stand before the first record")
        return limits

    # -- local headers

    def _find_payload(self, entry: ZipEntry) -> int:
        """Offset of the payload, once the local header is found to agree with the directory."""
        name = escape(entry.name)
        fixed = self.source.read(entry.header_offset, 30)
        if fixed[:4] != LOCAL_MAGIC:
            raise self._bad(f"record `{name}` has no header at byte {entry.header_offset}")
        _, flags, method, _, _, crc, stored, size, name_len, extra_len = struct.unpack(
            "<HHHHHIIIHH", fixed[4:]
        )
        rest = self.source.read(entry.header_offset + 30, name_len + extra_len)
        if self._decode_name(rest[:name_len], flags) != entry.name:
            raise self._bad(f"the header of record `{name}` gives it another name")
        if (flags, method) != (entry.flags, entry.method):
            raise self._bad(f"the header of record `{name}` gives other flags or another method")
        size, stored, _ = self._widen(entry.name, rest[name_len:], (size, stored, 0))
        deferred = bool(flags & _DESCRIPTOR_FLAG) and (crc, stored, size) == (0, 0, 0)
        if not deferred and (crc, stored, size) != (
            entry.crc32,
            entry.stored_bytes,
            entry.num_bytes,
        ):
            raise self._bad(f"the header of record `{name}` gives another size or CRC-32")
        begin = int(entry.header_offset + 30 + name_len + extra_len)
        self._check_extent(entry, begin)
        return begin

    def _check_extent(self, entry: ZipEntry, begin: int) -> None:
        """The payload, and its descriptor where there is one, end right at the next record."""
        end = begin + entry.stored_bytes
        limit = self._limits[entry.name]
        if end > limit:
            raise self._overlap(entry)
        gap = limit - end
        if entry.flags & _DESCRIPTOR_FLAG and gap in (12, 16, 20, 24):
            self._check_descriptor(entry, self.source.read(end, gap))
        elif gap:
            raise self._bad(
                f"{gap} bytes between record `{escape(entry.name)}` and the next belong to neither",
                "FC103",
            )

    def _check_descriptor(self, entry: ZipEntry, raw: bytes) -> None:
        body = raw[4:] if raw[:4] == b"PK\7\x08" and len(raw) in (16, 24) else raw
        if len(body) not in (12, 20):
            raise self._bad(f"the descriptor of record `{escape(entry.name)}` is damaged")
        facts = struct.unpack("<III" if len(body) == 12 else "<IQQ", body)
        if facts != (entry.crc32, entry.stored_bytes, entry.num_bytes):
            raise self._bad(
                f"the descriptor of record `{escape(entry.name)}` gives another size or CRC-32"
            )

    # -- details of the format

    def _decode_name(self, raw: bytes, flags: int) -> str:
        try:
            return raw.decode("utf-8") if flags & _UTF8_FLAG else raw.decode("cp437")
        except UnicodeDecodeError:
            raise self._bad("a record's name is not UTF-8, though its flag says so") from None

    def _widen(self, name: str, extra: bytes, narrow: tuple[int, int, int]) -> tuple[int, ...]:
        """Replace 0xFFFFFFFF in (size, stored size, offset) by the zip64 field's values."""
        values, wide, at = list(narrow), b"", 0
        while at < len(extra):
            if len(extra) - at < 4:
                break  # torch pads with one to three bytes where no whole field fits
            kind, length = struct.unpack_from("<HH", extra, at)
            if at + 4 + length > len(extra):
                raise self._bad(f"an extra field of record `{escape(name)}` runs past its end")
            if kind == 1:
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        for index, value in enumerate(values):
            if value != 0xFFFFFFFF:
                continue
            if len(wide) < 8:
                raise self._bad(f"record `{escape(name)}` lacks its zip64 sizes", "FC106")
            values[index], wide = struct.unpack_from("<Q", wide)[0], wide[8:]
        return tuple(values)

    def _overlap(self, entry: ZipEntry) -> FormatError:
        return self._bad(f"record `{escape(entry.name)}` overlaps what follows it", "FC103")

    def _bad(self, message: str, code: str = "FC106") -> FormatError:
        return FormatError(
            message,
            code=code,
            where=self._where,
            hint="if torch or numpy wrote this file, it was damaged or altered since",
        )


def no_checksums(where: str, names: list[str]) -> list[Finding]:
    """FC114 for records whose writer left the checksum out."""
    if not names:
        return []
    return [
        Finding(
            code="FC114",
            severity="info",
            detail=f"{len(names)} records of `{where}` carry no checksum: damage in them cannot be "
            "noticed",
        )
    ]
