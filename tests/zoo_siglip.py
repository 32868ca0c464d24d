"""A tiny SigLIP of open_clip on a timm trunk, and the arrays that big_vision would store of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tests.zoo_clip import IMAGE, PATCH, TEXT_TOKENS, TEXT_WORDS, VIS_DIM, VIS_HEADS
from tests.zoo_lms import State, prepare, randomise, seeded, snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipZoo:
    """One SigLIP as open_clip builds it (timm trunk) and as big_vision stores it.

    Attributes:
        model: open_clip's `CustomTextCLIP`.
        config: `model_cfg` as in `open_clip_config.json`; the trunk is a tiny one of the tests.
        state: its state dict.
        heads: attention heads of both towers; big_vision has them in its shapes, torch has not.
    """

    model: Any
    config: dict[str, Any]
    state: State
    heads: int

    def npz(self, *, stacked: bool = True, prefix: str = "params/") -> dict[str, Any]:
        """big_vision's arrays: one array for all layers or one each, `prefix` may be empty."""
        import numpy as np

        arrays = _big_vision(self, stacked)
        return {prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()}


@functools.cache
def siglip(*, layers: int = 4, seed: int = 0) -> SiglipZoo:
    """A random SigLIP: no class token, pooling by attention, projection with bias."""
    prepare()
    from open_clip.model import CustomTextCLIP

    config = _siglip_config(layers)
    with seeded(seed):
        model = CustomTextCLIP(**config, init_logit_bias=-10.0)
        randomise(model)
    model.eval().requires_grad_(False)
    return SiglipZoo(model=model, config=config, state=snapshot(model), heads=VIS_HEADS)


def _siglip_config(layers: int) -> dict[str, Any]:
    return {
        "embed_dim": VIS_DIM,
        "vision_cfg": {
            "image_size": IMAGE,
            "timm_model_name": _siglip_trunk(layers),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": TEXT_TOKENS,
            "vocab_size": TEXT_WORDS,
            "width": VIS_DIM,
            "heads": VIS_HEADS,
            "layers": layers,
            "mlp_ratio": 3.0,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    }


def _siglip_trunk(layers: int) -> str:
    """Make a tiny trunk known to timm, whose smallest SigLIP has 93 million parameters."""
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    name = f"zoo_siglip_{layers}"
    if is_model(name):
        return name

    def build(pretrained: bool = False, **options: Any) -> Any:
        assert not pretrained
        for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(unused, None)
        return VisionTransformer(
            img_size=IMAGE,
            patch_size=PATCH,
            embed_dim=VIS_DIM,
            depth=layers,
            num_heads=VIS_HEADS,
            mlp_ratio=3.0,
            class_token=False,
            act_layer="gelu_tanh",
            **options,
        )

    build.__name__, build.__module__ = name, __name__
    register_model(build)
    return name


def _big_vision(zoo: SiglipZoo, stacked: bool) -> dict[str, Any]:
    import numpy as np

    torch_arrays = {name: tensor.numpy() for name, tensor in zoo.state.items()}
    flat: dict[str, Any] = {}
    for name, array in torch_arrays.items():
        flat |= _big_vision_entry(name, array, zoo.heads)
    if not stacked:
        return {name.replace("encoderblock/", "encoderblock_"): a for name, a in flat.items()}
    found: dict[str, Any] = {}
    layers: dict[str, dict[int, Any]] = {}
    for name, array in flat.items():
        before, block, after = name.partition("encoderblock/")
        if not block:
            found[name] = array
            continue
        layer, _, leaf = after.partition("/")
        layers.setdefault(f"{before}encoderblock/{leaf}", {})[int(layer)] = array
    return found | {
        name: np.stack([by_layer[i] for i in range(len(by_layer))])
        for name, by_layer in layers.items()
    }


def _big_vision_entry(name: str, array: Any, heads: int) -> dict[str, Any]:
    """One tensor of open_clip as big_vision's arrays; layer N's are below `encoderblock/N/`."""
    outside = {
        "logit_scale": ("t", lambda a: a.reshape(1)),
        "logit_bias": ("b", lambda a: a.reshape(1)),
        "visual.trunk.patch_embed.proj.weight": (
            "img/embedding/kernel",
            lambda a: a.transpose(2, 3, 1, 0),
        ),
        "visual.trunk.patch_embed.proj.bias": ("img/embedding/bias", None),
        "visual.trunk.pos_embed": ("img/pos_embedding", None),
        "visual.trunk.attn_pool.latent": ("img/MAPHead_0/probe", None),
        "text.token_embedding.weight": ("txt/Embed_0/embedding", None),
        "text.positional_embedding": ("txt/pos_embedding", lambda a: a[None]),
        "text.text_projection.weight": ("txt/head/kernel", lambda a: a.T),
        "text.text_projection.bias": ("txt/head/bias", None),
    }
    if name in outside:
        target, change = outside[name]
        return {target: array if change is None else change(array)}
    module, _, kind = name.rpartition(".")
    module = module or name
    for norm, target in (
        ("visual.trunk.norm", "img/Transformer/encoder_norm/"),
        ("text.ln_final", "txt/Encoder_0/encoder_norm/"),
    ):
        if module == norm:
            return _norm(target, kind, array)
    parts = name.split(".")
    if name.startswith("visual.trunk.attn_pool."):
        return _block("img/MAPHead_0/", ".".join(parts[3:]), array, heads)
    if name.startswith("visual.trunk.blocks."):
        place = f"img/Transformer/encoderblock/{parts[3]}/"
    else:  # text.transformer.resblocks.N
        place = f"txt/Encoder_0/encoderblock/{parts[3]}/"
    return _block(place, ".".join(parts[4:]), array, heads)


def _norm(place: str, kind: str, array: Any) -> dict[str, Any]:
    return {place + {"weight": "scale", "bias": "bias"}[kind]: array}


def _block(place: str, leaf: str, array: Any, heads: int) -> dict[str, Any]:
    import numpy as np

    module, _, kind = leaf.rpartition(".")
    attention = place + "MultiHeadDotProductAttention_0/"
    if module in ("norm", "norm1", "ln_1", "norm2", "ln_2"):
        which = 1 if module in ("norm2", "ln_2") else 0
        return _norm(f"{place}LayerNorm_{which}/", kind, array)
    if module in ("mlp.fc1", "mlp.c_fc", "mlp.fc2", "mlp.c_proj"):
        target = f"{place}MlpBlock_0/Dense_{0 if module in ('mlp.fc1', 'mlp.c_fc') else 1}/"
        return {target + ("kernel" if kind == "weight" else "bias"): array.T}
    if module in ("proj", "attn.proj", "attn.out_proj"):
        if kind == "bias":
            return {attention + "out/bias": array}
        # [D, H*h] as torch has it, (H, h, D) there
        return {attention + "out/kernel": array.T.reshape(heads, -1, array.shape[0])}
    fused = {"q": ["query"], "kv": ["key", "value"]}.get(module, ["query", "key", "value"])
    is_bias = leaf.endswith("bias")
    found = {}
    for part, rows in zip(fused, np.split(array, len(fused)), strict=True):
        if is_bias:
            found[f"{attention}{part}/bias"] = rows.reshape(heads, -1)
        else:
            found[f"{attention}{part}/kernel"] = rows.T.reshape(rows.shape[1], heads, -1)
    return found
