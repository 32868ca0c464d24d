"""The language models under Flamingo, each with the names that its own class gives.

Sources: the `state_dict` of the classes in transformers, and of MosaicML's own code for the two MPT
models that OpenFlamingo was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flamingo_ckpt.layouts.rules import Rule, dropped, rename

_P = "{p:weight|bias}"
_ROTARY = "computed from the config when the model is built"


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageFamily:
    """The key names of one kind of language model.

    Attributes:
        name: as transformers' `model_type`, except where one type has two namings.
        title: models that people know.
        layers: path of the list of decoder layers (upstream's `decoder_layers_attr_name`).
        embed: key of the input embedding.
        head: key of the output embedding as files hold it; "" where it is always the input's.
        head_read: another key of it that files are met with.
        is_tied: whether the head is the input embedding unless a config says otherwise.
        leaves: patterns of a decoder layer's own keys.
        rest: further keys -> canonical, without `lm.`.
        buffers: keys of a decoder layer that are recomputed and never carried.
    """

    name: str
    title: str
    layers: str
    embed: str
    head: str = "lm_head.weight"
    head_read: str = ""
    is_tied: bool = False
    leaves: tuple[str, ...]
    rest: Mapping[str, str]
    buffers: tuple[str, ...] = ()
    model_types: tuple[str, ...] = field(default=())

    def rules(self, prefix: str = "", inner: str = "") -> tuple[Rule, ...]:
        """The family's keys below `prefix`, a decoder layer's own below `inner`."""
        layer = f"{prefix}{self.layers}." + "{layer}." + inner
        heads = {prefix + self.head: "lm.head.weight"} if self.head else {}
        read = (
            (Rule(native=prefix + self.head_read, canonical="lm.head.weight", mode="read"),)
            if self.head_read
            else ()
        )
        return (
            *rename({prefix + self.embed: "lm.embed_tokens.weight"} | heads),
            *read,
            *rename({prefix + key: "lm." + name for key, name in self.rest.items()}),
            *rename(
                {layer + leaf: "lm.layers.{layer}." + _words_once(leaf) for leaf in self.leaves}
            ),
            *dropped({layer + leaf: _ROTARY for leaf in self.buffers}),
        )


def _words_once(leaf: str) -> str:
    """The canonical spelling of a leaf: its captures without their alternatives."""
    return re.sub(r"\{([a-z]+):[^}]*\}", r"{\1}", leaf)


FAMILIES: Mapping[str, LanguageFamily] = {
    family.name: family
    for family in (
        LanguageFamily(
            name="mosaic_gpt",
            title="MPT-1B (mpt-1b-redpajama-200b), MosaicML's own code",
            layers="transformer.blocks",
            embed="transformer.wte.weight",
            head="",
            is_tied=True,
            leaves=(
                "ln_{n:1|2}.weight",
                "attn.{m:Wqkv|q_ln|k_ln|out_proj}.weight",
                "mlp.{m:mlp_up|mlp_down}.weight",
            ),
            rest={"transformer.ln_f.weight": "final_norm.weight"},
            model_types=("mosaic_gpt",),
        ),
        LanguageFamily(
            name="mpt",
            title="MPT-7B, MosaicML's own code and transformers'",
            layers="transformer.blocks",
            embed="transformer.wte.weight",
            is_tied=True,
            leaves=(
                "norm_{n:1|2}.weight",
                "attn.{m:Wqkv|out_proj}.weight",
                "ffn.{m:up_proj|down_proj}.weight",
            ),
            rest={"transformer.norm_f.weight": "final_norm.weight"},
            model_types=("mpt",),
        ),
        LanguageFamily(
            name="gpt_neox",
            title="GPT-NeoX: RedPajama-INCITE, Pythia",
            layers="gpt_neox.layers",
            embed="gpt_neox.embed_in.weight",
            head="embed_out.weight",
            head_read="lm_head.weight",
            leaves=(
                f"{{m:input_layernorm|post_attention_layernorm}}.{_P}",
                f"attention.{{m:query_key_value|dense}}.{_P}",
                f"mlp.{{m:dense_h_to_4h|dense_4h_to_h}}.{_P}",
            ),
            rest={f"gpt_neox.final_layer_norm.{_P}": "final_norm.{p}"},
            buffers=(
                "attention.bias",
                "attention.masked_bias",
                "attention.rotary_emb.inv_freq",
            ),
            model_types=("gpt_neox",),
        ),
        LanguageFamily(
            name="llama",
            title="LLaMA, Vicuna",
            layers="model.layers",
            embed="model.embed_tokens.weight",
            leaves=(
                "self_attn.{m:q_proj|k_proj|v_proj|o_proj}.weight",
                "mlp.{m:gate_proj|up_proj|down_proj}.weight",
                "{m:input_layernorm|post_attention_layernorm}.weight",
            ),
            rest={"model.norm.weight": "final_norm.weight"},
            buffers=("self_attn.rotary_emb.inv_freq",),
            model_types=("llama",),
        ),
        LanguageFamily(
            name="opt",
            title="OPT",
            layers="model.decoder.layers",
            embed="model.decoder.embed_tokens.weight",
            is_tied=True,
            leaves=(
                f"self_attn.{{m:q_proj|k_proj|v_proj|out_proj}}.{_P}",
                f"{{m:self_attn_layer_norm|final_layer_norm|fc1|fc2}}.{_P}",
            ),
            rest={
                "model.decoder.embed_positions.weight": "embed_positions.weight",
                f"model.decoder.final_layer_norm.{_P}": "final_norm.{p}",
                "model.decoder.{m:project_in|project_out}.weight": "{m}.weight",
            },
            model_types=("opt",),
        ),
        LanguageFamily(
            name="gptj",
            title="GPT-J",
            layers="transformer.h",
            embed="transformer.wte.weight",
            leaves=(
                f"ln_1.{_P}",
                "attn.{m:q_proj|k_proj|v_proj|out_proj}.weight",
                f"mlp.{{m:fc_in|fc_out}}.{_P}",
            ),
            rest={
                "lm_head.bias": "head.bias",
                f"transformer.ln_f.{_P}": "final_norm.{p}",
            },
            buffers=("attn.bias", "attn.masked_bias", "attn.embed_positions"),
            model_types=("gptj",),
        ),
    )
}
