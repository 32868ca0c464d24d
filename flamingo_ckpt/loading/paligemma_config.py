"""PaliGemma's `config.json` in the many spellings of transformers, read as one.

What the file's shapes do not show (the base of the rotary embedding, the activation, which token
stands for the picture, whether the head is the embedding) has had other names and other defaults
from version to version. Here each field is brought to the name that the installed transformers
reads, and two fields that contradict each other are refused.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats.safetensors import parse_json_object
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.models.fields import MAX_ROWS, Fields
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    from transformers import PaliGemmaConfig

    from flamingo_ckpt.models.config import ModelConfig

CONFIG_NAME: Final = "config.json"
_MAX_BYTES = 4 << 20
_SIGLIP_IMAGE, _SIGLIP_PATCH = 224, 16
_TANH_GELU = "gelu_pytorch_tanh"
#: Fields of the two inner configs that describe a model of its own, and not a part of this one.
_NOT_OF_A_PART = ("dtype", "torch_dtype", "architectures", "auto_map", "transformers_version")
#: Fields that name code to be fetched and run; nothing here does.
_CODE = ("auto_map", "custom_pipelines")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaliGemmaSettings:
    """A PaliGemma's config, normalised and checked.

    Attributes:
        model: the checked config, with the names that transformers reads now.
        tied: whether the output head is the embedding.
        tie_told_by: the fields that say so, for messages.
        num_rows: of the vocabulary.
        image_token: id of the token that stands for one patch of the picture; None where the
            config does not tell it.
        dtype: what the config says of the weights, as torch spells it; None where it is silent.
        notes: what was inferred.
    """

    model: ModelConfig
    tied: bool
    tie_told_by: str
    num_rows: int
    image_token: int | None
    dtype: str | None
    notes: tuple[Finding, ...]

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.model.where


def read_settings(folder: str) -> PaliGemmaSettings:
    """Read `config.json` of a folder.

    Args:
        folder: of the release.

    Raises:
        CkptError: FC404 without the file, FC401 for a field that is missing or out of bounds,
            FC408 for two that contradict each other, FC403 where it is not PaliGemma's, FC459
            where the weights are quantised.
    """
    from flamingo_ckpt.models.config import parse_config

    path = os.path.join(folder, CONFIG_NAME)
    data = _read(path)
    fields = Fields(data, "", path)
    if fields.text("model_type") != "paligemma":
        raise CkptError(
            f"the config is of `model_type` {escape(repr(data.get('model_type')))[:60]}, and this "
            "loads `paligemma`",
            code="FC403",
            where=path,
            hint="`load_checkpoint` fills a model of any other kind",
        )
    _refuse_quantised(data, path)
    notes: list[Finding] = []
    text, vision = (dict(fields.section(name).data) for name in ("text_config", "vision_config"))
    dtype = _dtype(fields)
    data = {**{k: v for k, v in data.items() if k not in _CODE}, "dtype": dtype}
    data.pop("torch_dtype", None)
    text, vision = (
        {name: value for name, value in part.items() if name not in _NOT_OF_A_PART}
        for part in (text, vision)
    )
    _set_rows(data, text)
    _set_padding(fields, text)
    _set_rope(Fields(text, "text_config.", path), text)
    _set_activation(Fields(text, "text_config.", path), text)
    notes += _set_image_size(fields, text, vision)
    image_token = _image_token(fields)
    tied, told_by = _tie(fields, Fields(text, "text_config.", path))
    data["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    if image_token is not None:
        data["image_token_index"] = image_token
    Fields(vision, "vision_config.", path).flag("vision_use_head")
    vision["vision_use_head"] = False  # whatever the config says, no PaliGemma uses its output
    _check_vision_type(Fields(vision, "vision_config.", path), vision)
    data |= {"text_config": text, "vision_config": vision}
    model = parse_config(_without_null(data), path)
    return PaliGemmaSettings(
        model=model,
        tied=tied,
        tie_told_by=told_by,
        num_rows=model.data["text_config"]["vocab_size"],
        image_token=image_token,
        dtype=dtype,
        notes=tuple(notes),
    )


def hf_config(
    settings: PaliGemmaSettings, image_token: int, dtype: str, num_rows: int | None = None
) -> PaliGemmaConfig:
    """The config as an object of transformers.

    Args:
        settings: from `read_settings`.
        image_token: id of the picture's token.
        dtype: that the weights will have, as torch spells it.
        num_rows: of the vocabulary, where the file has others than the config.

    Raises:
        CkptError: FC405 where the class refuses it.
    """
    from transformers import PaliGemmaConfig

    data = copy.deepcopy(dict(settings.model.data))
    data |= {"image_token_index": image_token, "dtype": dtype}
    data["hidden_size"] = data["text_config"]["hidden_size"]
    data["vocab_size"] = data["text_config"]["vocab_size"] = num_rows or settings.num_rows
    data.pop("model_type")
    data.pop("image_token_id", None)  # the other name of the same
    data.pop("transformers_version", None)
    try:
        config = PaliGemmaConfig(**data)
    except Exception as error:  # whatever the class makes of its fields
        raise CkptError(
            f"cannot construct the config: {type(error).__name__}: "
            f"{escape((str(error).splitlines() or [''])[0])}",
            code="FC405",
            where=settings.where,
        ) from error
    config.name_or_path = os.path.dirname(settings.where)
    return config


def _read(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise CkptError(
            "the folder has no config.json, and no shape tells a model's heads or activation",
            code="FC404",
            where=os.path.dirname(path),
            hint="copy it from the release that the weights were trained from",
        )
    source = FileSource(path)
    if source.size > _MAX_BYTES:
        raise CkptError(f"the config is larger than {_MAX_BYTES} bytes", code="FC401", where=path)
    try:
        return parse_json_object(source.read(0, source.size), path)
    except CkptError as error:
        raise CkptError(error.message, code="FC401", where=path, key=error.key) from error


def _refuse_quantised(data: Mapping[str, Any], where: str) -> None:
    found = data.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        raise CkptError(
            "the weights are quantised"
            + (f" (`{escape(str(method))[:40]}`)" if method else "")
            + ": they mean nothing without the program that made them",
            code="FC459",
            where=where,
            hint="load the release that was quantised, or use that program",
        )


def _without_null(data: Mapping[str, Any]) -> dict[str, Any]:
    """Null in a config means that the field was not set, for every version of transformers.

    But for a soft cap and a sliding window, which null turns off.
    """
    text = data["text_config"]
    keeps = ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window")
    return {
        **{name: value for name, value in data.items() if value is not None},
        "text_config": {k: v for k, v in text.items() if v is not None or k in keeps},
        "vision_config": {k: v for k, v in data["vision_config"].items() if v is not None},
    }


def _agree(fields: Fields, names: tuple[str, str], values: tuple[Any, Any]) -> Any:
    """The one value of two fields of the same meaning; either may be None."""
    first, second = values
    if first is not None and second is not None and first != second:
        raise fields.contradiction(
            f"`{names[0]}` is {escape(str(first))[:40]}, and `{names[1]}` is "
            f"{escape(str(second))[:40]}",
            hint="they are two names of one thing: delete the wrong one",
        )
    return second if first is None else first


def _dtype(fields: Fields) -> str | None:
    """`dtype`, which was `torch_dtype` before version 5."""
    names = ("dtype", "torch_dtype")
    told = _agree(fields, names, (fields.text(names[0]), fields.text(names[1])))
    return told.removeprefix("torch.") if told is not None else None


def _set_rows(data: Mapping[str, Any], text: dict[str, Any]) -> None:
    """Rows of the vocabulary are the language model's; other versions kept them at the top."""
    if text.get("vocab_size") is None:
        text["vocab_size"] = data.get("vocab_size")


