"""OpenFlamingo's layouts and the Hugging Face port's.

Both put a gated cross-attention block before every n-th decoder layer, under that layer's own
index. Sources: `open_flamingo/src/{flamingo,flamingo_lm,helpers}.py` (v1, v2), the later `mllm`
branch, and Otter's `modeling_flamingo.py`.
"""

from __future__ import annotations

from flamingo_ckpt.layouts.clip_towers import HF_VISION, OPEN_CLIP_TEXT, OPEN_CLIP_VISION
from flamingo_ckpt.layouts.families import LanguageFamily
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Rule, dropped, prefixed, rename

_P = "{p:weight|bias}"
_FROZEN_VISION = "the frozen CLIP tower comes from its own release"
_FROZEN_LANGUAGE = "the frozen language model comes from its own release"
_WITHHELD = {
    "vision": _FROZEN_VISION,
    "lm.layers": _FROZEN_LANGUAGE,
    "lm.rest": _FROZEN_LANGUAGE,
}
_NEW_TOKENS = (
    "new tokens have tensors of their own there, and which rows they are elsewhere only the "
    "tokenizer says"
)
_OTHER_TOWER = "CLIP's text tower, which a Flamingo does not have"


def _attention(before: str, canonical: str) -> tuple[Rule, ...]:
    """One `to_q`, `to_kv`, `to_out`; `to_kv` holds the key's rows, then the value's."""
    return (
        *rename({f"{before}{{m:to_q=q|to_out=out}}.weight": f"{canonical}{{m}}.weight"}),
        Rule(
            native=f"{before}to_kv.weight",
            canonical=f"{canonical}{{part:k|v}}.weight",
            axes="(part r) c -> r c",
        ),
    )


def _feed_forward(before: str, canonical: str) -> tuple[Rule, ...]:
    """A Sequential of norm, Linear, GELU, Linear."""
    return rename(
        {
            f"{before}0.{_P}": f"{canonical}norm.{{p}}",
            f"{before}{{m:1=fc1|3=fc2}}.weight": f"{canonical}{{m}}.weight",
        }
    )


def _perceiver(attention: str, feed_forward: str, top: str = "perceiver.") -> tuple[Rule, ...]:
    layer, ours = top + "layers.{layer}.", "perceiver.layers.{layer}."
    return (
        *rename(
            {
                f"{top}{{m:latents|frame_embs|media_time_embs}}": "perceiver.{m}",
                f"{top}norm.{_P}": "perceiver.norm.{p}",
                f"{layer}{attention}{{m:norm_media|norm_latents}}.{_P}": f"{ours}attn.{{m}}.{{p}}",
            }
        ),
        *_attention(layer + attention, ours + "attn."),
        *_feed_forward(layer + feed_forward, ours + "mlp."),
    )


def _gated(block: str, feed_forward: str) -> tuple[Rule, ...]:
    ours = "xattn.{layer}."
    return (
        *rename(
            {
                f"{block}{{m:attn_gate|ff_gate=mlp_gate}}": ours + "{m}",
                f"{block}attn.norm.{_P}": ours + "attn.norm.{p}",
            }
        ),
        *_attention(block + "attn.", ours + "attn."),
        *_feed_forward(block + feed_forward, ours + "mlp."),
    )


def _aliases(family: LanguageFamily, top: str = "lang_encoder.") -> tuple[Rule, ...]:
    """The trees that hold every decoder layer and every gated block a second time."""
    layers = tuple(
        Rule(native=rule.native, canonical=rule.canonical, mode="alias")
        for rule in family.rules()
        if rule.canonical.startswith("lm.layers.")
    )
    old = top + "old_decoder_blocks.{layer}."
    here = family.layers + ".{layer}."
    return (
        *(
            Rule(native=old + rule.native[len(here) :], canonical=rule.canonical, mode="alias")
            for rule in layers
        ),
        *(
            Rule(native=old + rule.native[len(here) :], drop=rule.drop)
            for rule in family.rules()
            if rule.drop
        ),
        *prefixed(_gated(top + "gated_cross_attn_layers.{layer}.", "ff."), mode="alias"),
    )


def _openflamingo(family: LanguageFamily) -> tuple[Rule, ...]:
    return (*_without_tower(family), *prefixed(OPEN_CLIP_VISION, "vision_encoder."))


def _without_tower(family: LanguageFamily) -> tuple[Rule, ...]:
    block = f"lang_encoder.{family.layers}." + "{layer}.gated_cross_attn_layer."
    return (
        *_perceiver("0.", "1."),
        *_gated(block, "ff."),
        *family.rules("lang_encoder.", "decoder_layer."),
        *_aliases(family),
    )


