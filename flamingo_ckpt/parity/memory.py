"""How much memory weights may take, and so whether they are streamed."""

from __future__ import annotations

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

#: Of the memory that is free, the share that weights may fill; the rest is for what is computed.
_SHARE, _STREAMED_SHARE = 0.75, 0.5
#: Of `mallopt`: blocks from this size on are maps of their own.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 20
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def weight_budget(num_bytes: int, device: str, max_memory: int | None) -> int | None:
    """Bytes of weights that may be in memory at a time; None where all may.

    Args:
        num_bytes: of all weights of one side.
        device: where they are computed with.
        max_memory: what the user allows; None goes by what is free.
    """
    if max_memory is not None:
        return None if num_bytes <= max_memory else max_memory
    free = free_bytes(device)
    return None if num_bytes <= _SHARE * free else int(_STREAMED_SHARE * free)


def free_bytes(device: str) -> int:
    """Memory that is free on a device: of the GPU, or of this machine within its container."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return min([_available(), *(left for one in _CGROUPS if (left := _left(*one)) is not None)])


def _available() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62


def _left(limit: str, usage: str) -> int | None:
    """What a control group still allows; pages of files can be dropped, and count as used there."""
    try:
        with open(limit, encoding="ascii") as file:
            most = int(file.read())
        with open(usage, encoding="ascii") as file:
            used = int(file.read())
    except (OSError, ValueError):  # none, or `max`
        return None
    return max(most - used, 0)


def return_large_blocks() -> None:
    """Let the C library give memory of large tensors back as soon as they are freed.

    glibc keeps such blocks for later once it has seen some, and what is computed layer by layer
    then leaves a heap of holes several times its size. For the rest of the process; another C
    library is left as it is.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def resolve_device(wanted: str | None) -> str:
    """The device to compute on: what was asked for, or a GPU where there is one.

    Raises:
        CkptError: FC482 a GPU was asked for and there is none, FC006 something that is no device.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except (RuntimeError, ValueError) as error:
        raise CkptError(
            f"`{escape(wanted)}` is no device", code="FC006", hint="`cpu`, `cuda` or `cuda:1`"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise CkptError(
            f"parity is not run on `{escape(wanted)}`",
            code="FC006",
            hint="`cpu`, `cuda` or `cuda:1`",
        )
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise CkptError(
            f"not run: `--device {escape(wanted)}` needs a GPU that this machine or this build of "
            f"torch ({torch.__version__}) does not have",
            code="FC482",
            hint="`--device cpu` decides as well; `python -c 'import torch; "
            "print(torch.cuda.is_available())'` says what torch sees",
        )
    return wanted
