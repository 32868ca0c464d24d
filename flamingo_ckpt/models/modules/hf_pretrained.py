"""Loading and saving of the Hugging Face port: transformers' machinery, held to its word.

transformers reports what is missing in a log and goes on with random weights, lets the history of
an object decide under which names it is saved, and unpickles. None of that happens here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers.initialization as init
from torch import nn
from transformers import CLIPVisionModel, GPTNeoXForCausalLM, PreTrainedModel

from flamingo_ckpt.errors import CkptError, LoadError, name_some
from flamingo_ckpt.formats.opening import open_checkpoint
from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock
from flamingo_ckpt.models.modules.hf_config import FlamingoConfig
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler

_ONE_FILE = "model{variant}.safetensors"
_INDEX = "model.safetensors.index{variant}.json"
_TOWER_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
#: transformers called GPT-NeoX's head `embed_out` until 5.13; files do to this day.
_HEAD_IN_FILES = "lang_encoder.embed_out."
_HEAD = "lang_encoder.lm_head."


class FlamingoPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the ports share that is not arithmetic: names, initial values, loading, saving."""

    config_class: type[FlamingoConfig] = FlamingoConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    #: `from_pretrained(device_map=...)` keeps these in one place each.
    _no_split_modules = [  # noqa: RUF012
        *(CLIPVisionModel._no_split_modules or ()),
        "FlamingoLayer",
        "PerceiverResampler",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    #: Buffers of older files that every model computes for itself.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^vision_encoder\.(vision_model\.)?embeddings\.position_ids$",
        *(
            rf"^lang_encoder\.{re.escape(family.layers)}\.\d+\.decoder_layer\.{re.escape(leaf)}$"
            for family in FAMILIES.values()
            for leaf in family.buffers
        ),
    ]

    def _init_weights(self, module: nn.Module) -> None:
        """The values that the parts of a Flamingo start from: torch's, and gates that are shut."""
        if isinstance(module, PerceiverResampler):
            for table in (module.latents, module.frame_embs, module.media_time_embs):
                if table is not None:
                    init.normal_(table)
        elif isinstance(module, GatedCrossAttentionBlock):
            init.zeros_(module.attn_gate)
            init.zeros_(module.ff_gate)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def initialize_weights(self) -> None:
        """As transformers', where the gated blocks would get what their language model gives."""
        with torch.no_grad():
            for part in self._own_parts():
                for module in part.modules():
                    self._initialize_weights(module)
        super().initialize_weights()  # type: ignore[no-untyped-call]

    def _own_parts(self) -> Iterator[nn.Module]:
        yield from (
            module
            for module in self.modules()
            if isinstance(module, PerceiverResampler | GatedCrossAttentionBlock)
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a folder or a repository of the hub; what does not fit raises.

        Args:
            pretrained_model_name_or_path: a folder with `config.json` and safetensors, as
                `flamingo-ckpt convert --to hf-flamingo` makes it, or the name of a repository.
            *model_args: transformers' own.
            output_loading_info: give `(model, info)` and leave it to the caller to judge what was
                missing or unexpected, as transformers does.
            ignore_mismatched_sizes: start afresh what has another shape in the file.
            **kwargs: transformers' own (`dtype`, `device_map`, `attn_implementation`, `revision`,
                ...), and fields of the config, such as `media_token_id`.

        Raises:
            LoadError: FC430 where a tensor is missing, left over or of another shape.
            CkptError: FC202 where two tensors have one name, FC104 or FC107 where index and shards
                disagree, FC466 for a `device_map` without accelerate, FC467 where the weights could
                only be unpickled, FC469 where config and file disagree about a tied head.
        """
        where = str(pretrained_model_name_or_path)
        _check_arguments(where, kwargs)
        mapping = {**(kwargs.pop("key_mapping", None) or {}), **_names_in_memory()}
        load: Any = super().from_pretrained
        model, info = load(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            key_mapping=mapping,
            **{name: value for name, value in kwargs.items() if name != "use_safetensors"},
        )
        # Names are put back by `save_pretrained` below, whatever this object's past.
        model._weight_conversions = None
        _check_files(where, kwargs, mapping)
        _check_fit(
            {} if output_loading_info else info,
            () if ignore_mismatched_sizes else info["mismatched_keys"],
            where,
        )
        _check_ties(model, where)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write the folder under the published names, the same for every object.

        Tied weights are written once, and GPT-NeoX's head is `embed_out`. A file of an earlier
        save, which `from_pretrained` would prefer, is removed.

        Args:
            save_directory: the folder; made where there is none.
            is_main_process: whether this process writes.
            state_dict: what to write instead of the model's own.
            *args: transformers' own.
            **kwargs: transformers' own (`max_shard_size`, `variant`, ...).

        Raises:
            CkptError: FC006 for `safe_serialization=False`: no pickle is written.
        """
        if kwargs.get("safe_serialization") is False:  # which transformers no longer looks at
            raise CkptError(
                "`safe_serialization` is False, but no pickle is written here",
                code="FC006",
                where=os.fspath(save_directory),
                hint="leave it out: the folder gets safetensors",
            )
        if _is_offloaded(self):  # the tensors come back under the names in memory
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        else:
            tensors = self.state_dict() if state_dict is None else state_dict
            named = _names_in_files(tensors, self.all_tied_weights_keys)
            kwargs["save_original_format"] = False
            super().save_pretrained(save_directory, is_main_process, named, *args, **kwargs)
        if is_main_process:
            _remove_stale(os.fspath(save_directory), kwargs.get("variant"))


