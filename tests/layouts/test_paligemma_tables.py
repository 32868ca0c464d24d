"""PaliGemma's maps, against transformers and a numpy converter of big_vision's arrays."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.mapping import assemble
from flamingo_ckpt.layouts.paligemma import LAYOUTS
from flamingo_ckpt.layouts.registry import LAYOUTS as ALL_LAYOUTS
from tests.layouts.carry import assert_same_bits, carry, read
from tests.zoo_paligemma import (
    HEADS,
    PADDING,
    VIS_HEADS,
    WORDS,
    PaliGemmaZoo,
    inputs,
    paligemma,
)

BY_NAME = {layout.name: layout for layout in LAYOUTS}
HUB = BY_NAME["paligemma"]
PEFT = BY_NAME["paligemma-peft"]
SPELLINGS = {
    "L1": "paligemma",
    "L2": "paligemma-l2",
    "L3": "paligemma-l3",
    "L4": "paligemma-l4",
    "L5": "paligemma-l5",
    "L6": "paligemma-l6",
}
WITH_HEAD = [name for name in SPELLINGS if name != "L6"]
MODELS = [(version, tied) for version in (1, 2) for tied in (True, False)]
EMBEDDING = "language_model.model.embed_tokens.weight"


def zoo_of(version: int, tied: bool = True) -> PaliGemmaZoo:
    """Eleven layers, so that layer 10 must not sort before layer 2."""
    return paligemma(version=version, tied=tied, layers=11)


def stored(zoo: PaliGemmaZoo, name: str) -> dict[str, Any]:
    """The state dict as that layout stores it on disk."""
    state = zoo.layout(name)
    if name == "L3" and "lm_head.weight" in state:
        # as transformers 5.5.4 writes it
        state["language_model.lm_head.weight"] = state.pop("lm_head.weight")
    if name == "L6":
        return zoo.l6_nested
    return state


def layout_of(name: str):
    return BY_NAME[SPELLINGS[name]]


def arrays_of(version: int):
    return BY_NAME["paligemma-npz" if version == 1 else "paligemma2-npz"]


def dims(version: int) -> dict[str, int]:
    return {"visionheads": VIS_HEADS, "lmheads": HEADS, "kvheads": version}


@pytest.mark.parametrize(("version", "tied"), MODELS)
def test_any_spelling_becomes_any_other(version, tied):
    zoo = zoo_of(version, tied)
    names = SPELLINGS if tied else WITH_HEAD
    for source in names:
        for target in names:
            carried = carry(layout_of(source), layout_of(target), stored(zoo, source))
            assert_same_bits(carried, stored(zoo, target))


@pytest.mark.parametrize("version", [1, 2])
def test_a_dump_of_the_memory_holds_the_head_beside_the_embedding(version):
    zoo = zoo_of(version)
    carried = carry(BY_NAME["paligemma-l4"], HUB, zoo.memory)
    assert_same_bits(carried, zoo.layout("L1", head=True))
    assert "language_model.lm_head.weight" in carried


def test_both_spellings_of_the_base_class_are_read_and_one_is_written():
    zoo, layout = zoo_of(1), BY_NAME["paligemma-l6"]
    assert_same_bits(carry(layout, layout, zoo.layout("L6")), zoo.l6_nested)
    assert_same_bits(carry(layout, layout, zoo.l6_nested), zoo.l6_nested)


def test_both_keys_of_the_head_that_a_mistaken_save_may_have_are_read():
    zoo = zoo_of(1, tied=False)
    assert_same_bits(carry(BY_NAME["paligemma-l3"], HUB, zoo.layout("L3")), zoo.layout("L1"))


def test_an_output_head_has_no_place_in_the_base_class_and_in_arrays():
    atoms = read(HUB, zoo_of(1, tied=False).layout("L1")).atoms
    for name in ("paligemma-l6", "paligemma-npz"):
        made = assemble(atoms, BY_NAME[name].table(), dims(1))
        assert made.unplaced == ("lm.head.weight",)


def padded(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    """With the rows that fill the vocabulary up: how many there are, no table knows."""
    name = f"{prefix}llm/embedder/input_embedding"
    return arrays | {name: np.pad(arrays[name], ((0, PADDING), (0, 0)))}


@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("version", [1, 2])
def test_arrays_become_the_hub_layout_and_come_back(version, prefix):
    zoo = zoo_of(version)
    arrays, layout = padded(zoo.npz(prefix=prefix), prefix), arrays_of(version)
    hub = carry(layout, HUB, arrays)
    assert_same_bits(hub, zoo.layout("L1"))
    back = carry(HUB, layout, hub, dims(version))
    assert_same_bits(back, padded(zoo.npz(), "params/"))


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_arrays(name):
    zoo = zoo_of(2)
    arrays = carry(layout_of(name), arrays_of(2), zoo.layout(name), dims(2))
    assert_same_bits(arrays, padded(zoo.npz(), "params/"))


def test_without_the_number_of_heads_no_array_is_guessed():
    atoms = read(HUB, zoo_of(2).layout("L1")).atoms
    faults = assemble(atoms, arrays_of(2).table(), {}).faults
    assert set(faults) == {
        f"params/{name}"
        for name in (
            *(
                f"img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{part}/{kind}"
                for part in ("query", "key", "value")
                for kind in ("kernel", "bias")
            ),
            "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel",
            "llm/layers/attn/q_einsum/w",
            "llm/layers/attn/kv_einsum/w",
            "llm/layers/attn/attn_vec_einsum/w",
        )
    }
    assert "`kvheads`" in faults["params/llm/layers/attn/kv_einsum/w"]


def test_gemma_2_does_not_fit_the_arrays_of_gemma_1():
    atoms = read(HUB, zoo_of(2).layout("L1")).atoms
    unplaced = assemble(atoms, arrays_of(1).table(), dims(2)).unplaced
    assert {name.split(".", 3)[3] for name in unplaced} == {
        "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
    }
    reading = read(arrays_of(1), zoo_of(2).npz())
    assert {name.split("/")[3] for name in reading.unknown} == {
        "post_attention_norm",
        "post_ffw_norm",
    }


sizes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 12),
        "heads": st.integers(1, 4),
        "kv_heads": st.integers(1, 4),
        "head_dim": st.integers(1, 5),
        "width": st.integers(1, 6),
        "mlp": st.integers(1, 6),
    }
)


def language_arrays(size: dict[str, int]) -> dict[str, Any]:
    layers, heads, dim = size["layers"], size["heads"], size["head_dim"]
    width, mlp = size["width"], size["mlp"]
    shapes = {
        "attn/q_einsum/w": (layers, heads, width, dim),
        "attn/kv_einsum/w": (layers, 2, size["kv_heads"], width, dim),
        "attn/attn_vec_einsum/w": (layers, heads, dim, width),
        "mlp/gating_einsum": (layers, 2, width, mlp),
        "mlp/linear": (layers, mlp, width),
        "pre_ffw_norm/scale": (layers, width),
    }
    random = np.random.default_rng(0)
    return {
        f"params/llm/layers/{name}": random.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def converted(arrays: dict[str, Any], version: int) -> dict[str, Any]:
    """What the published conversion computes, with its transposes and reshapes."""
    get = {name.removeprefix("params/llm/layers/"): array for name, array in arrays.items()}
    norm = "post_attention_layernorm" if version == 1 else "pre_feedforward_layernorm"
    found = {}
    for i in range(len(get["mlp/linear"])):
        place = f"language_model.model.layers.{i}."
        query, out = get["attn/q_einsum/w"][i], get["attn/attn_vec_einsum/w"][i]
        heads, width, dim = query.shape
        found[place + "self_attn.q_proj.weight"] = query.transpose(0, 2, 1).reshape(-1, width)
        for j, name in enumerate(("k_proj", "v_proj")):
            one = get["attn/kv_einsum/w"][i, j]
            found[place + f"self_attn.{name}.weight"] = one.transpose(0, 2, 1).reshape(-1, width)
        found[place + "self_attn.o_proj.weight"] = out.transpose(2, 0, 1).reshape(
            width, heads * dim
        )
        for j, name in enumerate(("gate_proj", "up_proj")):
            found[place + f"mlp.{name}.weight"] = get["mlp/gating_einsum"][i, j].T
        found[place + "mlp.down_proj.weight"] = get["mlp/linear"][i].T
        found[place + f"{norm}.weight"] = get["pre_ffw_norm/scale"][i]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


@given(sizes, st.sampled_from([1, 2]))
def test_arrays_of_any_size_convert_as_numpy_does_and_come_back(size, version):
    arrays, layout = language_arrays(size), arrays_of(version)
    hub = carry(layout, HUB, arrays)
    assert_same_bits(hub, converted(arrays, version))
    heads = {"lmheads": size["heads"], "kvheads": size["kv_heads"]}
    assert_same_bits(carry(HUB, layout, hub, heads), arrays)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("version", [1, 2])
def test_base_layers_are_taken_from_peft_and_adapters_are_listed(version, name):
    zoo = zoo_of(version)
    state = zoo.peft(name)
    reading = read(PEFT, state)
    assert not reading.unknown
    assert set(reading.dropped) == {key for key in state if ".lora_" in key}
    assert len(reading.dropped) == 11 * 2 * 2
    assert_same_bits(carry(PEFT, HUB, state), zoo.layout("L1"))


def test_the_adapters_own_file_has_no_base_layer():
    reading = read(PEFT, zoo_of(1).peft_adapter())
    assert not reading.atoms
    assert not reading.unknown
    assert reading.dropped


def test_a_module_that_peft_replaced_gives_its_original():
    zoo = zoo_of(1, tied=False)
    state = {f"base_model.model.{key}": tensor for key, tensor in zoo.layout("L4").items()}
    for module in ("model.multi_modal_projector", "lm_head"):
        for key in [key for key in state if f".{module}." in key]:
            inner = key.removeprefix(f"base_model.model.{module}.")
            tensor = state.pop(key)
            state[f"base_model.model.{module}.original_module.{inner}"] = tensor
            state[f"base_model.model.{module}.modules_to_save.default.{inner}"] = tensor + 1
    assert_same_bits(carry(PEFT, HUB, state), zoo.layout("L1"))
    assert len(read(PEFT, state).dropped) == 3


def test_nothing_is_written_for_peft():
    made = assemble(read(HUB, zoo_of(1).layout("L1")).atoms, PEFT.table(), {})
    assert not made.tensors
    assert PEFT.read_only


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_pooling_head_that_no_paligemma_has_is_unknown(layout):
    for prefix in ("", "base_model.model.", "model.", "base_model.model.model."):
        for tower in ("vision_tower.", "vision_tower.vision_model."):
            for leaf in ("probe", "attention.in_proj_weight", "layernorm.weight", "mlp.fc1.bias"):
                assert layout.table().match(f"{prefix}{tower}head.{leaf}") is None
    assert layout.table().match("params/img/MAPHead_0/probe") is None


def spelled(zoo: PaliGemmaZoo) -> list[tuple[str, dict[str, Any]]]:
    """Each layout's name and keys of it."""
    arrays = "paligemma-npz" if zoo.version == 1 else "paligemma2-npz"
    return [
        *((SPELLINGS[name], stored(zoo, name)) for name in SPELLINGS),
        ("paligemma-l6", zoo.layout("L6")),
        ("paligemma-l4", zoo.memory),
        *((arrays, zoo.npz(prefix=prefix)) for prefix in ("params/", "")),
        *(("paligemma-peft", zoo.peft(name)) for name in SPELLINGS),
        ("paligemma-peft", zoo.peft_adapter()),
    ]


