"""Who is to blame: what changes at the first stage that diverges, and what makes the two agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.parity.explaining import Difference, explain, swapped
from flamingo_ckpt.parity.inputs import Inputs, set_media_token
from flamingo_ckpt.parity.opening import Side
from flamingo_ckpt.parity.result import Blame, Measure, Trial
from flamingo_ckpt.parity.running import FAILURES, Runner, StopForward
from flamingo_ckpt.parity.shell import Edit, Shell, make_shell
from flamingo_ckpt.parity.stages import TOKENS, OnStage, home_of, taps_of
from flamingo_ckpt.parity.suspects import Suspect, config_suspects, module_suspects
from flamingo_ckpt.parity.trace import Trace, measure

if TYPE_CHECKING:
    import torch

#: What a side that was changed may end with: it is then no explanation.
_FAILURES = (CkptError, *FAILURES)
#: Faults that are looked for one behind the other.
_MAX_ROUNDS = 4
#: Kinds of difference -> how a suspect is put, with the names of the tensors.
_WORDS = {
    "bit": "a bit is flipped in {names}",
    "constant": "{names} in B holds an initial value: it was not loaded",
    "rounded": "{names} was rounded",
    "moved": "{names} in B holds another tensor's content",
    "transposed": "{names} is transposed",
    "negated": "{names} has the other sign",
    "scaled": "{names} is scaled",
    "rows": "rows of {names} differ",
    "reordered": "{names} is laid out otherwise",
    "shape": "{names} was not resized",
    "missing": "{names} is not in B",
    "values": "{names} differs",
}


@dataclass(slots=True, kw_only=True)
class Investigation:
    """What trials need to know.

    Attributes:
        a: the first side's weights; its module is not run again.
        b: the second side, as it was opened.
        inputs: of the passes.
        traces: gates -> what the first side computed.
        tolerances: gates -> stage -> largest relative difference that rounding explains.
        gate_values: gates -> value of all gates, or None.
        dtype, device: of the passes.
        budget: bytes of weights in memory; None for no limit.
        rows: of the vocabulary, where the second side's has too few.
        num_forwards: of the second side, in trials.
    """

    a: Shell
    b: Side
    inputs: Inputs
    traces: Mapping[str, Trace]
    tolerances: Mapping[str, Mapping[str, float]]
    gate_values: Mapping[str, float | None]
    dtype: str
    device: str
    budget: int | None = None
    rows: int | None = None
    num_forwards: int = 0
    _repaired: list[str] = field(default_factory=list)
    _config: Suspect | None = None
    _changes: list[tuple[str, Suspect]] = field(default_factory=list)
    _touched: set[str] = field(default_factory=set)
    _second: Shell | None = None

    def blame(self, stage: str, gates: str, different: Iterable[str]) -> Iterator[Blame]:
        """Explain a divergence; then, with that mended, the next one, and so on.

        Args:
            stage: the first that diverged.
            gates: of its pass.
            different: canonical names of tensors whose bits differ.
        """
        left = [name for name in different if name not in self._repaired]
        for _ in range(_MAX_ROUNDS):
            found = self._one(stage, gates, left)
            yield found
            if not found.is_confirmed:
                return
            left = [name for name in left if name not in self._repaired]
            following = self.next_divergence(gates)
            if following is None:
                return
            stage = following

    # --- one stage --------------------------------------------------------------------------------

    def _one(self, stage: str, gates: str, different: Sequence[str]) -> Blame:
        """Weights first, then settings, then both at once."""
        suspected = self._weights_at(stage, gates, different)
        tensors: dict[str, tuple[str, str]] = {}
        weights, trials = "", []
        if suspected:
            shell = self.make_shell()
            tensors = {name: (self.a.key_of(name), shell.key_of(name)) for name in suspected}
            weights = self._words(shell, suspected)
            trials.append(self._try(weights, stage, gates, suspected))
            wider = self._up_to(stage, gates, different)
            if not trials[-1].agrees and len(wider) > len(suspected):
                suspected = wider
                tensors = {name: (self.a.key_of(name), shell.key_of(name)) for name in wider}
                weights = self._words(shell, wider)
                trials.append(self._try(weights, stage, gates, wider))
        if not trials or not trials[-1].agrees:
            trials += self._try_settings(stage, gates, suspected, weights)
        last = trials[-1] if trials else None
        if last is not None and last.agrees and weights not in last.suspect:
            # a setting alone; what else differs here is as innocent as it can be
            touched = self._touched & tensors.keys()
            tensors = {name: keys for name, keys in tensors.items() if name in touched}
        return Blame(
            stage=stage,
            gates=gates,
            tensors=tensors,
            suspect=last.suspect if last is not None and last.agrees else "",
            trials=tuple(trials),
        )

    def _words(self, shell: Shell, suspected: Sequence[str]) -> str:
        if len(suspected) > 1 and all(self._is_cast(name) for name in suspected):
            dtypes = {(self.a.dtype_of(name), shell.dtype_of(name)) for name in suspected}
            kinds = " and ".join(f"{theirs} in B and {ours} in A" for ours, theirs in dtypes)
            return f"{len(suspected)} tensors are {kinds}: they were rounded"
        return describe_differences(explain(self.a, shell, suspected))

    def _try_settings(
        self, stage: str, gates: str, suspected: Sequence[str], weights: str
    ) -> Iterator[Trial]:
        """Until one agrees; each alone, and with the weights put right."""
        for suspect in self._settings_at(stage):
            words = suspect.words
            for told, repaired in ((words, ()), (f"{words}; {weights}", tuple(suspected))):
                if repaired or told is words:
                    trial = self._try(told, stage, gates, repaired, suspect)
                    if trial.agrees:
                        self._accept(stage, suspect)
                    yield trial
                    if trial.agrees:
                        return

    def _weights_at(self, stage: str, gates: str, different: Sequence[str]) -> list[str]:
        """Differing tensors at home in this stage; else those that come before it.

        What differs in stages that agree is too small to be seen there, and innocent of this one
        as long as anything at home here differs.
        """
        homes, here = self._homes(stage, gates, different)
        near = [name for name, at in homes.items() if at == here]
        if near and all(self._is_cast(name) for name in near):
            return [name for name in different if self._is_cast(name)]
        return near or self._up_to(stage, gates, different)

    def _up_to(self, stage: str, gates: str, different: Sequence[str]) -> list[str]:
        """Differing tensors at home in this stage or before it."""
        homes, here = self._homes(stage, gates, different)
        return [name for name, at in homes.items() if at <= here]

    def _homes(
        self, stage: str, gates: str, different: Sequence[str]
    ) -> tuple[dict[str, int], int]:
        """(tensor -> number of the stage that it is at home in, number of this stage)."""
        place = {name: at for at, name in enumerate(self.traces[gates].stages)}
        here = place.get(stage, len(place))
        return {n: place.get(_heard(home_of(n), place), here) for n in different}, here

    def _is_cast(self, name: str) -> bool:
        """Whether a tensor of the second side is the first's, rounded to another dtype."""
        if self._second is None:
            self._second = self.make_shell()
        if self.a.dtype_of(name) == self._second.dtype_of(name):
            return False
        ours, theirs = self.a.atom(name), self._second.atom(name)
        return ours.shape == theirs.shape and bool((ours.to(theirs.dtype) == theirs).all())

    def _settings_at(self, stage: str) -> Iterator[Suspect]:
        base = self._config.config if self._config is not None else None
        yield from config_suspects(self.a.config, base or self.b.model)
        shell = self.make_shell()
        tap = next((tap for tap in taps_of(shell) if tap.stage == stage), None)
        module = shell.module if tap is None or stage == TOKENS else tap.module
        yield from module_suspects(module, stage)

    def _accept(self, stage: str, suspect: Suspect) -> None:
        self._touched = set(suspect.touches)
        if suspect.config is not None:
            self._config = suspect
        else:
            self._changes.append((stage, suspect))

    # --- trials -----------------------------------------------------------------------------------

    def make_shell(self, suspect: Suspect | None = None) -> Shell:
        """The second side's weights, with what was found so far, and what a suspect changes.

        Raises:
            CkptError: where they make no model.
        """
        chosen = suspect if suspect is not None and suspect.config is not None else self._config
        side = self.b if chosen is None else replace(self.b, config=chosen.config)
        shell = make_shell(side, self.dtype, rows=self.rows)
        set_media_token(shell.module, self.inputs, is_upstream=side.is_upstream)
        shell.resize_positions()
        return shell

    def _try(
        self,
        words: str,
        stage: str,
        gates: str,
        repaired: Sequence[str] = (),
        suspect: Suspect | None = None,
    ) -> Trial:
        """Run the second side up to a stage, changed; what makes it agree stays changed."""
        heard: dict[str, Measure] = {}
        trace, mask = self.traces[gates], self.inputs.mask

        def on_stage(name: str, tensor: torch.Tensor) -> None:
            if name == stage:
                if name in trace.stages:
                    heard[name] = measure(name, trace.read(name), tensor, mask)
                raise StopForward

        try:
            self._run(on_stage, gates, repaired, suspect, stage)
        except _FAILURES:
            return Trial(suspect=words, relative=math.nan, agrees=False)
        found = heard.get(stage)
        if found is None:
            return Trial(suspect=words, relative=math.nan, agrees=False)
        tolerance = self.tolerances[gates].get(stage, 0.0)
        agrees = found.relative <= tolerance and not found.num_bad
        if agrees:
            self._repaired += repaired
        return Trial(suspect=words, relative=found.relative, agrees=agrees)

    def next_divergence(self, gates: str) -> str | None:
        """The first stage that diverges with all that was found mended; None where none does."""
        try:
            first, _ = self._first_divergence(gates, (), None)
        except _FAILURES:
            return None
        return first

    def try_whole(
        self, words: str, gates: str, repaired: Sequence[str], suspect: Suspect | None = None
    ) -> Trial:
        """Run all of the second side, changed, and see whether all stages agree."""
        try:
            first, relative = self._first_divergence(gates, repaired, suspect)
        except _FAILURES:
            return Trial(suspect=words, relative=math.nan, agrees=False)
        return Trial(suspect=words, relative=relative, agrees=first is None)

    def _first_divergence(
        self, gates: str, repaired: Sequence[str], suspect: Suspect | None
    ) -> tuple[str | None, float]:
        """(the first stage that diverges, the difference there or at the last stage)."""
        trace, mask = self.traces[gates], self.inputs.mask
        found: list[str] = []
        last = [math.nan]
        missed = set(trace.stages)

        def on_stage(name: str, tensor: torch.Tensor) -> None:
            missed.discard(name)
            if name not in trace.stages:
                found.append(name)
                raise StopForward
            one = measure(name, trace.read(name), tensor, mask)
            last[0] = one.relative
            if not one.relative <= self.tolerances[gates].get(name, math.inf):
                found.append(name)
                raise StopForward

        self._run(on_stage, gates, repaired, suspect, "")
        if not found:
            found = [name for name in trace.stages if name in missed]
        return found[0] if found else None, last[0]

    def shell_or_none(self) -> Shell | None:
        """The second side's weights; None where they make no model."""
        try:
            return self.make_shell()
        except CkptError:
            return None

    def _run(
        self,
        on_stage: OnStage,
        gates: str,
        repaired: Sequence[str],
        suspect: Suspect | None,
        stage: str,
    ) -> None:
        shell = self.make_shell(suspect)
        for name in dict.fromkeys((*self._repaired, *repaired)):
            if name in shell.atoms and name in self.a.atoms:
                shell.edit_atom(name, _of_first(self.a, name))
        changes = [*self._changes]
        if suspect is not None and suspect.change is not None:
            changes.append((stage, suspect))
        for at, one in changes:
            if one.change is not None:
                tap = next((tap for tap in taps_of(shell) if tap.stage == at), None)
                one.change(shell.module if tap is None else tap.module, shell.module)
        budget = self.budget if self.budget is not None else 1 << 62
        # Only what is computed up to the stage is read.
        runner = Runner(shell=shell, dtype=self.dtype, device=self.device, budget=budget).open()
        try:
            runner.run(self.inputs, on_stage, gate=self.gate_values[gates])
        finally:
            self.num_forwards += 1
            runner.close()


