"""Put a checkpoint into a module: the loaders that users know from elsewhere, without their traps.

Nothing here imports torch before it is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo_ckpt.errors import LoadError
    from flamingo_ckpt.loading.buffers import rebuild_buffers
    from flamingo_ckpt.loading.checkpoint import load_checkpoint
    from flamingo_ckpt.loading.engine import load_into
    from flamingo_ckpt.loading.flamingo import create_model_and_transforms
    from flamingo_ckpt.loading.options import LoadOptions
    from flamingo_ckpt.loading.paligemma import load_hf_model
    from flamingo_ckpt.loading.pretrained import load_pretrained
    from flamingo_ckpt.loading.report import IncompatibleKeys, LoadReport
    from flamingo_ckpt.loading.resume import load_training_state
    from flamingo_ckpt.loading.save import save_checkpoint

#: Name -> the module that defines it.
_EXPORTS = {
    "IncompatibleKeys": "flamingo_ckpt.loading.report",
    "LoadError": "flamingo_ckpt.errors",
    "LoadOptions": "flamingo_ckpt.loading.options",
    "LoadReport": "flamingo_ckpt.loading.report",
    "create_model_and_transforms": "flamingo_ckpt.loading.flamingo",
    "load_checkpoint": "flamingo_ckpt.loading.checkpoint",
    "load_hf_model": "flamingo_ckpt.loading.paligemma",
    "load_into": "flamingo_ckpt.loading.engine",
    "load_pretrained": "flamingo_ckpt.loading.pretrained",
    "load_training_state": "flamingo_ckpt.loading.resume",
    "rebuild_buffers": "flamingo_ckpt.loading.buffers",
    "save_checkpoint": "flamingo_ckpt.loading.save",
}

__all__ = [
    "IncompatibleKeys",
    "LoadError",
    "LoadOptions",
    "LoadReport",
    "create_model_and_transforms",
    "load_checkpoint",
    "load_hf_model",
    "load_into",
    "load_pretrained",
    "load_training_state",
    "rebuild_buffers",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    found = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
