"""parity: conversions that are right pass, in every form, and every stage of both sides is met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.parity.sides import (
    CLIP_STAGES,
    FLAMINGO_STAGES,
    PALIGEMMA_STAGES,
    SMALL,
    Sides,
    assert_clean,
    parity,
)
from tests.support import cli_ok

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@each_family
def test_a_partial_checkpoint_with_its_bases_against_the_folder(family: str, sides: Sides) -> None:
    pair = sides.flamingo(family)
    answer = parity(pair.a, pair.b, *pair.options, "--greedy", "4")
    assert_clean(answer, FLAMINGO_STAGES)
    greedy = answer.document["greedy"]
    assert greedy["equal"] is True
    assert len(greedy["a"]) == len(greedy["b"]) == 4
    # gates that are forced are other gates: the two passes compute something else
    one, other = (answer.layers[-1]["passes"][at]["noise"] for at in (0, 1))
    assert one != other
    made = [side["computed_by"] for side in answer.document["sides"]]
    assert len(set(made)) == 2


def test_cross_attention_in_every_second_layer(sides: Sides) -> None:
    pair = sides.flamingo("llama", layers=4, every_n=2)
    stages = [*FLAMINGO_STAGES[: FLAMINGO_STAGES.index("xattn.0")]]
    stages += ["lm.layers.0", "xattn.1", "lm.layers.1", "lm.layers.2", "xattn.3", "lm.layers.3"]
    answer = parity(pair.a, pair.b, *pair.options, "--greedy", "0")
    assert_clean(answer, (*stages, "lm.final_norm", "logits"))


def test_in_float64(sides: Sides) -> None:
    pair = sides.flamingo("llama")
    answer = parity(pair.a, pair.b, *pair.options, "--dtype", "float64", "--greedy", "0")
    assert_clean(answer, FLAMINGO_STAGES, dtype="float64")
    # LLaMA's own norm computes in float32, whatever it is given
    noise = [
        one["noise"]
        for layer in answer.layers
        if not layer["stage"].startswith(("lm.", "xattn.", "logits"))
        for one in layer["passes"]
    ]
    assert 0 < max(noise) < 1e-14


def test_dtypes_that_do_not_decide_stand_behind_those_that_do(sides: Sides) -> None:
    pair = sides.flamingo("mpt1b")
    dtypes = [word for one in ("bfloat16", "float32", "float64") for word in ("--dtype", one)]
    answer = parity(pair.a, pair.b, *pair.options, *dtypes, "--greedy", "0")
    assert (answer.code, answer.findings) == (0, [])
    told = [(one["dtype"], one["gates"], one["decides"], one["agrees"]) for one in answer.passes]
    gates = ("as-is", "forced")
    assert told == [
        *(("float64", one, True, True) for one in gates),
        *(("float32", one, True, True) for one in gates),
        *(("bfloat16", one, False, None) for one in gates),
    ]
    rounding = [one["passes"][4]["noise"] for one in answer.layers]
    assert max(rounding) > 1e-3


def test_a_folder_against_the_partial_checkpoint(sides: Sides) -> None:
    pair = sides.flamingo("opt")
    bases = pair.options[:4]  # B takes the folder's config
    answer = parity(pair.b, pair.a, *bases, "--greedy", "0")
    assert_clean(answer, FLAMINGO_STAGES, told=("FC485",))
    assert "B has no config" in answer.detail("FC485")


@pytest.mark.parametrize("family", ["mpt7b", "llama"])
def test_a_full_state_dict_with_its_aliases(family: str, sides: Sides, tmp_path: Path) -> None:
    full, config = sides.files.write("full", family, **SMALL), sides.flamingo(family).options[5]
    folder = tmp_path / "whole"
    cli_ok("convert", full, folder, "--to", "hf-flamingo", "--config", config)
    answer = parity(full, folder, "--config", config, "--greedy", "0")
    assert_clean(answer, FLAMINGO_STAGES)


CLIPS = ("open_clip", "custom_text", "openai")


@pytest.mark.parametrize("name", CLIPS)
def test_clip_by_any_of_its_names(name: str, sides: Sides, tmp_path: Path) -> None:
    pair = sides.clip()
    source = zoo.save_torch(getattr(zoo.clip(layers=2), name), tmp_path / "clip.pt")
    answer = parity(source, pair.b, *pair.options)
    assert_clean(answer, CLIP_STAGES, gates=("as-is",))
    assert answer.document["greedy"] is None
    if name != "open_clip":
        return
    back = parity(pair.b, source, *pair.options, "--dtype", "float64")
    assert_clean(back, CLIP_STAGES, gates=("as-is",), dtype="float64")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_clip_that_was_converted_there_and_back(
    quick_gelu: bool, sides: Sides, tmp_path: Path
) -> None:
    model = zoo.clip(layers=2, quick_gelu=quick_gelu)
    source = zoo.save_torch(model.open_clip, tmp_path / "clip.pt")
    config = tmp_path / "open_clip.json"
    config.write_text(_json(zoo.open_clip_cfg(2, quick_gelu=quick_gelu)))
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    cli_ok("convert", source, there, "--to", "hf-clip", "--config", config)
    cli_ok("convert", there, back, "--to", "open_clip")
    assert_clean(parity(source, there, "--config", config), CLIP_STAGES, gates=("as-is",))
    assert_clean(parity(there, back, "--config", config), CLIP_STAGES, gates=("as-is",))


def _json(data: Any) -> str:
    import json

    return json.dumps(data)


@pytest.mark.parametrize("version", [1, 2])
def test_paligemma_in_every_layout(version: int, sides: Sides) -> None:
    first = sides.paligemma_folder(version, "L1")
    for layout in ("L2", "L3", "L4", "L5"):
        other = sides.paligemma_folder(version, layout)
        answer = parity(first, other, "--greedy", "2" if layout == "L4" else "0")
        assert_clean(answer, PALIGEMMA_STAGES, gates=("as-is",))
    back = parity(other, first, "--dtype", "float64", "--greedy", "0")
    assert_clean(back, PALIGEMMA_STAGES, gates=("as-is",), dtype="float64")


@pytest.mark.parametrize("version", [1, 2])
def test_paligemma_as_big_vision_has_it(version: int, sides: Sides) -> None:
    folder, arrays = sides.paligemma_folder(version, "L4"), sides.paligemma_npz(version)
    for a, b, lacking in ((arrays, folder, "A"), (folder, arrays, "B")):
        answer = parity(a, b, "--greedy", "0")
        assert_clean(answer, PALIGEMMA_STAGES, gates=("as-is",), told=("FC485",))
        assert answer.detail("FC485").startswith(f"{lacking} has no config")


def test_a_sharded_folder(sides: Sides, tmp_path: Path) -> None:
    pair = sides.flamingo("gptj")
    shards = tmp_path / "shards"
    cli_ok("convert", pair.b, shards, "--max-shard-size", "500KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    answer = parity(pair.a, shards, *pair.options, "--greedy", "0")
    assert_clean(answer, FLAMINGO_STAGES)
    by_index = parity(shards / "model.safetensors.index.json", pair.b, "--greedy", "0")
    assert_clean(by_index, FLAMINGO_STAGES)


def test_a_rounded_copy_is_not_the_same(sides: Sides, tmp_path: Path) -> None:
    pair = sides.flamingo("llama")
    rounded = tmp_path / "bf16"
    cli_ok("convert", pair.b, rounded, "--dtype", "bfloat16")
    answer = parity(pair.a, rounded, *pair.options, "--greedy", "0")
    assert (answer.code, answer.codes) == (1, ["FC301", "FC480", "FC483"])
    assert answer.diverges_at == {"as-is": "vision.embeddings", "forced": "vision.embeddings"}
    first = answer.blame[0]
    assert (first.stage, first.confirmed) == ("vision.embeddings", True)
    tower = "vision_encoder.vision_model.embeddings."
    assert {
        f"{tower}class_embedding",
        f"{tower}patch_embedding.weight",
        f"{tower}position_embedding.weight",
    } < set(first.keys)
    # all at once: what was cast was cast as a whole, and nothing else is wrong
    assert set(first.keys) == set(pair.state)
    assert first.suspect.endswith("tensors are BF16 in B and F32 in A: they were rounded")
    assert len(answer.blame) == 1
    different = answer.document["parameters"]["different"]
    assert all("rounded to bfloat16" in one["what"] for one in different[:32])
    assert set(answer.told("FC301")) == set(pair.state)  # no tensor of the zoo fits in bfloat16


def test_a_copy_in_a_wider_dtype_is_the_same(sides: Sides, tmp_path: Path) -> None:
    pair = sides.flamingo("llama")
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    cli_ok("convert", pair.b, narrow, "--dtype", "bfloat16")
    cli_ok("convert", narrow, wide, "--dtype", "float32")
    answer = parity(narrow, wide, "--greedy", "0")
    assert_clean(answer, FLAMINGO_STAGES, told=("FC206",))
    parameters = answer.document["parameters"]
    assert len(parameters["cast"]) == parameters["compared"]
    (told,) = answer.findings
    assert told["severity"] == "info"
    assert told["detail"].startswith(f"{parameters['compared']} tensors hold the same values")
