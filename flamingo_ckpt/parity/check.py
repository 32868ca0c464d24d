"""The check itself: run both sides on the same inputs, judge, and look for who is to blame."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding, name_some
from flamingo_ckpt.parity.blame import Investigation, set_media_token
from flamingo_ckpt.parity.compute import LOGITS
from flamingo_ckpt.parity.inputs import Inputs, generate, read_inputs
from flamingo_ckpt.parity.memory import weight_budget
from flamingo_ckpt.parity.numerics import exact_numerics, unit_roundoff
from flamingo_ckpt.parity.opening import Side, describe_config
from flamingo_ckpt.parity.parameters import compare_parameters
from flamingo_ckpt.parity.result import (
    DECIDING,
    Blame,
    Greedy,
    Measure,
    Parameters,
    ParityResult,
    Pass,
)
from flamingo_ckpt.parity.running import Runner
from flamingo_ckpt.parity.shell import Shell, make_shell
from flamingo_ckpt.parity.stages import taps_of
from flamingo_ckpt.parity.suspects import setting_differences
from flamingo_ckpt.parity.trace import Trace, digest_of, measure, num_not_finite, with_tolerance
from flamingo_ckpt.stream import check_unchanged
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch

    from flamingo_ckpt.models.config import ModelConfig

#: Times the measured noise that a difference may be. Two implementations of one model measured at
#: 0.8 of it, for every family; the faults that are looked for, at hundreds.
MARGIN = 8.0
#: What gates are set to when they are forced open; tanh(0.5) is 0.46.
GATE_VALUE = 0.5
#: Of the spread of the scores: a lead below this is a tie that rounding may decide.
_TIE = 1e-4
GATES = ("as-is", "forced")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a check is asked for.

    Attributes:
        device: as `resolve_device` gives it.
        dtypes: of the passes, in torch's spelling.
        gates: of `GATES`; None for all that the kind of model has.
        seed: of generated inputs.
        inputs: a safetensors file with the user's own.
        make_inputs: gives inputs from two configs instead, for pictures and prompts.
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


@dataclass(slots=True, kw_only=True)
class _Ran:
    """What running one side in one dtype gave."""

    stages: dict[str, list[str]] = field(default_factory=dict)
    is_deterministic: bool = True
    unstable: str = ""
    tokens: list[int] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    num_forwards: int = 0
    is_streamed: bool = False
    computed_by: str = ""
    modules: dict[str, str] = field(default_factory=dict)
    num_closed: int = 0
    num_gates: int = 0


@dataclass(slots=True, kw_only=True)
class _Check:
    """A check while it is made."""

    a: Side
    b: Side
    options: Options
    on_step: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time under a name."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - started


def check_parity(
    a: Side, b: Side, options: Options, on_step: Callable[[str], None] = lambda _: None
) -> ParityResult:
    """Do the two compute the same? And if not, where first, and why.

    Args:
        a: the reference.
        b: what is compared with it.
        options: what is asked for.
        on_step: told what is done next.

    Raises:
        CkptError: FC430 where A does not fit its own config; FC006 gates to be forced where there
            are none; FC484 inputs that do not serve; what reading either side raises.
    """
    lacking = [_lacking(side) for side in (a, b) if side.wanted_bases]
    if lacking:
        return ParityResult(verdict="incomplete", findings=tuple(lacking))
    check = _Check(a=a, b=b, options=options, on_step=on_step)
    with exact_numerics(), tempfile.TemporaryDirectory(
        prefix="flamingo-ckpt-parity-", dir=options.folder
    ) as folder:
        return _checked(check, folder)


def _lacking(side: Side) -> Finding:
    kinds = " and ".join(f"--base-{kind}" for kind in side.wanted_bases)
    return Finding(
        code="FC482",
        severity="error",
        detail=f"not run: {side.name} is partial by design, and its "
        f"{' and '.join(side.wanted_bases)} weights are in releases of their own",
        hint=f"name them: {kinds}",
        data={"side": side.name, "missing_bases": list(side.wanted_bases)},
    )


def _checked(check: _Check, folder: str) -> ParityResult:
    a, b, options = check.a, check.b, check.options
    dtypes = _dtypes(options.dtypes)
    check.on_step("planning")
    with check.timed("plan"):
        first = make_shell(a, dtypes[0])
        _refuse_misfit(first)
        second, reason = _second(b, dtypes[0])
    check.findings += _setting_findings(a, b)
    inputs = _inputs(options, a.kind, first, second)
    rows = _missing_rows(first, second, inputs)
    if second is None or rows is not None or _cannot_run(second):
        misfits = _misfit_findings(second, reason, rows)
        return _misfit_result(check, first, second, inputs, misfits, rows, folder)
    check.findings += second.misfits
    gates = _gates(options, first)
    passes: list[Pass] = []
    ran: tuple[_Ran, _Ran] | None = None
    judged: dict[str, Trace] = {}
    parameters = Parameters()
    for at, dtype in enumerate(dtypes):
        if at:
            first, second = make_shell(a, dtype), make_shell(b, dtype)
        runs = _run_dtype(check, (first, second), inputs, gates, dtype, folder, passes, judged)
        ran = ran or runs
        if not at:
            check.on_step("comparing weights")
            with check.timed("parameters"):
                again = make_shell(a, dtype), make_shell(b, dtype)
                parameters = compare_parameters(*again, lambda _: None)
                keys = _Keys(*again)
    assert ran is not None
    check.findings += _parameter_findings(parameters, keys)
    check.findings += _run_findings(ran, check)
    blame: list[Blame] = []
    deciding = [one for one in passes if one.decides and one.dtype == dtypes[0]]
    check.findings += _divergence_findings(passes)
    diverging = next((one for one in deciding if one.first_divergence), None)
    if diverging is not None:
        check.on_step("looking for the fault")
        with check.timed("blame"):
            blame = _investigate(check, keys.a, inputs, judged, passes, diverging, parameters)
        check.findings += _blame_findings(blame, keys)
    greedy = _greedy(check, ran, inputs)
    if greedy is not None and greedy.equal is False:
        check.findings.append(
            Finding(
                code="FC486",
                severity="error",
                detail=f"the greedy continuations differ: {list(greedy.a)} in A, "
                f"{list(greedy.b)} in B",
            )
        )
    for side in (a, b):
        for manifest in (side.manifest, *(base.manifest for base in side.bases)):
            check_unchanged(manifest)
    check.findings += _gate_findings(ran[0], gates, a.kind)
    return ParityResult(
        verdict=_verdict(check.findings),
        passes=tuple(passes),
        modules={
            name: (ran[0].modules.get(name, ""), ran[1].modules.get(name, ""))
            for name in {**ran[0].modules, **ran[1].modules}
        },
        parameters=parameters,
        blame=tuple(blame),
        greedy=greedy,
        findings=tuple(_errors_first(check.findings)),
        details=_details(check, inputs, ran, gates),
    )


def _dtypes(wanted: Sequence[str]) -> list[str]:
    """Those that decide first; there is always one."""
    deciding = [one for one in wanted if one in DECIDING] or ["float32"]
    # the finer one is the stricter judge
    return [*sorted(deciding, reverse=True), *(one for one in wanted if one not in DECIDING)]


def _refuse_misfit(shell: Shell) -> None:
    if not shell.misfits:
        return
    first = shell.misfits[0]
    more = f", and {len(shell.misfits) - 1} more" if len(shell.misfits) > 1 else ""
    raise CkptError(
        f"{first.detail}{more}",
        code="FC430",
        where=shell.side.uri,
        key=first.key,
        hint="A is the reference and has to fit its own config: `flamingo-ckpt diff` against "
        f"model:{describe_config(shell.side)} lists every key",
    )


#: Codes of refusals that say what is wrong with the weights and not that they cannot be read.
_MISFITS = frozenset(
    {"FC202", "FC203", "FC204", "FC205", "FC217", "FC405", "FC413", "FC414", "FC415", "FC418"}
)


def _second(b: Side, dtype: str) -> tuple[Shell | None, Finding | None]:
    """B's weights; or why they do not make a model."""
    try:
        return make_shell(b, dtype), None
    except CkptError as error:
        if error.code not in _MISFITS:
            raise
        return None, replace(error.as_finding(), detail=f"B: {error.message}")


