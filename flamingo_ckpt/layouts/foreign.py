"""Other people's Flamingos: what of them fits ours, and what does not.

flamingo-mini and flamingo-pytorch have the same perceiver and the same gated block, below other
names, in models that compute something else. Idefics has neither. Sources:
`dhansmair/flamingo-mini`, `lucidrains/flamingo-pytorch` and transformers' `modeling_idefics.py`.
"""

from __future__ import annotations

from flamingo_ckpt.layouts.clip_towers import HF_VISION
from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Rule, dropped, prefixed, rename

_P = "{p:weight|bias}"
_VISION = "the vision tower: it comes from its own release"
_LANGUAGE = "the language model: it comes from its own release"
_WITHHELD = {
    "vision": _VISION,
    "lm.embed": _LANGUAGE,
    "lm.layers": _LANGUAGE,
    "lm.rest": _LANGUAGE,
}
_PERCEIVER_LAYER = "perceiver.layers.{layer}."
_BLOCK = "xattn.{layer}."


def _key_value(native: str, canonical: str) -> Rule:
    """The key's rows, then the value's."""
    return Rule(
        native=native + "to_kv.weight",
        canonical=canonical + "{part:k|v}.weight",
        axes="(part r) c -> r c",
    )


def _feed_forward(native: str, canonical: str) -> tuple[Rule, ...]:
    """A Sequential of norm, Linear, activation, Linear."""
    return rename(
        {
            f"{native}0.{_P}": canonical + "norm.{p}",
            f"{native}{{m:1=fc1|3=fc2}}.weight": canonical + "{m}.weight",
        }
    )


def _perceiver(top: str) -> tuple[Rule, ...]:
    """Both name it as OpenFlamingo does; all but the keys and values of its attention."""
    layer = top + "layers.{layer}."
    return (
        *rename(
            {
                f"{top}latents": "perceiver.latents",
                f"{top}norm.{_P}": "perceiver.norm.{p}",
                f"{layer}0.{{m:norm_media|norm_latents}}.{_P}": _PERCEIVER_LAYER + "attn.{m}.{p}",
                f"{layer}0.{{m:to_q=q|to_out=out}}.weight": _PERCEIVER_LAYER + "attn.{m}.weight",
            }
        ),
        *_feed_forward(f"{layer}1.", _PERCEIVER_LAYER + "mlp."),
    )


def _gated(block: str, gates: str, feed_forward: str) -> tuple[Rule, ...]:
    return (
        *rename(
            {
                f"{block}{{m:{gates}}}": _BLOCK + "{m}",
                f"{block}attn.norm.{_P}": _BLOCK + "attn.norm.{p}",
                f"{block}attn.{{m:to_q=q|to_out=out}}.weight": _BLOCK + "attn.{m}.weight",
            }
        ),
        _key_value(f"{block}attn.", _BLOCK + "attn."),
        *_feed_forward(block + feed_forward, _BLOCK + "mlp."),
    )


_MINI_GATES = "alpha_attn=attn_gate|alpha_ffw=mlp_gate"
_GPT2_LEAVES = (
    f"ln_{{n:1|2}}.{_P}",
    f"attn.{{m:c_attn|c_proj}}.{_P}",
    f"mlp.{{m:c_fc|c_proj}}.{_P}",
    "attn.{m:bias|masked_bias}",
)
_GPT2_REST = ("w{m:te|pe}.weight", f"ln_f.{_P}")


def _mini_trunk() -> tuple[Rule, ...]:
    """GPT-2 and OPT; a layer with a gated block is wrapped and has a level more."""
    rest = [f"flamingo.lm.{key}" for key in _GPT2_REST]
    layers = [("flamingo.lm.h.{layer}.", leaf) for leaf in _GPT2_LEAVES]
    place = "flamingo.lm.decoder.layers.{layer}."
    for rule in FAMILIES["opt"].rules():
        key = "flamingo.lm." + rule.native.removeprefix("model.")
        if key.startswith(place):
            layers.append((place, key.removeprefix(place)))
        elif rule.native.startswith("model."):
            rest.append(key)
    names = (
        *rest,
        *(place + inner + leaf for place, leaf in layers for inner in ("", "lm_block.")),
    )
    return dropped(dict.fromkeys((*names, "flamingo.lm_head.weight"), _LANGUAGE))


def _mini() -> tuple[Rule, ...]:
    top = "flamingo.resampler."
    return (
        *_perceiver(top),
        *rename(
            {
                f"{top}layers.{{layer}}.0.{{m:to_k=k|to_v=v}}.weight": (
                    _PERCEIVER_LAYER + "attn.{m}.weight"
                )
            }
        ),
        Rule(
            native=f"{top}time_pos_emb",
            canonical="perceiver.time_pos_emb",
            loss="always added to the frames' features in flamingo-mini; released Flamingos have "
            "nothing in its place",
        ),
        # written as on OPT; the other spelling, on GPT-2, is read
        *_gated("flamingo.lm.decoder.layers.{layer}.xattn_block.", _MINI_GATES, "ffw."),
        *prefixed(_gated("flamingo.lm.h.{layer}.xattn_block.", _MINI_GATES, "ffw."), mode="read"),
        *_mini_trunk(),
        *dropped(
            {f"flamingo.vision_encoder.vision_model.{rule.native}": _VISION for rule in HF_VISION}
        ),
    )


