"""One pass over the bytes of every tensor: what its numbers look like, and a digest of them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.cast import widen
from flamingo_ckpt.plan import Step
from flamingo_ckpt.selection import check_views
from flamingo_ckpt.stream import (
    Derived,
    OnBytes,
    check_storages,
    check_unchanged,
    derive,
    largest_first,
    run_tasks,
    unchecked_storages,
)
from flamingo_ckpt.tensors import Manifest, TensorInfo, distinct


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The numbers of one tensor.

    Attributes:
        tensor: it.
        num_nan, num_inf: elements.
        first_bad: flat index of the first of them, or None.
        constant: the value that all elements have, or None; of floats only.
        rms: root mean square of the elements; NaN where one is not finite, or none is there.
        digest: XXH3-128 of the logical bytes.
    """

    tensor: TensorInfo
    num_nan: int = 0
    num_inf: int = 0
    first_bad: int | None = None
    constant: float | None = None
    rms: float = math.nan
    digest: str = ""


def statistics_of(manifest: Manifest, on_bytes: OnBytes = lambda _: None) -> dict[str, Statistics]:
    """The statistics of every stored tensor, by its first name; checksums are checked on the way.

    Raises:
        CkptError: FC307 as `check_expansion`, FC102, FC105 for bytes that are not there or not what
            they were, FC007 for a file that changed meanwhile.
    """
    check_expansion(manifest)
    steps = [
        Step(source=tensor, name=tensor.name, dtype=tensor.dtype)
        for tensor in distinct(manifest.tensors)
    ]

    def work(step: Step, buffer: bytearray, stop: threading.Event) -> Statistics:
        return _measure(step, buffer, stop, on_bytes)

    check_storages(unchecked_storages(steps), lambda _: None)
    found = run_tasks(largest_first(steps), work)
    check_unchanged(manifest)
    by_name = {one.tensor.name: one for one in found}
    return {step.name: by_name[step.name] for step in steps}


def check_expansion(manifest: Manifest) -> None:
    """Raise FC307 where reading every tensor would be reading far more than is stored."""
    try:
        check_views(list(distinct(manifest.tensors)), 1.0, manifest.uri)
    except CkptError as error:
        error.hint = "save it contiguous, or the small tensor alone"
        raise


def _measure(step: Step, buffer: bytearray, stop: threading.Event, on_bytes: OnBytes) -> Statistics:
    import numpy

    derived, tensor = Derived(), step.source
    is_float = tensor.dtype.is_real_float
    at = nans = infs = 0
    first_bad: int | None = None
    first: float | None = None
    is_constant, squares = is_float, 0.0
    for block in derive(step, buffer, derived, want_digest=True):
        on_bytes(len(block))
        if stop.is_set() or not is_float:
            continue
        values = widen(block, tensor.dtype.name)
        # one pass: a sum of squares is finite exactly where every element is, but for overflow
        with numpy.errstate(over="ignore", invalid="ignore"):
            part = float(numpy.dot(values, values))
        if not math.isfinite(part):
            bad = ~numpy.isfinite(values)
            if bad.any():
                nans += int(numpy.isnan(values).sum())
                infs += int(numpy.isinf(values).sum())
                first_bad = at + int(bad.argmax()) if first_bad is None else first_bad
            part = float(numpy.square(values[~bad], dtype="f8").sum())
        squares += part
        if is_constant:
            first = float(values[0]) if first is None else first
            is_constant = bool((values == numpy.float64(first)).all())
        at += values.size
    is_finite = not nans and not infs
    return Statistics(
        tensor=tensor,
        num_nan=nans,
        num_inf=infs,
        first_bad=first_bad,
        constant=first if is_constant and at else None,
        rms=math.sqrt(squares / at) if at and is_finite else math.nan,
        digest=derived.xxh3_128,
    )
