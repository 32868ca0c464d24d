"""Split a Flamingo over processes with FSDP2: what upstream's `wrap_fsdp` does with FSDP1.

FSDP2 splits each parameter by itself and leaves modules and names as they are. So frozen and
trained parameters may stand side by side, both alias trees keep naming the same modules, and a
checkpoint has the same keys as without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from flamingo_ckpt.errors import CkptError

# Ways into a Flamingo besides `forward`. Whatever computes first would become the root otherwise.
_ENTRIES = ("generate", "cache_media")


def shard_model(model: nn.Module, mesh: Any = None, *, mp_policy: Any = None) -> nn.Module:
    """Split the parameters of a Flamingo over the processes of a mesh; returns the same model.

    Units, each gathered when it computes and split again afterwards: the vision tower, the
    resampler, every gated block, every decoder layer, input and output embedding where they are
    two, what else the language model has, and the rest. Split the model before the optimizer is
    made: it has to hold the split parameters.

    Args:
        model: on the device of the mesh, or on meta, to be filled by a loader.
        mesh: a `DeviceMesh`; by default one dimension over all processes of the default group.
        mp_policy: a `torch.distributed.fsdp.MixedPrecisionPolicy`.

    Raises:
        CkptError: FC461 where there is no process group, or the model is split already.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if any(isinstance(part, FSDPModule) for part in model.modules()):
        raise CkptError("the model is split already", code="FC461")
    options: dict[str, Any] = {
        "mesh": _default_mesh(model) if mesh is None else mesh,
        "mp_policy": MixedPrecisionPolicy() if mp_policy is None else mp_policy,
    }
    for unit in _units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for name in _ENTRIES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    language: Any = getattr(model, "lang_encoder", None)
    if language is not None:
        # transformers' own mark: its `generate` then goes on until every process has finished.
        language._is_fsdp_managed_module = True
    return model


def _units(model: nn.Module) -> Iterable[nn.Module]:
    """The modules that are gathered by themselves, inner before outer."""
    for name in ("vision_encoder", "perceiver"):
        unit = getattr(model, name, None)
        if isinstance(unit, nn.Module):
            yield unit
    language = getattr(model, "lang_encoder", None)
    if not isinstance(language, nn.Module):
        return
    for part in language.modules():
        # The wrapped layers, whatever their class: upstream's `FlamingoLayer` or ours.
        decoder = getattr(part, "decoder_layer", None)
        if isinstance(decoder, nn.Module):
            gated = getattr(part, "gated_cross_attn_layer", None)
            yield from (one for one in (gated, decoder) if isinstance(one, nn.Module))
    yield from _embeddings(language)
    yield language


def _embeddings(language: nn.Module) -> Iterable[nn.Module]:
    """Input and output embedding, where each has a weight and a forward of its own.

    A tied weight, or one that a model multiplies with outside of any module, has to be gathered as
    long as the language model computes.
    """
    into = getattr(language, "get_input_embeddings", lambda: None)()
    out = getattr(language, "get_output_embeddings", lambda: None)()
    if isinstance(into, nn.Module) and isinstance(out, nn.Module) and into.weight is not out.weight:
        yield into
        yield out


def _default_mesh(model: nn.Module) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_available() or not dist.is_initialized():
        raise CkptError(
            "there is no process group to split the model over",
            code="FC461",
            hint="start with `torchrun` and call `torch.distributed.init_process_group()` first",
        )
    kind = next(model.parameters()).device.type
    if kind == "meta":
        accelerator = torch.accelerator.current_accelerator()
        kind = "cpu" if accelerator is None else accelerator.type
    return init_device_mesh(kind, (dist.get_world_size(),))
