"""Real pictures and a prompt as the inputs of a check, through the model's own processor.

How pictures are prepared and how text becomes tokens is read from the folders of the two sides and
of their bases; the inputs' note tells which was taken. Both sides get the very same tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.inputs import (
    MASK,
    PIXELS,
    TEXT,
    Inputs,
    image_size,
    image_token,
    media_token,
    pictures,
)
from flamingo_ckpt.parity.opening import Side
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from flamingo_ckpt.models.config import ModelConfig

#: What stands for a picture in a prompt, for Flamingo and for PaliGemma.
MEDIA: Final = "<image>"
#: What pictures may be. Not EPS: reading one starts another program.
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: (file, the part of it that is about pictures; "" for all of it), as first looked for.
_TRANSFORMERS: Final = (
    ("preprocessor_config.json", ""),
    ("processor_config.json", "image_processor"),
)
_OPEN_CLIP: Final = ("open_clip_config.json", "preprocess_cfg")
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
#: How language models call the most positions that they have.
_LENGTHS: Final = ("max_position_embeddings", "n_positions", "max_seq_len")


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

    @property
    def kind(self) -> str:
        return self.pair[0].kind

    def folders(self, kind: str) -> list[str]:
        """A's folder, B's, then those of the bases of a kind."""
        own = [side.manifest.folder for side in self.pair]
        bases = [
            base.manifest.folder for side in self.pair for base in side.bases if base.kind == kind
        ]
        return [one for one in dict.fromkeys((*own, *bases)) if one is not None]


def prompt_inputs(
    pair: Sequence[Side], images: Sequence[str], prompt: str, tokenizer: str | None
) -> Callable[[ModelConfig, ModelConfig], Inputs]:
    """Inputs from pictures and a prompt: one row, of CLIP as many as there are pictures.

    Pictures are decoded at once, so that a wrong name is met before anything is computed.

    Args:
        pair: the two sides.
        images: files. A Flamingo takes any number, one for each `<image>` of the prompt; PaliGemma
            takes one; CLIP compares each with the prompt, and is given a generated one for none.
        prompt: the text. Without one a Flamingo is given `<image>` for each picture.
        tokenizer: a folder, before those of the sides and bases.

    Returns:
        What makes the inputs once both configs are known. It raises FC484 for a prompt that does
        not fit the pictures or the models, or where no tokenizer is found; FC401 for preprocessing
        that cannot be done; FC454 and FC456 for a tokenizer that cannot be read.

    Raises:
        CkptError: FC484 for a file that is no picture, for no picture or too many, for a tokenizer
            that is no folder.
    """
    kind = pair[0].kind
    if not images and kind != "clip":
        raise _unfit(f"a {kind} model needs a picture", hint="--image names one")
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
        pictures=tuple(_open_picture(path) for path in images),
        names=tuple(images),
        prompt=prompt,
        tokenizer=tokenizer,
    )
    make = {"flamingo": _flamingo, "clip": _clip, "paligemma": _paligemma}[kind]
    return lambda a, b: make(request, a, b)


def _unfit(message: str, *, where: str | None = None, hint: str | None = None) -> CkptError:
    return CkptError(message, code="FC484", where=where, hint=hint)


# --- kinds of model -------------------------------------------------------------------------------


def _flamingo(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    import torch

    count = len(request.pictures)
    most = a.data.get("max_num_media")
    if isinstance(most, int) and count > most:
        raise _unfit(f"there are {count} pictures, and the model takes {most} at most")
    pixels, how = _prepared(request, a)
    ids, media, whose = _flamingo_tokens(request, a, b)
    found = ids.count(media)
    if found != count:
        raise _unfit(
            f"the prompt has {found} `{MEDIA}`, and there are {count} pictures",
            hint=f"`{MEDIA}` stands in the prompt for each --image, in their order",
        )
    tokens = torch.tensor([ids])
    tensors = {"vision_x": pixels[None, :, None], "lang_x": tokens, MASK: torch.ones_like(tokens)}
    return _inputs(request, tensors, (how, whose), media)


def _flamingo_tokens(
    request: _Request, a: ModelConfig, b: ModelConfig
) -> tuple[list[int], int, str]:
    """(token ids, the token that stands for a picture, where they are from)."""
    from flamingo_ckpt.loading.flamingo import load_flamingo_tokenizer
    from flamingo_ckpt.loading.places import Access
    from flamingo_ckpt.models.assemble import quiet_libraries

    told, untold = media_token(a, b)
    count = len(request.pictures)
    folder = _tokenizer_folder(request)
    if folder is None:
        if request.prompt or untold:
            raise _no_tokenizer(request)
        return [told] * count, told, "no tokenizer: the text is tokens of pictures alone"
    tokenizer = load_flamingo_tokenizer(os.path.abspath(folder), Access(local_files_only=True))
    media = tokenizer.convert_tokens_to_ids(MEDIA)
    if not untold and media != told:
        raise _other_token(media, f"`media_token_id` is {told}", folder)
    with quiet_libraries():
        ids = tokenizer(request.prompt or MEDIA * count)["input_ids"]
    _check_tokens(ids, tokenizer, folder, (a, b))
    note = f"text by the tokenizer in {_shown(folder)}"
    return ids, media, f"{note}, whose `{MEDIA}` is {media}" if untold else note


def _clip(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    if request.pictures:
        pixels, how = _prepared(request, a)
    else:
        pixels = pictures(0, 1, image_size(a), is_siglip=False)
        how = "no --image: the picture is a generated one"
    row, whose = _clip_tokens(request, a, b)
    # each picture has its row: logits are [pictures, texts], and its columns are the same
    tensors = {"image": pixels, "text": row.repeat(len(pixels), 1)}
    return _inputs(request, tensors, (how, whose))


def _clip_tokens(request: _Request, a: ModelConfig, b: ModelConfig) -> tuple[torch.Tensor, str]:
    """(token ids `[1, context length]`, where they are from)."""
    import torch

    text = _text(a)
    length = int(text.get("context_length", text.get("max_position_embeddings", 77)))
    is_own = _rows(a) == _CLIP_ROWS and not text.get("hf_tokenizer_name")
    if is_own and request.tokenizer is None:
        from flamingo_ckpt.models.torchvision_compat import import_torchvision

        import_torchvision()
        from open_clip.tokenizer import tokenize  # type: ignore[import-untyped]

        # one token more than the model takes, to see whether there are as many
        is_cut = bool(tokenize([request.prompt], length + 1)[0, -1])
        row = tokenize([request.prompt], length)
        return row, "text by open_clip's tokenizer" + _cut(is_cut, length)
    folder = _tokenizer_folder(request)
    if folder is None:
        raise _no_tokenizer(request)
    tokenizer = _tokenizer_in(folder)
    ids = tokenizer(request.prompt)["input_ids"]
    is_cut = len(ids) > length
    if is_cut:
        ids = tokenizer(request.prompt, truncation=True, max_length=length)["input_ids"]
    ids += [tokenizer.pad_token_id or 0] * (length - len(ids))
    _check_tokens(ids, tokenizer, folder, (a, b))
    note = f"text by the tokenizer in {_shown(folder)}" + _cut(is_cut, length)
    return torch.tensor([ids]), note


def _cut(is_cut: bool, length: int) -> str:
    return f", cut to the {length} tokens that the model takes" if is_cut else ""


def _paligemma(request: _Request, a: ModelConfig, b: ModelConfig) -> Inputs:
    """As transformers' `PaliGemmaProcessor`: the picture's tokens, `<bos>`, the prompt, a new line."""
    import torch

    pixels, how = _prepared(request, a)
    folder = _tokenizer_folder(request)
    if folder is None:
        raise _no_tokenizer(request)
    tokenizer = _tokenizer_in(folder)
    image, known = image_token(a), tokenizer.convert_tokens_to_ids(MEDIA)
    if known not in (None, tokenizer.unk_token_id, image):
        raise _other_token(known, f"`image_token_index` is {image}", folder)
    if tokenizer.bos_token is None:
        raise _unfit("the tokenizer has no token that begins a text", where=folder)
    before, _, after = request.prompt.rpartition(MEDIA)
    if MEDIA in before:
        raise _unfit(
            f"the prompt has {request.prompt.count(MEDIA)} `{MEDIA}`, and there is 1 picture",
            hint=f"one `{MEDIA}`, or none: it then stands before the prompt",
        )
    height, width = image_size(a)
    patch = int(a.data["vision_config"]["patch_size"])
    first, last = (
        tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        for text in (before, f"{tokenizer.bos_token}{after}\n")
    )
    _check_tokens([*first, *last], tokenizer, folder, (a, b))
    ids = [*first, *[image] * ((height // patch) * (width // patch)), *last]
    _check_length(len(ids), a)
    tokens = torch.tensor([ids])
    tensors = {
        "pixel_values": pixels,
        "input_ids": tokens,
        MASK: torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    return _inputs(request, tensors, (how, f"text by the tokenizer in {_shown(folder)}"))


def _inputs(
    request: _Request,
    tensors: Mapping[str, torch.Tensor],
    notes: Sequence[str],
    media: int | None = None,
) -> Inputs:
    assert {TEXT[request.kind], PIXELS[request.kind]} <= tensors.keys()
    return Inputs(
        kind=request.kind,
        tensors={name: one.contiguous() for name, one in tensors.items()},
        source=", ".join(request.names) or "--prompt",
        media_token_id=media,
        note="; ".join(notes),
    )


# --- pictures -------------------------------------------------------------------------------------


def _open_picture(path: str) -> Image:
    """A picture in RGB, decoded."""
    from PIL import Image

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about what a conversion loses
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                return picture.convert("RGB")
    except Exception as error:  # whatever decoders make of what is in the file
        raise _unfit(
            f"`{escape(path)}` cannot be read as a picture: {_reason(error)}",
            where=path,
            hint="pictures are " + ", ".join(_FORMATS) + ", of a size that a tower is shown",
        ) from error


def _prepared(request: _Request, config: ModelConfig) -> tuple[torch.Tensor, str]:
    """(pictures `[n, 3, height, width]` as the model's processor gives them, how that was found)."""
    import torch

    is_siglip = request.kind == "paligemma"
    names = _TRANSFORMERS if is_siglip else (*_TRANSFORMERS, _OPEN_CLIP)
    found = _preprocessor(request.folders("vision"), names)
    if found is None:
        document, where = {}, ""
        note = "pictures as " + ("SigLIP has them" if is_siglip else "open_clip has them for CLIP")
    else:
        document, where = found
        note = f"pictures as {_shown(where)} says"
    size = image_size(config)
    make = (_siglip if is_siglip else _by_open_clip)(document, where, size)
    return torch.stack([make(one) for one in request.pictures]), note


def _preprocessor(
    folders: Sequence[str], names: Sequence[tuple[str, str]]
) -> tuple[Any, str] | None:
    """(the settings, the file) of the first folder that has any."""
    from flamingo_ckpt.models.config import read_json

    for folder in folders:
        for name, part in names:
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                continue
            document = read_json(path)
            if part:
                document = document.get(part) if isinstance(document, Mapping) else None
            if document is not None:
                return document, path
    return None


def _by_open_clip(document: Any, where: str, size: tuple[int, int]) -> Callable[[Image], Any]:
    """open_clip's own transforms."""
    from flamingo_ckpt.loading.image_processor import image_processor, preprocess_of
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    height, width = size
    if os.path.basename(where) != _OPEN_CLIP[0]:
        document = preprocess_of(document, where)
    try:
        make: Callable[[Image], Any] = image_processor(
            document, height if height == width else size
        )
    except Exception as error:  # open_clip asserts its choices
        raise _no_preprocessing(_reason(error), where) from error
    return make


def _siglip(document: Any, where: str, size: tuple[int, int]) -> Callable[[Image], Any]:
    """As transformers' `SiglipImageProcessor` does it: squeezed to the size, nothing cut off."""
    import numpy as np
    import torch
    from PIL import Image

    if not isinstance(document, Mapping):
        raise _no_preprocessing("it is not a JSON object", where)
    for name, wanted in (
        *((f"do_{step}", True) for step in ("resize", "rescale", "normalize")),
        ("do_center_crop", False),
    ):
        if document.get(name) not in (None, wanted):
            raise _no_preprocessing(f"`{name}` is {document[name]!r}", where)
    factor = document.get("rescale_factor") or 1 / 255
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise _no_preprocessing(f"`rescale_factor` is {factor!r}, not 1/255", where)
    mean, std = (
        _three(document.get(f"image_{name}", [0.5] * 3), f"image_{name}", where)
        for name in ("mean", "std")
    )
    if not all(std):
        raise _no_preprocessing("`image_std` has a zero", where)
    _check_size(document.get("size"), where, size)
    try:
        resample = Image.Resampling(document.get("resample", Image.Resampling.BICUBIC))
    except ValueError as error:
        raise _no_preprocessing(f"`resample` is {document['resample']!r}", where) from error

    def make(picture: Image.Image) -> torch.Tensor:
        resized = picture.resize((size[1], size[0]), resample)
        values = (np.asarray(resized, np.float64) / 255 - mean) / std
        return torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32))

    return make


