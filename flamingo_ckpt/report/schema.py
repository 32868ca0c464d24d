"""The JSON Schema of reports, and as much of a validator as it takes to read one back.

The schema is the file beside this one, in draft 2020-12. The validator knows the keywords that the
file uses; tests hold it to a whole one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from flamingo_ckpt.tensors import escape

_FILE = "schema-v1.json"
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


def schema_text() -> str:
    """The file."""
    return resources.files("flamingo_ckpt.report").joinpath(_FILE).read_text("utf-8")


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(schema_text())
    return loaded


def first_problem(document: Any) -> str | None:
    """The first thing that keeps a document from being a report, in words; None where it is one."""
    return next(_problems(document, _schema(), ""), None)


def _problems(value: Any, schema: Any, at: str) -> Iterator[str]:
    """What is wrong with a value, keyword by keyword."""
    for keyword, wanted in schema.items():
        if keyword in _KEYWORDS:
            yield from _KEYWORDS[keyword](value, wanted, at, schema)


def _fits(value: Any, schema: Any) -> bool:
    return next(_problems(value, schema, ""), None) is None


def _type(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    names = wanted if isinstance(wanted, list) else [wanted]
    if not any(_TYPES[name](value) for name in names):
        yield f"{_place(at)} is {_shown(value)}, not of type {' or '.join(names)}"


def _const(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    # JSON's true is not 1
    if type(value) is not type(wanted) or value != wanted:
        yield f"{_place(at)} is {_shown(value)}, not {json.dumps(wanted)}"


def _enum(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if not any(type(value) is type(one) and value == one for one in wanted):
        told = ", ".join(map(json.dumps, wanted))
        yield f"{_place(at)} is {_shown(value)}, not one of {told}"


def _required(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (
            f"{_place(_below(at, name))} is missing" for name in wanted if name not in value
        )


def _properties(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, schema in wanted.items():
            if name in value:
                yield from _problems(value[name], schema, _below(at, name))


def _additional(value: Any, wanted: Any, at: str, schema: Any) -> Iterator[str]:
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, item in value.items():
            if name not in known:
                yield from _problems(item, wanted, _below(at, name))


def _items(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _problems(item, wanted, f"{at}[{number}]")


def _least(kind: type[Any], what: str) -> Callable[..., Iterator[str]]:
    def check(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
        if isinstance(value, kind) and len(value) < wanted:
            yield f"{_place(at)} has {len(value)} {what}, fewer than {wanted}"

    return check


def _most(kind: type[Any], what: str) -> Callable[..., Iterator[str]]:
    def check(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
        if isinstance(value, kind) and len(value) > wanted:
            yield f"{_place(at)} has {len(value)} {what}, more than {wanted}"

    return check


def _minimum(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if _TYPES["number"](value) and not value >= wanted:
        yield f"{_place(at)} is {_shown(value)}, less than {wanted}"


def _maximum(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if _TYPES["number"](value) and not value <= wanted:
        yield f"{_place(at)} is {_shown(value)}, more than {wanted}"


def _pattern(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if isinstance(value, str) and not re.search(wanted, value):
        yield f"{_place(at)} is {_shown(value)}, which does not look like one"


def _ref(value: Any, wanted: Any, at: str, _: Any) -> Iterator[str]:
    yield from _problems(value, _schema()["$defs"][wanted.removeprefix("#/$defs/")], at)


def _all_of(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    for schema in wanted:
        yield from _problems(value, schema, at)


def _any_of(value: Any, wanted: Any, at: str, _schema: Any) -> Iterator[str]:
    if not any(_fits(value, schema) for schema in wanted):
        yield f"{_place(at)} is {_shown(value)}, which is none of what it may be"


def _if(value: Any, wanted: Any, at: str, schema: Any) -> Iterator[str]:
    if _fits(value, wanted):
        yield from _problems(value, schema["then"], at)


_KEYWORDS: Mapping[str, Callable[[Any, Any, str, Any], Iterator[str]]] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "minItems": _least(list, "items"),
    "maxItems": _most(list, "items"),
    "minProperties": _least(dict, "fields"),
    "maxProperties": _most(dict, "fields"),
    "minimum": _minimum,
    "maximum": _maximum,
    "pattern": _pattern,
    "$ref": _ref,
    "allOf": _all_of,
    "anyOf": _any_of,
    "if": _if,
}


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _place(at: str) -> str:
    return f"`{escape(at if len(at) <= 120 else at[:120] + '...')}`" if at else "the document"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "too large"
    return escape(text if len(text) <= 60 else text[:60] + "...")
