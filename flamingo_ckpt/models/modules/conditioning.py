"""What makes a language model look at images: one state for all gated blocks, and the wrapper.

The language model stays an object of its own class. Two hooks on it follow what it reads: before a
call they work out which image each token attends to, after it they write down on the cache which of
its tokens stand for images, so that a later call with that cache goes on where this one ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock, text_times

MakeBlock = Callable[[], GatedCrossAttentionBlock]

#: The attribute of a cache under which its media locations are kept: booleans `[batch, seen]`.
_MEMORY = "flamingo_media_locations"
#: What recurrent language models (Mamba, RWKV) have in place of `past_key_values`.
_STATES = ("cache_params", "state")


class Conditioning:
    """What the gated blocks of one model look at.

    Attributes:
        media_token_id: the token that stands for an image; None for a model that only loads.
        media: latents `[batch, images, num_latents, dim_visual]`, or None.
        keeps_media: whether `cache_media` holds them: text without a media token then attends to
            the last image of the prompt.
        is_in_use: whether a call is running; there is one place for what it looks at.
    """

    def __init__(self, media_token_id: int | None = None) -> None:
        self.media_token_id = media_token_id
        self.is_in_use = False
        self.clear()

    def clear(self) -> None:
        """Forget the images."""
        self.media: torch.Tensor | None = None
        self.keeps_media = False
        self._prompt: torch.Tensor | None = None
        self._announced: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._times: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None

    def locate(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where tokens stand for images: booleans of the shape of `input_ids`.

        Raises:
            RuntimeError: no media token is known.
        """
        if self.media_token_id is None:
            raise RuntimeError("the model was made without a media token")
        return input_ids == self.media_token_id

    def keep(self, input_ids: torch.Tensor, media: torch.Tensor) -> None:
        """Hold images of a prompt `[batch, tokens]` for several calls."""
        self._prompt = self.locate(input_ids)
        self.media, self.keeps_media = media, True

    def announce(self, input_ids: torch.Tensor) -> None:
        """Tell the whole text `[rows, tokens]` of which the next call may read the end alone.

        Generation knows it in every step, also when beams have changed places; the rows may then
        be several for each row of images.
        """
        self._announced = input_ids

    def for_layer(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and text times for a gated block, where its input is.

        Raises:
            RuntimeError: there are no images.
            ValueError: another number of positions than of tokens.
        """
        if self._rows is None or self._times is None:
            raise RuntimeError("the model has seen no images: call it with `vision_x`")
        if self._times.shape[1] != hidden_states.shape[1]:
            raise ValueError(
                f"{hidden_states.shape[1]} positions, but the call has {self._times.shape[1]} "
                "tokens: which image a position attends to is known for tokens only"
            )
        return self._rows.to(hidden_states.device), self._times.to(hidden_states.device)

    def before_language(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of the language model: which image each token of the call attends to.

        Raises:
            ValueError: the call has embeddings instead of tokens, or another number of rows than
                there are of images, or a cache that this model has not filled.
        """
        del module
        announced, self._announced = self._announced, None
        self._rows = self._times = self._seen = None
        if self.media is None:
            return
        input_ids = _input_ids(args, kwargs)
        if input_ids is None:
            raise ValueError("the language model needs `input_ids`, to see its media tokens")
        _check_cache(kwargs)
        self._rows = self._for_rows(len(input_ids), is_generation=announced is not None)
        own, num_past = self.locate(input_ids), _num_past(kwargs)
        whole = None
        if announced is not None and announced.shape[1] == num_past + input_ids.shape[1]:
            whole = self.locate(announced)
        if self.keeps_media and not bool((own if whole is None else whole).any()):
            self._times = self._continued(input_ids)
            return
        seen = whole
        if seen is None:
            seen = torch.cat((_remembered(kwargs, own, num_past), own), dim=1)
        self._times, self._seen = text_times(seen, seen.shape[1])[:, num_past:], seen
        if self.keeps_media and announced is None:
            self._prompt = own

    def after_language(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of the language model: write on the cache what it holds."""
        del module
        input_ids = _input_ids(args, kwargs)
        cache = getattr(output, "past_key_values", None)
        if cache is None or input_ids is None or self.media is None:
            return
        if self._seen is not None:
            setattr(cache, _MEMORY, self._seen)
            return
        own = self.locate(input_ids)  # went on after a kept prompt
        before = getattr(cache, _MEMORY, own[:, :0])
        num_before = _length(cache) - own.shape[1]
        if before.shape[0] == own.shape[0] and before.shape[1] >= num_before >= 0:
            setattr(cache, _MEMORY, torch.cat((before[:, :num_before], own), dim=1))

    def _continued(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Text times after a kept prompt: its last image, for as many rows as its images serve."""
        assert self._prompt is not None
        rows = self._prompt.repeat_interleave(len(input_ids) // len(self._prompt), dim=0)
        return text_times(rows, input_ids.shape[1], is_continuation=True)

    def _for_rows(self, num_rows: int, *, is_generation: bool) -> torch.Tensor:
        """The images, each row as often as generation repeats it."""
        assert self.media is not None
        num_media = len(self.media)
        if num_media == num_rows:
            return self.media
        if num_media == 1:
            return self.media.expand(num_rows, -1, -1, -1)
        if is_generation and num_rows % num_media == 0:
            return self.media.repeat_interleave(num_rows // num_media, dim=0)
        raise ValueError(f"{num_rows} rows of text, and images for {num_media}")


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    found = kwargs.get("input_ids", args[0] if args else None)
    return found if isinstance(found, torch.Tensor) else None


def _check_cache(kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for a cache that does not tell how many tokens it holds."""
    name = next((name for name in _STATES if kwargs.get(name) is not None), None)
    if name is not None:
        raise ValueError(
            f"the language model has a cache called `{name}`, which does not tell how many tokens "
            "it holds, and so not which images they saw: call it with `use_cache=False`"
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__}, not a cache of transformers as the "
            "call gives one that fills it: it does not tell which images its tokens saw"
        )


def _num_past(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else _length(cache)


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())


def _remembered(kwargs: dict[str, Any], own: torch.Tensor, num_past: int) -> torch.Tensor:
    """Media locations of what a cache holds: `[rows, num_past]`."""
    if num_past == 0:
        return own[:, :0]
    known = getattr(kwargs["past_key_values"], _MEMORY, None)
    if known is None or known.shape[0] != own.shape[0] or known.shape[1] < num_past:
        raise ValueError(
            f"the cache holds {num_past} tokens that this model has not put there: which images "
            "they stand for is not known; keep the images with `cache_media`"
        )
    found: torch.Tensor = known[:, :num_past].to(own.device)
    return found


class FlamingoLayer(nn.Module):
    """A decoder layer with the gated cross-attention that goes before it, if there is one.

    Attributes:
        uses_checkpointing: compute both anew in the backward pass instead of keeping what they
            computed. A call that fills a cache is computed once in any case.
    """

    def __init__(
        self,
        gated: GatedCrossAttentionBlock | None,
        decoder_layer: nn.Module,
        conditioning: Conditioning,
    ) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder_layer
        self.conditioning = conditioning
        self.uses_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the decoder layer gives, a tensor or a tuple, untouched.

        Args:
            hidden_states: `[batch, tokens, dim]`; some language models pass it by keyword.
            *args: the decoder layer's own.
            **kwargs: the decoder layer's own. Its attention mask is not looked at: it is None,
                booleans of either meaning or numbers, depending on the language model.

        Raises:
            RuntimeError: there is a gated block, and nothing for it to look at.
        """
        again = self.uses_checkpointing and torch.is_grad_enabled()
        if self.gated_cross_attn_layer is not None:
            # As arguments, so that the backward pass finds them after they were forgotten here.
            media, times = self.conditioning.for_layer(hidden_states)
            hidden_states = run(
                self.gated_cross_attn_layer, hidden_states, media, times, anew=again
            )
        given = (*args, *kwargs.values())
        again = again and not any(hasattr(one, "get_seq_length") for one in given)
        return run(self.decoder_layer, hidden_states, *args, anew=again, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The decoder layer's own attributes too: some models ask their layers for them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private ones are marks of other libraries on one module, and not on this.
            if name.startswith("_") or name == "decoder_layer":
                raise
            return getattr(self.decoder_layer, name)


def run(module: nn.Module, *args: Any, anew: bool, **kwargs: Any) -> Any:
    """Call a module; `anew` computes it a second time in the backward pass."""
    if not anew:
        return module(*args, **kwargs)
    return checkpoint(module, *args, use_reentrant=False, **kwargs)


def insert_cross_attention(
    language: nn.Module,
    layers: str,
    every: int,
    make_block: MakeBlock,
    conditioning: Conditioning,
) -> tuple[nn.ModuleList, list[GatedCrossAttentionBlock | None]]:
    """Put a block before each `every`-th decoder layer (the last of each run of `every`).

    Args:
        language: the language model; changed in place, and hooked to `conditioning`.
        layers: path of its list of decoder layers.
        every: `cross_attn_every_n_layers`.
        make_block: gives a fresh block.
        conditioning: what all blocks will look at.

    Returns:
        The decoder layers as they were, and the block of each or None.

    Raises:
        AttributeError: there is nothing at `layers`.
        TypeError: what is there is no list of layers.
        ValueError: the language model has gated cross-attention already, or `every` gives no
            layer any.
    """
    parent_path, _, name = layers.rpartition(".")
    parent = language.get_submodule(parent_path)
    decoders = getattr(parent, name)
    if not isinstance(decoders, nn.ModuleList):
        raise TypeError(f"`{layers}` is a {type(decoders).__name__}, not a list of layers")
    if any(isinstance(one, FlamingoLayer) for one in decoders):
        raise ValueError("the language model has gated cross-attention already")
    if not 1 <= every <= len(decoders):
        raise ValueError(f"there are {len(decoders)} layers, and a block before each {every}-th")
    blocks = [make_block() if (i + 1) % every == 0 else None for i in range(len(decoders))]
    pairs = zip(blocks, decoders, strict=True)
    wrapped = [FlamingoLayer(block, layer, conditioning) for block, layer in pairs]
    setattr(parent, name, nn.ModuleList(wrapped))
    language.register_forward_pre_hook(conditioning.before_language, with_kwargs=True)
    language.register_forward_hook(conditioning.after_language, with_kwargs=True)
    return decoders, blocks
