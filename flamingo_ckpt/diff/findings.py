"""What `diff` says about each key: one finding per key, with the key as stored in its file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from flamingo_ckpt.diff.likeness import Pair
from flamingo_ckpt.diff.sides import Side
from flamingo_ckpt.diff.views import Entry, View, are_comparable, have_one_family
from flamingo_ckpt.errors import Finding, name_some
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.tensors import TensorInfo, escape, format_shape

EMBED, HEAD = "lm.embed_tokens.weight", "lm.head.weight"
#: Canonical name -> what its rows are: tensors that a loader can resize.
RESIZABLE: Mapping[str, str] = {
    "vision.position_embedding.weight": "position embedding",
    "text.position_embedding.weight": "position embedding",
    "lm.embed_positions.weight": "position embedding",
    EMBED: "vocabulary",
    HEAD: "vocabulary",
    "lm.head.bias": "vocabulary",
    "text.token_embedding.weight": "vocabulary",
}


def headlines(a: Side, b: Side) -> Iterable[Finding]:
    """What explains many keys at once: other models, mixed layouts, another interval."""
    yield from _kinds(a, b)
    for side, other, label in ((a, b, "A"), (b, a, "B")):
        yield from _mixed(side, other, label)
    yield from _interval(a, b)


def _kinds(a: Side, b: Side) -> Iterable[Finding]:
    if a.detection is None or b.detection is None:
        return
    told = [f"`{side.detection.title}`" for side in (a, b) if side.detection is not None]
    if not are_comparable(a, b):
        layouts = [side.detection.layout for side in (a, b) if side.detection is not None]
        refused = [one.refused for one in layouts if one.refused]
        yield Finding(
            code="FC416",
            severity="error",
            detail=f"A is a {layouts[0].space} model in layout {told[0]}, B a {layouts[1].space} "
            f"model in layout {told[1]}: no map leads from one to the other"
            + (f" ({refused[0]})" if refused else "")
            + ", so keys are compared as stored",
        )
    elif not have_one_family(a, b):
        yield Finding(
            code="FC416",
            severity="error",
            detail=f"the language models are of different families: A is {told[0]}, B is {told[1]}",
            hint="name the config of the model that the checkpoint was made for"
            if a.is_model or b.is_model
            else None,
        )


def _mixed(side: Side, other: Side, label: str) -> Iterable[Finding]:
    found = side.detection
    if found is None or found.elsewhere is None:
        return
    layout, keys = found.elsewhere
    if layout_named(layout).space != found.layout.space or all(
        one in other.tensors for one in keys
    ):
        return
    yield Finding(
        code="FC417",
        severity="error",
        detail=f"{label} is in layout `{found.layout.name}`, but {len(keys)} of its "
        f"{found.num_keys} keys are spelt as in `{layout}`: "
        + name_some([escape(side.stored(key)) for key in keys], 3),
        data={"layout": layout, "keys": [side.stored(key) for key in keys]},
    )


def _interval(a: Side, b: Side) -> Iterable[Finding]:
    layers = [_gated(side) for side in (a, b)]
    if not all(layers) or layers[0] == layers[1]:
        return
    every = [_every(found) for found in layers]
    if every[0] == every[1]:
        return
    told = [f"every {n} layers" if n else "at irregular layers" for n in every]
    hints = {
        b.is_model: f"`cross_attn_every_n_layers` of the model should be {every[0]}",
        a.is_model: f"`cross_attn_every_n_layers` of the model should be {every[1]}",
    }
    yield Finding(
        code="FC217",
        severity="error",
        detail=f"A has gated cross-attention {told[0]}, B {told[1]}: "
        "cross_attn_every_n_layers is another one",
        hint=hints.get(True) if all(every) else None,
        data={"layers": [sorted(found) for found in layers]},
    )


def _gated(side: Side) -> frozenset[int]:
    atoms = side.reading.atoms if side.reading is not None else {}
    return frozenset(int(name.split(".")[1]) for name in atoms if group_of(name) == "xattn")


def _every(layers: frozenset[int]) -> int:
    """The interval that explains the layers; 0 where none does."""
    every = min(layers) + 1
    return every if layers == {every * (n + 1) - 1 for n in range(len(layers))} else 0


def header(mine: Entry, other: Entry, b: Side) -> Finding | None:
    """Another shape or dtype; None where both are equal."""
    key = escape(mine.key)
    data = {
        "other_key": other.key,
        "dtype": [mine.dtype.name, other.dtype.name],
        "shape": [list(mine.shape), list(other.shape)],
    }
    there = "in the model" if b.is_model else "in B"
    if mine.shape != other.shape:
        layout = b.detection.layout.name if b.detection is not None else "LAYOUT"
        found = _shape_difference(mine, other, there, layout)
        also = f", and {mine.dtype} here, {other.dtype} {there}" * (mine.dtype is not other.dtype)
        return replace(found, detail=f"`{key}`: {found.detail}{also}", data=data)
    if mine.dtype is not other.dtype:
        return Finding(
            code="FC206",
            severity="error",
            key=mine.key,
            detail=f"`{key}`: {mine.dtype} here, {other.dtype} {there}",
            hint="--level keys compares names alone; `convert --dtype` casts",
            data=data,
        )
    return None


def _shape_difference(mine: Entry, other: Entry, there: str, layout: str) -> Finding:
    what = RESIZABLE.get(mine.canonical[0]) if len(mine.canonical) == 1 else None
    if what and mine.shape and mine.shape[1:] == other.shape[1:]:
        return _resizable(mine, other, there, what, layout)
    told = f"{format_shape(mine.shape)} here, {format_shape(other.shape)} {there}"
    if mine.shape == other.shape[::-1]:
        told += ": transposed"
    elif math.prod(mine.shape) == math.prod(other.shape):
        told += ": as many elements in another shape"
    return Finding(code="FC205", severity="error", key=mine.key, detail=told)


def _resizable(mine: Entry, other: Entry, there: str, what: str, layout: str) -> Finding:
    rows = mine.shape[0], other.shape[0]
    hint, grids = None, ""
    if what == "vocabulary" and mine.canonical[0].startswith("lm."):
        hint = f"`convert --to {layout} --vocab-rows {rows[1]}` pads or cuts it"
    elif mine.canonical[0].startswith("vision."):
        sizes = [_grid(one) for one in rows]
        if all(sizes):
            grids = f", a grid of {sizes[0]} here and of {sizes[1]} {there}"
            hint = "the two are for other image sizes; loaders that interpolate can take it"
    return Finding(
        code="FC216",
        severity="error",
        key=mine.key,
        detail=f"{what} of {rows[0]} rows here, {rows[1]} {there}: {rows[1] - rows[0]:+d}{grids}",
        hint=hint,
    )


def _grid(rows: int) -> str:
    """`4x4` for 17 rows, with a class token, or for 16, without; "" where there is no square."""
    for extra in (1, 0):
        side = math.isqrt(max(rows - extra, 0))
        if side and side * side == rows - extra:
            return f"{side}x{side}"
    return ""


def renamed(pair: Pair) -> Finding:
    """Two keys that are probably one tensor."""
    return Finding(
        code="FC214",
        severity="error",
        key=pair.our_key,
        detail=f"`{escape(pair.our_key)}` is probably `{escape(pair.their_key)}`: {pair.why}",
        data={"other_key": pair.their_key, "evidence": pair.why},
    )


def missing(
    entries: Mapping[str, Entry], ours: View, a: Side, b: Side, nameless: Collection[str]
) -> Iterable[Finding]:
    """What B has and A lacks."""
    there = "the model" if b.is_model else "B"
    head = next((one for one in ours.entries.values() if one.canonical == (HEAD,)), None)
    told: set[str] = set()
    for name, entry in entries.items():
        hint = None
        if name in nameless:
            hint = "a strict load reports it; otherwise the other name fills it"
        elif entry.canonical == (EMBED,) and head is not None:
            hint = f"`{escape(head.key)}` is there, and is the same tensor where the two are tied"
        why = entry.why
        if name in ours.faults:
            why = _lacking_parts(entry, ours.faults[name].why, a)
        for key in entry.keys:
            if key not in told:
                told.add(key)
                yield Finding(
                    code="FC203",
                    severity="error",
                    key=key,
                    detail=f"`{escape(key)}` ({entry.describe()}) is in {there} and not in A"
                    + (f": {why}" if why else ""),
                    hint=hint,
                )


def _lacking_parts(entry: Entry, why: str, a: Side) -> str:
    """Which of A's own keys would be needed."""
    atoms = a.reading.atoms if a.reading is not None else {}
    places = [
        a.table.place(name) for name in entry.canonical if name not in atoms and a.table is not None
    ]
    names = list(dict.fromkeys(escape(place.name) for place in places if place is not None))
    return f"{why}; A lacks {name_some(names, 3)}" if names else why


