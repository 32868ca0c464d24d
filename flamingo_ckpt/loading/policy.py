"""Whether a matching is good enough to be loaded: every refusal, before a byte moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flamingo_ckpt.errors import CkptError, Finding, LoadError, name_some
from flamingo_ckpt.layouts.layout import BASE_OF_GROUP
from flamingo_ckpt.loading import hints
from flamingo_ckpt.loading.match import Load, Matching
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.parts import parts_by_name
from flamingo_ckpt.loading.report import LoadReport
from flamingo_ckpt.loading.resize import PositionTable, Resized, plan_resize
from flamingo_ckpt.loading.targets import Target
from flamingo_ckpt.tensors import TensorInfo, escape

#: Below this share of both sides, what matched is taken for an accident.
_MIN_SHARE = 0.1
#: Last components of buffers that modules compute, and that old files hold.
_COMPUTED = frozenset({"position_ids", "inv_freq", "masked_bias", "attn_mask"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A load that will be done.

    Attributes:
        loads: what is read into what.
        resized: module key -> how its table of positions changes.
        zeros: tensors of the module that become zero.
        report: complete but for what only the bytes tell.
    """

    loads: tuple[Load, ...]
    resized: Mapping[str, Resized]
    zeros: tuple[Target, ...]
    report: LoadReport


@dataclass(slots=True)
class _Sorted:
    """What becomes of the keys that did not match, while they are sorted."""

    missing: list[Target] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    kept: list[Target] = field(default_factory=list)
    excused: list[Target] = field(default_factory=list)
    zeros: dict[str, str] = field(default_factory=dict)
    zero_targets: list[Target] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)


def judge(
    matching: Matching,
    targets: Sequence[Target],
    tensors: Mapping[str, TensorInfo],
    options: LoadOptions,
    report: LoadReport,
    *,
    tables: Mapping[str, PositionTable],
    extra_state: Sequence[str] = (),
    computable: frozenset[str] = frozenset(),
    hopeless: Sequence[str] = (),
) -> Verdict:
    """Decide by policy.

    Args:
        matching: of the file with the module.
        targets: of the module.
        tensors: of the file, by key as stored.
        options: what the caller accepts.
        report: with the names of the two sides.
        tables: of positions, by name.
        extra_state: keys of what the module keeps beside its tensors; never filled.
        computable: buffers on meta that can be computed, by name.
        hopeless: what is on meta and can get no content from anywhere.

    Raises:
        LoadError: FC430 the checkpoint does not fit, FC431 next to nothing matched, FC432 another
            language model, FC433 something would stay on meta, FC437 integers for weights, FC440
            to FC445 a table of positions that cannot be brought to the model's size.
    """
    hints.refuse_other_family(matching, report)
    found = _sort(matching, targets, tensors, options)
    resized, mismatched = _shapes(matching, tables, options, report)
    cast = _casts(matching, tensors, options, report)
    on_meta = [
        target.key
        for target in (*found.missing, *found.kept)
        if target.is_meta and computable.isdisjoint(target.names)
    ]
    is_lenient = options.policy == "lenient"
    report = replace(
        report,
        layout=matching.file.layout.name if matching.file else None,
        model_layout=matching.model.layout.name if matching.model else None,
        num_loaded=len(matching.loads),
        num_bytes=sum(load.step.num_bytes for load in matching.loads),
        cast=cast,
        resized=tuple(resized.values()),
        missing_keys=(
            *(key for target in found.missing for key in target.keys),
            *(key for key in extra_state if key not in options.may_miss),
        ),
        unexpected_keys=tuple(found.unexpected),
        mismatched=mismatched,
        left_on_meta=(*on_meta, *hopeless),
        absent_by_design=found.absent,
        kept={
            **{key: "computed by the model" for target in found.kept for key in target.keys},
            **{key: "may be missing" for target in found.excused for key in target.keys},
        },
        aliases=matching.aliases,
        ignored=found.ignored,
        zero_filled=found.zeros,
    )
    report = replace(report, findings=(*report.findings, *_findings(report)))
    _refuse_accident(matching, targets, found, report)
    is_wrong = mismatched or matching.faults or report.left_on_meta
    if is_wrong or (not is_lenient and (report.missing_keys or report.unexpected_keys)):
        raise _does_not_fit(matching, report, options)
    return Verdict(
        loads=matching.loads, resized=resized, zeros=tuple(found.zero_targets), report=report
    )