@pytest.mark.parametrize(("version", "tied"), MODELS)
def test_every_layout_is_recognised_by_its_keys(version, tied):
    for name, state in spelled(zoo_of(version, tied)):
        found = detect(state, "model")
        assert (found.layout.name, found.unknown) == (name, ())


def test_the_hub_layout_is_the_first_of_its_space():
    assert next(one.name for one in ALL_LAYOUTS.values() if one.space == "paligemma") == "paligemma"


@pytest.mark.parametrize("source", [*SPELLINGS, "npz"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_result_loads_in_transformers_and_computes_the_same(tmp_path, version, source):
    import torch
    from safetensors.torch import save_file
    from transformers import PaliGemmaForConditionalGeneration

    zoo = zoo_of(version)
    if source == "npz":
        hub = carry(arrays_of(version), HUB, padded(zoo.npz(), "params/"))
    else:
        hub = carry(layout_of(source), HUB, zoo.layout(source))
    save_file(hub, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(zoo.config), "utf-8")
    model, told = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert_same_bits(dict(model.state_dict()), dict(zoo.memory))
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs(zoo)).logits, zoo.model(**inputs(zoo)).logits)


def test_what_transformers_saves_after_training_from_scratch_is_the_fifth_layout(tmp_path):
    from safetensors.torch import load_file

    zoo = zoo_of(1, tied=False)
    zoo.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert_same_bits(state, zoo.layout("L5"))
    assert_same_bits(carry(BY_NAME["paligemma-l5"], HUB, state), zoo.layout("L1"))


def test_each_layer_number_stays():
    zoo = zoo_of(2)
    for key, names in read(HUB, zoo.layout("L1")).names.items():
        assert re.findall(r"\.(\d+)\.", key) == re.findall(r"\.(\d+)\.", names[0])
    assert zoo.layout("L1")[EMBEDDING].shape[0] == WORDS + PADDING
