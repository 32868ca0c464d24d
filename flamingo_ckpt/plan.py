"""Where formats and layouts meet: every source name is mapped, dropped with a reason, or refused.

A plan is made from headers alone. Running it is the business of `convert` and `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.detect import Detection
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.selection import Dropped, PlanOptions, choose_tensors
from flamingo_ckpt.tensors import (
    DTYPES,
    DType,
    Manifest,
    TensorInfo,
    contiguous_strides,
    escape,
)

#: What `--dtype` may name.
CAST_TARGETS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One tensor of the destination and where it comes from.

    Attributes:
        source: the stored tensor; the first of them where there are several.
        name: in the destination.
        dtype: in the destination; another than the source's means a cast.
        aliases: further destination names of the same tensor.
        parts: where the tensor is not the stored one as it is: the runs of elements that make it
            up, one after the other. A run without a storage is zeros.
        arranged: its shape, where it is made of parts.
    """

    source: TensorInfo
    name: str
    dtype: DType
    aliases: tuple[str, ...] = ()
    parts: tuple[TensorInfo, ...] = ()
    arranged: tuple[int, ...] = ()

    @property
    def runs(self) -> tuple[TensorInfo, ...]:
        """What the destination's elements are, in order."""
        return self.parts or (self.source,)

    @property
    def shape(self) -> tuple[int, ...]:
        """In the destination."""
        return self.arranged if self.parts else self.source.shape

    @property
    def num_elements(self) -> int:
        """In the destination."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """In the destination."""
        return self.num_elements * self.dtype.bits // 8

    @property
    def is_cast(self) -> bool:
        """Whether values may change."""
        return self.dtype is not self.source.dtype

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes are the destination's bytes, in one run."""
        return not self.is_cast and len(self.runs) == 1 and self.runs[0].is_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What becomes of every name of a source.

    Attributes:
        source: the manifest it was made from.
        steps: one per distinct tensor, in source order.
        dropped: names and other content that is left out, with reasons.
        renamed: how many names change.
        prefix: the wrapper prefixes that are removed, or None.
        findings: what the user should know.
        layout: of the source, where a layout was asked for.
        target: layout of the destination, where one was asked for.
        transformed: how many tensors are split, joined, transposed, padded or cut.
        expected_absent: keys of the model that a base supplies and neither side holds.
        equal: pairs of stored tensors that must be equal: two names of one tensor.
        zeros: runs that must be zero, since they are cut off as padding.
        metadata: what the destination should remember for the way back.
        partial: whether the destination lacks what only a base has.
        others: further checkpoints that steps read from, by what they are the base of.
    """

    source: Manifest
    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...]
    renamed: int
    prefix: str | None
    findings: tuple[Finding, ...]
    layout: Detection | None = None
    target: Layout | None = None
    transformed: int = 0
    expected_absent: tuple[str, ...] = ()
    equal: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    zeros: tuple[TensorInfo, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    others: Mapping[str, Manifest] = field(default_factory=dict)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Every checkpoint that bytes come from."""
        return (self.source, *self.others.values())

    @property
    def num_names(self) -> int:
        """Names in the destination, tied ones included."""
        return sum(1 + len(step.aliases) for step in self.steps)

    @property
    def num_bytes(self) -> int:
        """Tensor bytes in the destination."""
        return sum(step.num_bytes for step in self.steps)


def make_plan(manifest: Manifest, options: PlanOptions) -> Plan:
    """Account for every name.

    Raises:
        CkptError: FC201 nothing is left, FC202 two tensors for one name, FC208 flat parameters,
            FC305 a cast that is not defined, FC307 a view that expands, FC505 control characters.
    """
    chosen = choose_tensors(manifest, options)
    where = manifest.uri
    groups: dict[tuple[object, ...], list[str]] = {}
    sources: dict[tuple[object, ...], TensorInfo] = {}
    for name, tensor in chosen.names.items():
        group = (name,) if options.untie else tensor.identity
        groups.setdefault(group, []).append(name)
        sources.setdefault(group, tensor)
    steps = tuple(
        Step(
            source=sources[identity],
            name=first,
            dtype=target_dtype(sources[identity], options.dtype, where),
            aliases=tuple(rest),
        )
        for identity, (first, *rest) in groups.items()
    )
    return Plan(
        source=manifest,
        steps=steps,
        dropped=chosen.dropped,
        renamed=sum(name != tensor.name for name, tensor in chosen.names.items()),
        prefix=chosen.prefix,
        findings=(*_overlap_findings(steps), *chosen.findings),
    )


def target_dtype(tensor: TensorInfo, wanted: str, where: str) -> DType:
    """The dtype in the destination by `--dtype`; raises FC305 where no cast is defined."""
    if wanted == "keep":
        return tensor.dtype
    target = DTYPES[CAST_TARGETS[wanted]]
    if tensor.dtype.name in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"):
        raise CkptError(
            f"`{escape(tensor.name)}` is {tensor.dtype}: its values need their scales, "
            "no cast is defined",
            code="FC305",
            where=where,
            key=tensor.name,
            hint="leave it out with --exclude, or use `--dtype keep`",
        )
    return target if tensor.dtype.is_real_float else tensor.dtype


def _overlap_findings(steps: Iterable[Step]) -> list[Finding]:
    """Views that share some bytes: each is written out, so the destination is larger."""
    extents: dict[int, list[tuple[int, int, str]]] = {}
    for step in steps:
        source = step.source
        if source.storage is None or source.num_bytes == 0:
            continue
        strides = source.strides or contiguous_strides(source.shape)
        last = sum((n - 1) * s for n, s in zip(source.shape, strides, strict=True))
        end = source.offset_bytes + (last + 1) * source.dtype.bits // 8
        extents.setdefault(id(source.storage), []).append((source.offset_bytes, end, step.name))
    found: list[Finding] = []
    for group in extents.values():
        reach, before = 0, ""
        for begin, end, name in sorted(group):
            if begin < reach:
                found.append(
                    Finding(
                        code="FC211",
                        severity="info",
                        key=name,
                        detail=f"`{escape(name)}` shares bytes with `{escape(before)}`; "
                        "each is written out in full, the sharing is lost",
                    )
                )
            if end > reach:
                reach, before = end, name
    return found