def unexpected(entries: Mapping[str, Entry], a: Side, b: Side) -> Iterable[Finding]:
    """What A has and B does not."""
    told: set[str] = set()
    known = _known_elsewhere(a)
    for name, entry in entries.items():
        why = entry.why
        if not why and entry.canonical and a.stored(name) not in entry.keys:
            why = f"it would be `{escape(name)}` there"
        for key in entry.keys:
            if key in told:
                continue
            told.add(key)
            where = ", and the model has no place for it" if b.is_model else " and not in B"
            layout = known.get(key)
            yield Finding(
                code="FC204",
                severity="error",
                key=key,
                detail=f"`{escape(key)}` ({entry.describe()}) is in A{where}"
                + (f": {why}" if why else ""),
                hint=f"`{layout}` spells it so" if layout else None,
            )


def _known_elsewhere(side: Side) -> Mapping[str, str]:
    found = side.detection
    if found is None or found.elsewhere is None:
        return {}
    return {side.stored(key): found.elsewhere[0] for key in found.elsewhere[1]}


def absent(names: Mapping[str, str]) -> Iterable[Finding]:
    """What one side lacks by design."""
    for key, base in names.items():
        yield Finding(
            code="FC215",
            severity="info",
            key=key,
            detail=f"`{escape(key)}` is absent by design: the {base} base supplies it",
            data={"base": base},
        )


