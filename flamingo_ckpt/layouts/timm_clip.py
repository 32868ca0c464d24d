"""CLIP's image tower under timm's names, and Apple's MobileCLIP.

timm gives the projection a bias, which CLIP has not: zeros in every file that timm converted.
Sources: timm's `vision_transformer.py` and `vision_transformer_hybrid.py`, open_clip's
`convert.py` (`convert_mobile_clip_state_dict`), for the tower that MobileCLIP calls B.
"""

from __future__ import annotations

from collections.abc import Mapping

from flamingo_ckpt.layouts.clip_towers import LOGIT_SCALE
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Rule, prefixed, rename

_P = "{p:weight|bias}"
_BATCH_NORM = "{p:weight|bias|running_mean|running_var|num_batches_tracked}"

#: Canonical names that may be left out where every element is zero, and only there: why.
ZEROS: Mapping[str, str] = {
    "vision.projection.bias": "timm gives the projection a bias, which CLIP does not have: zeros"
}

#: Below `visual.trunk.` in open_clip: MobileCLIP-B's image tower, convolutions before a ViT.
#: Its tensors have canonical names of their own, for no other layout has such a tower.
OPEN_CLIP_HYBRID = prefixed(
    rename(
        {
            "{m:cls_token|pos_embed}": "{m}",
            f"patch_embed.backbone.{{stage}}.conv.{_P}": "stem.{stage}.conv.{p}",
            f"patch_embed.backbone.{{stage}}.bn.{_BATCH_NORM}": "stem.{stage}.norm.{p}",
            f"blocks.{{layer}}.norm{{n:1|2}}.{_P}": "layers.{layer}.norm{n}.{p}",
            f"blocks.{{layer}}.attn.{{m:qkv|proj=out}}.{_P}": "layers.{layer}.attn.{m}.{p}",
            f"blocks.{{layer}}.mlp.{{m:fc1|fc2}}.{_P}": "layers.{layer}.mlp.{m}.{p}",
            f"norm.{_P}": "norm.{p}",
            f"head.{_P}": "projection.{p}",
        }
    ),
    canonical="vision.hybrid.",
)

_TIMM_CLIP = prefixed(
    (
        Rule(native="cls_token", canonical="class_embedding", axes="1 1 d -> d"),
        Rule(native="pos_embed", canonical="position_embedding.weight", axes="1 n d -> n d"),
        *rename(
            {
                "patch_embed.proj.weight": "patch_embedding.weight",
                f"norm_pre.{_P}": "pre_norm.{p}",
                f"norm.{_P}": "post_norm.{p}",
                f"head.{_P}": "projection.{p}",
                f"blocks.{{layer}}.norm{{n:1|2}}.{_P}": "layers.{layer}.norm{n}.{p}",
                f"blocks.{{layer}}.attn.proj.{_P}": "layers.{layer}.attn.out.{p}",
                f"blocks.{{layer}}.mlp.{{m:fc1|fc2}}.{_P}": "layers.{layer}.mlp.{m}.{p}",
            }
        ),
        Rule(
            native="blocks.{layer}.attn.qkv.weight",
            canonical="layers.{layer}.attn.{part:q|k|v}.weight",
            axes="(part r) c -> r c",
        ),
        Rule(
            native="blocks.{layer}.attn.qkv.bias",
            canonical="layers.{layer}.attn.{part:q|k|v}.bias",
            axes="(part r) -> r",
        ),
    ),
    canonical="vision.",
)

_FEED_FORWARD = "pre_norm_ffn.{m:1=fc1|4=fc2}"
_APPLE_IMAGE = prefixed(
    (
        Rule(
            native="pos_embed.pos_embed.pos_embed", canonical="pos_embed", axes="1 b n d -> b n d"
        ),
        Rule(native="classifier.proj", canonical="projection.weight", axes="d e -> e d"),
        *rename(
            {
                "cls_token": "cls_token",
                f"patch_emb.{{stage}}.block.conv.{_P}": "stem.{stage}.conv.{p}",
                f"patch_emb.{{stage}}.block.norm.{_BATCH_NORM}": "stem.{stage}.norm.{p}",
                f"transformer.{{layer}}.pre_norm_mha.0.{_P}": "layers.{layer}.norm1.{p}",
                f"transformer.{{layer}}.pre_norm_mha.1.{{m:qkv_proj=qkv|out_proj=out}}.{_P}": (
                    "layers.{layer}.attn.{m}.{p}"
                ),
                f"transformer.{{layer}}.pre_norm_ffn.0.{_P}": "layers.{layer}.norm2.{p}",
                f"transformer.{{layer}}.{_FEED_FORWARD}.{_P}": "layers.{layer}.mlp.{m}.{p}",
                f"post_transformer_norm.{_P}": "norm.{p}",
            }
        ),
    ),
    "image_encoder.model.",
    canonical="vision.hybrid.",
)
_APPLE_TEXT = prefixed(
    (
        Rule(
            native="positional_embedding.pos_embed.pos_embed",
            canonical="position_embedding.weight",
            axes="1 1 n d -> n d",
        ),
        Rule(native="projection_layer", canonical="projection.weight", axes="d e -> e d"),
        *rename(
            {
                "embedding_layer.weight": "token_embedding.weight",
                f"final_layer_norm.{_P}": "final_norm.{p}",
                f"transformer.{{layer}}.pre_norm_mha.0.{_P}": "layers.{layer}.norm1.{p}",
                f"transformer.{{layer}}.pre_norm_mha.1.out_proj.{_P}": (
                    "layers.{layer}.attn.out.{p}"
                ),
                f"transformer.{{layer}}.pre_norm_ffn.0.{_P}": "layers.{layer}.norm2.{p}",
                f"transformer.{{layer}}.{_FEED_FORWARD}.{_P}": "layers.{layer}.mlp.{m}.{p}",
            }
        ),
        Rule(
            native="transformer.{layer}.pre_norm_mha.1.qkv_proj.weight",
            canonical="layers.{layer}.attn.{part:q|k|v}.weight",
            axes="(part r) c -> r c",
        ),
        Rule(
            native="transformer.{layer}.pre_norm_mha.1.qkv_proj.bias",
            canonical="layers.{layer}.attn.{part:q|k|v}.bias",
            axes="(part r) -> r",
        ),
    ),
    "text_encoder.",
    canonical="text.",
)

LAYOUTS = (
    Layout(
        name="timm-clip",
        title="timm's ViT with the weights of CLIP's image tower (`vit_*_clip_*`)",
        space="clip",
        rules=_TIMM_CLIP,
        sentinels=("norm_pre.",),
        never_has=("patch_embed.proj.bias", "visual."),
        zero_fill={"head.bias": "head.weight"},
    ),
    Layout(
        name="mobileclip",
        title="Apple's own names of MobileCLIP; of the image towers, B's",
        space="clip",
        rules=(*_APPLE_IMAGE, *_APPLE_TEXT, *LOGIT_SCALE),
        sentinels=("image_encoder.model.", "text_encoder."),
        lossy="the FastViT image towers (S0 to S4) have no map",
        read_only="only Apple's own code reads these names",
    ),
)
