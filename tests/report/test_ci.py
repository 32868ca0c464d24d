"""SARIF, JUnit and GitHub: what a CI reads of a report, and what it must never read into it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest

from flamingo_ckpt.codes import TABLE
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report, from_document
from flamingo_ckpt.report.github import MAX_ANNOTATIONS, to_annotations, to_step_summary
from flamingo_ckpt.report.junit import to_junit
from flamingo_ckpt.report.markdown import to_markdown
from flamingo_ckpt.report.sarif import to_sarif
from tests.report import goldens
from tests.report.check_support import check, release
from tests.report.parity_support import HOSTILE

STORED = {name: from_document(document) for name, document in goldens.stored().items()}
each_report = pytest.mark.parametrize("told", STORED.values(), ids=list(STORED))


def with_findings(*findings: Finding, **changes: Any) -> Report:
    return replace(check(), findings=findings, **changes)


def one(detail: str = "x", code: str = "FC203", severity: str = "error", **data: Any) -> Finding:
    return Finding(code=code, severity=severity, detail=detail, key="k", data=data)


# --- SARIF ----------------------------------------------------------------------------------------


def run_of(report: Report) -> dict[str, Any]:
    log = json.loads(to_sarif(report))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert isinstance(run, dict)
    return run


@each_report
def test_each_finding_is_a_result_of_a_rule(told: Report) -> None:
    run = run_of(told)
    rules = run["tool"]["driver"]["rules"]
    assert [result["ruleId"] for result in run["results"]] == [f.code for f in told.findings]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["locations"]
    for rule in rules:
        assert rule["help"]["text"]
        assert rule["shortDescription"]["text"] == TABLE[rule["id"]].title
        assert "helpUri" not in rule
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] == (told.verdict in ("pass", "fail"))
    assert invocation["exitCode"] == told.exit_code


def test_places_of_results() -> None:
    license_, diverges, *_, gate, waived = run_of(check())["results"]
    (location,) = license_["locations"]
    assert location["physicalLocation"] == {
        "artifactLocation": {"uri": "out/README.md"},
        "region": {"startLine": 1},
    }
    assert "logicalLocations" not in location
    # code scanning wants a file: the release itself, where a finding is of none
    assert diverges["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "out"
    assert gate["locations"][0]["logicalLocations"] == [
        {"fullyQualifiedName": "a.gate", "kind": "member"}
    ]
    (suppression,) = waived["suppressions"]
    assert suppression["justification"] == (
        "a buffer, computed again at load, release-team, until 2027-01-31"
    )


def test_what_did_not_run_is_no_success() -> None:
    told = check(verdict="incomplete", exit_code=3)
    (invocation,) = run_of(told)["invocations"]
    assert invocation["executionSuccessful"] is False
    notes = [
        (one["level"], one["message"]["text"]) for one in invocation["toolExecutionNotifications"]
    ]
    assert notes[:2] == [
        ("error", "check bits did not run: what was seen of `bits`"),
        ("warning", "check signature did not run: what was seen of `signature`"),
    ]
    assert notes[2][1].startswith("incomplete: ")


def test_texts_hold_no_placeholder_and_no_link() -> None:
    run = run_of(with_findings(one("{0} [here](http://evil) {x}")))
    assert run["results"][0]["message"]["text"] == "{{0}} [here] (http://evil) {{x}}"


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("a b.md", "out/a%20b.md"),
        ("\u00e9/x:y?.md", "out/%C3%A9/x%3Ay%3F.md"),
        ("\udce9.md", "out/%E9.md"),
        ("\ud800.md", "out/%5Cud800.md"),
    ],
)
def test_paths_are_uris(file: str, uri: str) -> None:
    (result,) = run_of(with_findings(one(file=file), extra={}))["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_fingerprints_are_of_what_it_is_about() -> None:
    first, second, third = run_of(with_findings(one("a"), one("b"), one(file="c"), extra={}))[
        "results"
    ]
    assert first["partialFingerprints"] == second["partialFingerprints"]
    assert first["partialFingerprints"] != third["partialFingerprints"]


# --- JUnit ----------------------------------------------------------------------------------------


def suite_of(report: Report) -> ET.Element:
    root = ET.fromstring(to_junit(report))
    (suite,) = root
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases)) != "0"
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert suite.get(name) == str(len(suite.findall(f"testcase/{tag}")))
    return suite


@each_report
def test_a_suite_is_red_where_the_verdict_is(told: Report) -> None:
    suite = suite_of(told)
    red = suite.findall("testcase/failure") + suite.findall("testcase/error")
    assert bool(red) == (told.verdict != "pass")


def test_a_case_for_each_check() -> None:
    suite = suite_of(check())
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert list(cases)[:8] == [row["name"] for row in check().extra["checks"]]
    assert {name for name, case in cases.items() if case.find("skipped") is not None} == {
        "bits",
        "signature",
    }
    skipped = cases["bits"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "required, and not run: what was seen of `bits`"
    failure = cases["card"].find("failure")
    assert failure is not None
    assert failure.get("type") == "FC601"
    assert failure.text == "error FC601: `README.md` has no `license`\n  hint: the way on"
    assert "FC351" in (cases["values"].findtext("system-out") or "")
    assert cases["keys"].get("time") == "0.250"


def test_a_missing_check_alone_is_not_green() -> None:
    rows = [row for row in check().extra["checks"] if row["status"] not in ("fail", "warn")]
    told = with_findings(extra={**check().extra, "checks": rows}, verdict="incomplete", exit_code=3)
    (error,) = suite_of(told).findall("testcase/error")
    assert error.get("type") == "incomplete"


def test_findings_of_no_check_are_told_too() -> None:
    told = with_findings(one("a waiver has ended", code="FC621"))
    assert "a waiver has ended" in to_junit(told)


@pytest.mark.parametrize("text", [HOSTILE, "\x00\x0b\ufffe\uffff", "]]>&<"])
def test_junit_is_xml_whatever_the_text_holds(text: str) -> None:
    rows = [{**row, "sentence": text, "name": text} for row in check().extra["checks"]]
    told = with_findings(one(text, check=text), extra={**check().extra, "checks": rows})
    for report in (told, replace(STORED["verify-fail"], findings=(one(text),), argv=(text,))):
        suite_of(report)


# --- GitHub ---------------------------------------------------------------------------------------


def unescaped(text: str) -> str:
    for code, char in (("%0A", "\n"), ("%0D", "\r"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


def test_annotations_stand_beside_their_file() -> None:
    lines = to_annotations(check()).splitlines()
    title = TABLE["FC601"].title
    assert lines[0] == (
        f"::error file=out/README.md,line=1,title=FC601 {title}::`README.md` has no `license`"
        "%0Ahint: the way on"
    )
    assert lines[-1].startswith("flamingo-ckpt check: not ready: 2 errors")
    assert sum(line.startswith("::warning ") for line in lines) == 2


def test_more_than_are_shown_are_counted_and_hide_no_other_code() -> None:
    many = [one(f"number {at}") for at in range(25)]
    told = with_findings(*many, one("the license", code="FC601"))
    lines = to_annotations(told).splitlines()
    errors = [line for line in lines if line.startswith("::error")]
    assert len(errors) == MAX_ANNOTATIONS
    assert errors[1].endswith("::the license")
    assert f"and {26 - MAX_ANNOTATIONS} more errors, see the report" in lines


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "a\n::error::b", "%0A::set-env name=A::b", "##[error]x", "a,line=9::b", "a:b,c%"],
)
def test_text_is_no_command(text: str) -> None:
    told = with_findings(one(text, file=text), argv=(text,))
    lines = to_annotations(told).splitlines()
    assert len(lines) == 2
    assert "##[" not in "".join(lines)
    found = re.fullmatch(r"::error file=([^,:]*),title=([^,:]*)::(.*)", lines[0])
    assert found is not None
    assert unescaped(found[1]).startswith("out/")


def test_a_bad_end_without_an_error_is_annotated() -> None:
    told = with_findings(verdict="incomplete", exit_code=3)
    assert to_annotations(told).startswith("::error title=flamingo-ckpt check::incomplete: ")


def test_files_of_the_hub_are_no_files_of_the_workflow() -> None:
    told = with_findings(one(file="README.md"), inputs=(release("hf://a/b"),))
    assert "file=" not in to_annotations(told)


def test_the_step_summary() -> None:
    text = to_step_summary(check())
    assert text.startswith("## flamingo-ckpt check: failed\n\n**not ready: 2 errors")
    assert "| bits | skip, required | what was seen of `bits` | FC623 |" in text
    waiver = (
        "| FC352 | `a.inv\\_freq` has 2 NaN | a buffer, computed again at load | release-team |"
    )
    assert waiver in text
    assert waiver in to_markdown(check())
    assert f"<details open><summary>1 error: FC601 {TABLE['FC601'].title}</summary>" in text
    many = with_findings(*(one(f"number {at}") for at in range(500)))
    assert len(to_step_summary(many)) < 20_000
    assert "and 480 more, see the report" in to_step_summary(many)


@each_report
def test_summaries_of_every_verb_are_well_formed(told: Report) -> None:
    text = to_step_summary(told)
    assert text.count("<details") == text.count("</details>") == text.count("</summary>")
