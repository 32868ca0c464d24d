"""What the tests of parity share: models as files, copies with a fault, and answers in short."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import zoo
from tests.layout_support import Files
from tests.support import Outcome, cli

State = dict[str, Any]
#: Changes a state dict in place, or gives another one.
Change = Callable[[State], State | None]
#: Changes a config in place.
Configure = Callable[[dict[str, Any]], object]

#: Few layers, each of another kind of index: every forward is a few milliseconds.
SMALL = {"layers": 2, "every_n": 1, "perceiver_depth": 2}
#: The tower of the zoo, whatever the size of the rest.
_TOWER = ("vision.embeddings", "vision.pre_norm", *(f"vision.layers.{at}" for at in range(3)))
FLAMINGO_STAGES = (
    *(*_TOWER, "vision.tokens"),
    *("perceiver.layers.0", "perceiver.layers.1", "perceiver.norm"),
    *("lm.embed_tokens", "lm.embeddings"),
    *("xattn.0", "lm.layers.0", "xattn.1", "lm.layers.1", "lm.final_norm", "logits"),
)
CLIP_STAGES = (
    *("vision.embeddings", "vision.pre_norm", "vision.layers.0", "vision.layers.1"),
    *("text.embeddings", "text.layers.0", "text.layers.1", "text.final_norm"),
    *("image_features", "text_features", "logits"),
)
PALIGEMMA_STAGES = (
    *("lm.embed_tokens", "vision.embeddings", "vision.layers.0", "vision.layers.1"),
    *("vision.post_norm", "projector", "lm.embeddings"),
    *("lm.layers.0", "lm.layers.1", "lm.final_norm", "logits"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blamed:
    """One entry of `blame`, in short."""

    stage: str
    gates: str
    confirmed: bool
    suspect: str
    keys: tuple[str, ...]
    canonical: tuple[str, ...]
    tried: tuple[Mapping[str, Any], ...]


class Answer:
    """One `parity --json` that came to a verdict: what scripts read of it."""

    def __init__(self, outcome: Outcome) -> None:
        assert outcome.code in (0, 1, 3), outcome
        self.code = outcome.code
        self.document = outcome.document
        self.findings: list[dict[str, Any]] = self.document["findings"]
        verdicts = {0: "pass", 1: "fail", 3: "incomplete"}
        assert self.document["verdict"] == verdicts[self.code]
        assert bool(self.errors) == (self.code != 0)
        self.passes: list[dict[str, Any]] = self.document["summary"]["passes"]
        self.layers: list[dict[str, Any]] = self.document["summary"]["layers"]
        self.blame = [
            Blamed(
                stage=one["stage"],
                gates=one["gates"],
                confirmed=one["confirmed"],
                suspect=one["suspect"] or "",
                keys=tuple(tensor["b"] for tensor in one["tensors"]),
                canonical=tuple(tensor["canonical"] for tensor in one["tensors"]),
                tried=tuple(one["tried"]),
            )
            for one in self.document["blame"]
        ]

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [one for one in self.findings if one["severity"] == "error"]

    @property
    def codes(self) -> list[str]:
        """The codes of all errors, each once, in order."""
        return sorted({one["code"] for one in self.errors})

    def told(self, code: str) -> list[str]:
        """The keys of all findings with a code."""
        return [one["key"] for one in self.findings if one["code"] == code]

    def detail(self, code: str) -> str:
        """The detail of the only finding with that code."""
        found = [one["detail"] for one in self.findings if one["code"] == code]
        assert len(found) == 1, found
        return str(found[0])

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(one["stage"] for one in self.layers)

    @property
    def diverges_at(self) -> dict[str, str | None]:
        """Gates -> the first stage that diverges, of the passes in the first dtype."""
        dtype = self.passes[0]["dtype"]
        return {
            one["gates"]: one["first_divergence"] for one in self.passes if one["dtype"] == dtype
        }


#: What no module gives, but the forward of the whole.
_OF_THE_WHOLE = {"image_features", "text_features", "logits"}


def assert_clean(
    answer: Answer,
    stages: tuple[str, ...],
    *,
    gates: tuple[str, ...] = ("as-is", "forced"),
    dtype: str = "float32",
    told: tuple[str, ...] = (),
) -> None:
    """A pass without a word, but for the codes in `told`; all stages met and all tensors equal."""
    assert (answer.code, [one["code"] for one in answer.findings]) == (0, list(told))
    assert answer.stages == stages
    assert [(one["gates"], one["dtype"], one["device"]) for one in answer.passes] == [
        (one, dtype, "cpu") for one in gates
    ]
    assert all(one["agrees"] and one["first_divergence"] is None for one in answer.passes)
    for layer in answer.layers:
        assert all(layer["module"]) == (layer["stage"] not in _OF_THE_WHOLE), layer
        for one in layer["passes"]:
            assert one["only_in"] is None, layer
            assert one["rel"] <= one["tolerance"], layer
    parameters = answer.document["parameters"]
    assert 0 < parameters["compared"] == parameters["equal"]
    assert parameters["only_a"] == parameters["only_b"] == parameters["different"] == []
    assert answer.blame == []
    rows = zip(answer.document["sides"], ("A", "B"), strict=True)
    assert all(side["deterministic"] is True and not side["streamed"] for side, _ in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What was planted, as it has to be told.

    Attributes:
        stage: the first that it changes.
        keys: B's tensors that are to blame; none where a setting is.
        words: of the suspect, all of them.
        gates: of the pass in which it is seen first.
    """

    stage: str
    keys: frozenset[str] = frozenset()
    words: tuple[str, ...]
    gates: str = "as-is"


