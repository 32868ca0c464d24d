"""What scripts depend on: exit codes, one JSON document, streams, suffixes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt import __version__
from flamingo_ckpt.errors import CODES
from flamingo_ckpt.formats.source import FileSource
from tests.support import FIXTURES, Outcome, cli, cli_ok, cli_process, names_in

SRC = FIXTURES / "torch-wrapped.pt"
VERBS = ("inspect", "convert", "verify", "diff")


def check_document(outcome: Outcome, name: str) -> dict[str, Any]:
    """The fields that every report has, with their types; and agreement with the exit code."""
    document = outcome.document
    assert outcome.out.count("\n{") == 0  # one document, not several
    assert isinstance(document["schema_version"], str)
    assert document["tool"] == {"name": "flamingo-ckpt", "version": __version__}
    assert document["command"]["name"] == name
    assert all(isinstance(word, str) for word in document["command"]["argv"])
    assert document["verdict"] in ("pass", "fail", "error", "incomplete")
    assert document["exit_code"] == outcome.code
    wanted = {0: ("pass",), 1: ("fail",), 2: ("error",), 3: ("incomplete",)}
    assert document["verdict"] in wanted.get(outcome.code, ("error",))
    assert isinstance(document["summary"], dict)
    assert type(document["duration_seconds"]) in (int, float)
    assert document["duration_seconds"] >= 0
    for one in document["inputs"]:
        for field in ("uri", "format"):
            assert isinstance(one[field], str)
        for field in ("layout", "prefix", "wrapper"):
            assert one[field] is None or isinstance(one[field], str)
        for field in ("num_tensors", "num_bytes"):
            assert type(one[field]) is int
    for finding in document["findings"]:
        assert finding["title"] == CODES[finding["code"]]
        assert finding["severity"] in ("error", "warning", "info")
        assert isinstance(finding["detail"], str)
        for field in ("key", "hint"):
            assert finding[field] is None or isinstance(finding[field], str)
    return document


def commands(tmp_path: Path) -> dict[str, list[object]]:
    return {
        "inspect": ["inspect", SRC],
        "convert": ["convert", SRC, tmp_path / "out.pt"],
        "verify": ["verify", SRC, SRC],
        "diff": ["diff", SRC, SRC],
    }


@pytest.mark.parametrize("verb", VERBS)
def test_success(verb: str, tmp_path: Path) -> None:
    outcome = cli(*commands(tmp_path)[verb], "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    document = check_document(outcome, verb)
    assert document["inputs"][0]["uri"] == str(SRC)
    assert document["inputs"][0]["wrapper"] == "model_state_dict"
    assert document["command"]["argv"][0] == verb


def test_the_fields_of_inspect() -> None:
    document = check_document(cli("inspect", FIXTURES / "torch-bare.pt", "--json"), "inspect")
    summary = document["summary"]
    assert summary["num_tensors"] == 14
    assert summary["dtypes"] == {"F32": 8, "BF16": 2, "I64": 1, "BOOL": 1, "U8": 1, "C64": 1}
    assert summary["tied_groups"] == 1
    assert summary["num_parameters"] == 284
    assert "tensors" not in document
    rows = cli("inspect", FIXTURES / "torch-bare.pt", "--json", "--tensors").document["tensors"]
    assert len(rows) == 14
    assert rows[0] == {
        "name": "embed.weight",
        "dtype": "F32",
        "shape": [12, 8],
        "num_bytes": 384,
        "shard": None,
    }
    rows = cli("inspect", FIXTURES / "sharded", "--json", "--tensors").document["tensors"]
    assert {row["shard"] for row in rows} == {
        f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)
    }


USAGE = [
    ([], ""),
    (["frobnicate"], ""),
    (["--frobnicate"], ""),
    (["inspect"], "inspect"),
    (["inspect", "a", "b"], "inspect"),
    (["inspect", "a", "--frobnicate"], "inspect"),
    (["convert", "a"], "convert"),
    (["convert", "a", "b", "--format", "onnx"], "convert"),
    (["convert", "a", "b", "--dtype", "int8"], "convert"),
    (["convert", "a", "b", "--max-expansion", "0.5"], "convert"),
    (["convert", "a", "b", "--max-expansion", "nan"], "convert"),
    (["convert", "a", "b", "--max-expansion", "inf"], "convert"),
    (["convert", "a", "b", "--max-expansion", "1e300"], "convert"),
    (["convert", "a", "b", "--max-shard-size", "9" * 400], "convert"),
    (["convert", "a", "b", "--max-shard-size", "9" * 30 + "TB"], "convert"),
    (["verify", "a"], "verify"),
    (["verify", "a", "b", "--color", "sometimes"], "verify"),
    (["inspect", "a", "--output", "report.docx"], "inspect"),
    (["inspect", "a", "--output", "report"], "inspect"),
    (["report", "render"], "report"),
    (["report", "render", "a", "--format", "pdf"], "report"),
    (["report", "render", "a", "--output", "report.pdf"], "report"),
    (["report", "frobnicate"], "report"),
]


@pytest.mark.parametrize(("arguments", "name"), USAGE)
def test_usage_errors(arguments: list[str], name: str) -> None:
    outcome = cli(*arguments, "--json")
    document = check_document(outcome, name)
    assert (outcome.code, outcome.err, outcome.codes) == (2, "", ["FC006"])
    assert document["command"]["argv"] == [*arguments, "--json"]
    plain = cli(*arguments)
    assert (plain.code, plain.out) == (2, "")
    assert plain.err.startswith("error: " if arguments else "Usage: ")
    assert "Traceback" not in plain.err


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_file(verb: str, tmp_path: Path) -> None:
    arguments = [verb, tmp_path / "absent.pt", *([tmp_path / "x"] if verb != "inspect" else [])]
    outcome = cli(*arguments, "--json")
    document = check_document(outcome, verb)
    assert (outcome.code, outcome.codes) == (2, ["FC002"])
    assert document["where"] == str(tmp_path / "absent.pt")
    plain = cli(*arguments)
    assert (plain.code, plain.out) == (2, "")
    assert f"  --> {tmp_path / 'absent.pt'}" in plain.err.splitlines()


@pytest.mark.parametrize("verb", VERBS)
def test_an_internal_error(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    # the class itself: a module that is imported now would keep a patched function for good
    monkeypatch.setattr(FileSource, "__init__", fail)
    outcome = cli(*commands(tmp_path)[verb], "--json")
    document = check_document(outcome, verb)
    assert (outcome.code, outcome.codes) == (2, ["FC008"])
    assert "RuntimeError: a bug" in document["findings"][0]["detail"]
    plain = cli(*commands(tmp_path)[verb])
    assert (plain.code, plain.out) == (2, "")
    assert "Traceback" not in plain.err
    debug = cli(*commands(tmp_path)[verb], "--debug")
    assert debug.code == 2
    assert "Traceback" in debug.err


def test_debug_shows_the_traceback_of_a_refusal(tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path / "absent.pt", "--debug")
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" in outcome.err
    outcome = cli("inspect", tmp_path / "absent.pt", "--debug", "--json")
    check_document(outcome, "inspect")
    assert outcome.codes == ["FC002"]


def test_exit_1_is_a_bad_answer(tmp_path: Path) -> None:
    outcome = cli("verify", SRC, FIXTURES / "tiny.safetensors", "--json")
    check_document(outcome, "verify")
    assert outcome.code == 1
    torch.save({"w": torch.tensor([1e9])}, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "a.pt", "--dtype", "float16", "--json")
    check_document(outcome, "convert")
    assert outcome.code == 1


@pytest.mark.parametrize("verb", VERBS)
def test_interrupts(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSource, "__init__", interrupt)
    outcome = cli(*commands(tmp_path)[verb], "--json")
    check_document(outcome, verb)
    assert (outcome.code, outcome.codes) == (130, ["FC010"])


@pytest.mark.parametrize("name", ["report.json", "report.md", "REPORT.JSON", "a.html", "a.xml"])
@pytest.mark.parametrize("verb", VERBS)
def test_output(verb: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("an older report")
    outcome = cli_ok(*commands(tmp_path)[verb], "--output", tmp_path / name, "--json")
    content = (tmp_path / name).read_text()
    if name.endswith(".md"):
        assert content.startswith(f"# flamingo-ckpt {verb}: passed\n")
        assert "torch-wrapped.pt" in content
    elif name.endswith(".html"):
        assert f"<h1>{verb}: passed</h1>" in content
    elif name.endswith(".xml"):
        assert ET.fromstring(content).tag == "testsuites"
    else:
        assert json.loads(content) == outcome.document
    assert not [entry for entry in names_in(tmp_path) if entry.startswith(".")]


def test_output_is_written_for_errors_and_bad_answers_too(tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path / "absent", "--output", tmp_path / "a.json")
    assert outcome.code == 2
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["verdict"], written["findings"][0]["code"]) == ("error", "FC002")
    outcome = cli("verify", SRC, FIXTURES / "tiny.safetensors", "--output", tmp_path / "b.md")
    assert outcome.code == 1
    assert "| FC203 |" in (tmp_path / "b.md").read_text()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    outcome = cli("inspect", SRC, "--output", tmp_path / "absent" / "a.json", "--json")
    check_document(outcome, "inspect")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])


@pytest.mark.parametrize("verb", VERBS)
def test_quiet(verb: str, tmp_path: Path) -> None:
    assert cli(*commands(tmp_path)[verb], "-q") == (0, "", "")
    assert cli("verify", SRC, FIXTURES / "tiny.safetensors", "-q") == (1, "", "")


def test_quiet_still_says_why_there_is_no_answer(tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path / "absent", "-q")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")


def test_sizes_are_integers_and_odd_numbers_strings(tmp_path: Path) -> None:
    """No NaN, Infinity or number beyond JSON anywhere: other parsers must read it."""
    torch.save({"w": torch.ones(2), "loss": float("nan"), "best": float("inf")}, tmp_path / "a.pt")
    outcome = cli("inspect", tmp_path / "a.pt", "--json", "--tensors")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads(outcome.out, parse_constant=refuse)


def test_help_and_version() -> None:
    for arguments in (["--help"], ["-h"], ["--version"], *([verb, "--help"] for verb in VERBS)):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
    assert __version__ in cli("--version").out
    assert set(VERBS) <= set(cli("--help").out.split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_on_lines_of_their_own(verb: str) -> None:
    lines = cli(verb, "--help").out.splitlines()
    at = lines.index("  Examples:")
    examples = lines[at + 1 :]
    assert len(examples) >= 3
    assert all(line.startswith(f"    flamingo-ckpt {verb} ") for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_shared_options(verb: str) -> None:
    text = cli(verb, "--help").out
    for option in ("--json", "--output", "-q", "-v", "--color", "--no-progress", "--debug"):
        assert option in text


def test_the_module_and_the_function_are_one_program(tmp_path: Path) -> None:
    process = cli_process("inspect", SRC)
    assert process == cli("inspect", SRC)
    assert cli_process("inspect", tmp_path / "absent").code == 2
    assert cli_process("verify", SRC, FIXTURES / "tiny.safetensors").code == 1


def test_a_verdict_survives_a_reader_that_left(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    torch.save({"w": torch.zeros(3)}, tmp_path / "b.pt")
    command = [sys.executable, "-W", "error", "-m", "flamingo_ckpt", "verify"]
    for second, code in (("b.pt", 1), ("a.pt", 0), ("none.pt", 2)):
        for options in ([], ["--json"]):
            reader, writer = os.pipe()
            os.close(reader)
            try:
                done = subprocess.run(
                    [*command, str(tmp_path / "a.pt"), str(tmp_path / second), *options],
                    stdout=writer,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=120,
                    check=False,
                )
            finally:
                os.close(writer)
            assert done.returncode == code, done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_report_that_cannot_be_written_is_known_first(verb: str, tmp_path: Path) -> None:
    report = tmp_path / "missing" / "report.json"
    outcome = cli(*commands(tmp_path)[verb], "--output", report)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert names_in(tmp_path) == []


def test_without_a_verb_there_is_help() -> None:
    outcome = cli_process()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: ")
    assert all(verb in outcome.err for verb in VERBS)
