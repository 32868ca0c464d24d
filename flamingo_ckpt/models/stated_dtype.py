"""What a `config.json` says of the dtype of its weights, after they were cast to another.

transformers makes a model in the dtype that the config states, whatever the file has: a folder of
bfloat16 with the config of a float32 release would take twice its size in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("dtype", "torch_dtype")
_SECTIONS = ("text_config", "vision_config")


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another dtype wherever it states one.

    Args:
        config: of a model, as it was read.
        dtype: as torch spells it.

    >>> with_dtype({"torch_dtype": "float32", "text_config": {"dtype": None}}, "bfloat16")
    {'torch_dtype': 'bfloat16', 'text_config': {'dtype': None}}
    """
    found: dict[str, Any] = {
        name: dtype if name in _NAMES and isinstance(value, str) else value
        for name, value in config.items()
    }
    for name in _SECTIONS:
        if isinstance(found.get(name), Mapping):
            found[name] = with_dtype(found[name], dtype)
    return found