def _sort(
    matching: Matching,
    targets: Sequence[Target],
    tensors: Mapping[str, TensorInfo],
    options: LoadOptions,
) -> _Sorted:
    found = _Sorted(ignored=dict(matching.ignored), zeros=dict(matching.padding))
    loaded = {name for load in matching.loads for name in load.target.names}
    absent = absent_by_design(matching, targets) if options.policy == "partial" else {}
    for target in matching.missing:
        if why := _zero_because(target, matching, loaded):
            found.zeros |= dict.fromkeys(target.keys, why)
            found.zero_targets.append(target)
        elif is_computed(target, matching):
            found.kept.append(target)
        elif target.key in absent and not target.is_meta:
            found.absent |= dict.fromkeys(target.keys, absent[target.key])
        elif options.may_miss.isdisjoint((*target.keys, *target.names)) or target.is_meta:
            found.missing.append(target)
        else:
            found.excused.append(target)
    for key in matching.unexpected:
        if _is_old_buffer(tensors[key]):
            found.ignored[key] = "computed when the model is built"
        else:
            found.unexpected.append(key)
    return found


def is_computed(target: Target, matching: Matching) -> bool:
    """Whether a tensor of the module is a buffer that it computes itself."""
    if target.is_parameter:
        return False
    leaf = target.name.rpartition(".")[2]
    return target.key in matching.recomputed or leaf in (*_COMPUTED, "num_batches_tracked")


def _is_old_buffer(tensor: TensorInfo) -> bool:
    """Masks, positions and rotary frequencies, as files of older classes hold them."""
    *path, leaf = tensor.name.split(".")
    is_mask = leaf == "bias" and path[-1:] in (["attn"], ["attention"]) and len(tensor.shape) == 4
    return is_mask or leaf in _COMPUTED


def _zero_because(target: Target, matching: Matching, loaded: set[str]) -> str:
    """Why a tensor that the file lacks may be zero; "" where it may not."""
    for name in target.names:
        lead = matching.model.layout.zero_fill.get(name) if matching.model else None
        if lead in loaded:
            return "the model's class has a bias where the file's has none"
        before, _, leaf = name.rpartition("logit_bias")
        if name.endswith("logit_bias") and not leaf and before + "logit_scale" in loaded:
            return "a CLIP trained with softmax has no bias: its logits stay what they are"
    return ""


def absent_by_design(matching: Matching, targets: Sequence[Target]) -> dict[str, str]:
    """Module key -> base, of what a partial Flamingo checkpoint leaves to its bases.

    The vision tower and the decoder layers are absent as a whole or not by design. What else a
    language model has goes by itself (training with FSDP saves the head, and the layers too, and
    leaves out the last norm): where the layers are in the file, only if the tower is not, for such
    a file is whole. An input embedding is a base's only where it is frozen.
    A language model by itself is such a base, and may lack nothing.
    """
    if not hints.is_flamingo(matching):
        return {}
    parts = parts_by_name(targets, matching.groups)
    lacking: dict[str, list[Target]] = {}
    for target in matching.missing:
        lacking.setdefault(parts[target.key], []).append(target)
    have = {parts[load.target.key] for load in matching.loads}
    found: dict[str, str] = {}
    for group, missing in lacking.items():
        base = BASE_OF_GROUP.get(group, "")
        if group == "lm.embed":
            base = "language" if not any(one.tensor.requires_grad for one in missing) else ""
        needs = "lm.layers" if group in ("lm.rest", "lm.embed") else group
        is_whole = needs not in have or (group == "lm.rest" and "vision" not in have)
        if base and is_whole:
            found |= {target.key: base for target in missing}
    return found


