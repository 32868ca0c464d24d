"""The check itself: run both sides on the same inputs, judge, and look for who is to blame."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.parity import verdicts
from flamingo_ckpt.parity.blame import Investigation
from flamingo_ckpt.parity.class_settings import class_findings
from flamingo_ckpt.parity.details import environment, side_details
from flamingo_ckpt.parity.inputs import Inputs, generate
from flamingo_ckpt.parity.memory import weight_budget
from flamingo_ckpt.parity.misfit import explain_misfit
from flamingo_ckpt.parity.numerics import exact_numerics
from flamingo_ckpt.parity.opening import Side
from flamingo_ckpt.parity.own_inputs import read_inputs
from flamingo_ckpt.parity.parameters import compare_parameters, rows_of
from flamingo_ckpt.parity.passes import (
    GATE_VALUE,
    GATES,
    MARGIN,
    First,
    Setting,
    SideRun,
    gate_value,
    run_first,
    run_second,
)
from flamingo_ckpt.parity.result import DECIDING, Blame, Parameters, ParityResult, Pass
from flamingo_ckpt.parity.shell import Shell, make_shell
from flamingo_ckpt.stream import check_unchanged

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig

#: Codes of refusals that say what is wrong with the weights, and not that they cannot be read.
_MISFITS = frozenset(
    {"FC202", "FC203", "FC204", "FC205", "FC217", "FC405", "FC413", "FC414", "FC415", "FC418"}
)
#: Misfits with which the model cannot be run.
_FATAL = frozenset({"FC202", "FC203", "FC205"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a check is asked for.

    Attributes:
        device: as `resolve_device` gives it.
        dtypes: of the passes, in torch's spelling. float32 is added where none of them decides.
        gates: of `GATES`; None for all that the kind of model has.
        seed: of generated inputs.
        inputs: a safetensors file with the user's own.
        make_inputs: gives inputs from the two configs instead, for pictures and prompts.
        max_memory: bytes that the weights of one side may take; None goes by what is free.
        num_greedy: tokens to write.
        folder: for what the first side computed; None is the system's place.
    """

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    gates: tuple[str, ...] | None = None
    seed: int = 0
    inputs: str | None = None
    make_inputs: Callable[[ModelConfig, ModelConfig], Inputs] | None = None
    max_memory: int | None = None
    num_greedy: int = 8
    folder: str | None = None


def check_parity(
    a: Side, b: Side, options: Options, on_step: Callable[[str], None] = lambda _: None
) -> ParityResult:
    """Whether the two compute the same; and if not, where first, and why.

    Args:
        a: the reference.
        b: what is compared with it.
        options: what is asked for.
        on_step: told what is done next.

    Raises:
        CkptError: FC430 where A does not fit its own config; FC006 gates to be forced where there
            are none; FC484 inputs that do not serve; FC489 too little memory; what reading either
            side raises.
    """
    lacking = [*verdicts.lacking_bases(a), *verdicts.lacking_bases(b)]
    if lacking:
        return ParityResult(verdict="incomplete", findings=tuple(lacking))
    with (
        exact_numerics(),
        tempfile.TemporaryDirectory(prefix="flamingo-ckpt-parity-", dir=options.folder) as folder,
    ):
        result = _Check(a=a, b=b, options=options, on_step=on_step, folder=folder).made()
    for side in (a, b):
        for manifest in (side.manifest, *(base.manifest for base in side.bases)):
            check_unchanged(manifest)
    return result


