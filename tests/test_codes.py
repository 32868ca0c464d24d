"""The table of findings: every code that can be met has a page, and what it says is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flamingo_ckpt.cli.main import VERBS
from flamingo_ckpt.codes import TABLE, THEME_OF, THEMES, UNWAIVABLE, is_of_check
from flamingo_ckpt.codes.code import Code
from flamingo_ckpt.codes.page import to_markdown, waiver_of
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.release.policy import read_policy
from tests.support import cli_ok
from tests.test_architecture import MODULES, room, tree_of, used_codes
from tests.test_readme import flags

DOCUMENT = Path(__file__).parent.parent / "docs" / "findings.md"
SEVERITIES = ("error", "warning", "info")
each_code = pytest.mark.parametrize("code", TABLE.values(), ids=TABLE)


def test_the_document_is_made_of_the_table() -> None:
    made = "python -m flamingo_ckpt.codes > docs/findings.md"
    assert DOCUMENT.read_text() == to_markdown(), f"make it anew: {made}"


@each_code
def test_every_code_has_its_page(code: Code) -> None:
    assert re.fullmatch(r"FC\d{3}", code.code)
    assert code.severity in SEVERITIES
    assert code.title == code.title.strip() != ""
    for text in (code.meaning, code.hint):
        assert len(text.split()) > 3
        assert text.endswith(".")
        for paragraph in text.split("\n\n"):
            assert paragraph == " ".join(paragraph.split())
        assert text.count("`") % 2 == 0
    assert code.title.casefold() != code.meaning.rstrip(".").casefold()


def test_every_code_that_is_emitted_is_explained() -> None:
    for code in used_codes():
        page = cli_ok("explain", code).out
        assert page.startswith(f"{_word(TABLE[code])} {code}  {TABLE[code].title}\n")
        told = " ".join(page.split())
        assert " ".join(TABLE[code].meaning.split()) in told
        assert f"hint: {TABLE[code].hint}" in told


def _word(code: Code) -> str:
    return "note" if code.severity == "info" else code.severity


def test_themes_hold_every_code_once() -> None:
    listed = [one for theme in THEMES for one in theme.codes]
    assert len(listed) == len(TABLE)
    assert all(TABLE[one.code] is one for one in listed)
    assert len({theme.name for theme in THEMES}) == len(THEMES) == len({t.title for t in THEMES})
    for code, theme in THEME_OF.items():
        assert TABLE[code] in theme.codes


def test_a_waiver_is_offered_only_where_one_can_be_given() -> None:
    assert {"FC501", "FC502", "FC503"} <= UNWAIVABLE
    for code in TABLE.values():
        waiver = waiver_of(code)
        assert (waiver is None) == (code.code in UNWAIVABLE or not is_of_check(code.code))
        assert waiver is None or f'code = "{code.code}"' in waiver
    assert waiver_of(TABLE["FC003"]) is None  # of the destination, which `check` does not have


def test_a_waiver_that_is_filled_in_is_one_that_the_policy_takes(tmp_path: Path) -> None:
    path = tmp_path / "flamingo-ckpt.toml"
    for code in TABLE.values():
        if waiver := waiver_of(code):
            path.write_text(waiver.replace("YYYY-MM-DD", "2999-12-31"))
            (found,) = read_policy(str(path)).waivers
            assert (found.code, found.key, found.owner) == (code.code, "KEY", "OWNER")
    path.write_text(str(waiver_of(TABLE["FC203"])))
    with pytest.raises(CkptError, match="until") as refused:
        read_policy(str(path))
    assert refused.value.code == "FC620"


@each_code
def test_pages_name_only_what_is_there(code: Code) -> None:
    known = {flag for _, flag in flags()}
    for text in (code.meaning, code.hint):
        for quoted in re.findall(r"`([^`]+)`", text):
            first, *others = quoted.split()
            if first == "flamingo-ckpt":
                assert others[0] in (*VERBS, "VERB")
            if first in ("flamingo-ckpt", *VERBS) or first.startswith("--"):
                assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", quoted)) <= known
        assert set(re.findall(r"\bFC\d{3}\b", text)) <= TABLE.keys()


# --- severities -----------------------------------------------------------------------------------


def literal(node: ast.expr | None) -> set[str]:
    """The strings that an expression can be; empty where it is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.IfExp):
        both = literal(node.body), literal(node.orelse)
        return both[0] | both[1] if all(both) else set()
    return set()


def severities_of(call: ast.Call) -> Iterator[tuple[str, str]]:
    """(code, severity) of one call that makes a finding or an error, where both are written out.

    A severity that is computed is told as `?`.
    """
    words = [literal(one) for one in call.args]
    keywords = {one.arg: one.value for one in call.keywords}
    codes = literal(keywords.get("code"))
    name = ast.unparse(call.func)
    if name.endswith("Error"):
        found = {"error"}
    elif "severity" in keywords:
        found = literal(keywords["severity"]) or {"?"}
    elif len(words) > 1:  # `add("FC302", "info", ...)`
        codes, found = words[0], words[1] & set(SEVERITIES)
    else:
        return
    for code in codes & TABLE.keys():
        for severity in found:
            yield code, severity


def emitted_severities() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call) and room(module) != "codes":
                for code, severity in severities_of(node):
                    found.setdefault(code, set()).add(severity)
    return found


def test_the_usual_severity_is_one_that_is_emitted() -> None:
    emitted = emitted_severities()
    assert emitted["FC302"] == {"info"}
    assert emitted["FC203"] == {"error"}
    assert emitted["FC505"] == {"error", "warning"}
    assert len(emitted) > 0.7 * len(TABLE)
    wrong = {
        code: (TABLE[code].severity, found)
        for code, found in emitted.items()
        if "?" not in found and TABLE[code].severity not in found
    }
    assert wrong == {}
