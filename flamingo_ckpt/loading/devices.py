"""The device that a caller names, checked before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch

_HINT = "`cpu`, `cuda`, `cuda:1`, `mps`; `torch.cuda.is_available()` says whether torch sees a GPU"


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that is none, that this machine or torch lacks, or that keeps no values.

    Raises:
        CkptError: FC006.
    """
    import torch

    if device is None:
        return
    try:
        is_meta = torch.empty(1, device=device).is_meta
    # torch raises what it likes, AssertionError where it was built without CUDA
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CkptError(
            f"the device `{escape(str(device))}` cannot be used: {escape(reason)}",
            code="FC006",
            hint=_HINT,
        ) from error
    if is_meta:
        raise CkptError(
            "nothing can be loaded onto the device `meta`: it keeps no values",
            code="FC006",
            hint=_HINT,
        )
