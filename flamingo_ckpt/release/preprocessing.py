"""Preprocessing: pictures are made into what the tower was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.result import Outcome, failed, skipped
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import escape

#: Statistics of the pictures: OpenAI's CLIP (and every OpenFlamingo), and SigLIP (PaliGemma).
#: Source: open_clip's `constants.py`; transformers' `SiglipImageProcessor`.
_CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SIGLIP: Final = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
#: (file, the part of it that is about pictures, names of mean, standard deviation, filter)
_PLACES: Final = (
    ("preprocessor_config.json", "", ("image_mean", "image_std", "resample")),
    ("processor_config.json", "image_processor", ("image_mean", "image_std", "resample")),
    ("open_clip_config.json", "preprocess_cfg", ("mean", "std", "interpolation")),
)
_KINDS: Final = {
    "flamingo": _CLIP,
    "clip": _CLIP,
    "clip_vision": _CLIP,
    "paligemma": _SIGLIP,
    "siglip": _SIGLIP,
}
_BICUBIC = (3, "bicubic")
_CLOSE = 1e-4
_SIDES: Final = ("height", "width", "shortest_edge")


def check_preprocessing(subject: Subject) -> Outcome:
    """Mean, standard deviation, size and filter against the kind of tower and its config."""
    if not subject.is_folder:
        return skipped("preprocessing", "a single file has no preprocessor; check the folder")
    kind = subject.config.kind if subject.config is not None else ""
    found: list[tuple[str, Mapping[str, Any], tuple[str, str, str]]] = []
    try:
        for name, part, fields in _PLACES:
            document = subject.json_of(name)
            if isinstance(document, Mapping) and part:
                document = document.get(part)
            if isinstance(document, Mapping):
                found.append((name, document, fields))
    except CkptError as error:
        return failed("preprocessing", error)
    if kind not in _KINDS:
        return skipped("preprocessing", "what kind of pictures the model takes is not known")
    if not found:
        return skipped("preprocessing", "the folder has no preprocessor_config.json")
    findings: list[Finding] = []
    for name, document, fields in found:
        findings += _constants(name, document, fields, _KINDS[kind])
        findings += _size(name, document, subject)
    names = ", ".join(f"`{name}`" for name, _, _ in found)
    sentence = f"{names}: " + (
        "as the tower was trained" if not findings else "not as the tower was trained"
    )
    return Outcome(name="preprocessing", sentence=sentence, findings=tuple(findings))


def _constants(
    file: str,
    document: Mapping[str, Any],
    fields: tuple[str, str, str],
    wanted: tuple[tuple[float, ...], tuple[float, ...]],
) -> Iterator[Finding]:
    for field, value in zip(fields[:2], wanted, strict=True):
        said = document.get(field)
        if said is None:
            yield _differs(file, field, "warning", "is missing: readers take their own default")
        elif not _is_close(said, value):
            yield _differs(
                file,
                field,
                "error",
                f"is {escape(repr(said))[:80]}, the tower was trained with {list(value)}",
            )
    resample = document.get(fields[2])
    if resample is not None and resample not in _BICUBIC:
        yield _differs(
            file, fields[2], "warning", f"is {escape(repr(resample))[:40]}, and not bicubic (3)"
        )
    for field in ("do_normalize", "do_rescale"):
        if document.get(field) is False:
            yield _differs(file, field, "error", "is false, the tower was trained with true")
    factor = document.get("rescale_factor")
    if factor is not None and not _is_close([factor], (1 / 255,)):
        yield _differs(
            file, "rescale_factor", "error", f"is {escape(repr(factor))[:40]}, not 1/255"
        )


def _is_close(said: Any, value: tuple[float, ...]) -> bool:
    return (
        isinstance(said, list | tuple)
        and len(said) == len(value)
        and all(type(one) in (int, float) for one in said)
        and all(abs(one - other) < _CLOSE for one, other in zip(said, value, strict=True))
    )


def _size(file: str, document: Mapping[str, Any], subject: Subject) -> Iterator[Finding]:
    assert subject.config is not None
    wanted = _image_size(subject.config.data, subject.config.layout)
    if wanted is None:
        return
    for field in ("crop_size", "size"):
        said = document.get(field)
        if said is None:
            continue
        sides = list(said.values()) if isinstance(said, Mapping) else said
        sides = sides if isinstance(sides, list) else [sides]
        if isinstance(said, Mapping) and not any(name in said for name in _SIDES):
            continue  # `longest_edge` and its like bound a size, and state none
        if any(one != wanted for one in sides):
            yield _differs(
                file,
                field,
                "error",
                f"is {escape(repr(said))[:80]}, the tower takes {wanted}x{wanted}",
            )
        return


def _image_size(data: Mapping[str, Any], layout: str) -> int | None:
    part = data.get("vision_cfg" if layout == "open_clip" else "vision_config", data)
    size = part.get("image_size") if isinstance(part, Mapping) else None
    return size if isinstance(size, int) else None


def _differs(file: str, field: str, severity: str, what: str) -> Finding:
    return Finding(
        code="FC606",
        severity=severity,
        key=f"{file}: {field}",
        detail=f"`{file}`: `{field}` {what}",
        hint="take the preprocessor's config of the tower's own release",
        data={"file": file},
    )
