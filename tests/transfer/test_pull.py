"""pull: what is taken, that it is what the hub lists, and that nothing is half there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.transfer import pull
from tests.hub_server import Content, HubServer
from tests.support import FIXTURES, Outcome, cli, cli_ok

REPO = "someone/model"
URI = f"hf://{REPO}"
WEIGHTS = (FIXTURES / "tiny.safetensors").read_bytes()
RELEASE: dict[str, Content] = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"MIT",
    ".gitattributes": b"*.bin lfs",
    "tokenizer/tokenizer.json": b"{}",
    "assets/cat.png": b"PNG",
}
UNWANTED: dict[str, tuple[Content, str]] = {
    "pytorch_model.bin": (b"PK", "a pickle, and there are safetensors"),
    "pytorch_model.bin.index.json": (b"{}", "the index of pickles, and there are safetensors"),
    "optimizer.pt": (b"PK", "a pickle, and there are safetensors"),
    "modeling.py": (b"import os", "code"),
    ".hidden/x.json": (b"{}", "hidden"),
    "model.onnx": (b"x", "not weights, a config, a tokenizer, a processor or a card"),
}


def push_all(server: HubServer) -> str:
    return server.push(REPO, RELEASE | {name: one for name, (one, _) in UNWANTED.items()})


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(outcome: Outcome, code: str, folder: Path) -> dict[str, Any]:
    """Exit 2 with one finding, and nothing in place or beside it."""
    assert outcome.code == 2
    assert outcome.codes == [code]
    assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir() if "staging" in path.name] == []
    finding: dict[str, Any] = outcome.document["findings"][0]
    return finding


def test_a_release_and_nothing_else(server: HubServer, cache: Path, tmp_path: Path) -> None:
    commit = push_all(server)
    out = tmp_path / "out"
    document = cli_ok("pull", URI, out, "--json").document
    found = tree(out)
    record = json.loads(found.pop(pull.RECORD_NAME))
    assert found == RELEASE
    assert document["commit"] == record["commit"] == commit
    assert record["repo_id"] == REPO
    assert record["uri"] == f"{URI}@{commit}"
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert {one["path"]: one["sha256"] for one in record["files"]} == digests
    assert {one["path"]: one["sha256"] for one in document["files"]} == digests
    assert {one["path"]: one["reason"] for one in document["left"]} == {
        name: why for name, (_, why) in UNWANTED.items()
    }
    assert document["summary"]["num_bytes"] == sum(map(len, found.values()))
    asked = {one.path.rpartition("/")[2] for one in server.asked("HEAD")}
    assert not asked & {name.rpartition("/")[2] for name in UNWANTED}


def test_modes_follow_the_umask(server: HubServer, cache: Path, tmp_path: Path) -> None:
    server.push(REPO, RELEASE)
    before = os.umask(0o027)
    try:
        cli_ok("pull", URI, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*.json")}
    assert modes == {0o640}


def test_a_dry_run_writes_and_downloads_nothing(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    push_all(server)
    outcome = cli_ok("pull", URI, tmp_path / "out", "--dry-run")
    assert "would pull 7 files" in outcome.out
    assert "optimizer.pt" in outcome.out
    assert list(tmp_path.iterdir()) == []
    assert not server.asked("HEAD")


def test_pickles_where_there_is_nothing_else(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    server.push(REPO, {"pytorch_model.bin": b"PK", "code.py": b"", "config.json": b"{}"})
    cli_ok("pull", URI, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"pytorch_model.bin", "config.json", pull.RECORD_NAME}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--include", "*.py"), {"modeling.py"}),
        (("--include", "tokenizer/*", "--include", "config.json"), {"tokenizer/tokenizer.json"}),
        (("--exclude", "*.json", "--exclude", "assets/*", "--exclude", ".*"), {"LICENSE"}),
    ],
)
def test_what_the_user_chooses(
    server: HubServer, cache: Path, tmp_path: Path, options: tuple[str, ...], wanted: set[str]
) -> None:
    push_all(server)
    cli_ok("pull", URI, tmp_path / "out", *options)
    found = set(tree(tmp_path / "out")) - {pull.RECORD_NAME}
    extra = {
        "--include": {"config.json"} if "config.json" in options else set(),
        "--exclude": {"model.safetensors", "README.md"},
    }[options[0]]
    assert found == wanted | extra


def test_everything_but_the_record_of_another_pull(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    commit = server.push(REPO, RELEASE | {pull.RECORD_NAME: b"{}", "x.py": b"1"})
    cli_ok("pull", URI, tmp_path / "out", "--include", "*")
    found = tree(tmp_path / "out")
    assert json.loads(found.pop(pull.RECORD_NAME))["commit"] == commit
    assert found == RELEASE | {"x.py": b"1"}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("sub", {"config.json", "deep/x.json"}),
        ("sub/config.json", {"config.json"}),
        ("sub/code.py", {"code.py"}),  # it was named
    ],
)
def test_a_part_of_a_repository(
    server: HubServer, cache: Path, tmp_path: Path, path: str, wanted: set[str]
) -> None:
    files = {"config.json": b"1", "sub/config.json": b"2", "sub/deep/x.json": b"3"}
    server.push(REPO, files | {"sub/code.py": b""})
    cli_ok("pull", f"{URI}/{path}", tmp_path / "out")
    found = tree(tmp_path / "out")
    assert set(found) - {pull.RECORD_NAME} == wanted
    assert found.get("config.json", b"2") == b"2"


def test_a_revision_is_pinned_while_it_moves(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    first = server.push(REPO, RELEASE)
    plan = pull.plan_pull(URI)
    server.push(REPO, RELEASE | {"config.json": b"later"})
    pull.run_pull(plan, str(tmp_path / "out"), overwrite=False, on_bytes=lambda _: None)
    assert (tmp_path / "out" / "config.json").read_bytes() == RELEASE["config.json"]
    assert json.loads((tmp_path / "out" / pull.RECORD_NAME).read_bytes())["commit"] == first


def test_what_exists_is_replaced_on_request_and_what_is_the_users_stays(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    server.push(REPO, RELEASE | {"old.json": b"{}"})
    cli_ok("pull", URI, out)
    (out / "notes.md").write_text("mine")
    (out / "pytorch_model.bin").write_bytes(b"stale")
    before = tree(out)
    server.push(REPO, RELEASE | {"config.json": b"new"})
    server.requests.clear()
    outcome = cli("pull", URI, out, "--json")
    assert outcome.codes == ["FC003"]
    assert server.requests == []
    assert tree(out) == before
    cli_ok("pull", URI, out, "--overwrite")
    after = tree(out)
    after.pop(pull.RECORD_NAME)
    assert after == RELEASE | {"config.json": b"new", "notes.md": b"mine"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_cache_is_filled_again(
    server: HubServer, cache: Path, tmp_path: Path, name: str
) -> None:
    server.push(REPO, RELEASE)
    cli_ok("pull", URI, tmp_path / "first")
    (cached,) = cache.rglob(f"snapshots/*/{name}")
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.resolve().write_bytes(content)
    cli_ok("pull", URI, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == RELEASE[name]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("fault", ["digest", "size"])
def test_what_is_not_as_listed_is_refused(
    server: HubServer,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: str,
) -> None:
    """The list says one thing, and what is served fits itself."""
    server.push(REPO, RELEASE)
    real = pull.list_all

    def lying(*arguments: Any) -> Any:
        from dataclasses import replace

        folder, listing, alone = real(*arguments)
        files = tuple(
            replace(
                one,
                num_bytes=one.num_bytes + (fault == "size"),
                sha256=one.sha256 and "0" * 64,
                blob_id=one.blob_id and "0" * 40,
            )
            if one.path == name
            else one
            for one in listing.files
        )
        return folder, replace(listing, files=files), alone

    monkeypatch.setattr(pull, "list_all", lying)
    finding = refused(cli("pull", URI, tmp_path / "out", "--json"), "FC479", tmp_path / "out")
    assert name in finding["detail"]
    assert "nothing was put in place" in finding["hint"]


def test_a_pull_that_breaks_off_goes_on_where_it_was(
    server: HubServer, cache: Path, tmp_path: Path, waits: list[float]
) -> None:
    large = bytes(range(256)) * 16384
    server.push(REPO, {"a.safetensors": WEIGHTS, "model.safetensors": large})
    plan = pull.plan_pull(URI)
    server.drop_after, server.drops = 3_000_000, 1

    def stop(num_bytes: int) -> None:
        if server.drops == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull.run_pull(plan, str(tmp_path / "out"), overwrite=False, on_bytes=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["hub-cache"]
    server.requests.clear()
    document = cli_ok("pull", URI, tmp_path / "out", "--json").document
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == large
    (resumed,) = server.asked("GET", "/store/")
    begin = int(resumed.headers["Range"].removeprefix("bytes=").split("-")[0])
    assert 0 < begin < len(large)
    assert document["summary"]["num_bytes_moved"] == len(large) - begin


def test_a_busy_hub_puts_nothing_in_place(
    server: HubServer, cache: Path, tmp_path: Path, waits: list[float]
) -> None:
    server.push(REPO, RELEASE)
    server.status = 503
    refused(cli("pull", URI, tmp_path / "out", "--json"), "FC474", tmp_path / "out")


@pytest.mark.parametrize(
    ("uri", "options", "code"),
    [
        ("hf://no/body", (), "FC470"),
        (f"{URI}@v9", (), "FC471"),
        (f"{URI}/absent", (), "FC471"),
        ("someone/model", (), "FC475"),
        (URI, ("--include", "nothing*"), "FC001"),
        (f"{URI}/../x", (), "FC475"),
    ],
)
def test_what_cannot_be_pulled(
    server: HubServer, cache: Path, tmp_path: Path, uri: str, options: tuple[str, ...], code: str
) -> None:
    server.push(REPO, RELEASE)
    refused(cli("pull", uri, tmp_path / "out", *options, "--json"), code, tmp_path / "out")


def test_destinations_that_cannot_be(server: HubServer, cache: Path, tmp_path: Path) -> None:
    server.push(REPO, RELEASE)
    (tmp_path / "file").write_text("x")
    for dst, code in ((tmp_path / "file", "FC003"), (tmp_path / "no" / "out", "FC004")):
        assert cli("pull", URI, dst, "--json").codes == [code]
    assert cli("pull", URI, "hf://a/b", "--json").codes == ["FC006"]
    assert server.requests == []


def test_offline_there_is_no_pull(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(cli("pull", URI, tmp_path / "out", "--json"), "FC473", tmp_path / "out")
    assert server.requests == []


def test_names_are_hostile_text(server: HubServer, cache: Path, tmp_path: Path) -> None:
    server.push(REPO, RELEASE | {"a\u202etxt.json": b"{}"})
    outcome = cli_ok("pull", URI, tmp_path / "out")
    assert "\u202e" not in outcome.out
    assert "\\u202e" in outcome.out


def test_the_token_stays_home(server: HubServer, cache: Path, tmp_path: Path, token: str) -> None:
    server.push(REPO, RELEASE, token=token)
    outcome = cli_ok("pull", URI, tmp_path / "out", "--json")
    stored = [one for one in server.requests if one.port == server.ports[1]]
    assert stored
    assert not any(token in str(one.headers) for one in stored)
    written = outcome.out + outcome.err + (tmp_path / "out" / pull.RECORD_NAME).read_text()
    assert token not in written


def test_a_plan_is_an_error_of_ours_in_python(server: HubServer) -> None:
    with pytest.raises(CkptError):
        pull.plan_pull("hf://no/body")
