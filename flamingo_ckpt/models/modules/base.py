"""What both forms of Flamingo share: looking at pictures, and a language model that knows of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import nn

from flamingo_ckpt.models.modules.conditioning import Conditioning, FlamingoLayer
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler


class FlamingoBase(nn.Module):
    """The methods of a Flamingo, whatever its parts are called and made of.

    A class that inherits from it sets, in its own order, the attributes below; all of the
    language model's `FlamingoLayer`s share its `conditioning`.

    Attributes:
        conditioning: what the gated blocks look at.
        vision_encoder: gives tokens; see `visual_tokens`.
        perceiver: the resampler.
        lang_encoder: a causal language model with gated cross-attention in it.
        eoc_token_id: the token that ends a chunk of text; None where it is not known.
    """

    conditioning: Conditioning
    vision_encoder: nn.Module
    perceiver: PerceiverResampler
    lang_encoder: nn.Module
    eoc_token_id: int | None = None

    @property
    def media_token_id(self) -> int | None:
        """The token that stands for an image; None for a model that only loads."""
        return self.conditioning.media_token_id

    @media_token_id.setter
    def media_token_id(self, value: int | None) -> None:
        """Set it."""
        self.conditioning.media_token_id = value

    def visual_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """The vision tower's tokens: `[n, tokens, dim_visual]` for `[n, ...]`.

        The tower may be any module that gives them, or a pair of which they are the second, as
        open_clip's with `output_tokens`.
        """
        found = self.vision_encoder(pictures)
        tokens: torch.Tensor = found[1] if isinstance(found, tuple) else found
        return tokens

    def encode_vision(self, vision_x: torch.Tensor) -> torch.Tensor:
        """The perceiver's latents: `[batch, images, num_latents, dim_visual]`.

        A tower of which no parameter requires a gradient is run without one; any other is trained.

        Args:
            vision_x: `[batch, images, frames, channels, height, width]`, or with other axes after
                the first three for another kind of encoder. It is cast to the dtype of the tower.

        Raises:
            ValueError: another number of axes; no image; more than one frame where frames have no
                embedding; more frames or images than have one; the tower gives something else.
        """
        if vision_x.ndim < 4:
            raise ValueError(
                f"`vision_x` has the shape {tuple(vision_x.shape)}, not [batch, images, frames, "
                "channels, height, width]"
            )
        batch, images, frames = vision_x.shape[:3]
        if 0 in (batch, images, frames):
            raise ValueError(f"`vision_x` has the shape {tuple(vision_x.shape)}: no image")
        self.perceiver.check_numbers(num_frames=frames, num_media=images)
        parameters = list(self.vision_encoder.parameters())
        dtype = next((one.dtype for one in parameters if one.is_floating_point()), None)
        is_trained = vision_x.requires_grad or any(one.requires_grad for one in parameters)
        pictures = vision_x.flatten(0, 2)
        if dtype is not None and pictures.is_floating_point():
            pictures = pictures.to(dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            tokens = self.visual_tokens(pictures)
        self._check_tokens(tokens, len(pictures))
        tokens = tokens.to(self.perceiver.latents.dtype)
        latents: torch.Tensor = self.perceiver(
            rearrange(tokens, "(b m f) n d -> b m f n d", b=batch, m=images, f=frames)
        )
        return latents

    def _check_tokens(self, tokens: Any, number: int) -> None:
        width = self.perceiver.latents.shape[-1]
        shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else None
        if shape is None or len(shape) != 3 or (shape[0], shape[2]) != (number, width):
            given = f"a {type(tokens).__name__}" if shape is None else f"the shape {shape}"
            raise ValueError(f"the vision encoder gives {given}, not [{number}, tokens, {width}]")

    def cache_media(self, input_ids: torch.Tensor, vision_x: torch.Tensor) -> None:
        """Keep images for several calls, as for the log-likelihood of many continuations.

        Calls without a media token then attend to the last of the images.

        Args:
            input_ids: `[batch, tokens]`, the prompt that the images belong to.
            vision_x: as for `encode_vision`.
        """
        self.conditioning.keep(input_ids, self.encode_vision(vision_x))

    def uncache_media(self) -> None:
        """Forget the images that `cache_media` keeps."""
        self.conditioning.clear()

    @contextmanager
    def looking_at(self, vision_x: torch.Tensor | None, *, forget: bool = True) -> Iterator[None]:
        """Let calls of the language model see images.

        Args:
            vision_x: as for `encode_vision`; None for those that `cache_media` keeps.
            forget: the images afterwards. What `cache_media` keeps stays in any case.

        Raises:
            ValueError: images are given although some are kept, or neither.
            RuntimeError: another call is running, in another thread (`DataParallel` has one for
                each device) or around this one: it would go on with the images of this one.
        """
        seen = self.conditioning
        if seen.is_in_use:
            raise RuntimeError(
                "the model is looking at the images of another call, which is still running: let "
                "calls wait for one another, or give each thread or device a copy of the model "
                "(DistributedDataParallel instead of DataParallel)"
            )
        seen.is_in_use = True
        try:
            self._look_at(vision_x)
            yield
        except BaseException:
            forget = True
            raise
        finally:
            seen.is_in_use = False
            if forget and not seen.keeps_media:
                seen.clear()

    def _look_at(self, vision_x: torch.Tensor | None) -> None:
        seen = self.conditioning
        if vision_x is None:
            if not seen.keeps_media:
                raise ValueError("give `vision_x`, or keep images with `cache_media` first")
        elif seen.keeps_media:
            raise ValueError("images are cached: `uncache_media()` first, or pass None")
        else:
            seen.media = self.encode_vision(vision_x)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Let the language model's own `generate` tell the whole text in each of its steps.

        It asks itself for the inputs of each step with `prepare_inputs_for_generation`, a method
        that is there to be replaced; here it is, on this one object and for this one time.
        """
        language: Any = self.lang_encoder
        prepare = language.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def told(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.conditioning.announce(input_ids)
            return prepare(input_ids, *args, **kwargs)

        language.prepare_inputs_for_generation = told
        try:
            yield
        finally:
            del language.prepare_inputs_for_generation

    def generation_defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` with what a Flamingo has by default.

        Text ends with its chunk, the rest of a row is filled with the language model's own padding
        or the same token, and there is a cache: MPT's config says no, and pays for it.
        """
        asked = given.get("generation_config")
        chosen: dict[str, Any] = {}
        if getattr(asked, "use_cache", None) is None:
            chosen["use_cache"] = True
        if self.eoc_token_id is not None and getattr(asked, "eos_token_id", None) is None:
            chosen["eos_token_id"] = self.eoc_token_id
        own: Any = asked or getattr(self.lang_encoder, "generation_config", None)
        end = given.get("eos_token_id", chosen.get("eos_token_id"))
        if getattr(own, "pad_token_id", None) is None and end is not None:
            chosen["pad_token_id"] = int(torch.as_tensor(end).flatten()[0])
        return {**chosen, **given}

    def use_gradient_checkpointing(self, value: bool = True) -> None:
        """Whether perceiver, gated blocks and decoder layers are computed anew in the backward."""
        self.perceiver.uses_checkpointing = value
        for module in self.lang_encoder.modules():
            if isinstance(module, FlamingoLayer):
                module.uses_checkpointing = value

    def resize_token_embeddings(self, num_tokens: int, **kwargs: Any) -> nn.Module:
        """Give the language model another number of rows; its own method and its arguments."""
        language: Any = self.lang_encoder
        resized: nn.Module = language.resize_token_embeddings(num_tokens, **kwargs)
        return resized
