"""Real pictures and a prompt as the inputs of a check, through the model's own processor.

How pictures are prepared and how text becomes tokens is read from the folders of the two sides and
of their bases; the inputs' note tells which was taken. Both sides get the very same tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.inputs import (
    LENGTHS,
    MASK,
    Inputs,
    image_size,
    image_token,
    media_token,
    pictures,
    vocabulary_rows,
)
from flamingo_ckpt.parity.opening import Side
from flamingo_ckpt.parity.preprocess import open_picture, prepare, shown
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from flamingo_ckpt.models.config import ModelConfig

#: Kinds of model that compute nothing without a picture, and what to call them.
_NEED_PICTURES: Final = {
    "flamingo": "a Flamingo",
    "tower": "an image tower",
    "paligemma": "PaliGemma",
}
#: What stands for a picture in a prompt, of Flamingo and of PaliGemma.
MEDIA: Final = "<image>"
#: Any of these tells that a folder has a tokenizer.
_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
#: Rows of CLIP's own vocabulary, which open_clip ships.
_CLIP_ROWS: Final = 49408


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What the user gave.

    Attributes:
        pair: the two sides.
        pictures: decoded, in RGB.
        names: their files.
        prompt: "" for none.
        tokenizer: the folder that was named, if one was.
    """

    pair: Sequence[Side]
    pictures: tuple[Image, ...]
    names: tuple[str, ...]
    prompt: str
    tokenizer: str | None

    def folders(self, kind: str) -> list[str]:
        """A's folder, B's, then those of the bases of a kind."""
        manifests = [side.manifest for side in self.pair]
        manifests += [
            base.manifest for side in self.pair for base in side.bases if base.kind == kind
        ]
        return list(dict.fromkeys(one.folder for one in manifests if one.folder is not None))

    def prepared(self, config: ModelConfig) -> tuple[torch.Tensor, str]:
        """The pictures as `prepare` gives them."""
        return prepare(
            self.pictures,
            self.folders("vision"),
            image_size(config),
            is_siglip=config.kind == "paligemma",
        )

    def inputs(
        self,
        tensors: Mapping[str, torch.Tensor],
        notes: Sequence[str],
        media: int | None = None,
    ) -> Inputs:
        """The tensors, and where they are from."""
        return Inputs(
            kind=self.pair[0].kind,
            tensors={name: one.contiguous() for name, one in tensors.items()},
            source=", ".join(self.names) or "a prompt",
            media_token_id=media,
            note="; ".join(notes),
        )


def prompt_inputs(
    pair: Sequence[Side], images: Sequence[str], prompt: str, tokenizer: str | None
) -> Callable[[ModelConfig, ModelConfig], Inputs]:
    """Inputs from pictures and a prompt: one row, or for CLIP one for each picture.

    Pictures are decoded at once, so that a wrong name is met before anything else is done.

    Args:
        pair: the two sides.
        images: files. A Flamingo takes any number, one for each `<image>` of the prompt; PaliGemma
            takes one; CLIP compares each with the prompt, or a generated one where there is none.
        prompt: the text. Without one a Flamingo is given `<image>` for each picture. An image tower
            that stands alone reads none.
        tokenizer: a folder, looked at before those of sides and bases.

    Returns:
        What makes the inputs when both configs are known. It raises FC484 for a prompt that does
        not fit the pictures or the models, or without a tokenizer; FC401 for preprocessing that
        cannot be done here; FC454 and FC456 for a tokenizer that cannot be read.

    Raises:
        CkptError: FC484 for a file that is no picture, for too few or too many pictures, for a
            tokenizer that is no folder.
    """
    kind = pair[0].kind
    if not images and kind in _NEED_PICTURES:
        raise _unfit(f"{_NEED_PICTURES[kind]} needs a picture", hint="--image names one")
    if prompt and kind == "tower":
        raise _unfit("an image tower reads no text", hint="leave --prompt out")
    if len(images) > 1 and kind == "paligemma":
        raise _unfit(
            f"there are {len(images)} pictures, and PaliGemma takes one", hint="give one --image"
        )
    if tokenizer is not None and not os.path.isdir(tokenizer):
        raise _unfit(
            f"there is no folder `{escape(tokenizer)}`",
            where=tokenizer,
            hint="--tokenizer names a local folder with a tokenizer's files",
        )
    request = _Request(
        pair=pair,
        pictures=tuple(open_picture(path) for path in images),
        names=tuple(images),
        prompt=prompt,
        tokenizer=tokenizer,
    )
    make = {"flamingo": _flamingo, "clip": _clip, "tower": _tower, "paligemma": _paligemma}[kind]
    return lambda a, b: make(request, a, b)