def _shapes(
    matching: Matching,
    tables: Mapping[str, PositionTable],
    options: LoadOptions,
    report: LoadReport,
) -> tuple[dict[str, Resized], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    resized: dict[str, Resized] = {}
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for load in matching.loads:
        target, shape = load.target, load.step.shape
        table = next((tables[name] for name in target.names if name in tables), None)
        if table is not None:
            change = _resize(load, table, options, report)
            if change is not None:
                resized[target.key] = change
        elif shape != target.shape and not {shape, target.shape} <= {(), (1,)}:
            mismatched[target.key] = (shape, target.shape)
    return resized, mismatched


def _resize(
    load: Load, table: PositionTable, options: LoadOptions, report: LoadReport
) -> Resized | None:
    try:
        return plan_resize(
            load.target.key,
            load.step.shape,
            table,
            image_grid=options.image_grid,
            text_positions=options.text_positions,
            where=report.uri,
        )
    except CkptError as error:
        raise LoadError(
            error.message,
            report=report,
            code=error.code,
            where=report.uri,
            hint=error.hint,
            key=error.key,
        ) from error


def _casts(
    matching: Matching,
    tensors: Mapping[str, TensorInfo],
    options: LoadOptions,
    report: LoadReport,
) -> dict[str, tuple[str, str]]:
    """Casts as torch does them on copying; quantized numbers are no floating-point weights."""
    cast: dict[str, tuple[str, str]] = {}
    scaled = _with_scales(tensors)
    for load in matching.loads:
        src, dst = load.step.dtype, wanted_dtype(load, options)
        if src.name == dst:
            continue
        is_narrow = src.bits < 16 and not scaled.isdisjoint(load.keys)
        is_quantized = load.target.is_parameter and (not src.is_real_float or is_narrow)
        if is_quantized or src.torch is None:
            is_complex = str(src.torch).startswith("complex")
            why = (
                "its imaginary parts would be lost"
                if is_complex
                else "quantized weights need their scales"
            )
            raise LoadError(
                f"`{escape(load.keys[0])}` is {src}, and `{load.target.key}` of {report.model} is "
                f"{load.target.dtype}: {why}",
                report=report,
                code="FC437",
                where=report.uri,
                key=load.keys[0],
                hint="take the weights before they were quantized",
            )
        cast[load.target.key] = (src.name, dst)
    return cast


def _with_scales(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Keys of weights of 8 bits beside which the file has scales: `weight`, `weight_scale_inv`."""
    scales: dict[str, list[str]] = {}
    for key in tensors:
        place, _, leaf = key.rpartition(".")
        if "scale" in leaf:
            scales.setdefault(place, []).append(leaf)
    found: set[str] = set()
    for key, tensor in tensors.items():
        place, _, leaf = key.rpartition(".")
        forms = f"{leaf}_scale", f"scale_{leaf}"
        if tensor.dtype.bits < 16 and any(one.startswith(forms) for one in scales.get(place, ())):
            found.add(key)
    return found


def wanted_dtype(load: Load, options: LoadOptions) -> str:
    """The dtype that a tensor of the module has afterwards, by its safetensors name."""
    from flamingo_ckpt.loading.fill import becomes_new, dtype_of_new

    target = load.target
    return dtype_of_new(load, options).name if becomes_new(target, options) else target.dtype.name


def _refuse_accident(
    matching: Matching, targets: Sequence[Target], found: _Sorted, report: LoadReport
) -> None:
    """A load that matched next to nothing is a mistake under every policy."""
    num_loaded = len(matching.loads)
    num_file = num_loaded + len(found.unexpected)
    few = num_loaded < _MIN_SHARE * num_file and num_loaded < _MIN_SHARE * len(targets)
    lost = hints.lost_towers(matching, found.unexpected)
    if num_loaded and not few and not lost:
        return
    what = f"{num_loaded} of {len(targets)} tensors of {report.model} have a counterpart among "
    what += f"the {num_file} of the file"
    if num_loaded and not few:
        what = f"nothing of {name_some(lost, where='')} fits, although both sides have it"
    raise LoadError(
        "\n".join((what, *report.problems())),
        report=report,
        code="FC431",
        where=report.uri,
        hint=hints.for_names(matching, found.unexpected, targets),
    )


def _does_not_fit(matching: Matching, report: LoadReport, options: LoadOptions) -> LoadError:
    counts = {
        "missing": len(report.missing_keys),
        "unexpected": len(report.unexpected_keys),
        "of another shape": len(report.mismatched),
        "left without bytes": len(report.left_on_meta),
        "incomplete": len(matching.faults),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    faults = [f"  `{escape(key)}`: {why}" for key, why in matching.faults.items()]
    head = f"the checkpoint does not fit {report.model}: {told}"
    only_meta = report.left_on_meta and not (
        report.missing_keys or report.mismatched or report.unexpected_keys or matching.faults
    )
    return LoadError(
        "\n".join((head, *report.problems(), *faults[:10])),
        report=report,
        code="FC433" if only_meta else "FC430",
        where=report.uri,
        hint=hints.for_misfit(matching, report, options),
    )


def _findings(report: LoadReport) -> list[Finding]:
    found = [one.as_finding() for one in report.resized]

    def add(code: str, keys: Mapping[str, object], detail: str) -> None:
        if keys:
            names = ", ".join(f"`{escape(key)}`" for key in list(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            found.append(Finding(code=code, severity="info", detail=f"{detail}: {names}{more}"))

    kinds = sorted({f"{src} to {dst}" for src, dst in report.cast.values()})
    add("FC436", report.cast, f"{len(report.cast)} tensors cast ({', '.join(kinds)})")
    add("FC434", report.ignored, f"{len(report.ignored)} keys of the file are not needed")
    add("FC435", report.zero_filled, "zero, since the file has nothing for it")
    bases = Counter(report.absent_by_design.values())
    absent = " and ".join(f"{count} of the {base} base" for base, count in sorted(bases.items()))
    add("FC215", report.absent_by_design, f"absent by design, {absent}")
    return found
