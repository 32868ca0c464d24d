"""Import torchvision although it was built for another torch.

pip pairs a CPU build of torch with the CUDA build of torchvision when an index offers nothing else.
torchvision then finds its compiled library unusable, says nothing, and fails a moment later where
it describes an operator of that library to torch:

    RuntimeError: operator torchvision::nms does not exist

That one line takes open_clip, timm and the CLIP classes of transformers with it, although they want
torchvision for picture transforms, which are plain Python.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_SYMPTOM = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
#: Keeps the declarations alive: torch forgets them with the object that made them.
_libraries: list[Any] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring `nms` and `qnms` to torch where their library did not load.

    The operators are declared and not implemented: afterwards everything in torchvision works that
    is plain Python (transforms, models), and whatever needs its compiled library (`nms`,
    `roi_align` and the other box operators, the image decoders of `torchvision.io`) raises when it
    is called. A torchvision that imports by itself is returned untouched.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it fails for any other reason than the one above.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
    # What was half imported would be found again instead of being imported anew.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    """Tell torch names and signatures of the two operators. Once: torch refuses a second time."""
    if _libraries:
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
    _libraries.append(library)