# --- kinds of model -------------------------------------------------------------------------------


def _flamingo(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    import torch

    count, most = len(request.pictures), a.data.get("max_num_media")
    if isinstance(most, int) and count > most:
        raise _unfit(
            f"there are {count} pictures, and the model takes {most} at most",
            hint="leave some --image out",
        )
    pixels, how = request.prepared(a)
    ids, media, whose = _flamingo_tokens(request, a, b)
    found = ids.count(media)
    if found != count:
        raise _unfit(
            f"the prompt has {found} `{MEDIA}` for {count} --image",
            hint=f"`{MEDIA}` stands in the prompt once for each --image, in their order",
        )
    _check_length(ids, a)
    tokens = torch.tensor([ids])
    tensors = {"vision_x": pixels[None, :, None], "lang_x": tokens, MASK: torch.ones_like(tokens)}
    return request.inputs(tensors, (how, whose), media)


def _flamingo_tokens(
    request: _Request, a: ModelConfig, b: ModelConfig
) -> tuple[list[int], int, str]:
    """(token ids, the one that stands for a picture, where they are from)."""
    from flamingo_ckpt.loading.flamingo import load_flamingo_tokenizer
    from flamingo_ckpt.loading.places import Access
    from flamingo_ckpt.models.assemble import quiet_libraries

    count = len(request.pictures)
    told, untold = media_token(a, b)
    folder = _tokenizer_folder(request, is_needed=bool(request.prompt or untold))
    if folder is None:
        return [told] * count, told, "no prompt and no tokenizer: tokens of pictures alone"
    tokenizer = load_flamingo_tokenizer(os.path.abspath(folder), Access(local_files_only=True))
    media = tokenizer.convert_tokens_to_ids(MEDIA)
    if not untold and media != told:
        raise _other_token(media, f"`media_token_id` is {told}", folder)
    with quiet_libraries():
        ids = tokenizer(request.prompt or MEDIA * count)["input_ids"]
    _check_rows(ids, tokenizer, folder, a)
    note = f"text by the tokenizer in {shown(folder)}"
    return ids, media, f"{note}, whose `{MEDIA}` is {media}" if untold else note


def _clip(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    del b
    if request.pictures:
        pixels, how = request.prepared(a)
    else:
        pixels = pictures(0, 1, image_size(a), is_siglip=False)
        how = "no --image: the picture is a generated one"
    row, whose = _clip_tokens(request, a)
    # Logits are [pictures, texts]; with a row for each picture, rows are what they are elsewhere.
    return request.inputs({"image": pixels, "text": row.repeat(len(pixels), 1)}, (how, whose))


def _tower(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    del b
    pixels, how = request.prepared(a)
    return request.inputs({"image": pixels}, (how,))


def _clip_tokens(request: _Request, a: ModelConfig) -> tuple[torch.Tensor, str]:
    """(token ids `[1, context length]`, where they are from)."""
    import torch

    text = _text(a)
    length = int(text.get("context_length", text.get("max_position_embeddings", 77)))
    is_own = vocabulary_rows(a) == _CLIP_ROWS and not text.get("hf_tokenizer_name")
    if is_own and request.tokenizer is None:
        from flamingo_ckpt.models.torchvision_compat import import_torchvision

        import_torchvision()
        from open_clip.tokenizer import tokenize  # type: ignore[import-untyped]

        row = tokenize([request.prompt], length)
        _check_rows(row[0].tolist(), None, None, a)
        # one token more than the model takes, to see whether there are as many
        is_cut = bool(tokenize([request.prompt], length + 1)[0, -1])
        return row, "text by open_clip's tokenizer" + _cut(is_cut, length)
    folder = _tokenizer_folder(request)
    assert folder is not None
    tokenizer = _tokenizer_in(folder)
    ids = tokenizer(request.prompt)["input_ids"]
    is_cut = len(ids) > length
    if is_cut:
        ids = tokenizer(request.prompt, truncation=True, max_length=length)["input_ids"]
    if not ids:
        raise _unfit("the prompt has no tokens", where=folder, hint="give another --prompt")
    ids += [tokenizer.pad_token_id or 0] * (length - len(ids))
    _check_rows(ids, tokenizer, folder, a)
    note = f"text by the tokenizer in {shown(folder)}" + _cut(is_cut, length)
    return torch.tensor([ids]), note


def _cut(is_cut: bool, length: int) -> str:
    return f", cut to the {length} tokens that the model takes" if is_cut else ""


def _paligemma(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    """As transformers' `PaliGemmaProcessor`: tokens of the picture, `<bos>`, prompt, new line."""
    del b
    import torch

    pixels, how = request.prepared(a)
    folder = _tokenizer_folder(request)
    assert folder is not None
    tokenizer = _tokenizer_in(folder)
    image, known = image_token(a), tokenizer.convert_tokens_to_ids(MEDIA)
    if known not in (None, tokenizer.unk_token_id, image):
        raise _other_token(known, f"`image_token_index` is {image}", folder)
    if tokenizer.bos_token is None:
        raise _unfit(
            "the tokenizer has no token that begins a text, as PaliGemma's has",
            where=folder,
            hint="--tokenizer names another",
        )
    before, _, after = request.prompt.rpartition(MEDIA)
    if MEDIA in before:
        raise _unfit(
            f"the prompt has {request.prompt.count(MEDIA)} `{MEDIA}` for 1 --image",
            hint=f"one `{MEDIA}`, or none: it then stands before the prompt",
        )
    first, last = (
        tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        for text in (before, f"{tokenizer.bos_token}{after}\n")
    )
    _check_rows([*first, *last], tokenizer, folder, a)
    height, width = image_size(a)
    patch = int(a.data["vision_config"]["patch_size"])
    ids = [*first, *[image] * ((height // patch) * (width // patch)), *last]
    _check_length(ids, a)
    tokens = torch.tensor([ids])
    tensors = {
        "pixel_values": pixels,
        "input_ids": tokens,
        MASK: torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    return request.inputs(tensors, (how, f"text by the tokenizer in {shown(folder)}"))


# --- text -----------------------------------------------------------------------------------------


def _tokenizer_folder(request: _Request, *, is_needed: bool = True) -> str | None:
    """The folder that was named, else the first with a tokenizer; None only if none is needed."""
    if request.tokenizer is not None:
        return request.tokenizer
    folders = request.folders("language")
    for folder in folders:
        if any(os.path.isfile(os.path.join(folder, name)) for name in _TOKENIZERS):
            return folder
    if not is_needed:
        return None
    looked = " or ".join(f"`{shown(one)}`" for one in folders)
    raise _unfit(
        "there is no tokenizer " + (f"in {looked}" if looked else "beside the weights"),
        hint="--tokenizer names a folder with one, such as that of the original release",
    )


def _tokenizer_in(folder: str) -> Any:
    from flamingo_ckpt.loading.paligemma_tokenizer import load_tokenizer
    from flamingo_ckpt.models.assemble import quiet_libraries

    with quiet_libraries():
        return load_tokenizer(folder)


def _check_rows(
    ids: Sequence[int],
    tokenizer: Any,
    where: str | None,
    config: ModelConfig,
) -> None:
    """Refuse tokens that the reference has no row for; where B has none, that is the answer."""
    highest, rows = max(ids), vocabulary_rows(config)
    if highest >= rows:
        name = "" if tokenizer is None else f"`{_spelled(tokenizer, highest)}` is "
        raise _unfit(
            f"{name}token {highest} of the prompt: the vocabulary of A has {rows} rows",
            where=where,
            hint="the tokenizer belongs to another model",
        )


def _spelled(tokenizer: Any, token: int) -> str:
    return escape(str(tokenizer.convert_ids_to_tokens(token)))[:60]


def _check_length(ids: Sequence[int], config: ModelConfig) -> None:
    limits = [one for one in (_text(config).get(name) for name in LENGTHS) if type(one) is int]
    if limits and len(ids) > min(limits):
        raise _unfit(
            f"the text has {len(ids)} tokens, and the model takes {min(limits)}",
            hint="give a shorter --prompt",
        )


def _text(config: ModelConfig) -> Mapping[str, Any]:
    data = config.data
    found: Mapping[str, Any] = data["text_cfg"] if "text_cfg" in data else data["text_config"]
    return found


def _other_token(found: int, wanted: str, folder: str) -> CkptError:
    return _unfit(
        f"the tokenizer's `{MEDIA}` is {found}, and the config's {wanted}: pictures would go where "
        "no token asks for one",
        where=folder,
        hint="config and tokenizer are of different releases: --tokenizer names another",
    )


def _unfit(message: str, *, where: str | None = None, hint: str) -> CkptError:
    return CkptError(message, code="FC484", where=where, hint=hint)
