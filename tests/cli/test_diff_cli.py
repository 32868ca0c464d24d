"""diff on the command line: the contract of its JSON, what people read, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import zoo
from tests.diff_support import diff, embedding, key_of, misspelt, model, respelt, without
from tests.support import FIXTURES, Outcome, cli, python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diff-cli")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    return model(zoo.openflamingo("llama").config, folder / "llama")


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    return zoo.save_torch(zoo.openflamingo("llama").partial, folder / "good.pt")


@pytest.fixture(scope="module")
def bad(folder: Path) -> Path:
    """A key of each kind of difference."""
    state = zoo.openflamingo("llama").partial
    gate = key_of(state, "attn_gate")
    norm = key_of(state, "perceiver.norm.weight")
    latents = key_of(state, "perceiver.latents")
    state = respelt(without(state, latents), gate, misspelt(gate))
    state |= {norm: state[norm].bfloat16(), "stray": torch.ones(2)}
    return zoo.save_torch(state, folder / "bad.pt", wrapper="model_state_dict", prefix="module.")


def refused(outcome: Outcome, code: str, *words: str) -> dict[str, Any]:
    """Exit 2 with one finding; the same as text, without a stack trace."""
    document = outcome.document
    assert (outcome.code, document["verdict"]) == (2, "error")
    finding = document["findings"][0]
    assert finding["code"] == code
    assert all(word in finding["detail"] + str(finding["hint"]) for word in words), finding
    text = cli(*document["command"]["argv"][:-1])
    assert (text.code, text.out) == (2, "")
    assert "Traceback" not in text.err
    assert text.err.startswith("error: ")
    return dict(finding)


def test_the_json_of_a_difference(bad: Path, config: str) -> None:
    answer = diff(bad, config)
    document = answer.document
    state = zoo.openflamingo("llama").partial
    gate, latents = key_of(state, "attn_gate"), "perceiver.latents"
    assert document["summary"] == {
        "same": 89,
        "changed": 1,
        "renamed": 1,
        "missing": 1,
        "unexpected": 1,
        "expected_absent": 82,
    }
    assert sorted(answer.told) == sorted(
        [
            ("FC206", "module.perceiver.norm.weight"),
            ("FC214", f"module.{misspelt(gate)}"),
            ("FC203", latents),
            ("FC204", "module.stray"),
        ]
    )
    # never folded: every absent key has a finding of its own
    absent = [one for one in answer.findings if one["code"] == "FC215"]
    assert len(absent) == len({one["key"] for one in absent}) == 82
    assert document["missing"] == [latents]
    assert document["unexpected"] == ["module.stray"]
    assert document["renamed"] == [[f"module.{misspelt(gate)}", gate]]
    assert document["level"] == "headers"
    assert document["inputs"][0]["layout"] == document["inputs"][1]["layout"] == "openflamingo"
    assert document["inputs"][0]["prefix"] == "module."
    assert document["inputs"][0]["wrapper"] == "model_state_dict"


def test_the_text_is_short_and_ends_with_the_verdict(bad: Path, good: Path, config: str) -> None:
    outcome = cli("diff", good, config)
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, "")
    assert lines[-1] == "same: 92 same, 82 expected absent (compared: names, dtypes and shapes)"
    assert any("44 keys of the vision base (convert --base-vision" in line for line in lines)
    assert any("38 keys of the language base (convert --base-language" in line for line in lines)
    assert len(lines) < 8
    outcome = cli("diff", bad, config)
    lines = outcome.out.splitlines()
    assert outcome.code == 1
    assert lines[-1].startswith("differs: 89 same, 1 changed, 1 renamed, 1 missing, 1 unexpected")
    for word in ("dtype", "renamed?", "missing", "unexpected"):
        assert sum(line.startswith("error ") and f"  {word}: " in line for line in lines) == 1
    assert len(lines) < 16
    assert "\x1b" not in outcome.out


def test_folded_keys_are_lossless_and_verbose_lists_all(config: str, folder: Path) -> None:
    state = zoo.openflamingo("llama").partial
    kept = {name: t for name, t in state.items() if not name.startswith("perceiver.layers.")}
    path = zoo.save_torch(kept, folder / "folded.pt")
    short, long = (cli("diff", path, config, *flags).out for flags in ([], ["-v"]))
    assert "missing: 66 keys" in short
    assert (
        "perceiver.layers.{0-5}.0.{norm_media,norm_latents}.{weight,bias}  x24  (F32 64)\n" in short
    )
    assert len(short.splitlines()) < 20
    assert "class_embedding" in long
    assert "class_embedding" not in short


def test_what_explains_most_is_told_first(good: Path, folder: Path) -> None:
    wrong = model(zoo.openflamingo("llama", every_n=1).config, folder / "every1")
    errors = [line for line in cli("diff", good, wrong).out.splitlines() if line[:5] == "error"]
    assert errors[0].startswith("error FC217  interval: A has gated cross-attention every 2 layers")


def test_many_wrong_dtypes_are_one_line_each_shape_of_keys(folder: Path, config: str) -> None:
    state = {name: t.bfloat16() for name, t in zoo.openflamingo("llama").partial.items()}
    path = zoo.save_torch(state, folder / "bfloat16.pt")
    outcome = cli("diff", path, config)
    assert "dtype: 92 keys" in outcome.out
    assert outcome.out.count("hint:") == 1
    assert len(outcome.out.splitlines()) < 24
    assert cli("diff", path, config, "--level", "keys").code == 0


@pytest.mark.parametrize("suffix", ["md", "json"])
def test_a_report_in_a_file(suffix: str, bad: Path, config: str, folder: Path) -> None:
    path = folder / f"report.{suffix}"
    outcome = cli("diff", bad, config, "--output", path, "-q")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "")
    text = path.read_text()
    assert "module.stray" in text
    if suffix == "json":
        assert json.loads(text)["summary"]["missing"] == 1
    else:
        assert text.startswith("# flamingo-ckpt diff: failed")


def test_hostile_names_are_escaped_and_named(folder: Path, config: str) -> None:
    state = zoo.openflamingo("llama").partial
    hostile = "perceiver.\x1b[2J\nlatents`{0-3}`"
    path = zoo.save_torch(state | {hostile: torch.ones(3)}, folder / "hostile.pt")
    answer = diff(path, config)
    assert answer.told == [("FC204", hostile)]
    assert "\\x1b[2J\\n" in answer.detail("FC204")
    outcome = cli("diff", path, config)
    assert outcome.code == 1
    assert "\x1b" not in outcome.out
    assert "\\x1b[2J\\n" in outcome.out


def test_files_of_no_layout_are_compared_by_name(folder: Path) -> None:
    left = {"a.weight": torch.ones(2, 3), "b": torch.ones(4), "only.left": torch.zeros(7)}
    right = {"a.weight": torch.ones(3, 2), "b": torch.ones(4), "right": torch.zeros(9)}
    a, b = (zoo.save_torch(s, folder / f"{n}.pt") for n, s in (("l", left), ("r", right)))
    answer = diff(a, b)
    assert sorted(answer.told) == [
        ("FC203", "right"),
        ("FC204", "only.left"),
        ("FC205", "a.weight"),
    ]
    assert answer.summary["same"] == 1
    assert diff(a, a, "--level", "bits").summary == {"same": 3}
    assert answer.document["evidence"] == [None, None]


def test_a_stray_key_on_both_sides_is_the_same(folder: Path) -> None:
    state = zoo.openflamingo("llama").partial
    stray = {"ema.decay": torch.ones(3)}
    a = zoo.save_torch(state | stray, folder / "stray-a.pt")
    b = zoo.save_safetensors(state | stray, folder / "stray-b.safetensors")
    assert diff(a, b, "--level", "bits").summary == {"same": 93}
    c = zoo.save_torch(state | {"ema.decay": torch.zeros(3)}, folder / "stray-c.pt")
    assert diff(a, c, "--level", "bits").told == [("FC301", "ema.decay")]


def test_what_cannot_be_answered(good: Path, config: str, folder: Path) -> None:
    refused(cli("diff", folder / "nowhere.pt", config, "--json"), "FC002")
    refused(cli("diff", good, folder / "nowhere.pt", "--json"), "FC002")
    broken = FIXTURES / "broken" / "pickle-truncated.pt"
    document = cli("diff", broken, config, "--json").document
    assert document["exit_code"] == 2
    foreign = zoo.save_torch({"a": torch.ones(2), "b": torch.ones(3)}, folder / "foreign.pt")
    refused(cli("diff", foreign, config, "--json"), "FC411")
    refused(cli("diff", config, foreign, "--json"), "FC411")
    refused(cli("diff", good, config, "--level", "bits", "--json"), "FC006", "no bytes")
    near = "openflamingo-3b-vitl-mpt1b"
    refused(cli("diff", good, f"model:{near[:-1]}", "--json"), "FC404", near)
    data = zoo.openflamingo("llama").config
    invalid = model(data | {"cross_attn_every_n_layers": 0}, folder / "invalid")
    refused(cli("diff", good, invalid, "--json"), "FC401", "cross_attn_every_n_layers")
    del data["text_config"]["hidden_size"]
    lacking = model(data, folder / "lacking")
    refused(cli("diff", good, lacking, "--json"), "FC401", "text_config.hidden_size")
    unknown = cli("diff", good, config, "--level", "wrong")
    assert unknown.code == 2


def test_from_names_the_layout(good: Path, config: str) -> None:
    assert diff(good, config, "--from", "openflamingo").code == 0
    answer = diff(good, config, "--from", "hf-flamingo")
    assert answer.code == 1
    assert embedding("llama") not in answer.keys("FC203")
    refused(cli("diff", good, config, "--from", "nothing", "--json"), "FC410", "`nothing`")


def test_the_second_answer_needs_no_torch(good: Path, config: str) -> None:
    diff(good, config)
    done = python(
        "import sys; from flamingo_ckpt.cli.main import run\n"
        "code = run(['diff', sys.argv[1], sys.argv[2], '-q'])\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'numpy'} & sys.modules.keys()\n"
        "print(code, sorted(heavy))",
        good,
        config,
    )
    assert done.stdout == "0 []\n", done
