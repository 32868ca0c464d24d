"""`inspect model:...` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import zoo
from tests.support import cli, cli_ok, cli_process, python

PRESET = "model:openflamingo-3b-vitl-mpt1b"


def test_counts_of_a_preset() -> None:
    document = cli_ok("inspect", PRESET, "--json").document
    (one,) = document["inputs"]
    assert (one["uri"], one["format"], one["layout"]) == (PRESET, "model", "openflamingo")
    assert document["summary"] == {
        "num_tensors": 823,
        "num_parameters": 2_559_117_360,
        "num_bytes": 4 * 2_559_117_360,
        "dtypes": {"F32": 823},
        "tied_groups": 0,
        "num_checkpoint_tensors": 334,
        "num_checkpoint_parameters": 1_046_992_944,
    }
    assert (one["num_tensors"], one["num_bytes"]) == (823, 4 * 2_559_117_360)
    assert "tensors" not in document
    assert document["details"]["alias_trees"] == {
        "lang_encoder.old_decoder_blocks": 192,
        "lang_encoder.gated_cross_attn_layers": 264,
    }


def test_tensors_of_a_config(tmp_path: Path) -> None:
    made = zoo.hf_flamingo("opt")
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    document = cli_ok("inspect", f"model:{tmp_path}", "--json", "--tensors").document
    head = "lang_encoder.lm_head.weight"
    rows = {row["name"]: tuple(row["shape"]) for row in document["tensors"]}
    assert rows == {name: tuple(t.shape) for name, t in made.state.items() if name != head}
    assert document["tied"] == [["lang_encoder.model.decoder.embed_tokens.weight", head]]


def test_text_for_people() -> None:
    lines = cli_ok("inspect", PRESET).out.splitlines()
    assert lines[0] == f"{PRESET}   10.2 GB   model   823 tensors   layout `openflamingo`"
    text = "\n".join(lines)
    assert "perceiver.layers.{0-5}.0.to_kv.weight" in text
    assert "release    334 tensors, 1046992944 parameters" in text
    assert "alias      264 names under `lang_encoder.gated_cross_attn_layers`" in text


def test_the_second_time_needs_no_torch() -> None:
    cli_ok("inspect", PRESET)
    code = (
        "import sys\n"
        "from flamingo_ckpt.cli.main import run\n"
        f"assert run(['inspect', '{PRESET}', '-q']) == 0\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["model:no-such-preset"], "FC404"),
        (["model:"], "FC404"),
        ([PRESET, "--wrapper-key", "model"], "FC006"),
        ([PRESET, "--npy-bfloat16"], "FC006"),
    ],
)
def test_bad_input(arguments: list[str], code: str) -> None:
    outcome = cli("inspect", *arguments, "--json")
    assert (outcome.code, outcome.codes) == (2, [code])


def test_a_config_that_is_wrong_is_an_error_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "flamingo"}')
    outcome = cli_process("inspect", f"model:{file}")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "error: the config has no `text_config`",
        f"  --> {file}",
    ]
