"""Is the destination the faithful image of the source? Every tensor is derived again.

Compared are dtype, shape and bytes: a NaN equals only the same NaN, and -0 is not 0. Memory is
bounded; the first differing element is named.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flamingo_ckpt.difference import Difference, Tally, describe, facts_of
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.formats.cast import CastCounts
from flamingo_ckpt.formats.extract import BLOCK_BYTES
from flamingo_ckpt.layouts.layout import BASE_OF_GROUP, group_of
from flamingo_ckpt.plan import Plan, Step
from flamingo_ckpt.stream import (
    Derived,
    OnBytes,
    cast_findings,
    check_premises,
    check_storages,
    check_unchanged,
    derive,
    largest_first,
    run_tasks,
    unchecked_storages,
)
from flamingo_ckpt.tensors import DTYPES, Manifest, TensorInfo, distinct, escape, format_shape

#: What an element of each side is called.
_SIDES = ("the expected value", "the found one")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """The comparison of every name.

    Attributes:
        bit_exact: names equal to the source's own bits.
        cast: names equal to the cast of the source's values.
        different, missing, unexpected: names.
        unverified: names that only a base can prove, where none was given.
        findings: one per name that is not equal, and one per inexact cast.
    """

    bit_exact: tuple[str, ...]
    cast: tuple[str, ...]
    different: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    findings: tuple[Finding, ...]
    unverified: tuple[str, ...] = ()

    @property
    def is_faithful(self) -> bool:
        """Whether every name is there, nothing else is, and all bits are as derived."""
        return not (self.different or self.missing or self.unexpected or self.unverified)


def judge(result: VerifyResult) -> tuple[str, int]:
    """(verdict, exit code): a difference outweighs what could not be compared."""
    if result.is_faithful:
        return "pass", 0
    if result.different or result.missing or result.unexpected:
        return "fail", 1
    return "incomplete", 3


def verify(plan: Plan, dst: Manifest, on_bytes: OnBytes = lambda _: None) -> VerifyResult:
    """Compare a destination with what a plan derives from its source.

    Args:
        plan: from the source, with the options that the conversion had.
        dst: the destination as it is.
        on_bytes: told of the destination bytes that have been compared, from several threads.

    Raises:
        CkptError: where either side cannot be read, or fails its checksum.
    """
    there = dst.by_name()
    names = {name for step in plan.steps for name in (step.name, *step.aliases)}
    missing = [name for name in names if name not in there]
    extra = [name for name in there if name not in names]
    unverified = {name: kind for name in extra if (kind := _base_of(plan, name))}
    unexpected = [name for name in extra if name not in unverified]
    findings = [*_missing(plan, missing, there), *_unexpected(plan, unexpected, there)]
    check_storages(unchecked_storages(plan.steps), lambda _: None)
    check_premises(plan)
    check_storages(unchecked_storages(_as_steps(dst)), lambda _: None)
    pairs = [
        (step, tensor)
        for step in largest_first(plan.steps)
        for tensor in _counterparts(step, there)
    ]

    def work(
        pair: tuple[Step, TensorInfo], buffer: bytearray, stop: threading.Event
    ) -> tuple[Step, TensorInfo, Derived, Finding | None]:
        step, tensor = pair
        derived = Derived()
        finding = _header_difference(step, tensor)
        if finding is None:
            found = first_difference(step, _identity(tensor), buffer, derived, on_bytes, stop)
            finding = bits_differ(step, tensor, found) if found else None
        return step, tensor, derived, finding

    results = run_tasks(pairs, work)
    for manifest in plan.manifests:
        check_unchanged(manifest)
    check_unchanged(dst)
    good: dict[str, bool] = {}
    for step, tensor, derived, finding in results:
        group = [
            name
            for name in (step.name, *step.aliases)
            if name in there and there[name].identity == tensor.identity
        ]
        good |= dict.fromkeys(group, finding is None)
        if finding is not None:
            findings.append(finding)
        elif step.is_cast:
            # Losses are the cast's, and both sides have them: stated, but no difference.
            findings += [
                replace(item, severity="warning") if item.severity == "error" else item
                for item in cast_findings(step, derived)
            ]
    casts = {name for step in plan.steps if step.is_cast for name in (step.name, *step.aliases)}
    order = [name for step in plan.steps for name in (step.name, *step.aliases) if name in there]
    return VerifyResult(
        bit_exact=tuple(name for name in order if good[name] and name not in casts),
        cast=tuple(name for name in order if good[name] and name in casts),
        different=tuple(name for name in order if not good[name]),
        missing=tuple(sorted(missing)),
        unexpected=tuple(unexpected),
        findings=(*findings, *_unverified(unverified)),
        unverified=tuple(unverified),
    )


def _base_of(plan: Plan, name: str) -> str:
    """Which base could supply a key of the destination, where that base was not given."""
    if plan.layout is None or plan.target is None or plan.target.space != "flamingo":
        return ""
    for family in plan.layout.families or plan.target.families:
        match = plan.target.table(family).match(name)
        if match is None or not match.rule.canonical:
            continue
        index = match.arrangement.index if match.arrangement else ()
        kind = BASE_OF_GROUP.get(group_of(match.canonical(dict.fromkeys(index, 0))), "")
        return kind if kind not in plan.others else ""
    return ""


def _unverified(names: Mapping[str, str]) -> list[Finding]:
    return [
        Finding(
            code="FC215",
            severity="warning",
            key=name,
            detail=f"`{escape(name)}` came from a base, and there is none to compare it with",
            hint=f"--base-{kind} names it",
        )
        for name, kind in names.items()
    ]


def _as_steps(manifest: Manifest) -> list[Step]:
    return [
        Step(source=tensor, name=tensor.name, dtype=tensor.dtype) for tensor in manifest.tensors
    ]


def _counterparts(step: Step, there: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """The distinct destination tensors of a step: one, unless its tied names were untied."""
    return distinct(there[name] for name in (step.name, *step.aliases) if name in there)


def _header_difference(step: Step, tensor: TensorInfo) -> Finding | None:
    name = escape(tensor.name)
    if tensor.shape != step.shape:
        return Finding(
            code="FC205",
            severity="error",
            key=tensor.name,
            detail=f"`{name}`: the shape should be {format_shape(step.shape)}, it is "
            f"{format_shape(tensor.shape)}",
            data={"expected": list(step.shape), "found": list(tensor.shape)},
        )
    if tensor.dtype is not step.dtype:
        wanted = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(tensor.dtype.name)
        return Finding(
            code="FC206",
            severity="error",
            key=tensor.name,
            detail=f"`{name}`: the dtype should be {step.dtype}, it is {tensor.dtype}",
            hint=f"if it was cast on purpose: --dtype {wanted}" if wanted else None,
            data={"expected": step.dtype.name, "found": tensor.dtype.name},
        )
    return None


def first_difference(
    step: Step,
    stored_step: Step,
    buffer: bytearray,
    derived: Derived,
    on_bytes: OnBytes,
    stop: threading.Event,
) -> Difference | None:
    """Compare what two steps derive, in blocks as they come; None where all bits agree."""
    stored = derive(stored_step, bytearray(BLOCK_BYTES), Derived())
    have = memoryview(b"")
    tally = Tally(step.dtype, step.shape)
    at = 0
    for want in derive(step, buffer, derived):
        while want:
            if not have:
                have = next(stored)
            size = min(len(want), len(have))
            ours, theirs = want[:size], have[:size]
            # bytes compare with memcmp; a memoryview compares item by item
            if ours.tobytes() != theirs.tobytes():
                tally.add(ours, theirs, at)
            want, have, at = want[size:], have[size:], at + size
            on_bytes(size)
        if stop.is_set():
            return tally.result()
    for _ in stored:  # runs the checksum of the destination to its end
        pass
    return tally.result()


def _identity(tensor: TensorInfo) -> Step:
    return Step(source=tensor, name=tensor.name, dtype=tensor.dtype)


def bits_differ(step: Step, tensor: TensorInfo, found: Difference) -> Finding:
    """The finding for a tensor whose bits are not those that a step derives."""
    place = ", ".join(map(str, found.index))
    ours, theirs = (_readable(bits, step) for bits in (found.expected, found.found))
    return Finding(
        code="FC301",
        severity="error",
        key=tensor.name,
        detail=f"`{escape(tensor.name)}`: {found.num_different} of {step.num_elements} "
        f"elements differ, first at [{place}]: {ours} expected, {theirs} found"
        + describe(found, *_SIDES),
        data={
            "first_index": list(found.index),
            "expected_bits": found.expected,
            "found_bits": found.found,
            **facts_of(found, *_SIDES),
        },
    )


def _readable(bits: str, step: Step) -> str:
    """`0.5 (0x3f000000)` where the dtype widens to a float, else the bits."""
    from flamingo_ckpt.formats.cast import cast_block

    if not step.dtype.is_real_float:
        return f"0x{bits}"
    raw = memoryview(bytes.fromhex(bits)[::-1])
    wide = cast_block(raw, step.dtype, DTYPES["F64"], CastCounts())
    return f"{wide.cast('d')[0]!r} (0x{bits})"


def _missing(plan: Plan, names: list[str], there: Mapping[str, TensorInfo]) -> list[Finding]:
    hint = None
    if any(step.source.name != step.name and step.source.name in there for step in plan.steps):
        hint = "the destination has the names as stored in the source: --keep-prefix"
    sources = {name: step for step in plan.steps for name in (step.name, *step.aliases)}
    return [
        Finding(
            code="FC203",
            severity="error",
            key=name,
            detail=f"`{escape(name)}` ({sources[name].source.describe()}) is not in the "
            "destination",
            hint=hint,
        )
        for name in sorted(names)
    ]


def _unexpected(plan: Plan, names: list[str], there: Mapping[str, TensorInfo]) -> list[Finding]:
    left_out = {item.name for item in plan.dropped}
    return [
        Finding(
            code="FC204",
            severity="error",
            key=name,
            detail=f"`{escape(name)}` ({there[name].describe()}) is in the destination and the "
            "source does not give it",
            hint="the source has it, and these options leave it out" if name in left_out else None,
        )
        for name in names
    ]


def summary_of(result: VerifyResult) -> dict[str, Any]:
    """The counts of the JSON report."""
    return {
        "bit_exact": len(result.bit_exact),
        "cast": len(result.cast),
        "different": len(result.different),
        "missing": len(result.missing),
        "unexpected": len(result.unexpected),
    }