def fault(stage: str, keys: Iterable[str] | str, *words: str, gates: str = "as-is") -> Fault:
    names = [keys] if isinstance(keys, str) else keys
    return Fault(stage=stage, keys=frozenset(names), words=words, gates=gates)


def assert_blamed(answer: Answer, codes: Iterable[str], *faults: Fault) -> None:
    """Exit 1 with exactly these codes, and exactly these faults, confirmed, in this order."""
    assert (answer.code, answer.codes) == (1, sorted({*codes, "FC483"}))
    found = [(one.stage, one.gates, one.confirmed) for one in answer.blame]
    assert found == [(one.stage, one.gates, True) for one in faults]
    told = [one for one in answer.findings if one["code"] == "FC483"]
    for one, wanted, finding in zip(answer.blame, faults, told, strict=True):
        assert frozenset(one.keys) == wanted.keys
        assert all(word in one.suspect for word in wanted.words), one.suspect
        assert finding["data"]["stage"] == wanted.stage
        assert finding["key"] in (wanted.keys or {None})
        assert one.tried[-1]["agrees"] is True
        assert one.tried[-1]["rel"] < 1e-5


def parity(a: object, b: object, *options: object) -> Answer:
    """`flamingo-ckpt parity A B --json`; it has to come to a verdict."""
    return Answer(cli("parity", a, b, *options, "--json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A model in two forms, and what the command line needs to run both.

    Attributes:
        a: the reference.
        b: a folder with `model.safetensors` and `config.json`.
        options: what A lacks.
        spare: where copies of B go; each takes the place of the one before.
        has_gates: whether there is cross-attention.
    """

    a: Path
    b: Path
    options: tuple[object, ...] = ()
    spare: Path
    has_gates: bool = False

    def planted(self, change: Change | None = None, configure: Configure | None = None) -> Path:
        """A copy of B with other weights, another config, or both."""
        return planted(self.b, self.spare, change, configure)

    def answer(
        self, change: Change | None = None, configure: Configure | None = None, *more: object
    ) -> Answer:
        """A against a copy of B that was changed; nothing is written by the models."""
        b = self.planted(change, configure)
        return parity(self.a, b, *self.options, "--greedy", "0", *more)

    def alike(
        self, change: Change | None = None, configure: Configure | None = None, *more: object
    ) -> Answer:
        """B against a copy of it that was changed, gates as they are: half of the time."""
        gates = ("--gates", "as-is") if self.has_gates else ()
        return parity(self.b, self.planted(change, configure), *gates, "--greedy", "0", *more)

    @property
    def state(self) -> State:
        """B's tensors."""
        return read_state(self.b)


def read_state(folder: Path) -> State:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


WEIGHTS = "model.safetensors"


def planted(
    folder: Path, into: Path, change: Change | None = None, configure: Configure | None = None
) -> Path:
    """A copy of a folder, changed."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    if change is not None:
        before = read_state(folder)
        state = dict(before)
        state = change(state) or state
        assert state.keys() != before.keys() or any(
            state[name] is not before[name] for name in state
        ), "nothing was planted"
        zoo.save_safetensors(state, into / WEIGHTS)
    if configure is not None:
        path = into / "config.json"
        config = json.loads(path.read_text())
        configure(config)
        assert config != json.loads(path.read_text()), "nothing was planted"
        path.write_text(json.dumps(config))
    return into


class Sides:
    """The zoo's models in pairs, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = Files(folder)

    def flamingo(self, family: str, **options: Any) -> Pair:
        """Upstream's checkpoint and its bases, and the whole model in Hugging Face's form."""
        options = {**SMALL, **options}
        return Pair(
            a=self.files.write("partial", family, **options),
            b=self.files.whole(family, **options),
            options=(
                *self.files.bases(family, **options),
                *("--config", self.files.config(family, **options)),
            ),
            spare=self.folder / "planted",
            has_gates=True,
        )

    def clip(self) -> Pair:
        """open_clip's CLIP, and transformers'."""
        pair = zoo.clip(layers=2)
        return Pair(
            a=self._once("clip.pt", lambda path: zoo.save_torch(pair.open_clip, path)),
            b=self._once("hf-clip", lambda path: zoo.save_folder(pair.hf, pair.config, path)),
            options=("--config", self.clip_config()),
            spare=self.folder / "planted",
        )

    def clip_config(self) -> Path:
        """open_clip's own config of it."""
        text = json.dumps(zoo.open_clip_cfg(2))
        return self._once("open_clip_config.json", lambda path: path.write_text(text))

    def paligemma(self, version: int, layout: str = "L4") -> Pair:
        """The oldest of its layouts, and another one."""
        return Pair(
            a=self.paligemma_folder(version, "L1"),
            b=self.paligemma_folder(version, layout),
            spare=self.folder / "planted",
        )

    def paligemma_folder(self, version: int, layout: str) -> Path:
        model = zoo.paligemma(version=version, layers=2)
        return self._once(
            f"paligemma{version}-{layout}",
            lambda path: zoo.save_folder(model.layout(layout), model.config, path),
        )

    def paligemma_npz(self, version: int) -> Path:
        arrays = zoo.paligemma(version=version, layers=2).npz()
        return self._once(f"paligemma{version}.npz", lambda path: zoo.save_npz(arrays, path))

    def _once(self, name: str, write: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            write(path)
        return path
