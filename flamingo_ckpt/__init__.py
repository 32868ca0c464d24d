"""Checkpoint conversion, verification and loading for Flamingo-family models.

Importing the package imports no torch; the loaders below are looked up when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo_ckpt.loading import (
        IncompatibleKeys,
        LoadError,
        LoadReport,
        create_model_and_transforms,
        load_checkpoint,
        load_hf_model,
        load_pretrained,
        load_training_state,
        save_checkpoint,
    )

__version__ = "0.1.0"

__all__ = [
    "IncompatibleKeys",
    "LoadError",
    "LoadReport",
    "__version__",
    "create_model_and_transforms",
    "load_checkpoint",
    "load_hf_model",
    "load_pretrained",
    "load_training_state",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    from flamingo_ckpt import loading

    return getattr(loading, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
