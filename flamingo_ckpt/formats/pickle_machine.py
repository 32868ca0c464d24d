"""A pickle machine that builds inert values and can do nothing else.

It imports nothing, calls nothing, hashes nothing and compares nothing that comes from the file:
a global becomes a `Global` token, a call an `Inert` node. What the nodes mean is decided
afterwards (`torch_objects`), by exact match against a table.

Every quantity is bounded before it is used: lengths by the bytes that remain, the memo by the
number of opcodes, the opcodes by a constant. Opcodes: Python's `pickletools`, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import FormatError, UnsafeError
from flamingo_ckpt.formats.pickle_globals import is_dangerous
from flamingo_ckpt.formats.pickle_nodes import Collection, Global, Inert, Mapping, Persistent
from flamingo_ckpt.tensors import ByteSource, escape

#: A state dict of 334 tensors takes 8,000; a training checkpoint with its optimizer ten times that.
MAX_OPCODES = 4_000_000
MAX_PICKLE_BYTES = 64 << 20
_MAX_LINE = 4096
_WINDOW = 256 << 10


@dataclass(frozen=True, slots=True)
class Pickled:
    """The outcome of one pickle.

    Attributes:
        value: the root.
        end: offset of the first byte after it.
        globals: every global it names, in order of appearance.
        persistent: every persistent id in it.
    """

    value: Any
    end: int
    globals: tuple[Global, ...]
    persistent: tuple[Persistent, ...]


class _Cursor:
    """Bytes of a source, forward only, with every read checked against what remains."""

    def __init__(self, source: ByteSource, offset: int, end: int, where: str) -> None:
        self._source = source
        self._end = end
        self._where = where
        self._limit = offset + MAX_PICKLE_BYTES
        self._base = offset  # offset of window[0]
        self._window = b""
        self._at = 0  # position inside the window

    @property
    def offset(self) -> int:
        return self._base + self._at

    def _fill(self, wanted: int) -> None:
        offset = self.offset
        if offset + wanted > self._end:
            raise FormatError(
                f"the pickle ends in the middle of an opcode: {wanted} bytes are asked for at byte "
                f"{offset}, {self._end - offset} remain",
                code="FC102",
                where=self._where,
            )
        if offset + wanted > self._limit:
            raise FormatError(
                f"the pickle is longer than {MAX_PICKLE_BYTES} bytes",
                code="FC111",
                where=self._where,
            )
        take = min(max(wanted, _WINDOW), self._end - offset)
        self._window = self._source.read(offset, take)
        self._base, self._at = offset, 0

    def take(self, size: int) -> bytes:
        at = self._at
        if at + size > len(self._window):
            self._fill(size)
            at = self._at
        self._at = at + size
        return self._window[at : at + size]

    def line(self) -> bytes:
        """Up to the next newline, which is consumed and not returned."""
        if self._window.find(b"\n", self._at, self._at + _MAX_LINE) < 0:
            self._fill(min(_MAX_LINE, self._end - self.offset))
        stop = self._window.find(b"\n", self._at, self._at + _MAX_LINE)
        if stop < 0:
            raise FormatError(
                f"a line of the pickle at byte {self.offset} does not end within {_MAX_LINE} bytes",
                code="FC110",
                where=self._where,
            )
        found = self._window[self._at : stop]
        self._at = stop + 1
        return found


def read_pickle(source: ByteSource, offset: int, end: int, where: str) -> Pickled:
    """Run one pickle.

    Args:
        source: the bytes.
        offset: of its first byte.
        end: it may not read past this.
        where: what to call it in messages.

    Raises:
        FormatError: FC102, FC110 or FC111.
        UnsafeError: FC501 for a global that could run code.
    """
    return _Machine(_Cursor(source, offset, end, where), where).run()


class _Machine:
    def __init__(self, cursor: _Cursor, where: str) -> None:
        self.cursor = cursor
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.persistent: list[Persistent] = []

    def run(self) -> Pickled:
        take, table = self.cursor.take, _OPCODES
        for _ in range(MAX_OPCODES):
            opcode = take(1)[0]
            if opcode == _STOP:
                return self._finish()
            action = table.get(opcode)
            if action is None:
                raise self.bad(f"opcode 0x{opcode:02x} is unknown, or refused")
            action(self)
        raise FormatError(
            f"the pickle has more than {MAX_OPCODES} opcodes", code="FC111", where=self.where
        )

    def _finish(self) -> Pickled:
        if self.marks or len(self.stack) != 1:
            raise self.bad("the pickle stops with an unfinished value")
        return Pickled(
            self.stack[0],
            self.cursor.offset,
            tuple(self.globals.values()),
            tuple(self.persistent),
        )

    def bad(self, message: str) -> FormatError:
        return FormatError(
            f"{message} (before byte {self.cursor.offset})", code="FC110", where=self.where
        )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.bad("the pickle takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise self.bad("the pickle looks at an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.bad("the pickle closes a group that it did not open")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.cursor.take(struct.calcsize(layout)))
        return int(value)

    def take_sized(self, layout: str) -> bytes:
        size = self.number(layout)
        if size < 0:
            raise self.bad("a length is negative")
        return self.cursor.take(size)

    def text(self, raw: bytes, errors: str = "surrogatepass") -> str:
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.bad("a string is not UTF-8") from None

    def parse(self, convert: Callable[[bytes], Any], raw: bytes) -> Any:
        try:
            return convert(raw)
        except (ValueError, OverflowError):
            raise self.bad(f"`{escape(raw[:40].decode('latin-1'))}` is not a number") from None

    def remember(self, index: int) -> None:
        if index < 0:
            raise self.bad("a memo index is negative")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.bad(f"memo entry {index} was never set")
        self.push(self.memo[index])

    def find_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.bad("the name of a global is not a string")
        if len(module) + len(name) > _MAX_LINE:
            raise self.bad(f"the name of a global is longer than {_MAX_LINE} characters")
        found = self.globals.get((module, name))
        if found is None:
            if is_dangerous(module, name):
                raise UnsafeError(
                    f"the pickle names `{escape(module)}.{escape(name)}`, which could run code",
                    code="FC501",
                    where=self.where,
                    hint="do not load this file with any other tool; "
                    "ask its author for the weights alone, as safetensors",
                )
            found = self.globals[module, name] = Global(module, name)
        self.push(found)

    def group(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self.pop_mark()
        self.push(kind(items))

    def paired(self, items: list[Any]) -> list[tuple[Any, Any]]:
        if len(items) % 2:
            raise self.bad("a dict has a key without a value")
        return list(zip(items[::2], items[1::2], strict=True))

    def set_pairs(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, Mapping | Inert):
            raise self.bad("items are set on something that is not a dict")
        target.pairs.extend(self.paired(items))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise self.bad("items are appended to something that is not a list")

    def add(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, Collection | Inert):
            raise self.bad("items are added to something that is not a set")
        target.items.extend(items)

    def call(self, function: Any, args: Any) -> None:
        if type(args) is not tuple:
            raise self.bad("the arguments of a call are not a tuple")
        self.push(Inert(function, args))

    def instance(self, items: list[Any]) -> None:
        if not items:
            raise self.bad("an instance has no class")
        self.push(Inert(items[0], tuple(items[1:])))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if not isinstance(target, Inert):
            raise self.bad("state is set on something that is not an object")
        target.states.append(state)

    def persist(self) -> None:
        found = Persistent(self.pop())
        self.persistent.append(found)
        self.push(found)

    def proto(self) -> None:
        version = self.number("<B")
        if version > 5:
            raise self.bad(f"pickle protocol {version} does not exist")

    def frame(self) -> None:
        self.number("<Q")  # only a hint for buffering: lengths inside are checked one by one

    def integer(self) -> None:
        raw = self.cursor.line()
        self.push({b"00": False, b"01": True}.get(raw))
        if self.stack[-1] is None:
            self.stack[-1] = self.parse(int, raw)

    def quoted(self) -> None:
        raw = self.cursor.line()
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
            raise self.bad("a string is not quoted")
        try:
            decoded, _ = codecs.escape_decode(raw[1:-1])
        except ValueError:
            raise self.bad("a string has a bad escape") from None
        self.push(_python2_text(decoded))

    def raw_unicode(self) -> None:
        try:
            self.push(self.cursor.line().decode("raw-unicode-escape"))
        except UnicodeDecodeError:
            raise self.bad("a string has a bad escape") from None

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise self.bad("a tuple takes more values than there are")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def newobj(self, with_keywords: bool) -> None:
        keywords = self.pop() if with_keywords else None
        args, function = self.pop(), self.pop()
        self.call(function, args)
        if keywords is not None:
            self.stack[-1].states.append(keywords)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.call(function, args)

    def named_instance(self) -> None:
        module, name = self.text(self.cursor.line()), self.text(self.cursor.line())
        args = self.pop_mark()
        self.find_global(module, name)
        self.push(Inert(self.pop(), tuple(args)))

    def long_text(self) -> None:
        raw = self.cursor.line()
        self.push(self.parse(int, raw[:-1] if raw.endswith(b"L") else raw))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.find_global(module, name)


def _python2_text(raw: bytes) -> str | bytes:
    """Python 2 wrote text and bytes alike: text where it decodes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _open_mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop_one(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


_Action = Callable[[_Machine], Any]
_STOP = ord(".")
# Not here, hence refused: EXT1/2/4 (a registry of the reading process), PERSID (torch never writes
# it), NEXT_BUFFER and READONLY_BUFFER (bytes from outside the file).
_OPCODES: dict[int, _Action] = {
    ord("("): _open_mark,
    ord("0"): _pop_one,
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: m.push(m.top()),
    ord("F"): lambda m: m.push(m.parse(float, m.cursor.line())),
    ord("I"): _Machine.integer,
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("L"): _Machine.long_text,
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("N"): lambda m: m.push(None),
    ord("Q"): _Machine.persist,
    ord("R"): _Machine.reduce,
    ord("S"): _Machine.quoted,
    ord("T"): lambda m: m.push(_python2_text(m.take_sized("<i"))),
    ord("U"): lambda m: m.push(_python2_text(m.take_sized("<B"))),
    ord("V"): _Machine.raw_unicode,
    ord("X"): lambda m: m.push(m.text(m.take_sized("<I"))),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("b"): _Machine.build,
    ord("c"): lambda m: m.find_global(m.text(m.cursor.line()), m.text(m.cursor.line())),
    ord("d"): lambda m: m.group(lambda items: Mapping(m.paired(items))),
    ord("}"): lambda m: m.push(Mapping()),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("g"): lambda m: m.recall(m.parse(int, m.cursor.line())),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("i"): _Machine.named_instance,
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("l"): lambda m: m.group(list),
    ord("]"): lambda m: m.push([]),
    ord("o"): lambda m: m.instance(m.pop_mark()),
    ord("p"): lambda m: m.remember(m.parse(int, m.cursor.line())),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    ord("s"): lambda m: m.set_pairs([*reversed((m.pop(), m.pop()))]),
    ord("t"): lambda m: m.group(tuple),
    ord(")"): lambda m: m.push(()),
    ord("u"): lambda m: m.set_pairs(m.pop_mark()),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.cursor.take(8))[0]),
    0x80: _Machine.proto,
    0x81: lambda m: m.newobj(with_keywords=False),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x8A: lambda m: m.push(int.from_bytes(m.take_sized("<B"), "little", signed=True)),
    0x8B: lambda m: m.push(int.from_bytes(m.take_sized("<i"), "little", signed=True)),
    ord("B"): lambda m: m.push(m.take_sized("<I")),
    ord("C"): lambda m: m.push(m.take_sized("<B")),
    0x8C: lambda m: m.push(m.text(m.take_sized("<B"))),
    0x8D: lambda m: m.push(m.text(m.take_sized("<Q"))),
    0x8E: lambda m: m.push(m.take_sized("<Q")),
    0x8F: lambda m: m.push(Collection([])),
    0x90: lambda m: m.add(m.pop_mark()),
    0x91: lambda m: m.group(Collection),
    0x92: lambda m: m.newobj(with_keywords=True),
    0x93: _Machine.stack_global,
    0x94: lambda m: m.remember(len(m.memo)),
    0x95: _Machine.frame,
    0x96: lambda m: m.push(m.take_sized("<Q")),
}