@dataclass(slots=True, kw_only=True)
class _Check:
    """A check while it is made."""

    a: Side
    b: Side
    options: Options
    on_step: Callable[[str], None]
    folder: str
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def made(self) -> ParityResult:
        self.on_step("planning")
        with self._timed("plan"):
            dtypes = _in_order(self.options.dtypes)
            first = make_shell(self.a, dtypes[0])
            verdicts.refuse_misfit(first)
            second, reason = _second(self.b, dtypes[0])
        self.findings += verdicts.setting_findings(self.a, self.b)
        setting = self._setting(first, second)
        self.findings += verdicts.input_findings(setting.inputs)
        rows = _missing_rows(first, second, setting.inputs)
        if second is None or rows is not None or any(m.code in _FATAL for m in second.misfits):
            self.findings += verdicts.misfit_findings(second, reason, rows)
            return self._misfit(first, second, setting, dtypes[0])
        known = {str(one.data.get("setting", "")) for one in self.findings}
        self.findings += class_findings(first, second, known)
        self.findings += second.misfits
        return self._run(first, second, setting, dtypes)

    def _run(
        self, first: Shell, second: Shell, setting: Setting, dtypes: Sequence[str]
    ) -> ParityResult:
        keys = verdicts.Keys(first, second)
        with self._timed("forward"):
            ours = run_first(first, dtypes[0], setting)
            theirs, passes = run_second(second, ours, setting)
        runs = ours.run, theirs
        self.on_step("comparing weights")
        with self._timed("parameters"):
            parameters = compare_parameters(first, second)
        self.findings += verdicts.parameter_findings(parameters, keys)
        self.findings += verdicts.run_findings(runs, setting.gates)
        diverging = next((one for one in passes if one.first_divergence), None)
        blame: list[Blame] = []
        if diverging is not None and not runs[0].not_finite:
            self.on_step("looking for the fault")
            with self._timed("blame"):
                blame = self._blame(first, ours, setting, diverging, parameters)
        ours.remove()
        with self._timed("forward"):
            for dtype in dtypes[1:]:
                passes += self._further(dtype, setting)
        self.findings += verdicts.divergence_findings(passes)
        self.findings += verdicts.blame_findings(blame, keys)
        greedy = verdicts.greedy_of(runs, setting.inputs, setting.num_greedy)
        self.findings += verdicts.greedy_findings(greedy)
        return ParityResult(
            verdict=verdicts.verdict_of(self.findings),
            passes=tuple(passes),
            modules={
                stage: (runs[0].modules.get(stage, ""), runs[1].modules.get(stage, ""))
                for stage in {**runs[0].modules, **runs[1].modules}
            },
            parameters=parameters,
            blame=tuple(blame),
            greedy=greedy,
            findings=verdicts.errors_first(self.findings),
            details=self._details(setting, runs),
        )

    def _further(self, dtype: str, setting: Setting) -> list[Pass]:
        """The passes of another dtype."""
        try:
            first = run_first(make_shell(self.a, dtype), dtype, setting, is_steadied=False)
        except CkptError as error:
            if dtype in DECIDING or error.code != "FC484":
                raise
            self.findings.append(replace(error.as_finding(), code="FC485", severity="warning"))
            return []
        second, passes = run_second(make_shell(self.b, dtype), first, setting, is_steadied=False)
        first.remove()
        told = verdicts.run_findings((first.run, second), setting.gates)
        known = {one.detail for one in self.findings}
        self.findings += [
            one if dtype in DECIDING else _at_most_a_warning(one)
            for one in told
            if one.detail not in known
        ]
        return passes

    def _misfit(
        self,
        first: Shell,
        second: Shell | None,
        setting: Setting,
        dtype: str,
    ) -> ParityResult:
        """B cannot be run as it is: what would make it compute what A does."""
        with self._timed("forward"):
            ours = run_first(first, dtype, setting, is_steadied=False)
        keys = verdicts.Keys(first, second)
        parameters = Parameters()
        if second is not None:
            # what the other side lacks is told as a misfit
            parameters = replace(compare_parameters(first, second), only_a=(), only_b=())
            self.findings += verdicts.parameter_findings(parameters, keys)
        self.on_step("looking for the fault")
        with self._timed("blame"):
            investigation = self._investigation(first, ours, setting)
            investigation.rows = rows_of(first)
            blame = explain_misfit(investigation, setting.gates[-1], tuple(parameters.different))
        self.findings += verdicts.blame_findings(blame, keys)
        return ParityResult(
            verdict=verdicts.verdict_of(self.findings),
            parameters=parameters,
            blame=tuple(blame),
            findings=verdicts.errors_first(self.findings),
            details=self._details(setting, (ours.run, SideRun(computed_by="not run"))),
        )

    def _blame(
        self,
        a: Shell,
        first: First,
        setting: Setting,
        diverging: Pass,
        parameters: Parameters,
    ) -> list[Blame]:
        investigation = self._investigation(a, first, setting)
        different = tuple(parameters.different)
        found = list(
            investigation.blame(str(diverging.first_divergence), diverging.gates, different)
        )
        # What closed gates hide is looked for too, with all that was found mended.
        if diverging.gates == "as-is" and "forced" in setting.gates and found[-1].is_confirmed:
            hidden = investigation.next_divergence("forced")
            if hidden is not None:
                found += investigation.blame(hidden, "forced", different)
        return found

    def _investigation(self, a: Shell, first: First, setting: Setting) -> Investigation:
        return Investigation(
            a=a,
            b=self.b,
            inputs=setting.inputs,
            traces=first.traces,
            tolerances=first.tolerances(),
            gate_values={gates: gate_value(gates) for gates in GATES},
            dtype=first.dtype,
            device=setting.device,
            budget=weight_budget(a.num_bytes(first.dtype), setting.device, setting.max_memory),
        )

    def _setting(self, first: Shell, second: Shell | None) -> Setting:
        options, configs = self.options, (first.config, (second or first).config)
        if options.make_inputs is not None:
            inputs = options.make_inputs(*configs)
        elif options.inputs is not None:
            inputs = read_inputs(options.inputs, self.a.kind, *configs)
        else:
            inputs = generate(self.a.kind, *configs, options.seed)
        return Setting(
            inputs=inputs,
            device=options.device,
            gates=_gates(options.gates, first),
            folder=self.folder,
            max_memory=options.max_memory,
            num_greedy=options.num_greedy,
            on_step=self.on_step,
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - started

    def _details(self, setting: Setting, runs: tuple[SideRun, SideRun]) -> dict[str, Any]:
        return {
            "data": setting.inputs.document(),
            "sides": [
                side_details(side, run) for side, run in zip((self.a, self.b), runs, strict=True)
            ],
            "judgement": {
                "noise": "A against itself, every sum taken in another order",
                "factor": MARGIN,
                **({"gate_value": GATE_VALUE} if "forced" in setting.gates else {}),
            },
            "environment": environment(setting.device),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def _at_most_a_warning(finding: Finding) -> Finding:
    return replace(finding, severity="warning") if finding.severity == "error" else finding


def _in_order(wanted: Sequence[str]) -> list[str]:
    """Those that decide first, the finer one before the other; there is always one."""
    deciding = [one for one in wanted if one in DECIDING] or ["float32"]
    rest = [one for one in wanted if one not in DECIDING]
    return list(dict.fromkeys([*sorted(deciding, reverse=True), *rest]))


def _second(b: Side, dtype: str) -> tuple[Shell | None, Finding | None]:
    """B's weights; or why they do not make a model."""
    try:
        return make_shell(b, dtype), None
    except CkptError as error:
        if error.code not in _MISFITS:
            raise
        return None, error.as_finding()


def _missing_rows(first: Shell, second: Shell | None, inputs: Inputs) -> tuple[int, int] | None:
    """(rows of A, rows of B) where B has none for a token of the inputs."""
    ours, theirs = rows_of(first), rows_of(second) if second is not None else None
    if ours is None or theirs is None or int(inputs.tokens.max()) < theirs:
        return None
    return ours, theirs


def _gates(wanted: tuple[str, ...] | None, shell: Shell) -> tuple[str, ...]:
    has_gates = any(name.endswith("_gate") for name in shell.atoms)
    if wanted is None:
        return GATES if has_gates else GATES[:1]
    if "forced" in wanted and not has_gates:
        raise CkptError(
            f"--gates forced: a {shell.side.kind} model has no gates",
            code="FC006",
            hint="leave --gates out",
        )
    return tuple(one for one in GATES if one in wanted)
