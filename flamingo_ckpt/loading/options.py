"""What a load is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError

if TYPE_CHECKING:
    import torch

    from flamingo_ckpt.models.config import ModelConfig

#: What `LoadOptions.policy` may say.
POLICIES = ("strict", "lenient", "partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How `load_into` reads a checkpoint and what it accepts.

    Attributes:
        policy: `strict`: missing and unexpected keys raise. `lenient`: they are reported.
            `partial`: as strict, but a Flamingo may lack what only its bases have: the vision
            tower, the decoder layers, what else a language model has, and an input embedding that
            is frozen.
        layout: of the file, by name; None: by evidence.
        config: of the model, where sizes are wanted that no shape tells (numbers of heads).
        assign: True: the module gets new tensors. False: its own are filled. None: tensors on meta
            are replaced, others are filled in place.
        device: of new tensors; None: the CPU.
        dtype: of new floating-point tensors: None the module's, `keep` the file's.
        may_miss: module keys that the file need not have.
        image_grid: (height, width) of the file's table of image positions, in patches.
        text_positions: `linear` or `truncate`: how text positions are brought to another length.
        wrapper_key: of a torch file: the weights are under this key.
        include: globs; only keys of the file that fit one are read.
        exclude: globs; keys of the file that fit one are not read.
    """

    policy: str = "strict"
    layout: str | None = None
    config: ModelConfig | None = None
    assign: bool | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    may_miss: frozenset[str] = frozenset()
    image_grid: tuple[int, int] | None = None
    text_positions: str = "linear"
    wrapper_key: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            globs: Any = getattr(self, name)
            # a string is a sequence of strings too, each of them one character
            object.__setattr__(self, name, (globs,) if isinstance(globs, str) else tuple(globs))
        if self.image_grid is not None and not _is_grid(self.image_grid):
            raise CkptError(
                f"image_grid is {self.image_grid!r}",
                code="FC006",
                hint="a pair of numbers of patches: image_grid=(height, width)",
            )
        if self.policy not in POLICIES:
            raise CkptError(
                f"there is no loading policy `{self.policy}`",
                code="FC006",
                hint="policies are " + ", ".join(POLICIES),
            )


def _is_grid(value: object) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) for n in value)
