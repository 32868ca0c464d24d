"""What one side computed, kept on disk, and how far another run is from it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flamingo_ckpt.formats.checksum import new_digest
from flamingo_ckpt.parity.compute import LOGITS
from flamingo_ckpt.parity.result import Measure
from flamingo_ckpt.parity.stages import is_text

if TYPE_CHECKING:
    import torch

#: Elements that are compared at a time: what is held in float64 stays small.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Entry:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class Trace:
    """The stages of one forward, written one after the other to a file.

    Attributes:
        path: of the file; made anew.
        stages: name -> where it lies, in the order in which they were computed.
        digests: name -> digest of its bytes.
    """

    path: str
    stages: dict[str, _Entry] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def write(self, stage: str, tensor: torch.Tensor) -> None:
        """Keep a stage."""
        import torch

        flat = tensor.detach().contiguous().cpu()
        with open(self.path, "ab") as file:
            offset = file.tell()
            file.write(flat.view(-1).view(torch.uint8).numpy().data)
        self.stages[stage] = _Entry(offset, tuple(flat.shape), flat.dtype)
        self.digests[stage] = digest_of(flat)

    def read(self, stage: str) -> torch.Tensor:
        """A stage as it was computed, on the CPU."""
        import torch

        entry = self.stages[stage]
        size = math.prod(entry.shape) * entry.dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(entry.offset)
            raw = bytearray(file.read(size))
        if not raw:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(raw, dtype=entry.dtype).view(entry.shape)

    def remove(self) -> None:
        """Delete the file."""
        if os.path.exists(self.path):
            os.unlink(self.path)


def digest_of(tensor: torch.Tensor) -> str:
    """XXH3-128 of a tensor's bytes."""
    import torch

    flat = tensor.detach().contiguous().cpu()
    digest = new_digest()
    digest.update(flat.view(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def measure(
    stage: str, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None
) -> Measure:
    """How far the second side's tensor is from the first's.

    Args:
        stage: its name.
        ours: of the first side, on the CPU.
        theirs: of the second.
        mask: of the text, `[rows, tokens]`; what is padding there is not compared.
    """
    a, b = _common(stage, ours, theirs.detach().cpu())
    if a is None or b is None:
        return Measure(max_abs=math.inf, relative=math.inf, cosine=math.nan)
    if mask is not None and (is_text(stage) or stage == LOGITS) and a.shape[:2] == mask.shape:
        a, b = a[mask], b[mask]
    rows = a.reshape(-1, a.shape[-1]) if a.ndim else a.reshape(1, 1)
    others = b.reshape(rows.shape)
    found = _distance(rows, others)
    if stage != LOGITS or rows.shape[-1] < 2:
        return found
    agreement, divergence = _of_logits(rows, others)
    return Measure(
        max_abs=found.max_abs,
        relative=found.relative,
        cosine=found.cosine,
        num_bad=found.num_bad,
        argmax_agreement=agreement,
        kl=divergence,
    )


def _common(
    stage: str, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The two with one shape; a vocabulary may be padded on one side. None where they differ."""
    if a.shape == b.shape:
        return a, b
    if a.numel() == b.numel() and _squeezed(a) == _squeezed(b):
        return a, b.reshape(a.shape)
    if stage == LOGITS and a.shape[:-1] == b.shape[:-1]:
        width = min(a.shape[-1], b.shape[-1])
        return a[..., :width], b[..., :width]
    return None, None


def _squeezed(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)


def _distance(a: torch.Tensor, b: torch.Tensor) -> Measure:
    """Norms are summed in float64; a·b follows from them, |a|² + |b|² - |a - b|² = 2 a·b."""
    largest, squared, norm_a, norm_b = 0.0, 0.0, 0.0, 0.0
    num_bad = 0
    step = max(1, _BLOCK // max(1, a.shape[-1]))
    for at in range(0, len(a), step):
        x, y = a[at : at + step].double(), b[at : at + step].double()
        squares = _square(x), _square(y)
        if not all(math.isfinite(one) for one in squares):
            odd = ~(x.isfinite() & y.isfinite())
            same = (x == y) | (x.isnan() & y.isnan())
            num_bad += int((odd & ~same).sum())
            x, y = (one.masked_fill(odd, 0.0) for one in (x, y))
            squares = _square(x), _square(y)
        difference = y - x
        if difference.numel():
            largest = max(largest, float(difference.abs().max()))
        squared += _square(difference)
        norm_a, norm_b = norm_a + squares[0], norm_b + squares[1]
    relative = math.sqrt(squared / norm_a) if norm_a else (math.inf if squared else 0.0)
    norms = math.sqrt(norm_a) * math.sqrt(norm_b)
    product = (norm_a + norm_b - squared) / 2
    cosine = max(-1.0, min(1.0, product / norms)) if norms else (1.0 if norm_a == norm_b else 0.0)
    if num_bad:
        relative = math.nan
    return Measure(max_abs=largest, relative=relative, cosine=cosine, num_bad=num_bad)


def _square(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _of_logits(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(share of rows with the same highest entry, mean divergence in nats)."""
    if not len(a):
        return 1.0, 0.0
    agreement, divergence = 0, 0.0
    step = max(1, _BLOCK // a.shape[-1])
    for at in range(0, len(a), step):
        x, y = a[at : at + step].double(), b[at : at + step].double()
        agreement += int((x.argmax(-1) == y.argmax(-1)).sum())
        log_x, log_y = x.log_softmax(-1), y.log_softmax(-1)
        divergence += float((log_x.exp() * (log_x - log_y)).sum())
    return agreement / len(a), divergence / len(a)


def num_not_finite(tensor: torch.Tensor, stage: str, mask: torch.Tensor | None) -> int:
    """NaN and infinite elements, but for those of padding."""
    is_masked = is_text(stage) or stage == LOGITS
    if mask is not None and is_masked and tensor.shape[:2] == mask.shape:
        tensor = tensor[mask.to(tensor.device)]
    return int((~tensor.isfinite()).sum())