def _three(values: Any, name: str, where: str) -> list[float]:
    is_three = isinstance(values, list) and len(values) == 3
    if not is_three or not all(type(one) in (int, float) for one in values):
        raise _no_preprocessing(f"`{name}` is {values!r}, not three numbers", where)
    return [float(one) for one in values]


def _check_size(given: Any, where: str, size: tuple[int, int]) -> None:
    if isinstance(given, Mapping):
        given = given.get("height"), given.get("width")
    elif isinstance(given, int):
        given = given, given
    if given is not None and given != size:
        raise _unfit(
            f"`size` is {escape(repr(given))[:60]}, and the model's pictures are {size}",
            where=where,
            hint="preprocessor and config are of different releases",
        )


def _no_preprocessing(reason: str, where: str) -> CkptError:
    return CkptError(
        f"pictures cannot be prepared as it says: {escape(reason)[:300]}",
        code="FC401",
        where=where,
        hint="--inputs takes pictures that are prepared already",
    )


# --- text -----------------------------------------------------------------------------------------


def _tokenizer_folder(request: _Request) -> str | None:
    """The folder that was named, else the first that has a tokenizer."""
    if request.tokenizer is not None:
        return request.tokenizer
    return next(
        (
            folder
            for folder in request.folders("language")
            if any(os.path.isfile(os.path.join(folder, name)) for name in _TOKENIZERS)
        ),
        None,
    )


