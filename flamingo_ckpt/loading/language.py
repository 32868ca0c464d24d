"""Language models for a Flamingo: built from a config by known classes, filled from files.

No code from a folder or repository is run, and no pickle: a config that names its own code
(`auto_map`) is read for its sizes alone.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.places import (
    HF_WEIGHTS,
    Access,
    config_folder,
    fetch_weights,
    local_path,
)
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flamingo_ckpt.models.config import ModelConfig

#: Of rows for new tokens, where a config has no `initializer_range`.
_STD: Final = 0.02
#: The rows of new tokens are the same in every construction: one seed for each matrix.
_EMBEDDING_SEED, _HEAD_SEED = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A language model with what a Flamingo asks of it.

    Attributes:
        module: the causal language model, in evaluation mode.
        layers: path of its decoder layers, such as `model.layers`.
        config: its config, with the rows that the file has.
    """

    module: nn.Module
    layers: str
    config: Mapping[str, Any]


def load_language_model(
    path: str,
    access: Access,
    *,
    decoder_layers_attr_name: str | None = None,
    device: str | torch.device | None = None,
) -> LanguageModel:
    """Build a causal language model from its config and fill it from its files, in float32.

    Args:
        path: a folder with `config.json` and weights (safetensors or `.bin`, one file or shards
            with their index), or a repository of the hub with them.
        access: how files are looked for.
        decoder_layers_attr_name: path of the decoder layers; needed for a family that is not
            known, which then is built by the class that transformers has for its `model_type`.
        device: where to put it; None is the CPU.

    Raises:
        CkptError: FC450 no such place, FC403 a family that nobody here knows, FC453 no list of
            layers at the path; what the config check, the hub and the loading engine raise:
            a missing weight is an error.
    """
    folder = config_folder(path, access, "language model")
    config = _config(folder, decoder_layers_attr_name)
    is_local = local_path(path, "language model") is not None
    weights = folder if is_local else fetch_weights(path, folder, access, HF_WEIGHTS)
    module, layers = _build(config)
    _fill(module, weights, device)
    _take_generation_config(module, folder, config.data)
    return LanguageModel(module=module.eval(), layers=layers, config=config.data)


def _config(folder: str, layers: str | None) -> ModelConfig:
    from flamingo_ckpt.models.config import config_in, parse_config, read_json

    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return config_in(folder)  # which says what is missing
    data = read_json(path)
    if layers is not None and isinstance(data, dict):
        data = {**data, "decoder_layers_attr_name": layers}
    config = parse_config(data, path)
    if config.kind != "language":
        raise CkptError(
            f"`model_type` is `{escape(str(config.data.get('model_type')))}`, which is no causal "
            "language model",
            code="FC403",
            where=path,
            hint="`load_pretrained` loads a whole Flamingo into one that was created before",
        )
    return config


def _build(config: ModelConfig) -> tuple[nn.Module, str]:
    import torch

    from flamingo_ckpt.loading.buffers import hopeless_buffers
    from flamingo_ckpt.models.assemble import assemble, language_config

    _, _, layers = language_config(config)
    module = assemble(config, "language-model", device="meta")
    if hopeless_buffers(module):  # of a class that only itself knows how to compute them
        module = assemble(config, "language-model", device="cpu")
    try:
        decoders = module.get_submodule(layers)
    except AttributeError:
        decoders = None
    if not isinstance(decoders, torch.nn.ModuleList):
        raise CkptError(
            f"`{escape(layers)}` is no list of layers of a {type(module).__name__}",
            code="FC453",
            where=config.where,
            hint="`decoder_layers_attr_name` is its path, such as `model.layers`; the lists are "
            + ", ".join(_lists(module)),
        )
    return module, layers


def _lists(module: nn.Module) -> list[str]:
    from torch import nn

    return [f"`{name}`" for name, one in module.named_modules() if isinstance(one, nn.ModuleList)]


