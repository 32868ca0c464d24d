"""A short run, interrupted, taken up, released, converted, verified and compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt import load_training_state, save_checkpoint
from tests import training_support as support
from tests import zoo
from tests.layout_support import Files, assert_same, carried, metadata
from tests.support import cli, cli_ok, facts_at, torch_facts


def finish(path: Path, family: str, tmp_path: Path) -> None:
    """From a released checkpoint to a folder that is whole, by the command line."""
    files = Files(tmp_path)
    config, folder = files.config(family, **support.OPTIONS), tmp_path / "hf"
    bases = files.bases(family, **support.OPTIONS)
    cli_ok("convert", path, folder, "--to", "hf-flamingo", "--config", config, *bases)
    cli_ok("verify", path, folder, *bases)
    diff = cli_ok("diff", folder, f"model:{folder}/config.json", "--json").document
    assert {what for what, number in diff["summary"].items() if number} == {"same"}
    changed = cli(
        "diff", files.write("partial", family, **support.OPTIONS), path, "--level", "bits", "--json"
    )
    assert changed.code == 1
    assert changed.document["summary"]["changed"] > 20
    cli_ok("convert", folder, tmp_path / "back.pt", "--to", "openflamingo")
    assert_same(facts_at(tmp_path / "back.pt"), facts_at(path))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_from_a_run_to_a_release(family: str, tmp_path: Path) -> None:
    model = support.flamingo(family)
    run = support.optimizer(model)
    support.steps(model, run, range(2))
    save_checkpoint(model, tmp_path / "run.pt", optimizer=run[0], lr_scheduler=run[1], epoch=0)
    model = support.flamingo(family)
    run = support.optimizer(model)
    assert load_training_state(tmp_path / "run.pt", model, *run).next_epoch == 1
    support.steps(model, run, range(2, 4))
    release = tmp_path / "checkpoint.safetensors"
    save_checkpoint(model, release)
    assert_same(facts_at(release), expected(model, family))
    finish(release, family, tmp_path)


def expected(model: Any, family: str) -> Any:
    """The trained tensors and the embeddings of the model as it is now."""
    state = model.state_dict()
    kept = set(zoo.openflamingo(family, **support.OPTIONS).partial)
    facts = carried({name: state[name] for name in kept})
    if family == "gpt_neox":
        head = {"lang_encoder.embed_out.weight": state["lang_encoder.lm_head.weight"]}
        facts |= torch_facts(head)
    return facts


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    """A folder of the trained tensors alone is known to lack what its bases have."""
    save_checkpoint(support.flamingo(), tmp_path / "folder")
    assert metadata(tmp_path / "folder")["flamingo_ckpt.partial"] == "true"
    files = Files(tmp_path)
    cli_ok(
        *("convert", tmp_path / "folder", tmp_path / "hf", "--to", "hf-flamingo"),
        *("--config", files.config("llama", **support.OPTIONS)),
        *files.bases("llama", **support.OPTIONS),
    )
    assert "flamingo_ckpt.partial" not in metadata(tmp_path / "hf")
