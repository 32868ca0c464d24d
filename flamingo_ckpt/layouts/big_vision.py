"""The ViT that big_vision's programs share, as flax stores it: SigLIP's towers and PaliGemma's.

Kernels have their input axis first and attention heads apart. Sources: big_vision's `vit.py`,
open_clip's `convert.py` (`load_big_vision_weights`), transformers' PaliGemma conversion script.
"""

from __future__ import annotations

from flamingo_ckpt.layouts.rules import Rule, rename

NORM = "{p:scale=weight|bias}"
_QKV = "{m:query=q|key=k|value=v}"
_FC = "{m:Dense_0=fc1|Dense_1=fc2}"
_ATTENTION = "MultiHeadDotProductAttention_0/"


def attention(native: str, canonical: str, heads: str, stack: str = "") -> tuple[Rule, ...]:
    """Kernels of flax's attention. `stack` names the axis of the layers where they are stacked."""
    split = f"({heads} k)"
    ours = native + _ATTENTION
    kernels = {
        (f"{ours}{_QKV}/kernel", "{m}.weight"): f"d {heads} k -> {split} d",
        (f"{ours}{_QKV}/bias", "{m}.bias"): f"{heads} k -> {split}",
        (f"{ours}out/kernel", "out.weight"): f"{heads} k d -> d {split}",
        (f"{ours}out/bias", "out.bias"): "d -> d",
    }
    return tuple(
        Rule(native=name, canonical=canonical + leaf, axes=stack + axes)
        for (name, leaf), axes in kernels.items()
    )


def mlp(native: str, canonical: str, stack: str = "") -> tuple[Rule, ...]:
    """Kernels of flax's two dense layers: input axis first."""
    ours = native + "MlpBlock_0/" + _FC
    return (
        Rule(
            native=ours + "/kernel", canonical=canonical + "{m}.weight", axes=stack + "i o -> o i"
        ),
        Rule(native=ours + "/bias", canonical=canonical + "{m}.bias", axes=stack + "d -> d"),
    )


def blocks(tower: str, canonical: str, heads: str, *, stacked: bool) -> tuple[Rule, ...]:
    """A transformer: one array for all layers, or one for each."""
    block = f"{tower}encoderblock/" if stacked else f"{tower}encoderblock_{{layer}}/"
    layer, stack = canonical + "layers.{layer}.", "layer " if stacked else ""
    return (
        Rule(
            native=f"{block}LayerNorm_{{n:0=1|1=2}}/{NORM}",
            canonical=layer + "norm{n}.{p}",
            axes=stack + "d -> d",
        ),
        *attention(block, layer + "attn.", heads, stack),
        *mlp(block, layer + "mlp.", stack),
    )


#: The image tower's embeddings and last norm.
IMAGE_ENDS = (
    Rule(
        native="img/embedding/kernel",
        canonical="vision.patch_embedding.weight",
        axes="p q c d -> d c p q",
    ),
    Rule(
        native="img/pos_embedding",
        canonical="vision.position_embedding.weight",
        axes="1 n d -> n d",
    ),
    *rename(
        {
            "img/embedding/bias": "vision.patch_embedding.bias",
            f"img/Transformer/encoder_norm/{NORM}": "vision.post_norm.{p}",
        }
    ),
)
