"""CLIP's two towers in open_clip's and in Hugging Face's words, for the layouts that contain them.

Sources: the `state_dict` of `open_clip.CLIP` and of transformers' `CLIPModel`. open_clip stores
query, key and value of a layer as one tensor, and both projections transposed.
"""

from __future__ import annotations

from flamingo_ckpt.layouts.rules import Rule, dropped, prefixed, rename

_P = "{p:weight|bias}"
_ARANGE = "the positions 0, 1, 2, ..., made when the model is built"

_OPEN_CLIP_BLOCKS = (
    *rename(
        {
            f"transformer.resblocks.{{layer}}.ln_{{n:1|2}}.{_P}": "layers.{layer}.norm{n}.{p}",
            f"transformer.resblocks.{{layer}}.attn.out_proj.{_P}": "layers.{layer}.attn.out.{p}",
            f"transformer.resblocks.{{layer}}.mlp.{{m:c_fc=fc1|c_proj=fc2}}.{_P}": (
                "layers.{layer}.mlp.{m}.{p}"
            ),
        }
    ),
    Rule(
        native="transformer.resblocks.{layer}.attn.in_proj_weight",
        canonical="layers.{layer}.attn.{part:q|k|v}.weight",
        axes="(part r) c -> r c",
    ),
    Rule(
        native="transformer.resblocks.{layer}.attn.in_proj_bias",
        canonical="layers.{layer}.attn.{part:q|k|v}.bias",
        axes="(part r) -> r",
    ),
)
_HF_BLOCKS = rename(
    {
        f"encoder.layers.{{layer}}.layer_norm{{n:1|2}}.{_P}": "layers.{layer}.norm{n}.{p}",
        f"encoder.layers.{{layer}}.self_attn.{{m:q_proj=q|k_proj=k|v_proj=v|out_proj=out}}.{_P}": (
            "layers.{layer}.attn.{m}.{p}"
        ),
        f"encoder.layers.{{layer}}.mlp.{{m:fc1|fc2}}.{_P}": "layers.{layer}.mlp.{m}.{p}",
    }
)

#: Below `visual.` in open_clip, below `vision_encoder.` in OpenFlamingo.
OPEN_CLIP_VISION = prefixed(
    (
        *rename(
            {
                "class_embedding": "class_embedding",
                "conv1.weight": "patch_embedding.weight",
                "positional_embedding": "position_embedding.weight",
                f"ln_pre.{_P}": "pre_norm.{p}",
                f"ln_post.{_P}": "post_norm.{p}",
            }
        ),
        *_OPEN_CLIP_BLOCKS,
        Rule(
            native="proj",
            canonical="projection.weight",
            axes="d e -> e d",
            loss="CLIPVisionModel has no projection, and no Flamingo uses it",
        ),
    ),
    canonical="vision.",
)
#: An open_clip text tower without its projection, which has two forms.
OPEN_CLIP_TEXT_BODY = (
    *prefixed(
        (
            *rename(
                {
                    "token_embedding.weight": "token_embedding.weight",
                    "positional_embedding": "position_embedding.weight",
                    f"ln_final.{_P}": "final_norm.{p}",
                }
            ),
            *_OPEN_CLIP_BLOCKS,
        ),
        canonical="text.",
    ),
    *dropped({"attn_mask": "the causal mask, made when the model is built"}),
)
#: At the top of an open_clip `CLIP`, below `text.` in a `CustomTextCLIP`.
OPEN_CLIP_TEXT = (
    *OPEN_CLIP_TEXT_BODY,
    Rule(native="text_projection", canonical="text.projection.weight", axes="d e -> e d"),
)
#: The other form of the projection, `proj_bias`: a Linear, which always has a bias.
OPEN_CLIP_TEXT_LINEAR = rename({f"text_projection.{_P}": "text.projection.{p}"})
#: Below `vision_model.` in every release; at the top of a `CLIPVisionModel` of transformers >= 5.6.
HF_VISION = (
    *prefixed(
        (
            *rename(
                {
                    "embeddings.class_embedding": "class_embedding",
                    "embeddings.patch_embedding.weight": "patch_embedding.weight",
                    "embeddings.position_embedding.weight": "position_embedding.weight",
                    f"pre_layrnorm.{_P}": "pre_norm.{p}",
                    f"post_layernorm.{_P}": "post_norm.{p}",
                }
            ),
            *_HF_BLOCKS,
        ),
        canonical="vision.",
    ),
    *dropped({"embeddings.position_ids": _ARANGE}),
)
#: Below `text_model.` in transformers' `CLIPModel`.
HF_TEXT = (
    *prefixed(
        (
            *rename(
                {
                    "embeddings.token_embedding.weight": "token_embedding.weight",
                    "embeddings.position_embedding.weight": "position_embedding.weight",
                    f"final_layer_norm.{_P}": "final_norm.{p}",
                }
            ),
            *_HF_BLOCKS,
        ),
        canonical="text.",
    ),
    *dropped({"embeddings.position_ids": _ARANGE}),
)
#: Scalars, in open_clip with shape (1,) where `nonscalar_logit_scale` says so; written as scalars.
LOGITS = (Rule(native="{m:logit_scale|logit_bias}", canonical="{m}", also=("1 -> ",)),)
LOGIT_SCALE = (Rule(native="logit_scale", canonical="logit_scale", also=("1 -> ",)),)
