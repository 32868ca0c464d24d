"""SigLIP as big_vision stores it and as open_clip builds it, with a timm image tower.

big_vision keeps flax's kernels: input axis first, attention heads apart. Going there, the number
of heads is needed, which no tensor of open_clip tells. Sources: big_vision's `vit.py` and
`two_towers.py`, open_clip's `convert.py` (`load_big_vision_weights`).
"""

from __future__ import annotations

from flamingo_ckpt.layouts.big_vision import IMAGE_ENDS, NORM, attention, blocks, mlp
from flamingo_ckpt.layouts.clip_towers import LOGITS, OPEN_CLIP_TEXT_BODY, OPEN_CLIP_TEXT_LINEAR
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Rule, prefixed, rename

_P = "{p:weight|bias}"

_OUTSIDE_BLOCKS = (
    *IMAGE_ENDS,
    *rename(
        {
            "img/MAPHead_0/probe": "vision.head.probe",
            f"img/MAPHead_0/LayerNorm_0/{NORM}": "vision.head.norm.{p}",
            "txt/Embed_0/embedding": "text.token_embedding.weight",
            f"txt/Encoder_0/encoder_norm/{NORM}": "text.final_norm.{p}",
            "txt/head/bias": "text.projection.bias",
        }
    ),
    *attention("img/MAPHead_0/", "vision.head.attn.", "visionheads"),
    *mlp("img/MAPHead_0/", "vision.head.mlp."),
    Rule(
        native="txt/pos_embedding", canonical="text.position_embedding.weight", axes="1 n d -> n d"
    ),
    Rule(native="txt/head/kernel", canonical="text.projection.weight", axes="d e -> e d"),
    Rule(native="{m:t=logit_scale|b=logit_bias}", canonical="{m}", axes="1 -> "),
)

_TOWERS = (("img/Transformer/", "vision.", "visionheads"), ("txt/Encoder_0/", "text.", "textheads"))
_STACKED = tuple(rule for tower in _TOWERS for rule in blocks(*tower, stacked=True))
_UNSTACKED = tuple(rule for tower in _TOWERS for rule in blocks(*tower, stacked=False))

#: Below `visual.trunk.` in open_clip.
_TRUNK = prefixed(
    (
        Rule(native="pos_embed", canonical="position_embedding.weight", axes="1 n d -> n d"),
        *rename(
            {
                f"patch_embed.proj.{_P}": "patch_embedding.{p}",
                f"norm.{_P}": "post_norm.{p}",
                f"blocks.{{layer}}.norm{{n:1|2}}.{_P}": "layers.{layer}.norm{n}.{p}",
                f"blocks.{{layer}}.attn.proj.{_P}": "layers.{layer}.attn.out.{p}",
                f"blocks.{{layer}}.mlp.{{m:fc1|fc2}}.{_P}": "layers.{layer}.mlp.{m}.{p}",
                "attn_pool.latent": "head.probe",
                f"attn_pool.{{m:q|proj=out}}.{_P}": "head.attn.{m}.{p}",
                f"attn_pool.norm.{_P}": "head.norm.{p}",
                f"attn_pool.mlp.{{m:fc1|fc2}}.{_P}": "head.mlp.{m}.{p}",
            }
        ),
        *(
            Rule(native=f"{native}.{leaf}", canonical=f"{canonical}.{leaf}", axes=axes)
            for native, canonical in {
                "blocks.{layer}.attn.qkv": "layers.{layer}.attn.{part:q|k|v}",
                "attn_pool.kv": "head.attn.{part:k|v}",
            }.items()
            for leaf, axes in {"weight": "(part r) c -> r c", "bias": "(part r) -> r"}.items()
        ),
    ),
    canonical="vision.",
)

LAYOUTS = (
    Layout(
        name="big_vision-siglip",
        title="big_vision's SigLIP npz; written with `params/` and the layers stacked",
        space="siglip",
        rules=(
            *prefixed((*_OUTSIDE_BLOCKS, *_STACKED), "params/"),
            *prefixed(_UNSTACKED, "params/", mode="read"),
            *prefixed((*_OUTSIDE_BLOCKS, *_STACKED, *_UNSTACKED), mode="read"),
        ),
        sentinels=tuple(
            root + name
            for root in ("", "params/")
            for name in ("img/MAPHead_0/", "txt/Embed_0/", "txt/Encoder_0/")
        ),
    ),
    Layout(
        name="open_clip-siglip",
        title="open_clip's SigLIP: a timm image tower and a text tower of its own",
        space="siglip",
        rules=(
            *prefixed(_TRUNK, "visual.trunk."),
            *prefixed((*OPEN_CLIP_TEXT_BODY, *OPEN_CLIP_TEXT_LINEAR), "text."),
            *LOGITS,
        ),
        sentinels=("visual.trunk.attn_pool.",),
    ),
)