def _tokenizer_in(folder: str) -> Any:
    from flamingo_ckpt.loading.paligemma_tokenizer import load_tokenizer
    from flamingo_ckpt.models.assemble import quiet_libraries

    with quiet_libraries():
        return load_tokenizer(folder)


def _no_tokenizer(request: _Request) -> CkptError:
    looked = ", ".join(f"`{_shown(one)}`" for one in request.folders("language"))
    return _unfit(
        "there is no tokenizer " + (f"in {looked}" if looked else "beside either side"),
        hint="--tokenizer names a folder with one, such as the language model's release",
    )


def _other_token(found: int, wanted: str, folder: str) -> CkptError:
    return _unfit(
        f"the tokenizer's `{MEDIA}` is {found}, and the config's {wanted}: pictures would go where "
        "no token asks for one",
        where=folder,
        hint="config and tokenizer are of different releases: --tokenizer names another",
    )


def _check_tokens(
    ids: Sequence[int], tokenizer: Any, folder: str, configs: tuple[ModelConfig, ModelConfig]
) -> None:
    """Refuse text that a model has no rows or no positions for."""
    if not ids:
        raise _unfit("the prompt has no tokens", where=folder, hint="give a --prompt")
    highest = max(ids)
    for side, config in zip("AB", configs, strict=True):
        rows = _rows(config)
        if highest >= rows:
            token = escape(str(tokenizer.convert_ids_to_tokens(highest)))
            raise _unfit(
                f"`{token}` is token {highest}, and the vocabulary of {side} has {rows} rows",
                where=folder,
                hint="the tokenizer belongs to another model"
                if side == "A"
                else "the tokenizer belongs to another model, or B's embedding was not resized to "
                "it: the check without --prompt tells",
            )
    _check_length(len(ids), configs[0])


def _check_length(length: int, config: ModelConfig) -> None:
    limits = [one for one in (_text(config).get(name) for name in _LENGTHS) if type(one) is int]
    if limits and length > min(limits):
        raise _unfit(
            f"the prompt has {length} tokens, and the model takes {min(limits)}",
            hint="give a shorter --prompt",
        )


def _text(config: ModelConfig) -> Mapping[str, Any]:
    data = config.data
    found: Mapping[str, Any] = data["text_cfg"] if "text_cfg" in data else data["text_config"]
    return found


def _rows(config: ModelConfig) -> int:
    return int(_text(config).get("vocab_size", _CLIP_ROWS))


def _shown(path: str) -> str:
    return escape(os.path.relpath(path) if os.path.isabs(path) else path)


def _reason(error: Exception) -> str:
    return escape(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")[:300]