_PALM = "PaLM, the language model that it is built on: no other layout has it"
_PALM_LEAVES = (
    "norm.{m:gamma|beta}",
    "rotary_emb.inv_freq",
    "fused_attn_ff_proj.weight",
    "attn_out.weight",
    "ff_out.1.weight",
)
_PALM_REST = ("token_emb.weight", "to_logits.0.{m:gamma|beta}", "to_logits.1.weight")


def _lucidrains() -> tuple[Rule, ...]:
    top = "perceiver_resampler."
    names = (*_PALM_REST, *("layers.{layer}.0.fn." + leaf for leaf in _PALM_LEAVES))
    return (
        *_perceiver(top),
        _key_value(f"{top}layers.{{layer}}.0.", _PERCEIVER_LAYER + "attn."),
        Rule(
            native=f"{top}media_pos_emb",
            canonical="perceiver.media_pos_emb",
            loss="always added to the pictures' features in flamingo-pytorch; released Flamingos "
            "have nothing in its place",
        ),
        *_gated("layers.{layer}.1.", "attn_gate|ff_gate=mlp_gate", "ff."),
        *dropped(dict.fromkeys(names, _PALM)),
        *dropped({"video_frame_pos_emb": "added to the frames before the vision tower's features"}),
    )


_IDEFICS = (
    "Idefics is another model: RMSNorm, norms of query and key for each head, attention as wide as "
    "the language model, a gated SwiGLU MLP and ReLU in the perceiver. Only tanh gates are common; "
    "none of its tensors means what one of a Flamingo means."
)
_IDEFICS_KEYS = (
    "model.perceiver_resampler.latents",
    f"model.perceiver_resampler.layer_norm.{_P}",
    "model.perceiver_resampler.blocks.{layer}.0."
    f"{{m:context_layer_norm|latents_layer_norm|q_layer_norm|k_layer_norm}}.{_P}",
    "model.perceiver_resampler.blocks.{layer}.0.{m:q_proj|k_proj|v_proj|output_proj}.weight",
    f"model.perceiver_resampler.blocks.{{layer}}.1.ln.{_P}",
    "model.perceiver_resampler.blocks.{layer}.1.{m:fc|c_proj}.weight",
    "model.gated_cross_attn_layers.{layer}.{m:alpha_cross_attn|alpha_dense}",
    "model.gated_cross_attn_layers.{layer}.cross_attn.{m:q_proj|k_proj|v_proj|o_proj}.weight",
    "model.gated_cross_attn_layers.{layer}.cross_attn.{m:q_layer_norm|k_layer_norm}.weight",
    "model.gated_cross_attn_layers.{layer}.cross_attn.rotary_emb.inv_freq",
    "model.gated_cross_attn_layers.{layer}.mlp.{m:gate_proj|up_proj|down_proj}.weight",
    "model.gated_cross_attn_layers.{layer}.{m:input_layernorm|post_attention_layernorm}.weight",
    "model.embed_tokens.additional_embedding.weight",
    "lm_head.additional_fc.weight",
)


def _idefics() -> tuple[Rule, ...]:
    """Its keys, all of them left out: detection names it, nothing converts it."""
    language = [rule.native for rule in FAMILIES["llama"].rules()]
    norms = "model.layers.{layer}.self_attn.{m:q_layer_norm|k_layer_norm}.weight"
    vision = ["model.vision_model." + rule.native for rule in HF_VISION] + [
        f"model.vision_model.embeddings.patch_embedding.{_P}",
    ]
    vision.remove("model.vision_model.embeddings.patch_embedding.weight")
    return dropped(dict.fromkeys((*_IDEFICS_KEYS, *language, norms, *vision), _IDEFICS))


LAYOUTS = (
    Layout(
        name="flamingo-mini",
        title="dhansmair's flamingo-mini: the perceiver and the gated blocks",
        space="flamingo",
        rules=_mini(),
        sentinels=("flamingo.resampler.", "flamingo.lm."),
        withheld=_WITHHELD,
        lossy="the perceiver and the gated blocks alone. The model computes something else: "
        "embeddings of time, the CLS token among the features, squared ReLU in released weights, "
        "and blocks before layers 0, n, 2n, ..., where OpenFlamingo has n-1, 2n-1, ...",
    ),
    Layout(
        name="flamingo-pytorch",
        title="lucidrains' flamingo-pytorch: the perceiver and the gated blocks",
        space="flamingo",
        rules=_lucidrains(),
        sentinels=("perceiver_resampler.", "layers.#.#.attn_gate"),
        withheld=_WITHHELD,
        lossy="the perceiver and the gated blocks alone. The model computes something else: "
        "embeddings of the pictures' places, PaLM as language model, blocks after layers 0, n, "
        "2n, ..., where OpenFlamingo has them before n-1, 2n-1, ..., and one width for all",
    ),
    Layout(
        name="idefics",
        title="Idefics of transformers: recognised, never converted",
        space="flamingo",
        rules=_idefics(),
        sentinels=("model.perceiver_resampler.", "model.gated_cross_attn_layers."),
        read_only="nothing can become an Idefics",
        refused=_IDEFICS,
    ),
)
