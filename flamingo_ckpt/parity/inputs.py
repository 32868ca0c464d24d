"""What both models are fed: the same bits for both, on every machine.

Generated inputs come from a hash function and whole numbers, so that no device, library or version
changes them: pictures with coarse and fine structure, several in a sequence, text before the first
one, a row without any, padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError

if TYPE_CHECKING:
    import torch

    from flamingo_ckpt.models.config import ModelConfig

#: Names of the text's tensor, and of the mask that says where it is not padding, by kind of model.
#: (CLIP's image tower alone has none.)
TEXT: Final = {"flamingo": "lang_x", "clip": "text", "paligemma": "input_ids"}
PIXELS: Final = {
    "flamingo": "vision_x",
    "clip": "image",
    "tower": "image",
    "paligemma": "pixel_values",
}
MASK: Final = "attention_mask"
#: Kinds of model that write.
WRITING: Final = ("flamingo", "paligemma")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_ROWS, _IMAGES, _TOKENS = 3, 2, 24
#: Squares of one colour on a side of a generated picture.
_SQUARES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Tensors on the CPU, by the names of `TEXT`, `PIXELS` and `MASK`.

    Attributes:
        kind: of model.
        tensors: pictures in float32, tokens in int64.
        source: `generated`, or the file that they are from.
        seed: of generated ones.
        media_token_id: of a Flamingo: the token that stands for an image.
        note: what was decided for the user.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    source: str
    seed: int | None = None
    media_token_id: int | None = None
    note: str = ""

    @property
    def mask(self) -> torch.Tensor | None:
        """Where the text is text and not padding: booleans `[rows, tokens]`."""
        return self.tensors[MASK].bool() if MASK in self.tensors else None

    @property
    def tokens(self) -> torch.Tensor:
        """Token ids `[rows, tokens]`; of a kind of model that reads text."""
        return self.tensors[TEXT[self.kind]]

    @property
    def pixels(self) -> torch.Tensor:
        """The pictures; their last two axes are height and width."""
        return self.tensors[PIXELS[self.kind]]

    def sha256(self) -> str:
        """Of names, dtypes, shapes and bytes of all tensors."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for people."""
        height, width = self.pixels.shape[-2:]
        if self.kind not in TEXT:
            return f"{len(self.pixels)} images of {height}x{width}"
        num_rows, length = self.tokens.shape
        rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
        many = self.pixels.shape[1] if self.kind == "flamingo" else 1
        pictures = f"{many} images" if many > 1 else "an image"
        each = "each " if num_rows > 1 else ""
        return f"{rows} of {length} tokens, {each}with {pictures} of {height}x{width}"

    def document(self) -> dict[str, Any]:
        """`data` of the JSON report."""
        from flamingo_ckpt.tensors import TORCH_DTYPES

        return {
            "source": self.source,
            "seed": self.seed,
            "sha256": self.sha256(),
            "description": self.describe() + (f"; {self.note}" if self.note else ""),
            "tensors": [
                {
                    "name": name,
                    "dtype": TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")].name,
                    "shape": list(tensor.shape),
                }
                for name, tensor in self.tensors.items()
            ],
        }


def draw(seed: int, name: str, count: int, below: int) -> list[int]:
    """Whole numbers from 0, the same everywhere: SHAKE-128 of the seed and a name.

    >>> draw(0, "example", 4, 100)
    [95, 62, 91, 99]
    """
    raw = hashlib.shake_128(f"flamingo-ckpt parity 1 {seed} {name}".encode()).digest(4 * count)
    return [int.from_bytes(raw[4 * at : 4 * at + 4], "little") % below for at in range(count)]


