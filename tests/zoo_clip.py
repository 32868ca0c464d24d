"""Tiny CLIP models, the same weights in each of the layouts that exist.

The converter here is the tests' own: it is proven by running both models, and then is what the
package's maps are compared with.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tests.zoo_lms import State, prepare, randomise, seeded

IMAGE, PATCH, VIS_DIM, VIS_HEADS = 32, 8, 64, 4
EMBED_DIM = 40
TEXT_DIM, TEXT_HEADS, TEXT_TOKENS, TEXT_WORDS = 36, 3, 12, 99

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipZoo:
    """One CLIP in every layout. The dicts are fresh copies on each access, their tensors are not.

    Attributes:
        open_clip_model: open_clip's `CLIP`.
        custom_model: open_clip's `CustomTextCLIP` with the same weights.
        hf_model: transformers' `CLIPModel` with the same weights.
    """

    open_clip_model: Any
    custom_model: Any
    hf_model: Any

    @property
    def open_clip(self) -> State:
        """Keys of open_clip's `CLIP` (`visual.…`, text tower flat)."""
        return dict(self.open_clip_model.state_dict())

    @property
    def custom_text(self) -> State:
        """Keys of open_clip's `CustomTextCLIP` (text tower under `text.`)."""
        return dict(self.custom_model.state_dict())

    @property
    def openai(self) -> State:
        """OpenAI's original file: open_clip's names and three integers (0-d int64)."""
        import torch

        sizes = {
            "input_resolution": IMAGE,
            "context_length": TEXT_TOKENS,
            "vocab_size": TEXT_WORDS,
        }
        return self.open_clip | {name: torch.tensor(size) for name, size in sizes.items()}

    @property
    def hf(self) -> State:
        """Keys of transformers' `CLIPModel`."""
        return dict(self.hf_model.state_dict())

    @property
    def hf_vision(self) -> State:
        """A `CLIPVisionModel` as files have it (`vision_model.…`, no projection)."""
        return {name: tensor for name, tensor in self.hf.items() if name.startswith("vision_model")}

    @property
    def hf_vision_flat(self) -> State:
        """A `CLIPVisionModel` as transformers >= 5.6 has it in memory."""
        return {name.removeprefix("vision_model."): t for name, t in self.hf_vision.items()}

    @property
    def hf_vision_projection(self) -> State:
        """A `CLIPVisionModelWithProjection`."""
        name = "visual_projection.weight"
        return self.hf_vision | {name: self.hf[name]}

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of the `CLIPModel`."""
        config: dict[str, Any] = self.hf_model.config.to_dict()
        return config | {"architectures": ["CLIPModel"]}

    @property
    def vision_config(self) -> dict[str, Any]:
        """`config.json` of the `CLIPVisionModel`."""
        config: dict[str, Any] = self.hf_model.config.vision_config.to_dict()
        return config | {"architectures": ["CLIPVisionModel"]}


def open_clip_cfg(layers: int, *, quick_gelu: bool = True) -> dict[str, Any]:
    """`model_cfg` as in `open_clip_config.json`."""
    return {
        "embed_dim": EMBED_DIM,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": IMAGE,
            "layers": layers,
            "width": VIS_DIM,
            "head_width": VIS_DIM // VIS_HEADS,
            "patch_size": PATCH,
        },
        "text_cfg": {
            "context_length": TEXT_TOKENS,
            "vocab_size": TEXT_WORDS,
            "width": TEXT_DIM,
            "heads": TEXT_HEADS,
            "layers": layers,
        },
    }


def open_clip_model(layers: int, *, quick_gelu: bool = True) -> Any:
    """open_clip's `CLIP`, random, in evaluation mode."""
    prepare()
    from open_clip.model import CLIP

    model = CLIP(**open_clip_cfg(layers, quick_gelu=quick_gelu))
    randomise(model)
    return model.eval().requires_grad_(False)


@functools.cache
def clip(*, layers: int = 4, quick_gelu: bool = True, seed: int = 0) -> ClipZoo:
    """The same random CLIP as open_clip (both classes) and transformers build it."""
    with seeded(seed):
        model = open_clip_model(layers, quick_gelu=quick_gelu)
        from open_clip.model import CustomTextCLIP

        custom = CustomTextCLIP(**open_clip_cfg(layers, quick_gelu=quick_gelu))
        custom.load_state_dict(_custom_text(model.state_dict()))
        hf = _hf_model(layers, quick_gelu)
        hf.load_state_dict(hf_from_open_clip(model.state_dict()))
    return ClipZoo(open_clip_model=model, custom_model=custom.eval(), hf_model=hf)


def _custom_text(state: State) -> State:
    ours = ("visual.", "logit_")
    return {name if name.startswith(ours) else f"text.{name}": t for name, t in state.items()}


def hf_vision_config(layers: int, *, quick_gelu: bool = True) -> Any:
    """transformers' configuration of the vision tower above."""
    prepare()
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=VIS_DIM,
        intermediate_size=4 * VIS_DIM,
        num_hidden_layers=layers,
        num_attention_heads=VIS_HEADS,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=EMBED_DIM,
        hidden_act="quick_gelu" if quick_gelu else "gelu",
    )


def _hf_model(layers: int, quick_gelu: bool) -> Any:
    from transformers import CLIPConfig, CLIPModel

    vision = hf_vision_config(layers, quick_gelu=quick_gelu)
    config = CLIPConfig(
        projection_dim=EMBED_DIM,
        vision_config=vision.to_dict(),
        text_config={
            "vocab_size": TEXT_WORDS,
            "hidden_size": TEXT_DIM,
            "intermediate_size": 4 * TEXT_DIM,
            "num_hidden_layers": layers,
            "num_attention_heads": TEXT_HEADS,
            "max_position_embeddings": TEXT_TOKENS,
            "projection_dim": EMBED_DIM,
            "hidden_act": vision.hidden_act,
            "eos_token_id": 2,  # 2 stands for: pool at the highest token, as open_clip does
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
    )
    return CLIPModel(config).eval().requires_grad_(False)


def hf_from_open_clip(state: State) -> State:
    """open_clip's `CLIP` (or its vision part alone) under the names of transformers' CLIP."""
    found: State = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            found |= _tower("vision_model.", name.removeprefix("visual."), tensor)
        elif name == "logit_scale":
            found[name] = tensor
        else:
            found |= _tower("text_model.", name, tensor)
    return found


def _tower(prefix: str, name: str, tensor: Any) -> State:
    vision = prefix == "vision_model."
    if name in ("proj", "text_projection"):
        target = "visual_projection" if vision else "text_projection"
        return {f"{target}.weight": tensor.T.contiguous()}
    outside = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "token_embedding.weight": "embeddings.token_embedding.weight",
    }
    if name in outside:
        return {prefix + outside[name]: tensor}
    head, _, rest = name.partition(".")
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm"}
    if head in norms:
        return {f"{prefix}{norms[head]}.{rest}": tensor}
    _, _, layer, leaf = name.split(".", 3)  # transformer.resblocks.N.leaf
    block = f"{prefix}encoder.layers.{layer}."
    if leaf.startswith("attn.in_proj_"):
        kind = leaf.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{block}self_attn.{p}_proj.{kind}": part.clone() for p, part in parts}
    module, _, kind = leaf.rpartition(".")
    return {f"{block}{_BLOCK[module]}.{kind}": tensor}
