"""TorchScript archives: parameters by attribute path, no code run."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support import (
    FIXTURES,
    cli,
    cli_ok,
    facts_at,
    load_torch,
    python,
    quiet_torch,
    torch_facts,
)

SRC = FIXTURES / "torchscript.pt"


def test_names_and_bits_are_those_of_the_state_dict(tmp_path: Path) -> None:
    with quiet_torch():
        oracle = torch_facts(torch.jit.load(SRC).state_dict())
    assert facts_at(SRC) == oracle
    cli_ok("convert", SRC, tmp_path / "a.safetensors")
    cli_ok("convert", tmp_path / "a.safetensors", tmp_path / "back.pt")
    assert torch_facts(load_torch(tmp_path / "back.pt")) == oracle


def test_inspect_lists_constants_beside_the_weights() -> None:
    document = cli("inspect", SRC, "--json").document
    assert document["inputs"][0]["format"] == "torchscript"
    assert [one["path"] for one in document["beside"]] == ["scale"]
    assert document["beside"][0]["kind"] == "float 0.125"


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3, bias=False)
        self.second = torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs))


def test_tied_parameters_and_module_lists(tmp_path: Path) -> None:
    with quiet_torch():
        torch.jit.save(torch.jit.script(Tied()), str(tmp_path / "src.pt"))
        oracle = torch_facts(torch.jit.load(tmp_path / "src.pt").state_dict())
    assert facts_at(tmp_path / "src.pt") == oracle
    assert ["first.weight", "second.weight"] in cli(
        "inspect", tmp_path / "src.pt", "--json"
    ).document["tied"]


def test_the_code_records_are_never_opened() -> None:
    """The reader asks the file for ranges; none of them lies in a record under `code/`."""
    script = """
import sys
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.formats.opening import read_source
from flamingo_ckpt.formats.zip_archive import ZipArchive
asked = []
class Spy(FileSource):
    def read(self, offset, size):
        asked.append((offset, offset + size))
        return super().read(offset, size)
source = Spy(sys.argv[1])
archive = ZipArchive(FileSource(sys.argv[1]))
read_source(source)
code = [e for name, e in archive.entries.items() if "/code/" in name]
assert code
directory = source.size - 65557  # the end of the file is searched for the directory
for entry in code:
    for begin, end in asked:
        small = begin > 0 and end < source.size
        inside = begin < entry.header_offset + entry.stored_bytes and end > entry.header_offset
        assert not (small and inside), entry
print("torch" in sys.modules)
"""
    done = python(script, SRC)
    assert (done.stdout, done.stderr) == ("False\n", "")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.register_buffer("kept", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.kept


def test_tensors_in_frozen_code_are_missed_aloud(tmp_path: Path) -> None:
    with quiet_torch():
        scripted = torch.jit.script(Net().eval())
        torch.jit.save(scripted, tmp_path / "plain.pt")
        torch.jit.save(torch.jit.freeze(scripted, preserved_attrs=["kept"]), tmp_path / "frozen.pt")
    assert cli_ok("inspect", tmp_path / "plain.pt", "--json").codes == []
    (finding,) = cli_ok("inspect", tmp_path / "frozen.pt", "--json").document["findings"]
    assert (finding["code"], finding["severity"]) == ("FC113", "warning")
    assert "constants" in finding["detail"]
    assert "torch.jit.freeze" in finding["hint"]
