"""push: what goes up is what was checked, by which way, and what stops it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.hub import upload
from flamingo_ckpt.transfer import push
from tests.hub_server import HubServer
from tests.support import FIXTURES, Outcome, cli, cli_ok

# of huggingface_hub's own call of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/model"
URI = f"hf://{REPO}"
FILES = {
    "model.safetensors": (FIXTURES / "tiny.safetensors").read_bytes(),
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n",
    "tokenizer/vocab.txt": b"a\n",
    ".gitattributes": b"*.safetensors lfs\n",
}
OLD = {"config.json": b'{"a": 0}', "README.md": FILES["README.md"], "old.md": b"kept"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder to push, with things in it that no push sends."""
    folder = tmp_path / "release"
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / ".flamingo-pull.json").write_text("{}")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_text("")
    (folder / ".env").write_text("HF_TOKEN=hf_forgotten")
    return folder


def report_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """What `check` writes, with the digests taken here."""
    files = [
        {
            "path": str(path.relative_to(folder)),
            "num_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (".cache", ".env")
    ]
    summary = {"errors": 0, "warnings": 0, "skipped": 1, "waived": 0}
    return {
        "schema_version": "1.0",
        "tool": {"name": "flamingo-ckpt", "version": "0.1.0"},
        "command": {"name": "check", "argv": ["check", "release"]},
        "verdict": "pass",
        "exit_code": 0,
        "inputs": [],
        "summary": summary | {"checks": {"container": "pass", "safety": "warn", "bits": "skip"}},
        "findings": [],
        "duration_seconds": 0.1,
        "level": "all",
        "checks": [],
        "files": files,
        "source": None,
        "policy": {"source": None, "sha256": None, "required": [], "waivers": 0},
        "waived": [],
        "parity": None,
        "bits": None,
        "tensors": [],
        "fixes": [],
    } | changes


@pytest.fixture
def report(release: Path, tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report_of(release)))
    return path


def refused(server: HubServer, outcome: Outcome, code: str, *words: str) -> dict[str, Any]:
    """Exit 2 with one finding, and nothing was sent."""
    assert outcome.code == 2, outcome
    assert outcome.codes == [code]
    finding: dict[str, Any] = outcome.document["findings"][0]
    assert all(word in f"{finding['detail']} {finding['hint']}" for word in words), finding
    assert not server.asked("PUT")
    assert not server.asked("POST")
    return finding


def test_a_pull_request_of_exactly_what_was_checked(
    server: HubServer, release: Path, report: Path
) -> None:
    before = server.push(REPO, OLD)
    document = cli_ok("push", release, URI, "--report", report, "--json").document
    assert server.files(REPO) == OLD  # the branch has not moved
    assert server.files(REPO, "refs/pr/1") == OLD | FILES
    repository = server.repositories[REPO]
    commit = repository.refs["refs/pr/1"]
    assert document["commit"] == commit
    assert document["parent"] == before
    assert document["pull_request"].endswith("/discussions/1")
    status = {one["path"]: one["status"] for one in document["files"]}
    assert status == dict.fromkeys(FILES, "new") | {"config.json": "changed", "README.md": "same"}
    assert {one["path"] for one in document["left"]} == {".cache", ".env", ".flamingo-pull.json"}
    assert document["stays"] == ["old.md"]
    message = repository.messages[commit]
    assert message.startswith("Upload release with flamingo-ckpt\nChecked by flamingo-ckpt 0.1.0:")
    assert "container, safety" in message
    # the weights went to the store, small files into the commit
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert [one.path for one in server.asked("PUT")] == [f"/upload/{digest}"]


def test_straight_to_the_branch(server: HubServer, release: Path, report: Path) -> None:
    server.push(REPO, OLD)
    words = ("--report", report, "--direct", "--message", "v1.0")
    outcome = cli_ok("push", release, URI, *words)
    assert server.files(REPO) == OLD | FILES
    assert (
        server.repositories[REPO]
        .messages[server.repositories[REPO].refs["main"]]
        .startswith("v1.0\n")
    )
    assert "stays in the repository" in outcome.out
    assert "old.md" in outcome.out
    server.requests.clear()
    again = cli_ok("push", release, URI, "--report", report, "--direct")
    assert "nothing to send" in again.out
    assert not server.asked("POST")


