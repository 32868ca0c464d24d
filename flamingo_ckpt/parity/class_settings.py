"""What the classes of transformers were told, defaults and all: also what no input reaches.

A window of attention that is longer than the inputs, or a cap that a fused kernel leaves out,
changes nothing that a forward shows. It is compared as what it is, a setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.parity.shell import Shell
from flamingo_ckpt.tensors import escape

#: Fields that training, generation or bookkeeping go by, or that the weights' shapes tell.
_IDLE = re.compile(
    r"(^|\.)_|drop|initializer|init_|token_id|token_index|output_|return_dict|dtype|label"
    r"|use_cache|chunk|name_or_path|architectures|transformers_version|problem_type|is_encoder"
    r"|is_decoder|tie_|vocab_size|verbose|model_type|auto_map|tokenizer|init_config"
)
#: Fields that a computation goes by, for longer texts or other kernels if not for these inputs.
_DECIDES = re.compile(
    r"window|layer_types|rope|rotary|softcap|scale|scalar|clip|alibi|head|eps|act|norm|parallel"
    r"|bias|causal|bidirectional"
)


def class_findings(a: Shell, b: Shell, known: set[str]) -> Iterator[Finding]:
    """Settings that differ between two models of one class of transformers.

    Args:
        a: the first side, its module constructed.
        b: the second.
        known: names that have been told already, such as `language.rms_norm_eps`.
    """
    told = {name.rpartition(".")[2] for name in known}
    ours, theirs = _settings(a), _settings(b)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] == theirs[name] or name.rpartition(".")[2] in told:
            continue
        decides = _DECIDES.search(name) is not None
        yield Finding(
            code="FC407",
            severity="error" if decides else "warning",
            detail=f"`{escape(name)}` is {escape(repr(ours[name]))} in A and "
            f"{escape(repr(theirs[name]))} in B"
            + (": inputs that reach it are computed otherwise" if decides else ""),
            data={"setting": name, "a": ours[name], "b": theirs[name]},
        )


def _settings(shell: Shell) -> dict[str, Any]:
    """Dotted name -> value, of the configs that transformers' classes of a side have."""
    module: Any = shell.module
    found: dict[str, Any] = {}
    for part, holder in (("language", getattr(module, "lang_encoder", None)), ("", module)):
        config = getattr(holder, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            continue
        if part:
            return dict(_flat(config.to_dict(), part))
        for section, name in (("text_config", "language"), ("vision_config", "vision")):
            inner = getattr(config, section, None)
            if inner is not None and hasattr(inner, "to_dict"):
                found |= dict(_flat(inner.to_dict(), name))
    return found


def _flat(fields: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for field, value in fields.items():
        name = f"{before}.{field}"
        if _IDLE.search(name):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, str | int | float | bool | list | tuple) or value is None:
            yield name, list(value) if isinstance(value, tuple) else value
