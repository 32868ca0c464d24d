"""A second side that does not fit its own config: what would make it fit, and compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.blame import Investigation, describe_differences
from flamingo_ckpt.parity.explaining import Difference, explain
from flamingo_ckpt.parity.result import Blame, Trial
from flamingo_ckpt.parity.shell import Shell
from flamingo_ckpt.parity.suspects import Suspect, config_suspects

#: The last stage that every model has; only where all agrees is a fault explained.
_LAST = "logits"


def explain_misfit(
    investigation: Investigation, gates: str, different: Sequence[str] = ()
) -> list[Blame]:
    """Try the first side's settings, then its tensors in place of those that do not fit.

    Args:
        investigation: with the first side's stages.
        gates: of the pass that is run.
        different: canonical names of tensors whose bits differ besides.
    """
    trials: list[Trial] = []
    a = investigation.a
    if words := _rows_in_config(investigation):
        trials.append(investigation.try_whole(words, gates, ()))
        if trials[-1].agrees:
            return [Blame(stage=_LAST, gates=gates, suspect=words, trials=tuple(trials))]
    for suspect in config_suspects(a.config, investigation.b.model):
        if not _fits(investigation, suspect):
            continue
        trials.append(investigation.try_whole(suspect.words, gates, (), suspect))
        if trials[-1].agrees:
            return [Blame(stage=_LAST, gates=gates, suspect=suspect.words, trials=tuple(trials))]
    shell = investigation.shell_or_none()
    if shell is None:
        return [Blame(stage=_LAST, gates=gates, trials=tuple(trials))]
    found = dict(_unfit(a, shell))
    if not found:
        return [Blame(stage=_LAST, gates=gates, trials=tuple(trials))]
    words = describe_differences(found)
    trials.append(investigation.try_whole(words, gates, tuple(found)))
    if different and not trials[-1].agrees:
        found |= explain(a, shell, different)
        words = describe_differences(found)
        trials.append(investigation.try_whole(words, gates, tuple(found)))
    tensors = {name: (a.key_of(name), shell.key_of(name)) for name in found}
    return [
        Blame(
            stage=_LAST,
            gates=gates,
            tensors=tensors,
            suspect=words if trials[-1].agrees else "",
            trials=tuple(trials),
        )
    ]


def _rows_in_config(investigation: Investigation) -> str:
    """Whether only the config tells another vocabulary than both sides' weights have."""
    told = investigation.b.model.data.get("text_config", {}).get("vocab_size")
    rows = investigation.rows
    if not investigation.b.has_own_config or rows is None or told == rows:
        return ""
    return f"`text_config.vocab_size` is {told} in B's config, and A's vocabulary has {rows} rows"


def _fits(investigation: Investigation, suspect: Suspect) -> bool:
    try:
        shell = investigation.make_shell(suspect)
    except CkptError:
        return False
    return all(one.code == "FC204" for one in shell.misfits) or bool(shell.misshapen)


def _unfit(a: Shell, shell: Shell) -> Iterator[tuple[str, Difference]]:
    """Canonical tensors that the second side lacks, or has in another shape."""
    for name in a.atoms:
        if name not in shell.atoms:
            continue
        key = shell.target_of(name).key
        if key in shell.steps:
            continue
        if key not in shell.misshapen:
            yield name, Difference(kind="missing", words="not in B")
            continue
        step = shell.misshapen[key]
        wanted, have = a.atoms[name].shape, step.shape
        told = f"{_by(wanted)} in A, {_by(have)} in B"
        is_short = len(wanted) == len(have) and wanted[1:] == have[1:]
        yield (
            name,
            Difference(kind="shape", words=told + (": B was not resized" if is_short else "")),
        )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
