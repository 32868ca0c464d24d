"""The tests' PaliGemma: transformers reads and writes what its layouts say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.zoo import assert_generic

each_paligemma = pytest.mark.parametrize(
    ("version", "tied"), [(1, True), (1, False), (2, True), (2, False)]
)


def _pretrained(cls: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    return cls.from_pretrained(folder, output_loading_info=True)


@each_paligemma
@pytest.mark.parametrize("layout", ["L1", "L2", "L3", "L4", "L5"])
def test_paligemma_loads_from_a_folder_and_computes_the_same(
    tmp_path: Path, version: int, tied: bool, layout: str
) -> None:
    import torch

    model = zoo.paligemma(version=version, tied=tied)
    from transformers import PaliGemmaForConditionalGeneration

    folder = zoo.save_folder(model.layout(layout), model.config, tmp_path)
    loaded, info = _pretrained(PaliGemmaForConditionalGeneration, folder)
    assert not any(info.values())
    inputs = zoo.paligemma_inputs(model)
    with torch.no_grad():
        assert loaded(**inputs).logits.equal(model.model(**inputs).logits)


@each_paligemma
def test_transformers_writes_the_same_names(tmp_path: Path, version: int, tied: bool) -> None:
    from safetensors.torch import load_file
    from transformers import PaliGemmaForConditionalGeneration

    model = zoo.paligemma(version=version, tied=tied)

    def saved(of: Any, name: str, **options: Any) -> dict[str, Any]:
        of.save_pretrained(tmp_path / name, **options)
        return load_file(tmp_path / name / "model.safetensors")

    found = {
        "L5": saved(model.model, "scratch"),
        "L4": saved(model.model, "memory", save_original_format=False),
        "L6": saved(model.model.model, "base", save_original_format=False),
    }
    folder = zoo.save_folder(model.layout("L1"), model.config, tmp_path / "L1")
    found["L1"] = saved(_pretrained(PaliGemmaForConditionalGeneration, folder)[0], "again")
    for layout, state in found.items():
        expected = model.layout(layout)
        assert state.keys() == expected.keys(), layout
        assert all(state[name].equal(tensor) for name, tensor in expected.items()), layout


@each_paligemma
def test_paligemma_is_generic(version: int, tied: bool) -> None:
    model = zoo.paligemma(version=version, tied=tied, padding="random")
    assert_generic(model.memory)
    zero = zoo.paligemma(version=version, tied=tied).layout("L1")
    rows = zero.pop("language_model.model.embed_tokens.weight")
    assert (rows[192:] == 0).all()
    assert (rows[:192] != 0).all()
    head = zero.pop("language_model.lm_head.weight", None)
    assert (head is None) == tied
    assert_generic(zero)


@pytest.mark.parametrize("version", [1, 2])
def test_big_vision_arrays_mean_the_same(version: int) -> None:
    """By the einsums that big_vision applies them with, in float64."""
    import numpy as np

    model = zoo.paligemma(version=version)
    state = {name: tensor.double().numpy() for name, tensor in model.layout("L1").items()}
    arrays = {name: array.astype("float64") for name, array in model.npz(prefix="").items()}
    x = np.random.default_rng(0).normal(size=(3, 40))
    for i in range(4):
        layer = f"language_model.model.layers.{i}"
        names = {"q": "llm/layers/attn/q_einsum/w", "kv": "llm/layers/attn/kv_einsum/w"}
        q = np.einsum("td,ndh->tnh", x, arrays[names["q"]][i])
        k, v = np.einsum("sd,ckdh->cskh", x, arrays[names["kv"]][i])
        for name, value in (("q", q), ("k", k), ("v", v)):
            expected = x @ state[f"{layer}.self_attn.{name}_proj.weight"].T
            assert np.allclose(value.reshape(3, -1), expected)
        out = np.einsum("tnh,nhd->td", q, arrays["llm/layers/attn/attn_vec_einsum/w"][i])
        assert np.allclose(out, q.reshape(3, -1) @ state[f"{layer}.self_attn.o_proj.weight"].T)
        gate, up = np.einsum("td,cdf->ctf", x, arrays["llm/layers/mlp/gating_einsum"][i])
        assert np.allclose(gate, x @ state[f"{layer}.mlp.gate_proj.weight"].T)
        assert np.allclose(up, x @ state[f"{layer}.mlp.up_proj.weight"].T)
        down = gate @ arrays["llm/layers/mlp/linear"][i]
        assert np.allclose(down, gate @ state[f"{layer}.mlp.down_proj.weight"].T)
    assert len(arrays["llm/embedder/input_embedding"]) == 192


def test_peft_names() -> None:
    model = zoo.paligemma()
    whole, adapter = model.peft(), model.peft_adapter()
    base = "base_model.model.model.language_model.layers.3.self_attn.q_proj"
    assert {f"{base}.base_layer.weight", f"{base}.lora_A.default.weight"} <= whole.keys()
    assert whole[f"{base}.lora_B.default.weight"].equal(adapter[f"{base}.lora_B.weight"])
    assert len(adapter) == 2 * 2 * 4
    assert len(whole) == len(model.layout("L4")) + len(adapter)
    assert_generic(adapter)
