"""Models from their configs alone: they compute what the config says, not only have its shapes."""

from __future__ import annotations

import copy
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
from tests.models.flamingo_support import batch, ours
from tests.zoo_lms import randomise

FAMILY_PRESETS = {
    "mosaic_gpt": "openflamingo-3b-vitl-mpt1b",
    "gpt_neox": "openflamingo-4b-vitl-rpj3b",
    "mpt": "openflamingo-9b-vitl-mpt7b",
    "llama": "openflamingo-9b-deprecated",
}


def tiny(family: str, **text: Any) -> dict[str, Any]:
    """A small Flamingo's config; `text` goes into that of the language model."""
    config = zoo.openflamingo(family).config
    return config | {"text_config": config["text_config"] | text}


def language(family: str, **text: Any) -> Any:
    """The language model that is built for it."""
    return build(parse_config(tiny(family, **text), "config.json"), device="meta").lang_encoder


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
        "load_config('med-flamingo'); assert 'torch' not in sys.modules; "
        "from flamingo_ckpt.models import Flamingo; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- token ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"media_token_id": 96}, "FC401", "`media_token_id` is 96, not a number from 0 to 95"),
        ({"eoc_token_id": -1}, "FC401", "`eoc_token_id` is -1"),
        ({"eoc_token_id": "93"}, "FC401", "not a whole number"),
        ({"media_token_id": 4, "eoc_token_id": 4}, "FC402", "are both 4"),
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


# --- what the language models compute with --------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "text", "wanted"),
    [
        ("llama", {"rms_norm_eps": 1e-3}, {"rms_norm_eps": 1e-3}),
        ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
        ("llama", {"pad_token_id": -1}, {"pad_token_id": None}),
        ("gpt_neox", {"layer_norm_eps": 1e-3}, {"layer_norm_eps": 1e-3}),
        ("gpt_neox", {"use_parallel_residual": True}, {"use_parallel_residual": True}),
        ("opt", {"activation_function": "gelu"}, {"activation_function": "gelu"}),
        ("opt", {"do_layer_norm_before": False}, {"do_layer_norm_before": False}),
        ("gptj", {"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-3}),
        ("gptj", {"rotary_dim": 8}, {"rotary_dim": 8}),
        ("mpt7b", {"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-3}),
        ("mpt7b", {"max_seq_len": 99}, {"max_seq_len": 99}),
        ("mpt1b", {"alibi_bias_max": 16, "max_seq_len": 99}, {"alibi_bias_max": 16}),
    ],
)
def test_fields_of_the_language_model(
    family: str, text: dict[str, Any], wanted: dict[str, Any]
) -> None:
    config = language(family, **text).config
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("family", "text", "theta", "more"),
    [
        # transformers 4's names
        ("llama", {"rope_theta": 5e5}, 5e5, {"rope_type": "default"}),
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            5e5,
            {"rope_type": "linear", "factor": 2.0},
        ),
        ("gpt_neox", {"rotary_emb_base": 500}, 500, {"partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rotary_pct": 1.0}, 10000, {"partial_rotary_factor": 1.0}),
        # version 5's
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, {}),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}},
            7.0,
            {"partial_rotary_factor": 0.5},
        ),
    ],
)
def test_rotary_embeddings_in_both_spellings(
    family: str, text: dict[str, Any], theta: float, more: dict[str, Any]
) -> None:
    given = tiny(family, **text)
    if "rope_parameters" not in text:
        given["text_config"].pop("rope_parameters", None)
    parsed = parse_config(given, "")
    before = copy.deepcopy(dict(parsed.data))
    config: Any = build(parsed, device="meta").lang_encoder.config
    assert parsed.data == before  # transformers' configs change what they are given
    assert config.rope_parameters["rope_theta"] == theta
    assert more.items() <= config.rope_parameters.items()


def test_rotary_frequencies_follow() -> None:
    given = tiny("gpt_neox", rotary_pct=1.0)
    del given["text_config"]["rope_parameters"]
    whole: Any = build(parse_config(given, "")).lang_encoder
    quarter: Any = build(parse_config(tiny("gpt_neox"), "")).lang_encoder
    lengths = [one.gpt_neox.rotary_emb.inv_freq.numel() for one in (whole, quarter)]
    assert lengths[0] > lengths[1]


