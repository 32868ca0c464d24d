"""Values: what can be told from the numbers alone, without a source to compare with."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.release.manifest import content_digest
from flamingo_ckpt.release.result import Outcome, failed, skipped
from flamingo_ckpt.release.statistics import Statistics, statistics_of
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.stream import OnBytes
from flamingo_ckpt.tensors import escape, format_shape

#: Parts of a Flamingo that are trained; the towers come from their own releases as they are.
_TRAINED = ("perceiver", "xattn")
#: Buffers that classes compute again; twins and constants among them are as they should be.
_BUFFERS = re.compile(
    r".*(inv_freq|position_ids|masked_bias|rotary_emb\..*|attn\.bias|attention\.bias|causal_mask"
    r"|num_batches_tracked|attn_mask)"
)
#: Tensors of which the same bits in two places mean anything.
_MIN_TWIN_ELEMENTS = 16
#: Layers that make a family, of which one can stand out.
_MIN_FAMILY = 4
#: Norms and biases differ more from layer to layer than matrices do.
_VECTOR_EASE = 30.0
#: What language models tie to one another, by the names that their classes have.
_TIED = re.compile(
    r"(.*\.)?(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings|shared|lm_head|embed_out"
    r"|lm\.head)\.weight"
)
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """A tensor with its key, and its canonical names where its layout is known."""

    key: str
    canonical: tuple[str, ...]
    numbers: Statistics

    @property
    def is_buffer(self) -> bool:
        """Whether it is something that a class computes again."""
        return bool(_BUFFERS.fullmatch(self.key))


def check_values(
    subject: Subject, norm_factor: float, on_bytes: OnBytes = lambda _: None
) -> Outcome:
    """NaN and infinity, closed gates, tensors that look untrained, twins, sizes out of family."""
    manifest = subject.manifest
    if manifest is None:
        return skipped("values", "the checkpoint cannot be read")
    try:
        numbers = statistics_of(manifest, on_bytes)
    except CkptError as error:
        return failed("values", error)
    names = _canonical(subject)
    tensors = [
        _Named(key=key, canonical=names.get(key, ()), numbers=one) for key, one in numbers.items()
    ]
    gates, gate_sentence = _gates(tensors)
    findings = [
        *_not_finite(tensors),
        *gates,
        *_constants(tensors),
        *_twins(tensors),
        *_families(tensors, norm_factor),
    ]
    measured = sum(one.numbers.tensor.dtype.is_real_float for one in tensors)
    sentence = f"{measured} of {len(tensors)} stored tensors hold floating-point numbers"
    if not any(one.code == "FC352" for one in findings):
        sentence += ", all finite"
    return Outcome(
        name="values",
        sentence=sentence + gate_sentence,
        findings=tuple(findings),
        details={
            "content": content_digest(
                [
                    (key, one.tensor.dtype.name, one.tensor.shape, one.digest)
                    for key, one in numbers.items()
                ]
            )
        },
    )


def _canonical(subject: Subject) -> Mapping[str, tuple[str, ...]]:
    """Stored key -> canonical names."""
    side = subject.side
    if side is None or side.reading is None:
        return {}
    return {side.stored(name): names for name, names in side.reading.names.items()}


def _not_finite(tensors: list[_Named]) -> Iterator[Finding]:
    for one in tensors:
        numbers = one.numbers
        if not (numbers.num_nan or numbers.num_inf):
            continue
        counts = [(numbers.num_nan, "NaN"), (numbers.num_inf, "infinite")]
        told = " and ".join(f"{count} {word}" for count, word in counts if count)
        yield Finding(
            code="FC352",
            severity="error",
            key=one.key,
            detail=f"`{escape(one.key)}`: {told} of {numbers.tensor.num_elements} elements, first "
            f"at flat index {numbers.first_bad}",
            hint="take the checkpoint of an earlier step; a model with it computes NaN",
            data={"num_nan": numbers.num_nan, "num_inf": numbers.num_inf},
        )


def _gates(tensors: list[_Named]) -> tuple[list[Finding], str]:
    gates = [one for one in tensors if _is_gate(one)]
    closed = [one for one in gates if one.numbers.constant == 0]
    if not gates:
        return [], ""
    told = f"; {len(closed)} of {len(gates)} gates are exactly 0"
    if not closed:
        return [], told
    is_all = len(closed) == len(gates)
    why = (
        "so is every gate: nothing that the model sees reaches its language model"
        if is_all
        else "its layer adds nothing to the language model"
    )
    return [
        Finding(
            code="FC351",
            severity="error" if is_all else "warning",
            key=one.key,
            detail=f"`{escape(one.key)}` is exactly 0; {why}",
            hint="gates begin at 0 and training moves them: is this the trained checkpoint, and "
            "was it loaded before it was saved?",
        )
        for one in closed
    ], told


def _is_gate(one: _Named) -> bool:
    return any(name.endswith(("attn_gate", "ff_gate")) for name in (*one.canonical, one.key))


def _constants(tensors: list[_Named]) -> Iterator[Finding]:
    """Trained parts that still are what a constructor puts there."""
    for one in tensors:
        numbers = one.numbers
        is_trained = any(group_of(name) in _TRAINED for name in one.canonical)
        if (
            numbers.constant is None
            or numbers.tensor.num_elements < 2
            or _is_gate(one)
            or one.is_buffer
            or math.isnan(numbers.rms)
        ):
            continue
        # Frozen language models have biases of zeros that were never trained: a matrix has none.
        if not is_trained and len(numbers.tensor.shape) < 2:
            continue
        yield Finding(
            code="FC353",
            severity="warning",
            key=one.key,
            detail=f"`{escape(one.key)}` ({numbers.tensor.describe()}): every element is "
            f"{numbers.constant:g}, as before any training",
            hint="was it trained, and was it loaded before it was saved? If it is meant to be so, "
            "waive it",
        )


def _twins(tensors: list[_Named]) -> Iterator[Finding]:
    """Two stored tensors with the same bits, where each should have been trained by itself."""
    groups: dict[tuple[Any, ...], list[_Named]] = defaultdict(list)
    for one in tensors:
        tensor = one.numbers.tensor
        if (
            tensor.dtype.is_real_float
            and tensor.num_elements >= _MIN_TWIN_ELEMENTS
            and one.numbers.constant is None
            and not one.is_buffer
        ):
            groups[one.numbers.digest, tensor.dtype.name, tensor.shape].append(one)
    for group in groups.values():
        first, *rest = group
        for one in rest:
            if _are_one_tensor(first, one):
                continue
            yield Finding(
                code="FC354",
                severity="error",
                key=one.key,
                detail=f"`{escape(one.key)}` and `{escape(first.key)}` "
                f"({one.numbers.tensor.describe()}) hold the same bits",
                hint="one was written in the other's place; if the two are tied on purpose, "
                "waive it",
                data={"twin": first.key},
            )


def _are_one_tensor(a: _Named, b: _Named) -> bool:
    """Whether two keys are names of one tensor: the embedding and a head that is tied to it."""
    if all(_is_tied(one) for one in (a, b)):
        return True
    return bool(set(a.canonical) & set(b.canonical))


def _is_tied(one: _Named) -> bool:
    """Whether it is the embedding of words or the head over them, in whatever layout."""
    return any(_TIED.fullmatch(name) for name in (*one.canonical, one.key))


def _families(tensors: list[_Named], factor: float) -> Iterator[Finding]:
    """A tensor whose size is far from that of its like in the other layers."""
    families: dict[tuple[str, int], list[_Named]] = defaultdict(list)
    for one in tensors:
        pattern = _NUMBER.sub(".*.", _NUMBER.sub(".*.", one.key))  # twice: `.0.1.` overlaps
        if pattern != one.key and one.numbers.rms > 0:
            families[pattern, len(one.numbers.tensor.shape)].append(one)
    for (pattern, rank), family in families.items():
        if len(family) < _MIN_FAMILY or any(_is_gate(one) for one in family):
            continue
        middle = median(one.numbers.rms for one in family)
        allowed = factor * (1.0 if rank > 1 else _VECTOR_EASE)
        for one in family:
            ratio = one.numbers.rms / middle
            if not 1 / allowed <= ratio <= allowed:
                yield Finding(
                    code="FC355",
                    severity="warning",
                    key=one.key,
                    detail=f"`{escape(one.key)}` ({format_shape(one.numbers.tensor.shape)}): root "
                    f"mean square {one.numbers.rms:.3g}, {ratio:.3g} times the median of the "
                    f"{len(family)} tensors `{escape(pattern)}`",
                    hint="a wrong scale, a wrong tensor, or a layer that training blew up",
                    data={"rms": one.numbers.rms, "median": middle},
                )