def test_into_a_folder_of_a_pull_request(server: HubServer, release: Path, report: Path) -> None:
    server.push(REPO, OLD)
    server.push(REPO, OLD, branch="refs/pr/7")
    document = cli_ok(
        "push", release, f"{URI}@refs/pr/7/sub", "--report", report, "--json"
    ).document
    assert server.files(REPO, "refs/pr/7") == OLD | {f"sub/{k}": v for k, v in FILES.items()}
    assert document["pull_request"] is None  # it is one


def test_a_dry_run_sends_nothing(server: HubServer, release: Path, report: Path) -> None:
    server.push(REPO, OLD)
    outcome = cli_ok("push", release, URI, "--report", report, "--dry-run")
    for words in ("config.json", "changed", "same", "new", "not sent", "nothing sent (--dry-run)"):
        assert words in outcome.out
    assert not server.asked("POST")
    document = cli_ok("push", release, URI, "--dry-run", "--json").document
    assert [(one["code"], one["severity"]) for one in document["findings"]] == [
        ("FC630", "warning")
    ]


def test_without_a_check_the_commit_says_so(server: HubServer, release: Path) -> None:
    server.push(REPO, OLD)
    refused(server, cli("push", release, URI, "--json"), "FC630", "--no-check")
    outcome = cli_ok("push", release, URI, "--no-check", "--message", "mine")
    messages = server.repositories[REPO].messages
    assert list(messages.values()) == ["mine\nNo check was run (--no-check)."]
    assert "unchecked" in outcome.out


def passing(**checks: str) -> dict[str, Any]:
    """The summary of a check that passed, by a policy that asks for little."""
    statuses = {"container": "pass", "safety": "pass"} | checks
    counts = {"errors": 0, "warnings": 0, "skipped": 1, "waived": 2}
    return {"summary": counts | {"checks": statuses}}


def test_the_commit_says_what_was_waived(server: HubServer, release: Path, report: Path) -> None:
    server.push(REPO, OLD)
    report.write_text(json.dumps(report_of(release, **passing())))
    cli_ok("push", release, URI, "--report", report)
    (message,) = server.repositories[REPO].messages.values()
    assert "2 findings were waived by its policy" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "fail", "exit_code": 1}, "verdict is `fail`"),
        ({"verdict": "incomplete", "exit_code": 3}, "verdict is `incomplete`"),
        ({"level": "headers"}, "only `headers` were checked"),
        ({"command": {"name": "inspect", "argv": []}}, "report"),
        ({"files": "all"}, "report"),
        ({"schema_version": "9.0"}, "9.0"),
        (passing(container="skip"), "`container` did not run"),
        (passing(safety="skip"), "`safety` did not run"),
    ],
)
def test_a_report_that_did_not_pass(
    server: HubServer, release: Path, report: Path, changes: dict[str, Any], words: str
) -> None:
    server.push(REPO, OLD)
    report.write_text(json.dumps(report_of(release, **changes)))
    refused(server, cli("push", release, URI, "--report", report, "--json"), "FC630", words)


def test_a_report_that_is_none(server: HubServer, release: Path, report: Path) -> None:
    server.push(REPO, OLD)
    report.write_text("pass")
    refused(server, cli("push", release, URI, "--report", report, "--json"), "FC630")
    report.unlink()
    refused(server, cli("push", release, URI, "--report", report, "--json"), "FC002")


def edit(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (edit("config.json", b'{"a": 2}'), "FC609", "changed since"),
        (edit("config.json", None), "FC609", "gone"),
        (edit("modeling.py", b"import os"), "FC631", "modeling.py"),
        (edit("tokenizer/extra.txt", b""), "FC631", "tokenizer/extra.txt"),
        (edit(".gitignore", b"x"), "FC631", ".gitignore"),
    ],
)
def test_what_changed_since_the_check(
    server: HubServer,
    release: Path,
    report: Path,
    change: Callable[[Path], None],
    code: str,
    words: str,
) -> None:
    server.push(REPO, OLD)
    change(release)
    refused(server, cli("push", release, URI, "--report", report, "--json"), code, words)


def test_a_report_in_the_folder_is_not_sent(server: HubServer, release: Path) -> None:
    server.push(REPO, OLD)
    document = report_of(release)
    inside = release / "report.json"
    inside.write_text(json.dumps(document))
    told = cli_ok("push", release, URI, "--report", inside, "--json").document
    assert {"path": "report.json", "reason": "the report of the check"} in told["left"]
    assert "report.json" not in server.files(REPO, "refs/pr/1")