def test_mosaics_own_config_of_attention() -> None:
    """As in the folders on the hub: names of kernels, and 0.0 where transformers wants 0."""
    attention = {
        "alibi": True,
        "alibi_bias_max": 4,
        "attn_impl": "triton",
        "attn_pdrop": 0.0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": 3.0,
        "kv_n_heads": 4,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": 0.5,
    }
    text = {"attn_config": attention, "init_config": {"name": "kaiming_normal_"}, "verbose": 0}
    config = language("mpt7b", **text, emb_pdrop=0.0, resid_pdrop=0, logit_scale=None).config
    found = config.attn_config
    assert (found.alibi_bias_max, found.clip_qkv, found.softmax_scale) == (4, 3.0, 0.5)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("mpt7b", "logit_scale", "inv_sqrt_d_model"),
        ("mpt7b", "embedding_fraction", 0.5),
        ("mpt7b", "resid_pdrop", 0.1),
        ("mpt7b", "emb_pdrop", 0.1),
        ("mpt7b", "norm_type", "rmsnorm"),
        ("mpt7b", "ffn_config.ffn_type", "mptglu"),
        ("mpt7b", "attn_config.attn_pdrop", 0.1),
        ("mpt7b", "attn_config.prefix_lm", True),
        ("mpt7b", "attn_config.rope", True),
        ("mpt7b", "attn_config.qk_gn", True),
        ("mpt7b", "attn_config.attn_uses_sequence_id", True),
        ("mpt7b", "attn_config.sliding_window_size", 128),
        ("mpt7b", "attn_config.attn_logit_softcapping", 30.0),
        ("mpt7b", "attn_config.kv_n_heads", 2),
        ("mpt1b", "attn_clip_qkv", 6.0),
        ("mpt1b", "softmax_scale", 0.5),
        ("mpt1b", "prefix_lm", True),
        ("mpt1b", "attn_pdrop", 0.1),
        ("mpt1b", "logit_scale", 2.0),
    ],
)
def test_what_a_class_would_silently_ignore_is_refused(
    family: str, field: str, value: object
) -> None:
    section, _, name = field.rpartition(".")
    text = {section: {name: value}} if section else {name: value}
    with pytest.raises(CkptError, match=f"`text_config.{field}` is") as caught:
        parse_config(tiny(family, **text), "")
    assert caught.value.code == "FC405"


# --- vision towers --------------------------------------------------------------------------------


def hf_tokens(model: Flamingo, pictures: torch.Tensor, activation: str, **more: Any) -> Any:
    """(before, after ln_post), by transformers' tower with the same weights."""
    from transformers import CLIPVisionModel

    config = zoo_clip.hf_vision_config(3)
    for name, value in {"hidden_act": activation, **more}.items():
        setattr(config, name, value)
    tower: Any = CLIPVisionModel(config).double().eval()
    state = {
        f"visual.{name}": one
        for name, one in model.vision_encoder.state_dict().items()
        if name != "proj"
    }
    named = zoo_clip.hf_from_open_clip(state)
    is_flat = not any(name.startswith("vision_model.") for name in tower.state_dict())
    tower.load_state_dict(
        {n.removeprefix("vision_model.") if is_flat else n: t for n, t in named.items()}
    )
    tokens = tower(pictures).last_hidden_state[:, 1:]
    norm = next(one for name, one in tower.named_modules() if name.endswith("post_layernorm"))
    return tokens, norm(tokens)


@pytest.mark.parametrize("where", [None, "before_ln_post", "after_ln_post"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_the_towers_tokens_and_activation(where: str | None, activation: str) -> None:
    """Left alone, open_clip gives the tokens after `ln_post` since 2.23, and GELU since 2.29."""
    given = tiny("llama") | ({"vision_tokens": where} if where else {})
    given["vision_config"] = given["vision_config"] | {"hidden_act": activation}
    model = build(parse_config(given, ""), dtype="float64").eval()
    assert isinstance(model, Flamingo)
    randomise(model.vision_encoder)
    pictures = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found = model.visual_tokens(pictures)
        before, after = hf_tokens(model, pictures, activation)
        other = hf_tokens(model, pictures, "relu")[0]
    wanted, unwanted = (after, before) if where == "after_ln_post" else (before, after)
    assert float((found - wanted).abs().max()) < 1e-12
    assert float((found - unwanted).abs().max()) > 0.1
    assert float((before - other).abs().max()) > 1e-6


def test_the_towers_epsilon() -> None:
    given = tiny("llama")
    given["vision_config"] = given["vision_config"] | {"layer_norm_eps": 1e-2}
    model = build(parse_config(given, ""), dtype="float64").eval()
    assert isinstance(model, Flamingo)
    pictures = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found = model.visual_tokens(pictures)
        wanted = hf_tokens(model, pictures, "quick_gelu", layer_norm_eps=1e-2)[0]
        other = hf_tokens(model, pictures, "quick_gelu")[0]
    assert float((found - wanted).abs().max()) < 1e-12 < float((found - other).abs().max())


def test_an_activation_that_open_clip_has_not() -> None:
    given = tiny("llama")
    given["vision_config"] = given["vision_config"] | {"hidden_act": "silu"}
    with pytest.raises(CkptError, match=r"`vision_config\.hidden_act` is 'silu'") as caught:
        build(parse_config(given, "there"), device="meta")
    assert (caught.value.code, caught.value.where) == ("FC405", "there")
    build(parse_config(given, "there"), "hf-flamingo", device="meta")


def test_flamingo_of_a_built_tower_is_upstreams() -> None:
    """The tokens after `ln_post`, as a fresh install of upstream has them, give other logits."""
    model, inputs = ours("llama"), batch("llama")
    with torch.no_grad():
        wanted = model(**inputs).logits
        tower: Any = model.vision_encoder
        tower.final_ln_after_pool = False
        assert float((model(**inputs).logits - wanted).abs().max()) > 1e-3


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
