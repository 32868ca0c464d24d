"""What should be in a checkpoint and how it computes; torch is imported inside functions only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Not on demand: the module `build` would take the name when anything imports it.
from flamingo_ckpt.models.build import build, load_config

if TYPE_CHECKING:
    from flamingo_ckpt.models.modules.flamingo import Flamingo
    from flamingo_ckpt.models.modules.hf_config import FlamingoConfig
    from flamingo_ckpt.models.modules.hf_flamingo import FlamingoForConditionalGeneration
    from flamingo_ckpt.models.modules.sharding import shard_model

#: name -> the module that has it. Asking for a class imports torch, and nothing before that does.
#: Asking for one of Hugging Face's kind also makes them known to `AutoModel` of transformers.
_EXPORTS = {
    "Flamingo": "flamingo_ckpt.models.modules.flamingo",
    "FlamingoConfig": "flamingo_ckpt.models.modules.hf_flamingo",
    "FlamingoForConditionalGeneration": "flamingo_ckpt.models.modules.hf_flamingo",
    "shard_model": "flamingo_ckpt.models.modules.sharding",
}

__all__ = [
    "Flamingo",
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "build",
    "load_config",
    "shard_model",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
