"""CLIP as open_clip, OpenAI and transformers name it.

Sources: `open_clip/model.py` (`CLIP`, `CustomTextCLIP`), OpenAI's `clip/model.py`, transformers'
`modeling_clip.py`. open_clip and OpenAI use the same names; OpenAI's files also hold three sizes.
"""

from __future__ import annotations

from collections.abc import Mapping

from flamingo_ckpt.layouts.clip_towers import (
    HF_TEXT,
    HF_VISION,
    LOGIT_SCALE,
    LOGITS,
    OPEN_CLIP_TEXT,
    OPEN_CLIP_TEXT_LINEAR,
    OPEN_CLIP_VISION,
)
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import dropped, prefixed, rename
from flamingo_ckpt.layouts.timm_clip import OPEN_CLIP_HYBRID

_SIZES = dropped(
    {
        "input_resolution": "the image size in pixels, which the position embedding also tells",
        "context_length": "the number of text positions, which the position embedding also tells",
        "vocab_size": "the number of tokens, which the token embedding also tells",
    }
)
_OPEN_CLIP_TOWERS = (
    "visual.transformer.resblocks.#.",
    "transformer.resblocks.#.",
    "text.transformer.resblocks.#.",
)
_CUSTOM_BLOCK = (
    "a block with further norms or scales (`qk_norm`, `scale_attn`, `scale_heads`, `scale_fc`, "
    "`scaled_cosine_attn`), which no other layout has"
)
_LAYER_SCALE = "layer scale (`ls_init_value`), which transformers' CLIP does not have"
_POOLER = "an attentional pooler (CoCa), which transformers' CLIP does not have"
_RESNET = "CLIP's ResNet image tower, which transformers' CLIP does not have"
_COCA = "CoCa's text decoder, which no other layout has"
_SIGLIP = "transformers' SigLIP, not CLIP: it has a patch bias and pools by attention"

#: Template prefix of keys that no rule knows -> what kind of model they show. The first that fits
#: a key is the reason: the special ones stand before the general ones.
UNSUPPORTED: Mapping[str, str] = {
    "visual.layer": _RESNET,
    "visual.bn": _RESNET,
    "visual.conv2.": _RESNET,
    "visual.conv3.": _RESNET,
    "visual.attnpool.": _RESNET,
    "visual.attn_pool.": _POOLER,
    "visual.attn_pool_contrastive.": _POOLER,
    **{
        block + leaf: reason
        for block in _OPEN_CLIP_TOWERS
        for leaf, reason in {
            "ls_1.": _LAYER_SCALE,
            "ls_2.": _LAYER_SCALE,
            "ln_attn.": _CUSTOM_BLOCK,
            "attn.ln_q.": _CUSTOM_BLOCK,
            "attn.ln_k.": _CUSTOM_BLOCK,
            "attn.ln_inner.": _CUSTOM_BLOCK,
            "attn.logit_scale": _CUSTOM_BLOCK,
            "attn.head_scale": _CUSTOM_BLOCK,
            "mlp.ln.": _CUSTOM_BLOCK,
        }.items()
    },
    "visual.trunk.": "an image tower of timm's that is neither SigLIP's nor MobileCLIP-B's",
    "visual.head.": "a projection on top of an image tower of timm's",
    "cls_emb": "a class token in the text tower (`embed_cls`), which no other layout has",
    "text.cls_emb": "a class token in the text tower (`embed_cls`), which no other layout has",
    "text.transformer.": "a text tower of transformers' own (`hf_model_name`)",
    "text.proj.": "a text tower of transformers' own (`hf_model_name`)",
    "text_decoder.": _COCA,
    "image_encoder.model.": "MobileCLIP's FastViT image tower (S0 to S4); only B's is known",
    "vision_model.head.": _SIGLIP,
    "vision_model.embeddings.patch_embedding.bias": _SIGLIP,
    "text_model.head.": _SIGLIP,
}
#: Canonical name -> what it shows that a tower lacks it. transformers' CLIP always has these.
ALWAYS_THERE: Mapping[str, str] = {
    "vision.pre_norm.weight": "no norm before the layers (`no_ln_pre`, as in CLIPA)",
    "vision.class_embedding": "no class token",
}

LAYOUTS = (
    Layout(
        name="open_clip",
        title="open_clip's CLIP, and OpenAI's original names",
        space="clip",
        rules=(
            *prefixed(OPEN_CLIP_VISION, "visual."),
            *OPEN_CLIP_TEXT,
            *prefixed(OPEN_CLIP_TEXT_LINEAR, mode="read"),
            *LOGITS,
            *_SIZES,
        ),
        sentinels=("visual.conv1.", "visual.transformer.", "token_embedding.", "ln_final."),
    ),
    Layout(
        name="open_clip-visual",
        title="open_clip's image tower alone, as `model.visual` saves it",
        space="clip",
        rules=OPEN_CLIP_VISION,
        sentinels=("conv1.", "class_embedding", "transformer.resblocks."),
        never_has=("token_embedding.", "ln_final."),
    ),
    Layout(
        name="open_clip-custom",
        title="open_clip's CustomTextCLIP, with CLIP's image tower or MobileCLIP-B's",
        space="clip",
        zero_fill={"visual.trunk.head.bias": "visual.trunk.head.weight"},
        rules=(
            *prefixed(OPEN_CLIP_VISION, "visual."),
            *prefixed(OPEN_CLIP_HYBRID, "visual.trunk."),
            *prefixed(OPEN_CLIP_TEXT, "text."),
            *prefixed(OPEN_CLIP_TEXT_LINEAR, "text.", mode="read"),
            *LOGITS,
        ),
        sentinels=(
            "text.token_embedding.",
            "text.transformer.",
            "visual.trunk.patch_embed.backbone.",
        ),
    ),
    Layout(
        name="hf-clip",
        title="transformers' CLIPModel, or one of its towers, with or without projection",
        space="clip",
        rules=(
            *prefixed(HF_VISION, "vision_model."),
            *prefixed(HF_TEXT, "text_model."),
            *rename(
                {
                    "visual_projection.weight": "vision.projection.weight",
                    "text_projection.weight": "text.projection.weight",
                }
            ),
            *LOGIT_SCALE,
            # a CLIPVisionModel of transformers >= 5.6 that was never loaded from a file
            *prefixed(HF_VISION, mode="read"),
        ),
        sentinels=("vision_model.", "text_model.", "embeddings.class_embedding", "pre_layrnorm."),
        never_has=(
            # the flat text tower shares the names of its layers with the flat vision tower
            "embeddings.token_embedding.",
            "final_layer_norm.",
            # SigLIP
            "vision_model.embeddings.patch_embedding.bias",
            "vision_model.head.",
            "text_model.head.",
        ),
        hf_config=True,
    ),
    Layout(
        name="hf-clip-text",
        title="a CLIPTextModel of transformers >= 5.6 that was never loaded from a file",
        space="clip",
        rules=prefixed(HF_TEXT, mode="read"),
        sentinels=("embeddings.token_embedding.",),
        never_has=("embeddings.class_embedding", "pre_layrnorm."),
        read_only="every reader understands the names with `text_model.`: write `hf-clip`",
        hf_config=True,
    ),
)
