"""Faults to plant in a state dict, and where each language model has its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests import zoo
from tests.zoo_lms import LANG_HEADS

State = dict[str, Any]

VISION = "vision_encoder.vision_model."
#: The final norm of each language model.
FINAL_NORMS = {
    "mpt1b": "transformer.ln_f",
    "mpt7b": "transformer.norm_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "pythia": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
    "opt": "model.decoder.final_layer_norm",
    "gptj": "transformer.ln_f",
}
#: The square matrix behind each attention.
SQUARES = {
    "mpt1b": "attn.out_proj",
    "mpt7b": "attn.out_proj",
    "gpt_neox": "attention.dense",
    "pythia": "attention.dense",
    "llama": "self_attn.o_proj",
    "opt": "self_attn.out_proj",
    "gptj": "attn.out_proj",
}
#: Fused query, key and value, and how many heads each has for itself in it.
_FUSED = {
    "mpt1b": ("attn.Wqkv.weight", 1),
    "mpt7b": ("attn.Wqkv.weight", 1),
    "gpt_neox": ("attention.query_key_value.weight", LANG_HEADS),
    "pythia": ("attention.query_key_value.weight", LANG_HEADS),
}
#: A setting of the language model in its config, and another value; Pythia is another GPT-NeoX.
ACTIVATIONS = {
    "gpt_neox": ("hidden_act", "gelu", "gelu_new"),
    "llama": ("hidden_act", "silu", "gelu"),
    "opt": ("activation_function", "relu", "gelu"),
    "gptj": ("activation_function", "gelu_new", "gelu"),
}
EPSILONS = {
    "mpt7b": ("layer_norm_epsilon", 1e-5, 1e-6),
    "gpt_neox": ("layer_norm_eps", 1e-5, 1e-6),
    "llama": ("rms_norm_eps", 1e-6, 1e-5),
    "gptj": ("layer_norm_epsilon", 1e-5, 1e-6),
}


class Planted(NamedTuple):
    """Keys that were changed, and what is to be said of them."""

    keys: list[str]
    words: str


def layer(family: str, index: int, leaf: str) -> str:
    """A key of a decoder layer in the Hugging Face form."""
    return f"lang_encoder.{zoo.FAMILIES[family][0]}.{index}.decoder_layer.{leaf}"


def gated(family: str, index: int, leaf: str) -> str:
    """A key of gated cross-attention in the Hugging Face form."""
    return f"lang_encoder.{zoo.FAMILIES[family][0]}.{index}.gated_cross_attn_layer.{leaf}"


def square(family: str, index: int) -> str:
    return layer(family, index, f"{SQUARES[family]}.weight")


def embedding(family: str) -> str:
    return f"lang_encoder.{zoo.FAMILIES[family][1]}.weight"


def swap(state: State, one: str, other: str) -> list[str]:
    """Two tensors in each other's place."""
    assert state[one].shape == state[other].shape
    state[one], state[other] = state[other], state[one]
    return [one, other]


def swap_parts(state: State, key: str, one: int, other: int, of: int, heads: int = 1) -> None:
    """Rows of a fused matrix, or each head's, with two of its parts changed round."""
    tensor = state[key]
    order = list(range(of))
    order[one], order[other] = other, one
    parts = tensor.reshape(heads, of, -1, *tensor.shape[1:])[:, order]
    state[key] = parts.reshape(tensor.shape).clone()


def swap_key_and_value(state: State, key: str) -> None:
    """In the fused `to_kv` of a perceiver or of gated cross-attention."""
    swap_parts(state, key, 0, 1, of=2)


def swap_query_and_key(state: State, family: str, index: int) -> Planted:
    """In a decoder layer, fused or not."""
    if family not in _FUSED:
        place = "self_attn" if family in ("llama", "opt") else "attn"
        names = (layer(family, index, f"{place}.{name}_proj.weight") for name in "qk")
        return Planted(swap(state, *names), "are swapped")
    leaf, heads = _FUSED[family]
    key = layer(family, index, leaf)
    swap_parts(state, key, 0, 1, of=3, heads=heads)
    return Planted([key], "query and key are swapped in it")


def transpose(state: State, key: str) -> None:
    assert state[key].shape[0] == state[key].shape[1]
    state[key] = state[key].T.contiguous()


def unload(state: State, norm: str) -> list[str]:
    """A norm as it was before training."""
    import torch

    keys = [norm + leaf for leaf in (".weight", ".bias") if norm + leaf in state]
    for key in keys:
        fill = torch.ones_like if key.endswith("weight") else torch.zeros_like
        state[key] = fill(state[key])
    return keys


def flip(state: State, key: str, bit: int) -> None:
    """One bit of one element."""
    import torch

    changed = state[key].clone()
    changed.view(-1).view(torch.int32)[7] ^= 1 << bit
    state[key] = changed


def scale(state: State, key: str, factor: float) -> None:
    state[key] = state[key] * factor


def zero_rows(state: State, key: str, first: int) -> None:
    changed = state[key].clone()
    changed[first:] = 0
    state[key] = changed
