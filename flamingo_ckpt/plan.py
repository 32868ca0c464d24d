"""Where formats and layouts meet: every source name is mapped, dropped with a reason, or refused.

A plan is made from headers alone. Running it is the business of `convert` and `verify`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.detect import Detection
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.prefixes import (
    describe_prefixes,
    refuse_flat_parameter,
    strip_wrappers,
)
from flamingo_ckpt.tensors import (
    DTYPES,
    DType,
    Manifest,
    TensorInfo,
    contiguous_strides,
    distinct,
    escape,
    is_tensor_name,
)

#: What `--dtype` may name.
CAST_TARGETS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
#: Distinct views of one storage may together be this many times its size before they are refused.
MAX_VIEW_TOTAL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user chose: the flags of the same names of `flamingo-ckpt convert`."""

    keep_prefix: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: str = "keep"
    max_expansion: float = 1.0
    untie: bool = False


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
class Dropped:
    """Something of the source that the destination will not hold, and why."""

    name: str
    reason: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The names of a source that are taken, before any layout.

    Attributes:
        names: name without wrapper prefixes -> stored tensor, in source order.
        dropped: what is left out, with reasons.
        prefix: the wrapper prefixes that are removed, or None.
    """

    names: Mapping[str, TensorInfo]
    dropped: tuple[Dropped, ...]
    prefix: str | None
    findings: tuple[Finding, ...]


def choose_tensors(manifest: Manifest, options: PlanOptions) -> Chosen:
    """Select by globs, remove wrapper prefixes, and refuse two tensors for one name.

    Raises:
        CkptError: FC201 nothing is left, FC202 two tensors for one name, FC208 flat parameters,
            FC307 a view that expands, FC505 control characters.
    """
    kept, dropped = _select(manifest, options)
    where = manifest.uri
    names: dict[str, TensorInfo] = {}
    removed = set[tuple[str, ...]]()
    for tensor in kept:
        _check_name(tensor.name, where)
        name, parts = _target_name(tensor.name, options.keep_prefix)
        removed.add(parts)
        other = names.get(name)
        if other is not None and other.identity != tensor.identity:
            raise _collision(name, other, tensor, where)
        if other is not None:
            reason = f"the same tensor as `{escape(other.name)}`"
            dropped.append(Dropped(name=tensor.name, reason=reason))
            continue
        names[name] = tensor
    _check_views(distinct(names.values()), options.max_expansion, where)
    dropped += [
        Dropped(name=item.path, reason=f"beside the weights: {item.kind}")
        for item in manifest.beside
    ]
    return Chosen(
        names=names,
        dropped=tuple(dropped),
        prefix=describe_prefixes(removed),
        findings=(
            *_prefix_findings(kept, options.keep_prefix),
            *_idle_globs(manifest, options),
        ),
    )


def _select(manifest: Manifest, options: PlanOptions) -> tuple[list[TensorInfo], list[Dropped]]:
    kept: list[TensorInfo] = []
    dropped: list[Dropped] = []
    for tensor in manifest.tensors:
        spellings = (tensor.name, strip_wrappers(tensor.name)[0])
        if options.include and not _matches(spellings, options.include):
            dropped.append(Dropped(name=tensor.name, reason="not in --include"))
        elif _matches(spellings, options.exclude):
            dropped.append(Dropped(name=tensor.name, reason="in --exclude"))
        else:
            kept.append(tensor)
    if not kept:
        raise CkptError(
            "no tensor is left to convert"
            if manifest.tensors
            else "the file holds no tensors among its weights",
            code="FC201",
            where=manifest.uri,
            hint="`flamingo-ckpt inspect` lists the names" if manifest.tensors else None,
        )
    for tensor in kept:
        refuse_flat_parameter(tensor.name, manifest.uri)
    return kept, dropped


def _matches(spellings: Iterable[str], globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in spellings for glob in globs)


def _target_name(name: str, keep_prefix: bool) -> tuple[str, tuple[str, ...]]:
    stripped, removed = strip_wrappers(name)
    return (name, removed) if keep_prefix else (stripped, removed)


def _check_name(name: str, where: str) -> None:
    if not is_tensor_name(name):
        raise CkptError(
            f"`{escape(name)}` is no tensor name: it is empty, or holds control characters or half "
            "a surrogate pair",
            code="FC505",
            where=where,
            key=name,
            hint="leave it out with --exclude, or rename it where it was made",
        )


def _collision(name: str, first: TensorInfo, second: TensorInfo, where: str) -> CkptError:
    return CkptError(
        f"two source keys map to `{escape(name)}`: `{escape(first.name)}` ({first.describe()}), "
        f"`{escape(second.name)}` ({second.describe()})",
        code="FC202",
        where=where,
        key=name,
        hint="the file holds two copies; choose one with --exclude "
        f"'{escape(_exclude_glob(first, second))}'",
    )


def _exclude_glob(first: TensorInfo, second: TensorInfo) -> str:
    """`module.*` where that removes one of the two, else the longer name itself."""
    longer, shorter = sorted((first.name, second.name), key=len, reverse=True)
    glob = longer.split(".")[0] + ".*"
    return glob if not fnmatch.fnmatchcase(shorter, glob) else longer


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


def _check_views(tensors: list[TensorInfo], max_expansion: float, where: str) -> None:
    """Views are written out in full; that must not turn a small file into a huge one."""
    totals: dict[int, int] = {}
    for tensor in tensors:
        if tensor.storage is None:
            continue
        stored, needed = tensor.storage.num_bytes, tensor.num_bytes
        total = totals.get(id(tensor.storage), 0) + needed
        totals[id(tensor.storage)] = total
        allowed = max(max_expansion, MAX_VIEW_TOTAL) * stored
        if needed > max_expansion * stored or total > allowed:
            raise CkptError(
                f"`{escape(tensor.name)}` ({tensor.describe()}, {needed} bytes) is an expanded "
                f"view of {stored} stored bytes",
                code="FC307",
                where=where,
                key=tensor.name,
                hint="to write it out in full: --max-expansion "
                f"{-(-max(needed, total) // max(stored, 1))}",
            )


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


def _prefix_findings(kept: list[TensorInfo], keep_prefix: bool) -> list[Finding]:
    """Where some names lose another number of `module` than others, one may be a real submodule."""
    if keep_prefix:
        return []
    counts: dict[int, list[str]] = {}
    for tensor in kept:
        removed = strip_wrappers(tensor.name)[1]
        counts.setdefault(removed.count("module"), []).append(tensor.name)
    if len(counts) < 2:
        return []
    number, names = min(
        ((n, names) for n, names in counts.items() if n), key=lambda item: len(item[1])
    )
    return [
        Finding(
            code="FC212",
            severity="warning",
            detail=f"`module` was removed {number}x from {len(names)} of {len(kept)} names, "
            f"`{escape(names[0])}` among them; if it is a submodule, the names are wrong now",
            hint="--keep-prefix keeps every name as it is",
        )
    ]


def _idle_globs(manifest: Manifest, options: PlanOptions) -> list[Finding]:
    """Patterns that no name fits: a typo in --exclude ships what was meant to stay."""
    found: list[Finding] = []
    for flag, globs in (("--include", options.include), ("--exclude", options.exclude)):
        for glob in globs:
            if not any(
                _matches((tensor.name, strip_wrappers(tensor.name)[0]), (glob,))
                for tensor in manifest.tensors
            ):
                found.append(
                    Finding(
                        code="FC213",
                        severity="warning",
                        detail=f"{flag} `{escape(glob)}` fits no name",
                        hint="`flamingo-ckpt inspect` lists the names",
                    )
                )
    return found
