"""What a vision tower's pictures go through, in open_clip's words and by its own transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

#: Of an image's resize, as preprocessors of transformers number it (PIL's numbers).
_RESAMPLE: Final[Mapping[int, str]] = {2: "bilinear", 3: "bicubic"}


#: Steps that every CLIP's pictures go through here.
_STEPS: Final = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def preprocess_of(document: Any, where: str) -> dict[str, Any]:
    """open_clip's words for what a preprocessor of transformers does.

    Raises:
        CkptError: FC401 for one that open_clip's transforms cannot do.
    """
    if not isinstance(document, Mapping):
        raise _refused("the preprocessor's config is not a JSON object", where)
    for name in _STEPS:
        if document.get(name) not in (None, True):
            raise _refused(f"`{name}` is {escape(repr(document[name]))[:60]}, not true", where)
    resample = document.get("resample")
    if resample is not None and resample not in _RESAMPLE:
        raise _refused(
            f"`resample` is {escape(repr(resample))[:60]}, not 2 (bilinear) or 3 (bicubic)", where
        )
    given = {
        "mean": document.get("image_mean"),
        "std": document.get("image_std"),
        "interpolation": _RESAMPLE.get(3 if resample is None else resample),
    }
    return {name: value for name, value in given.items() if value is not None}


def _refused(message: str, where: str) -> CkptError:
    return CkptError(
        message,
        code="FC401",
        where=where,
        hint="without that file, pictures are prepared as open_clip does for CLIP",
    )


def image_processor(preprocess: Mapping[str, Any], size: Any) -> Any:
    """open_clip's own preprocessing for evaluation: a PIL picture to `[3, height, width]`.

    Args:
        preprocess: a `preprocess_cfg`; what it leaves out is as open_clip has it.
        size: of the tower's pictures.

    Raises:
        ValueError: statistics that are none. open_clip asserts the other choices.
    """
    from open_clip.transform import (  # type: ignore[import-untyped]
        PreprocessCfg,
        image_transform_v2,
        merge_preprocess_dict,
    )

    given = {name: value for name, value in preprocess.items() if name != "size"}
    settings = merge_preprocess_dict(PreprocessCfg(), {**given, "size": size})
    _check_statistics(settings)
    return image_transform_v2(PreprocessCfg(**settings), is_train=False)


def _check_statistics(settings: Mapping[str, Any]) -> None:
    for name in ("mean", "std"):
        values = settings[name]
        is_three = isinstance(values, list | tuple) and len(values) == 3
        if not is_three or not all(type(one) in (int, float) for one in values):
            raise ValueError(f"`{name}` is {values!r}, not three numbers")
        if name == "std" and not all(one > 0 for one in values):
            raise ValueError(f"`std` is {values!r}, not three positive numbers")
