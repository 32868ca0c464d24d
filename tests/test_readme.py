"""The README keeps up with the command line, and names nothing that is not there."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import flamingo_ckpt
from flamingo_ckpt import provenance, vocabulary
from flamingo_ckpt.cli.main import VERBS, cli
from flamingo_ckpt.errors import CODES
from flamingo_ckpt.layouts.registry import LAYOUTS
from flamingo_ckpt.models.presets import PRESETS
from flamingo_ckpt.prepare import PARTIAL_FIELD
from tests import zoo
from tests.support import cli_ok

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> Iterator[tuple[str, click.Command]]:
    # With the settings that a real run has: click caches the help option on first use.
    context = click.Context(cli, **cli.context_settings)
    yield "", cli
    for verb in cli.list_commands(context):
        command = cli.get_command(context, verb)
        assert command is not None
        yield verb, command
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                yield f"{verb} {name}", command.commands[name]


def flags() -> list[tuple[str, str]]:
    """(verb, flag) for everything that any `--help` lists."""
    return [
        (verb, flag)
        for verb, command in commands()
        for param in command.get_params(click.Context(command, **cli.context_settings))
        if isinstance(param, click.Option)
        for flag in (*param.opts, *param.secondary_opts)
    ]


def mentions(text: str, flag: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text) is not None


def section(verb: str) -> str:
    """The part of the README about one verb, all of whose verbs it has where there are several."""
    verb = verb.partition(" ")[0]
    pattern = rf"^### {verb} (?:[a-z]+ )?[A-Z\[].*?(?=^##)"
    found = re.search(pattern, README, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the README has no section about {verb}"
    return found[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_section(verb: str) -> None:
    assert verb in section(verb)


@pytest.mark.parametrize(("verb", "flag"), flags())
def test_every_option_is_documented(verb: str, flag: str) -> None:
    shared = re.search(r"^### Options of every verb.*?(?=^##)", README, re.MULTILINE | re.DOTALL)
    assert shared is not None
    own = section(verb) if verb else README
    assert mentions(own + shared[0], flag) or flag in ("-h", "--help")
    assert mentions(README, flag)


def test_every_option_in_the_readme_exists() -> None:
    known = {flag for _, flag in flags()}
    of_others = {"--rounds"}  # of the benchmark
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert named - of_others <= known


def test_the_first_two_commands_are_the_set_up() -> None:
    first = re.search(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_every_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", "\n".join(code_in(README)))) <= targets


def test_every_path_that_is_named_exists() -> None:
    tops = ("flamingo_ckpt/", "fixtures/", "benchmarks/", "tests/")
    paths = {word for text in code_in(README) for word in text.split() if word.startswith(tops)}
    assert len(paths) > 8
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def fields_of(value: Any) -> set[str]:
    """The names of a report's fields: its own, and those of the objects in it that are no maps."""
    document = dict(value)
    inner = [document["tool"], document["summary"], *document["inputs"], *document["findings"]]
    inner += [
        *document.get("tensors", ()),
        *document.get("layouts", ()),
        *document.get("rules", ()),
        *document.get("codes", ()),
    ]
    inner.append(document.get("layout") or {})
    return {field for part in (document, *inner) for field in part}


def test_every_field_of_a_report_is_documented(tmp_path: Path) -> None:
    fixture = ROOT / "fixtures" / "tiny.safetensors"
    llama = zoo.openflamingo("llama")
    partial = zoo.save_torch(llama.partial, tmp_path / "partial.pt")
    for arguments in (
        ("inspect", fixture, "--tensors"),
        ("inspect", partial),
        ("inspect", "model:vit-b-32"),
        ("verify", fixture, fixture),
        ("convert", fixture, "not-written.safetensors", "--dry-run"),
        ("convert", partial, tmp_path / "hf", "--to", "hf-flamingo"),
        ("diff", partial, tmp_path / "hf"),
        ("layouts",),
        ("layouts", "hf-flamingo"),
        ("explain",),
        ("explain", "FC203"),
    ):
        document = cli_ok(*arguments, "--json").document
        named = sorted(fields_of(document))
        assert [field for field in named if f"`{field}" not in README] == []


def test_every_layout_is_documented_and_no_other() -> None:
    text = re.search(r"^## Layouts.*?(?=^## )", README, re.MULTILINE | re.DOTALL)
    assert text is not None
    rows = [line.split("|")[1] for line in text[0].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(name for name in named if not name.startswith("flamingo_ckpt.")) == sorted(
        LAYOUTS
    )
    for layout in LAYOUTS.values():
        if layout.lossy or layout.read_only or layout.refused:
            (row,) = [
                line
                for line in text[0].splitlines()
                if line.startswith("|") and f"`{layout.name}`" in line.split("|")[1]
            ]
            assert any(word in row for word in ("lossy", "read only", "never converted"))


def test_every_preset_is_documented_and_no_other() -> None:
    text = re.search(r"^\| presets \|.*?^$", README, re.MULTILINE | re.DOTALL)
    assert text is not None
    named = set()
    for row in text[0].splitlines():
        names = re.findall(r"`([a-z0-9][^`]*)`", row)
        suffixes = re.findall(r"`(-[^`]+)`", row)
        named |= {name + suffix for name in names for suffix in suffixes}
        if not suffixes or "also" in row:
            named |= set(names)
    assert named == set(PRESETS)


def test_every_finding_code_exists() -> None:
    named = set(re.findall(r"\bFC\d+\b", README))
    assert len(named) > 15
    assert named <= set(CODES)


def test_what_a_converted_file_remembers_is_documented() -> None:
    keys = {
        provenance.BASE_KEY,
        provenance.PARTIAL_KEY,
        vocabulary.ROWS_KEY,
        vocabulary.ZERO_ROWS_KEY,
    }
    rows = re.findall(r"^\| `(flamingo_ckpt\.\w+)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(keys)
    assert f"`{PARTIAL_FIELD}`" in README


def python_examples() -> list[ast.Module]:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [ast.parse(block) for block in blocks]


def test_python_examples_name_what_is_there_and_call_it_right() -> None:
    """They cannot run here, for want of weights; the same calls run in test_usage_examples."""
    ours: dict[str, Any] = {}
    called: set[str] = set()
    for tree in python_examples():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flamingo_ckpt"):
                module = importlib.import_module(str(node.module))
                ours |= {alias.name: getattr(module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name = node.func.id
                if name in ours:
                    keywords = {str(one.arg): None for one in node.keywords}
                    inspect.signature(ours[name]).bind(*node.args, **keywords)
                    called.add(name)
    loaders = {
        name for name in flamingo_ckpt.__all__ if name.startswith(("load_", "create_", "save_"))
    }
    assert called >= loaders


@pytest.mark.skipif(sys.platform != "linux", reason="staging is Linux only")
def test_the_session_is_what_the_demo_prints(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    done = subprocess.run(
        ["sh", ROOT / "fixtures" / "demo.sh"],
        env={
            **os.environ,
            "DEMO_DIR": str(demo),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(str(demo), ".demo").splitlines()
    text = re.search(r"^## A session.*?^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert text is not None
    session = text[1].replace(" \\\n     ", "").splitlines()
    assert len(session) > 50
    assert [line for line in session if line != "  ..." and line not in printed] == []


def code_in(text: str) -> list[str]:
    """What stands in backticks, and between fences."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`\n]+)`", rest)]
