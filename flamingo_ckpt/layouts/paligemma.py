"""PaliGemma's layouts: big_vision's arrays, the six that transformers has written, and PEFT's.

The Hugging Face layouts differ in their prefixes alone. Which of them a file is in depends on the
version of transformers and on where the object came from that was saved; `paligemma` is the hub's
own, which every version reads. Sources: the `state_dict` and `save_pretrained` of several versions
of transformers, and big_vision's `models/proj/paligemma` with `models/{vit,ppp/gemma}`.

A decoder layer's leaves are spelled as transformers spells them, with its trap: Gemma's
`post_attention_layernorm` stands before the MLP (big_vision's `pre_ffw_norm`), Gemma 2's after the
attention (`post_attention_norm`). So the arrays have two tables, and the others need one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flamingo_ckpt.layouts.big_vision import IMAGE_ENDS, blocks
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Rule, dropped, prefixed, rename

_P = "{p:weight|bias}"
_QKVO = "{m:q_proj=q|k_proj=k|v_proj=v|out_proj=out}"
_LAYER = "lm.layers.{layer}."

_SIGLIP = prefixed(
    rename(
        {
            f"embeddings.patch_embedding.{_P}": "patch_embedding.{p}",
            "embeddings.position_embedding.weight": "position_embedding.weight",
            f"encoder.layers.{{layer}}.layer_norm{{n:1|2}}.{_P}": "layers.{layer}.norm{n}.{p}",
            f"encoder.layers.{{layer}}.self_attn.{_QKVO}.{_P}": "layers.{layer}.attn.{m}.{p}",
            f"encoder.layers.{{layer}}.mlp.{{m:fc1|fc2}}.{_P}": "layers.{layer}.mlp.{m}.{p}",
            f"post_layernorm.{_P}": "post_norm.{p}",
        }
    ),
    canonical="vision.",
)
_GEMMA = prefixed(
    rename(
        {
            "embed_tokens.weight": "embed_tokens.weight",
            "layers.{layer}.self_attn.{m:q_proj|k_proj|v_proj|o_proj}.weight": (
                "layers.{layer}.self_attn.{m}.weight"
            ),
            "layers.{layer}.mlp.{m:gate_proj|up_proj|down_proj}.weight": (
                "layers.{layer}.mlp.{m}.weight"
            ),
            "layers.{layer}.{m:input_layernorm|post_attention_layernorm|"
            "pre_feedforward_layernorm|post_feedforward_layernorm}.weight": (
                "layers.{layer}.{m}.weight"
            ),
            "norm.weight": "final_norm.weight",
        }
    ),
    canonical="lm.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelling:
    """The prefixes of one Hugging Face layout; those `also` read are never written.

    Attributes:
        head: of an output embedding that is not the input's; "" where no file has one.
    """

    name: str
    title: str
    language: str
    vision: str
    projector: str = "multi_modal_projector."
    head: str = ""
    also_vision: str = ""
    also_head: str = ""

    def rules(self) -> tuple[Rule, ...]:
        """Every key of a checkpoint."""
        return (
            *prefixed(_SIGLIP, self.vision),
            *(prefixed(_SIGLIP, self.also_vision, mode="read") if self.also_vision else ()),
            *rename({f"{self.projector}linear.{_P}": "projector.{p}"}),
            *prefixed(_GEMMA, self.language),
            *(_head(self.head, "both")),
            *(_head(self.also_head, "read")),
        )

    def layout(self) -> Layout:
        """The layout; any key of one of the three parts is evidence for it."""
        return Layout(
            name=self.name,
            title=self.title,
            space="paligemma",
            rules=self.rules(),
            sentinels=(self.language, self.vision, self.projector),
            hf_config=True,
        )


def _head(native: str, mode: str) -> tuple[Rule, ...]:
    return (Rule(native=native, canonical="lm.head.weight", mode=mode),) if native else ()


_SPELLINGS = (
    _Spelling(
        name="paligemma",
        title="PaliGemma 1 and 2 as on the hub, which every reader understands",
        language="language_model.model.",
        vision="vision_tower.vision_model.",
        head="language_model.lm_head.weight",
    ),
    _Spelling(
        name="paligemma-l2",
        title="PaliGemma in the memory of transformers 4.52 to 5.5 (raw `state_dict` dumps)",
        language="model.language_model.",
        vision="model.vision_tower.vision_model.",
        projector="model.multi_modal_projector.",
        head="lm_head.weight",
    ),
    _Spelling(
        name="paligemma-l3",
        title="PaliGemma as `save_pretrained` of transformers 5.5 wrote it, by mistake",
        language="model.language_model.model.",
        vision="model.vision_tower.vision_model.",
        projector="model.multi_modal_projector.",
        head="language_model.lm_head.weight",
        also_head="lm_head.weight",
    ),
    _Spelling(
        name="paligemma-l4",
        title="PaliGemma in the memory of transformers 5.6 and later",
        language="model.language_model.",
        vision="model.vision_tower.",
        projector="model.multi_modal_projector.",
        head="lm_head.weight",
    ),
    _Spelling(
        name="paligemma-l5",
        title="PaliGemma that transformers 5.6 and later saved after training from scratch",
        language="language_model.model.",
        vision="vision_tower.",
        head="language_model.lm_head.weight",
    ),
    _Spelling(
        name="paligemma-l6",
        title="`PaliGemmaModel`, the class without an output head",
        language="language_model.",
        # transformers 5.6 and later holds it without `vision_model.` and reads it with it
        vision="vision_tower.vision_model.",
        also_vision="vision_tower.",
    ),
)

#: ViT and projector; every block's tensors are stacked, as `scan` leaves them.
_ARRAYS_VISION = (
    *IMAGE_ENDS,
    *blocks("img/Transformer/", "vision.", "visionheads", stacked=True),
    Rule(native="img/head/kernel", canonical="projector.weight", axes="d e -> e d"),
    *rename({"img/head/bias": "projector.bias"}),
)
#: Gemma, its layers stacked. Both programs multiply by 1 + scale, so norms are copied.
_ARRAYS_LANGUAGE = (
    *rename(
        {
            "llm/embedder/input_embedding": "lm.embed_tokens.weight",
            "llm/final_norm/scale": "lm.final_norm.weight",
        }
    ),
    Rule(
        native="llm/layers/attn/q_einsum/w",
        canonical=_LAYER + "self_attn.q_proj.weight",
        axes="layer lmheads d h -> (lmheads h) d",
    ),
    Rule(
        native="llm/layers/attn/kv_einsum/w",
        canonical=_LAYER + "self_attn.{part:k|v}_proj.weight",
        axes="layer part kvheads d h -> (kvheads h) d",
    ),
    # heads times their size need not be the width, so this is not the transpose of a square
    Rule(
        native="llm/layers/attn/attn_vec_einsum/w",
        canonical=_LAYER + "self_attn.o_proj.weight",
        axes="layer lmheads h d -> d (lmheads h)",
    ),
    Rule(
        native="llm/layers/mlp/gating_einsum",
        canonical=_LAYER + "mlp.{part:gate|up}_proj.weight",
        axes="layer part d f -> f d",
    ),
    Rule(
        native="llm/layers/mlp/linear",
        canonical=_LAYER + "mlp.down_proj.weight",
        axes="layer f d -> d f",
    ),
)


def _arrays(norms: str) -> tuple[Rule, ...]:
    """The arrays' rules; files are met without the leading `params/` too."""
    rules = (
        *_ARRAYS_VISION,
        *_ARRAYS_LANGUAGE,
        Rule(
            native="llm/layers/{m:" + norms + "}/scale",
            canonical=_LAYER + "{m}.weight",
            axes="layer d -> d",
        ),
    )
    return (*prefixed(rules, "params/"), *prefixed(rules, mode="read"))


