"""Which tensors of a source are taken, and under which names, before any layout.

Selected by globs, freed of wrapper prefixes, and refused where two would get one name.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.prefixes import (
    describe_prefixes,
    refuse_flat_parameter,
    strip_wrappers,
)
from flamingo_ckpt.tensors import Manifest, TensorInfo, distinct, escape, is_tensor_name

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
class Dropped:
    """Something of the source that the destination will not hold, and why."""

    name: str
    reason: str


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
    check_views(distinct(names.values()), options.max_expansion, where)
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


def check_views(tensors: list[TensorInfo], max_expansion: float, where: str) -> None:
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