def pictures(seed: int, count: int, size: tuple[int, int], *, is_siglip: bool) -> torch.Tensor:
    """Pictures `[count, 3, height, width]` in float32, normalised as their tower expects it.

    Coarse squares of one colour with fine noise on top. Values are those of 8 bits a channel.
    """
    import numpy as np
    import torch

    height, width = size
    coarse = np.array(draw(seed, "coarse", count * 3 * _SQUARES**2, 256)).reshape(
        count, 3, _SQUARES, _SQUARES
    )
    raw = hashlib.shake_128(f"flamingo-ckpt parity 1 {seed} fine".encode()).digest(
        count * 3 * height * width
    )
    fine = np.frombuffer(raw, np.uint8).reshape(count, 3, height, width)
    rows, columns = (np.arange(n) * _SQUARES // n for n in (height, width))
    values = (3 * coarse[:, :, rows][:, :, :, columns] + fine) // 4
    mean, std = (_HALF, _HALF) if is_siglip else (_CLIP_MEAN, _CLIP_STD)
    shape = (1, 3, 1, 1)
    normalised = (values / 255.0 - np.array(mean).reshape(shape)) / np.array(std).reshape(shape)
    return torch.from_numpy(normalised.astype(np.float32))


def generate(kind: str, a: ModelConfig, b: ModelConfig, seed: int) -> Inputs:
    """Inputs for two models of one kind; sizes are the first one's where they differ."""
    make = {"flamingo": _flamingo, "clip": _clip, "tower": _tower, "paligemma": _paligemma}
    return make[kind](a, b, seed)


def image_size(config: ModelConfig) -> tuple[int, int]:
    """(height, width) of a model's pictures."""
    data = config.data
    size = data.get("vision_cfg", data.get("vision_config", data)).get("image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def media_token(a: ModelConfig, b: ModelConfig) -> tuple[int, str]:
    """(the token that stands for an image, a note where no config tells it)."""
    for config in (a, b):
        if isinstance(config.data.get("media_token_id"), int):
            return int(config.data["media_token_id"]), ""
    rows = int(a.data["text_config"]["vocab_size"])
    return rows - 1, f"no config tells `media_token_id`: the last row, {rows - 1}, is taken"


def _words(seed: int, count: int, rows: int, reserved: set[int]) -> list[int]:
    """Ordinary tokens."""
    allowed = [one for one in range(min(3, rows - 1), rows) if one not in reserved]
    return [allowed[at] for at in draw(seed, "words", count, len(allowed))]


def _flamingo(a: ModelConfig, b: ModelConfig, seed: int) -> Inputs:
    import torch

    text = a.data["text_config"]
    media, note = media_token(a, b)
    rows = min(int(one.data["text_config"]["vocab_size"]) for one in (a, b))
    end, pad = a.data.get("eoc_token_id"), text.get("pad_token_id")
    pad = pad if isinstance(pad, int) and 0 <= pad < rows else 0
    reserved = {media, pad, *([end] if isinstance(end, int) else [])}
    limit = min(
        (int(text[name]) for name in LENGTHS if isinstance(text.get(name), int)), default=_TOKENS
    )
    length = max(4, min(_TOKENS, limit))
    images = min(_IMAGES, a.data.get("max_num_media") or _IMAGES)
    tokens = torch.tensor(_words(seed, _ROWS * length, rows, reserved)).view(_ROWS, length)
    mask = torch.ones_like(tokens)
    first, second = length // 6, length // 2
    tokens[0, first] = tokens[1, 0] = media
    if images > 1:
        tokens[0, second] = tokens[1, first + 1] = media
    if isinstance(end, int) and 0 <= end < rows:
        tokens[0, second - 1] = end
    padding = max(1, length // 5)
    tokens[1, -padding:], mask[1, -padding:] = pad, 0
    pixels = pictures(seed, _ROWS * images, image_size(a), is_siglip=False)
    return Inputs(
        kind="flamingo",
        tensors={
            "vision_x": pixels.view(_ROWS, images, 1, *pixels.shape[1:]),
            "lang_x": tokens,
            MASK: mask,
        },
        source="generated",
        seed=seed,
        media_token_id=media,
        note=note,
    )


#: How language models call the most positions that they have.
LENGTHS: Final = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(config: ModelConfig) -> int:
    """Tokens that a CLIP's text tower takes."""
    if "vision_cfg" in config.data:
        return int(config.data["text_cfg"].get("context_length", 77))
    return int(config.data["text_config"].get("max_position_embeddings", 77))


def _clip(a: ModelConfig, b: ModelConfig, seed: int) -> Inputs:
    import torch

    del b
    data = a.data
    native = "vision_cfg" in data
    text = data["text_cfg"] if native else data["text_config"]
    length, rows = context_length(a), vocabulary_rows(a)
    end = text.get("eos_id") if native else text.get("eos_token_id")
    if not isinstance(end, int) or end == 2 or not 0 <= end < rows:
        end = rows - 1  # both libraries then pool at the highest token
    tokens = torch.tensor(_words(seed, _ROWS * length, rows, {end, rows - 1}))
    tokens = tokens.view(_ROWS, length)
    for row in range(_ROWS):  # the first is full, the others end earlier
        at = length - 1 - row * length // _ROWS
        tokens[row, at], tokens[row, at + 1 :] = end, 0
    pixels = pictures(seed, _ROWS, image_size(a), is_siglip=False)
    return Inputs(
        kind="clip", tensors={"image": pixels, "text": tokens}, source="generated", seed=seed
    )


def _tower(a: ModelConfig, b: ModelConfig, seed: int) -> Inputs:
    del b
    pixels = pictures(seed, _ROWS, image_size(a), is_siglip=False)
    return Inputs(kind="tower", tensors={"image": pixels}, source="generated", seed=seed)


def _paligemma(a: ModelConfig, b: ModelConfig, seed: int) -> Inputs:
    import torch

    data = a.data
    vision = data["vision_config"]
    height, width = image_size(a)
    patch = int(vision["patch_size"])
    rows = min(int(one.data["text_config"]["vocab_size"]) for one in (a, b))
    image = image_token(a)
    num_patches = (height // patch) * (width // patch)
    words = torch.tensor(_words(seed, 2 * 10, min(rows, image), {image})).view(2, 10)
    tokens = torch.cat((torch.full((2, num_patches), image), words), dim=1)
    mask = torch.ones_like(tokens)
    tokens[1, -3:], mask[1, -3:] = 0, 0
    # Type 0 is the prompt, which sees all of itself, and 1 an answer, which is causal. (Without
    # types transformers' eager attention is causal, and its fused one is not.)
    types = torch.zeros_like(tokens)
    types[0, -5:] = types[1, -6:-3] = 1
    return Inputs(
        kind="paligemma",
        tensors={
            "pixel_values": pictures(seed, 2, (height, width), is_siglip=True),
            "input_ids": tokens,
            MASK: mask,
            "token_type_ids": types,
        },
        source="generated",
        seed=seed,
    )


def image_token(config: ModelConfig) -> int:
    """PaliGemma's token for a patch of the picture.

    Raises:
        CkptError: FC468 where the config has none.
    """
    for name in ("image_token_index", "image_token_id"):
        found = config.data.get(name)
        if isinstance(found, int):
            return found
    raise CkptError(
        "the config does not tell which token stands for a picture",
        code="FC468",
        where=config.where,
        hint="`image_token_index` in config.json; Google's releases have 257152",
    )


def vocabulary_rows(config: ModelConfig) -> int:
    """Rows of the vocabulary that a config tells."""
    data = config.data
    text = data["text_cfg"] if "text_cfg" in data else data["text_config"]
    return int(text.get("vocab_size", 49408))


def set_media_token(module: Any, inputs: Inputs, *, is_upstream: bool = False) -> None:
    """Tell a Flamingo which token stands for an image, where its config does not."""
    if inputs.media_token_id is None:
        return
    module.media_token_id = inputs.media_token_id
    if is_upstream:
        module.lang_encoder.media_token_id = inputs.media_token_id
