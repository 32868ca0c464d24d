"""The HTML page: complete, self-contained, and deaf to what names want it to be."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from flamingo_ckpt.report.document import Report, to_document
from flamingo_ckpt.report.parity_html import to_html
from flamingo_ckpt.report.parity_plot import WIDTH, Plot, plots
from tests.report.parity_support import (
    BOTH,
    HOSTILE,
    MANY,
    TEN,
    ended_early,
    hidden,
    hostile,
    odd_numbers,
    report,
    stage_names,
)

ALL = (*BOTH, ("as-is", "bfloat16"), ("forced", "bfloat16"))
VOID = {"meta", "br", "link", "img", "input", "hr", "base"}
REPORTS = {
    "agreeing": report(),
    "diverging": hidden(),
    "many": report(MANY, ALL, diverge={"forced": "xattn.17", "as-is": "language.layers.20"}),
    "incomplete": ended_early(),
    "odd": odd_numbers(),
    "hostile": hostile(),
    "one stage": report(["logits"]),
    "an error": Report(command="parity", argv=("parity", "a"), verdict="error", exit_code=2),
}
each_report = pytest.mark.parametrize("told", REPORTS.values(), ids=list(REPORTS))


class Page(HTMLParser):
    """The elements of a page; tags that do not match are an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text.setdefault(tag, []).append(data)

    def said(self, tag: str = "body") -> str:
        return "".join(self.text.get(tag, []))

    def values(self, tag: str, name: str) -> list[str | None]:
        return [value for one, key, value in self.attributes if (one, key) == (tag, name)]


def drawings(page: str) -> list[ET.Element]:
    """The plots, which are XML and not just HTML."""
    found = re.findall(r'<svg class="plot".*?</svg>', page, flags=re.DOTALL)
    return [ET.fromstring(text) for text in found]


def embedded(page: str) -> object:
    found = re.findall(
        r'<script type="application/json" id="report">(.*?)</script>', page, flags=re.DOTALL
    )
    assert len(found) == 1
    return json.loads(found[0])


@each_report
def test_the_document_can_be_taken_out_again(told: Report) -> None:
    assert embedded(to_html(told)) == to_document(told)


@each_report
def test_nothing_is_loaded_and_nothing_runs(told: Report) -> None:
    page = Page(to_html(told))
    assert not page.tags.keys() & {"link", "img", "iframe", "object", "embed", "form", "base"}
    names = {name for _, name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "style", "background", "poster"}
    assert not {name for name in names if name.startswith("on")}
    assert page.values("script", "type") == ["application/json"]
    css = page.said("style")
    assert "url(" not in css
    assert "@import" not in css


@pytest.mark.parametrize("name", ["agreeing", "many", "incomplete"])
def test_no_address_of_the_network(name: str) -> None:
    assert not re.search(r"https?:|//[a-z]", to_html(REPORTS[name]))