def _cannot_run(shell: Shell) -> bool:
    return any(one.code in ("FC203", "FC205", "FC202") for one in shell.misfits)


def _inputs(options: Options, kind: str, first: Shell, second: Shell | None) -> Inputs:
    configs = first.config, (second or first).config
    if options.make_inputs is not None:
        return options.make_inputs(*configs)
    if options.inputs is not None:
        return read_inputs(options.inputs, kind, *configs)
    return generate(kind, *configs, options.seed)


def _missing_rows(first: Shell, second: Shell | None, inputs: Inputs) -> tuple[int, int] | None:
    """(rows of A, rows of B) where B has none for a token of the inputs."""
    from flamingo_ckpt.parity.blame import rows_of

    if second is None:
        return None
    ours, theirs = rows_of(first), rows_of(second)
    if ours is None or theirs is None or int(inputs.tokens.max()) < theirs:
        return None
    return ours, theirs


def _gates(options: Options, shell: Shell) -> tuple[str, ...]:
    has_gates = any(name.endswith("_gate") for name in shell.atoms)
    if options.gates is None:
        return GATES if has_gates else GATES[:1]
    if "forced" in options.gates and not has_gates:
        raise CkptError(
            f"--gates forced: a {shell.side.kind} model has no gates",
            code="FC006",
            hint="leave --gates out",
        )
    return tuple(one for one in GATES if one in options.gates)


