"""The hook and the action that use the command line: what they call is there, and does its part."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from flamingo_ckpt.cli.main import cli as program
from tests.support import FIXTURES, cli

ROOT = FIXTURES.parent
README = (ROOT / "README.md").read_text()
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]


def parsed(words: list[str]) -> click.Context:
    """A command line as click reads it, without running it."""
    assert words[0] == "flamingo-ckpt"
    context = click.Context(program, info_name="flamingo-ckpt")
    name, command, rest = program.resolve_command(context, words[1:])
    assert command is not None
    if isinstance(command, click.Group):
        inner = click.Context(command, info_name=name, parent=context)
        name, command, rest = command.resolve_command(inner, rest)
        assert command is not None
    return command.make_context(name, list(rest), parent=context)


def test_the_hook_is_a_command_line_that_is_accepted() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert (hook["id"], hook["language"]) == ("flamingo-ckpt-check", "python")
    assert hook["pass_filenames"] is False
    chosen = parsed([*shlex.split(hook["entry"]), *hook["args"]]).params
    assert (chosen["src"], chosen["level"]) == (".", "headers")
    files = re.compile(hook["files"])
    for name in ("model.safetensors", "a/pytorch_model.bin", "README.md", "a/config.json"):
        assert files.search(name), name
    for name in ("setup.py", "notes/READMEs.txt", "model.safetensors.py"):
        assert not files.search(name), name


def test_the_files_of_the_readme_are_what_they_seem() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (hooks,) = [one for one in map(yaml.safe_load, blocks) if "repos" in one]
    assert [one["id"] for one in hooks["repos"][0]["hooks"]] == ["flamingo-ckpt-check"]
    (workflow,) = [one for one in map(yaml.safe_load, blocks) if "jobs" in one]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    (ours,) = [step for step in steps if "flamingo-ckpt" in step.get("uses", "")]
    assert set(ours["with"]) <= set(ACTION["inputs"])
    assert "path" in ours["with"]


def test_nothing_is_pasted_into_a_script() -> None:
    scripts = [step["run"] for step in STEPS if "run" in step]
    assert len(scripts) == 4
    assert not [script for script in scripts if "${{" in script]
    assert all(step["shell"] == "bash" for step in STEPS if "run" in step)
    told = re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text())
    assert set(told) == set(ACTION["inputs"])
    assert [one for one in ACTION["inputs"].values() if one.get("required")] == [
        ACTION["inputs"]["path"]
    ]


class Runner:
    """As much of a runner as the steps need: expressions in `env`, files for what they say."""

    def __init__(self, tmp: Path, inputs: dict[str, str]) -> None:
        self.tmp = tmp
        defaults = {name: one.get("default", "") for name, one in ACTION["inputs"].items()}
        self.values = {f"inputs.{name}": value for name, value in (defaults | inputs).items()}
        self.values |= {"github.action_path": str(ROOT), "runner.temp": str(tmp)}
        for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_PATH"):
            (tmp / name).touch()

    def expand(self, text: str) -> str:
        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: self.values[found[1]], text)

    def run(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **{name: str(self.tmp / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")},
            **{name: self.expand(value) for name, value in step["env"].items()},
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", step["run"]],
            env=env,
            cwd=self.tmp,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for line in (self.tmp / "GITHUB_OUTPUT").read_text().splitlines():
            name, _, value = line.partition("=")
            self.values[f"steps.{step.get('id', '')}.outputs.{name}"] = value
        return done


def all_steps(runner: Runner) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every script but the one that installs."""
    return {
        step["name"]: runner.run(step)
        for step in STEPS
        if "run" in step and step["name"] != "Install"
    }


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "a release"
    shutil.copytree(FIXTURES / "hf-bin", folder)
    return folder


def test_the_action_checks_and_renders_and_answers(release: Path, tmp_path: Path) -> None:
    inputs = {"path": "a release", "level": "headers", "args": "--strict\n--include\n*\n"}
    runner = Runner(tmp_path, inputs)
    done = all_steps(runner)
    assert done["Check"].returncode == done["Render"].returncode == 0, done
    assert done["Answer"].returncode == 1
    folder = Path(runner.values["steps.check.outputs.report"])
    document = json.loads((folder / "report.json").read_text())
    assert (document["command"]["name"], document["exit_code"]) == ("check", 1)
    assert {"--strict", "--include", "*", "headers"} <= set(document["command"]["argv"])
    annotations = done["Render"].stdout.splitlines()
    assert any(line.startswith("::error file=a release/") for line in annotations)
    assert "## flamingo-ckpt check: failed" in (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    assert "check: failed" in (folder / "report.html").read_text()
    assert json.loads((folder / "report.sarif").read_text())["version"] == "2.1.0"
    assert ET.parse(folder / "report.xml").getroot().tag == "testsuites"


def test_annotations_name_the_release_and_not_its_source(tmp_path: Path) -> None:
    """Also where nothing but the source could be read."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no header")
    stored = tmp_path / "report.json"
    source = FIXTURES / "tiny.safetensors"
    assert cli("check", tmp_path / "broken", "--source", source, "--output", stored).code == 1
    lines = cli("report", "render", stored, "--format", "github").out.splitlines()
    (place,) = {line.split(",")[0] for line in lines if "model.safetensors" in line}
    assert place == f"::error file={tmp_path}/broken/model.safetensors"


def test_inputs_of_the_action_are_words_and_never_code(tmp_path: Path) -> None:
    inputs = {
        "path": '"; touch pwned; echo "$(touch pwned)',
        "level": "`touch pwned`",
        "args": "; touch pwned",
    }
    runner = Runner(tmp_path, inputs)
    done = all_steps(runner)
    assert done["Answer"].returncode == 2
    assert not (tmp_path / "pwned").exists()
    # a level that there is not leaves no report but this one
    folder = Path(runner.values["steps.check.outputs.report"])
    assert json.loads((folder / "report.json").read_text())["verdict"] == "error"
    assert done["Render"].stdout.startswith("::error title=FC006 ")
