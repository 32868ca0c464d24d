"""A side as a module without weights, and every weight of it within reach.

The module stands on torch's meta device. What it needs is planned as a conversion to its own names
is planned, so that bases fill what is absent and nothing is guessed; each tensor can then be had by
itself, as the file has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats.extract import BLOCK_BYTES
from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.mapping import Piece, Reading, read_atoms
from flamingo_ckpt.loading.engine import places_of
from flamingo_ckpt.loading.fill import Reader
from flamingo_ckpt.loading.targets import Target, targets_of
from flamingo_ckpt.map_plan import MapOptions, make_map_plan
from flamingo_ckpt.models.head_counts import head_counts
from flamingo_ckpt.parity.opening import Side
from flamingo_ckpt.parity.pairing import pair, read_plan, unused_by
from flamingo_ckpt.plan import Plan, Step
from flamingo_ckpt.prepare import family_of
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.stream import check_premises
from flamingo_ckpt.tensors import TORCH_DTYPES
from flamingo_ckpt.vocabulary import EMBED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flamingo_ckpt.models.config import ModelConfig

#: What a change of a weight is given and gives: the tensor as the file has it.
Edit = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(slots=True, kw_only=True)
class Shell:
    """A module without weights, and where each of them is.

    Attributes:
        side: what it is made of.
        config: with the rows that its vocabulary really has.
        module: on meta, in evaluation mode.
        plan: every tensor under the module's own names.
        targets: of the module.
        steps: key of a target -> where its bytes are.
        reading: the module's names taken apart into canonical ones.
        misfits: what the checkpoint lacks, has too much, or has in another shape.
        misshapen: key of a target -> where its bytes are, in another shape.
        stored_names: the checkpoint's names without wrapper prefixes -> as they are stored.
        edits: key of a target -> a change that is made to it whenever it is read.
    """

    side: Side
    config: ModelConfig
    module: nn.Module
    plan: Plan
    targets: tuple[Target, ...]
    steps: Mapping[str, Step]
    reading: Reading
    misfits: tuple[Finding, ...]
    misshapen: Mapping[str, Step]
    stored_names: Mapping[str, str]
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    reader: Reader = field(default_factory=Reader)
    _by_name: dict[str, Target] = field(init=False)
    _by_key: dict[str, Target] = field(init=False)
    _buffer: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {name: one for one in self.targets for name in one.names}
        self._by_key = {one.key: one for one in self.targets}
        self._buffer = bytearray(BLOCK_BYTES)

    @property
    def unused(self) -> frozenset[str]:
        """Canonical names that nothing computes with."""
        return unused_by(self.side)

    @property
    def atoms(self) -> Mapping[str, Piece]:
        """Canonical name -> where in which of the module's tensors it lies."""
        return self.reading.atoms

    def target_of(self, canonical: str) -> Target:
        """The tensor of the module that a canonical one lies in."""
        source = self.atoms[canonical].source
        assert source is not None
        return self._by_name[source.name]

    def key_of(self, canonical: str) -> str:
        """The checkpoint's own key of a canonical tensor, as stored; "" where it has none."""
        if canonical not in self.atoms:
            return ""
        target = self.target_of(canonical)
        step = self.steps.get(target.key) or self.misshapen.get(target.key)
        if step is None or step.source.storage is None:
            return target.key
        return self.stored_names.get(step.source.name, step.source.name)

    def stored(self, key: str) -> torch.Tensor:
        """A tensor of the module with the file's values and dtype, on the CPU.

        It may lie on the file's own bytes: it is not to be written to.
        """
        import torch

        target = self._by_key[key]
        step = self.steps.get(key)
        if step is None:  # nothing computes with it, or an edit gives it
            found = torch.zeros(target.shape, dtype=target.tensor.dtype)
        else:
            found = self.reader.whole(step, None, self._buffer).view(target.shape)
        for edit in self.edits.get(key, ()):
            found = edit(found)
        return found

    def atom(self, canonical: str) -> torch.Tensor:
        """A canonical tensor with the file's values and dtype; not to be written to."""
        return view_of(self.stored(self.target_of(canonical).key), self.atoms[canonical])

    def edit_atom(self, canonical: str, change: Edit) -> None:
        """Change one canonical tensor from now on; what else lies beside it stays."""
        piece = self.atoms[canonical]

        def edit(whole: torch.Tensor) -> torch.Tensor:
            value = change(view_of(whole, piece))
            changed = whole.clone(memory_format=_contiguous())
            changed = changed.to(_wider(whole, value))
            _strided(changed, piece).copy_(value.reshape(_sizes(piece)))
            return changed

        self.edits.setdefault(self.target_of(canonical).key, []).append(edit)

    def resize_positions(self) -> None:
        """Bring tables of positions that are of another grid to the module's, as loaders do."""
        from flamingo_ckpt.loading.resize import plan_resize, position_tables

        tables = position_tables(self.module)
        for key, step in self.misshapen.items():
            table = next((tables[name] for name in self._by_key[key].names if name in tables), None)
            if table is None:
                continue
            try:
                change = plan_resize(key, step.shape, table, where=self.side.uri)
            except CkptError:
                continue
            if change is not None:
                stored = self.reader.whole(step, change, self._buffer)
                self.edits.setdefault(key, []).append(_always(stored))

    def dtype_of(self, canonical: str) -> str:
        """The dtype of a canonical tensor in the file, as safetensors spells it."""
        step = self.steps.get(self.target_of(canonical).key)
        return step.dtype.name if step is not None else ""

    def release(self, canonical: str) -> None:
        """Let go of the memory that reading a canonical tensor took."""
        step = self.steps.get(self.target_of(canonical).key)
        if step is not None:
            self.reader.release(step)

    def num_bytes(self, dtype: str) -> int:
        """Bytes of all weights in a dtype of torch."""
        width = TORCH_DTYPES[dtype].bits // 8
        return sum(
            math.prod(one.shape) * (width if one.dtype.is_real_float else 8) for one in self.targets
        )


