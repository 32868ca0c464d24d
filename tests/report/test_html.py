"""The page of every verb: complete without its script, and deaf to what names want it to be."""

from __future__ import annotations

import base64
import hashlib
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from flamingo_ckpt.codes import TABLE
from flamingo_ckpt.difference import Tally, facts_of
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report, from_document, to_document
from flamingo_ckpt.report.histogram import histograms
from flamingo_ckpt.report.html import MAX_DRAWN, MAX_OPEN, to_html
from flamingo_ckpt.tensors import DTYPES
from tests.report import goldens
from tests.report.check_support import check
from tests.report.parity_support import HOSTILE
from tests.report.test_parity_html import Page, embedded, luminance

STORED = {
    name: from_document(document)
    for name, document in goldens.stored().items()
    if not name.startswith("parity")
}
REPORTS = {**STORED, "check with everything": check()}
each_report = pytest.mark.parametrize("told", REPORTS.values(), ids=list(REPORTS))


def said(page: str) -> str:
    return " ".join(" ".join(Page(page).text["main"]).split())


@each_report
def test_the_document_can_be_taken_out_again(told: Report) -> None:
    assert embedded(to_html(told)) == to_document(told)


@each_report
def test_one_sheet_and_one_script_are_allowed_by_their_digests(told: Report) -> None:
    text = to_html(told)
    page = Page(text)
    assert not page.tags.keys() & {"link", "img", "iframe", "object", "embed", "form", "base"}
    names = {name for _, name, _ in page.attributes}
    assert not names & {"src", "srcset", "action", "style", "background", "poster"}
    assert not {name for name in names if name.startswith("on")}
    assert all(target and target.startswith("#") for target in page.values("a", "href"))
    (code,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    (policy,) = [one for one in page.values("meta", "content") if one and "default-src" in one]
    assert policy == (
        f"default-src 'none'; style-src '{digest(page.said('style'))}'; "
        f"script-src '{digest(code)}'; base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@each_report
def test_every_link_has_its_target_and_no_two_places_one_name(told: Report) -> None:
    page = Page(to_html(told))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {target[1:] for target in page.values("a", "href") if target} <= set(ids)


def test_what_a_reader_of_a_check_finds() -> None:
    text = said(to_html(check()))
    for words in (
        "check: failed",
        "not ready: 2 errors, 1 warning, 1 waived, 1 required check not run, 1 other check not run",
        "flamingo-ckpt check out/ --policy p.toml",
        "\N{BALLOT X} failed",
        "\N{EN DASH} not run, and required",
        "\N{CHECK MARK} passed",
        "what was seen of card FC601",
        "README.md:1",
        "error FC601 : " + TABLE["FC601"].title,
        "hint: the way on",
        "a buffer, computed again at load release-team 2027-01-31",
        "mode 0600 to 0644 not applied: --fix does it",
        "gates forced to 0.5 diverges at xattn.1",
        "layers.{0-2}.w layers.0.w layers.1.w layers.2.w x3 F32 2x2 48 B",
        "ab" * 32,
        "What to do:",
    ):
        assert words in text, words
    # counted by its row, told in full, and never among those that passed
    assert text.count("\N{CHECK MARK} passed") == 3


def test_parity_of_a_check_is_drawn() -> None:
    page = to_html(check())
    assert page.count('<svg class="plot"') == 1
    assert '<svg class="plot"' not in to_html(check(extra={**check().extra, "parity": None}))


def test_every_code_is_explained_on_the_page() -> None:
    page = to_html(check())
    for code in ("FC601", "FC480", "FC623", "FC351"):
        assert f'<a href="#{code}">{code}</a>' in page
        assert f'<div id="{code}">' in page


def bits(at: int = 0) -> Finding:
    tally = Tally(DTYPES["F16"], (4,))
    tally.add(memoryview(bytes(8)), memoryview(b"\0\x3c\1\0\0\x80\0\x7e"), 0)
    found = tally.result()
    assert found is not None
    data = facts_of(found, "A", "B")
    return Finding(code="FC301", severity="error", detail=f"`w{at}`: differs", key="w", data=data)


def test_differences_are_drawn_as_bars_that_have_words() -> None:
    told = replace(STORED["verify-fail"], findings=(bits(),), document=None)
    drawn = [
        ET.fromstring(text)
        for text in re.findall(r"<svg viewBox.*?</svg>", to_html(told), flags=re.DOTALL)
        if "<title" in text
    ]
    assert len(drawn) == 2
    distances, flipped = (drawing.findtext("desc") or "" for drawing in drawn)
    assert "0 ulp: 1 element" in distances
    assert "1 ulp: 1 element" in distances
    assert "8192 to 16383 ulp: 1 element" in distances
    assert "bit 15 (sign): 1 element" in flipped
    assert "bit 0 (mantissa): 1 element" in flipped
    for drawing in drawn:
        bars = [bar for bar in drawing.iter("rect") if bar.get("class", "").startswith("bar")]
        assert all(0 < float(bar.get("height", 0)) <= 90 for bar in bars)
        assert all(bar.findtext("title") for bar in bars)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", ""])
def test_labels_of_bars_do_not_touch(dtype: str) -> None:
    num_bits = DTYPES[dtype].bits if dtype else 64
    buckets = [[1 << at >> 1, (1 << at) - 1, 10**at % 987654321] for at in range(1, num_bits + 1)]
    data = {"dtype": dtype, "bits_flipped": list(range(num_bits)), "ulp_histogram": buckets}
    for plot in histograms(data):
        for texts in ([bar.label for bar in plot.bars], [bar.number for bar in plot.bars]):
            spans = [
                (bar.x + bar.width / 2 - len(text) * 3.5, bar.x + bar.width / 2 + len(text) * 3.5)
                for bar, text in zip(plot.bars, texts, strict=True)
                if text
            ]
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert plot.bars[-1].x + plot.bars[-1].width <= plot.width


def test_many_findings_are_folded_and_only_the_first_are_drawn() -> None:
    few = replace(STORED["verify-fail"], document=None, findings=(bits(),) * MAX_OPEN)
    many = replace(few, findings=tuple(bits(at) for at in range(MAX_DRAWN + 5)))
    page = to_html(many)
    assert "45 findings</summary>" in page
    assert "findings</summary>" not in to_html(few)
    assert page.count("How they differ") == MAX_DRAWN
    assert all(f"w{at}</code>" in page for at in range(MAX_DRAWN + 5))


def hostile(value: Any) -> Any:
    """The same report with hostile text wherever a file or a person chooses it."""
    if isinstance(value, dict):
        kept = ("severity", "code", "status", "check", "level", "stage", "gates", "dtype")
        kept += ("first_divergence", "only_in", "name")
        return {key: item if key in kept else hostile(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) and value not in ("nan", "inf") else value


def test_hostile_text_changes_nothing_but_text() -> None:
    plain = check()
    told = replace(
        plain,
        argv=(HOSTILE, HOSTILE),
        inputs=tuple(hostile(list(plain.inputs))),
        findings=tuple(
            replace(one, detail=HOSTILE, key=HOSTILE, hint=HOSTILE) for one in plain.findings
        ),
        extra=hostile(dict(plain.extra)),
    )
    page = to_html(told)
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert all(char.isprintable() or char == "\n" for char in page)
    allowed = {"script", "style", "code", "p"}  # of text in backticks, and of hints
    assert Page(page).tags.keys() - allowed == Page(to_html(plain)).tags.keys() - allowed


def test_the_script_only_hides_rows() -> None:
    """What it may do is small enough to be read here."""
    (code,) = re.findall(r"<script>(.*?)</script>", to_html(check()), flags=re.DOTALL)
    for word in ("innerHTML", "eval", "fetch", "XMLHttp", "document.write", "http", "location"):
        assert word not in code


def test_colours_of_bars_can_be_told_from_the_ground() -> None:
    css = Page(to_html(check())).said("style")
    for block in css.split(":root")[1:]:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for name in ("s0", "s1", "s2"):
            pair = sorted((luminance(colours[name]), luminance(colours["bg"])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3
