"""What the runs and the weights say, as findings; and the one word that they add up to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flamingo_ckpt.diff.settings import setting_differs
from flamingo_ckpt.errors import CkptError, Finding, name_some
from flamingo_ckpt.models.settings import differing, settings_of
from flamingo_ckpt.parity.inputs import WRITING, Inputs
from flamingo_ckpt.parity.opening import Side, describe_config
from flamingo_ckpt.parity.passes import SideRun
from flamingo_ckpt.parity.result import Blame, Greedy, Measure, Parameters, Pass
from flamingo_ckpt.parity.shell import Shell
from flamingo_ckpt.parity.suspects import setting_differences
from flamingo_ckpt.prepare import own_config
from flamingo_ckpt.tensors import escape

#: Errors that say that something could not be run; without others the check is incomplete.
_NOT_RUN = frozenset({"FC482", "FC487"})
#: A lead of one token below this share of the spread of all scores is a tie.
_TIE = 1e-4


@dataclass(frozen=True, slots=True)
class Keys:
    """The checkpoints' own names of canonical tensors."""

    a: Shell
    b: Shell | None

    def both(self, name: str) -> tuple[str, str]:
        """(A's key, B's key); "" where there is none."""
        return self.a.key_of(name), self.b.key_of(name) if self.b is not None else ""


def verdict_of(findings: Sequence[Finding]) -> str:
    """`fail` for an error, `incomplete` where something did not run, else `pass`."""
    errors = {one.code for one in findings if one.severity == "error"}
    if errors - _NOT_RUN:
        return "fail"
    return "incomplete" if errors else "pass"


def errors_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """In order of severity."""
    order = {"error": 0, "warning": 1, "info": 2}
    return tuple(sorted(findings, key=lambda one: order[one.severity]))


# --- before anything runs -------------------------------------------------------------------------


def lacking_bases(side: Side) -> Iterator[Finding]:
    """A partial side without its bases cannot be run."""
    if side.wanted_bases:
        yield Finding(
            code="FC482",
            severity="error",
            detail=f"not run: {side.name} is partial by design, and its "
            f"{' and '.join(side.wanted_bases)} weights are in releases of their own",
            hint="name them: " + " and ".join(f"--base-{kind}" for kind in side.wanted_bases),
            data={"side": side.name, "missing_bases": list(side.wanted_bases)},
        )


def refuse_misfit(shell: Shell) -> None:
    """Raise FC430 where the reference does not fit its own config."""
    if not shell.misfits:
        return
    first = shell.misfits[0]
    more = f", and {len(shell.misfits) - 1} more" if len(shell.misfits) > 1 else ""
    raise CkptError(
        first.detail + more,
        code="FC430",
        where=shell.side.uri,
        key=first.key,
        hint="A is the reference and has to fit its config: `flamingo-ckpt diff` against "
        f"model:{describe_config(shell.side)} lists every key",
    )


def setting_findings(a: Side, b: Side) -> Iterator[Finding]:
    """Settings that no tensor shows and that differ, and configs that nobody could check."""
    for name, (ours, theirs) in setting_differences(a.model, b.model).items():
        yield setting_differs(name, ours, theirs)
    for side, other in ((a, b), (b, a)):
        if not side.has_own_config and other.has_own_config and side.config is other.config:
            yield Finding(
                code="FC485",
                severity="warning",
                detail=f"{side.name} has no config, and is computed by {other.name}'s: a wrong "
                "setting in that one does not show",
                hint="--config names the config of the model that was trained",
            )
        if not side.has_own_config and side.detection.layout.hf_config and side.manifest.folder:
            yield Finding(
                code="FC485",
                severity="warning",
                detail=f"{side.name}'s folder has no config.json, so nothing loads it as it is; "
                f"it is computed by {describe_config(side)}",
                hint="`flamingo-ckpt convert --config` writes one beside the weights",
            )
    yield from _untold(a, b)
    yield from _base_findings(a)
    yield from _base_findings(b)


def _untold(a: Side, b: Side) -> Iterator[Finding]:
    """A token that one folder's config tells, and the other's does not."""
    for name in ("media_token_id", "eoc_token_id"):
        told = [side.model.data.get(name) is not None for side in (a, b)]
        if a.has_own_config and b.has_own_config and told[0] != told[1]:
            with_it, without = ("A", "B") if told[0] else ("B", "A")
            yield Finding(
                code="FC407",
                severity="warning",
                detail=f"`{name}` is in {with_it}'s config and not in {without}'s: the model "
                "there has to be told it before it reads a picture or stops",
                data={"setting": name},
            )


