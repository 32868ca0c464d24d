"""What transformers' own `AutoConfig` makes of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flamingo_ckpt.tensors import escape

#: transformers makes a name for each of them, whatever the kind of model.
_MAX_LABELS: Final = 1 << 20


def is_known(model_type: str) -> bool:
    """Whether transformers itself has a class for it; what loaders of this package add counts not.

    >>> is_known("clip"), is_known("flamingo")
    (True, False)
    """
    from transformers.models.auto import configuration_auto

    return model_type in configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]


def refusal(document: Mapping[str, Any]) -> str | None:
    """Why the class of a config's `model_type` refuses it, on one line; None where it takes it."""
    from transformers import CONFIG_MAPPING

    from flamingo_ckpt.models.assemble import quiet_libraries

    labels = document.get("num_labels")
    if isinstance(labels, int) and labels > _MAX_LABELS:
        return f"ValueError: `num_labels` is {escape(str(labels)[:20])}, and it names every one"
    try:
        with quiet_libraries():
            CONFIG_MAPPING[str(document["model_type"])].from_dict(dict(document))
    except Exception as error:  # whatever a class makes of its fields
        line = (str(error).splitlines() or [""])[0]
        return escape(f"{type(error).__name__}: {line}")[:200]
    return None
