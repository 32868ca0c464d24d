"""What a model is: a config of Hugging Face's kind (or open_clip's), read, checked and completed.

Nothing is guessed: what sizes a module is in the config, or has the one value that the published
classes hard-code, or the default of the transformers class that reads the same config.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.check_config import (
    check_clip,
    check_clip_vision,
    check_flamingo,
    check_language_model,
    check_open_clip,
    check_paligemma,
    check_siglip,
)
from flamingo_ckpt.models.families import FAMILIES
from flamingo_ckpt.models.fields import Fields
from flamingo_ckpt.models.presets import PRESETS
from flamingo_ckpt.tensors import ByteSource, Manifest, escape

MODEL_PREFIX: Final = "model:"
_CONFIG_NAMES = ("config.json", "open_clip_config.json")
#: Real configs have a few kilobytes.
_MAX_BYTES = 4 << 20
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checked description of a model.

    Attributes:
        kind: `flamingo`, `clip`, `clip_vision`, `paligemma`, `siglip` or `language`.
        data: the config as given, completed with the sizes that it may leave out.
        where: the file or preset it came from, for messages.
        layout: key layout of the model's releases: `openflamingo`, `openflamingo-v1`,
            `hf-flamingo`, `open_clip`, `hf-clip`, `paligemma`, `language-model`.
        digest: SHA-256 of `data`, the same for the same content in any order.
    """

    kind: str
    data: Mapping[str, Any]
    where: str
    layout: str
    digest: str


def read_config(uri: str) -> ModelConfig:
    """The model that a config file, a folder with one, or a preset describes.

    Args:
        uri: a path, `hf://OWNER/NAME[@REVISION][/PATH]`, or a name from `PRESETS`; `model:` may
            stand before each. A preset wins over a path of the same name, which can be written
            `./NAME`. Of what is on the hub `where` is the address at the commit that was read.

    Raises:
        CkptError: FC404 where there is no such model, FC401 to FC403 and FC405 for what is wrong
            with its config; what the hub raises.
    """
    name = uri.removeprefix(MODEL_PREFIX)
    preset = PRESETS.get(name)
    if preset is not None:
        return parse_config(preset.config, MODEL_PREFIX + name, layout=preset.layout)
    if name.startswith("hf://"):
        return _config_on_hub(name)
    path = _config_path(name)
    return parse_config(_load(path), path)


def read_json(path: str, max_bytes: int = _MAX_BYTES) -> Any:
    """A JSON document such as a config: strict, of bounded size and depth.

    Raises:
        CkptError: FC404 where it cannot be read, FC401 where it is not such a document.
    """
    return _load(path, max_bytes)


def config_in(folder: str) -> ModelConfig:
    """The model that a folder's own config describes, also where the folder has a preset's name.

    Raises:
        CkptError: as `read_config`.
    """
    return read_config(os.path.abspath(folder))


def _config_on_hub(uri: str) -> ModelConfig:
    from flamingo_ckpt.formats.remote import open_file_on_hub

    found = open_file_on_hub(uri, _CONFIG_NAMES)
    if found is None:
        raise CkptError("the repository has no config.json there", code="FC404", where=uri)
    source, where = found
    return config_of(source, where)


def config_beside(manifest: Manifest) -> ModelConfig | None:
    """The model that the config in a checkpoint's folder describes; None where there is none.

    Raises:
        CkptError: as `read_config`, for what is wrong with it.
    """
    for name in _CONFIG_NAMES:
        source = manifest.open_beside(name)
        if source is not None:
            return config_of(source, source.name)
    return None


def config_of(source: ByteSource, where: str) -> ModelConfig:
    """The model that a config describes, wherever it is read from.

    Raises:
        CkptError: as `read_config`.
    """
    raw = source.read(0, min(source.size, _MAX_BYTES + 1))
    return parse_config(_parse(raw, where), where)


def parse_config(mapping: object, where: str, *, layout: str | None = None) -> ModelConfig:
    """Check a config that was read already.

    Args:
        mapping: the JSON document.
        where: what to call it in messages.
        layout: key layout of the model's releases, where it is not the one that a config of this
            kind comes with.

    Raises:
        CkptError: FC401 for fields that are missing, of a wrong type or out of bounds, FC408 for
            contradictions, FC403 for a kind of model that is not known, FC405 for options that
            have no module tree here.
    """
    if not isinstance(mapping, Mapping):
        raise CkptError("the config is not a JSON object", code="FC401", where=where)
    data = copy.deepcopy(_unwrapped(mapping))
    kind, native = _kind(data, where)
    _CHECKS[kind, native](Fields(data, "", where), data)
    return ModelConfig(
        kind=kind, data=data, where=where, layout=layout or native, digest=_digest(data)
    )


