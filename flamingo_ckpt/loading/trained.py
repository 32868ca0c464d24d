"""Which tensors of a model belong in a checkpoint of its training, and under which names.

The rule is that of OpenFlamingo's `filter_state_dict_to_trainable` (open_flamingo 2.0.1): without
what is frozen, but with every embedding, and each tensor of the two alias trees under its one name.
Where its outcome depends on chance, ours does not: the input embedding is kept whatever its name
(upstream loses a frozen `wte`), GPT-NeoX's head is kept under the name that every release gives it
(`embed_out`; upstream loses it where transformers calls it `lm_head`), and a vision tower that is
trained is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.memory_source import identity
from flamingo_ckpt.models.expectation import ALIAS_TREES
from flamingo_ckpt.selection import Dropped

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOWER = "vision_encoder."
# Put between names by `torch.compile` and by activation checkpointing. `module.` is not among them:
# it may be the name of a real submodule, and a wrapper that adds it is known by its class.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The tensors of a checkpoint.

    Attributes:
        tensors: (name, tensor) in the model's order; a tied tensor occurs once for each name, its
            canonical one first.
        dropped: what is left out, with reasons.
    """

    tensors: tuple[tuple[str, torch.Tensor], ...]
    dropped: tuple[Dropped, ...]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without DDP, DataParallel or `torch.compile` around it.

    Raises:
        CkptError: FC461 where a part of it is wrapped by FSDP1, which splits parameters in a way
            that their tensors do not tell.
    """
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel

    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise CkptError(
            "the model is wrapped by FSDP1, whose parameters are flat pieces",
            code="FC461",
            hint="split it with `flamingo_ckpt.models.shard_model`, which is FSDP2",
        )
    return model


def parameter_names(model: nn.Module) -> dict[int, str]:
    """`id` of each parameter -> the name that a checkpoint gives it."""
    names: dict[int, str] = {}
    for name, tensor in named_state(model):
        names.setdefault(id(tensor), name)
    return names


def named_state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The state dict with canonical names first where a tensor has several.

    Wrappers are removed from the names, GPT-NeoX's head in a Flamingo is `embed_out`.
    """
    state = [
        (_plain(name), _checked(name, tensor))
        for name, tensor in unwrapped(model).state_dict(keep_vars=True).items()
    ]
    if any(name.startswith("lang_encoder.gpt_neox.") for name, _ in state):
        state = [(_as_released(name), tensor) for name, tensor in state]
    # A sort keeps the order among equals, so the alias trees go last and nothing else moves.
    return sorted(state, key=lambda item: item[0].startswith(ALIAS_TREES))


def choose(model: nn.Module, *, trainable_only: bool) -> Trained:
    """The tensors of a checkpoint of this model.

    Args:
        model: a Flamingo, or any other: then what is trained are the parameters that require a
            gradient.
        trainable_only: leave out what is frozen.

    Raises:
        CkptError: FC462 where nothing is trained, or where a second name has a tensor of its own.
    """
    state = named_state(model)
    kept_ids = _kept(unwrapped(model), state) if trainable_only else None
    tensors: list[tuple[str, torch.Tensor]] = []
    dropped: list[Dropped] = []
    first: dict[object, str] = {}
    for name, tensor in state:
        known = first.setdefault(identity(tensor), name)
        if name.startswith(ALIAS_TREES):
            if known == name:
                raise _strayed(name)
            dropped.append(Dropped(name=name, reason=f"a second name of `{known}`"))
        elif kept_ids is not None and id(tensor) not in kept_ids:
            dropped.append(Dropped(name=name, reason="not trained"))
        else:
            tensors.append((name, tensor))
    if not tensors:
        raise CkptError(
            "nothing in the model is trained: no parameter requires a gradient",
            code="FC462",
            hint="`trainable_only=False` saves the whole model",
        )
    return Trained(tensors=tuple(tensors), dropped=tuple(dropped))


def _checked(name: str, value: Any) -> torch.Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        return value
    raise CkptError(
        f"`{name}` in the model's state dict is no tensor but of the type `{type(value).__name__}`",
        code="FC306",
        key=name,
        hint="a checkpoint of weights has no place for a module's extra state",
    )


def _plain(name: str) -> str:
    *path, leaf = name.split(".")
    return ".".join((*(part for part in path if part not in _WRAPPERS), leaf))


def _as_released(name: str) -> str:
    head = "lang_encoder.lm_head."
    return f"lang_encoder.embed_out.{name.removeprefix(head)}" if name.startswith(head) else name


def _kept(model: nn.Module, state: list[tuple[str, torch.Tensor]]) -> set[int]:
    """`id` of every tensor that training changes, or that no base has."""
    from torch import nn

    trained = {name: tensor.requires_grad for name, tensor in state if _is_parameter(tensor)}
    kept = {id(tensor) for name, tensor in state if trained.get(name)}
    language = getattr(model, "lang_encoder", None)
    if isinstance(language, nn.Module):
        # Added tokens have rows that no base has, so embeddings are kept even where frozen.
        kept |= {
            id(tensor)
            for name, tensor in state
            if "embed" in name and name in trained and not name.startswith((_TOWER, *ALIAS_TREES))
        }
        embedding = getattr(language, "get_input_embeddings", lambda: None)()
        if embedding is not None:
            kept.add(id(embedding.weight))
    return kept | _living_buffers(state, trained)


def _is_parameter(tensor: torch.Tensor) -> bool:
    from torch import nn

    return isinstance(tensor, nn.Parameter)


def _living_buffers(state: list[tuple[str, torch.Tensor]], trained: Mapping[str, bool]) -> set[int]:
    """Buffers that change with training, as running means do: those beside trained parameters.

    What decides is the innermost module around the buffer that has parameters at all.
    """
    below: dict[str, bool] = {}
    for name, is_trained in trained.items():
        for prefix in _ancestors(name):
            below[prefix] = below.get(prefix, False) or is_trained
    return {
        id(tensor)
        for name, tensor in state
        if name not in trained
        and below.get(next((prefix for prefix in _ancestors(name) if prefix in below), ""), False)
    }


def _ancestors(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b`, `a`, and the empty name of the whole."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _strayed(name: str) -> CkptError:
    return CkptError(
        f"`{name}` should be a second name of a tensor, and is a tensor of its own",
        code="FC462",
        key=name,
        hint="a layer was replaced in one of two places: put the same module in both",
    )