# --- running --------------------------------------------------------------------------------------


def _run_dtype(
    check: _Check,
    shells: tuple[Shell, Shell],
    inputs: Inputs,
    gates: tuple[str, ...],
    dtype: str,
    folder: str,
    passes: list[Pass],
    judged: dict[str, Trace],
) -> tuple[_Ran, _Ran]:
    """The passes of one dtype: A first, its stages kept on disk, then B against them."""
    first, second = shells
    traces = {one: Trace(os.path.join(folder, f"{dtype}-{one}.trace")) for one in gates}
    noise: dict[str, dict[str, float]] = {one: {} for one in gates}
    measures: dict[str, dict[str, Measure]] = {one: {} for one in gates}
    ours = _run_first(check, first, inputs, dtype, traces, noise)
    theirs = _run_second(check, second, inputs, dtype, traces, measures)
    floor = unit_roundoff(dtype)
    for one in gates:
        decides = dtype in DECIDING
        stages = _in_order(traces[one], measures[one])
        passes.append(
            Pass(
                gates=one,
                dtype=dtype,
                device=check.options.device,
                stages={
                    name: with_tolerance(found, noise[one].get(name, 0.0), MARGIN, floor)
                    if decides
                    else replace(found, noise=noise[one].get(name, 0.0))
                    for name, found in stages.items()
                },
            )
        )
        if dtype in DECIDING and one not in judged:
            judged[one] = traces[one]
        elif traces[one] is not judged.get(one):
            traces[one].remove()
    return ours, theirs


