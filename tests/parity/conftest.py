"""Folders of models that the tests of a module share."""

from __future__ import annotations

import gc

import pytest

from tests.parity.sides import Sides


@pytest.fixture(autouse=True)
def _frozen() -> None:
    """A check collects garbage to free its weights: a third of its time over what is there."""
    gc.freeze()


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"))
