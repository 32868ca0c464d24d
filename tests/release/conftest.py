"""A clean release, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.release.releases import INDEX, SHARDS, make_release


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release without fault; nobody writes into it."""
    return make_release(tmp_path_factory.mktemp("clean") / "release")


@pytest.fixture
def release(clean: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(clean, tmp_path / "release"))


@pytest.fixture
def source(clean: Path, tmp_path: Path) -> Path:
    """What the release was made from: the same weights and config, and no papers."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in (*SHARDS, INDEX, "config.json"):
        shutil.copy(clean / name, folder)
    return folder
