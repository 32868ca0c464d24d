"""Headers of files on the hub, read by ranges: how little is moved, and who is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.hub.names import parse_uri
from flamingo_ckpt.hub.remote import open_remote
from flamingo_ckpt.models.config import read_config
from flamingo_ckpt.models.presets import PRESETS
from flamingo_ckpt.prepare import own_config
from flamingo_ckpt.tensors import Manifest
from tests.hub.support import LARGE, hollow_safetensors, hollow_torch
from tests.hub_server import Content, Hollow, HubServer
from tests.support import FIXTURES, cli, cli_ok

REPO = "someone/model"
URI = f"hf://{REPO}"
LARGE_HALVES = [dict(list(LARGE.items())[:167]), dict(list(LARGE.items())[167:])]
CONFIG = json.dumps(PRESETS["vit-b-32"].config).encode()
SMALL = {"a.weight": (4, 8), "b.weight": (8,)}


def fixture_files(folder: str) -> dict[str, Content]:
    root = FIXTURES / folder
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def facts(manifest: Manifest) -> Any:
    return [(one.name, one.dtype.name, one.shape, one.file) for one in manifest.tensors]


def cost(manifest: Manifest) -> dict[str, Any]:
    assert manifest.remote is not None
    return dict(manifest.remote())


def refused(server: HubServer, code: str, uri: str = URI) -> CkptError:
    with pytest.raises(CkptError) as caught:
        open_checkpoint(uri)
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", ["sharded", "hf-bin"])
def test_a_folder_is_what_it_is_here(server: HubServer, name: str) -> None:
    commit = server.push(REPO, fixture_files(name))
    there, here = open_checkpoint(URI), open_checkpoint(str(FIXTURES / name))
    assert facts(there) == facts(here)
    assert there.metadata == here.metadata
    assert there.tied_groups() == here.tied_groups()
    assert (there.uri, there.folder) == (URI, None)
    assert cost(there)["repo_id"] == REPO
    assert cost(there)["revision"] == commit


@pytest.mark.parametrize(
    "name",
    [
        "tiny.safetensors",
        "torch-wrapped.pt",
        "torch-deflated.pt",
        "torch-legacy.pt",
        "torch-big-endian.pt",
        "torchscript.pt",
        "arrays.npz",
        "arrays-compressed.npz",
        "big-endian.npy",
    ],
)
def test_a_file_is_what_it_is_here(server: HubServer, name: str) -> None:
    server.push(REPO, {f"sub/{name}": (FIXTURES / name).read_bytes()})
    there, here = open_checkpoint(f"{URI}/sub/{name}"), open_checkpoint(str(FIXTURES / name))
    assert facts(there) == facts(here)
    assert there.wrapper == here.wrapper


def shards(stem: str, suffix: str, make: Any) -> dict[str, Content]:
    """Two halves and their index."""
    names = [f"{stem}-0000{at}-of-00002{suffix}" for at in (1, 2)]
    files = {name: make(half) for name, half in zip(names, LARGE_HALVES, strict=True)}
    weight_map = {key: name for name, half in zip(names, LARGE_HALVES, strict=True) for key in half}
    index = {"metadata": {"total_size": 334 * 1024 * 3072 * 4}, "weight_map": weight_map}
    return files | {f"{stem}{suffix}.index.json": json.dumps(index).encode()}


LARGE_FILES: dict[str, dict[str, Content]] = {
    "safetensors": {"model.safetensors": hollow_safetensors(LARGE)},
    "torch": {"checkpoint.pt": hollow_torch(LARGE)},
    "safetensors-shards": shards("model", ".safetensors", hollow_safetensors),
    "torch-shards": shards("pytorch_model", ".bin", hollow_torch),
}


@pytest.mark.parametrize("kind", sorted(LARGE_FILES))
def test_four_gigabytes_cost_less_than_two_hundred_kilobytes(server: HubServer, kind: str) -> None:
    files = LARGE_FILES[kind]
    server.push(REPO, files)
    manifest = open_checkpoint(URI)
    assert {one.name: one.shape for one in manifest.tensors} == dict(LARGE)
    told = cost(manifest)
    assert told["num_bytes_read"] < 200_000
    assert told["num_bytes_total"] == sum(len(one) for one in files.values())
    assert told["num_bytes_total"] > 4_000_000_000
    # what is told is what was asked for
    assert told["num_requests"] == len(
        [one for one in server.requests if not one.path.startswith("/api/agent")]
    )
    assert not server.asked("HEAD")


def test_a_remote_diff_of_four_gigabytes(server: HubServer, tmp_path: Path) -> None:
    server.push(REPO, LARGE_FILES["torch"])
    commit = server.push(REPO, LARGE_FILES["torch"] | {"config.json": b"{}"}, branch="other")
    report = tmp_path / "report.json"
    outcome = cli_ok("diff", f"{URI}/checkpoint.pt", f"{URI}@other", "--output", report)
    assert "same: 334 same" in outcome.out
    inputs = json.loads(report.read_text())["inputs"]
    assert sum(one["remote"]["num_bytes_read"] for one in inputs) < 2 * 200_000
    assert inputs[1]["remote"]["revision"] == commit
    told = f"read {inputs[1]['remote']['num_bytes_read'] / 1000:.3g} kB of 4.2 GB at {commit[:12]}"
    assert told in outcome.out


def test_content_is_not_read_to_guess_what_was_renamed(server: HubServer, tmp_path: Path) -> None:
    """It is the better evidence, and would be gigabytes."""
    first = next(iter(LARGE))
    renamed = {name.replace(first, f"{first}_"): shape for name, shape in LARGE.items()}
    server.push(REPO, {"model.safetensors": hollow_safetensors(LARGE)})
    server.push(REPO, {"model.safetensors": hollow_safetensors(renamed)}, branch="other")
    document = cli("diff", URI, f"{URI}@other", "--json").document
    assert document["summary"]["same"] == 333
    assert all(one["remote"]["num_bytes_read"] < 200_000 for one in document["inputs"])


def test_a_header_that_claims_a_hundred_megabytes_is_not_fetched(server: HubServer) -> None:
    content = Hollow(4 << 30, (99_000_000).to_bytes(8, "little") + b"{")
    server.push(REPO, {"model.safetensors": content})
    assert "more than 32 MiB" in refused(server, "FC002").message
    assert len(server.asked("GET", "/store/")) == 1


def test_local_headers_of_a_zip_are_not_read_one_by_one(server: HubServer) -> None:
    server.push(REPO, {"checkpoint.pt": hollow_torch(LARGE)})
    document = cli_ok("inspect", f"{URI}/checkpoint.pt", "--json").document
    assert document["details"]["record_headers"] == "not read"
    assert document["inputs"][0]["remote"]["num_requests"] < 12


def test_a_config_is_read_beside_the_weights(server: HubServer) -> None:
    """Without it a folder would pass for a partial one, and what is missing for absent."""
    weights = {"model.safetensors": hollow_safetensors(SMALL)}
    server.push(REPO, weights | {"config.json": CONFIG})
    document = cli_ok("inspect", URI, "--json").document
    assert document["details"]["settings"]["vision.hidden_act"]
    server.push(REPO, weights)
    assert "settings" not in cli_ok("inspect", URI, "--json").document["details"]


def test_whether_a_folder_is_partial_is_told_by_its_config(server: HubServer) -> None:
    from flamingo_ckpt.diff.sides import checkpoint_side

    weights = {"model.safetensors": hollow_safetensors({"perceiver.latents": (64, 32)})}
    for config, is_partial in ((b"{}", False), (b'{"flamingo_ckpt": {"partial": true}}', True)):
        server.push(REPO, weights | {"config.json": config})
        side = checkpoint_side(open_checkpoint(URI), {}, "hf-flamingo")
        assert side.is_partial() is is_partial


def test_a_config_that_does_not_arrive_is_not_taken_for_none(
    server: HubServer, waits: list[float]
) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL), "config.json": CONFIG})
    manifest = open_checkpoint(URI)
    server.status = 503
    with pytest.raises(CkptError) as caught:
        own_config(manifest)
    assert caught.value.code == "FC474"


def test_a_config_on_the_hub_is_a_model(server: HubServer) -> None:
    commit = server.push(REPO, {"config.json": CONFIG, "sub/x.json": CONFIG})
    for uri, path in ((URI, "config.json"), (f"{URI}/sub/x.json", "sub/x.json")):
        config = read_config(f"model:{uri}")
        assert (config.kind, config.where) == ("clip", f"{URI}@{commit}/{path}")
    assert cli("inspect", f"model:{URI}/sub", "--json").codes == ["FC404"]


SOME = bytes(range(251)) * 800  # no power of two: a piece in the wrong place shows
SPAN = st.tuples(st.integers(0, len(SOME)), st.integers(0, 70_000))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SPAN, max_size=8))
def test_any_range_in_any_order_is_what_lies_there(
    server: HubServer, spans: list[tuple[int, int]]
) -> None:
    if REPO not in server.repositories:
        server.push(REPO, {"x.bin": SOME})
    folder, name = open_remote(parse_uri(f"{URI}/x.bin"), URI)
    source = folder.open(str(name))
    for offset, size in spans:
        wanted = SOME[offset : offset + size]
        assert source.read(offset, len(wanted)) == wanted
    told = folder.cost()["num_bytes_read"]
    assert told <= len(SOME) + 1000  # nothing is brought twice


# -- a server that misbehaves


def test_a_server_without_ranges_is_refused_before_it_sends_the_file(server: HubServer) -> None:
    server.push(REPO, LARGE_FILES["safetensors"])
    server.ignore_ranges = True
    error = refused(server, "FC476")
    assert "the whole file instead of a range" in error.message
    assert "pull" in str(error.hint)
    assert len(server.asked("GET", "/store/")) == 1


def test_a_page_instead_of_the_file(server: HubServer) -> None:
    """As a captive portal answers everything."""
    content = hollow_safetensors(LARGE)
    server.push(REPO, {"model.safetensors": content})
    server.ignore_ranges = True
    server.lie = {"Content-Length": "512"}
    assert f"512 bytes, and {content.size} are listed" in refused(server, "FC476").message


def test_a_small_file_may_come_whole(server: HubServer) -> None:
    server.push(REPO, {"model.safetensors": (FIXTURES / "tiny.safetensors").read_bytes()})
    server.ignore_ranges = True
    assert open_checkpoint(URI).tensors


def test_a_connection_that_breaks_is_resumed(server: HubServer, waits: list[float]) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(LARGE)})
    server.drop_after, server.drops = 5000, 3
    assert len(open_checkpoint(URI).tensors) == 334
    begins = [one.headers["Range"].split("-")[0] for one in server.asked("GET", "/store/")]
    assert begins[:4] == ["bytes=0", "bytes=5000", "bytes=10000", "bytes=15000"]
    assert len(waits) == 3


def test_a_connection_that_always_breaks_is_told(server: HubServer, waits: list[float]) -> None:
    server.push(REPO, LARGE_FILES["safetensors"])
    server.drop_after, server.drops = 10, 1000
    error = refused(server, "FC474")
    assert "5 times" in error.message
    assert len(waits) == 4


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for(server: HubServer, waits: list[float], status: int) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL)})
    server.status, server.num_status, server.retry_after = status, 2, "7"
    assert len(open_checkpoint(URI).tensors) == 2
    assert waits == [7.0, 7.0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy_is_told(server: HubServer, waits: list[float], status: int) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL)})
    server.status = status
    assert f"status {status}" in refused(server, "FC474").message
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_a_hub_that_asks_for_too_much_patience(server: HubServer, waits: list[float]) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL)})
    server.status, server.retry_after = 429, "3600"
    assert "asks to wait 3600 seconds" in refused(server, "FC474").message
    assert waits == []


def test_an_etag_that_changes(server: HubServer) -> None:
    server.push(REPO, LARGE_FILES["torch"])
    server.changes_etag = True
    assert "ETag" in refused(server, "FC477").message


def test_a_digest_that_is_not_the_listed_one(server: HubServer) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL)})
    server.lie = {"X-Linked-Etag": f'"{"0" * 64}"'}
    assert "digest" in refused(server, "FC477").message


@pytest.mark.parametrize(
    ("header", "value", "words"),
    [
        ("Content-Range", "bytes 0-5/6", "instead of 0-"),
        ("Content-Range", "bytes 100-32867/{size}", "instead of 0-"),
        ("Content-Range", "nonsense", "instead of 0-"),
        ("Content-Length", "1000000", "1000000 bytes instead of"),
        ("Content-Length", "5", "5 bytes instead of"),
        ("X-Linked-Size", "17", "it claims 17 bytes"),
        ("X-Linked-Size", "\x1b[31m", "it claims \\x1b[31m bytes"),
        ("X-Repo-Commit", "f" * 40, "of commit"),
        ("Location", "ftp://127.0.0.1/x", "redirected"),
    ],
)
def test_lengths_and_places_that_are_lies(
    server: HubServer, waits: list[float], header: str, value: str, words: str
) -> None:
    content = hollow_safetensors(LARGE)
    server.push(REPO, {"model.safetensors": content})
    server.lie = {header: value.format(size=len(content))}
    assert words in refused(server, "FC476").message


def test_a_redirect_in_a_circle(server: HubServer) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL)})
    commit = server.repositories[REPO].refs["main"]
    server.lie = {"Location": f"{server.endpoint}/{REPO}/resolve/{commit}/model.safetensors"}
    assert "redirected more than" in refused(server, "FC476").message


def test_a_store_address_that_runs_out_is_asked_for_again(
    server: HubServer, waits: list[float]
) -> None:
    server.push(REPO, LARGE_FILES["torch"])
    manifest = open_checkpoint(f"{URI}/checkpoint.pt")
    storage = manifest.tensors[0].storage
    assert storage is not None
    server.status, server.num_status = 403, 1
    # its local header is zeros, which is noticed, so the bytes did arrive
    with pytest.raises(CkptError) as caught:
        storage.locate()
    assert caught.value.code == "FC106"
    assert len(server.asked("GET", "/resolve/")) == 2


def test_a_list_of_files_in_pages(server: HubServer) -> None:
    server.push(REPO, fixture_files("sharded") | {f"{at}.txt": b"" for at in range(20)})
    server.page = 5
    assert facts(open_checkpoint(URI)) == facts(open_checkpoint(str(FIXTURES / "sharded")))


@pytest.mark.parametrize("path", ["..", "../x.bin", "/etc/x.bin", "a\x1b[31m.bin", "a\\b.bin"])
def test_a_hostile_list_of_files(server: HubServer, path: str) -> None:
    server.push(REPO, {path: b"x", "model.safetensors": hollow_safetensors(SMALL)})
    assert "\x1b" not in refused(server, "FC503").message


@pytest.mark.parametrize(
    ("shard", "code"),
    [
        ("../../secret.safetensors", "FC503"),
        ("/etc/passwd", "FC503"),
        ("https://127.0.0.1/x.safetensors", "FC503"),
        ("sub/x.safetensors", "FC503"),
        ("absent.safetensors", "FC107"),
    ],
)
def test_a_hostile_index(server: HubServer, shard: str, code: str) -> None:
    index = json.dumps({"weight_map": {"a.weight": shard}}).encode()
    server.push(REPO, {"model.safetensors.index.json": index})
    refused(server, code)
    assert not [one for one in server.requests if "secret" in one.path or "passwd" in one.path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b.weight": None}, "does not list"),
        ({"stray.weight": "one.safetensors"}, "that their shards lack"),
    ],
)
def test_an_index_is_held_to_its_shards(
    server: HubServer, change: dict[str, str | None], words: str
) -> None:
    weight_map = dict.fromkeys(SMALL, "one.safetensors") | change
    kept = {name: shard for name, shard in weight_map.items() if shard}
    index = json.dumps({"weight_map": kept}).encode()
    files = {"model.safetensors.index.json": index, "one.safetensors": hollow_safetensors(SMALL)}
    server.push(REPO, files)
    assert words in refused(server, "FC107").message


def test_headers_all_over_a_large_file(server: HubServer) -> None:
    """Each storage of the legacy stream is preceded by its length."""
    import io

    import torch

    state = {f"{at}.weight": torch.zeros(20_000) for at in range(80)}
    content = io.BytesIO()
    torch.save(state, content, _use_new_zipfile_serialization=False)
    server.push(REPO, {"pytorch_model.bin": content.getvalue()})
    error = refused(server, "FC002")
    assert "spread over the whole file" in error.message
    assert "pull" in str(error.hint)


# -- the token


def test_the_token_goes_to_the_endpoint_alone(server: HubServer, token: str) -> None:
    server.push(REPO, LARGE_FILES["safetensors-shards"], token=token)
    outcome = cli_ok("inspect", URI, "--json")
    for request in server.requests:
        sent = {name.lower(): value for name, value in request.headers.items()}
        is_home = request.port == server.ports[0] and not request.path.startswith("/api/agent")
        assert (sent.get("authorization") == f"Bearer {token}") == is_home, request
    assert token not in outcome.out + outcome.err
    assert len(server.asked("GET", "/store/")) >= 2


def test_the_token_is_not_in_what_goes_wrong(
    server: HubServer, token: str, waits: list[float], tmp_path: Path
) -> None:
    server.push(REPO, LARGE_FILES["safetensors"], token="another")
    page = tmp_path / "page.html"
    for uri in (URI, f"{URI}@v9", f"hf://no/body/{token[:4]}x"):
        outcome = cli("inspect", uri, "--json", "--output", page)
        assert outcome.codes == ["FC470"]
        assert token not in outcome.out + outcome.err + page.read_text()
    server.status = 503
    outcome = cli("inspect", URI)
    assert token not in outcome.out + outcome.err
    with pytest.raises(CkptError) as caught:
        open_checkpoint(URI)
    error: BaseException | None = caught.value
    while error is not None:  # the chain that --debug prints
        assert token not in f"{error!r} {vars(error)}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("hf://no/body", "FC470"),
        (f"{URI}@v9", "FC471"),
        (f"{URI}/absent.pt", "FC471"),
        (f"{URI}/sub/absent.pt", "FC471"),
        (f"{URI}/sub", "FC001"),
        ("hf://a", "FC475"),
        ("s3://a/b", "FC002"),
    ],
)
def test_what_is_not_there(server: HubServer, uri: str, code: str) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL), "sub/x.txt": b""})
    refused(server, code, uri)


def test_a_gated_repository(server: HubServer) -> None:
    server.push(REPO, {"model.safetensors": hollow_safetensors(SMALL)}, gated=True)
    refused(server, "FC472")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "http://", "ftp://127.0.0.1", "http://a b"])
def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(CkptError) as caught:
        open_checkpoint(URI)
    assert caught.value.code == "FC474"
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CkptError) as caught:
        open_checkpoint(URI)
    assert caught.value.code == "FC474"
    assert len(waits) == 4
