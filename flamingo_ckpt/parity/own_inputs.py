"""The user's own inputs: a safetensors file, held to what the models take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.inputs import (
    MASK,
    PIXELS,
    TEXT,
    Inputs,
    context_length,
    image_size,
    media_token,
    vocabulary_rows,
)
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch

    from flamingo_ckpt.models.config import ModelConfig

#: What else the tensors of `--inputs` may be called.
_SYNONYMS: Final = {
    "flamingo": {"pixel_values": "vision_x", "input_ids": "lang_x"},
    "clip": {"pixel_values": "image", "input_ids": "text"},
    "tower": {"pixel_values": "image"},
    "paligemma": {},
}


def read_inputs(path: str, kind: str, a: ModelConfig, b: ModelConfig) -> Inputs:
    """The user's own inputs, from a safetensors file.

    Args:
        path: the file. A Flamingo wants `vision_x` `[rows, images, frames, 3, height, width]` (the
            axis of frames may be left out) and `lang_x` `[rows, tokens]`; CLIP `image` `[n, 3,
            height, width]` and `text` `[n, tokens]`; PaliGemma `pixel_values` and `input_ids`.
            `attention_mask` is all ones where it is absent. transformers' names will do.
        kind: of model.
        a: the first side's config.
        b: the second's.

    Raises:
        CkptError: FC484 naming the tensor that does not serve; what reading the file raises.
    """
    tensors = _tensors_of(path, kind)
    wanted = [TEXT[kind], PIXELS[kind]] if kind in TEXT else [PIXELS[kind]]
    for name in wanted:
        if name not in tensors:
            raise _unfit(path, f"there is no `{name}`", name)
    if kind in TEXT:
        _check_text(path, tensors, kind, a)
    pixels = PIXELS[kind]
    if not tensors[pixels].is_floating_point():
        raise _unfit(path, f"`{pixels}` is not of floating-point numbers", pixels)
    tensors[pixels] = tensors[pixels].float()
    if kind == "flamingo" and tensors[pixels].ndim == 5:
        tensors[pixels] = tensors[pixels][:, :, None]
    _check_pixels(path, tensors, kind, a)
    media, note = media_token(a, b) if kind == "flamingo" else (None, "")
    return Inputs(kind=kind, tensors=tensors, source=path, media_token_id=media, note=note)


def _check_text(path: str, tensors: dict[str, torch.Tensor], kind: str, a: ModelConfig) -> None:
    """Check the tokens, and add what may be left out beside them."""
    import torch

    text = TEXT[kind]
    tokens = tensors[text]
    is_whole = not (tokens.is_floating_point() or tokens.is_complex()) and tokens.ndim == 2
    if not is_whole or tokens.dtype == torch.bool or not tokens.numel():
        raise _unfit(path, f"`{text}` is not [rows, tokens] of whole numbers", text)
    tensors[text] = tokens.long()
    rows = vocabulary_rows(a)
    if int(tensors[text].min()) < 0 or int(tensors[text].max()) >= rows:
        raise _unfit(path, f"`{text}` holds tokens beyond the vocabulary of {rows} rows", text)
    if kind == "clip" and tokens.shape[1] != (length := context_length(a)):
        raise _unfit(
            path, f"`{text}` has {tokens.shape[1]} tokens a row, and the model takes {length}", text
        )
    if kind != "clip":
        mask = tensors.get(MASK, torch.ones_like(tensors[text]))
        if mask.shape != tokens.shape:
            raise _unfit(path, f"`{MASK}` has another shape than `{text}`", MASK)
        tensors[MASK] = mask.long()
        if not bool(tensors[MASK].any(dim=1).all()):
            raise _unfit(path, f"`{MASK}` hides a whole row: nothing of it is compared", MASK)
    if kind == "paligemma":
        types = tensors.get("token_type_ids", torch.zeros_like(tensors[text]))
        if types.shape != tokens.shape:
            raise _unfit(
                path, f"`token_type_ids` has another shape than `{text}`", "token_type_ids"
            )
        tensors["token_type_ids"] = types.long()


def _tensors_of(path: str, kind: str) -> dict[str, torch.Tensor]:
    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.formats.extract import BLOCK_BYTES
    from flamingo_ckpt.loading.fill import Reader
    from flamingo_ckpt.plan import Step

    reader = Reader()
    known = {PIXELS[kind], *([TEXT[kind]] if kind in TEXT else [])}
    known |= {"flamingo": {MASK}, "paligemma": {MASK, "token_type_ids"}}.get(kind, set())
    found: dict[str, torch.Tensor] = {}
    for one in open_checkpoint(path).tensors:
        stored = one.name
        name = _SYNONYMS[kind].get(stored, stored)
        if name not in known:
            raise _unfit(path, f"`{escape(stored)}` is none of " + ", ".join(sorted(known)), stored)
        if name in found:
            raise _unfit(path, f"`{name}` is there under two names", stored)
        step = Step(source=one, name=name, dtype=one.dtype)
        found[name] = reader.whole(step, None, bytearray(BLOCK_BYTES)).clone()
    return found


def _check_pixels(
    path: str, tensors: Mapping[str, torch.Tensor], kind: str, a: ModelConfig
) -> None:
    name = PIXELS[kind]
    shape = tuple(tensors[name].shape)
    # CLIP compares every picture with every text, so their numbers need not be the same
    paired = kind in ("flamingo", "paligemma")
    rows = tensors[TEXT[kind]].shape[0] if paired else shape[0] if shape else 0
    axes = 6 if kind == "flamingo" else 4
    wanted = (3, *image_size(a))
    if len(shape) != axes or shape[0] != rows or shape[-3:] != wanted or 0 in shape:
        outer = "rows, images, frames" if kind == "flamingo" else "rows"
        raise _unfit(
            path,
            f"`{name}` has the shape {list(shape)}, not [{outer}, "
            + ", ".join(map(str, wanted))
            + (f"] with {rows} rows" if paired else "]"),
            name,
        )


def _unfit(path: str, what: str, key: str) -> CkptError:
    return CkptError(
        what,
        code="FC484",
        where=path,
        key=key,
        hint="`flamingo-ckpt inspect` shows what is in the file; the README lists what is wanted",
    )