def _heard(stage: str, place: Mapping[str, int]) -> str:
    """A stage that is listened to: the place itself, or where its tower's text begins."""
    if stage in place:
        return stage
    if stage == "vision.post_norm":  # a Flamingo's tokens, or CLIP's features
        return TOKENS if TOKENS in place else "image_features"
    if stage == "lm.embed_tokens":
        stage = "lm.embeddings"
    if stage.endswith(".embeddings"):
        tower = stage.partition(".")[0]
        return next((name for name in place if name.startswith(tower + ".")), stage)
    return stage


def _of_first(a: Shell, name: str) -> Edit:
    return lambda _: a.atom(name)


def describe_differences(found: Mapping[str, Difference]) -> str:
    """A suspect in words, for tensors that differ.

    >>> describe_differences({"x": Difference(kind="transposed", words="B's is A's transposed")})
    '`x` is transposed'
    """
    pairs = swapped(found)
    told = [f"`{one}` and `{other}` are swapped" for one, other in pairs]
    paired = {name for pair in pairs for name in pair}
    kinds: dict[str, list[str]] = {}
    for name, one in found.items():
        if name not in paired:
            kinds.setdefault(one.kind, []).append(name)
    for kind, names in kinds.items():
        shown = ", ".join(f"`{name}`" for name in names[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        words = found[names[0]].words
        if len(names) == 1 and kind not in ("transposed", "values", "bit"):
            told.append(f"`{names[0]}`: {words}")
        else:
            told.append(_WORDS[kind].format(names=shown + more))
    return "; ".join(told)
