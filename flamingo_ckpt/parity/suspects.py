"""The usual suspects that no tensor shows: activation, epsilon, which tokens, which settings.

Each is one change to the second side, to be tried: if the two then agree, it was that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.settings import differing, settings_of

if TYPE_CHECKING:
    from torch import nn

    from flamingo_ckpt.models.config import ModelConfig

#: Given the module in which the two first diverge, and the whole model.
Change = Callable[["nn.Module", "nn.Module"], None]

_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
_EPSILON_NAMES = ("eps", "variance_epsilon")
#: Where a setting's first word is in a config.
_SECTIONS = {"vision": "vision_config", "text": "text_config", "language": "text_config"}
#: Fields that say nothing about what is computed.
_IDLE = frozenset(
    "architectures auto_map dtype torch_dtype transformers_version use_cache _name_or_path "
    "vocab_size bos_token_id eos_token_id pad_token_id".split()
)
_POSITIONS = "vision.position_embedding.weight"
#: Fields that decide which tensors there are.
_STRUCTURE = (
    "cross_attn_every_n_layers",
    "perceiver_depth",
    "perceiver_num_latents",
    "perceiver_heads",
    "perceiver_dim_head",
    "cross_attn_heads",
    "cross_attn_dim_head",
    "max_num_frames",
    "max_num_media",
    "tie_word_embeddings",
    "projection_dim",
    "media_token_id",
    "eoc_token_id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One change to the second side.

    Attributes:
        words: what would be the fault, for people.
        change: of the model; None where only the config changes.
        config: to build it with; None for its own.
        touches: canonical names of tensors that are changed along with it.
    """

    words: str
    change: Change | None = None
    config: ModelConfig | None = None
    touches: tuple[str, ...] = ()


def setting_differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Name -> (the first config's value, the second's), of all that decides what is computed."""
    found = dict(differing(settings_of(a), settings_of(b)))
    for name in _STRUCTURE:
        ours, theirs = a.data.get(name), b.data.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            found[name] = (ours, theirs)
    return found


def config_suspects(a: ModelConfig, b: ModelConfig) -> Iterator[Suspect]:
    """Each setting in which the configs differ, then all of them at once."""
    differences = setting_differences(a, b)
    told = [
        f"`{name}` is {theirs!r} in B's config and {ours!r} in A's"
        for name, (ours, theirs) in differences.items()
    ]
    for words, (name, (ours, _)) in zip(told, differences.items(), strict=True):
        changed = _with_setting(b, name, ours)
        if changed is not None and name == "vision.image_size":
            # another grid of patches: the table of positions is brought to it
            words += ", and its table of positions was not resized to that"
            yield Suspect(words=words, config=changed, touches=(_POSITIONS,))
        elif changed is not None:
            yield Suspect(words=words, config=changed)
    yield from _raw_suspects(a, b)
    if told:
        yield Suspect(words="; ".join(told), config=a)


def _raw_suspects(a: ModelConfig, b: ModelConfig) -> Iterator[Suspect]:
    """Fields of the configs' sections that differ and have no name of their own here."""
    from flamingo_ckpt.models.config import parse_config

    for section in ("text_config", "vision_config"):
        ours, theirs = a.data.get(section), b.data.get(section)
        if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
            continue
        for field in sorted({*ours, *theirs}):
            value, other = ours.get(field), theirs.get(field)
            if value == other or field in _IDLE:
                continue
            changed = {key: one for key, one in theirs.items() if key != field}
            if field in ours:
                changed[field] = value
            try:
                config = parse_config({**b.data, section: changed}, b.where, layout=b.layout)
            except CkptError:
                continue
            yield Suspect(
                words=f"`{section}.{field}` is {other!r} in B's config and {value!r} in A's",
                config=config,
            )


def _with_setting(config: ModelConfig, name: str, value: Any) -> ModelConfig | None:
    """The config with another value of one setting; None where it has no field of that name."""
    from flamingo_ckpt.models.config import parse_config

    data = copy.deepcopy(dict(config.data))
    part, _, field = name.rpartition(".")
    if name == "vision.tokens":
        data["vision_tokens"] = value
    elif not part:
        data[name] = value
    else:
        section = data.get(_SECTIONS[part])
        if not isinstance(section, dict):
            return None
        section[field] = value
        rope = section.get("rope_parameters")
        if field == "rope_theta" and isinstance(rope, dict):
            rope["rope_theta"] = value
    try:
        return parse_config(data, config.where, layout=config.layout)
    except CkptError:
        return None


def module_suspects(module: nn.Module, stage: str) -> Iterator[Suspect]:
    """What a module may compute with instead, where nothing in the configs differs.

    Args:
        module: in which the two first diverge.
        stage: its name.
    """
    own = _activations(module)
    for name, make in _candidates().items():
        if own and own != {name}:
            yield Suspect(
                words=f"the activation is {' and '.join(sorted(own))} in B, and {name} in A",
                change=_set_activation(make),
            )
    epsilons = _epsilons(module)
    for value in _EPSILONS:
        if epsilons and epsilons != {value}:
            here = " and ".join(f"{one:g}" for one in sorted(epsilons))
            yield Suspect(
                words=f"the epsilon of norms is {here} in B, and {value:g} in A",
                change=_set_epsilon(value),
            )
    if stage.startswith("vision."):
        yield Suspect(
            words="the perceiver is given tokens from the other side of `ln_post`",
            change=_toggle_tokens,
        )


# --- activations ----------------------------------------------------------------------------------


def _candidates() -> dict[str, Callable[[], nn.Module]]:
    from torch import nn

    class QuickGELU(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * (1.702 * x).sigmoid()

    return {
        "quick_gelu": QuickGELU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "relu": nn.ReLU,
        "silu": nn.SiLU,
    }


#: Class of a module -> what it computes. transformers, open_clip and torch have their own.
_NAMES = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def activation_name(module: nn.Module) -> str:
    """What an activation computes; "" for a module that is none."""
    name = _NAMES.get(type(module).__name__, "")
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


def _activations(module: nn.Module) -> set[str]:
    return {name for one in module.modules() if (name := activation_name(one))}


def _set_activation(make: Callable[[], nn.Module]) -> Change:
    def change(module: nn.Module, _: nn.Module) -> None:
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                if activation_name(child):
                    setattr(part, name, make())

    return change


# --- epsilons -------------------------------------------------------------------------------------


def _epsilons(module: nn.Module) -> set[float]:
    return {
        float(value)
        for one in module.modules()
        for name in _EPSILON_NAMES
        if isinstance(value := getattr(one, name, None), float)
    }


def _set_epsilon(value: float) -> Change:
    def change(module: nn.Module, _: nn.Module) -> None:
        for one in module.modules():
            for name in _EPSILON_NAMES:
                if isinstance(getattr(one, name, None), float):
                    setattr(one, name, value)

    return change


# --- tokens ---------------------------------------------------------------------------------------


def _toggle_tokens(_: nn.Module, model: nn.Module) -> None:
    whole: Any = model
    if hasattr(whole, "_normalises_tokens"):
        whole._normalises_tokens = not whole._normalises_tokens
    tower: Any = getattr(whole, "vision_encoder", None)
    if hasattr(tower, "final_ln_after_pool"):
        tower.final_ln_after_pool = not tower.final_ln_after_pool
