"""Construct a model on the meta device and read off what its state dict has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.models.assemble import assemble, language_config
from flamingo_ckpt.models.check_config import config_dtype
from flamingo_ckpt.models.config import ModelConfig
from flamingo_ckpt.models.expectation import ALIAS_TREES, ExpectedTensor
from flamingo_ckpt.models.families import Family
from flamingo_ckpt.tensors import DTYPES, TORCH_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import nn

#: name -> (group, base, whether a release has it); aliases are asked about by their own name.
Classify = Callable[[str, bool], tuple[str, str | None, bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A module with how its names are to be read.

    Attributes:
        module: on the meta device.
        renames: prefix in the module -> prefix in the layout; the first that fits applies.
        classify: by the name in the layout.
    """

    module: nn.Module
    renames: Mapping[str, str]
    classify: Classify


def construct(config: ModelConfig, layout: str) -> tuple[ExpectedTensor, ...]:
    """Every name of the model's state dict in a layout that it has a form in.

    Raises:
        CkptError: FC405 where the classes refuse the config or a library is not installed, FC403
            where transformers has no class for it.
    """
    built = _READERS[layout](config, layout, assemble(config, layout))
    return tuple(_read(built, config_dtype(config.data)))


def _read(built: Built, dtype: str) -> list[ExpectedTensor]:
    from torch import nn

    first: dict[int, str] = {}
    tensors = []
    for raw, tensor in built.module.state_dict(keep_vars=True).items():
        name = _renamed(raw, built.renames)
        alias_of = first.setdefault(id(tensor), name)
        group, base, in_checkpoint = built.classify(name, alias_of != name)
        if alias_of != name:
            group, base, _ = built.classify(alias_of, False)
        tensors.append(
            ExpectedTensor(
                name=name,
                dtype=_dtype_of(tensor, dtype),
                shape=tuple(tensor.shape),
                kind="parameter" if isinstance(tensor, nn.Parameter) else "buffer",
                alias_of=alias_of if alias_of != name else None,
                group=group,
                base=base,
                in_checkpoint=in_checkpoint,
            )
        )
    return tensors


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for before, after in renames.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _dtype_of(tensor: torch.Tensor, wanted: str) -> str:
    name = TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")].name
    return wanted if DTYPES[name].is_real_float else name


# --- Flamingo -------------------------------------------------------------------------------------


def _flamingo(config: ModelConfig, layout: str, module: nn.Module) -> Built:
    _, family, layers = language_config(config)
    embedding = _embedding_name(module.get_submodule("lang_encoder"))
    return Built(
        module=module,
        renames=_flamingo_renames(family, layout),
        classify=_flamingo_classes(f"lang_encoder.{layers}.", embedding, layout, family),
    )


def _embedding_name(language: Any) -> str:
    """The name of the input embedding's weight, from the model itself."""
    weight = language.get_input_embeddings().weight
    return next(str(name) for name, one in language.named_parameters() if one is weight)


def _flamingo_renames(family: Family | None, layout: str) -> dict[str, str]:
    renames = {}
    if family is not None and family.name == "gpt_neox":
        # transformers called it `embed_out` until 5.13, as every file does to this day.
        renames["lang_encoder.lm_head."] = "lang_encoder.embed_out."
    if layout == "openflamingo-v1":
        # Version 1 kept the whole CLIP, of which a Flamingo uses the vision tower.
        renames["vision_encoder."] = "vision_encoder.visual."
    if layout == "hf-flamingo":
        # transformers dropped the level in memory in 5.6; published files have it, and files with
        # it load in every version.
        renames["vision_encoder.vision_model."] = "vision_encoder.vision_model."
        renames["vision_encoder."] = "vision_encoder.vision_model."
    return renames