_CHECKS = {
    ("flamingo", "hf-flamingo"): check_flamingo,
    ("clip", "open_clip"): check_open_clip,
    ("clip", "hf-clip"): check_clip,
    ("clip_vision", "hf-clip"): check_clip_vision,
    ("paligemma", "paligemma"): check_paligemma,
    ("siglip", "open_clip-siglip"): check_siglip,
    ("language", "language-model"): check_language_model,
}
_KINDS = {
    "flamingo": ("flamingo", "hf-flamingo"),
    "otter": ("flamingo", "hf-flamingo"),
    "clip": ("clip", "hf-clip"),
    "clip_vision_model": ("clip_vision", "hf-clip"),
    "paligemma": ("paligemma", "paligemma"),
    "siglip": ("siglip", "open_clip-siglip"),
}


def _kind(data: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "model_type" not in data and "embed_dim" in data and "vision_cfg" in data:
        return "clip", "open_clip"
    model_type = Fields(data, "", where).text("model_type")
    if model_type in _KINDS:
        return _KINDS[model_type]
    if model_type is None and "architectures" not in data:
        raise CkptError(
            "the config has no `model_type`",
            code="FC401",
            where=where,
            hint="known: " + _known() + "; open_clip's have `embed_dim` and `vision_cfg` instead",
        )
    if model_type in FAMILIES or "decoder_layers_attr_name" in data or model_type is None:
        return "language", "language-model"
    raise CkptError(
        f"unknown `model_type` `{escape(model_type)}`; known: {_known()}",
        code="FC403",
        where=where,
        hint="for another causal language model of transformers, name the path of its decoder "
        "layers in `decoder_layers_attr_name`, such as `transformer.h`",
    )


def _known() -> str:
    return ", ".join([*_KINDS, *FAMILIES])


def _unwrapped(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's hub folders keep the model's config beside that of the preprocessing."""
    inner = mapping.get("model_cfg")
    return dict(inner) if isinstance(inner, Mapping) else dict(mapping)


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _config_path(name: str) -> str:
    if os.path.isdir(name):
        for file in _CONFIG_NAMES:
            if os.path.isfile(os.path.join(name, file)):
                return os.path.join(name, file)
        raise CkptError(
            "the folder has no config.json",
            code="FC404",
            where=name,
            hint="name the config file itself, or a preset",
        )
    if os.path.exists(name):
        return name
    import difflib

    if "/" in name or name.endswith(".json"):
        raise CkptError(f"there is no `{escape(name)}`", code="FC404", where=name)
    close = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
    raise CkptError(
        f"no model `{escape(name)}`: neither a file or folder nor a preset",
        code="FC404",
        hint="perhaps " + ", ".join(f"`model:{one}`" for one in close)
        if close
        else "presets: " + ", ".join(PRESETS),
    )


def _load(path: str, max_bytes: int = _MAX_BYTES) -> Any:
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CkptError(
            f"cannot read the config: {error.strerror}", code="FC404", where=path
        ) from error
    return _parse(raw, path, max_bytes)


def _parse(raw: bytes, path: str, max_bytes: int = _MAX_BYTES) -> Any:
    if len(raw) > max_bytes:
        raise CkptError(f"the config is larger than {max_bytes} bytes", code="FC401", where=path)
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except CkptError as error:
        raise error.at(path) from None
    except (ValueError, RecursionError) as error:
        raise CkptError(
            f"the config is not JSON: {escape(str(error))}", code="FC401", where=path
        ) from error
    _check_depth(document, path)
    return document


def _check_depth(document: Any, where: str) -> None:
    """Nesting that later steps (copy, digest) would stumble over is no config."""
    level, depth = [document], 0
    while level:
        if depth > _MAX_DEPTH:
            raise CkptError("the config is nested too deeply", code="FC401", where=where)
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level, depth = inner, depth + 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise CkptError(f"the config has two fields `{escape(key)}`", code="FC401")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise CkptError(f"the config holds {name}, which is not JSON", code="FC401")
