"""Run the two sides, one after the other: what each computes, how steady it is, what it writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.inputs import WRITING, Inputs, set_media_token
from flamingo_ckpt.parity.memory import weight_budget
from flamingo_ckpt.parity.numerics import unit_roundoff
from flamingo_ckpt.parity.result import DECIDING, Measure, Pass
from flamingo_ckpt.parity.running import FAILURES, Runner
from flamingo_ckpt.parity.shell import Shell
from flamingo_ckpt.parity.trace import Trace, digest_of, measure, num_not_finite
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch

#: Times the measured noise that a difference may be. Two implementations of one model measured at
#: 0.8 of it, for every family; the faults that are looked for, at hundreds.
MARGIN = 8.0
#: What gates are set to when they are forced open; tanh(0.5) is 0.46.
GATE_VALUE = 0.5
GATES = ("as-is", "forced")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all passes.

    Attributes:
        inputs: on the CPU.
        device: in torch's spelling.
        gates: of `GATES`, in that order.
        folder: for what the first side computed.
        max_memory: bytes that the weights of one side may take; None goes by what is free.
        num_greedy: tokens to write.
        on_step: told what is done next.
    """

    inputs: Inputs
    device: str
    gates: tuple[str, ...]
    folder: str
    max_memory: int | None = None
    num_greedy: int = 0
    on_step: Callable[[str], None] = lambda _: None


@dataclass(slots=True, kw_only=True)
class SideRun:
    """What running one side in one dtype gave.

    Attributes:
        computed_by: the class.
        modules: stage -> path of the module that it is heard at.
        is_streamed: whether weights came and went.
        num_forwards: runs, those of the greedy continuation not counted.
        unstable: the first stage that had other bits the second time; "" where none had.
        not_finite: stage -> number of elements that are NaN or infinite.
        failure: why it could not compute the inputs; "" where it could.
        tokens, leads: of the greedy continuation; none where nothing was written.
        not_written: why it could not write; "" where it could.
        unheard: stages that have a module and that no forward came to.
        num_gates, num_closed: gates, and those that are 0.
    """

    computed_by: str
    modules: Mapping[str, str] = field(default_factory=dict)
    is_streamed: bool = False
    num_forwards: int = 0
    unstable: str = ""
    not_finite: dict[str, int] = field(default_factory=dict)
    failure: str = ""
    tokens: list[int] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    not_written: str = ""
    unheard: tuple[str, ...] = ()
    num_gates: int = 0
    num_closed: int = 0


@dataclass(slots=True, kw_only=True)
class First:
    """The reference in one dtype: what it computed, and how far rounding alone takes it.

    Attributes:
        traces: gates -> its stages, on disk.
        noise: gates -> stage -> relative difference from itself, summed in another order.
    """

    dtype: str
    run: SideRun
    traces: dict[str, Trace]
    noise: dict[str, dict[str, float]]

    def tolerances(self) -> dict[str, dict[str, float]]:
        """Gates -> stage -> the largest relative difference that rounding explains."""
        floor = unit_roundoff(self.dtype)
        return {
            gates: {stage: MARGIN * max(one, floor) for stage, one in stages.items()}
            for gates, stages in self.noise.items()
        }

    def remove(self) -> None:
        """Delete what is on disk."""
        for trace in self.traces.values():
            trace.remove()


def gate_value(gates: str) -> float | None:
    """What all gates are set to; None leaves them as they are."""
    return GATE_VALUE if gates == "forced" else None


def run_first(shell: Shell, dtype: str, setting: Setting, *, is_steadied: bool = True) -> First:
    """Run the reference: each pass, each again in another order, one again as it was.

    Args:
        shell: of the reference.
        dtype: in torch's spelling.
        setting: of the check.
        is_steadied: whether to run one pass twice, and to write.

    Raises:
        CkptError: FC484 where it cannot compute the inputs, FC489 where memory does not suffice.
    """
    inputs, mask = setting.inputs, setting.inputs.mask
    runner, run = _opened(shell, dtype, setting)
    first = First(dtype=dtype, run=run, traces={}, noise={})
    for gates in setting.gates:
        setting.on_step(f"A in {dtype}, gates {gates}")
        trace = Trace(os.path.join(setting.folder, f"{dtype}-{gates}.trace"))
        noise: dict[str, float] = {}

        def keep(stage: str, tensor: torch.Tensor, trace: Trace = trace) -> None:
            trace.write(stage, tensor)
            if bad := num_not_finite(tensor, stage, mask):
                run.not_finite.setdefault(stage, bad)

        def compare(
            stage: str,
            tensor: torch.Tensor,
            trace: Trace = trace,
            noise: dict[str, float] = noise,
        ) -> None:
            found = measure(stage, trace.read(stage), tensor, mask)
            noise[stage] = 0.0 if found.num_bad else found.relative

        try:
            runner.run(inputs, keep, gate=gate_value(gates))
            runner.run(inputs, compare, gate=gate_value(gates), is_reordered=True)
        except FAILURES as error:
            raise CkptError(
                f"A cannot compute the inputs: {_reason(error)}",
                code="FC484",
                where=shell.side.uri,
                hint="`--inputs` and `--prompt` have to fit the model",
            ) from error
        first.traces[gates], first.noise[gates] = trace, noise
        run.unheard = tuple(stage for stage in run.modules if stage not in trace.stages)
    if is_steadied:
        gates = setting.gates[-1]
        _repeat(runner, gates, first.traces[gates].digests, run, setting)
        _write(runner, run, setting)
    _close(runner, run)
    return first


