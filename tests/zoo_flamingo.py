"""Tiny Flamingo models, put together by the upstream package."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from typing import Any

from tests.zoo_clip import VIS_DIM, hf_vision_config, open_clip_model
from tests.zoo_lms import (
    FAMILIES,
    LANG_DIM,
    LANG_HEADS,
    POSITIONS,
    WORDS,
    State,
    flamingo_rows,
    language_model,
    prepare,
    randomise,
    seeded,
    snapshot,
)

#: What upstream fixes, and no configuration of it can change.
LATENTS, HEADS, DIM_HEAD, FF_MULT = 64, 8, 64, 4
VISION_LAYERS = 3
EOC_TOKEN, MEDIA_TOKEN = WORDS, WORDS + 1

_ARCHITECTURE = {
    "mpt1b": "MosaicGPT",
    "mpt7b": "MPTForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "pythia": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "gptj": "GPTJForCausalLM",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlamingoZoo:
    """One Flamingo of upstream and what it was made of. Dicts are fresh on each access.

    Attributes:
        family, layers, every_n, perceiver_depth, era: as asked for.
        model: upstream's `Flamingo`, frozen as in training, in evaluation mode.
        clip_model: open_clip's `CLIP` whose `.visual` is the vision tower.
        text_config: the language model's `config.json`, with the rows before Flamingo's tokens.
    """

    family: str
    layers: int
    every_n: int
    perceiver_depth: int
    era: str
    model: Any
    clip_model: Any
    text_config: dict[str, Any]
    _language: State

    @property
    def full(self) -> State:
        """The whole state dict, with both alias trees; aliases share storage."""
        return _as_of(self.era, self.family, dict(self.model.state_dict()), "lang_encoder.")

    @property
    def partial(self) -> State:
        """What upstream saves: its own filter over the whole state dict."""
        state = self.full
        with wandb_stub(), contextlib.redirect_stdout(io.StringIO()):
            from open_flamingo.train.train_utils import filter_state_dict_to_trainable

            return dict(filter_state_dict_to_trainable(self._named_for(state), state))

    def _named_for(self, state: State) -> Any:
        """The model, its parameters under the names of the era."""
        renames = {"lang_encoder.lm_head.": "lang_encoder.embed_out."}
        if not any(name.startswith("lang_encoder.embed_out.") for name in state):
            renames = {}
        named = []
        for name, parameter in self.model.named_parameters():
            for old, new in renames.items():
                name = name.replace(old, new)
            named.append((name, parameter))
        return types.SimpleNamespace(named_parameters=lambda: named)

    @property
    def clip(self) -> State:
        """The whole CLIP that the vision tower is from."""
        return dict(self.clip_model.state_dict())

    @property
    def language(self) -> State:
        """The base language model before the resize and before Flamingo's layers."""
        return _as_of(self.era, self.family, dict(self._language), "")

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`, in Hugging Face style."""
        return flamingo_config(self)

    @property
    def gated_layers(self) -> list[int]:
        """Indices of the decoder layers with cross attention before them."""
        return [i for i in range(self.layers) if (i + 1) % self.every_n == 0]

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """A batch for `model(**inputs)`: two rows, two pictures each, unpadded."""
        import torch

        with seeded(seed):
            tokens = torch.randint(3, WORDS, (2, 12))
            pictures = torch.randn(2, 2, 1, 3, 32, 32)
        tokens[:, [0, 6]], tokens[:, -1] = MEDIA_TOKEN, EOC_TOKEN
        dtype = next(self.model.parameters()).dtype
        return {
            "vision_x": pictures.to(dtype),
            "lang_x": tokens,
            "attention_mask": torch.ones_like(tokens),
        }


def flamingo_config(zoo: FlamingoZoo, **changes: Any) -> dict[str, Any]:
    """`config.json` of a Flamingo; vocabulary rows are those of the checkpoint."""
    text = zoo.text_config | {"vocab_size": flamingo_rows(zoo.family)}
    config: dict[str, Any] = {
        "model_type": "flamingo",
        "architectures": ["FlamingoForConditionalGeneration"],
        "cross_attn_every_n_layers": zoo.every_n,
        "use_media_placement_augmentation": False,
        "perceiver_depth": zoo.perceiver_depth,
        "perceiver_num_latents": LATENTS,
        **{
            f"{part}_{name}": value
            for part in ("perceiver", "cross_attn")
            for name, value in (("heads", HEADS), ("dim_head", DIM_HEAD), ("ff_mult", FF_MULT))
        },
        "torch_dtype": "float32",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "vision_config": hf_vision_config(VISION_LAYERS).to_dict(),
        "text_config": text,
    }
    return config | changes


def openflamingo(
    family: str,
    *,
    every_n: int = 2,
    layers: int = 4,
    perceiver_depth: int = 6,
    era: str = "now",
    seed: int = 0,
) -> FlamingoZoo:
    """A Flamingo, put together as upstream's `create_model_and_transforms` does it.

    Args:
        family: one of `FAMILIES`.
        every_n: cross attention before every n-th decoder layer.
        layers: of the language model; 12 gives two-digit indices.
        perceiver_depth: 6 is upstream's only depth; 12 gives two-digit indices.
        era: `now`, the names of the transformers installed; `2023`, those of the released files:
            GPT-NeoX's `embed_out` and its mask buffers, LLaMA's `inv_freq`, MPT without `lm_head`.
        seed: of all weights.
    """
    if era not in ("now", "2023"):
        raise ValueError(f"no era {era!r}")
    zoo = _built(family, every_n, layers, perceiver_depth, seed)
    return dataclasses.replace(zoo, era=era)


@functools.cache
def _built(family: str, every_n: int, layers: int, perceiver_depth: int, seed: int) -> FlamingoZoo:
    prepare()
    with seeded(seed):
        clip_model = open_clip_model(VISION_LAYERS)
        lang = language_model(family, layers)
        text_config = lang.config.to_dict() | {"architectures": [_ARCHITECTURE[family]]}
        language = snapshot(lang)
        model = _flamingo(clip_model, lang, family, every_n, perceiver_depth)
    return FlamingoZoo(
        family=family,
        layers=layers,
        every_n=every_n,
        perceiver_depth=perceiver_depth,
        era="now",
        model=model,
        clip_model=clip_model,
        text_config=text_config,
        _language=language,
    )


def _flamingo(clip_model: Any, lang: Any, family: str, every_n: int, depth: int) -> Any:
    from open_flamingo.src.factory import _infer_decoder_layers_attr_name
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.helpers import PerceiverResampler
    from open_flamingo.src.utils import extend_instance

    clip_model.visual.output_tokens = True
    # The patch tokens that OpenFlamingo was trained on: open_clip since 2.23 normalises them first.
    clip_model.visual.final_ln_after_pool = True
    extend_instance(lang, FlamingoLMMixin)
    path = _infer_decoder_layers_attr_name(lang)
    assert path == FAMILIES[family][0]
    lang.set_decoder_layers_attr_name(path)
    lang.resize_token_embeddings(flamingo_rows(family), mean_resizing=False)
    model = Flamingo(
        clip_model,
        lang,
        EOC_TOKEN,
        MEDIA_TOKEN,
        vis_dim=VIS_DIM,
        cross_attn_every_n_layers=every_n,
    )
    if depth != len(model.perceiver.layers):
        model.perceiver = PerceiverResampler(dim=VIS_DIM, depth=depth)
        model.perceiver._use_gradient_checkpointing = False
    model.requires_grad_(False)
    trained = (model.perceiver, lang.gated_cross_attn_layers, lang.get_input_embeddings())
    for module in trained:
        module.requires_grad_(True)
        randomise(module)
    return model.eval()


@contextlib.contextmanager
def wandb_stub() -> Iterator[None]:
    """Upstream's training code imports wandb at the top, and here does not use it."""
    if importlib.util.find_spec("wandb") is not None:
        yield
        return
    sys.modules["wandb"] = types.ModuleType("wandb")
    try:
        yield
    finally:
        # transformers looks for it too, and must not find an empty one.
        del sys.modules["wandb"]


def _as_of(era: str, family: str, state: State, prefix: str) -> State:
    """The names of a language model's tensors at the time of the released files."""
    if era == "now" or family in ("mpt1b", "opt", "gptj"):
        return state
    if family == "mpt7b":  # the remote class computes with `wte` and has no head
        state.pop(f"{prefix}lm_head.weight")
        return state
    neox = family != "llama"
    if neox:
        state = {
            name.replace(f"{prefix}lm_head.", f"{prefix}embed_out."): tensor
            for name, tensor in state.items()
        }
    # Each layer's buffers, wherever the layer is reached from.
    anchor = "attention.dense.weight" if neox else "self_attn.o_proj.weight"
    buffers = _neox_buffers() if neox else {"self_attn.rotary_emb.inv_freq": _inv_freq(LANG_DIM)}
    for name in [name for name in state if name.endswith(anchor)]:
        before = name.removesuffix(anchor)
        state |= {before + buffer: tensor for buffer, tensor in buffers.items()}
    return state


@functools.cache
def _neox_buffers() -> State:
    import torch

    mask = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.bool).tril()
    return {
        "attention.bias": mask,
        "attention.masked_bias": torch.tensor(-1e9),
        "attention.rotary_emb.inv_freq": _inv_freq(LANG_DIM // 2),
    }


@functools.cache
def _inv_freq(dim: int) -> Any:
    import torch

    size = dim // LANG_HEADS
    return 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))
