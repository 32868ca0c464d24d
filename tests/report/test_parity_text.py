"""What a release engineer reads of a parity check in a terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report import parity_stages as stages
from flamingo_ckpt.report import parity_words as words
from flamingo_ckpt.report.document import Report, to_document
from flamingo_ckpt.report.text import render
from tests.report.parity_support import (
    BOTH,
    HOSTILE,
    INF,
    MANY,
    NAN,
    TEN,
    blame,
    ended_early,
    hidden,
    hostile,
    odd_numbers,
    report,
)

REPORTED = (*BOTH, ("as-is", "bfloat16"), ("forced", "bfloat16"))


def line_of(lines: list[str], start: str) -> str:
    found = [line for line in lines if line.strip().startswith(start)]
    assert len(found) == 1, (start, lines)
    return found[0]


def table(lines: list[str]) -> list[str]:
    """The rows of the first table."""
    start = next(at for at, line in enumerate(lines) if line.strip().startswith("stage "))
    return [line for line in lines[start + 1 : lines.index("", start)] if "-v lists" not in line]


def test_two_that_agree() -> None:
    lines = render(report())
    assert lines[-1] == (
        "agree: all 10 stages are within rounding in float32 with gates as they are and with gates "
        "forced to 0.5"
    )
    assert [row.split()[0] for row in table(lines)] == TEN
    # max_abs, relative, used of each pass: 2e-7 is a sixteenth of the tolerance
    assert table(lines)[-1].split() == ["logits", *["4.0e-7", "2.0e-7", "6%"] * 2]
    assert not any("first divergence" in line for line in lines)


def test_two_that_differ_by_nothing_at_all() -> None:
    told = report()
    passes = [{**one, "max_rel": 0.0} for one in told.summary["passes"]]
    lines = render(replace(told, summary={**told.summary, "passes": passes}))
    assert lines[-1].startswith("agree: all 10 stages are exactly equal in float32 with gates as")
    passes[1]["max_rel"] = 1e-9
    lines = render(replace(told, summary={**told.summary, "passes": passes}))
    assert "within rounding" in lines[-1]


def test_inputs_and_what_ran() -> None:
    lines = render(report())
    assert "sha256 4e0a1c774e0a, the same for both" in line_of(lines, "inputs")
    assert line_of(lines, "A  ").endswith("computed by Flamingo, config config.json, 5 forwards")
    assert line_of(lines, "B  ").endswith("1 forward, weights streamed")
    assert "cpu (EPYC), torch 2.13.0" in line_of(lines, "ran on")
    assert "16 times the noise (the first side against itself)" in line_of(lines, "tolerance")


def test_hidden_behind_gates() -> None:
    lines = render(hidden())
    assert lines[-1] == (
        "diverge at `xattn.1` in float32 with gates forced to 0.5 (key and value are swapped); "
        "agree in float32 with gates as they are"
    )
    row = line_of(lines, "xattn.1 ")
    assert row.split()[1:4] == ["4.0e-7", "2.0e-7", "6%"]
    assert row.split()[4:7] == ["2.31", "0.44", "1.4e5x"]
    assert row.endswith("<- first divergence")
    assert sum("<- first divergence" in line for line in lines) == 1


def test_what_is_to_blame() -> None:
    lines = render(hidden())
    assert line_of(lines, "blame") == (
        "blame      `xattn.1`, gates forced to 0.5: key and value are swapped"
    )
    assert any("confirmed: with this one thing changed in B" in line for line in lines)
    assert any("`xattn.1.attn.k.weight`: A `x.to_kv`, B `y.k_proj`" in line for line in lines)
    assert line_of(lines, "tried  query").endswith("0.43 left, still diverges")
    assert line_of(lines, "tried  key").endswith("2.0e-7 left, agrees")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("x", "x", "A and B `x`"), ("x", "", "A `x`, B has none"), ("", "", "A has none, B has none")],
)
def test_keys_of_what_is_to_blame(a: str, b: str, expected: str) -> None:
    tensors = [{"canonical": "c", "a": a, "b": b}]
    lines = render(hidden(blame=[blame(tensors=tensors)]))
    assert line_of(lines, "`c`: ").endswith(f"`c`: {expected}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"suspect": None, "confirmed": False}, "nothing that was tried explains it"),
        ({"suspect": None, "confirmed": False, "tried": []}, "nothing was tried"),
    ],
)
def test_blame_without_a_suspect(changes: dict[str, Any], expected: str) -> None:
    lines = render(hidden(blame=[blame(**changes)]))
    assert line_of(lines, "blame").endswith(expected)
    assert not any("confirmed" in line for line in lines)
    assert "swapped" not in lines[-1]


def test_a_suspect_that_is_not_confirmed_is_not_the_verdict() -> None:
    tried = [{"suspect": "key and value are swapped", "rel": NAN, "agrees": False}]
    lines = render(hidden(blame=[blame(confirmed=False, tried=tried)]))
    assert any(line.strip().startswith("not confirmed") for line in lines)
    assert line_of(lines, "tried").endswith("could not be run")
    assert "swapped" not in lines[-1]


def test_answers_and_weights() -> None:
    lines = render(hidden())
    told = [line for line in lines if "argmax" in line]
    assert len(told) == 2
    assert told[0].endswith(
        "gates as they are: argmax agrees on 100% of the positions, KL 1.0e-9 nats"
    )
    assert told[1].endswith(
        "gates forced to 0.5: argmax agrees on 32% of the positions, KL 0.4 nats"
    )
    assert line_of(lines, "greedy").endswith(
        "differ from token 2 of 2 on: A writes 6 and B writes 7 (one tie)"
    )
    assert line_of(lines, "weights").endswith(
        "197 of 199 tensors hold the same bits; 1 the same values in another dtype; 1 differs; "
        "1 only in A"
    )
    assert any("`xattn.1.attn.k.weight`: B has here what A has at `v`" in line for line in lines)
    assert any("`vision.projection.weight`: only in A" in line for line in lines)


@pytest.mark.parametrize(
    ("greedy", "expected"),
    [
        ({"a": [], "b": [], "equal": None, "note": "no tokens"}, "not run (no tokens)"),
        ({"a": [1], "b": [1], "equal": True, "note": None}, "both write the same 1 token"),
        ({"a": [1, 2], "b": [1], "equal": False, "note": None}, "A writes 2 and B stops"),
    ],
)
def test_greedy(greedy: dict[str, Any], expected: str) -> None:
    assert line_of(render(report(greedy=greedy)), "greedy").endswith(expected)


def test_findings_stand_before_the_verdict() -> None:
    lines = render(hidden())
    assert lines[-2] == "error FC301  a matter of gates"


def test_first_divergences_that_differ_name_their_gates() -> None:
    lines = render(report(diverge={"as-is": "logits", "forced": "xattn.0"}))
    assert line_of(lines, "xattn.0").endswith("<- first divergence (gates forced to 0.5)")
    assert table(lines)[-1].endswith("<- first divergence (gates as they are)")
    assert lines[-1].startswith("diverge at `logits` in float32 with gates as they are; diverge at")


def test_only_on_one_side() -> None:
    cells = {("perceiver.layers.0", 1): {"only_in": "a", "agrees": False}}
    row = line_of(render(report(cells=cells)), "perceiver.layers.0")
    assert row.split("6%")[1].split("<-")[0].strip() == "only in A"


def test_passes_that_only_report() -> None:
    lines = render(report(passes=REPORTED, diverge={"forced": "xattn.1"}))
    told = [line for line in lines if line.startswith("reported")]
    assert len(told) == 2
    assert all("bfloat16" in line and line.endswith("does not decide") for line in told)
    assert "cosine 0.912" in told[1]
    # their tables are there for who asks, with the cosine in place of the tolerance
    heading = "bfloat16: reported, does not decide"
    assert heading not in lines
    verbose = render(report(passes=REPORTED), verbose=True)
    assert "cosine" in verbose[verbose.index(heading) + 2]


def test_a_report_of_nothing_but_bfloat16_shows_its_table() -> None:
    lines = render(report(passes=(("as-is", "bfloat16"),)))
    assert "bfloat16: reported, does not decide" in lines
    assert [row.split()[0] for row in table(lines)] == TEN


def test_two_dtypes_are_two_tables() -> None:
    lines = render(report(passes=(*BOTH, ("as-is", "float64"), ("forced", "float64"))))
    assert [line.split()[0] for line in lines if "gates as they are   " in line] == [
        "float32",
        "float64",
    ]


def test_two_passes_fit_a_terminal() -> None:
    names = ["language.embeddings.positions", *MANY]
    told = report(names, diverge={"forced": "xattn.17"})
    assert max(map(len, table(render(told)))) <= 110


def test_many_stages_are_folded() -> None:
    cells = {("vision.layers.7", 0): {"rel": 3e-6, "cosine": 0.5}}
    lines = render(report(MANY, cells=cells))
    assert [row.split()[0] for row in table(lines)] == [
        "vision.layers.{0-23}",
        "perceiver.layers.{0-5}",
        "xattn.{0-44}",
        "language.layers.{0-44}",
        "logits",
    ]
    # the worst of the run, not its first
    assert line_of(lines, "vision.layers").split()[1:4] == ["4.0e-7", "3.0e-6", "94%"]
    assert any("121 stages" in line and "-v lists each" in line for line in lines)


def test_verbose_lists_every_stage() -> None:
    lines = render(report(MANY), verbose=True)
    assert [row.split()[0] for row in table(lines)] == MANY
    assert not any("-v lists each" in line for line in lines)


def test_forty_stages_are_listed() -> None:
    names = [f"vision.layers.{at}" for at in range(41)]
    assert len(table(render(report(names[:40])))) == 40
    assert len(table(render(report(names)))) == 1


def test_a_first_divergence_is_never_folded() -> None:
    lines = render(report(MANY, diverge={"forced": "language.layers.20"}))
    rows = [row.split()[0] for row in table(lines)]
    assert rows[2:] == [
        "xattn.{0-20}",
        "language.layers.{0-19}",
        "language.layers.20",
        "xattn.{21-44}",
        "language.layers.{21-44}",
        "logits",
    ]
    assert line_of(lines, "language.layers.20 ").endswith("<- first divergence")


def test_a_nan_in_a_run_is_not_hidden_by_the_fold() -> None:
    bad = {"rel": NAN, "max_abs": NAN, "cosine": NAN, "agrees": False, "num_bad": 7}
    lines = render(report(MANY, diverge={"forced": "xattn.3"}, cells={("xattn.9", 1): bad}))
    row = line_of(lines, "xattn.9")
    assert "NaN" in row
    assert row.endswith("7 NaN or infinite in B alone")


def test_nan_is_the_worst_of_a_folded_run() -> None:
    cells = {("xattn.9", 1): {"rel": NAN}, ("xattn.11", 1): {"cosine": NAN}}
    told = report(MANY, diverge={"forced": "xattn.3"}, cells=cells)
    row = line_of(render(told), "xattn.{4-44}")
    assert row.split()[4:7] == ["2.31", "NaN", "NaN"]
    (folded,) = [one for one in stages.stage_rows(told, folded=True) if "xattn.{4-" in one.pattern]
    assert folded.cells[1] is not None
    assert words.cosine(folded.cells[1].cosine) == "NaN"


def test_numbers_that_are_none_are_words() -> None:
    lines = render(odd_numbers())
    rows = {row.split()[0]: row for row in table(lines)}
    assert rows["vision.layers.0"].split()[1:4] == ["0", "0", "0%"]
    assert rows["vision.layers.1"].split()[1:4] == ["4.0e-7", "4.9e-324", "inf"]
    assert rows["perceiver.layers.0"].split()[1:4] == ["-", "-", "-"]
    assert rows["xattn.0"].split()[4:7] == ["NaN", "NaN", "NaN"]
    assert rows["xattn.1"].split()[4:7] == ["inf", "inf", "inf"]
    assert "only in A" in rows["logits"]


def test_a_stored_document_renders_alike() -> None:
    """There NaN and infinity are strings."""
    told = odd_numbers()
    stored = json.loads(json.dumps(to_document(told)))
    again = Report(
        command="parity",
        argv=told.argv,
        verdict=told.verdict,
        exit_code=told.exit_code,
        inputs=told.inputs,
        summary=stored["summary"],
        extra={key: stored[key] for key in told.extra},
    )
    assert render(again) == render(told)


@pytest.mark.parametrize("verdict", ["incomplete", "fail"])
def test_ended_before_anything_ran(verdict: str) -> None:
    lines = render(ended_early(verdict))
    word = "incomplete" if verdict == "incomplete" else "failed"
    assert lines[-1] == f"{word}: nothing was compared: the device `cuda` is not there"
    assert "  hint: use `--device cpu`" in lines


def test_incomplete_after_a_pass_that_agrees() -> None:
    finding = Finding(code="FC405", severity="warning", detail="no second GPU")
    lines = render(report(verdict="incomplete", findings=[finding]))
    assert lines[-1] == "incomplete: no second GPU"
    assert table(lines)


def test_hostile_names_are_escaped() -> None:
    # findings are escaped where every line is printed
    lines = render(replace(hostile(), findings=()), verbose=True)
    assert all(line.isprintable() for line in lines)
    assert sum("\\x1b[31m" in line for line in lines) >= 8
    assert HOSTILE not in "".join(lines)


@pytest.mark.parametrize("part", ["blame", "parameters", "greedy", "data", "sides", "judgement"])
def test_every_part_can_be_missing(part: str) -> None:
    told = hidden()
    for without in ({}, {part: None}):
        extra = {key: value for key, value in told.extra.items() if key != part} | without
        lines = render(
            Report(
                command="parity",
                argv=told.argv,
                verdict="fail",
                exit_code=1,
                summary=told.summary,
                extra=extra,
            )
        )
        assert lines[-1].startswith("diverge at `xattn.1`")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (999.96, "1.0e3"),
        (0.00099999, "1.0e-3"),
        (-INF, "-inf"),
        (1e-300, "1.0e-300"),
    ],
)
def test_short_numbers(value: float, expected: str) -> None:
    assert words.short(value) == expected


def test_a_difference_beyond_the_tolerance_never_reads_as_all_of_it() -> None:
    assert words.used(1.0) == "100%"
    assert words.used(1.0000001) == "101%"
    assert words.share(0.999999) == "99.99%"
    assert words.share(0.57) == "57%"