@pytest.mark.parametrize("kind", ["file", "folder", "nowhere"])
def test_links_are_not_followed_out(
    server: HubServer, release: Path, tmp_path: Path, kind: str
) -> None:
    server.push(REPO, OLD)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("private")
    target = {"file": secret / "key.txt", "folder": secret, "nowhere": tmp_path / "no"}[kind]
    (release / "link").symlink_to(target)
    refused(server, cli("push", release, URI, "--no-check", "--json"), "FC503", "link")


def test_a_link_within_the_folder_is_a_file(server: HubServer, release: Path) -> None:
    server.push(REPO, OLD)
    (release / "copy.json").symlink_to("config.json")
    cli_ok("push", release, URI, "--no-check")
    assert server.files(REPO, "refs/pr/1")["copy.json"] == FILES["config.json"]


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository(server: HubServer, release: Path, report: Path, private: bool) -> None:
    words = ("push", release, URI, "--report", report)
    refused(server, cli(*words, "--json"), "FC470", "--create")
    refused(server, cli(*words, "--private", "--json"), "FC006")
    document = cli_ok(*words, "--create", "--dry-run", "--json").document
    assert document["parent"] is None
    assert server.repositories == {}
    options = ("--private",) if private else ()
    cli_ok(*words, "--create", "--direct", *options)
    assert server.files(REPO) == FILES
    assert server.repositories[REPO].private is private


def test_only_what_differs_is_sent(server: HubServer, release: Path, report: Path) -> None:
    server.push(REPO, FILES | {"config.json": b"{}"})
    document = cli_ok("push", release, URI, "--report", report, "--json").document
    assert document["summary"]["num_sent"] == 1
    assert not server.asked("PUT")
    assert server.files(REPO, "refs/pr/1") == FILES


def test_weights_that_stay_are_warned_of(server: HubServer, release: Path, report: Path) -> None:
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    server.push(REPO, OLD | stale)
    document = cli_ok("push", release, URI, "--report", report, "--json").document
    told = [(one["code"], one["severity"], one["key"]) for one in document["findings"]]
    assert told == [("FC631", "warning", name) for name in sorted(stale)]


