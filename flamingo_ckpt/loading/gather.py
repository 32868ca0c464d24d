"""Tensors that several processes hold in parts, gathered one after the other for one writer.

The writer asks for tensors in whatever order it writes; the other processes are told which one, and
take part in gathering it, until the writer says that it is done or has failed. The writer keeps as
many whole tensors as it has threads that write, the others keep none. What goes between the
processes are numbers and text, never pickled objects.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.memory_source import is_split

if TYPE_CHECKING:
    import torch

_GATHER, _DONE, _FAILED = 0, 1, 2


class Gathering:
    """One writing process (rank 0 of the default group) and those that help it.

    Where no tensor is split there is nobody to talk to: every process is its own writer.

    Args:
        tensors: the same in the same order on every process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._split = [tensor for tensor in tensors if is_split(tensor)]
        self._numbers = {id(tensor): number for number, tensor in enumerate(self._split)}
        self._lock = threading.Lock()
        if self._split:
            import torch.distributed as dist

            self.is_writer = dist.get_rank() == 0
            self._device = self._split[0].to_local().device  # type: ignore[attr-defined]
        else:
            self.is_writer = True

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor; to be called by the writer, from any of its threads."""
        if not is_split(tensor):
            return tensor
        with self._lock:
            self._tell(_GATHER, self._numbers[id(tensor)])
            return self._whole(tensor)

    def lead(self, write: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Run the writer's work; whatever comes of it, the others hear of it.

        Args:
            write: gives what the others should know, as JSON can say it.
        """
        if not self._split:
            return write()
        try:
            answer = write()
        except BaseException as error:
            self._say(_FAILED, _as_json(error))
            raise
        self._say(_DONE, dict(answer))
        return answer

    def follow(self) -> Mapping[str, Any]:
        """Take part until the writer has finished; returns its answer.

        Raises:
            CkptError: FC465, or the writer's own code: what went wrong there.
        """
        while True:
            kind, value = self._hear()
            if kind == _GATHER:
                self._whole(self._split[value])
                continue
            answer: dict[str, Any] = json.loads(self._hear_text(value))
            if kind == _FAILED:
                raise CkptError(**answer)
            return answer

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        # Gradients are kept track of, and the current device is known, for each thread by itself.
        with torch.no_grad(), torch.device(self._device):
            whole: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
            return whole

    def _say(self, kind: int, answer: Mapping[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        raw = json.dumps(answer).encode("ascii")
        with self._lock:
            self._tell(kind, len(raw))
            dist.broadcast(torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(self._device), 0)

    def _tell(self, kind: int, value: int) -> None:
        import torch
        import torch.distributed as dist

        dist.broadcast(torch.tensor([kind, value], dtype=torch.int64, device=self._device), 0)

    def _hear(self) -> tuple[int, int]:
        import torch
        import torch.distributed as dist

        said = torch.zeros(2, dtype=torch.int64, device=self._device)
        dist.broadcast(said, 0)
        kind, value = said.tolist()
        return int(kind), int(value)

    def _hear_text(self, size: int) -> str:
        import torch
        import torch.distributed as dist

        raw = torch.zeros(size, dtype=torch.uint8, device=self._device)
        dist.broadcast(raw, 0)
        return bytes(raw.tolist()).decode("ascii")


def _as_json(error: BaseException) -> dict[str, Any]:
    if isinstance(error, CkptError):
        names = ("message", "code", "where", "hint", "key")
        return {name: getattr(error, name) for name in names}
    return {
        "message": f"the process that writes failed: {type(error).__name__}: {error}",
        "code": "FC465",
    }
