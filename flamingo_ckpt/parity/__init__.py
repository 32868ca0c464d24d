"""Forward parity: whether two checkpoints compute the same; if not, which stage, which tensor.

Nothing here imports torch before it is called.
"""

from flamingo_ckpt.parity.check import Options, check_parity
from flamingo_ckpt.parity.memory import resolve_device
from flamingo_ckpt.parity.opening import Side, open_pair
from flamingo_ckpt.parity.result import ParityResult, extra_of, summary_of

__all__ = [
    "Options",
    "ParityResult",
    "Side",
    "check_parity",
    "extra_of",
    "open_pair",
    "resolve_device",
    "summary_of",
]
