"""Set-up of the tests that run tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.layout_support import Files


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads wait for each other over a tiny model, and the order of a sum depends on them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def hf_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Folders of `convert --to hf-flamingo`, each made when it is first asked for."""
    return Files(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers in the output of tests."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