def _flamingo_classes(layers: str, embedding: str, layout: str, family: Family | None) -> Classify:
    embedding = f"lang_encoder.{embedding}"

    def group_of(name: str) -> tuple[str, str | None]:
        if name.startswith("vision_encoder."):
            return "vision", "vision"
        if name.startswith("perceiver."):
            return "perceiver", None
        if name == embedding:
            return "lm.embed", None
        if not name.startswith(layers):
            return "lm.rest", "language"
        part = name.removeprefix(layers).split(".")[1]
        return ("lm.layers", "language") if part == "decoder_layer" else ("xattn", None)

    def released(name: str, group: str, is_alias: bool) -> bool:
        if layout == "hf-flamingo":
            return not is_alias  # `save_pretrained` writes tied weights once
        if name.startswith(ALIAS_TREES):
            return layout == "openflamingo-v1"
        if is_alias:
            # A tied head is in no list of parameters, so upstream's filter never drops it. The
            # releases come from MosaicML's classes, though, where MPT's head has no name.
            return family is None or family.name != "mpt"
        if group in ("perceiver", "xattn", "lm.embed"):
            return True
        # Upstream's version 2 takes whatever has `embed` in its name for an embedding.
        return layout == "openflamingo" and group.startswith("lm.") and "embed" in name

    def classify(name: str, is_alias: bool) -> tuple[str, str | None, bool]:
        group, base = group_of(name)
        return group, base, released(name, group, is_alias)

    return classify


# --- the others -----------------------------------------------------------------------------------


def _open_clip(config: ModelConfig, layout: str, module: nn.Module) -> Built:  # noqa: ARG001
    return Built(module=module, renames={}, classify=_clip_classes)


def _hf_clip(config: ModelConfig, layout: str, module: nn.Module) -> Built:  # noqa: ARG001
    renames: dict[str, str] = {}
    if config.kind == "clip_vision":
        keep = ("vision_model.", "visual_projection.")
        renames = {**{prefix: prefix for prefix in keep}, "": "vision_model."}
    return Built(module=module, renames=renames, classify=_clip_classes)


def _clip_classes(name: str, is_alias: bool) -> tuple[str, str | None, bool]:
    if name in ("logit_scale", "logit_bias"):
        return "logits", None, not is_alias
    is_vision = name.startswith(("visual.", "vision_model.", "visual_projection."))
    return ("vision" if is_vision else "text"), None, not is_alias


def _paligemma(config: ModelConfig, layout: str, module: nn.Module) -> Built:  # noqa: ARG001
    return Built(
        module=module,
        # From the names in memory to those of the hub, which every version reads.
        renames={
            "model.vision_tower.vision_model.": "vision_tower.vision_model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        },
        classify=_paligemma_classes,
    )


def _paligemma_classes(name: str, is_alias: bool) -> tuple[str, str | None, bool]:
    groups = {
        "vision_tower.": "vision",
        "multi_modal_projector.": "projector",
        "language_model.model.embed_tokens.": "lm.embed",
        "language_model.model.layers.": "lm.layers",
        "language_model.": "lm.rest",
    }
    group = next(group for prefix, group in groups.items() if name.startswith(prefix))
    return group, None, not is_alias


def _language(config: ModelConfig, layout: str, module: nn.Module) -> Built:  # noqa: ARG001
    _, family, layers = language_config(config)
    embedding = _embedding_name(module)

    def classify(name: str, is_alias: bool) -> tuple[str, str | None, bool]:
        group = "lm.embed" if name == embedding else "lm.rest"
        return ("lm.layers" if name.startswith(f"{layers}.") else group), None, not is_alias

    is_neox = family is not None and family.name == "gpt_neox"
    renames = {"lm_head.": "embed_out."} if is_neox else {}
    return Built(module=module, renames=renames, classify=classify)


_READERS: Mapping[str, Callable[[ModelConfig, str, nn.Module], Built]] = {
    "openflamingo": _flamingo,
    "openflamingo-v1": _flamingo,
    "hf-flamingo": _flamingo,
    "open_clip": _open_clip,
    "hf-clip": _hf_clip,
    "paligemma": _paligemma,
    "language-model": _language,
}