_GEMMA_1_NORMS = "pre_attention_norm=input_layernorm|pre_ffw_norm=post_attention_layernorm"
_GEMMA_2_NORMS = (
    "pre_attention_norm=input_layernorm|post_attention_norm=post_attention_layernorm|"
    "pre_ffw_norm=pre_feedforward_layernorm|post_ffw_norm=post_feedforward_layernorm"
)
_ARRAYS_EVIDENCE = ("llm/layers/", "llm/embedder/", "llm/final_norm/", "img/head/")
_GEMMA_2_EVIDENCE = ("llm/layers/post_attention_norm/", "llm/layers/post_ffw_norm/")


def _both(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(start + name for name in names for start in ("params/", ""))


_ADAPTER = "a LoRA adapter: only PEFT can merge it into its base layer"
_REPLACEMENT = "trained by PEFT in place of the base layer, which is taken"
_NORMS = ("norm", "layernorm", "position_embedding")


def _modules(rules: Iterable[Rule]) -> Iterator[tuple[str, str, Rule]]:
    """(module, parameter, rule) of what an adapter can sit on: Linears, Conv2d, embeddings."""
    for rule in rules:
        parameter = "weight" if rule.native.endswith(".weight") else _P
        module = rule.native.removesuffix("." + parameter)
        if not any(word in module for word in _NORMS):
            yield module, parameter, rule


def _peft() -> tuple[Rule, ...]:
    """Keys of a dumped `PeftModel` and of an adapter's own file, around any spelling."""
    plain = {rule.native: rule for one in _SPELLINGS for rule in one.rules()}.values()
    names = {one.projector for one in _SPELLINGS}
    found = [*plain]
    for module, parameter, rule in _modules(plain):
        for wrapper in ("base_layer", "original_module"):
            found.append(Rule(native=f"{module}.{wrapper}.{parameter}", canonical=rule.canonical))
        found += dropped(
            {
                f"{module}.lora_{{a:A|B}}.weight": _ADAPTER,
                f"{module}.lora_{{a:A|B}}.default.weight": _ADAPTER,
                f"{module}.lora_embedding_{{a:A|B}}": _ADAPTER,
                f"{module}.lora_embedding_{{a:A|B}}.default": _ADAPTER,
                f"{module}.lora_magnitude_vector": _ADAPTER,
                f"{module}.lora_magnitude_vector.default.weight": _ADAPTER,
                f"{module}.modules_to_save.default.{parameter}": _REPLACEMENT,
            }
        )
    for name in sorted(names):
        found.append(Rule(native=f"{name}original_module.linear.{_P}", canonical="projector.{p}"))
        found += dropped({f"{name}modules_to_save.default.linear.{_P}": _REPLACEMENT})
    return prefixed(found, "base_model.model.", mode="read")


LAYOUTS = (
    *(spelling.layout() for spelling in _SPELLINGS),
    Layout(
        name="paligemma-npz",
        ends_with_tokens=True,
        title="PaliGemma 1 as big_vision writes it (.npz)",
        space="paligemma",
        rules=_arrays(_GEMMA_1_NORMS),
        sentinels=_both(_ARRAYS_EVIDENCE),
        never_has=_both(_GEMMA_2_EVIDENCE),
    ),
    Layout(
        name="paligemma2-npz",
        ends_with_tokens=True,
        title="PaliGemma 2 as big_vision writes it (.npz)",
        space="paligemma",
        rules=_arrays(_GEMMA_2_NORMS),
        sentinels=_both(_GEMMA_2_EVIDENCE),
        needs=("lm.layers.#.pre_feedforward_layernorm.weight",),
    ),
    Layout(
        name="paligemma-peft",
        title="PaliGemma under PEFT: the base layers are taken, the adapters listed",
        space="paligemma",
        rules=_peft(),
        sentinels=("base_model.model.",),
        lossy="the adapters, which change what the model computes",
        read_only="adapters belong to PEFT, which writes them itself",
    ),
)
