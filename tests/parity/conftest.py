"""Folders of models that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.sides import Sides, without_garbage


@pytest.fixture(scope="package", autouse=True)
def _frozen() -> Iterator[None]:
    with without_garbage():
        yield


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"))