def _set_padding(fields: Fields, text: dict[str, Any]) -> None:
    """`pad_token_id` stood at the top until version 5, and stands in the text config since.

    Where both are there they need not agree: the upper one is for `generate`, the inner one is
    the row of the embedding that training leaves alone.
    """
    told = fields.optional("pad_token_id", low=-1, high=MAX_ROWS)
    if text.get("pad_token_id") is None and told is not None:
        text["pad_token_id"] = told


def _set_rope(fields: Fields, text: dict[str, Any]) -> None:
    """`rope_theta` and `rope_scaling` became `rope_parameters` in version 5."""
    theta, scaling = text.pop("rope_theta", None), text.pop("rope_scaling", None)
    rope = text.pop("rope_parameters", None)
    for name, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, Mapping):
            raise fields.wrong(name, value, "a mapping")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        raise fields.wrong("rope_theta", theta, "a number")
    told = dict(rope or scaling or {})
    names = ("text_config.rope_theta", "text_config.rope_parameters.rope_theta")
    theta = _agree(fields, names, (theta, told.get("rope_theta")))
    if theta is None and not told:
        return  # the class's own
    kind = told.pop("type", None)  # its name before `rope_type`
    told["rope_type"] = told.get("rope_type") or kind or "default"
    if theta is not None:
        told["rope_theta"] = theta
    text["rope_parameters"] = told


