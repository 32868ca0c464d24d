"""Against the source: the same bits, and the same computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.result import Outcome, failed, skipped
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.stream import OnBytes

if TYPE_CHECKING:
    from flamingo_ckpt.parity import Side
    from flamingo_ckpt.plan import Plan

_NO_SOURCE = "there is nothing to compare with; --source names what the release was made from"
#: Refusals of parity that say that it cannot be run here, and not that anything is wrong.
_NOT_RUNNABLE = frozenset({"FC416", "FC421", "FC466", "FC482", "FC484", "FC489"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a release was made from.

    Attributes:
        uri: as the user named it.
        make_plan: plans the conversion again, with the options that it had.
        open_pair: both sides of a parity check.
    """

    uri: str
    make_plan: Callable[[], Plan]
    open_pair: Callable[[], tuple[Side, Side]]


def check_bits(
    subject: Subject, source: Source | None, on_bytes: OnBytes = lambda _: None
) -> Outcome:
    """Every tensor is derived again from the source and compared bit for bit."""
    if source is None:
        return skipped("bits", _NO_SOURCE)
    if subject.manifest is None:
        return skipped("bits", "the checkpoint cannot be read")
    from flamingo_ckpt.verify import summary_of, verify

    try:
        plan = source.make_plan()
        result = verify(plan, subject.manifest, on_bytes)
    except CkptError as error:
        return failed("bits", error)
    equal, cast = len(result.bit_exact), len(result.cast)
    sentence = f"{equal} tensors have the bits of the source"
    if cast:
        sentence += f", {cast} are casts of its values"
    wrong = len(result.different) + len(result.missing) + len(result.unexpected)
    if wrong:
        sentence += f"; {wrong} are not as the source gives them"
    if result.unverified:
        sentence += f"; {len(result.unverified)} came from a base that is not given"
    return Outcome(
        name="bits",
        sentence=sentence,
        findings=result.findings,
        is_skipped=bool(result.unverified),
        details={"bits": {"summary": summary_of(result)}, "layouts": _layouts(plan)},
    )


def _layouts(plan: Plan) -> tuple[str, str] | None:
    if plan.layout is None or plan.target is None:
        return None
    return plan.layout.layout.name, plan.target.name


def check_parity(
    subject: Subject,
    source: Source | None,
    settings: Mapping[str, Any],
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Source and release are run on the same inputs, gates as they are and gates forced open."""
    if source is None:
        return skipped("parity", _NO_SOURCE)
    if subject.manifest is None:
        return skipped("parity", "the checkpoint cannot be read")
    from flamingo_ckpt import parity

    try:
        device = parity.resolve_device(settings.get("device"))
        options = parity.Options(
            device=device,
            dtypes=tuple(settings.get("dtypes", ("float32",))),
            gates=tuple(settings["gates"]) if "gates" in settings else None,
            seed=settings.get("seed", 0),
        )
        result = parity.check_parity(*source.open_pair(), options, say)
    except CkptError as error:
        if error.code in _NOT_RUNNABLE:
            return skipped("parity", error.message, _note(error))
        return failed("parity", error)
    details = {"parity": {"summary": parity.summary_of(result), **parity.extra_of(result)}}
    if result.verdict == "incomplete":
        lacking = "; ".join(one.detail for one in result.findings)
        notes = tuple(_as_note(one) for one in result.findings)
        return skipped("parity", lacking or "it could not be run", *notes)
    if result.verdict == "pass":
        worst = max(
            (stage.relative for one in result.passes for stage in one.stages.values()),
            default=0.0,
        )
        sentence = (
            f"source and release compute the same in {len(result.passes)} passes on {device}, "
            f"largest relative difference {worst:.2g}"
        )
    else:
        stage = next((one.first_divergence for one in result.passes if one.first_divergence), None)
        sentence = f"they part at `{stage}`" if stage else "they do not compute the same"
    return Outcome(name="parity", sentence=sentence, findings=result.findings, details=details)


def _note(error: CkptError) -> Finding:
    return _as_note(error.as_finding())


def _as_note(finding: Finding) -> Finding:
    """What keeps a check from running is no fault of the release."""
    return Finding(
        code="FC624", severity="info", key="parity", detail=finding.detail, hint=finding.hint
    )