def _in_order(trace: Trace, measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """A's stages in its order, with what only one side has where it belongs."""
    found: dict[str, Measure] = {}
    later = [name for name in measures if name not in trace.stages]
    absent = Measure(max_abs=0.0, relative=0.0, cosine=1.0, only_in="a")
    for name in trace.stages:
        found[name] = measures.get(name, absent)
        # what B computes besides stands behind what it computed right before
        while later and _before(later[0], measures) == name:
            found[later[0]] = measures[later.pop(0)]
    return {**found, **{name: measures[name] for name in later}}


def _before(name: str, measures: Mapping[str, Measure]) -> str:
    order = list(measures)
    at = order.index(name)
    return order[at - 1] if at else ""


def _run_first(
    check: _Check,
    shell: Shell,
    inputs: Inputs,
    dtype: str,
    traces: Mapping[str, Trace],
    noise: Mapping[str, dict[str, float]],
) -> _Ran:
    ran, runner = _opened(check, shell, inputs, dtype, "A")
    mask = inputs.mask
    with check.timed("forward"):
        for gates, trace in traces.items():
            check.on_step(f"A, {dtype}, gates {gates}")

            def keep(stage: str, tensor: torch.Tensor, trace: Trace = trace) -> None:
                trace.write(stage, tensor)
                if bad := num_not_finite(tensor, stage, mask):
                    ran.not_finite.setdefault(stage, bad)

            runner.run(inputs, keep, gate=_gate_value(gates))

            def compare(stage: str, tensor: torch.Tensor, trace: Trace = trace, of: str = gates) -> None:
                found = measure(stage, trace.read(stage), tensor, mask)
                noise[of][stage] = 0.0 if found.num_bad else found.relative

            runner.run(inputs, compare, gate=_gate_value(gates), is_reordered=True)
        gates, trace = list(traces.items())[-1]
        _repeat(runner, inputs, gates, trace.digests, ran)
        _write(check, runner, inputs, dtype, ran)
    return _closed(runner, ran)


def _run_second(
    check: _Check,
    shell: Shell,
    inputs: Inputs,
    dtype: str,
    traces: Mapping[str, Trace],
    measures: Mapping[str, dict[str, Measure]],
) -> _Ran:
    ran, runner = _opened(check, shell, inputs, dtype, "B")
    mask = inputs.mask
    digests: dict[str, str] = {}
    with check.timed("forward"):
        for gates, trace in traces.items():
            check.on_step(f"B, {dtype}, gates {gates}")
            digests.clear()

            def compare(stage: str, tensor: torch.Tensor, trace: Trace = trace, of: str = gates) -> None:
                digests[stage] = digest_of(tensor)
                if stage not in trace.stages:
                    one = Measure(max_abs=0.0, relative=0.0, cosine=1.0, only_in="b")
                else:
                    one = measure(stage, trace.read(stage), tensor, mask)
                measures[of][stage] = one

            try:
                runner.run(inputs, compare, gate=_gate_value(gates))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                ran.failures[gates] = escape(f"{type(error).__name__}: {error}".splitlines()[0])
        if not ran.failures:
            _repeat(runner, inputs, list(traces)[-1], dict(digests), ran)
            _write(check, runner, inputs, dtype, ran)
    return _closed(runner, ran)


def _opened(
    check: _Check, shell: Shell, inputs: Inputs, dtype: str, name: str
) -> tuple[_Ran, Runner]:
    import torch

    options = check.options
    set_media_token(shell, inputs)
    wanted = getattr(torch, dtype)
    budget = weight_budget(shell.num_bytes(wanted), options.device, options.max_memory)
    check.on_step(f"loading {name}" if budget is None else f"streaming {name}")
    with check.timed("load"):
        runner = Runner(shell=shell, dtype=dtype, device=options.device, budget=budget).open()
    ran = _Ran(
        is_streamed=runner.is_streamed,
        computed_by=_class_of(shell),
        modules={tap.stage: tap.path for tap in runner.taps},
    )
    gates = [name for name in shell.atoms if name.endswith("_gate")]
    ran.num_gates = len(gates)
    ran.num_closed = sum(not bool(shell.atom(name).any()) for name in gates)
    return ran, runner


def _class_of(shell: Shell) -> str:
    kind = type(shell.module)
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"


def _closed(runner: Runner, ran: _Ran) -> _Ran:
    ran.num_forwards = runner.num_forwards
    runner.close()
    return ran


def _gate_value(gates: str) -> float | None:
    return GATE_VALUE if gates == "forced" else None


def _repeat(
    runner: Runner, inputs: Inputs, gates: str, digests: Mapping[str, str], ran: _Ran
) -> None:
    """Run once more: a side that gives other bits the second time cannot be judged."""

    def compare(stage: str, tensor: torch.Tensor) -> None:
        if not ran.unstable and digests.get(stage) != digest_of(tensor):
            ran.unstable, ran.is_deterministic = stage, False

    runner.run(inputs, compare, gate=_gate_value(gates))


def _write(check: _Check, runner: Runner, inputs: Inputs, dtype: str, ran: _Ran) -> None:
    count = check.options.num_greedy
    if inputs.kind == "clip" or runner.is_streamed or not count or dtype not in DECIDING:
        return
    check.on_step(f"writing {count} tokens")
    ran.tokens, ran.leads = runner.greedy(inputs, count)


# --- a second side that does not fit --------------------------------------------------------------


def _misfit_findings(
    second: Shell | None, reason: Finding | None, rows: tuple[int, int] | None
) -> list[Finding]:
    found = [reason] if reason is not None else []
    if second is not None:
        found += second.misfits
    if rows is not None:
        ours, theirs = rows
        found.append(
            Finding(
                code="FC418",
                severity="error",
                key="lm.embed_tokens.weight",
                detail=f"A's vocabulary has {ours} rows and B's {theirs}: B has none for tokens of "
                "the inputs",
                hint="the embedding was not resized to the tokenizer, or lost the added rows",
            )
        )
    return found


def _misfit_result(
    check: _Check,
    first: Shell,
    second: Shell | None,
    inputs: Inputs,
    misfits: list[Finding],
    rows: tuple[int, int] | None,
    folder: str,
) -> ParityResult:
    """B cannot be run as it is. What would have to change for it to compute what A does?"""
    from flamingo_ckpt.parity.misfit import explain_misfit

    check.on_step("looking for the fault")
    gates = _gates(check.options, first)
    dtype = _dtypes(check.options.dtypes)[0]
    traces = {one: Trace(os.path.join(folder, f"{one}.trace")) for one in gates}
    noise: dict[str, dict[str, float]] = {one: {} for one in gates}
    a = make_shell(check.a, dtype)
    ran = _run_first(check, first, inputs, dtype, traces, noise)
    floor = unit_roundoff(dtype)
    investigation = _investigation(
        check,
        a,
        inputs,
        traces,
        {one: {n: MARGIN * max(v, floor) for n, v in noise[one].items()} for one in gates},
        dtype,
    )
    if rows is not None:
        investigation.rows = rows[0]
    blame = explain_misfit(investigation, second, gates[-1])
    keys = _Keys(a, second or a)
    check.findings += misfits
    check.findings += _blame_findings(blame, keys)
    both = ran, _Ran(computed_by=ran.computed_by if second is None else _class_of(second))
    return ParityResult(
        verdict=_verdict(check.findings),
        blame=tuple(blame),
        findings=tuple(_errors_first(check.findings)),
        details=_details(check, inputs, both, gates),
    )


# --- judging --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Keys:
    """The checkpoints' own names of canonical tensors."""

    a: Shell
    b: Shell

    def both(self, name: str) -> tuple[str, str]:
        return self.a.key_of(name), self.b.key_of(name)


def _verdict(findings: Sequence[Finding]) -> str:
    errors = [one for one in findings if one.severity == "error"]
    if any(one.code not in ("FC482", "FC487") for one in errors):
        return "fail"
    return "incomplete" if errors else "pass"


def _errors_first(findings: Sequence[Finding]) -> list[Finding]:
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda one: order[one.severity])


