"""Models from their configs alone, in every layout, dtype and kernel, and of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import Flamingo, build, load_config
from flamingo_ckpt.models.config import parse_config
from tests import zoo, zoo_clip, zoo_paligemma
from tests.models.flamingo_support import tiny

FAMILY_PRESETS = {
    "mosaic_gpt": "openflamingo-3b-vitl-mpt1b",
    "gpt_neox": "openflamingo-4b-vitl-rpj3b",
    "mpt": "openflamingo-9b-vitl-mpt7b",
    "llama": "openflamingo-9b-deprecated",
}


# --- what build takes and gives -------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), FAMILY_PRESETS.items())
def test_presets(family: str, name: str) -> None:
    model = build(load_config(f"model:{name}"), device="meta")
    assert isinstance(model, Flamingo)
    end = 32000 if family == "llama" else 50277
    assert (model.eoc_token_id, model.media_token_id) == (end, end + 1)
    assert {(one.device.type, one.dtype) for one in model.parameters()} == {("meta", torch.float32)}
    config: Any = model.lang_encoder.config
    if family == "gpt_neox":  # RedPajama is no Pythia
        assert config.use_parallel_residual is False
        assert config.rope_parameters["partial_rotary_factor"] == 1.0
    elif family == "llama":
        assert config.rms_norm_eps == 1e-6
    length = "max_seq_len" if family.startswith("m") else "max_position_embeddings"
    assert getattr(config, length) == 2048


def test_a_file_a_folder_and_a_path_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny("llama")))
    for one in (path, str(tmp_path), f"model:{path}"):
        assert load_config(one).data == load_config(path).data


@pytest.mark.parametrize("layout", [None, "openflamingo", "openflamingo-v1", "hf-flamingo"])
def test_layouts_of_a_flamingo(layout: str | None) -> None:
    names = set(build(parse_config(tiny("llama"), ""), layout, "meta").state_dict())
    gated = "lang_encoder.model.layers.1.gated_cross_attn_layer."
    assert (f"{gated}ff.1.weight" in names) == (layout != "hf-flamingo")
    trees = ["lang_encoder.old_decoder_blocks.0.mlp.up_proj.weight" in names]
    trees.append("lang_encoder.gated_cross_attn_layers.1.attn_gate" in names)
    wanted = {"openflamingo-v1": [False, True], "hf-flamingo": [False, False]}
    assert trees == wanted.get(layout or "", [True, True])


def test_a_layout_that_it_has_not() -> None:
    with pytest.raises(CkptError, match="no form in the layout `paligemma`") as caught:
        build(parse_config(tiny("llama"), "here"), "paligemma")
    assert (caught.value.code, caught.value.where) == ("FC405", "here")


@pytest.mark.parametrize("wanted", ["bfloat16", "BF16", torch.bfloat16, "torch.bfloat16"])
def test_a_dtype_is_of_parameters_alone(wanted: Any) -> None:
    """Rotary frequencies in bfloat16 would be other frequencies."""
    model = build(parse_config(tiny("llama"), ""), dtype=wanted)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    plain = dict(build(parse_config(tiny("llama"), "")).named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert all(torch.equal(one, plain[name]) for name, one in buffers.items())
    assert all(one.dtype == plain[name].dtype for name, one in buffers.items())


def test_the_tables_of_gptj_are_not_made_in_bfloat16() -> None:
    config = parse_config(tiny("gptj"), "")
    found = dict(build(config, dtype="bfloat16").named_buffers())
    wanted = dict(build(config, dtype="float32").named_buffers())
    assert any("embed_positions" in name for name in found)
    assert all(torch.equal(one, wanted[name]) for name, one in found.items())


def test_the_dtype_of_the_config_is_the_default() -> None:
    config = parse_config(tiny("llama") | {"torch_dtype": "float16"}, "")
    model = build(config, device="meta")
    assert {one.dtype for one in model.parameters()} == {torch.float16}
    language_config: Any = model.lang_encoder.config
    assert language_config.dtype == torch.float16
    assert {one.dtype for one in build(config, device="meta", dtype="F64").parameters()} == {
        torch.float64
    }


@pytest.mark.parametrize("dtype", ["int8", "half-hearted", torch.int64, "BOOL"])
def test_what_is_no_floating_dtype(dtype: Any) -> None:
    with pytest.raises(CkptError, match="not a floating-point dtype") as caught:
        build(parse_config(tiny("llama"), ""), dtype=dtype)
    assert caught.value.code == "FC401"


def test_ties_survive_the_cast() -> None:
    model: Any = build(parse_config(tiny("opt"), ""), dtype="float64").lang_encoder
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_kernel(family: str, kernel: str) -> None:
    model = build(parse_config(tiny(family), ""), device="meta", attn_implementation=kernel)
    language_config: Any = model.lang_encoder.config
    without = {"mpt7b", "gptj"}  # transformers has one form of these
    wanted = "eager" if family in without else kernel
    assert language_config._attn_implementation == wanted
    for name in ("perceiver.layers.0.0", "lang_encoder.gated_cross_attn_layers.1.attn"):
        assert model.get_submodule(name).attn_implementation == kernel


def test_a_kernel_that_there_is_not() -> None:
    with pytest.raises(CkptError, match="'flash', not `eager` or `sdpa`"):
        build(parse_config(tiny("llama"), ""), attn_implementation="flash")


def test_weights_are_random_and_gates_closed() -> None:
    one, two = (build(parse_config(tiny("llama"), "")) for _ in range(2))
    assert not torch.equal(one.perceiver.latents, two.perceiver.latents)
    gates = [value for name, value in one.named_parameters() if name.endswith("_gate")]
    assert gates
    assert all(float(gate.detach().abs()) == 0 for gate in gates)
    assert all(parameter.requires_grad for parameter in one.parameters())


def test_asking_for_a_config_imports_no_torch() -> None:
    code = (
        "import sys; from flamingo_ckpt.models import build, load_config; "
        "load_config('med-flamingo'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- token ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"media_token_id": 96}, "FC401", "`media_token_id` is 96, not a number from 0 to 95"),
        ({"eoc_token_id": -1}, "FC401", "`eoc_token_id` is -1"),
        ({"eoc_token_id": "93"}, "FC401", "not a whole number"),
        ({"media_token_id": 4, "eoc_token_id": 4}, "FC408", "are both 4"),
        ({"vision_tokens": "all"}, "FC401", "`before_ln_post` or `after_ln_post`"),
    ],
)
def test_ids_and_tokens_that_cannot_be(change: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(CkptError, match=words) as caught:
        parse_config(tiny("llama") | change, "")
    assert caught.value.code == code


def test_ids_may_be_left_out() -> None:
    model = build(parse_config(tiny("llama"), ""), device="meta")
    assert (model.media_token_id, model.eoc_token_id) == (None, None)


# --- the other kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_clip_in_both_layouts_from_both_forms(quick_gelu: bool, native: bool) -> None:
    made = zoo_clip.clip(layers=2, quick_gelu=quick_gelu)
    given = zoo_clip.open_clip_cfg(2, quick_gelu=quick_gelu) if native else made.config
    config = parse_config(given, "")
    pictures, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 12))
    for layout, state in (("open_clip", made.open_clip), ("hf-clip", made.hf)):
        model: Any = build(config, layout, dtype="float32").eval()
        model.load_state_dict(state)
        with torch.no_grad():
            if layout == "open_clip":
                found = model(pictures, tokens)[:2]
            else:
                output = model(input_ids=tokens, pixel_values=pictures)
                found = output.image_embeds, output.text_embeds
            wanted = made.open_clip_model(pictures, tokens)[:2]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_clip_options_that_only_one_side_has() -> None:
    given = zoo_clip.clip(layers=2).config
    given["text_config"] = given["text_config"] | {"hidden_act": "gelu"}
    build(parse_config(given, ""), "hf-clip", "meta")
    with pytest.raises(CkptError, match="`hidden_act` differs between the towers"):
        build(parse_config(given, ""), "open_clip", "meta")
    native = zoo_clip.open_clip_cfg(2, quick_gelu=False)
    native["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    native["vision_cfg"]["norm_kwargs"] = {"eps": 1e-3}
    model: Any = build(parse_config(native, ""), "hf-clip", "meta")
    assert model.config.text_config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.vision_config.hidden_act == "gelu"
    assert model.config.vision_config.layer_norm_eps == 1e-3
    assert model.config.text_config.layer_norm_eps == 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_paligemma(version: int, tied: bool) -> None:
    made = zoo_paligemma.paligemma(version=version, tied=tied)
    model: Any = build(parse_config(made.config, ""), dtype="float32").eval()
    model.load_state_dict(made.model.state_dict())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        inputs = zoo_paligemma.inputs(made)
        assert torch.equal(model(**inputs).logits, made.model(**inputs).logits)


@pytest.mark.parametrize(
    ("version", "text", "wanted"),
    [
        (2, {"query_pre_attn_scalar": 144}, {"query_pre_attn_scalar": 144}),
        (2, {"final_logit_softcapping": None}, {"final_logit_softcapping": None}),
        (2, {"attn_logit_softcapping": 7.0}, {"attn_logit_softcapping": 7.0}),
        (2, {"sliding_window": 16, "rms_norm_eps": 1e-3}, {"sliding_window": 16}),
        (1, {"rms_norm_eps": 1e-3}, {"rms_norm_eps": 1e-3}),
        # transformers 4 had two names, of which the second won
        (1, {"hidden_act": "gelu", "hidden_activation": "relu"}, {"hidden_act": "relu"}),
        (1, {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        (1, {"use_bidirectional_attention": False}, {"use_bidirectional_attention": False}),
        (1, {"use_bidirectional_attention": None}, {"use_bidirectional_attention": True}),
    ],
)
def test_fields_of_gemma(version: int, text: dict[str, Any], wanted: dict[str, Any]) -> None:
    given = zoo_paligemma.paligemma(version=version).config
    given = given | {"text_config": given["text_config"] | text}
    model: Any = build(parse_config(given, ""), device="meta")
    found = model.config.text_config
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_the_image_token_of_paligemma() -> None:
    given = zoo_paligemma.paligemma().config
    model: Any = build(parse_config(given, ""), device="meta")
    assert model.config.image_token_id == given["image_token_index"]
    with pytest.raises(CkptError, match="`image_token_index` is -1"):
        parse_config(given | {"image_token_index": -1}, "")


def test_gemma_2_27b_scales_its_queries_otherwise() -> None:
    for name, scalar in (("paligemma2-28b-pt-224", 144), ("paligemma2-10b-pt-224", 256)):
        model: Any = build(load_config(name), device="meta")
        assert model.config.text_config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_language_model_alone(family: str) -> None:
    made = zoo.openflamingo(family)
    model: Any = build(parse_config(made.text_config, ""), dtype="float32").eval()
    model.load_state_dict(made.language)
    assert model(torch.randint(3, 90, (1, 5))).logits.shape[:2] == (1, 5)