@each_report
def test_the_policy_allows_one_style_sheet_and_nothing_else(told: Report) -> None:
    page = Page(to_html(told))
    (policy,) = [
        content
        for content in page.values("meta", "content")
        if content and content.startswith("default-src")
    ]
    digest = base64.b64encode(hashlib.sha256(page.said("style").encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "Content-Security-Policy" in page.values("meta", "http-equiv")
    assert page.tags["style"] == 1


@each_report
def test_drawings_are_valid_xml_and_numbers_are_numbers(told: Report) -> None:
    for drawing in drawings(to_html(told)):
        for element in drawing.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height", "d"):
                for number in re.findall(r"[a-z]{2,}", element.get(name, "").lower()):
                    raise AssertionError(f"{element.tag} {name} {number}")


def test_hostile_names_change_nothing_but_text() -> None:
    """The page of a report with harmless names has the same elements."""
    told = to_html(hostile())
    harmless = to_html(hostile_with("y.`a` b"))
    assert Page(told).tags == Page(harmless).tags
    assert [entry[:2] for entry in Page(told).attributes] == [
        entry[:2] for entry in Page(harmless).attributes
    ]
    assert "<script>" not in told
    assert all(char.isprintable() or char == "\n" for char in told)
    assert "\\x1b[31m" in told
    assert HOSTILE not in told


def hostile_with(name: str) -> Report:
    def mended(value: object) -> object:
        if isinstance(value, dict):
            return {key: mended(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [mended(item) for item in value]
        return name if value == HOSTILE else value

    told = hostile()
    return replace(
        told,
        argv=("parity", name, "whole/"),
        inputs=tuple(mended(list(told.inputs))),  # type: ignore[arg-type]
        summary=mended(dict(told.summary)),  # type: ignore[arg-type]
        extra=mended(dict(told.extra)),  # type: ignore[arg-type]
        findings=tuple(replace(one, key=name, detail=name, hint=name) for one in told.findings),
    )


def test_what_a_reader_finds_without_scrolling_sideways() -> None:
    said = " ".join(" ".join(Page(to_html(hidden())).text["main"]).split())
    for text in (
        "parity: diverge",
        "diverge at xattn.1 in float32 with gates forced to 0.5 (key and value are swapped)",
        "flamingo-ckpt parity checkpoint.pt whole/",
        "4e0a1c77" * 8,
        "gates as they are agrees",
        "gates forced to 0.5 diverges at xattn.1",
        "argmax agrees 32%",
        "differ from token 2 of 2 on",
        "197 of 199 tensors hold the same bits",
        "confirmed: with this one thing changed in B, the two agree",
        "query is transposed: 0.43 left, still diverges",
        "error FC301: bits differ",
        "B has here what A has at v",
        "vision_x",
        "forward, seconds",
    ):
        assert text in said, text


def test_every_stage_has_its_row_and_the_first_divergence_is_marked() -> None:
    page = to_html(REPORTS["many"])
    for name in MANY:
        # a table for each dtype, and the one of the modules
        assert page.count(f'<th scope="row"><code>{name}</code></th>') == 2
        assert f"<td>a.{name}</td><td>b.{name}</td>" in page
    rows = re.findall(r'<tr class="first"><th scope="row"><code>(.*?)</code>', page)
    assert rows == ["xattn.17", "language.layers.20"]


def test_what_only_reports_says_so_and_has_a_drawing_of_its_own() -> None:
    page = to_html(REPORTS["many"])
    assert len(drawings(page)) == 2
    assert page.count("reported, does not decide") >= 4
    decides, reports = plots(REPORTS["many"])
    assert (decides.decides, reports.decides) == (True, False)
    assert all(one.tolerance for one in decides.series)
    assert not any(one.tolerance for one in reports.series)


def test_a_report_that_ended_early_has_no_empty_parts() -> None:
    page = Page(to_html(ended_early()))
    assert page.said("h2") == "FindingsEnvironment"
    assert page.tags["svg"] == 0
    assert "incomplete: nothing was compared: the device cuda is not there" in page.said("p")


def test_the_drawing_has_an_alternative_in_words() -> None:
    (drawing,) = drawings(to_html(hidden()))
    title, description = drawing.find("title"), drawing.find("desc")
    assert title is not None
    assert description is not None
    assert drawing.get("role") == "img"
    assert drawing.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert "gates forced to 0.5: diverges at `xattn.1`, largest 0.44" in (description.text or "")
    hovers = [rect.findtext("title") or "" for rect in drawing.iter("rect")]
    (one,) = [text for text in hovers if text.startswith("xattn.1\n")]
    assert "gates forced to 0.5: relative 0.44, max_abs 2.31, tolerance 3.2e-6, diverges" in one


def drawn(told: Report) -> Plot:
    (plot,) = plots(told)
    return plot


def ys(marks: tuple[str, ...]) -> list[float]:
    return [float(mark.split("a")[0].split("l")[0].split()[1]) for mark in marks]


def test_marks_of_two_passes_differ_in_shape_and_in_colour() -> None:
    first, second = drawn(report()).series
    assert first.number != second.number
    assert re.sub(r"[\d. -]", "", first.legend) != re.sub(r"[\d. -]", "", second.legend)


def test_larger_errors_are_drawn_higher_and_zero_below_the_scale() -> None:
    cells = {
        ("vision.layers.0", 0): {"rel": 0.0},
        ("vision.layers.1", 0): {"rel": 1e-9},
        ("vision.layers.2", 0): {"rel": 1e-2},
        ("perceiver.layers.0", 0): {"rel": float("nan")},
        ("perceiver.layers.1", 0): {"rel": float("inf")},
        ("xattn.0", 0): {"only_in": "b"},
    }
    plot = drawn(report(cells=cells))
    zero, small, large, nan, inf, alone = ys(plot.series[0].marks)[:6]
    assert plot.zero == pytest.approx(zero, abs=0.1)
    lowest = max(tick.y for tick in plot.ticks)
    highest = min(tick.y for tick in plot.ticks)
    assert zero > lowest >= small > large >= highest > nan
    assert nan == inf == alone == pytest.approx(plot.no_number, abs=0.1)
    # the line is broken where there is nothing between
    assert plot.series[0].line.count("M") == 2


def test_without_zeros_and_odd_numbers_their_rows_are_left_out() -> None:
    plot = drawn(report())
    assert (plot.zero, plot.no_number) == (None, None)


def test_tolerance_is_a_step_for_each_stage() -> None:
    same = drawn(report())
    assert same.shared_tolerance
    assert same.series[0].tolerance.count("H") == len(TEN)
    assert same.series[0].tolerance.count("M") == 1
    own = drawn(report(cells={("logits", 1): {"tolerance": 1e-3}}))
    assert not own.shared_tolerance
    assert own.shared_noise


@pytest.mark.parametrize(
    "names",
    [
        TEN,
        MANY,
        stage_names(12, 2, 24, 4),
        stage_names(1, 1, 1),
        [f"part{at}.layers.0" for at in range(60)],
        [HOSTILE, *TEN],
        [*TEN[:5], HOSTILE, *TEN[5:]],
        ["language.embeddings", *TEN],
    ],
    ids=[
        "ten",
        "many",
        "every fourth",
        "four",
        "sixty parts",
        "hostile",
        "long",
        "embeddings first",
    ],
)
@pytest.mark.parametrize("end", ["first", "middle", "last"])
def test_labels_touch_neither_each_other_nor_the_edge(names: list[str], end: str) -> None:
    where = {"first": 0, "middle": len(names) // 2, "last": -1}[end]
    plot = drawn(report(names, diverge={"forced": names[where], "as-is": names[-1]}))
    spans: dict[float, list[tuple[float, float]]] = {}
    for label in (*plot.labels, *plot.divergences):
        # the letters of the style sheet are narrower than this on average
        width = len(label.text) * 7.0
        start = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
        assert start >= 0, label
        assert start + width <= WIDTH, label
        assert 10 <= label.y <= plot.height, label
        spans.setdefault(label.y, []).append((start, start + width))
    for found in spans.values():
        found.sort()
        assert all(left[1] < right[0] for left, right in pairwise(found))


@pytest.mark.parametrize("names", [TEN, MANY, stage_names(12, 2, 24, 4)], ids=["10", "121", "45"])
def test_every_part_is_named_along_x(names: list[str]) -> None:
    told = {part for label in drawn(report(names)).labels for part in label.text.split(", ")}
    assert told == {"vision", "perceiver", "language", "xattn", "logits"}


def test_importing_the_renderer_imports_no_template_engine() -> None:
    code = (
        "import sys, flamingo_ckpt.report.parity_html, flamingo_ckpt.report.parity_plot;"
        "sys.exit('jinja2' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_read_in_light_and_in_dark() -> None:
    """WCAG AA: 4.5 for text, 3 for marks, on each ground they stand on."""
    css = Page(to_html(report())).said("style")
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in css.split(":root")[1:]]
    assert len(schemes) == 2
    for colours in schemes:
        for ground in ("bg", "panel", "band"):
            for name, least in {
                **dict.fromkeys(("text", "dim", "good", "bad", "open"), 4.5),
                **dict.fromkeys(("s0", "s1", "s2", "s3", "limit", "noise"), 3.0),
            }.items():
                pair = sorted((luminance(colours[name]), luminance(colours[ground])))
                ratio = (pair[1] + 0.05) / (pair[0] + 0.05)
                assert ratio >= least, (name, ground, ratio)
