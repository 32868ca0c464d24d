"""Downloads through a mirror that others wrote: olah, in front of the hub of this machine.

It passes the hub's calls on, keeps what it was given, and answers ranges itself. `make test` sets
it up (`tests/fetch_mirror.py`).
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fetch_mirror import COMMAND, ENVIRONMENT, is_ready
from tests.hub.support import hollow_torch
from tests.hub_server import HubServer
from tests.support import FIXTURES, cli_ok, facts_at

LARGE = {f"layers.{at}.weight": (512, 1024) for at in range(16)}


@pytest.fixture
def mirror(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of the mirror, which is HF_ENDPOINT."""
    if not is_ready():
        pytest.fail("the mirror is not there; run `make test`, which sets it up")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hub, store = (f"127.0.0.1:{one}" for one in server.ports)
    here = f"127.0.0.1:{port}"
    command = [*COMMAND, "--host", "127.0.0.1", "--port", str(port), "--hf-scheme", "http"]
    command += ["--hf-netloc", hub, "--hf-lfs-netloc", store, "--mirror-netloc", here]
    command += ["--mirror-lfs-netloc", here, "--repos-path", str(tmp_path / "repos")]
    command += ["--log-path", str(tmp_path / "logs"), "--metadata-cache-ttl", "600"]
    with (tmp_path / "mirror.log").open("wb") as log:
        running = subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(port, running)
        monkeypatch.setenv("HF_ENDPOINT", f"http://{here}")
        yield f"http://{here}"
    finally:
        running.terminate()
        running.wait(timeout=30)


def _wait_for(port: int, running: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert running.poll() is None, "the mirror ended"
            time.sleep(0.1)
    pytest.fail("the mirror does not answer")


def test_a_mirror_that_others_wrote(
    server: HubServer, mirror: str, cache: Path, tmp_path: Path
) -> None:
    """Headers by ranges, a fetch and a pull."""
    commit = server.push_folder("a/sharded", FIXTURES / "sharded")
    server.push("a/large", {"checkpoint.pt": hollow_torch(LARGE)})
    document = cli_ok("inspect", "hf://a/large/checkpoint.pt", "--json").document
    told = document["inputs"][0]["remote"]
    assert document["summary"]["num_tensors"] == 16
    assert told["num_bytes_total"] > 32 << 20
    assert told["num_bytes_read"] < 200_000
    fetched = cli_ok("convert", "hf://a/sharded", tmp_path / "out", "--json").document
    assert fetched["inputs"][0]["remote"]["revision"] == commit
    assert facts_at(tmp_path / "out") == facts_at(FIXTURES / "sharded")
    cli_ok("pull", "hf://a/sharded", tmp_path / "pulled")
    record = json.loads((tmp_path / "pulled" / ".flamingo-pull.json").read_bytes())
    assert record["commit"] == commit
    for one in record["files"]:
        here = FIXTURES / "sharded" / one["path"]
        assert (tmp_path / "pulled" / one["path"]).read_bytes() == here.read_bytes()
