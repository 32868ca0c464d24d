"""Flamingo itself: vision tower, resampler, language model with gated cross-attention in it.

`OpenFlamingo` has the names of upstream's `state_dict`, with both of its alias trees;
`HFFlamingo` has those of the ports to Hugging Face classes (`FlamingoForConditionalGeneration`,
`OtterForConditionalGeneration`), which have no aliases.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler

MakeBlock = Callable[[], GatedCrossAttentionBlock]


class FlamingoLayer(nn.Module):
    """A decoder layer with the gated cross-attention that goes before it, if there is one."""

    def __init__(self, gated: GatedCrossAttentionBlock | None, decoder_layer: nn.Module) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder_layer


def insert_cross_attention(
    language: nn.Module, layers: str, every: int, make_block: MakeBlock
) -> tuple[nn.ModuleList, list[GatedCrossAttentionBlock | None]]:
    """Put a block before each `every`-th decoder layer (the last of each run of `every`).

    Args:
        language: the language model; changed in place.
        layers: path of its list of decoder layers.
        every: `cross_attn_every_n_layers`.
        make_block: gives a fresh block.

    Returns:
        The decoder layers as they were, and the block of each or None.

    Raises:
        AttributeError: there is nothing at `layers`.
        TypeError: what is there is no list of layers.
    """
    parent_path, _, name = layers.rpartition(".")
    parent = language.get_submodule(parent_path)
    decoders = getattr(parent, name)
    if not isinstance(decoders, nn.ModuleList):
        raise TypeError(f"`{layers}` is a {type(decoders).__name__}, not a list of layers")
    blocks = [make_block() if (i + 1) % every == 0 else None for i in range(len(decoders))]
    pairs = zip(blocks, decoders, strict=True)
    setattr(parent, name, nn.ModuleList([FlamingoLayer(block, layer) for block, layer in pairs]))
    return decoders, blocks


class OpenFlamingo(nn.Module):
    """A Flamingo under upstream's names.

    Args:
        vision: open_clip's vision tower.
        perceiver: the resampler, its layers in pairs.
        language: the causal language model; changed in place.
        layers, every, make_block: as for `insert_cross_attention`.
        keep_decoders: register the frozen decoder layers a second time, as version 2 does.
    """

    def __init__(
        self,
        *,
        vision: nn.Module,
        perceiver: PerceiverResampler,
        language: nn.Module,
        layers: str,
        every: int,
        make_block: MakeBlock,
        keep_decoders: bool = True,
    ) -> None:
        super().__init__()
        decoders, blocks = insert_cross_attention(language, layers, every, make_block)
        if keep_decoders:
            language.add_module("old_decoder_blocks", decoders)
        # Layers without a block keep their place in the list, and so their number.
        # (torch takes None for "no module here"; its annotation does not say so.)
        language.add_module(
            "gated_cross_attn_layers",
            nn.ModuleList(blocks),  # type: ignore[arg-type]
        )
        self.vision_encoder = vision
        self.perceiver = perceiver
        self.lang_encoder = language


class HFFlamingo(nn.Module):
    """A Flamingo under the names of the published Hugging Face ports.

    Args:
        vision: a CLIP vision tower.
        perceiver: the resampler, its layers in one module each.
        language: the causal language model; changed in place.
        layers, every, make_block: as for `insert_cross_attention`.
    """

    def __init__(
        self,
        *,
        vision: nn.Module,
        perceiver: PerceiverResampler,
        language: nn.Module,
        layers: str,
        every: int,
        make_block: MakeBlock,
    ) -> None:
        super().__init__()
        insert_cross_attention(language, layers, every, make_block)
        self.lang_encoder = language
        self.vision_encoder = vision
        self.perceiver = perceiver
