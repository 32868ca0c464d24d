"""Layouts of related code that is not installed: random tensors under the right names and shapes.

The sizes (heads, latents) are free here; what each key holds is as in those projects' sources.
"""

from __future__ import annotations

from tests.zoo_lms import State, seeded

#: width of the pictures' features, of the text, of the attention inside; latents; words
VIS, LANG, INNER, LATENTS, WORDS = 24, 20, 32, 6, 30


def _tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    import torch

    with seeded(seed):
        return {name: torch.randn(shape) for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _feed_forward(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        **_norm(f"{name}.0", width),
        f"{name}.1.weight": (4 * width, width),
        f"{name}.3.weight": (width, 4 * width),
    }


def _cross_attention(name: str, media: int) -> dict[str, tuple[int, ...]]:
    return {
        **_norm(f"{name}.norm", LANG),
        f"{name}.to_q.weight": (INNER, LANG),
        f"{name}.to_kv.weight": (2 * INNER, media),
        f"{name}.to_out.weight": (LANG, INNER),
    }


def flamingo_mini(*, layers: int = 4, every_n: int = 2, depth: int = 6, seed: int = 0) -> State:
    """Resampler and gated blocks of dhansmair's flamingo-mini on GPT-2, with the head and a norm.

    Cross attention at `i % every_n == 0`; keys and values are separate in the resampler.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "flamingo.resampler.latents": (LATENTS, VIS),
        "flamingo.resampler.time_pos_emb": (4, 1, VIS),
        **_norm("flamingo.resampler.norm", VIS),
        "flamingo.lm.wte.weight": (WORDS, LANG),
        **_norm("flamingo.lm.ln_f", LANG),
    }
    for j in range(depth):
        layer = f"flamingo.resampler.layers.{j}"
        shapes |= _norm(f"{layer}.0.norm_media", VIS) | _norm(f"{layer}.0.norm_latents", VIS)
        shapes |= {f"{layer}.0.{name}.weight": (INNER, VIS) for name in ("to_q", "to_k", "to_v")}
        shapes[f"{layer}.0.to_out.weight"] = (VIS, INNER)
        shapes |= _feed_forward(f"{layer}.1", VIS)
    for i in range(layers):
        layer = f"flamingo.lm.h.{i}"
        if i % every_n:
            shapes |= _norm(f"{layer}.ln_1", LANG)
            continue
        shapes |= _norm(f"{layer}.lm_block.ln_1", LANG)
        block = f"{layer}.xattn_block"
        shapes |= {f"{block}.alpha_attn": (1,), f"{block}.alpha_ffw": (1,)}
        shapes |= _cross_attention(f"{block}.attn", VIS) | _feed_forward(f"{block}.ffw", LANG)
    state = _tensors(shapes, seed)
    return state | {"flamingo.lm_head.weight": state["flamingo.lm.wte.weight"]}


def lucidrains(*, layers: int = 4, every_n: int = 2, depth: int = 6, seed: int = 0) -> State:
    """lucidrains' flamingo-pytorch: a PaLM trunk, one width for pictures and text.

    Cross attention at `i % every_n == 0`, after the language model's block.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "token_emb.weight": (WORDS, LANG),
        "perceiver_resampler.latents": (LATENTS, LANG),
        "perceiver_resampler.media_pos_emb": (4, 1, LANG),
        **_norm("perceiver_resampler.norm", LANG),
        "to_logits.0.gamma": (LANG,),
        "to_logits.0.beta": (LANG,),
    }
    for j in range(depth):
        layer = f"perceiver_resampler.layers.{j}"
        shapes |= _norm(f"{layer}.0.norm_media", LANG) | _norm(f"{layer}.0.norm_latents", LANG)
        shapes |= {
            f"{layer}.0.to_q.weight": (INNER, LANG),
            f"{layer}.0.to_kv.weight": (2 * INNER, LANG),
            f"{layer}.0.to_out.weight": (LANG, INNER),
            **_feed_forward(f"{layer}.1", LANG),
        }
    for i in range(layers):
        shapes |= {
            f"layers.{i}.0.fn.norm.gamma": (LANG,),
            f"layers.{i}.0.fn.norm.beta": (LANG,),
            f"layers.{i}.0.fn.rotary_emb.inv_freq": (INNER // 8,),
            f"layers.{i}.0.fn.fused_attn_ff_proj.weight": (INNER + 2 * 8 + 8 * LANG, LANG),
            f"layers.{i}.0.fn.attn_out.weight": (LANG, INNER),
            f"layers.{i}.0.fn.ff_out.1.weight": (LANG, 4 * LANG),
        }
        if i % every_n == 0:
            block = f"layers.{i}.1"
            shapes |= {f"{block}.attn_gate": (1,), f"{block}.ff_gate": (1,)}
            shapes |= _cross_attention(f"{block}.attn", LANG) | _feed_forward(f"{block}.ff", LANG)
    state = _tensors(shapes, seed)
    return state | {"to_logits.1.weight": state["token_emb.weight"]}


def idefics(*, layers: int = 4, every_n: int = 2, depth: int = 3, seed: int = 0) -> State:
    """Idefics of transformers (`IdeficsForVisionText2Text`), which cannot be a Flamingo.

    The cross layers have an index of their own: the c-th stands before decoder layer c * every_n.
    """
    resampler = "model.perceiver_resampler"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, LANG),
        "model.embed_tokens.additional_embedding.weight": (2, LANG),
        "lm_head.weight": (WORDS, LANG),
        "lm_head.additional_fc.weight": (2, LANG),
        "model.norm.weight": (LANG,),
        f"{resampler}.latents": (LATENTS, VIS),
        **_norm(f"{resampler}.layer_norm", VIS),
        "model.vision_model.embeddings.class_embedding": (VIS,),
    }
    for j in range(depth):
        attention, mlp = f"{resampler}.blocks.{j}.0", f"{resampler}.blocks.{j}.1"
        for name in ("context_layer_norm", "latents_layer_norm"):
            shapes |= _norm(f"{attention}.{name}", VIS)
        for name in ("q_layer_norm", "k_layer_norm"):
            shapes |= _norm(f"{attention}.{name}", INNER // 4)
        shapes |= {f"{attention}.{name}_proj.weight": (INNER, VIS) for name in "qkv"}
        shapes[f"{attention}.output_proj.weight"] = (VIS, INNER)
        shapes |= _norm(f"{mlp}.ln", VIS)
        shapes |= {f"{mlp}.fc.weight": (4 * VIS, VIS), f"{mlp}.c_proj.weight": (VIS, 4 * VIS)}
    for i in range(layers):
        shapes |= _llama_layer(f"model.layers.{i}", "self_attn", LANG)
    for c in range(layers // every_n):
        block = f"model.gated_cross_attn_layers.{c}"
        shapes |= {f"{block}.alpha_cross_attn": (1,), f"{block}.alpha_dense": (1,)}
        shapes |= _llama_layer(block, "cross_attn", VIS)
        for name in ("q_layer_norm", "k_layer_norm"):
            shapes[f"{block}.cross_attn.{name}.weight"] = (LANG // 4,)
    return _tensors(shapes, seed)


def _llama_layer(name: str, attention: str, media: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.{attention}.q_proj.weight": (LANG, LANG),
        f"{name}.{attention}.k_proj.weight": (LANG, media),
        f"{name}.{attention}.v_proj.weight": (LANG, media),
        f"{name}.{attention}.o_proj.weight": (LANG, LANG),
        f"{name}.mlp.gate_proj.weight": (3 * LANG, LANG),
        f"{name}.mlp.up_proj.weight": (3 * LANG, LANG),
        f"{name}.mlp.down_proj.weight": (LANG, 3 * LANG),
        f"{name}.input_layernorm.weight": (LANG,),
        f"{name}.post_attention_layernorm.weight": (LANG,),
    }
