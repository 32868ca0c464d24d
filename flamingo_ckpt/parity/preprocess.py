"""Picture files as a model's own processor prepares them, by what the folders around it say."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: What pictures may be. Not EPS: reading one starts another program.
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: A tower's pictures are square: the longer side grows with the shorter one.
_MAX_RATIO: Final = 100
#: (file, the part of it that is about pictures; "" for all of it), as first looked for.
_TRANSFORMERS: Final = (
    ("preprocessor_config.json", ""),
    ("processor_config.json", "image_processor"),
)
_OPEN_CLIP: Final = ("open_clip_config.json", "preprocess_cfg")
#: No statistic of a picture is as large.
_HUGE: Final = 1e6


def open_picture(path: str) -> Image:
    """A picture in RGB, decoded.

    Raises:
        CkptError: FC484 for what is no picture, is not there, is broken or is too large.
    """
    from PIL import Image

    if not os.path.isfile(path):
        raise CkptError(
            f"there is no file `{escape(path)}`",
            code="FC484",
            where=path,
            hint="--image names a picture",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about what a conversion loses
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                width, height = picture.size
                if max(width, height) > _MAX_RATIO * min(width, height):
                    raise ValueError(f"{width}x{height} is too narrow")
                return picture.convert("RGB")
    except Exception as error:  # whatever decoders make of what is in the file
        raise CkptError(
            f"`{escape(path)}` cannot be read as a picture: {reason_of(error)}",
            code="FC484",
            where=path,
            hint="read are " + ", ".join(_FORMATS),
        ) from error


def prepare(
    pictures: Sequence[Image], folders: Sequence[str], size: tuple[int, int], *, is_siglip: bool
) -> tuple[torch.Tensor, str]:
    """(pictures `[n, 3, height, width]` in float32, whose settings were taken).

    Args:
        pictures: in RGB.
        folders: where a preprocessor's config is looked for, the first one first.
        size: (height, width) of the model's pictures.
        is_siglip: whether its tower is SigLIP, or else CLIP.

    Raises:
        CkptError: FC401 for settings that cannot be followed, FC484 for those of another size.
    """
    import torch

    found = _settings(folders, _TRANSFORMERS if is_siglip else (*_TRANSFORMERS, _OPEN_CLIP))
    if found is None:
        found = {}, ""
        note = "pictures prepared as " + ("for SigLIP" if is_siglip else "open_clip does for CLIP")
    else:
        note = f"pictures prepared by {shown(found[1])}"
    document, where = found
    make = (_siglip if is_siglip else _clip)(document, where, size)
    try:
        prepared = torch.stack([make(one) for one in pictures])
    except Exception as error:  # of numbers that are out of every range
        raise _cannot(reason_of(error), where) from error
    if not bool(prepared.isfinite().all()):
        raise _cannot("its statistics make infinities of them", where)
    return prepared, note


def _settings(folders: Sequence[str], names: Sequence[tuple[str, str]]) -> tuple[Any, str] | None:
    """(what the first folder that has any says, the file)."""
    from flamingo_ckpt.models.config import read_json

    for folder in folders:
        for name, part in names:
            path = os.path.join(folder, name)
            document = read_json(path) if os.path.isfile(path) else None
            if document is not None and part:
                document = document.get(part) if isinstance(document, Mapping) else None
            if document is not None:
                return document, path
    return None


def _clip(document: Any, where: str, size: tuple[int, int]) -> Callable[[Image], torch.Tensor]:
    """open_clip's own transforms."""
    from flamingo_ckpt.loading.image_processor import image_processor, preprocess_of
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    if os.path.basename(where) != _OPEN_CLIP[0]:
        document = preprocess_of(document, where)
    height, width = size
    try:
        make: Callable[[Image], torch.Tensor] = image_processor(
            document, height if height == width else size
        )
    except Exception as error:  # open_clip asserts its choices
        raise _cannot(reason_of(error), where) from error
    return make


def _siglip(document: Any, where: str, size: tuple[int, int]) -> Callable[[Image], torch.Tensor]:
    """As transformers' `SiglipImageProcessorPil`: squeezed to the size, with nothing cut off."""
    import numpy as np
    import torch
    from PIL import Image

    if not isinstance(document, Mapping):
        raise _cannot("it is not a JSON object", where)
    given = {name: value for name, value in document.items() if value is not None}
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False}
    for name, value in wanted.items():
        if given.get(name, value) is not value:
            raise _cannot(f"`{name}` is {given[name]!r}", where)
    factor = given.get("rescale_factor", 1 / 255)
    if type(factor) is not float or abs(factor * 255 - 1) > 1e-6:
        raise _cannot(f"`rescale_factor` is {factor!r}, not 1/255", where)
    mean, std = (_three(given, name, where) for name in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise _cannot("`image_std` is not three positive numbers", where)
    _check_size(given.get("size"), where, size)
    try:
        resample = Image.Resampling(given.get("resample", Image.Resampling.BICUBIC))
    except ValueError as error:
        raise _cannot(f"`resample` is {given['resample']!r}", where) from error

    def make(picture: Image.Image) -> torch.Tensor:
        resized = picture.resize((size[1], size[0]), resample)
        values = (np.asarray(resized, np.float64) / 255 - mean) / std
        return torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32))

    return make


def _three(given: Mapping[str, Any], name: str, where: str) -> list[float]:
    values = given.get(name, [0.5] * 3)
    is_three = isinstance(values, list) and len(values) == 3
    if not is_three or not all(type(one) in (int, float) and abs(one) < _HUGE for one in values):
        raise _cannot(f"`{name}` is {values!r}, not three numbers", where)
    return [float(one) for one in values]


def _check_size(given: Any, where: str, size: tuple[int, int]) -> None:
    if isinstance(given, Mapping):
        given = given.get("height"), given.get("width")
    elif isinstance(given, int):
        given = given, given
    if given is not None and given != size:
        height, width = size
        raise CkptError(
            f"its `size` is {escape(repr(given))[:60]}, and the model's pictures are "
            f"{height}x{width}",
            code="FC484",
            where=where,
            hint="preprocessor and config are of different releases",
        )


def _cannot(reason: str, where: str) -> CkptError:
    return CkptError(
        f"pictures cannot be prepared as it says: {escape(reason)[:300]}",
        code="FC401",
        where=where or None,
        hint="--inputs takes pictures that are prepared already",
    )


def shown(path: str) -> str:
    """A path for people: seen from here, where it is below."""
    near = os.path.relpath(path) if os.path.isabs(path) else path
    return escape(path if near.startswith(os.pardir) else near)


def reason_of(error: Exception) -> str:
    """What a library says of its failure, on one line."""
    return escape(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")[:300]