def run_second(
    shell: Shell, first: First, setting: Setting, *, is_steadied: bool = True
) -> tuple[SideRun, list[Pass]]:
    """Run the other side against the reference's stages.

    Args:
        shell: of the other side.
        first: what it is compared with.
        setting: of the check.
        is_steadied: whether to run one pass twice, and to write.
    """
    inputs, mask = setting.inputs, setting.inputs.mask
    runner, run = _opened(shell, first.dtype, setting)
    passes: list[Pass] = []
    digests: dict[str, str] = {}
    for gates, trace in first.traces.items():
        setting.on_step(f"B in {first.dtype}, gates {gates}")
        found: dict[str, Measure] = {}
        digests.clear()

        def compare(
            stage: str,
            tensor: torch.Tensor,
            trace: Trace = trace,
            found: dict[str, Measure] = found,
        ) -> None:
            digests[stage] = digest_of(tensor)
            if stage in trace.stages:
                found[stage] = measure(stage, trace.read(stage), tensor, mask)
            else:
                found[stage] = Measure(max_abs=0.0, relative=0.0, cosine=1.0, only_in="b")

        try:
            runner.run(inputs, compare, gate=gate_value(gates))
        except FAILURES as error:
            run.failure = run.failure or _reason(error)
        else:
            run.unheard = tuple(stage for stage in run.modules if stage not in found)
        passes.append(_judged(first, gates, found, setting.device))
    if is_steadied and not run.failure:
        _repeat(runner, setting.gates[-1], dict(digests), run, setting)
        _write(runner, run, setting)
    _close(runner, run)
    return run, passes


def _reason(error: BaseException) -> str:
    return escape((f"{type(error).__name__}: {error}".splitlines() or [""])[0])[:300]


def _opened(shell: Shell, dtype: str, setting: Setting) -> tuple[Runner, SideRun]:
    set_media_token(shell.module, setting.inputs, is_upstream=shell.side.is_upstream)
    budget = weight_budget(shell.num_bytes(dtype), setting.device, setting.max_memory)
    setting.on_step(f"{'loading' if budget is None else 'streaming'} {shell.side.name}")
    kind = type(shell.module)
    runner = Runner(shell=shell, dtype=dtype, device=setting.device, budget=budget).open()
    gates = [shell.atom(name) for name in shell.atoms if name.endswith("_gate")]
    run = SideRun(
        computed_by=f"{kind.__module__.partition('.')[0]}'s {kind.__name__}",
        modules={tap.stage: tap.path for tap in runner.taps},
        is_streamed=runner.is_streamed,
        num_gates=len(gates),
        num_closed=sum(not bool(one.any()) for one in gates),
    )
    return runner, run


def _close(runner: Runner, run: SideRun) -> None:
    run.num_forwards = runner.num_forwards
    runner.close()


def _repeat(
    runner: Runner, gates: str, digests: Mapping[str, str], run: SideRun, setting: Setting
) -> None:
    """Run once more: a side that gives other bits the second time cannot be judged."""
    setting.on_step(f"{runner.shell.side.name} once more")

    def compare(stage: str, tensor: torch.Tensor) -> None:
        if not run.unstable and digests.get(stage) != digest_of(tensor):
            run.unstable = stage

    runner.run(setting.inputs, compare, gate=gate_value(gates))


def _write(runner: Runner, run: SideRun, setting: Setting) -> None:
    """The greedy continuation; not where each token would read all weights again."""
    writes = setting.inputs.kind in WRITING and bool(setting.num_greedy)
    if runner.is_streamed or not writes:
        return
    setting.on_step(f"{runner.shell.side.name} writes {setting.num_greedy} tokens")
    try:
        run.tokens, run.leads = runner.greedy(setting.inputs, setting.num_greedy)
    except FAILURES as error:  # beyond the positions that it has, say
        run.not_written = _reason(error)


def _judged(first: First, gates: str, found: Mapping[str, Measure], device: str) -> Pass:
    noise, tolerances = first.noise[gates], first.tolerances()[gates]
    decides = first.dtype in DECIDING
    return Pass(
        gates=gates,
        dtype=first.dtype,
        device=device,
        stages={
            stage: replace(
                one,
                noise=noise.get(stage, 0.0),
                tolerance=tolerances.get(stage) if decides else None,
            )
            for stage, one in _in_order(first.traces[gates], found).items()
        },
    )


def _in_order(trace: Trace, found: Mapping[str, Measure]) -> dict[str, Measure]:
    """The reference's stages in its order; what only the other side has, behind its neighbour."""
    absent = Measure(max_abs=0.0, relative=0.0, cosine=1.0, only_in="a")
    order = list(trace.stages)
    before = ""
    for stage in found:
        if stage not in trace.stages:
            order.insert(order.index(before) + 1 if before in order else 0, stage)
        before = stage
    return {stage: found.get(stage, absent) for stage in order}
