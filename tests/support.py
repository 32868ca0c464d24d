"""What test modules share: running the command line, reading bytes back, independent oracles."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flamingo_ckpt.cli.main import run
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.extract import BLOCK_BYTES, read_blocks
from flamingo_ckpt.report.schema import first_problem
from flamingo_ckpt.tensors import Manifest, TensorInfo

if TYPE_CHECKING:
    import torch

FIXTURES = Path(__file__).parent.parent / "fixtures"

#: torch's names -> safetensors' names; written out here so that it can contradict the package.
TORCH_NAMES = {
    "torch.bool": "BOOL",
    "torch.float4_e2m1fn_x2": "F4",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.int16": "I16",
    "torch.uint16": "U16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.uint32": "U32",
    "torch.float32": "F32",
    "torch.complex64": "C64",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.uint64": "U64",
    "torch.complex32": "C32",
    "torch.complex128": "C128",
}


class Outcome(NamedTuple):
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as the one JSON document that it must be, which fits the schema of reports."""
        parsed = json.loads(self.out)
        assert isinstance(parsed, dict)
        assert first_problem(parsed) is None, first_problem(parsed)
        return parsed

    @property
    def codes(self) -> list[str]:
        """The codes of the document's findings."""
        return [finding["code"] for finding in self.document["findings"]]


class Facts(NamedTuple):
    """A tensor as bits: what two tensors must agree in to be the same."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class MemorySource:
    """A byte source over bytes, for readers that need no file."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        self._data = data
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, size: int) -> bytes:
        from flamingo_ckpt.errors import FormatError

        if offset < 0 or size < 0 or offset + size > len(self._data):
            raise FormatError("read past the end", code="FC102", where=self._name)
        return self._data[offset : offset + size]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))


def cli(*arguments: object) -> Outcome:
    """Run one command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def cli_ok(*arguments: object) -> Outcome:
    """Run one command line that must succeed."""
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome
    return outcome


def cli_process(*arguments: object, env: Mapping[str, str] | None = None) -> Outcome:
    """Run one command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "flamingo_ckpt", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a process of their own; stdout is the answer."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def stored_bytes(tensor: TensorInfo) -> bytes:
    """A tensor's logical bytes, by the package's own reader."""
    buffer = bytearray(BLOCK_BYTES)
    return b"".join(bytes(block) for block in read_blocks(tensor, buffer))


def facts_of(manifest: Manifest) -> dict[str, Facts]:
    """Every tensor of a manifest as bits."""
    return {t.name: Facts(t.dtype.name, t.shape, stored_bytes(t)) for t in manifest.tensors}


def facts_at(path: Path | str, **options: Any) -> dict[str, Facts]:
    """Every tensor of a file or folder as bits, by the package's own reader."""
    return facts_of(open_checkpoint(os.fspath(path), **options))


def torch_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's logical bytes, by torch; `ctypes` because numpy lacks half of the dtypes."""
    import torch

    with quiet_torch():
        plain = tensor.detach()
        if plain.dim() and not plain.is_contiguous():
            # The copy is made as integers: several dtypes have no copy kernel of their own.
            width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            kind = width.get(plain.element_size())
            plain = (plain.view(kind) if kind else plain).contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.nbytes else b""


def torch_facts(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Facts]:
    """The oracle: every tensor of a state dict as bits, without the package."""
    found = {}
    for name, tensor in state_dict.items():
        dtype, shape = TORCH_NAMES[str(tensor.dtype)], tuple(tensor.shape)
        if dtype == "F4":  # torch counts bytes, each of two elements
            shape = (*shape[:-1], shape[-1] * 2)
        found[name] = Facts(dtype, shape, torch_bytes(tensor))
    return found


def load_torch(path: Path, **options: Any) -> Any:
    """`torch.load`, restricted to weights, on the CPU."""
    import torch

    with quiet_torch():
        return torch.load(path, weights_only=True, map_location="cpu", **options)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """torch calls complex32 experimental and TorchScript deprecated; we only need files of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf support is experimental")
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
        yield


def random_tensor(dtype: torch.dtype, shape: Iterable[int], seed: int = 0) -> torch.Tensor:
    """Random bits in a dtype: NaN payloads, infinities and -0 occur. BOOL gets 0 and 1."""
    import torch

    shape = tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    with quiet_torch():
        width = torch.empty(0, dtype=dtype).element_size()
        count = width
        for size in shape:
            count *= size
        raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        if dtype is torch.bool:
            raw %= 2
        return raw.view(dtype).reshape(shape)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content: to show that nothing changed."""
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder: Path) -> list[str]:
    """Every entry of a folder, hidden ones too."""
    return sorted(os.listdir(folder))
