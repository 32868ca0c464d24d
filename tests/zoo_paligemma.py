"""Tiny PaliGemma models of transformers, in every layout that they are stored in."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from tests.zoo_lms import State, prepare, randomise, seeded, snapshot

#: Rows with a token, and those that fill the vocabulary up.
WORDS, PADDING = 192, 64
DIM, HEADS, HEAD_DIM, MLP_DIM = 40, 4, 16, 72
VIS_DIM, VIS_HEADS, VIS_MLP, IMAGE, PATCH = 48, 3, 88, 32, 8
LAYOUTS = ("L1", "L2", "L3", "L4", "L5", "L6")

_TOWERS = ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")
_PREFIXES = {
    "L1": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "L2": (
        "model.language_model.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    "L3": (
        "model.language_model.model.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    "L4": _TOWERS,
    "L5": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    "L6": ("language_model.", "vision_tower.", "multi_modal_projector."),
}
#: The head's own name where it is stored; `L6` is saved by a class without a head.
_HEADS = {
    "L1": "language_model.lm_head.weight",
    "L2": "lm_head.weight",
    "L3": "language_model.lm_head.weight",
    "L4": "lm_head.weight",
    "L5": "language_model.lm_head.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaZoo:
    """One PaliGemma. Dicts are fresh on each access.

    Attributes:
        version: 1 or 2.
        tied: the head is the embedding.
        model: transformers' `PaliGemmaForConditionalGeneration`, in evaluation mode.
        config: its `config.json`.
    """

    version: int
    tied: bool
    model: Any
    config: dict[str, Any]
    _memory: State

    def layout(self, name: str, *, head: bool | None = None) -> State:
        """The state dict in layout `L1` … `L6`.

        Args:
            name: the layout.
            head: whether the head is stored; None stores it where it says something: if untied,
                and not in L6. A tied head shares the embedding's storage.
        """
        towers = dict(zip(_TOWERS, _PREFIXES[name], strict=True))
        found = {}
        for key, tensor in self._memory.items():
            if key == "lm_head.weight":
                keep = (not self.tied) if head is None else head
                if keep and name in _HEADS:
                    found[_HEADS[name]] = tensor
                continue
            old = next(prefix for prefix in towers if key.startswith(prefix))
            found[towers[old] + key.removeprefix(old)] = tensor
        return found

    @property
    def memory(self) -> State:
        """`model.state_dict()`: L4 with the head, tied or not."""
        return dict(self._memory)

    @property
    def l6_nested(self) -> State:
        """L6 with the `vision_model.` level, the older of its two spellings."""
        return {
            re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): tensor
            for name, tensor in self.layout("L6").items()
        }

    def peft(self, name: str = "L4") -> State:
        """A whole model dumped under PEFT: base layers below `.base_layer.`, adapters beside."""
        found: State = {}
        for key, tensor in self.layout(name).items():
            module = key.removesuffix(".weight")
            if _adapted(module):
                found[f"base_model.model.{module}.base_layer.weight"] = tensor
                for part, adapter in _lora(tensor, key).items():
                    found[f"base_model.model.{module}.{part}.default.weight"] = adapter
            else:
                found[f"base_model.model.{key}"] = tensor
        return found

    def peft_adapter(self, name: str = "L4") -> State:
        """PEFT's `adapter_model.safetensors`: adapters alone, without the adapter's name."""
        return {
            f"base_model.model.{key.removesuffix('.weight')}.{part}.weight": adapter
            for key, tensor in self.layout(name).items()
            if _adapted(key.removesuffix(".weight"))
            for part, adapter in _lora(tensor, key).items()
        }

    def npz(self, *, prefix: str = "params/") -> dict[str, Any]:
        """big_vision's arrays, without the rows of padding; `prefix` may be empty."""
        import numpy as np

        arrays = _big_vision(self)
        return {prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _adapted(module: str) -> bool:
    return "language_model" in module and module.endswith(("q_proj", "v_proj"))


def _lora(weight: Any, key: str, rank: int = 2) -> State:
    import torch

    with seeded(sum(map(ord, key))):
        return {
            "lora_A": torch.randn(rank, weight.shape[1]),
            "lora_B": torch.randn(weight.shape[0], rank),
        }


@functools.cache
def paligemma(
    *,
    version: int = 1,
    tied: bool = True,
    layers: int = 4,
    padding: str = "zero",
    seed: int = 0,
) -> PaliGemmaZoo:
    """A random PaliGemma; heads x head size differs from the hidden size.

    Args:
        version: 1 (Gemma, one key/value head) or 2 (Gemma 2, two of them, four norms a layer).
        tied: the head is the embedding; otherwise it has values of its own.
        layers: of both towers.
        padding: the last 64 rows of the vocabulary: `zero`, or `random` as in hub files.
        seed: of all weights.
    """
    prepare()
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    with seeded(seed):
        model = PaliGemmaForConditionalGeneration(_config(version, tied, layers))
        randomise(model)
        if padding == "zero":
            with torch.no_grad():
                model.get_input_embeddings().weight[WORDS:] = 0
                model.get_output_embeddings().weight[WORDS:] = 0
        elif padding != "random":
            raise ValueError(f"no padding {padding!r}")
    model.eval().requires_grad_(False)
    config = model.config.to_dict() | {"architectures": ["PaliGemmaForConditionalGeneration"]}
    return PaliGemmaZoo(
        version=version, tied=tied, model=model, config=config, _memory=snapshot(model)
    )


def _config(version: int, tied: bool, layers: int) -> Any:
    from transformers import PaliGemmaConfig

    text = {
        "model_type": "gemma" if version == 1 else "gemma2",
        "vocab_size": WORDS + PADDING,
        "hidden_size": DIM,
        "intermediate_size": MLP_DIM,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": version,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "num_image_tokens": (IMAGE // PATCH) ** 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": VIS_DIM,
        "intermediate_size": VIS_MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": VIS_HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "projection_dim": DIM,
        "vision_use_head": False,
    }
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS,
        projection_dim=DIM,
        hidden_size=DIM,
        tie_word_embeddings=tied,
    )


