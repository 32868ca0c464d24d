"""What the tests of `diff` share: files of tiny models, written once, and the answers in short."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import zoo
from tests.support import Outcome, cli


class Answer:
    """One `diff --json`: its exit code, its summary without zeros, and its findings."""

    def __init__(self, outcome: Outcome) -> None:
        self.code = outcome.code
        self.document = outcome.document
        summary = self.document.get("summary", {})
        self.summary = {name: number for name, number in summary.items() if number}
        self.findings: list[dict[str, Any]] = self.document["findings"]

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [one for one in self.findings if one["severity"] == "error"]

    @property
    def told(self) -> list[tuple[str, str]]:
        """(code, key) of every error."""
        return [(one["code"], one["key"]) for one in self.errors]

    def keys(self, code: str) -> list[str]:
        return [one["key"] for one in self.findings if one["code"] == code]

    def detail(self, code: str) -> str:
        """The detail of the only finding with that code."""
        found = [one["detail"] for one in self.findings if one["code"] == code]
        assert len(found) == 1, found
        return str(found[0])


def diff(a: object, b: object, *options: object) -> Answer:
    """`flamingo-ckpt diff A B --json`; exit code, verdict and findings must agree."""
    answer = Answer(cli("diff", a, b, *options, "--json"))
    verdict = answer.document["verdict"]
    assert answer.code == {"pass": 0, "fail": 1, "error": 2}[verdict]
    assert bool(answer.errors) == (verdict != "pass")
    return answer


def model(config: Mapping[str, Any], folder: Path) -> str:
    """`model:…` for a config, written into the folder."""
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return f"model:{path}"


def without(state: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The state without some keys, which must be there."""
    assert set(keys) <= set(state)
    return {name: tensor for name, tensor in state.items() if name not in keys}


def respelt(state: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The state with one key under another name, in its place."""
    assert old in state
    return {new if name == old else name: tensor for name, tensor in state.items()}


def key_of(state: Mapping[str, Any], *words: str) -> str:
    """The first key that has all the words in it."""
    return next(name for name in state if all(word in name for word in words))


def embedding(family: str) -> str:
    return f"lang_encoder.{zoo.FAMILIES[family][1]}.weight"


def misspelt(key: str) -> str:
    """Two letters changed places: `weihgt`."""
    return key[:-3] + key[-2] + key[-3] + key[-1]
