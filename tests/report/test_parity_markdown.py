"""A parity check in a pull request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.markdown import to_markdown
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
)


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its head left out."""
    below = text.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.split(" | ")] for line in lines[2:]]


def test_verdict_and_passes() -> None:
    text = to_markdown(hidden())
    assert "# flamingo-ckpt parity: failed" in text
    assert "**diverge at `xattn.1` in float32 with gates forced to 0.5" in text
    told = rows(text, "Passes")
    assert [row[2] for row in told] == ["agrees", "diverges at `xattn.1`"]
    assert told[1][3:] == ["2.31", "0.44", "0.912", "32%", "0.4 |"]


def test_stages() -> None:
    told = {row[0].strip("| "): row[1:] for row in rows(to_markdown(hidden()), "Stages")}
    assert "\nThe relative difference, and the share of the tolerance" in to_markdown(hidden())
    assert list(told) == [name.replace("_", "\\_") for name in TEN]
    assert told["xattn.1"] == ["2.0e-7 (6%)", "0.44 (1.4e5x)", "first divergence |"]
    assert told["logits"][-1] == "|"


def test_blame_and_findings() -> None:
    text = to_markdown(hidden())
    assert "## Blame: xattn.1, gates forced to 0.5" in text
    assert "key and value are swapped; confirmed" in text
    assert ["| xattn.1.attn.k.weight", "x.to\\_kv", "y.k\\_proj |"] in rows(text, "Blame")
    assert "| error | FC301 | k | a matter of gates |  |" in text


def test_many_stages_are_folded() -> None:
    text = to_markdown(report(MANY, diverge={"forced": "xattn.17"}))
    assert "121 stages; a line for several shows the worst" in text
    assert [row[0] for row in rows(text, "Stages")][:3] == [
        "| vision.layers.{0-23}",
        "| perceiver.layers.{0-5}",
        "| xattn.{0-16}",
    ]


def test_what_only_reports_has_no_share_of_a_tolerance() -> None:
    text = to_markdown(report(passes=(*BOTH, ("as-is", "bfloat16"))))
    assert rows(text, "Passes")[2][2] == "reported, does not decide"
    assert rows(text, "Stages")[0][3] == "0.004"


def test_ended_before_anything_ran() -> None:
    text = to_markdown(ended_early())
    assert "**incomplete: nothing was compared: the device `cuda` is not there**" in text
    assert "## Passes" not in text
    assert "use `--device cpu`" in text


def test_numbers_that_are_none_are_words() -> None:
    told = {row[0].strip("| "): row[1:] for row in rows(to_markdown(odd_numbers()), "Stages")}
    assert told["xattn.0"][1] == "NaN (NaN)"
    assert told["xattn.1"][1] == "inf (inf)"
    assert told["perceiver.layers.0"][0] == "-"
    assert told["logits"][1] == "only in A"


def test_hostile_names_stay_in_their_cells() -> None:
    text = to_markdown(hostile())
    assert HOSTILE not in text
    assert "<" not in text.replace("&lt;", "")
    assert all(line.isprintable() for line in text.splitlines())
    width = 0
    for line in text.splitlines():
        found = line.replace("\\\\", "").replace("\\|", "").count("|")
        width = 0 if not line else width or found
        assert found == width, line


@pytest.mark.parametrize("verdict", ["error", "fail"])
def test_a_verb_that_could_not_answer(verdict: str) -> None:
    told = replace(ended_early(), verdict=verdict, summary={})
    assert "the device `cuda` is not there" in to_markdown(told)
    assert "**" not in to_markdown(told)


def test_other_verbs_still_count() -> None:
    told = Report(
        command="diff",
        argv=("diff",),
        verdict="pass",
        exit_code=0,
        summary={"same": 3, "changed": 0},
    )
    assert "| same | 3 |" in to_markdown(told)