def inputs(zoo: PaliGemmaZoo, seed: int = 0) -> dict[str, Any]:
    """A batch for `model(**inputs)`: one picture and a few words, in the model's dtype."""
    import torch

    with seeded(seed):
        pixels = torch.randn(1, 3, IMAGE, IMAGE)
        words = torch.randint(3, WORDS, (1, 6))
    tokens = torch.cat([torch.full((1, (IMAGE // PATCH) ** 2), WORDS), words], 1)
    return {
        "input_ids": tokens,
        "pixel_values": pixels.to(next(zoo.model.parameters()).dtype),
        "attention_mask": torch.ones_like(tokens),
    }


def _big_vision(zoo: PaliGemmaZoo) -> dict[str, Any]:
    """Through L1's names, so that the table can be read next to the published one."""
    state = {name: tensor.numpy() for name, tensor in zoo.layout("L1").items()}
    state.pop("language_model.lm_head.weight", None)
    return _vision_arrays(state) | _language_arrays(state, zoo.version)


def _stack(state: State, place: str, leaf: str, change: Callable[[Any], Any] | None = None) -> Any:
    import numpy as np

    count = len([name for name in state if re.fullmatch(rf"{place}\d+\.{leaf}", name)])
    arrays = [state[f"{place}{i}.{leaf}"] for i in range(count)]
    return np.stack([array if change is None else change(array) for array in arrays])


def _vision_arrays(state: State) -> dict[str, Any]:
    tower = "vision_tower.vision_model."
    blocks = f"{tower}encoder.layers."
    found = {
        "img/embedding/kernel": state[f"{tower}embeddings.patch_embedding.weight"].transpose(
            2, 3, 1, 0
        ),
        "img/embedding/bias": state[f"{tower}embeddings.patch_embedding.bias"],
        "img/pos_embedding": state[f"{tower}embeddings.position_embedding.weight"][None],
        "img/Transformer/encoder_norm/scale": state[f"{tower}post_layernorm.weight"],
        "img/Transformer/encoder_norm/bias": state[f"{tower}post_layernorm.bias"],
        "img/head/kernel": state["multi_modal_projector.linear.weight"].T,
        "img/head/bias": state["multi_modal_projector.linear.bias"],
    }
    block = "img/Transformer/encoderblock/"
    for i in (0, 1):
        norm, dense = f"{block}LayerNorm_{i}/", f"{block}MlpBlock_0/Dense_{i}/"
        found[norm + "scale"] = _stack(state, blocks, f"layer_norm{i + 1}.weight")
        found[norm + "bias"] = _stack(state, blocks, f"layer_norm{i + 1}.bias")
        found[dense + "kernel"] = _stack(state, blocks, f"mlp.fc{i + 1}.weight", lambda a: a.T)
        found[dense + "bias"] = _stack(state, blocks, f"mlp.fc{i + 1}.bias")
    attention = f"{block}MultiHeadDotProductAttention_0/"
    head = VIS_DIM // VIS_HEADS
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        found[f"{attention}{name}/kernel"] = _stack(
            state,
            blocks,
            f"self_attn.{short}_proj.weight",
            lambda a: a.T.reshape(VIS_DIM, VIS_HEADS, head),
        )
        found[f"{attention}{name}/bias"] = _stack(
            state, blocks, f"self_attn.{short}_proj.bias", lambda a: a.reshape(VIS_HEADS, head)
        )
    found[f"{attention}out/kernel"] = _stack(
        state,
        blocks,
        "self_attn.out_proj.weight",
        lambda a: a.T.reshape(VIS_HEADS, head, VIS_DIM),
    )
    found[f"{attention}out/bias"] = _stack(state, blocks, "self_attn.out_proj.bias")
    return found


def _language_arrays(state: State, version: int) -> dict[str, Any]:
    import numpy as np

    blocks = "language_model.model.layers."

    def per_head(weight: Any) -> Any:
        return weight.reshape(-1, HEAD_DIM, DIM).transpose(0, 2, 1)  # (heads, D, H)

    def projection(name: str) -> Any:
        return _stack(state, blocks, f"self_attn.{name}_proj.weight", per_head)

    def mlp(name: str) -> Any:
        return _stack(state, blocks, f"mlp.{name}_proj.weight", lambda a: a.T)

    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if version == 2:
        norms |= {
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    found = {
        "llm/embedder/input_embedding": state["language_model.model.embed_tokens.weight"][:WORDS],
        "llm/layers/attn/q_einsum/w": projection("q"),
        "llm/layers/attn/kv_einsum/w": np.stack([projection("k"), projection("v")], axis=1),
        "llm/layers/attn/attn_vec_einsum/w": _stack(
            state,
            blocks,
            "self_attn.o_proj.weight",
            lambda a: a.T.reshape(HEADS, HEAD_DIM, DIM),
        ),
        "llm/layers/mlp/gating_einsum": np.stack([mlp("gate"), mlp("up")], axis=1),
        "llm/layers/mlp/linear": mlp("down"),
        "llm/final_norm/scale": state["language_model.model.norm.weight"],
    }
    for theirs, ours in norms.items():
        found[f"llm/layers/{theirs}/scale"] = _stack(state, blocks, f"{ours}.weight")
    return found