def _check_arguments(where: str, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("device_map") is not None and importlib.util.find_spec("accelerate") is None:
        raise CkptError(
            "`device_map` needs accelerate, which is not installed",
            code="FC466",
            where=where,
            hint="`pip install flamingo-ckpt[accelerate]`, or leave `device_map` out and call "
            "`.to(device)`",
        )
    if kwargs.get("trust_remote_code"):
        raise CkptError("code that a model brings is not run", code="FC467", where=where)
    folder = os.path.join(where, kwargs.get("subfolder") or "")
    is_file = os.path.isfile(where) and not where.endswith(".safetensors")
    if kwargs.get("use_safetensors") is False or is_file or _has_pickles_only(folder):
        raise CkptError(
            "the weights are pickled, and nothing is unpickled here",
            code="FC467",
            where=where,
            hint="`flamingo-ckpt convert` reads them safely and writes a folder of safetensors: "
            f"flamingo-ckpt convert {where} NEW --to hf-flamingo",
        )


def _has_pickles_only(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    names = os.listdir(folder)
    for name in names:
        if name.endswith(".safetensors.index.json"):
            with open(os.path.join(folder, name), "rb") as file:
                shards = json.load(file).get("weight_map", {}).values()
            if not all(str(shard).endswith(".safetensors") for shard in shards):
                return True
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    return bool(weights) and not any(name.endswith(".safetensors") for name in weights)


def _check_files(where: str, kwargs: Mapping[str, Any], mapping: Mapping[str, str]) -> None:
    """Raise where transformers has chosen between two tensors, or not looked what an index names.

    It says nothing then. What it has fetched from the hub is read from the hub's cache.
    """
    path = _weights_file(where, kwargs)
    if path is None:
        return
    first: dict[str, str] = {}
    for stored in (tensor.name for tensor in open_checkpoint(path).tensors):
        name = stored
        for pattern, replacement in mapping.items():
            name = re.sub(pattern, replacement, name)
        if (other := first.setdefault(name, stored)) != stored:
            raise CkptError(
                f"`{other}` and `{stored}` are both `{name}`",
                code="FC202",
                where=path,
                key=stored,
                hint="take one of the two out of the file",
            )


def _weights_file(where: str, kwargs: Mapping[str, Any]) -> str | None:
    """The file or index that transformers reads; None where the config names another."""
    if os.path.isfile(where):
        return where
    variant, subfolder = kwargs.get("variant"), kwargs.get("subfolder") or ""
    suffix = "" if variant is None else f".{variant}"
    for name in (_ONE_FILE.format(variant=suffix), _INDEX.format(variant=suffix)):
        path: Any = os.path.join(where, subfolder, name)
        if not os.path.isdir(where):
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(
                where,
                f"{subfolder}/{name}" if subfolder else name,
                cache_dir=kwargs.get("cache_dir"),
                revision=kwargs.get("revision"),
            )
        if isinstance(path, str) and os.path.isfile(path):
            return path
    return None


def _names_in_memory() -> dict[str, str]:
    """Pattern of a name in a file -> what the classes of the installed transformers call it."""
    tower = {
        rf"^vision_encoder\.{part}\.": f"vision_encoder.vision_model.{part}."
        for part in _TOWER_PARTS
    }
    head, other = _HEAD, _HEAD_IN_FILES
    if not _has_lm_head():
        head, other = other, head
    return {**tower, "^" + other.replace(".", r"\."): head}


def _has_lm_head() -> bool:
    return "lm_head.weight" in (GPTNeoXForCausalLM._tied_weights_keys or ())


def _names_in_files(
    tensors: Mapping[str, torch.Tensor], tied: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    once = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name in tied and _is_same(tensor, tensors.get(tied[name])))
    }
    is_neox = any(name.startswith("lang_encoder.gpt_neox.") for name in once)
    if not is_neox:
        return once
    return {
        _HEAD_IN_FILES + name.removeprefix(_HEAD) if name.startswith(_HEAD) else name: tensor
        for name, tensor in once.items()
    }


def _is_same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _is_offloaded(model: nn.Module) -> bool:
    return any(place in ("cpu", "disk") for place in getattr(model, "hf_device_map", {}).values())


def _check_fit(info: Mapping[str, Any], mismatched: Any, where: str) -> None:
    """Raise unless every tensor of model and file found its other."""
    missing, unexpected = (
        sorted(info.get(f"{what}_keys", ())) for what in ("missing", "unexpected")
    )
    shapes = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in mismatched]
    told = [
        f"{len(names)} {what}: {name_some(names, where='')}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if shapes:
        told.append(f"{len(shapes)} of another shape: {name_some(sorted(shapes), where='')}")
    if told:
        raise LoadError(
            "the weights do not fit the model: " + "; ".join(told),
            code="FC430",
            where=where,
            hint="`flamingo-ckpt diff FOLDER model:FOLDER/config.json` compares the two; a partial "
            "folder is completed by `flamingo-ckpt convert` with `--base-vision` and "
            "`--base-language`",
        )


def _check_ties(model: PreTrainedModel, where: str) -> None:
    """A config that ties a head which the file holds with other values is wrong about the model."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            raise CkptError(
                f"the config ties `{target}` to `{source}`, but the weights have both, and they "
                "differ",
                code="FC469",
                where=where,
                key=target,
                hint="set `tie_word_embeddings` to false in `text_config` of config.json",
            )


def _remove_stale(folder: str, variant: str | None) -> None:
    """Of one file and an index, both there, one is of an earlier save."""
    suffix = "" if variant is None else f".{variant}"
    one, index = (os.path.join(folder, name.format(variant=suffix)) for name in (_ONE_FILE, _INDEX))
    if not (os.path.isfile(one) and os.path.isfile(index)):
        return
    with open(index, "rb") as file:
        shards = set(json.load(file)["weight_map"].values())
    # transformers removes the shards of an earlier save, and leaves the index that names them
    is_sharded = all(os.path.isfile(os.path.join(folder, shard)) for shard in shards)
    os.remove(one if is_sharded else index)
