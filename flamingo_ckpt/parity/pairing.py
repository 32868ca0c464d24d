"""Which tensor of a plan fills which tensor of a module, and what is left on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.mapping import Reading, read_atoms
from flamingo_ckpt.loading.targets import Target
from flamingo_ckpt.parity.opening import PROJECTION, Side
from flamingo_ckpt.plan import Plan, Step
from flamingo_ckpt.tensors import TensorInfo, escape, format_shape

#: Kind of model -> what it does not compute with: no Flamingo uses its tower's projection, and a
#: tower that stands alone may have none.
_UNUSED: Mapping[str, frozenset[str]] = {
    "flamingo": frozenset({PROJECTION}),
    "tower": frozenset({PROJECTION}),
}


def pair(
    plan: Plan,
    targets: tuple[Target, ...],
    reading: Reading,
    dims: Mapping[str, int],
    side: Side,
) -> tuple[dict[str, Step], dict[str, Step], list[Finding]]:
    """Which step fills which tensor of the module, and what is left on either side."""
    planned = read_plan(plan, dims)
    by_name = {name: step for step in plan.steps for name in (step.name, *step.aliases)}
    by_parts = {parts: by_name[name] for name, parts in planned.names.items()}
    used: set[int] = set()
    steps: dict[str, Step] = {}
    misshapen: dict[str, Step] = {}
    misfits: list[Finding] = []
    for target in targets:
        found = _steps_for(target, reading, by_parts, by_name)
        used |= {id(step) for step in found}
        if found and _fits(found[0], target):
            steps[target.key] = found[0]
            misfits += _twins(found, side)
        elif found:
            misshapen[target.key] = found[0]
            misfits.append(_misshapen(found[0], target, side))
        elif not _may_lack(target, reading, unused_by(side)):
            misfits.append(_missing(target, reading, side))
    extra = [
        step
        for step in plan.steps
        if id(step) not in used
        and step.name not in planned.dropped
        and not (side.is_tower and _is_beside_tower(planned.names.get(step.name, ())))
    ]
    return steps, misshapen, [*misfits, *(_unexpected(step, side) for step in extra)]


def read_plan(plan: Plan, dims: Mapping[str, int]) -> Reading:
    """What a plan writes, taken apart by the layout that it writes."""
    assert plan.target is not None
    assert plan.layout is not None
    tensors = [
        TensorInfo(name=name, dtype=step.dtype, shape=step.shape)
        for step in plan.steps
        for name in (step.name, *step.aliases)
    ]
    target = plan.target
    family = plan.layout.family
    if target.rules_of and "language" in plan.others:
        found = detect([tensor.name for tensor in tensors], plan.source.uri, among=(target.name,))
        family = found.family
    return read_atoms(tensors, target.table(family if target.rules_of else ""), dims)


def _is_beside_tower(parts: tuple[str, ...]) -> bool:
    """Whether a tensor is of CLIP's other half, or of a projection that one side may lack."""
    return all(group_of(part) != "vision" or part == PROJECTION for part in parts)


def _steps_for(
    target: Target,
    reading: Reading,
    by_parts: Mapping[tuple[str, ...], Step],
    by_name: Mapping[str, Step],
) -> list[Step]:
    found: dict[int, Step] = {}
    for name in target.names:
        parts = reading.names.get(name)
        step = by_parts.get(parts) if parts is not None else by_name.get(name)
        if step is not None:
            found[id(step)] = step
    return list(found.values())


def _fits(step: Step, target: Target) -> bool:
    return step.shape == target.shape or {step.shape, target.shape} <= {(), (1,)}


def unused_by(side: Side) -> frozenset[str]:
    """Canonical names that a side may lack, since nothing computes with them."""
    if side.is_projected:
        return frozenset()
    return _UNUSED.get(side.kind, frozenset())


def _may_lack(target: Target, reading: Reading, unused: frozenset[str]) -> bool:
    """Buffers are computed; a projection that nothing computes with is not missed."""
    parts = {part for name in target.names for part in reading.names.get(name, ())}
    return not target.is_parameter or bool(parts and parts <= unused)


def _twins(steps: list[Step], side: Side) -> Iterator[Finding]:
    """A tied tensor of which the checkpoint holds two that are not the same."""
    from flamingo_ckpt.diff.likeness import digest_of_runs

    first, *more = steps
    for other in more:
        if digest_of_runs(first.runs) != digest_of_runs(other.runs):
            yield Finding(
                code="FC202",
                severity="error",
                key=other.source.name,
                detail=f"{side.name}'s `{escape(first.source.name)}` and "
                f"`{escape(other.source.name)}` are one tensor by its config, and differ",
                hint="correct `tie_word_embeddings` in the config",
            )


def _misshapen(step: Step, target: Target, side: Side) -> Finding:
    return Finding(
        code="FC205",
        severity="error",
        key=step.source.name,
        detail=f"{side.name}'s `{escape(step.source.name)}` is {format_shape(step.shape)}, and by "
        f"its config it is {format_shape(target.shape)}",
        data={"side": side.name, "found": list(step.shape), "expected": list(target.shape)},
    )


def _missing(target: Target, reading: Reading, side: Side) -> Finding:
    parts = next((reading.names[n] for n in target.names if n in reading.names), ())
    return Finding(
        code="FC203",
        severity="error",
        key=target.key,
        detail=f"{side.name} has no `{escape(target.key)}` ({format_shape(target.shape)}), which "
        "the model of its config computes with",
        data={"side": side.name, "canonical": list(parts)},
    )


def _unexpected(step: Step, side: Side) -> Finding:
    return Finding(
        code="FC204",
        severity="error",
        key=step.source.name,
        detail=f"{side.name} has `{escape(step.source.name)}` ({step.source.describe()}), which "
        "the model of its config does not have",
        data={"side": side.name},
    )
