"""Downloads by the real client of the hub from a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt import hub
from flamingo_ckpt.errors import CkptError
from tests.hub_server import HubServer

REPO = "someone/model"
FILES = {
    "config.json": b'{"a": 1}',
    "tokenizer/vocab.txt": b"a\nb\n",
    "code.py": b"raise SystemExit",
    "weights.pt": bytes(range(256)) * 1024,
}


@pytest.fixture
def fetch(server: HubServer, tmp_path: Path) -> Any:
    def call(filename: str, repo_id: str = REPO, **options: Any) -> str:
        return hub.download(repo_id, filename, cache_dir=tmp_path / "cache", **options)

    return call


def refused(code: str, call: Any, *arguments: Any, **options: Any) -> CkptError:
    with pytest.raises(CkptError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    return caught.value


def test_a_small_file_and_a_large_one_behind_a_redirect(server: HubServer, fetch: Any) -> None:
    commit = server.push(REPO, FILES)
    for name in ("config.json", "weights.pt"):
        path = fetch(name)
        assert Path(path).read_bytes() == FILES[name]
        assert commit in path
    stores = [one for one in server.asked("GET", "/store/") if one.port == server.ports[1]]
    assert len(stores) == 1


def test_a_token_is_sent_to_the_hub_and_to_nobody_else(server: HubServer, fetch: Any) -> None:
    server.push(REPO, FILES, token="hf_abcdef")
    fetch("weights.pt", token="hf_abcdef")
    for request in server.requests:
        sent = "authorization" in {name.lower() for name in request.headers}
        is_store = request.path.startswith("/store/")
        assert sent != is_store or request.path.startswith("/api/agent"), request


def test_what_is_in_the_cache_is_not_fetched_again(server: HubServer, fetch: Any) -> None:
    server.push(REPO, FILES)
    first = fetch("weights.pt")
    server.requests.clear()
    assert fetch("weights.pt") == first
    assert not server.asked("GET", "weights")
    assert not server.asked("GET", "/store/")
    assert server.asked("HEAD", "weights")  # whether it has changed


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_asks_nobody(
    server: HubServer, fetch: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    server.push(REPO, FILES)
    path = fetch("weights.pt")
    server.requests.clear()
    options = {"local_files_only": True} if how == "argument" else {}
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("weights.pt", **options) == path
    error = refused("FC473", fetch, "config.json", **options)
    assert "`config.json` of `someone/model`" in error.message
    assert server.requests == []


def test_a_commit_stays_what_it_was(server: HubServer, fetch: Any) -> None:
    first = server.push(REPO, FILES)
    second = server.push(REPO, FILES | {"config.json": b"{}"})
    assert Path(fetch("config.json", revision=first)).read_bytes() == FILES["config.json"]
    assert Path(fetch("config.json")).read_bytes() == b"{}"
    assert second in fetch("config.json")
    server.requests.clear()
    assert first in fetch("config.json", revision=first)
    assert server.requests == []  # a commit in the cache needs nobody


def test_no_such_file(server: HubServer, fetch: Any) -> None:
    commit = server.push(REPO, FILES)
    error = refused("FC471", fetch, "nothing.pt", revision=commit)
    assert error.message == f"the repository `{REPO}` has no `nothing.pt` at `{commit}`"


def test_no_such_revision(server: HubServer, fetch: Any) -> None:
    server.push(REPO, FILES)
    error = refused("FC471", fetch, "config.json", revision="v9")
    assert error.message == f"the repository `{REPO}` has no revision `v9`"


def test_no_such_repository_shows_no_token(server: HubServer, fetch: Any) -> None:
    error = refused("FC470", fetch, "config.json", "no/body", token="hf_secret")
    assert "`no/body`" in error.message
    # an error of HTTP holds the request, and its headers the token
    assert error.__cause__ is None
    assert error.__context__ is None
    assert "hf_secret" not in f"{error} {error.hint} {vars(error)}"


def test_a_gated_repository(server: HubServer, fetch: Any) -> None:
    server.push(REPO, FILES, gated=True)
    error = refused("FC472", fetch, "weights.pt")
    assert "is gated" in error.message


@pytest.mark.parametrize(
    ("repo_id", "name"), [("a/b/c", "x"), ("some one/x", "x"), ("", "x"), (REPO, "../../x")]
)
def test_names_that_cannot_be(fetch: Any, server: HubServer, repo_id: str, name: str) -> None:
    server.push(REPO, FILES)
    with pytest.raises(CkptError) as caught:
        fetch(name, repo_id)
    assert caught.value.code in ("FC475", "FC471")


def test_a_hub_that_answers_nonsense(server: HubServer, fetch: Any) -> None:
    server.push(REPO, FILES)
    server.status = 418
    error = refused("FC474", fetch, "weights.pt")
    assert "the hub answered with status 418" in error.message


def test_a_connection_that_breaks_is_taken_up_again(server: HubServer, fetch: Any) -> None:
    server.push(REPO, FILES)
    server.drop_after = 1000
    assert Path(fetch("weights.pt")).read_bytes() == FILES["weights.pt"]
    assert len(server.asked("GET", "/store/")) == 2


def test_a_snapshot_has_what_was_asked_for_and_nothing_else(
    server: HubServer, tmp_path: Path
) -> None:
    commit = server.push(REPO, FILES)
    folder = Path(hub.snapshot(REPO, cache_dir=tmp_path))
    assert folder.name == commit
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "tokenizer/vocab.txt"}
    server.requests.clear()
    again = hub.snapshot(REPO, cache_dir=tmp_path, local_files_only=True)
    assert Path(again) == folder
    assert server.requests == []
    error = refused("FC473", hub.snapshot, "no/body", cache_dir=tmp_path, local_files_only=True)
    assert "`no/body`" in error.message


def test_nobody_there(tmp_path: Path) -> None:
    script = (
        "import time; time.sleep = lambda *_: None\n"
        "from flamingo_ckpt import hub\n"
        "from flamingo_ckpt.errors import CkptError\n"
        "import sys; assert 'huggingface_hub' not in sys.modules\n"
        "try: hub.download('a/b', 'c.pt', cache_dir=sys.argv[1])\n"
        "except CkptError as error: print(error.code, error.message)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=60,
    )
    assert done.stdout.startswith("FC474 cannot download `c.pt` of `a/b`: ConnectError"), done
