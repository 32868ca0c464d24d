"""Verbs that need whole files: what they download, what they do not, and what the report says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.remote import fetch, plan_fetch
from flamingo_ckpt.parity import open_pair
from flamingo_ckpt.parity.opening import describe_config
from tests import zoo
from tests.hub.support import hollow_safetensors
from tests.hub_server import Content, HubServer
from tests.support import FIXTURES, cli, cli_ok, facts_at

REPO = "someone/model"
URI = f"hf://{REPO}"


def files_of(folder: str) -> dict[str, Content]:
    root = FIXTURES / folder
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


RELEASE: dict[str, Content] = {
    **files_of("hf-bin"),
    **files_of("sharded"),
    "tokenizer/vocab.txt": b"a\n",
    "LICENSE": b"MIT",
    "runs/log.bin": b"\x80\x02.",
    "other.gguf": b"GGUF",
}


def fetched(server: HubServer) -> set[str]:
    return {one.path.rpartition("/resolve/")[2][41:] for one in server.asked("HEAD", "/resolve/")}


def test_weights_in_one_format_and_what_goes_along_and_no_code(
    server: HubServer, cache: Path
) -> None:
    server.push(REPO, {name: one for name, one in RELEASE.items() if name != "pytorch_model.bin"})
    copy = fetch(URI)
    assert fetched(server) == {
        "model.safetensors.index.json",
        *(f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)),
        *("README.md", "LICENSE", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer/vocab.txt"),
    }
    assert {name for name, _ in copy.left} == {"modeling_tiny.py", "runs/log.bin", "other.gguf"}
    assert not list(cache.rglob("*.py"))


def test_safetensors_win_over_pickles_as_they_do_here(server: HubServer, cache: Path) -> None:
    both = files_of("hf-bin") | {"model.safetensors": (FIXTURES / "tiny.safetensors").read_bytes()}
    server.push(REPO, both)
    plan = plan_fetch(URI)
    assert plan is not None
    names = {one.path for one in plan.files}
    assert "model.safetensors" in names
    assert "pytorch_model.bin" not in names


def test_a_file_is_fetched_alone(server: HubServer, cache: Path) -> None:
    server.push(REPO, RELEASE)
    copy = fetch(f"{URI}/pytorch_model.bin")
    assert fetched(server) == {"pytorch_model.bin"}
    assert Path(copy).read_bytes() == RELEASE["pytorch_model.bin"]


def test_an_index_brings_its_shards_and_no_other(server: HubServer, cache: Path) -> None:
    shard = RELEASE["model-00001-of-00003.safetensors"]
    server.push(REPO, RELEASE | {"model-00001-of-00009.safetensors": shard})
    copy = fetch(f"{URI}/model.safetensors.index.json")
    assert "model-00001-of-00009.safetensors" not in fetched(server)
    assert facts_at(copy) == facts_at(FIXTURES / "sharded")


def test_a_folder_in_a_repository(server: HubServer, cache: Path) -> None:
    server.push(REPO, {f"step-9/{name}": one for name, one in files_of("sharded").items()})
    copy = fetch(f"{URI}/step-9")
    assert facts_at(copy) == facts_at(FIXTURES / "sharded")
    assert copy.endswith("/step-9")


def test_convert_names_the_address_and_the_commit(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    server.push(REPO, files_of("sharded"))
    commit = server.push(REPO, files_of("hf-bin"), branch="refs/pr/1")
    out = tmp_path / "out"
    document = cli_ok("convert", f"{URI}@refs/pr/1", out, "--json").document
    (told,) = document["inputs"]
    assert told["uri"] == f"{URI}@refs/pr/1"
    assert (told["remote"]["revision"], told["remote"]["downloaded"]) == (commit, True)
    assert told["remote"]["num_bytes_read"] == told["remote"]["num_bytes_total"]
    assert facts_at(out) == facts_at(FIXTURES / "hf-bin")
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    server.requests.clear()
    outcome = cli_ok("verify", f"{URI}@{commit}", out, "--json")
    assert outcome.document["inputs"][0]["remote"]["num_bytes_read"] == 0
    assert not server.asked("HEAD")  # a commit in the cache needs nobody
    text = cli_ok("diff", out, f"{URI}@refs/pr/1", "--level", "bits").out
    assert f"{URI}@refs/pr/1   1.14 kB   torch-zip" in text
    assert f"downloaded at {commit[:12]}" in text


@pytest.mark.parametrize("option", ["--base-vision", "--base-language"])
def test_bases_may_be_on_the_hub(
    server: HubServer, cache: Path, tmp_path: Path, option: str
) -> None:
    server.push(REPO, files_of("sharded"))
    words = ("convert", FIXTURES / "tiny.safetensors", tmp_path / "out", option)
    assert cli(*words, "hf://no/body", "--json").codes == ["FC470"]
    outcome = cli(*words, URI, "--json")
    assert outcome.codes == ["FC006"]  # it was opened, and has no --to
    assert len(server.asked("GET", "/store/")) == 3


LARGE = {f"{at}.weight": (64, 1024) for at in range(16)}


def real(shapes: dict[str, tuple[int, ...]]) -> bytes:
    content = hollow_safetensors(shapes)
    return content.head + bytes(range(256)) * ((content.size - len(content.head)) // 256)


def test_parity_names_a_config_by_its_address(
    server: HubServer, cache: Path, tmp_path: Path
) -> None:
    made = zoo.hf_flamingo("llama")
    server.push_folder(REPO, zoo.save_folder(made.state, made.config, tmp_path / "made"))
    first, second = open_pair(fetch(URI), fetch(f"{URI}/"))
    assert describe_config(first) == f"{URI}/config.json"
    assert describe_config(second) == f"{URI}/config.json"
    assert str(cache) not in describe_config(first)


def test_a_connection_that_breaks_is_taken_up(
    server: HubServer, cache: Path, waits: list[float]
) -> None:
    content = real(LARGE)
    server.push(REPO, {"model.safetensors": content})
    server.drop_after, server.drops = 1_000_000, 2
    told: list[int] = []
    assert Path(fetch(URI, on_bytes=told.append), "model.safetensors").read_bytes() == content
    begins = [one.headers["Range"].split("-")[0] for one in server.asked("GET", "/store/")]
    assert begins == ["bytes=0", "bytes=1000000", "bytes=2000000"]
    assert sum(told) == len(content)
    assert waits == []  # it moves on


def test_a_run_that_was_ended_is_taken_up_by_the_next(
    server: HubServer, cache: Path, waits: list[float]
) -> None:
    content = real(LARGE)
    server.push(REPO, {"model.safetensors": content})

    def stop(num_bytes: int) -> None:
        if num_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(URI, on_bytes=stop)
    (partial,) = cache.rglob("*.flamingo-partial")
    have = partial.stat().st_size
    assert 0 < have < len(content)
    server.requests.clear()
    assert Path(fetch(URI), "model.safetensors").read_bytes() == content
    (again,) = server.asked("GET", "/store/")
    assert again.headers["Range"] == f"bytes={have}-{len(content) - 1}"
    assert list(cache.rglob("*partial")) == []


def test_a_server_without_ranges_can_still_be_downloaded_from(
    server: HubServer, cache: Path, waits: list[float]
) -> None:
    content = real(LARGE)
    server.push(REPO, {"model.safetensors": content})
    server.ignore_ranges = True
    server.drop_after, server.drops = 1_000_000, 1
    assert Path(fetch(f"{URI}/model.safetensors")).read_bytes() == content


@pytest.mark.parametrize("times", [1, 2])
def test_what_was_damaged_on_the_way_is_brought_once_more(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    content = real(LARGE)
    server.push(REPO, {"model.safetensors": content})
    damaged = bytearray(content)
    damaged[-1] ^= 1
    answers = [bytes(damaged)] * times + [content]
    monkeypatch.setattr(server, "find", lambda _: answers.pop(0) if len(answers) > 1 else content)
    if times == 1:
        assert Path(fetch(f"{URI}/model.safetensors")).read_bytes() == content
        return
    with pytest.raises(CkptError) as caught:
        fetch(f"{URI}/model.safetensors")
    assert caught.value.code == "FC479"
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_a_partial_file_of_something_else_is_not_believed(server: HubServer, cache: Path) -> None:
    content = real(LARGE)
    server.push(REPO, {"model.safetensors": content})
    digest = hashlib.sha256(content).hexdigest()
    for stale in (b"\1" * 70_000, b"\1" * (len(content) + 5)):
        blobs = cache / f"models--{REPO.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / digest).unlink(missing_ok=True)
        (blobs / f"{digest}.flamingo-partial").write_bytes(stale)
        assert Path(fetch(f"{URI}/model.safetensors")).read_bytes() == content


@pytest.mark.parametrize("uri", [URI, f"{URI}@main", f"{URI}/model.safetensors.index.json"])
def test_offline_the_cache_is_opened(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    commit = server.push(REPO, files_of("sharded"))
    fetch(uri)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for verb in (("inspect", uri), ("diff", FIXTURES / "sharded", uri)):
        told = cli_ok(*verb, "--json").document["inputs"][-1]
        assert (told["uri"], told["remote"]["revision"]) == (uri, commit)
    assert cli("inspect", "hf://no/body", "--json").codes == ["FC473"]
    assert cli("inspect", f"{URI}/absent.pt", "--json").codes == ["FC473"]
    assert server.requests == []


def test_what_a_verb_writes_to_is_here(server: HubServer) -> None:
    outcome = cli("convert", FIXTURES / "tiny.safetensors", "hf://a/b", "--json")
    assert outcome.codes == ["FC006"]
    assert "push" in outcome.document["findings"][0]["hint"]


def test_a_hostile_index_downloads_nothing(server: HubServer, cache: Path, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "../../../private/secret.safetensors"}}).encode()
    server.push(REPO, {"model.safetensors.index.json": index})
    for verb in (
        ("convert", URI, tmp_path / "out"),
        ("pull", f"{URI}/model.safetensors.index.json", tmp_path / "out"),
    ):
        assert cli(*verb, "--json").codes == ["FC503"]
    assert not server.asked("HEAD")
    assert not any("secret" in one.path for one in server.requests)


@pytest.mark.parametrize("path", ["", "/model.safetensors.index.json"])
def test_a_shard_that_is_not_there_is_noticed_before_the_others_are_downloaded(
    server: HubServer, cache: Path, tmp_path: Path, path: str
) -> None:
    files = files_of("sharded")
    del files["model-00003-of-00003.safetensors"]
    server.push(REPO, files)
    verbs = [("convert", URI + path)] + ([("pull", URI + path)] if path else [])
    for verb in verbs:
        outcome = cli(*verb, tmp_path / "out", "--json")
        assert outcome.codes == ["FC107"]
    assert not server.asked("GET", "/store/")


def test_both_a_single_file_and_an_index(server: HubServer, cache: Path) -> None:
    server.push(REPO, RELEASE | {"model.safetensors": RELEASE["model-00001-of-00003.safetensors"]})
    with pytest.raises(CkptError) as caught:
        plan_fetch(URI)
    assert caught.value.code == "FC207"


def test_progress_is_told_in_bytes(server: HubServer, cache: Path) -> None:
    server.push(REPO, files_of("sharded"))
    told: list[int] = []
    plan: Any = plan_fetch(URI)
    fetch(URI, plan, told.append)
    assert sum(told) == plan.num_bytes


def test_a_module_is_loaded_from_an_address(server: HubServer, cache: Path) -> None:
    import torch

    from flamingo_ckpt import load_checkpoint

    module = torch.nn.Linear(8, 4)
    content = hollow_safetensors({"bias": (4,), "weight": (4, 8)})
    server.push(REPO, {"model.safetensors": content[:]})
    result = load_checkpoint(module, URI)
    assert not module.weight.any()
    assert result.report.uri == URI