def _base_findings(side: Side) -> Iterator[Finding]:
    """A base's own config knows what its weights were trained with."""
    told = settings_of(side.model)
    for base in side.bases:
        own = own_config(base.manifest)
        if own is None or (own.kind != "language" and not own.kind.startswith("clip")):
            continue
        settings = {
            name: value
            for name, value in settings_of(own).items()
            if name.startswith(f"{base.kind}.")
        }
        for name, (theirs, ours) in differing(settings, told).items():
            yield Finding(
                code="FC407",
                severity="error",
                detail=f"`{name}` is {escape(repr(ours))} for {side.name}, and the config beside "
                f"its base says {escape(repr(theirs))}",
                hint=f"correct {describe_config(side)}, or name the base that the model was "
                "trained on",
                data={"setting": name, "side": side.name, "base": theirs, "model": ours},
            )


def misfit_findings(
    second: Shell | None, reason: Finding | None, rows: tuple[int, int] | None
) -> Iterator[Finding]:
    """Why B cannot be run as it is."""
    if reason is not None:
        yield replace(reason, detail=f"B: {reason.detail}")
    if second is not None:
        yield from second.misfits
    if rows is not None:
        ours, theirs = rows
        yield Finding(
            code="FC418",
            severity="error",
            key=second.key_of("lm.embed_tokens.weight") if second is not None else None,
            detail=f"A's vocabulary has {ours} rows and B's {theirs}: B has none for tokens of the "
            "inputs",
            hint="the embedding was not resized to the tokenizer, or lost its added rows",
            data={"a": ours, "b": theirs},
        )


# --- weights --------------------------------------------------------------------------------------


def parameter_findings(parameters: Parameters, keys: Keys) -> Iterator[Finding]:
    """One for each tensor that differs or that one side lacks."""
    by_key: dict[str, list[str]] = {}
    for name in parameters.different:
        by_key.setdefault(keys.both(name)[1], []).append(name)
    for key, names in by_key.items():
        told = "; ".join(f"{name}: {parameters.different[name]}" for name in names)
        yield Finding(
            code="FC301",
            severity="error",
            key=key,
            detail=f"`{escape(key)}` holds other bits: {told}",
            data={"canonical": names, "a": [keys.both(name)[0] for name in names], "b": key},
        )
    for alone, code, side in (
        (parameters.only_a, "FC203", "A"),
        (parameters.only_b, "FC204", "B"),
    ):
        for name in alone:
            yield Finding(
                code=code,
                severity="error",
                key=keys.both(name)[side == "B"],
                detail=f"`{name}` is in {side}'s model alone",
                data={"canonical": name},
            )
    if parameters.cast:
        yield Finding(
            code="FC206",
            severity="info",
            detail=f"{len(parameters.cast)} tensors hold the same values in another dtype: "
            + name_some(list(parameters.cast), 3, where=""),
        )


# --- runs -----------------------------------------------------------------------------------------


def input_findings(inputs: Inputs) -> Iterator[Finding]:
    """What inputs of the user's own cannot show."""
    media = inputs.media_token_id
    if media is not None and not bool((inputs.tokens == media).any()):
        yield Finding(
            code="FC485",
            severity="warning",
            detail=f"no text of the inputs has the token of an image ({media}): nothing looks at a "
            "picture, and cross-attention is not compared",
            hint="put the token where each image belongs, or leave --inputs out",
        )


def run_findings(runs: tuple[SideRun, SideRun], gates: Sequence[str]) -> Iterator[Finding]:
    """What kept a run from being compared, and what no pass saw."""
    for name, run in zip("AB", runs, strict=True):
        if run.unstable:
            yield Finding(
                code="FC481",
                severity="error",
                detail=f"{name} gives other bits when it is run again, first at `{run.unstable}`",
                hint="it draws random numbers, or a kernel has no fixed order of summation",
            )
        if run.unheard:
            yield Finding(
                code="FC485",
                severity="warning",
                detail=f"no forward of {name} came to "
                + name_some(list(run.unheard), 5, where="")
                + ": what is there is compared by its bits alone",
            )
        if run.failure:
            yield Finding(
                code="FC480",
                severity="error",
                detail=f"{name} cannot compute the inputs: {run.failure}",
            )
    first = runs[0]
    if first.not_finite:
        stage, bad = next(iter(first.not_finite.items()))
        yield Finding(
            code="FC487",
            severity="error",
            detail=f"A itself gives {bad} values at `{stage}` that are no numbers: what comes "
            "after it cannot be compared",
            hint="`--dtype float64` tells an overflow from a broken weight",
        )
    if first.num_gates:
        yield from _gate_findings(first, gates)


