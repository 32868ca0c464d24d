"""Run a side: its weights in memory all at once, or each only while something computes with it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.buffers import rebuild_buffers
from flamingo_ckpt.parity.compute import continue_greedily, forward, gates_of, on_device
from flamingo_ckpt.parity.inputs import Inputs
from flamingo_ckpt.parity.memory import return_large_blocks
from flamingo_ckpt.parity.numerics import reordered_sums
from flamingo_ckpt.parity.shell import Shell, put
from flamingo_ckpt.parity.stages import OnStage, Tap, listening, taps_of

if TYPE_CHECKING:
    import torch

_GATES = (".attn_gate", ".ff_gate")
#: What a class may raise at inputs or weights that do not serve it.
FAILURES = (
    RuntimeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
    AssertionError,
)


class StopForward(Exception):  # noqa: N818
    """Raised by a listener that has heard enough; never leaves this package."""


@dataclass(slots=True, kw_only=True)
class Runner:
    """One side, ready to be run; to be closed when it is no longer needed.

    Attributes:
        shell: what is run.
        dtype: in torch's spelling.
        device: in torch's spelling.
        budget: bytes of weights that may be in memory; None for all of them.
        num_forwards: runs so far.
    """

    shell: Shell
    dtype: str
    device: str
    budget: int | None = None
    num_forwards: int = 0
    taps: list[Tap] = field(default_factory=list)
    _stream: Any = None

    @property
    def is_streamed(self) -> bool:
        """Whether weights come and go."""
        return self.budget is not None

    def open(self) -> Runner:
        """Bring the weights in, or get ready to."""
        self.taps = taps_of(self.shell)
        module = self.shell.module
        if self.budget is None:
            tensors = {
                id(one): self.weight(target.key)
                for target in self.shell.targets
                if target.is_parameter or target.key in self.shell.steps
                for one in target.tensors
            }
            put(module, tensors)
        else:
            return_large_blocks()
            self._stream = StreamedWeights(self)
        rebuild_buffers(module, self.device)
        if self.device != "cpu":
            _move_buffers(module, self.device)
        return self

    def weight(self, key: str) -> torch.Tensor:
        """A tensor of the module as it is computed with."""
        import torch

        stored = self.shell.stored(key)
        wanted = getattr(torch, self.dtype) if stored.is_floating_point() else None
        found = stored.to(self.device, wanted)
        step = self.shell.steps.get(key)
        if step is not None and found is not stored:
            del stored
            self.shell.reader.release(step)  # it was cast or moved: the file's pages are idle
        return found

    def run(
        self,
        inputs: Inputs,
        on_stage: OnStage,
        *,
        gate: float | None = None,
        is_reordered: bool = False,
    ) -> None:
        """One forward, telling of every stage.

        Args:
            inputs: on the CPU.
            on_stage: told of each stage as it is computed, then of what the model gives. It may
                raise `StopForward`.
            gate: a value for all gates; None leaves them as they are.
            is_reordered: whether sums are taken in another order.
        """
        tensors = on_device(inputs, self.device, self.dtype)
        self.num_forwards += 1
        with self._computing(gate), ExitStack() as stack:
            stack.enter_context(listening(self.taps, on_stage))
            if is_reordered:
                stack.enter_context(reordered_sums())
            try:
                found = forward(self.shell.module, inputs.kind, tensors)
                for stage, tensor in found.items():
                    on_stage(stage, tensor)
            except StopForward:
                pass
            except (MemoryError, RuntimeError) as error:
                raise _out_of_memory(error, self) or error from None

    def greedy(self, inputs: Inputs, count: int) -> tuple[list[int], list[float]]:
        """As `continue_greedily`, with the gates as they are."""
        tensors = on_device(inputs, self.device, self.dtype)
        with self._computing(None):
            return continue_greedily(self.shell.module, inputs, tensors, count)

    def close(self) -> None:
        """Let the weights go."""
        import gc

        import torch

        self.taps = []
        self._stream = None
        self.shell.module = torch.nn.Module()
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @contextmanager
    def _computing(self, gate: float | None) -> Iterator[None]:
        if self._stream is not None:
            self._stream.gate = gate
            with self._stream:
                yield
            return
        import torch

        kept = [(one, one.data) for one in gates_of(self.shell.module)]
        try:
            if gate is not None:
                for parameter, data in kept:
                    parameter.data = torch.full_like(data, gate)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data


def _out_of_memory(error: BaseException, runner: Runner) -> CkptError | None:
    """What to do about memory that does not suffice; None for another error."""
    words = str(error)
    if not isinstance(error, MemoryError) and not any(
        told in words for told in ("out of memory", "can't allocate memory")
    ):
        return None
    return CkptError(
        f"{runner.shell.side.name} does not fit into the memory of `{runner.device}`",
        code="FC489",
        where=runner.shell.side.uri,
        hint="--max-memory SIZE streams the weights; fewer or smaller inputs take less as well",
    )


def _move_buffers(module: Any, device: str) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)


def _torch_function_mode() -> Any:
    from torch.overrides import TorchFunctionMode

    return TorchFunctionMode


class StreamedWeights:
    """While it is entered, a parameter on meta is read when an operation is given it.

    The operation gets the weights, the module keeps its placeholder: any class computes so,
    whatever it does with its parameters. What was used last stays in memory, up to the budget.

    Args:
        runner: whose weights they are.
    """

    def __init__(self, runner: Runner) -> None:
        self.gate: float | None = None
        self._runner = runner
        shell = runner.shell
        self._keys = {id(one): target.key for target in shell.targets for one in target.tensors}
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._mode: Any = None

    def __enter__(self) -> StreamedWeights:
        self._mode = _interception(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._mode = None
        # a gate that was forced must not be met again
        for key in [key for key in self._kept if key.endswith(_GATES)]:
            self._drop(key)

    @property
    def device(self) -> torch.device:
        """Where weights are when they are used."""
        import torch

        return torch.device(self._runner.device)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of the placeholders."""
        return id(value) in self._keys

    def weight(self, value: Any) -> torch.Tensor:
        """What a placeholder stands for."""
        key = self._keys[id(value)]
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._runner.weight(key)
        if self.gate is not None and key.endswith(_GATES):
            found = found.new_full(found.shape, self.gate)
        found.requires_grad_(False)
        self._make_room(found.nbytes, key)
        self._kept[key] = found
        self._bytes += found.nbytes
        return found

    def _make_room(self, num_bytes: int, key: str) -> None:
        budget = self._runner.budget or 0
        if num_bytes > budget:
            raise CkptError(
                f"`{key}` takes {num_bytes} bytes by itself, and {budget} may be used",
                code="FC489",
                where=self._runner.shell.side.uri,
                key=key,
                hint=f"--max-memory has to be {num_bytes} at least",
            )
        while self._kept and self._bytes + num_bytes > budget:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        dropped = self._kept.pop(key)
        self._bytes -= dropped.nbytes
        del dropped
        shell = self._runner.shell
        step = shell.steps.get(key)
        if step is not None:
            shell.reader.release(step)


def _interception(weights: StreamedWeights) -> Any:
    """The mode that gives operations the weights in place of their placeholders."""
    import torch

    facts = {
        getattr(torch.Tensor, name).__get__
        for name in ("dtype", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "grad")
    } | {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.is_floating_point,
        torch.Tensor.stride,
        torch.Tensor.element_size,
    }
    device: Any = torch.Tensor.device
    base: Any = _torch_function_mode()

    class Interception(base):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            named: Mapping[str, Any] = kwargs or {}
            if func == device.__get__ and weights.holds(args[0]):
                return weights.device
            if func in facts:
                return func(*args, **named)
            return func(*_given(args), **{name: _swap(value) for name, value in named.items()})

    def _given(values: Any) -> Any:
        return [_swap(value) for value in values]

    def _swap(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return weights.weight(value) if weights.holds(value) else value
        if type(value) in (list, tuple):
            return type(value)(_given(value))
        return value

    return Interception()
