"""What a parity check found, as data: passes, stages, parameters, and what is to blame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flamingo_ckpt.errors import Finding

#: Dtypes by whose rounding a difference can be judged; others are reported and never decide.
DECIDING = ("float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How far the second side's tensor is from the first's, at one stage of one pass.

    Attributes:
        max_abs: largest absolute difference.
        relative: norm of the difference over the norm of the first side's tensor (L2).
        cosine: of the two as vectors.
        noise: the same relative measure for the first side against itself, summed in another order.
        tolerance: the largest relative difference that rounding explains; None where nobody judges.
        only_in: `a` or `b`, where the other side never computes this stage; "" otherwise.
        argmax_agreement: of logits: share of the positions with the same highest entry.
        kl: of logits: mean Kullback-Leibler divergence, in nats, of the first side's distribution
            from the second's.
        num_bad: elements of the second side that are NaN or infinite where the first's are not.
    """

    max_abs: float
    relative: float
    cosine: float
    noise: float = 0.0
    tolerance: float | None = None
    only_in: str = ""
    argmax_agreement: float | None = None
    kl: float | None = None
    num_bad: int = 0

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference. NaN agrees with nothing."""
        if self.only_in or self.num_bad:
            return False
        return self.tolerance is None or self.relative <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward of each side on the same inputs.

    Attributes:
        gates: `as-is` or `forced`.
        dtype: in torch's spelling.
        device: such as `cpu` or `cuda`.
        stages: name -> measure, in the order in which the first side computes them.
    """

    gates: str
    dtype: str
    device: str
    stages: Mapping[str, Measure]

    @property
    def decides(self) -> bool:
        """Whether its differences can be judged."""
        return self.dtype in DECIDING

    @property
    def first_divergence(self) -> str | None:
        """The first stage that rounding does not explain."""
        if not self.decides:
            return None
        return next((name for name, one in self.stages.items() if not one.agrees), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The two sides' tensors, compared bit by bit under canonical names.

    Attributes:
        num_compared: tensors that both sides have.
        different: canonical name -> what differs, in words.
        cast: canonical names of equal values in another dtype.
        only_a, only_b: canonical names that one side lacks.
    """

    num_compared: int = 0
    different: Mapping[str, str] = field(default_factory=dict)
    cast: tuple[str, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One suspect, tried: the second side was changed in this one thing and run again.

    Attributes:
        suspect: what was changed, in words.
        relative: the difference that was left at the stage; NaN where it could not be run.
        agrees: whether rounding explains what was left.
    """

    suspect: str
    relative: float
    agrees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Why a stage diverges.

    Attributes:
        stage: the first that diverged.
        gates: of the pass in which it did.
        tensors: canonical name -> (the first side's key, the second's).
        suspect: what explains it, in words; "" where nothing that was tried does.
        trials: what was tried, in order.
    """

    stage: str
    gates: str
    tensors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    suspect: str = ""
    trials: tuple[Trial, ...] = ()

    @property
    def is_confirmed(self) -> bool:
        """Whether changing that one thing made the two agree."""
        return any(trial.agrees for trial in self.trials)


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """What both sides write after the first row of the inputs, always taking the likeliest token.

    Attributes:
        a, b: token ids.
        equal: whether they are the same, but for ties.
        note: about ties; or why nothing was generated.
    """

    a: tuple[int, ...] = ()
    b: tuple[int, ...] = ()
    equal: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """Everything that a parity check found.

    Attributes:
        verdict: `pass`, `fail` or `incomplete`.
        passes: by dtype, then gates as they are before forced.
        modules: stage -> (path of the first side's module, of the second's).
        greedy: None where the kind of model writes nothing.
        findings: errors first.
        details: further facts of the run, for the report.
    """

    verdict: str
    passes: tuple[Pass, ...] = ()
    modules: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    parameters: Parameters = field(default_factory=Parameters)
    blame: tuple[Blame, ...] = ()
    greedy: Greedy | None = None
    findings: tuple[Finding, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def summary_of(result: ParityResult) -> dict[str, Any]:
    """`summary` of the JSON report: passes and layers."""
    stages = dict.fromkeys(name for one in result.passes for name in one.stages)
    return {
        "passes": [_pass(one) for one in result.passes],
        "layers": [
            {
                "stage": name,
                "module": list(result.modules.get(name, ("", ""))),
                "passes": [
                    _measure(one.stages[name], one) if name in one.stages else None
                    for one in result.passes
                ],
            }
            for name in stages
        ],
    }


def _pass(one: Pass) -> dict[str, Any]:
    shared = [measure for measure in one.stages.values() if not measure.only_in]
    last = next((m for m in reversed(shared) if m.argmax_agreement is not None), None)
    return {
        "gates": one.gates,
        "dtype": one.dtype,
        "device": one.device,
        "decides": one.decides,
        "max_abs": _worst(measure.max_abs for measure in shared),
        "max_rel": _worst(measure.relative for measure in shared),
        "cosine": -_worst(-measure.cosine for measure in shared),
        "argmax_agreement": last.argmax_agreement if last else None,
        "kl": last.kl if last else None,
        "agrees": one.first_divergence is None if one.decides else None,
        "first_divergence": one.first_divergence,
    }


def _worst(values: Any) -> float:
    """The largest; NaN is worse than any number."""
    found = list(values)
    return max(found, key=lambda value: (value != value, value), default=0.0)


def _measure(one: Measure, of: Pass) -> dict[str, Any]:
    return {
        "max_abs": one.max_abs,
        "rel": one.relative,
        "cosine": one.cosine,
        "noise": one.noise,
        "tolerance": one.tolerance,
        "agrees": one.agrees if of.decides else None,
        "only_in": one.only_in or None,
        **({"argmax_agreement": one.argmax_agreement} if one.argmax_agreement is not None else {}),
        **({"kl": one.kl} if one.kl is not None else {}),
        **({"num_bad": one.num_bad} if one.num_bad else {}),
    }


def extra_of(result: ParityResult) -> dict[str, Any]:
    """Further top-level fields of the JSON report."""
    parameters = result.parameters
    return {
        "blame": [
            {
                "stage": one.stage,
                "gates": one.gates,
                "tensors": [
                    {"canonical": name, "a": a, "b": b} for name, (a, b) in one.tensors.items()
                ],
                "suspect": one.suspect or None,
                "confirmed": one.is_confirmed,
                "tried": [
                    {"suspect": t.suspect, "rel": t.relative, "agrees": t.agrees}
                    for t in one.trials
                ],
            }
            for one in result.blame
        ],
        "parameters": {
            "compared": parameters.num_compared,
            "equal": parameters.num_compared - len(parameters.different),
            "cast": list(parameters.cast),
            "different": [
                {"canonical": name, "what": what} for name, what in parameters.different.items()
            ],
            "only_a": list(parameters.only_a),
            "only_b": list(parameters.only_b),
        },
        "greedy": None
        if result.greedy is None
        else {
            "a": list(result.greedy.a),
            "b": list(result.greedy.b),
            "equal": result.greedy.equal,
            "note": result.greedy.note or None,
        },
        **result.details,
    }