def tied(entry: Entry, twin: Entry, label: str) -> Finding:
    """A second name that the other side does not need."""
    return Finding(
        code="FC210",
        severity="info",
        key=entry.key,
        detail=f"`{escape(entry.key)}` is the same tensor as `{escape(twin.key)}` in {label}; "
        "the other side has it under that name",
    )


def stored_apart(entry: Entry, model: Side) -> Finding:
    """A tied weight that a file stores a second time."""
    return Finding(
        code="FC210",
        severity="info",
        key=entry.key,
        detail=f"`{escape(entry.key)}` is stored apart from the tensor that {escape(model.uri)} "
        "ties it to; a loader keeps one of the two",
    )


def no_place(entry: Entry, lacking: Side, reason: str) -> Finding:
    """A key that the other side's layout cannot hold, which is no loss."""
    layout = lacking.detection.layout.name if lacking.detection else ""
    return Finding(
        code="FC209",
        severity="info",
        key=entry.key,
        detail=f"`{escape(entry.key)}` has no place in `{layout}`: {reason}",
    )


def left_out(view: View, holder: Side, other: Side) -> Iterable[Finding]:
    """What the other side's layout has no place for; trained tensors where the layout is lossy."""
    layout = other.detection.layout.name if other.detection else ""
    lossy = holder.detection is not None and bool(holder.detection.layout.lossy)
    for key, reason in view.left_out.items():
        yield Finding(
            code="FC209",
            severity="warning" if lossy else "info",
            key=key,
            detail=f"`{escape(key)}` has no place in `{layout}`: {reason}",
            data={"in": holder.uri},
        )


def dropped(a: Side, b: Side) -> Iterable[Finding]:
    """Keys that no model needs, such as buffers that are computed, where one side has them."""
    for side, other, label in ((a, b, "A"), (b, a, "B")):
        reasons = side.reading.dropped if side.reading is not None else {}
        for name, reason in reasons.items():
            if are_comparable(a, b) and name not in other.tensors:
                key = side.stored(name)
                yield Finding(
                    code="FC209",
                    severity="info",
                    key=key,
                    detail=f"`{escape(key)}` is in {label} only, and nothing needs it: {reason}",
                )


def twins(a: Side, b: Side, level: str) -> Iterable[Finding]:
    """Two names of one tensor that are not equal: a loader takes one of them, and which is luck."""
    if level == "keys":
        return
    for side, other, label in ((a, b, "A"), (b, a, "B")):
        for first, second in side.reading.equal if side.reading is not None else ():
            if not _differ(first, second, level):
                continue
            pair = [other.tensors.get(one.name) for one in (first, second)]
            both_have_it = not other.is_model and all(
                theirs is not None and not _differ(mine, theirs, level)
                for mine, theirs in zip((first, second), pair, strict=True)
            )
            names = [escape(side.stored(one.name)) for one in (second, first)]
            yield Finding(
                code="FC202",
                severity="warning" if both_have_it else "error",
                key=side.stored(second.name),
                detail=f"`{names[0]}` ({second.describe()}) and `{names[1]}` ({first.describe()}) "
                f"are two names of one tensor in {label}, and differ",
                data={"other_key": side.stored(first.name)},
            )


def _differ(one: TensorInfo, other: TensorInfo, level: str) -> bool:
    if one.dtype is not other.dtype or one.shape != other.shape:
        return True
    if level != "bits" or one.identity == other.identity:
        return False
    from flamingo_ckpt.diff.bits import digest_of

    return digest_of(one) != digest_of(other)
