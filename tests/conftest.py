"""Set-up that every test shares: no network but loopback, and bounded hypothesis runs."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost", ""})

# Examples are few because the whole suite has to stay within minutes; no test is about time.
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Golden reports are made by running the verbs."""
    parser.addoption("--update-goldens", action="store_true", help="write the golden reports again")


#: A minute by itself: begun last, it would keep one core busy while the others are done.
_LONGEST = "test_the_session_is_what_the_demo_prints"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, in whatever order the others are."""
    items.sort(key=lambda item: item.name != _LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _importable_oracles() -> None:
    """open_clip, timm and transformers' CLIP, whichever test comes first and imports one."""
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    import torch

    # Threads wait for each other over a tiny model, and the order of a sum depends on them.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _collected(_importable_oracles: None) -> None:
    """No collection walks over what was imported before, which is half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the expectations of this run are kept: fresh in each run, never the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache_of_the_run(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))


class NetworkClosedError(Exception):
    """A test tried to leave the machine."""


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: it sees every socket, also those of libraries, and cannot be bypassed."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple):
            return  # a Unix socket
        host = address[0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and name not in _LOOPBACK:
        raise NetworkClosedError(f"{event} to {name}: tests have no network")


sys.addaudithook(_refuse_network)
