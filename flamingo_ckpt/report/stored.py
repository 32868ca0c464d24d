"""Read a stored report back. It is a file like any other, so nothing in it is taken on trust."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import SCHEMA_VERSION, Report, from_document
from flamingo_ckpt.report.schema import first_problem
from flamingo_ckpt.tensors import escape

#: A report of ten thousand findings is a hundredth of it.
MAX_BYTES = 512 << 20
_MAX_DEPTH = 32
_MAJOR = SCHEMA_VERSION.partition(".")[0]


def read_report(path: str) -> Report:
    """The report in a file that `--json` or `--output` wrote.

    Raises:
        CkptError: FC002 where it cannot be read, FC011 where it is no report.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CkptError(
            f"cannot read the report: {error.strerror}", code="FC002", where=path
        ) from error
    return parse_report(data, path)


def parse_report(data: bytes, where: str) -> Report:
    """The report in the bytes of a file.

    Args:
        data: the bytes.
        where: the file, for messages.

    Raises:
        CkptError: FC011.
    """
    if len(data) > MAX_BYTES:
        _refuse(f"it is larger than {MAX_BYTES >> 20} MiB", where)
    try:
        document = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
        )
    except RecursionError:
        _refuse("it is nested too deeply", where)
    except ValueError as error:  # JSON and UTF-8 alike
        _refuse(f"it is not JSON ({_one_line(str(error))})", where)
    if _is_deep(document):
        _refuse("it is nested too deeply", where)
    _check_version(document, where)
    problem = first_problem(document) or _mismatch(document)
    if problem:
        _refuse(problem, where)
    return from_document(document)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        # readers disagree about which of the two counts
        raise ValueError(f"`{_one_line(twice)}` is there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _is_deep(document: Any) -> bool:
    """Whether it is nested deeper than any report; what renders it may recurse."""
    level = [document]
    for _ in range(_MAX_DEPTH):
        level = [child for one in level for child in _children(one)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_version(document: Any, where: str) -> None:
    version = document.get("schema_version") if isinstance(document, Mapping) else None
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        return  # the schema says what is wrong
    if version.partition(".")[0] != _MAJOR:
        raise CkptError(
            f"a report of schema version {version}; this tool reads {_MAJOR}.x",
            code="FC011",
            where=where,
            hint="render it with the version of flamingo-ckpt that wrote it",
        )


def _mismatch(document: Mapping[str, Any]) -> str | None:
    """What no schema can say: lists that have to be of one length, a verdict and its reasons."""
    summary = document["summary"]
    if document["command"]["name"] == "check":
        if document["verdict"] == "pass" and _speaks_against(document):
            return f"its verdict is `pass`, and {_speaks_against(document)}"
        summary = (document.get("parity") or {}).get("summary") or {}
    elif document["command"]["name"] != "parity":
        return None
    wanted = len(summary.get("passes") or ())
    for at, layer in enumerate(summary.get("layers") or ()):
        if len(layer["passes"]) != wanted:
            return f"layer {at} has {len(layer['passes'])} passes, and there are {wanted}"
    return None


def _speaks_against(document: Mapping[str, Any]) -> str:
    """What a check that passed cannot have found; "" where there is nothing."""
    if any(one["severity"] == "error" for one in document["findings"]):
        return "it has errors"
    for one in document.get("checks") or ():
        if one["status"] == "fail" or (one["status"] == "skip" and one["required"]):
            how = "failed" if one["status"] == "fail" else "is required and did not run"
            return f"the check `{_one_line(one['name'])}` {how}"
    return ""


def _one_line(text: str) -> str:
    return escape(text if len(text) <= 200 else text[:200] + "...")


def _refuse(why: str, where: str) -> NoReturn:
    raise CkptError(
        f"this is not a report: {why}",
        code="FC011",
        where=where,
        hint="`--json` and `--output report.json` write one; `report schema` says what it has",
    )