def test_the_hub_refuses(
    server: HubServer, release: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.push(REPO, OLD, is_read_only=True)
    outcome = cli("push", release, URI, "--report", report, "--json")
    assert outcome.codes == ["FC478"]
    assert "may not write" in outcome.document["findings"][0]["detail"]
    assert "hf_leaked" not in outcome.out + outcome.err  # the server's own words are not repeated
    assert not server.asked("PUT")


def test_a_branch_that_moves_is_noticed(
    server: HubServer, release: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.push(REPO, OLD)
    real = push.commit_files

    def late(*arguments: Any, **options: Any) -> Any:
        server.push(REPO, OLD | {"config.json": b"meanwhile"})
        return real(*arguments, **options)

    monkeypatch.setattr(push, "commit_files", late)
    outcome = cli("push", release, URI, "--report", report, "--direct", "--json")
    assert outcome.codes == ["FC478"]
    assert "the branch moved" in outcome.document["findings"][0]["detail"]
    assert server.files(REPO)["config.json"] == b"meanwhile"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_that_changes_between_digest_and_upload(
    server: HubServer,
    release: Path,
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    in_memory: bool,
) -> None:
    server.push(REPO, OLD)
    if not in_memory:
        monkeypatch.setattr(push, "_IN_MEMORY_BYTES", 0)
    real = push.plan_push

    def then_changed(*arguments: Any, **options: Any) -> Any:
        plan = real(*arguments, **options)
        (release / name).write_bytes(b"x" * (release / name).stat().st_size)
        return plan

    monkeypatch.setattr(push, "plan_push", then_changed)
    outcome = cli("push", release, URI, "--report", report, "--json")
    assert outcome.codes == ["FC609"]
    assert list(server.repositories[REPO].refs) == ["main"]


def test_a_hub_that_keeps_something_else(
    server: HubServer, release: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.push(REPO, OLD)
    real = push.commit_files

    def spoilt(*arguments: Any, **options: Any) -> Any:
        commit = real(*arguments, **options)
        server.repositories[REPO].commits[commit.oid]["config.json"] = b"another"
        return commit

    monkeypatch.setattr(push, "commit_files", spoilt)
    outcome = cli("push", release, URI, "--report", report, "--json")
    assert outcome.codes == ["FC478"]
    assert "config.json" in outcome.document["findings"][0]["detail"]


@pytest.mark.parametrize("verify_port", [0, 1])
def test_the_token_stays_home(
    server: HubServer, release: Path, report: Path, token: str, verify_port: int, tmp_path: Path
) -> None:
    """Also where the store says that it wants to be told of the upload somewhere else."""
    server.push(REPO, OLD, token=token)
    server.verify_port = verify_port
    page = tmp_path / "page.html"
    words = ("--report", report, "--output", page)
    outcome = cli_ok("push", release, URI, *words, "--json")
    assert len(server.asked("POST", "/verify")) == 1
    for request in server.requests:
        sent = {name.lower(): value for name, value in request.headers.items()}
        is_home = request.port == server.ports[0] and not request.path.startswith("/api/agent")
        assert (sent.get("authorization") == f"Bearer {token}") == is_home, request
    assert token not in outcome.out + outcome.err + page.read_text() + report.read_text()


def test_the_guard_of_the_token_is_taken_off_again(server: HubServer) -> None:
    from huggingface_hub import get_session

    before = {name: list(hooks) for name, hooks in get_session().event_hooks.items()}
    with upload._token_stays_home():
        assert get_session().event_hooks != before
    assert get_session().event_hooks == before


def test_the_token_stays_home_where_a_connection_failed(server: HubServer) -> None:
    """The library then throws its client away, and the next one has to be guarded too."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

    store = f"http://127.0.0.1:{server.ports[1]}/nothing"
    with upload._token_stays_home():
        close_session()
        for url in (f"{server.endpoint}/nothing", store):
            get_session().get(url, headers={"authorization": "Bearer hf_x"})
    after = get_session()
    after.get(store, headers={"authorization": "Bearer hf_y"})
    sent = [{k.lower(): v for k, v in one.headers.items()} for one in server.requests]
    told = [one.get("authorization") for one in sent]
    assert told == ["Bearer hf_x", None, "Bearer hf_y"]


def test_offline_nothing_is_pushed(
    server: HubServer, release: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(server, cli("push", release, URI, "--report", report, "--json"), "FC473")
    assert server.requests == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("push", "{release}", "someone/model", "--no-check"), "FC475"),
        (("push", "{release}", URI, "--no-check", "--report", "r.json"), "FC006"),
        (("push", "{release}", URI, "--no-check", "--message", " "), "FC006"),
        (("push", "{release}/config.json", URI, "--no-check"), "FC002"),
        (("push", "{release}/absent", URI, "--no-check"), "FC002"),
        (("push", "{release}/tokenizer", f"{URI}@v9", "--no-check"), "FC471"),
        (("push", "{release}/.cache", URI, "--no-check"), "FC001"),
    ],
)
def test_what_cannot_be_pushed(
    server: HubServer, release: Path, words: tuple[str, ...], code: str
) -> None:
    server.push(REPO, OLD)
    os.replace(release / ".cache" / "huggingface" / "x.lock", release / ".cache" / ".lock")
    arguments = [word.format(release=release) for word in words]
    refused(server, cli(*arguments, "--json"), code)


def test_from_check_to_the_hub_and_back(
    server: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the report that `check` itself writes, and what `pull` makes of it."""
    server.push(REPO, OLD)
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])
    (folder / "README.md").write_bytes(FILES["README.md"])
    policy = tmp_path / "policy.toml"
    policy.write_text('[policy]\nrequired = ["container", "safety"]\nseverity = {FC354 = "info"}\n')
    report = folder / "report.json"
    cli_ok("check", folder, "--policy", policy, "--output", report)
    cli_ok("push", folder, URI, "--report", report)
    cli_ok("pull", f"{URI}@refs/pr/1", tmp_path / "back", "--include", "model*")
    cli_ok("verify", folder / "model.safetensors", tmp_path / "back")
    (folder / "README.md").write_text("# changed\n")
    assert cli("push", folder, URI, "--report", report, "--json").codes == ["FC609"]