def _gate_findings(run: SideRun, gates: Sequence[str]) -> Iterator[Finding]:
    if not run.num_closed:
        return
    if "forced" not in gates:
        which = "all" if run.num_closed == run.num_gates else f"{run.num_closed} of"
        yield Finding(
            code="FC482",
            severity="error",
            detail=f"{which} {run.num_gates} gates are 0, and no pass with forced gates was asked "
            "for: nothing behind them was compared",
            hint="leave --gates out",
        )
    else:
        yield Finding(
            code="FC485",
            severity="info",
            detail=f"{run.num_closed} of {run.num_gates} gates are 0 as they are: what is behind "
            "them is seen by the pass with forced gates alone",
        )


def divergence_findings(passes: Sequence[Pass]) -> Iterator[Finding]:
    """FC402 where only forced gates show it, else FC480, for each dtype that decides."""
    for dtype in dict.fromkeys(one.dtype for one in passes if one.decides):
        by_gates = {one.gates: one for one in passes if one.dtype == dtype}
        plain, forced = by_gates.get("as-is"), by_gates.get("forced")
        if plain is not None and plain.first_divergence is not None:
            yield _diverges(plain)
        elif forced is not None and forced.first_divergence is not None:
            yield _diverges(forced) if plain is None else _hidden(forced)


def _hidden(forced: Pass) -> Finding:
    stage = str(forced.first_divergence)
    return Finding(
        code="FC402",
        severity="error",
        detail="the two agree only because the gates are as they are: with gates forced open they "
        f"diverge at `{stage}` ({_how_far(forced.stages[stage])})",
        hint="training would open the gates on to other weights",
        data={"stage": stage, "dtype": forced.dtype},
    )


def _diverges(one: Pass) -> Finding:
    stage = str(one.first_divergence)
    found = one.stages[stage]
    what = f"the two diverge at `{stage}` ({_how_far(found)})"
    if found.only_in:
        what = f"only {found.only_in.upper()} computes `{stage}`"
    return Finding(
        code="FC480",
        severity="error",
        detail=f"{what}, gates {one.gates}, {one.dtype} on {one.device}",
        data={"stage": stage, "gates": one.gates, "dtype": one.dtype},
    )


def _how_far(one: Measure) -> str:
    return f"relative {one.relative:.2g}, where rounding explains {one.tolerance or 0.0:.2g}"


def greedy_of(runs: tuple[SideRun, SideRun], inputs: Inputs, count: int) -> Greedy | None:
    """The two continuations, compared; None for a kind of model that writes nothing."""
    if inputs.kind not in WRITING:
        return None
    if not count:
        return Greedy(note="not run: --greedy 0")
    if any(run.is_streamed for run in runs):
        return Greedy(note="not run: weights are streamed, and each token would read them again")
    a, b = (tuple(run.tokens) for run in runs)
    if not a or not b:
        why = next((run.not_written for run in runs if run.not_written), "B cannot compute it")
        return Greedy(a=a, b=b, equal=False if a else None, note=f"not run: {why}")
    if a == b:
        return Greedy(a=a, b=b, equal=True)
    at = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
    lead = runs[0].leads[at]
    if lead < _TIE:
        return Greedy(a=a, b=b, note=f"token {at + 1} is a tie: it leads by {lead:.1g}")
    return Greedy(a=a, b=b, equal=False)


def greedy_findings(greedy: Greedy | None) -> Iterator[Finding]:
    """Continuations that differ."""
    if greedy is not None and greedy.equal is False:
        yield Finding(
            code="FC486",
            severity="error",
            detail=f"the greedy continuations differ: {list(greedy.a)} in A, {list(greedy.b)} in B"
            + (f" ({greedy.note})" if greedy.note else ""),
        )


# --- blame ----------------------------------------------------------------------------------------


def blame_findings(blame: Sequence[Blame], keys: Keys) -> Iterator[Finding]:
    """What explains a divergence; or that nothing that was tried does."""
    for one in blame:
        agreed = next((trial for trial in one.trials if trial.agrees), None)
        if agreed is None:
            yield Finding(
                code="FC488",
                severity="warning",
                detail=f"nothing that was tried explains `{one.stage}` (gates {one.gates}); "
                f"{len(one.trials)} tried, see `blame`",
            )
            continue
        names = list(one.tensors)
        told = list(dict.fromkeys(escape(keys.both(name)[1] or name) for name in names))
        yield Finding(
            code="FC483",
            severity="error",
            key=told[0] if told else None,
            detail=f"to blame at `{one.stage}`: {one.suspect}; with that changed in B the two "
            f"agree (relative {agreed.relative:.2g})"
            + (f"; in B: {name_some(told, 4)}" if told else ""),
            data={"stage": one.stage, "canonical": names},
        )