def _setting_findings(a: Side, b: Side) -> Iterator[Finding]:
    for name, (ours, theirs) in setting_differences(a.model, b.model).items():
        yield Finding(
            code="FC407",
            severity="error",
            detail=f"`{name}` is {escape(repr(ours))} in A and {escape(repr(theirs))} in B: with "
            "equal weights the two compute differently",
            data={"setting": name, "a": ours, "b": theirs},
        )
    if not b.has_own_config and a.has_own_config:
        yield _borrowed(b, a)
    elif not a.has_own_config and b.has_own_config and a.config is b.config:
        yield _borrowed(a, b)


def _borrowed(side: Side, other: Side) -> Finding:
    return Finding(
        code="FC485",
        severity="warning",
        detail=f"{side.name} has no config, and is computed by {other.name}'s: a wrong setting in "
        "that one does not show",
        hint="--config names the config of the model that was trained",
    )


def _parameter_findings(parameters: Parameters, keys: _Keys) -> Iterator[Finding]:
    for name, what in parameters.different.items():
        ours, theirs = keys.both(name)
        yield Finding(
            code="FC301",
            severity="error",
            key=theirs,
            detail=f"`{escape(theirs)}` ({name}): {what}",
            data={"canonical": name, "a": ours, "b": theirs},
        )
    for names, code, side in (
        (parameters.only_a, "FC203", "A"),
        (parameters.only_b, "FC204", "B"),
    ):
        for name in names:
            yield Finding(
                code=code,
                severity="error",
                key=name,
                detail=f"`{name}` is in {side} alone",
                data={"canonical": name},
            )
    if parameters.cast:
        yield Finding(
            code="FC206",
            severity="info",
            detail=f"{len(parameters.cast)} tensors hold the same values in another dtype",
        )