def _set_activation(fields: Fields, text: dict[str, Any]) -> None:
    """One activation under the name that each Gemma's class reads.

    The first Gemma's configs said `gelu` and meant its tanh form; a `hidden_activation` beside it
    says what is meant, and is no longer read by its class.
    """
    legacy, told = fields.text("hidden_act"), fields.text("hidden_activation")
    if told is None:
        told = _TANH_GELU if legacy in (None, "gelu") else legacy
    text.pop("hidden_act", None)
    text.pop("hidden_activation", None)
    is_first = text.get("model_type") == "gemma"
    if is_first and told == "gelu":
        raise fields.error(
            "`text_config.hidden_activation` asks for the exact `gelu`, which transformers' Gemma "
            "takes for the tanh form",
            "FC405",
            hint=f"PaliGemma is trained with `{_TANH_GELU}`; write that if it is meant",
        )
    text["hidden_act" if is_first else "hidden_activation"] = told


def _set_image_size(fields: Fields, text: dict[str, Any], vision: dict[str, Any]) -> list[Finding]:
    """The number of patches must be what the numbers of image tokens say; fills in the size."""
    part = Fields(vision, "vision_config.", fields.where)
    told = _agree(
        fields,
        ("vision_config.num_image_tokens", "text_config.num_image_tokens"),
        (
            part.optional("num_image_tokens"),
            Fields(text, "text_config.", fields.where).optional("num_image_tokens"),
        ),
    )
    patch = part.integer("patch_size", default=_SIGLIP_PATCH)
    notes = []
    if vision.get("image_size") is None:
        vision["image_size"] = _SIGLIP_IMAGE
        side = math.isqrt(told) if told is not None else 0
        if told is not None and side * side == told and side * patch != _SIGLIP_IMAGE:
            vision["image_size"] = side * patch
            notes.append(
                Finding(
                    code="FC408",
                    severity="info",
                    detail=f"the config has no `vision_config.image_size`; {told} image tokens of "
                    f"{patch} pixels a side make it {side * patch}",
                )
            )
    image = part.integer("image_size")
    num_tokens = (image // patch) ** 2
    if told is not None and told != num_tokens:
        raise fields.contradiction(
            f"`num_image_tokens` is {told}, and pictures of {image} pixels in patches of {patch} "
            f"have {num_tokens}",
            hint="correct `vision_config.image_size` or `num_image_tokens`",
        )
    # Some versions leave it out, and programs around the model ask for it.
    vision["num_image_tokens"] = text["num_image_tokens"] = num_tokens
    return notes


def _image_token(fields: Fields) -> int | None:
    """No default: classes have 256000, which is wrong for every release."""
    names = ("image_token_index", "image_token_id")
    told = [fields.optional(name, low=0, high=MAX_ROWS) for name in names]
    found: int | None = _agree(fields, names, (told[0], told[1]))
    return found


def _tie(fields: Fields, text: Fields) -> tuple[bool, str]:
    """Whether the head is the embedding, and which fields say so.

    Each half of transformers' history reads another of the two fields and writes the other's
    default, so one `false` says that there is a head.
    """
    told = {
        f"{one.path}tie_word_embeddings": value
        for one in (fields, text)
        if (value := one.flag("tie_word_embeddings")) is not None
    }
    tied = all(told.values())
    names = [f"`{name}`" for name, value in told.items() if value is tied]
    return tied, " and ".join(names) or "`tie_word_embeddings`, which is true by default,"


def _check_vision_type(fields: Fields, vision: dict[str, Any]) -> None:
    kind = fields.text("model_type") or "siglip_vision_model"
    if kind != "siglip_vision_model":
        raise fields.wrong("model_type", kind, "`siglip_vision_model`")
    vision["model_type"] = kind
