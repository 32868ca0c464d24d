"""The tensors of `openflamingo` in the other layouts of the family.

The renames are written here for the tests and know nothing of the package's maps.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from tests.zoo_clip import hf_from_open_clip, hf_vision_config
from tests.zoo_flamingo import (
    EOC_TOKEN,
    MEDIA_TOKEN,
    VISION_LAYERS,
    FlamingoZoo,
    flamingo_config,
    openflamingo,
)
from tests.zoo_lms import FAMILIES, LANG_DIM, State, flamingo_rows, seeded


@functools.cache
def _v1_positions() -> State:
    import torch

    return {
        "vision_encoder.text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_encoder.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }


def openflamingo_v1(*, every_n: int = 2, layers: int = 4, seed: int = 0) -> State:
    """A partial checkpoint of OpenFlamingo v1 (LLaMA), with the aliases and buffers it kept.

    Everything but `old_decoder_blocks` (v1 had none), less the frozen *named* parameters.
    """
    zoo = openflamingo("llama", every_n=every_n, layers=layers, era="2023", seed=seed)
    frozen = {name for name, p in zoo.model.named_parameters() if not p.requires_grad}
    kept = {
        name: tensor
        for name, tensor in zoo.full.items()
        if name not in frozen and not name.startswith("lang_encoder.old_decoder_blocks.")
    }
    return kept | _v1_positions()


def vlm(
    family: str = "llama",
    *,
    every_n: int = 2,
    layers: int = 4,
    seed: int = 0,
    whole: bool = False,
    prefix: str = "",
) -> State:
    """The layout of upstream's next generation (`vision_tokenizer`, `lang_model`, split rows).

    The trained tensors alone, or with `whole` everything and the alias `gated_cross_attn_layers`.
    The two additional rows are those of `<|endofchunk|>` and `<image>`; the additional rows of the
    head and its bias have no source in v2 and are random here.

    Args:
        family: whose model; `mpt1b` has no head, so nothing is added to one.
        every_n, layers, seed: as for `openflamingo`.
        whole: the whole state dict.
        prefix: in front of every key, such as `vlm.`.
    """
    zoo = openflamingo(family, every_n=every_n, layers=layers, seed=seed)
    source = zoo.full if whole else zoo.partial
    _, embedding, head = FAMILIES[family]
    found: State = {}
    for name, tensor in source.items():
        if name.startswith("lang_encoder.old_decoder_blocks."):
            continue
        if name == f"lang_encoder.{embedding}.weight" or name.startswith("lang_encoder.lm_head."):
            continue
        if not whole and name.startswith("lang_encoder.model.decoder.embed_positions"):
            continue  # the new filter has no exception for embeddings
        name = re.sub(r"^perceiver\.", "vision_tokenizer.", name)
        found[prefix + re.sub(r"^lang_encoder\.", "lang_model.", name)] = tensor
    rows = zoo.full[f"lang_encoder.{embedding}.weight"][[EOC_TOKEN, MEDIA_TOKEN]]
    found[f"{prefix}lang_model.{embedding}.additional_embedding.weight"] = rows
    if whole:
        name = f"{embedding}.weight"
        found[f"{prefix}lang_model.{name}"] = zoo.language[name]
    if head is not None:
        found |= _vlm_head(zoo, f"{prefix}lang_model.{head}.", head, whole, seed)
    return found


def _vlm_head(zoo: FlamingoZoo, place: str, head: str, whole: bool, seed: int) -> State:
    import torch

    with seeded(seed + 1):
        found = {
            f"{place}additional_fc.weight": torch.randn(2, LANG_DIM),
            f"{place}additional_fc.bias": torch.randn(2),
        }
        if whole:
            # No longer tied to the embedding: nothing may take the one for the other.
            weight = zoo.language[f"{head}.weight"]
            weight = weight + 0.01 * torch.randn_like(weight)
            found |= {f"{place}weight": weight, f"{place}bias": torch.randn(len(weight))}
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfFlamingoZoo:
    """A published Hugging Face folder: its tensors, its `config.json` and the model behind it."""

    state: State
    config: dict[str, Any]
    source: FlamingoZoo


def hf_flamingo(
    family: str,
    *,
    every_n: int = 2,
    layers: int = 4,
    perceiver_depth: int = 6,
    era: str = "now",
    seed: int = 0,
    model_type: str = "flamingo",
    position_ids: bool = False,
    module_prefix: bool = False,
    flat_vision: bool = False,
    extra_rows: int = 0,
) -> HfFlamingoZoo:
    """The same model as `openflamingo` with the same arguments, in the published HF layout.

    Args:
        family, every_n, layers, perceiver_depth, era, seed: as for `openflamingo`.
        model_type: `flamingo` or `otter`; the names are the same.
        position_ids: the int64 buffer [1, 17] that transformers <= 4.30 wrote.
        module_prefix: `module.` in front of every key.
        flat_vision: vision keys without `vision_model.`, as transformers >= 5.6 has them.
        extra_rows: rows added to embedding and head, such as Otter's 1.
    """
    zoo = openflamingo(
        family, every_n=every_n, layers=layers, perceiver_depth=perceiver_depth, era=era, seed=seed
    )
    state = {
        _hf_name(name): tensor
        for name, tensor in zoo.full.items()
        if not re.match(r"vision_encoder\.|lang_encoder\.(old_decoder|gated_cross)", name)
    }
    state |= {
        f"vision_encoder.{'' if flat_vision else 'vision_model.'}{name}": tensor
        for name, tensor in _hf_vision(zoo).items()
    }
    rows = flamingo_rows(family)
    if extra_rows:
        _grow(state, family, extra_rows, seed)
    if position_ids:
        level = "" if flat_vision else "vision_model."
        source = _v1_positions()["vision_encoder.vision_model.embeddings.position_ids"]
        state[f"vision_encoder.{level}embeddings.position_ids"] = source
    if module_prefix:
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    config = flamingo_config(zoo, model_type=model_type)
    config["text_config"]["vocab_size"] = rows + extra_rows
    if model_type == "otter":
        config["architectures"] = ["OtterForConditionalGeneration"]
    return HfFlamingoZoo(state=state, config=config, source=zoo)


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["perceiver", "layers"]:
        # layers.J.0.to_q -> layers.J.to_q, layers.J.1.3 -> layers.J.feed_forward.3
        parts[3:4] = [] if parts[3] == "0" else ["feed_forward"]
    elif "gated_cross_attn_layer" in parts:
        parts = ["feed_forward" if part == "ff" else part for part in parts]
    return ".".join(parts)


def _hf_vision(zoo: FlamingoZoo) -> State:
    """The vision tower, through transformers' own class: it has to load with nothing left over."""
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel(hf_vision_config(VISION_LAYERS))
    visual = {f"visual.{name}": t for name, t in zoo.clip_model.visual.state_dict().items()}
    renamed = hf_from_open_clip(visual)
    del renamed["visual_projection.weight"]  # the class has none
    tower.load_state_dict({name.removeprefix("vision_model."): t for name, t in renamed.items()})
    return dict(tower.state_dict())


def _grow(state: State, family: str, count: int, seed: int) -> None:
    import torch

    _, embedding, _ = FAMILIES[family]
    heads = [name for name in state if re.fullmatch(r"lang_encoder\.(lm_head|embed_out)\..*", name)]
    shared = state[f"lang_encoder.{embedding}.weight"].data_ptr()
    with seeded(seed + 2):
        added = torch.randn(count, LANG_DIM)
        for name in [f"lang_encoder.{embedding}.weight", *heads]:
            old = state[name]
            tied = old.data_ptr() == shared
            new = added if tied else torch.randn(count, *old.shape[1:])
            state[name] = torch.cat([old, new])
    tied_names = [name for name in heads if torch.equal(state[name][-count:], added)]
    for name in tied_names:
        state[name] = state[f"lang_encoder.{embedding}.weight"]
