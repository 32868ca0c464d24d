from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from flamingo_ckpt.models import torchvision_compat
from flamingo_ckpt.models.torchvision_compat import import_torchvision
from tests.support import python

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# Fails as the real one does, by describing an operator that torch does not know.
LIKE_THE_REAL_ONE = """
import torchvision.extension
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets

@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold):
    return dets
"""

FAILS_ONCE = """
import torchvision.extension
import torch

if not torch.library.made:
    raise RuntimeError("operator torchvision::nms does not exist")
"""


class FakeLibrary:
    """Stands in for `torch.library.Library` and remembers what was defined."""

    made: ClassVar[list[FakeLibrary]] = []

    def __init__(self, namespace: str, kind: str) -> None:
        self.opened, self.schemas = (namespace, kind), []
        FakeLibrary.made.append(self)

    def define(self, schema: str) -> None:
        self.schemas.append(schema)


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeLibrary]]:
    """A fake torch, no torchvision, and nothing declared yet; all put back afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_torchvision(name)}
    torch = ModuleType("torch")
    FakeLibrary.made = []
    torch.library = SimpleNamespace(Library=FakeLibrary, made=FakeLibrary.made)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torchvision_compat, "_libraries", [])
    yield FakeLibrary.made
    for name in [name for name in sys.modules if is_torchvision(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def is_torchvision(name: str) -> bool:
    return name.split(".")[0] == "torchvision"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Put a torchvision of one's own before any other."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "extension.py").write_text("")
    monkeypatch.syspath_prepend(str(folder))


def test_open_clip_imports_after_it() -> None:
    done = python(
        "from flamingo_ckpt.models.torchvision_compat import import_torchvision\n"
        "import_torchvision()\n"
        "import open_clip, timm\n"
        "from transformers import CLIPImageProcessor, CLIPModel\n"
        "print(open_clip.__name__, CLIPModel.__name__)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["open_clip", "CLIPModel"]


def test_transforms_work_and_box_operators_say_no(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(LIKE_THE_REAL_ONE)
    (tmp_path / "torchvision" / "extension.py").write_text("")
    done = python(
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from flamingo_ckpt.models.torchvision_compat import import_torchvision\n"
        "first, second = import_torchvision(), import_torchvision()\n"
        "assert first is second is sys.modules['torchvision']\n"
        "assert first.__file__.startswith(sys.argv[1])\n"
        "import gc, torch\n"
        "gc.collect()\n"
        "for name in ('nms', 'qnms'):\n"
        "    print(getattr(torch.ops.torchvision, name).default._schema)\n"
        "try:\n"
        "    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except NotImplementedError:\n"
        "    print('not implemented')\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"torchvision::nms{SCHEMA}",
        f"torchvision::qnms{SCHEMA}",
        "not implemented",
    ]


def test_declares_both_operators_and_imports_again(
    fake_torch: list[FakeLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, FAILS_ONCE)
    module = import_torchvision()
    assert module is sys.modules["torchvision"]
    assert "torchvision.extension" in sys.modules
    (library,) = fake_torch
    assert library.opened == ("torchvision", "FRAGMENT")
    assert library.schemas == [f"nms{SCHEMA}", f"qnms{SCHEMA}"]
    assert torchvision_compat._libraries == [library]


def test_the_half_imported_modules_are_dropped(
    fake_torch: list[FakeLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, FAILS_ONCE)
    stale = ModuleType("torchvision.ops")
    neighbour = ModuleType("torchvision_extras")
    monkeypatch.setitem(sys.modules, "torchvision.ops", stale)
    monkeypatch.setitem(sys.modules, "torchvision_extras", neighbour)
    import_torchvision()
    assert sys.modules.get("torchvision.ops") is not stale
    assert sys.modules["torchvision_extras"] is neighbour


def test_twice_is_as_once(
    fake_torch: list[FakeLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, FAILS_ONCE)
    assert import_torchvision() is import_torchvision()
    # Even where somebody makes it fail anew, torch is not told a second time.
    for name in [name for name in sys.modules if is_torchvision(name)]:
        del sys.modules[name]
    import_torchvision()
    assert len(fake_torch) == 1


def test_a_torchvision_that_imports_is_left_alone(
    fake_torch: list[FakeLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "answer = 42\n")
    assert import_torchvision().answer == 42
    assert fake_torch == []


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("raise RuntimeError('CUDA driver too old')", RuntimeError, "driver"),
        (
            "raise RuntimeError('operator torchvision::roi_align does not exist')",
            RuntimeError,
            "roi",
        ),
        ("raise ValueError('operator torchvision::nms does not exist')", ValueError, "nms"),
        ("import module_that_is_not_there", ModuleNotFoundError, "module_that_is_not_there"),
    ],
)
def test_other_failures_are_raised_as_they_are(
    fake_torch: list[FakeLibrary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    error: type[Exception],
    text: str,
) -> None:
    install(tmp_path, monkeypatch, source)
    with pytest.raises(error, match=text):
        import_torchvision()
    assert fake_torch == []


def test_a_repair_that_does_not_help_raises_the_second_error(
    fake_torch: list[FakeLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(RuntimeError, match="nms"):
        import_torchvision()
    assert len(fake_torch) == 1


def test_absent_torchvision_is_an_import_error(
    fake_torch: list[FakeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError):
        import_torchvision()
    assert fake_torch == []
