"""The language models that a Flamingo can be built on: which fields of a config size them.

What their tensors are called is in the tables of `layouts`; here are the fields of their configs.
`mosaic_gpt` is MosaicML's own, the others are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.layouts.families import FAMILIES as LANGUAGE_FAMILIES
from flamingo_ckpt.models.fields import MAX_HEADS, MAX_LAYERS, MAX_ROWS, Fields, lookup
from flamingo_ckpt.tensors import escape


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of language models.

    Attributes:
        name: transformers' `model_type`.
        architectures: class names that configs carry, the first of each family being the usual one.
        hidden_size, num_layers, num_heads, mlp: names of the fields that size it; `mlp` is empty
            where a ratio does it.
        optional: further fields that decide names or shapes.
        fixed: what these (dotted) fields must be where they are given, because the module that is
            built for the family has no other form: a value, or several in a tuple.
        signature: a decoder leaf that no other family has.
        up_projection: the leaf whose rows are the width of the MLP.
    """

    name: str
    architectures: tuple[str, ...]
    hidden_size: str = "hidden_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    mlp: str = "intermediate_size"
    optional: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    signature: str
    up_projection: str

    @property
    def layers(self) -> str:
        """Path of its decoder layers, as upstream's `decoder_layers_attr_name`."""
        return LANGUAGE_FAMILIES[self.name].layers


_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
#: Names of transformers 4 -> those in version 5's `rope_parameters`.
_ROTARY = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "partial_rotary_factor": "partial_rotary_factor",
}
#: What both of MosaicML's families have in one form here, training included.
_MOSAIC_FIXED: Mapping[str, Any] = {
    "no_bias": True,
    "logit_scale": None,
    "embedding_fraction": 1,
    "emb_pdrop": 0,
    "resid_pdrop": 0,
}
#: transformers' MPT takes these fields, and then computes as if they had the value that is here.
_MPT_FIXED: Mapping[str, Any] = {
    **_MOSAIC_FIXED,
    "expansion_ratio": 4,
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "final_logit_softcapping": None,
    "block_overrides": None,
    "ffn_config.ffn_type": "mptmlp",
    "attn_config.alibi": True,
    "attn_config.attn_type": "multihead_attention",
    "attn_config.qk_ln": False,
    "attn_config.qk_gn": False,
    "attn_config.rope": False,
    "attn_config.prefix_lm": False,
    "attn_config.attn_uses_sequence_id": False,
    "attn_config.attn_pdrop": 0,
    "attn_config.sliding_window_size": -1,
    "attn_config.attn_logit_softcapping": None,
}
_MOSAIC_GPT_FIXED: Mapping[str, Any] = {
    **_MOSAIC_FIXED,
    "alibi": True,
    "attn_qk_ln": True,
    "attn_pdrop": 0,
    "attn_clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
}
_FAMILIES = (
    Family(
        name="mosaic_gpt",
        architectures=("MosaicGPT",),
        hidden_size="d_model",
        num_layers="n_layers",
        num_heads="n_heads",
        mlp="",
        optional=("mlp_ratio",),
        fixed=_MOSAIC_GPT_FIXED,
        signature="attn.q_ln.weight",
        up_projection="mlp.mlp_up.weight",
    ),
    Family(
        name="mpt",
        architectures=("MptForCausalLM", "MPTForCausalLM"),
        hidden_size="d_model",
        num_layers="n_layers",
        num_heads="n_heads",
        mlp="",
        fixed=_MPT_FIXED,
        signature="ffn.up_proj.weight",
        up_projection="ffn.up_proj.weight",
    ),
    Family(
        name="gpt_neox",
        architectures=("GPTNeoXForCausalLM",),
        optional=("attention_bias",),
        signature="attention.query_key_value.weight",
        up_projection="mlp.dense_h_to_4h.weight",
    ),
    Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        optional=("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"),
        signature="mlp.gate_proj.weight",
        up_projection="mlp.gate_proj.weight",
    ),
    Family(
        name="opt",
        architectures=("OPTForCausalLM",),
        mlp="ffn_dim",
        optional=(
            "max_position_embeddings",
            "word_embed_proj_dim",
            "do_layer_norm_before",
            "_remove_final_layer_norm",
            "enable_bias",
            "layer_norm_elementwise_affine",
        ),
        signature="self_attn_layer_norm.weight",
        up_projection="fc1.weight",
    ),
    Family(
        name="gptj",
        architectures=("GPTJForCausalLM",),
        hidden_size="n_embd",
        num_layers="n_layer",
        num_heads="n_head",
        mlp="",
        optional=("n_inner", "n_positions", "rotary_dim"),
        signature="mlp.fc_in.weight",
        up_projection="mlp.fc_in.weight",
    ),
)
#: Every family by its name.
FAMILIES: Mapping[str, Family] = {family.name: family for family in _FAMILIES}
_BY_ARCHITECTURE = {name: family for family in _FAMILIES for name in family.architectures}