def _openflamingo_v1(family: LanguageFamily) -> tuple[Rule, ...]:
    """As v2; the tower was a whole `CLIPModel` once, then a whole open_clip model."""
    positions = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    text = [rule.native for rule in OPEN_CLIP_TEXT] + ["logit_scale"]
    return (
        *_without_tower(family),
        *dropped({f"vision_encoder.{key}": "the positions 0, 1, 2, ..." for key in positions}),
        *prefixed(OPEN_CLIP_VISION, "vision_encoder.visual."),
        *dropped({f"vision_encoder.{key}": _OTHER_TOWER for key in text}),
    )


def _vlm(family: LanguageFamily) -> tuple[Rule, ...]:
    """The later branch: other names at the top, new tokens in tensors of their own."""
    block = f"lang_model.{family.layers}." + "{layer}.gated_cross_attn_layer."
    embed = f"lang_model.{family.embed.removesuffix('weight')}additional_embedding.weight"
    return (
        *_perceiver("0.", "1.", "vision_tokenizer."),
        *rename({"vision_tokenizer.projection." + _P: "perceiver.projection.{p}"}),
        *_gated(block, "ff."),
        *family.rules("lang_model.", "decoder_layer."),
        Rule(native=embed, canonical="lm.embed_added.weight", loss=_NEW_TOKENS),
        *_vlm_head(family, family.head or "lm_head.weight", "both"),
        *(_vlm_head(family, family.head_read, "read") if family.head_read else ()),
        *_aliases(family, "lang_model."),
        *prefixed(OPEN_CLIP_VISION, "vision_encoder."),
    )


def _vlm_head(family: LanguageFamily, key: str, mode: str) -> tuple[Rule, ...]:
    """What was put beside a head for the new tokens; GPT-NeoX's is met under two names."""
    head = f"lang_model.{key.removesuffix('weight')}"
    added = Rule(
        native=f"{head}additional_fc.{_P}",
        canonical="lm.head_added.{p}",
        mode=mode,
        loss=_NEW_TOKENS,
    )
    if any(rule.native == "lm_head.bias" for rule in family.rules()):
        return (added,)
    return (
        added,
        Rule(
            native=f"{head}bias",
            canonical="lm.head.bias",
            mode=mode,
            loss="a bias that was added with random values and never trained",
        ),
    )


def _hf_flamingo(family: LanguageFamily) -> tuple[Rule, ...]:
    block = f"lang_encoder.{family.layers}." + "{layer}.gated_cross_attn_layer."
    return (
        *_perceiver("", "feed_forward."),
        *_gated(block, "feed_forward."),
        *family.rules("lang_encoder.", "decoder_layer."),
        *prefixed(HF_VISION, "vision_encoder.vision_model."),
        # the module itself lost the level in transformers 5.6; read, never written
        *prefixed(HF_VISION, "vision_encoder.", mode="read"),
    )


LAYOUTS = (
    Layout(
        name="openflamingo",
        title="OpenFlamingo v2 as released: what was trained, without the frozen towers",
        space="flamingo",
        rules_of=_openflamingo,
        withheld=_WITHHELD,
        never_has=(
            "lang_encoder.gated_cross_attn_layers.",
            "lang_encoder.old_decoder_blocks.",
        ),
    ),
    Layout(
        name="openflamingo-full",
        title="OpenFlamingo v2, the whole state_dict with both alias trees",
        space="flamingo",
        rules_of=_openflamingo,
        sentinels=("lang_encoder.old_decoder_blocks.",),
        writes_aliases=True,
    ),
    Layout(
        name="openflamingo-v1",
        title="OpenFlamingo v1: the deprecated 9B on LLaMA-7B, Med-Flamingo",
        space="flamingo",
        rules_of=_openflamingo_v1,
        sentinels=(
            "lang_encoder.gated_cross_attn_layers.",
            "vision_encoder.visual.",
            "vision_encoder.text_model.",
        ),
        never_has=("lang_encoder.old_decoder_blocks.",),
        withheld=_WITHHELD,
        writes_aliases=True,
    ),
    Layout(
        name="vlm",
        title="OpenFlamingo's next generation (`mllm` branch)",
        space="flamingo",
        rules_of=_vlm,
        sentinels=("vision_tokenizer.", "lang_model."),
        lossy="new tokens are stored apart, with a trained head that no other layout holds",
    ),
    Layout(
        name="hf-flamingo",
        title="the published Hugging Face port (FlamingoForConditionalGeneration, Otter)",
        space="flamingo",
        rules_of=_hf_flamingo,
        lossy="the CLIP tower's `proj`, which no Flamingo uses, has no place in it",
        hf_config=True,
    ),
)