def _fill(module: nn.Module, weights: str, device: str | torch.device | None) -> None:
    """Everything has to be there, and nothing else but what the class itself calls obsolete."""
    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.layouts.prefixes import strip_wrappers
    from flamingo_ckpt.loading.engine import load_into
    from flamingo_ckpt.loading.options import LoadOptions

    manifest = open_checkpoint(weights)
    names = {tensor.name: strip_wrappers(tensor.name)[0] for tensor in manifest.tensors}
    target = _as_named(module, list(names.values()))
    own = target.state_dict().keys()
    obsolete = [
        key for key, name in names.items() if name not in own and _is_obsolete(module, name)
    ]
    exclude = tuple(glob.escape(key) for key in obsolete)
    load_into(target, manifest, LoadOptions(device=device, exclude=exclude))


def _is_obsolete(module: Any, name: str) -> bool:
    """Whether the class says that files have it and the model has not, as with GPT-2's masks."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(one, name) for one in patterns)


def _as_named(module: Any, names: Sequence[str]) -> nn.Module:
    """The model, or the same parts under the names of a file that was saved without its head.

    Such files (OPT's, GPT-2's and BLOOM's are some) have `decoder.` in place of `model.decoder.`.
    """
    from torch import nn

    base = str(getattr(module, "base_model_prefix", ""))
    inner = dict(module.named_children()).get(base)
    if inner is None or any(name.startswith(f"{base}.") for name in names):
        return module  # type: ignore[no-any-return]
    parts = dict(inner.named_children())
    if list(inner.named_parameters(recurse=False)) or not any(
        name.partition(".")[0] in parts for name in names
    ):
        return module  # type: ignore[no-any-return]
    others = {name: part for name, part in module.named_children() if name != base}
    holder = type(type(module).__name__, (nn.ModuleDict,), {})  # messages tell its name
    return holder({**others, **parts})  # type: ignore[no-any-return]


def _take_generation_config(module: Any, folder: str, data: Mapping[str, Any]) -> None:
    """What `generate` goes by, as `from_pretrained` takes it from a folder."""
    from transformers import GenerationConfig

    from flamingo_ckpt.models.config import read_json

    if getattr(module, "generation_config", None) is None:
        return
    path = os.path.join(folder, "generation_config.json")
    if os.path.isfile(path):
        document = read_json(path)
        try:
            module.generation_config = GenerationConfig.from_dict(
                {name: value for name, value in document.items() if not _is_no_token(name, value)}
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise CkptError(
                "the generation config cannot be used: "
                + escape((str(error).splitlines() or [""])[0])[:300],
                code="FC401",
                where=path,
                hint="correct it, or remove the file",
            ) from error
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(data.get(name), int) and not _is_no_token(name, data[name]):
            setattr(module.generation_config, name, data[name])


def _is_no_token(name: str, value: object) -> bool:
    """LLaMA 1 says -1 where it has no such token."""
    return name.endswith("_token_id") and isinstance(value, int) and value < 0


def resize_rows(module: Any, num_rows: int) -> None:
    """Give the embedding, and a head that is not tied to it, `num_rows` rows.

    Fewer rows are a cut. New rows are random, but the same in every construction: normal numbers
    (standard deviation `initializer_range`, or 0.02) from a generator of their own; new elements
    of a head's bias are zero. Released checkpoints bring trained rows for the embedding and none
    for the head, so that scores of new tokens mean nothing until the head is trained.

    Args:
        module: a causal language model.
        num_rows: `len(tokenizer)`.
    """
    before = int(module.get_input_embeddings().weight.shape[0])
    if before == num_rows:
        return
    module.resize_token_embeddings(num_rows, mean_resizing=False)
    if num_rows < before:
        return
    std = getattr(getattr(module, "config", None), "initializer_range", None) or _STD
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    _fill_rows(embedding.weight, before, std, _EMBEDDING_SEED)
    if head is None or head.weight is embedding.weight:
        return
    _fill_rows(head.weight, before, std, _HEAD_SEED)
    if getattr(head, "bias", None) is not None:
        head.bias.data[before:] = 0


def _fill_rows(weight: torch.Tensor, first: int, std: float, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (weight.shape[0] - first, weight.shape[1])
    rows = torch.randn(shape, generator=generator, dtype=torch.float32) * std
    weight.data[first:] = rows.to(weight)
