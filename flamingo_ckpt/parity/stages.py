"""Where two models are compared: stages that both compute, found through their canonical names.

A stage is a module whose parameters all belong to one canonical part (`vision.layers.3`,
`xattn.1`), whatever the class calls it, or a place between modules that has a meaning of its own:
what goes into the first layer, the tokens that the perceiver is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.parity.shell import Shell

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Called with a stage's name and its tensor.
OnStage = Callable[[str, "torch.Tensor"], None]
#: First components of canonical names of which the text runs through: their tensors are `[rows,
#: tokens, width]`, and padding is in them.
_TEXT_PARTS = ("lm", "xattn")
EMBEDDINGS = ".embeddings"
#: Parts that are no stages: one class has them as modules and another does not, or the logits are
#: the same.
_NO_STAGES = re.compile(
    r"(vision|text)\.(class|patch|position|token)_embedding"
    r"|lm\.(embed_positions|project_in|project_out|head)|(vision|text)\.projection"
)
TOKENS = "vision.tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A place to listen at.

    Attributes:
        stage: its name.
        module: whose call it is.
        path: of the module.
        listens: `output`, `input` (the first argument), or `second` (the second argument).
    """

    stage: str
    module: nn.Module
    path: str
    listens: str = "output"


def part_of(canonical: str) -> str:
    """The stage that a canonical tensor is at home in.

    >>> part_of("vision.layers.3.attn.q.weight"), part_of("xattn.1.mlp_gate")
    ('vision.layers.3', 'xattn.1')
    """
    words = canonical.split(".")
    if words[0] == "projector":
        return words[0]
    return ".".join(words[:3] if len(words) > 2 and words[1] == "layers" else words[:2])


def home_of(canonical: str) -> str:
    """The first stage that a tensor changes: the part that it is in, or the next with a tap.

    >>> home_of("vision.class_embedding"), home_of("perceiver.latents")
    ('vision.embeddings', 'perceiver.layers.0')
    """
    tower, _, rest = canonical.partition(".")
    leaf = rest.partition(".")[0]
    if leaf in ("class_embedding", "patch_embedding", "position_embedding"):
        return tower + EMBEDDINGS
    if canonical == "lm.embed_tokens.weight":
        return "lm.embed_tokens"
    if leaf in ("token_embedding", "embed_positions", "project_in"):
        return tower + EMBEDDINGS
    if canonical in ("perceiver.frame_embs", "perceiver.media_time_embs", "perceiver.latents"):
        return "perceiver.layers.0"
    if (tower, leaf) in (("lm", "head"), ("lm", "project_out")) or tower.startswith("logit_"):
        return "logits"
    if leaf == "projection":
        return {"vision": "image_features", "text": "text_features"}[tower]
    return part_of(canonical)


def is_text(stage: str) -> bool:
    """Whether a stage's tensor has a row for each token of the text, padding included."""
    return stage.partition(".")[0] in _TEXT_PARTS


def taps_of(shell: Shell) -> list[Tap]:
    """Every place to listen at, in the order of the module tree."""
    whole: dict[str, set[str]] = {}
    for name in shell.atoms:
        whole.setdefault(part_of(name), set()).add(name)
    found: dict[str, Tap] = {}
    for path, module in shell.module.named_modules():
        own = {
            name
            for key, names in shell.reading.names.items()
            if path and key.startswith(path + ".")
            for name in names
        } - shell.unused
        parts = {part_of(name) for name in own}
        if len(parts) != 1:
            continue
        part = parts.pop()
        if own == whole[part] - shell.unused and _is_called(module):
            # the innermost: a wrapper around it gives the same
            found[part] = Tap(stage=part, module=module, path=path)
    # open_clip's towers may norm all tokens or one, a Flamingo uses neither
    lone_norm = "" if shell.side.kind == "paligemma" else "vision.post_norm"
    taps = [
        tap
        for tap in found.values()
        if not _NO_STAGES.fullmatch(tap.stage)
        and not tap.stage.startswith("perceiver.layers.")
        and tap.stage != lone_norm
    ]
    return [*taps, *_between(found), *_perceiver(shell.module)]


def _is_called(module: nn.Module) -> bool:
    from torch import nn

    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList)


def _between(found: Mapping[str, Tap]) -> Iterator[Tap]:
    """What goes into the first module of a tower, after all of its embeddings are added."""
    for tower, first in (
        ("vision", ("vision.pre_norm", "vision.layers.0")),
        ("text", ("text.layers.0",)),
    ):
        name = next((one for one in first if one in found), None)
        if name is not None:
            tap = found[name]
            yield Tap(stage=tower + EMBEDDINGS, module=tap.module, path=tap.path, listens="input")
    for name in ("xattn.0", "lm.layers.0"):  # whichever is first is heard
        if name in found:
            tap = found[name]
            yield Tap(stage="lm" + EMBEDDINGS, module=tap.module, path=tap.path, listens="input")


def _perceiver(module: Any) -> Iterator[Tap]:
    """Tokens in, and latents between layers: a layer of OpenFlamingo's is no module by itself."""
    from torch import nn

    perceiver = getattr(module, "perceiver", None)
    if perceiver is None:
        return
    yield Tap(stage=TOKENS, module=perceiver, path="perceiver", listens="input")
    layers = list(perceiver.layers)
    for at, layer in enumerate(layers[1:]):
        path = f"perceiver.layers.{at + 1}"
        first = layer[0] if isinstance(layer, nn.ModuleList) else layer
        yield Tap(stage=f"perceiver.layers.{at}", module=first, path=path, listens="second")
    if layers:
        last = f"perceiver.layers.{len(layers) - 1}"
        yield Tap(stage=last, module=perceiver.norm, path="perceiver.norm", listens="input")


@contextmanager
def listening(taps: list[Tap], on_stage: OnStage) -> Iterator[None]:
    """Hear every stage while the model runs; each once, in the order in which it is computed."""
    heard: set[str] = set()

    def hear(tap: Tap, value: Any) -> None:
        if tap.stage not in heard:
            heard.add(tap.stage)
            on_stage(tap.stage, _tensor_in(value))

    def pre_hook(tap: Tap) -> Any:
        at = 1 if tap.listens == "second" else 0

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            hear(tap, given[at])

        return hook

    def hook(tap: Tap) -> Any:
        return lambda _module, _args, output: hear(tap, output)

    handles = [
        tap.module.register_forward_hook(hook(tap))
        if tap.listens == "output"
        else tap.module.register_forward_pre_hook(pre_hook(tap), with_kwargs=True)
        for tap in taps
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor_in(value: Any) -> torch.Tensor:
    """The tensor that a module gives; older classes give a tuple that begins with it."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple | list):
        return _tensor_in(value[0])
    return _tensor_in(value.last_hidden_state)
