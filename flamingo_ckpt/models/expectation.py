"""What should be in a checkpoint of a model: names, shapes and dtypes, without a byte of weights.

The answer comes from a model that is really constructed (on torch's meta device: no memory), and is
kept on disk, so that the next time needs neither torch nor a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.config import ModelConfig
from flamingo_ckpt.tensors import DTYPES, TensorInfo

#: kind of model -> the key layouts it can be expected in, its own first.
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "flamingo": ("openflamingo", "openflamingo-v1", "hf-flamingo"),
    "clip": ("open_clip", "hf-clip"),
    "clip_vision": ("hf-clip",),
    "paligemma": ("paligemma",),
    "language": ("language-model",),
}
#: OpenFlamingo registers two lists of layers under a second name: full state dicts have both.
ALIAS_TREES = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """One name of a model's state dict.

    Attributes:
        name: in the key layout of the expectation.
        dtype: as safetensors spells it.
        shape: logical shape.
        kind: `parameter` or `buffer`.
        alias_of: the name that the model registers the same tensor under first, or None.
        group: `vision`, `text`, `perceiver`, `xattn`, `lm.embed`, `lm.layers` or `lm.rest`
            (`projector` for PaliGemma's, `logits` for the scale and bias of CLIP's).
        base: which base model can supply it, `vision` or `language`; None where none can, because
            it is trained. Frozen tensors are absent from OpenFlamingo's releases by design.
        in_checkpoint: whether a release in this layout holds the name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    alias_of: str | None
    group: str
    base: str | None
    in_checkpoint: bool

    def info(self) -> TensorInfo:
        """The same as a header fact without bytes."""
        return TensorInfo(name=self.name, dtype=DTYPES[self.dtype], shape=self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Everything that a state dict of a model has, in the model's own order.

    Attributes:
        layout: the key layout of the names.
        tensors: every name, aliases included.
    """

    layout: str
    tensors: tuple[ExpectedTensor, ...]

    def by_name(self) -> dict[str, ExpectedTensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def canonical(self) -> list[ExpectedTensor]:
        """Each tensor once, under the name that the model registers first."""
        return [tensor for tensor in self.tensors if tensor.alias_of is None]

    def released(self) -> list[ExpectedTensor]:
        """The parameters that a release holds, each once."""
        return [t for t in self.canonical() if t.in_checkpoint and t.kind == "parameter"]

    def tied_groups(self) -> list[list[str]]:
        """Names of tied weights, such as embedding and head, without `ALIAS_TREES`."""
        groups: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.alias_of is not None and not tensor.name.startswith(ALIAS_TREES):
                groups.setdefault(tensor.alias_of, [tensor.alias_of]).append(tensor.name)
        return list(groups.values())

    def alias_trees(self) -> dict[str, int]:
        """OpenFlamingo's second names for whole lists of layers: path -> number of names."""
        trees = {tree: sum(t.name.startswith(tree) for t in self.tensors) for tree in ALIAS_TREES}
        return {tree.rstrip("."): number for tree, number in trees.items() if number}

    def summary(self) -> dict[str, Any]:
        """Counts: of the model, and of what a release of it holds."""
        tensors, released = self.canonical(), self.released()
        infos = [tensor.info() for tensor in tensors]
        dtypes: dict[str, int] = {}
        for info in infos:
            dtypes[info.dtype.name] = dtypes.get(info.dtype.name, 0) + 1
        return {
            "num_tensors": len(tensors),
            "num_parameters": sum(t.info().num_elements for t in tensors if t.kind == "parameter"),
            "num_bytes": sum(info.num_bytes for info in infos),
            "dtypes": dtypes,
            "tied_groups": len(self.tied_groups()),
            "num_checkpoint_tensors": len(released),
            "num_checkpoint_parameters": sum(t.info().num_elements for t in released),
        }


def expect(config: ModelConfig, layout: str | None = None) -> Expectation:
    """What a model's state dict has.

    Args:
        config: the model.
        layout: the key layout wanted; by default that of the model's releases.

    Raises:
        CkptError: FC405 where the model cannot be constructed or has no form in the layout.
    """
    from flamingo_ckpt.models import cache

    layout = layout or config.layout
    known = LAYOUTS.get(config.kind, ())
    if layout not in known:
        raise CkptError(
            f"a {config.kind} model has no form in the layout `{layout}`; it has: "
            + (", ".join(known) or "none, its config only tells numbers of heads"),
            code="FC405",
            where=config.where,
        )
    entry = cache.entry_for(config.digest, layout)
    found = cache.load(entry, layout)
    if found is None:
        from flamingo_ckpt.models.construct import construct

        found = Expectation(layout=layout, tensors=construct(config, layout))
        cache.store(entry, found)
    return found