def _always(tensor: torch.Tensor) -> Edit:
    return lambda _: tensor


def _contiguous() -> Any:
    import torch

    return torch.contiguous_format


def _wider(one: torch.Tensor, other: torch.Tensor) -> torch.dtype:
    """The dtype that holds the values of both."""
    import torch

    return torch.promote_types(one.dtype, other.dtype)


def _sizes(piece: Piece) -> list[int]:
    return [size for axis in piece.view.axes for size, _ in axis]


def _strided(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of a piece within its contiguous tensor, with one axis for each factor."""
    strides = [stride for axis in piece.view.axes for _, stride in axis]
    return tensor.as_strided(_sizes(piece), strides, tensor.storage_offset() + piece.view.offset)


def view_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A canonical tensor within the one that it lies in; a copy where axes do not merge."""
    return _strided(tensor.contiguous(), piece).reshape(piece.shape)


def make_shell(side: Side, dtype: str, *, rows: int | None = None) -> Shell:
    """Plan a side's weights for its class, and construct the class without any.

    Args:
        side: what is computed.
        dtype: of parameters, in torch's spelling.
        rows: of the vocabulary; None for as many as the weights have.

    Raises:
        CkptError: what planning raises; FC405 where the class cannot be constructed.
    """
    layout = "openflamingo-full" if side.computed_as == "openflamingo" else side.computed_as
    if layout == "paligemma" and side.detection.layout.name.startswith("paligemma-l"):
        layout = side.detection.layout.name  # the file's own names: nothing is renamed twice
    if layout == "open_clip" and side.model.data.get("custom_text") and not side.is_tower:
        layout = "open_clip-custom"
    plan = make_map_plan(
        side.manifest,
        PlanOptions(max_expansion=float("inf")),
        MapOptions(
            to=layout,
            source_layout=side.detection.layout.name,
            dims=head_counts(side.model),
            family=family_of(side.model),
        ),
        side.bases,
    )
    check_premises(plan)
    planned = read_plan(plan, {})
    config = _with_rows(side.model, planned, rows)
    module = _construct(replace(side, config=config), dtype)
    targets = targets_of(module)
    own = detect([name for one in targets for name in one.names], side.uri)
    dims = head_counts(config)
    reading = read_atoms(
        [one.info(name) for one in targets for name in one.names],
        own.layout.table(own.family or side.detection.family),
        dims,
    )
    steps, misshapen, misfits = pair(plan, targets, reading, dims, side)
    misfits += _rows_told(side, plan, planned)
    chosen = choose_tensors(side.manifest, PlanOptions(max_expansion=float("inf")))
    stored = {name: tensor.name for name, tensor in chosen.names.items()}
    return Shell(
        side=side,
        config=config,
        module=module,
        plan=plan,
        targets=targets,
        steps=steps,
        reading=reading,
        misfits=tuple(misfits),
        misshapen=misshapen,
        stored_names=stored,
    )


def _construct(side: Side, dtype: str) -> nn.Module:
    from flamingo_ckpt.loading.buffers import hopeless_buffers
    from flamingo_ckpt.models.build import build

    def made(device: str) -> nn.Module:
        if side.is_upstream:
            from flamingo_ckpt.parity.upstream import build_upstream

            return build_upstream(side.model, dtype, device)
        if side.is_tower:
            from flamingo_ckpt.parity.towers import build_tower

            return build_tower(
                side.model, side.computed_as, dtype, device, projection=side.is_projected
            )
        return build(side.model, side.computed_as, device=device, dtype=dtype)

    module = made("meta")
    if hopeless_buffers(module):  # of a class that only itself knows how to compute them
        module = made("cpu")
    return module.eval().requires_grad_(False)


def _with_rows(config: ModelConfig, planned: Reading, wanted: int | None) -> ModelConfig:
    """The config with as many rows of the vocabulary as the weights have."""
    from flamingo_ckpt.models.config import parse_config

    text = config.data.get("text_config")
    shape = _shape_of(planned, EMBED)
    rows = wanted if wanted is not None else shape[0] if shape else None
    if rows is None or not isinstance(text, Mapping) or text.get("vocab_size") == rows:
        return config
    data = {**config.data, "text_config": {**text, "vocab_size": rows}}
    return parse_config(data, config.where, layout=config.layout)


def _rows_told(side: Side, plan: Plan, planned: Reading) -> Iterator[Finding]:
    """A folder whose own config tells another vocabulary does not load as it is."""
    shape, text = _shape_of(planned, EMBED), side.model.data.get("text_config")
    step = next((one for one in plan.steps if planned.names.get(one.name) == (EMBED,)), None)
    told = text.get("vocab_size") if isinstance(text, Mapping) else None
    own = side.has_own_config and side.detection.layout.hf_config
    if own and shape and isinstance(told, int) and told != shape[0]:
        yield Finding(
            code="FC205",
            severity="error",
            key=step.source.name if step is not None else EMBED,
            detail=f"{side.name}'s vocabulary has {shape[0]} rows, and {told} by its config",
            data={"side": side.name, "found": shape[0], "expected": told},
        )


def _shape_of(planned: Reading, canonical: str) -> tuple[int, ...] | None:
    piece = planned.atoms.get(canonical)
    return None if piece is None else piece.shape


def put(module: nn.Module, tensors: Mapping[int, torch.Tensor]) -> None:
    """Set parameters and buffers by the identity of the objects that they replace."""
    from torch import nn

    places = places_of(module)
    for old, tensor in tensors.items():
        for slots, name in places.get(old, ()):
            held = slots[name]
            is_parameter = isinstance(held, nn.Parameter)
            slots[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