def _run_findings(ran: tuple[_Ran, _Ran], check: _Check) -> Iterator[Finding]:
    for name, one in zip("AB", ran, strict=True):
        if not one.is_deterministic:
            yield Finding(
                code="FC481",
                severity="error",
                detail=f"{name} gives other bits when it is run again, first at `{one.unstable}`",
                hint="it draws random numbers, or a kernel has no fixed order of summation",
            )
        for gates, reason in list(one.failures.items())[:1]:
            yield Finding(
                code="FC480",
                severity="error",
                detail=f"{name} cannot compute the inputs (gates {gates}): {reason}",
            )
    if ran[0].not_finite:
        stage, bad = next(iter(ran[0].not_finite.items()))
        yield Finding(
            code="FC487",
            severity="error",
            detail=f"A itself gives {bad} values at `{stage}` that are no numbers: what comes "
            "after it cannot be compared",
            hint="`--dtype float64` tells an overflow from a broken weight",
        )
    if any(one.is_streamed for one in ran) and check.options.num_greedy and check.a.kind != "clip":
        yield Finding(
            code="FC485",
            severity="info",
            detail="no greedy continuation: weights are streamed, and each token would read them "
            "all again",
        )


def _divergence_findings(passes: Sequence[Pass]) -> Iterator[Finding]:
    """FC402 where only forced gates show it, else FC480 for the first stage of all passes."""
    for dtype in dict.fromkeys(one.dtype for one in passes if one.decides):
        by_gates = {one.gates: one for one in passes if one.dtype == dtype}
        plain, forced = by_gates.get("as-is"), by_gates.get("forced")
        if plain is not None and plain.first_divergence is not None:
            yield _diverges(plain)
        elif forced is not None and forced.first_divergence is not None:
            if plain is None:
                yield _diverges(forced)
                continue
            stage = forced.first_divergence
            yield Finding(
                code="FC402",
                severity="error",
                detail=f"the two agree only because the gates are as they are: with gates forced "
                f"open they diverge at `{stage}` ({_how_far(forced.stages[stage])})",
                hint="training would open the gates on to other weights",
                data={"stage": stage, "dtype": dtype},
            )


def _diverges(one: Pass) -> Finding:
    stage = str(one.first_divergence)
    measure = one.stages[stage]
    if measure.only_in:
        what = f"only {measure.only_in.upper()} computes `{stage}`"
    else:
        what = f"the two diverge at `{stage}` ({_how_far(measure)})"
    return Finding(
        code="FC480",
        severity="error",
        detail=f"{what}, gates {one.gates}, {one.dtype} on {one.device}",
        data={"stage": stage, "gates": one.gates, "dtype": one.dtype},
    )


def _how_far(one: Measure) -> str:
    return f"relative {one.relative:.2g}, and rounding explains {one.tolerance or 0:.2g}"


def _gate_findings(ran: _Ran, gates: tuple[str, ...], kind: str) -> Iterator[Finding]:
    if kind != "flamingo" or not ran.num_closed:
        return
    if ran.num_closed == ran.num_gates and "forced" not in gates:
        yield Finding(
            code="FC482",
            severity="error",
            detail=f"all {ran.num_gates} gates are 0, and no pass with forced gates was asked for: "
            "nothing behind them was compared",
            hint="leave --gates out",
        )
        return
    yield Finding(
        code="FC485",
        severity="info",
        detail=f"{ran.num_closed} of {ran.num_gates} gates are 0 as they are: only the pass with "
        "forced gates sees what is behind them",
    )


def _greedy(check: _Check, ran: tuple[_Ran, _Ran], inputs: Inputs) -> Greedy | None:
    if inputs.kind == "clip" or not check.options.num_greedy:
        return None
    first, second = ran
    if any(one.is_streamed for one in ran):
        return Greedy(note="not run: weights are streamed")
    if not first.tokens or not second.tokens:
        return Greedy(note="not run: B cannot compute the inputs")
    a, b = tuple(first.tokens), tuple(second.tokens)
    if a == b:
        return Greedy(a=a, b=b, equal=True)
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    if first.leads[at] < _TIE:
        note = f"token {at + 1} is a tie: its lead is {first.leads[at]:.1g} of the spread"
        return Greedy(a=a, b=b, equal=None, note=note)
    return Greedy(a=a, b=b, equal=False)


