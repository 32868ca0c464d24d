"""Models from their configs alone compute what the config says, and do not only have its shapes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import Flamingo, build
from flamingo_ckpt.models.config import parse_config
from tests import zoo_clip
from tests.models.flamingo_support import batch, ours, tiny
from tests.zoo_lms import randomise


def language(family: str, **text: Any) -> Any:
    """The language model that is built for it."""
    return build(parse_config(tiny(family, **text), "config.json"), device="meta").lang_encoder


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


@pytest.mark.parametrize(
    ("family", "text", "code"),
    [
        ("llama", {"rope_theta": "500000"}, "FC401"),
        ("llama", {"rms_norm_eps": "1e-6"}, "FC401"),
        ("gpt_neox", {"rotary_pct": 0}, "FC401"),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "FC408"),
        ("gpt_neox", {"rotary_emb_base": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "FC408"),
        (
            "gpt_neox",
            {"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "FC408",
        ),
    ],
)
def test_numbers_that_no_tensor_shows(family: str, text: dict[str, Any], code: str) -> None:
    """Of two places transformers takes one without a word; a text would be the default."""
    with pytest.raises(CkptError) as caught:
        parse_config(tiny(family, **text), "config.json")
    assert caught.value.code == code
    assert f"`text_config.{next(iter(text))}` is" in caught.value.message


def test_why_a_class_refuses_a_config() -> None:
    config = parse_config(tiny("llama", attention_dropout="much"), "config.json")
    with pytest.raises(CkptError, match=r"'attention_dropout'.*expected"):
        build(config, device="meta")
