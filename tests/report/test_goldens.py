"""Every verb's report is the golden one, and fits the schema that is shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.cli.main import VERBS
from flamingo_ckpt.report import schema as own
from flamingo_ckpt.report.schema import first_problem, schema_text
from tests.hub_server import serving
from tests.report import goldens
from tests.support import FIXTURES, cli, cli_ok

STORED = goldens.stored()
SCHEMA: dict[str, Any] = json.loads(schema_text())
WHOLE = jsonschema.Draft202012Validator(SCHEMA)
each_golden = pytest.mark.parametrize("document", STORED.values(), ids=list(STORED))


@pytest.mark.parametrize("name", goldens.CASES)
def test_a_verb_says_what_it_said(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch) as hub:
        hub.push_folder(goldens.REPO, FIXTURES / "hf-bin")
        document, code = goldens.run(name, tmp_path)
    assert document["exit_code"] == code
    if request.config.getoption("--update-goldens"):
        goldens.write(name, document)
    assert document == json.loads((goldens.GOLDEN / f"{name}.json").read_text())


def test_every_verb_has_a_golden_report() -> None:
    told = {document["command"]["name"] for document in STORED.values()}
    assert told == set(VERBS)


@each_golden
def test_golden_reports_fit_the_schema(document: dict[str, Any]) -> None:
    WHOLE.validate(document)
    assert first_problem(document) is None


def test_the_schema_is_a_schema_and_is_printed() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert cli_ok("report", "schema").out == schema_text()


def keywords(schema: Any) -> Iterator[str]:
    """Every keyword that a schema uses."""
    if isinstance(schema, bool):
        return
    for keyword, value in schema.items():
        yield keyword
        if keyword in ("properties", "$defs"):
            for inner in value.values():
                yield from keywords(inner)
        elif keyword in ("allOf", "anyOf"):
            for inner in value:
                yield from keywords(inner)
        elif keyword in ("items", "additionalProperties", "if", "then"):
            yield from keywords(value)


def test_what_reads_reports_back_knows_every_keyword_of_the_schema() -> None:
    silent = {"$schema", "$id", "$defs", "title", "description", "then"}
    assert set(keywords(SCHEMA)) - silent == set(own._KEYWORDS)


ODD = [None, True, 0, 1, -1, 2.5, 1e400, "", "x", "nan", [], ["x"], {}, {"x": 1}, 1 << 70]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else ()
    for key, item in [*items, *(enumerate(value[:3]) if isinstance(value, list) else ())]:
        yield from places(item, (*at, key))


def changed(document: Any, at: tuple[Any, ...], value: Any, *, drops: bool) -> Any:
    """A copy with one field replaced, or left out."""
    if not at:
        return value
    first, *rest = at
    copy = dict(document) if isinstance(document, dict) else list(document)
    if not rest and drops and isinstance(copy, dict):
        del copy[first]
    else:
        copy[first] = changed(copy[first], tuple(rest), value, drops=drops)
    return copy


@given(data=st.data(), name=st.sampled_from(sorted(STORED)), drops=st.booleans())
def test_the_small_validator_says_what_a_whole_one_says(
    data: st.DataObject, name: str, drops: bool
) -> None:
    document = STORED[name]
    at = data.draw(st.sampled_from(list(places(document))))
    spoilt = changed(document, at, data.draw(st.sampled_from(ODD)), drops=drops)
    assert (first_problem(spoilt) is None) == WHOLE.is_valid(spoilt)


def test_fields_that_are_not_known_are_allowed_and_ours_are_not_loose() -> None:
    document = {**STORED["verify"], "news": 1, "schema_version": "1.7"}
    document["summary"] = {**document["summary"], "more": 2}
    assert first_problem(document) is None
    for at, value, told in (
        (("summary", "bit_exact"), -1, "`summary.bit_exact` is -1, less than 0"),
        (("summary", "bit_exact"), True, "`summary.bit_exact` is true, not of type integer"),
        (("verdict",), "fine", '`verdict` is "fine", not one of "pass", "fail", "error", "inco'),
        (("exit_code",), 1, "`exit_code` is 1, not one of 0"),
        (("unverified",), None, "`unverified` is null, not of type array"),
        (("tool", "name"), "x", '`tool.name` is "x", not "flamingo-ckpt"'),
        (("inputs", 0, "uri"), 3, "`inputs[0].uri` is 3, not of type string"),
        (("schema_version",), "2.0", '`schema_version` is "2.0", which does not look like one'),
    ):
        assert (first_problem(changed(document, at, value, drops=False)) or "").startswith(told)
    assert first_problem([]) == "the document is an array, not of type object"


def test_the_schema_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    assert cli_ok("report", "schema", "-q", "--output", path).out == ""
    assert path.read_text() == schema_text()
    outcome = cli("report", "schema", "--output", tmp_path / "schema.md")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the schema is JSON" in outcome.err