def _investigate(
    check: _Check,
    a: Shell,
    inputs: Inputs,
    traces: Mapping[str, Trace],
    passes: Sequence[Pass],
    diverging: Pass,
    parameters: Parameters,
) -> list[Blame]:
    tolerances = {
        one.gates: {name: found.tolerance or 0.0 for name, found in one.stages.items()}
        for one in passes
        if one.dtype == diverging.dtype
    }
    investigation = _investigation(check, a, inputs, traces, tolerances, diverging.dtype)
    stage = str(diverging.first_divergence)
    found = list(investigation.blame(stage, diverging.gates, parameters.different))
    forced = next(
        (one for one in passes if one.gates == "forced" and one.dtype == diverging.dtype), None
    )
    # What the gates hide as they are is looked for too, with all that was found mended.
    if diverging.gates == "as-is" and forced is not None and found[-1].is_confirmed:
        hidden = investigation.next_divergence("forced")
        if hidden is not None:
            found += investigation.blame(hidden, "forced", parameters.different)
    return found


def _investigation(
    check: _Check,
    a: Shell,
    inputs: Inputs,
    traces: Mapping[str, Trace],
    tolerances: Mapping[str, Mapping[str, float]],
    dtype: str,
) -> Investigation:
    import torch

    options = check.options
    budget = weight_budget(
        a.num_bytes(getattr(torch, dtype)), options.device, options.max_memory
    )
    return Investigation(
        a=a,
        b=check.b,
        inputs=inputs,
        traces=traces,
        tolerances=tolerances,
        gate_values={one: _gate_value(one) for one in GATES},
        dtype=dtype,
        device=options.device,
        budget=budget,
    )


def _blame_findings(blame: Sequence[Blame], keys: _Keys) -> Iterator[Finding]:
    for one in blame:
        last = next((trial for trial in one.trials if trial.agrees), None)
        if last is None:
            tried = f"; tried {len(one.trials)}, see `blame`" if one.trials else ""
            yield Finding(
                code="FC488",
                severity="warning",
                detail=f"nothing that was tried explains `{one.stage}` (gates {one.gates}){tried}",
            )
            continue
        names = list(one.tensors)
        key = keys.both(names[0])[1] if names else None
        where = f"; in B: {name_some([escape(k) for _, k in one.tensors.values()], 4)}" if names else ""
        yield Finding(
            code="FC483",
            severity="error",
            key=key,
            detail=f"to blame for `{one.stage}`: {one.suspect}; changed in B, the two agree there "
            f"(relative {last.relative:.2g}){where}",
            data={"stage": one.stage, "tensors": names},
        )


# --- the report -----------------------------------------------------------------------------------


def _details(
    check: _Check, inputs: Inputs, ran: tuple[_Ran, _Ran], gates: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "data": inputs.document(),
        "sides": [
            {
                "uri": escape(side.uri),
                "computed_by": one.computed_by,
                "config": describe_config(side),
                "bases": [escape(base.manifest.uri) for base in side.bases],
                "streamed": one.is_streamed,
                "num_forwards": one.num_forwards,
                "deterministic": one.is_deterministic,
            }
            for side, one in zip((check.a, check.b), ran, strict=True)
        ],
        "judgement": {
            "noise": "A against itself, every sum taken in another order",
            "factor": MARGIN,
            **({"gate_value": GATE_VALUE} if "forced" in gates else {}),
        },
        "environment": _environment(check.options.device),
        "seconds": {name: round(value, 3) for name, value in check.seconds.items()},
    }


def _environment(device: str) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    is_cuda = device.startswith("cuda")
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
        "notes": [] if is_cuda else ["not run on a GPU"],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")),
                "",
            )
    except OSError:
        return ""


__all__ = ["GATES", "GATE_VALUE", "LOGITS", "MARGIN", "Options", "check_parity", "taps_of"]
