"""Models by name: the Flamingo releases, the usual CLIPs, PaliGemma. Data only.

Names are those of the hub repositories in lower case (CLIP: open_clip's). Numbers of rows are those
of the released files, after the tokens were added: OpenFlamingo resizes to the tokenizer (a shrink,
for the padded vocabularies of MPT and GPT-NeoX), the ports to Hugging Face classes do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model by name.

    Attributes:
        config: as a `config.json` has it.
        layout: the key layout of its release.
    """

    config: Mapping[str, Any]
    layout: str


#: OpenAI's CLIP ViT-L/14, the vision tower of every Flamingo here.
_VIT_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_MPT_1B = {
    "model_type": "mosaic_gpt",
    "architectures": ["MosaicGPT"],
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "mlp_ratio": 4,
    "max_seq_len": 2048,
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_qk_ln": True,
    "no_bias": True,
}
_MPT_7B = {
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "layer_norm_epsilon": 1e-5,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
    "tie_word_embeddings": True,
}
_RPJ_3B = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    # one branch after the other, other than Pythia
    "use_parallel_residual": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_FLAMINGO, _OTTER = "FlamingoForConditionalGeneration", "OtterForConditionalGeneration"
#: name -> layout, language model, rows, cross_attn_every_n_layers, class of the published config.
_FLAMINGOS: tuple[tuple[str, str, Mapping[str, Any], int, int, str], ...] = (
    ("openflamingo-3b-vitl-mpt1b", "openflamingo", _MPT_1B, 50280, 1, _FLAMINGO),
    ("openflamingo-3b-vitl-mpt1b-langinstruct", "openflamingo", _MPT_1B, 50280, 1, _FLAMINGO),
    ("openflamingo-4b-vitl-rpj3b", "openflamingo", _RPJ_3B, 50280, 2, _FLAMINGO),
    ("openflamingo-4b-vitl-rpj3b-langinstruct", "openflamingo", _RPJ_3B, 50280, 2, _FLAMINGO),
    ("openflamingo-9b-vitl-mpt7b", "openflamingo", _MPT_7B, 50280, 4, _FLAMINGO),
    ("openflamingo-9b-deprecated", "openflamingo-v1", _LLAMA_7B, 32003, 4, _FLAMINGO),
    ("med-flamingo", "openflamingo-v1", _LLAMA_7B, 32003, 4, _FLAMINGO),
    ("otter-mpt1b-rpjama-init", "hf-flamingo", _MPT_1B, 50432, 1, _OTTER),
    ("otter-image-mpt7b", "hf-flamingo", _MPT_7B, 50432, 4, _OTTER),
    ("openflamingo-9b-hf", "hf-flamingo", _LLAMA_7B, 32003, 4, _FLAMINGO),
)


#: Length of the tokenizer: GPT-NeoX-20B's, and LLaMA's.
_NUM_TOKENS = {"mosaic_gpt": 50277, "mpt": 50277, "gpt_neox": 50277, "llama": 32000}


def _flamingo(text: Mapping[str, Any], rows: int, every: int, architecture: str) -> dict[str, Any]:
    return {
        "model_type": "otter" if architecture == _OTTER else "flamingo",
        "architectures": [architecture],
        "cross_attn_every_n_layers": every,
        # `<|endofchunk|>` and `<image>` come right after the tokenizer's own.
        "eoc_token_id": _NUM_TOKENS[text["model_type"]],
        "media_token_id": _NUM_TOKENS[text["model_type"]] + 1,
        "torch_dtype": "float32",
        "text_config": {**text, "vocab_size": rows},
        "vision_config": _VIT_L,
    }


#: name -> embed_dim, (image, patch, layers, width, head_width, mlp_ratio), (width, heads, layers).
_CLIPS: tuple[tuple[str, int, tuple[int, int, int, int, int, float], tuple[int, int, int]], ...] = (
    ("vit-b-32", 512, (224, 32, 12, 768, 64, 4.0), (512, 8, 12)),
    ("vit-b-16", 512, (224, 16, 12, 768, 64, 4.0), (512, 8, 12)),
    ("vit-l-14", 768, (224, 14, 24, 1024, 64, 4.0), (768, 12, 12)),
    ("vit-l-14-336", 768, (336, 14, 24, 1024, 64, 4.0), (768, 12, 12)),
    ("vit-h-14", 1024, (224, 14, 32, 1280, 80, 4.0), (1024, 16, 24)),
    ("vit-bigg-14", 1280, (224, 14, 48, 1664, 104, 4.9231), (1280, 20, 32)),
)
_VISION_KEYS = ("image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio")
_TEXT_KEYS = ("width", "heads", "layers")


def _clip(
    embed_dim: int, vision: tuple[float, ...], text: tuple[int, ...], *, quick_gelu: bool
) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        **({"quick_gelu": True} if quick_gelu else {}),
        "vision_cfg": dict(zip(_VISION_KEYS, vision, strict=True)),
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            **dict(zip(_TEXT_KEYS, text, strict=True)),
        },
    }


#: SigLIP So400m/14, the vision tower of every PaliGemma.
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
#: name -> Gemma, then its width, MLP, layers, heads, key-value heads, width of a head.
_GEMMAS: tuple[tuple[str, str, tuple[int, int, int, int, int, int]], ...] = (
    ("paligemma-3b-pt", "gemma", (2048, 16384, 18, 8, 1, 256)),
    ("paligemma2-3b-pt", "gemma2", (2304, 9216, 26, 8, 4, 256)),
    ("paligemma2-10b-pt", "gemma2", (3584, 14336, 42, 16, 8, 256)),
    ("paligemma2-28b-pt", "gemma2", (4608, 36864, 46, 32, 16, 128)),
)
_GEMMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


#: Gemma 2 (27B) scales its queries by its width over its heads, the others by that of a head.
_QUERY_SCALARS = {4608: 144}


def _paligemma(gemma: str, sizes: tuple[int, ...], image_size: int) -> dict[str, Any]:
    return {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "projection_dim": sizes[0],
        "image_token_index": 257152,
        "torch_dtype": "float32" if gemma == "gemma" else "bfloat16",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": gemma,
            "vocab_size": 257216,
            **dict(zip(_GEMMA_KEYS, sizes, strict=True)),
            **(
                {"query_pre_attn_scalar": _QUERY_SCALARS.get(sizes[0], 256)}
                if gemma == "gemma2"
                else {}
            ),
        },
        "vision_config": {**_SIGLIP, "image_size": image_size},
    }


#: Every preset by name.
PRESETS: Mapping[str, Preset] = {
    **{
        name: Preset(config=_flamingo(text, rows, every, architecture), layout=layout)
        for name, layout, text, rows, every, architecture in _FLAMINGOS
    },
    **{
        name + suffix: Preset(
            config=_clip(embed_dim, vision, text, quick_gelu=bool(suffix)), layout="open_clip"
        )
        for name, embed_dim, vision, text in _CLIPS
        for suffix in ("", "-quickgelu")
    },
    **{
        f"{name}-{size}": Preset(config=_paligemma(gemma, sizes, size), layout="paligemma")
        for name, gemma, sizes in _GEMMAS
        for size in (224, 448, 896)
    },
}