def find_family(text: Fields, layers: str | None) -> Family | None:
    """The family of a language-model config; None where `layers` names the decoder by hand.

    Raises:
        CkptError: FC403 for a family that is not known, FC408 where `model_type` and
            `architectures` name two.
    """
    model_type = text.text("model_type")
    architectures = text.data.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise text.wrong("architectures", architectures, "a list of class names")
    by_type = FAMILIES.get(model_type or "")
    by_class = next((_BY_ARCHITECTURE[a] for a in architectures if a in _BY_ARCHITECTURE), None)
    if by_type and by_class and by_type is not by_class:
        raise text.contradiction(
            f"`{text.path}model_type` is `{by_type.name}`, but `{text.path}architectures` names "
            f"`{escape(architectures[0])}`"
        )
    found = by_type or by_class
    if found is not None and (layers is None or layers == found.layers):
        return found
    if layers is not None and model_type:
        return None
    raise _unknown(text, model_type, architectures)


def _unknown(text: Fields, model_type: str | None, architectures: list[str]) -> CkptError:
    given = model_type or (architectures[0] if architectures else None)
    if given is None:
        return text.missing("model_type")
    return text.error(
        f"unknown language-model family `{escape(given)}` in `{text.path or 'the config'}`; known: "
        + ", ".join(FAMILIES),
        "FC403",
        "for another causal language model of transformers, name its `model_type` in the text "
        "config and the path of its decoder layers in `decoder_layers_attr_name`, such as "
        "`transformer.h`",
    )


def check_language(text: Fields, family: Family | None) -> int | None:
    """Check the fields of a language-model config; returns its number of layers if they tell.

    Raises:
        CkptError: FC401, FC408 for fields that are missing, wrong or contradict each other.
    """
    text.flag("tie_word_embeddings")
    _check_arithmetic(text)
    if family is None:
        return _check_by_hand(text)
    width = text.integer(family.hidden_size)
    layers = text.integer(family.num_layers, high=MAX_LAYERS)
    heads = text.integer(family.num_heads, high=MAX_HEADS)
    text.integer("vocab_size", high=MAX_ROWS)
    if family.mlp:
        text.integer(family.mlp, high=1 << 20)
    if text.data.get("head_dim") is None:
        text.divisible(family.hidden_size, width, family.num_heads, heads)
    _check_optional(text, family, heads)
    return layers


def _check_arithmetic(text: Fields) -> None:
    """Numbers that no tensor shows, and the two places that rotary embeddings may have them in.

    Of two that differ transformers takes the one in `rope_parameters`, and says nothing.
    """
    for name in (*_EPSILONS, *_ROTARY):
        value = text.data.get(name)
        if value is not None and not _is_positive(value):
            raise text.wrong(name, value, "a positive number")
    for name, inner in _ROTARY.items():
        value, other = text.data.get(name), lookup(text.data, f"rope_parameters.{inner}")
        if value is not None and _is_positive(other) and value != other:
            raise text.contradiction(
                f"`{text.path}{name}` is {value}, but `{text.path}rope_parameters.{inner}` is "
                f"{other}",
                "remove the one that the model was not trained with",
            )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check_by_hand(text: Fields) -> int | None:
    """Bound what makes a class of transformers build many modules, whatever it calls them."""
    for name, value in text.data.items():
        counts_modules = any(word in name for word in ("layer", "expert", "depth", "block"))
        if name.endswith(("size", "dim", "id")):
            continue  # of a layer, and no number of layers
        if counts_modules and isinstance(value, int) and not isinstance(value, bool):
            text.integer(name, low=-MAX_LAYERS, high=MAX_LAYERS)
    text.optional("vocab_size", high=MAX_ROWS)
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    given = [text.optional(name, high=MAX_LAYERS) for name in names]
    return next((number for number in given if number is not None), None)


def _check_optional(text: Fields, family: Family, heads: int) -> None:
    groups = text.optional("num_key_value_heads", high=MAX_HEADS)
    if "num_key_value_heads" in family.optional and groups is not None:
        text.divisible(family.num_heads, heads, "num_key_value_heads", groups)
    for name in ("head_dim", "mlp_ratio", "n_inner", "word_embed_proj_dim"):
        text.optional(name, high=1 << 20)
    for name in ("max_position_embeddings", "n_positions"):
        text.optional(name, high=MAX_ROWS)
    for name in family.optional:
        if name.endswith(("bias", "affine", "before", "norm")):
            text.flag(name)
    for name, wanted in family.fixed.items():
        value = lookup(text.data, name)
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        if value is not None and value not in choices:
            raise text.error(
                f"`{text.path}{name}` is {escape(repr(value))[:60]}; a `{family.name}` is built "
                f"with {' or '.join(map(repr, choices))} only",
                "FC405",
            )
    groups = lookup(text.data, "attn_config.kv_n_heads")
    if family.name == "mpt" and groups not in (None, heads):
        raise text.error(
            f"`{text.path}attn_config.kv_n_heads` is {escape(repr(groups))[:60]}; a `mpt` is built "
            f"with as many as `n_heads` ({heads}) only",
            "FC405",
        )
