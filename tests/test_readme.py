"""The README keeps up with the command line, and names nothing that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from flamingo_ckpt.cli.main import VERBS, cli
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
    """The part of the README about one verb."""
    found = re.search(rf"^### {verb} SRC.*?(?=^##)", README, re.MULTILINE | re.DOTALL)
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


def test_every_field_of_a_report_is_documented() -> None:
    fixture = ROOT / "fixtures" / "tiny.safetensors"
    for arguments in (
        ("inspect", fixture, "--tensors"),
        ("verify", fixture, fixture),
        ("convert", fixture, "not-written.safetensors", "--dry-run"),
    ):
        document = cli_ok(*arguments, "--json").document
        fields = {*document, *document["summary"], *document["inputs"][0], *document["tool"]}
        missing = [field for field in sorted(fields) if f"`{field}" not in README]
        assert missing == []


def code_in(text: str) -> list[str]:
    """What stands in backticks, and between fences."""
    fenced = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`\n]+)`", rest)]
