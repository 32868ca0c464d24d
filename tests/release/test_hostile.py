"""What strangers put into a release is never a crash, never slow, and never passes unseen."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ckpt.release.folder import list_files, read_windows
from flamingo_ckpt.release.leaks import find_paths, find_secrets
from tests.release.faults import NOTES, PASSWORD, TOKEN, told
from tests.release.releases import (
    CARD,
    CONFIG,
    INDEX,
    PREPROCESSOR,
    SHARDS,
    edit_json,
    tokenizer,
    write,
    write_json,
    write_sums,
)
from tests.support import FIXTURES, Outcome, cli

BROKEN = sorted(path for path in (FIXTURES / "broken").iterdir() if path.name != "README.md")


def assert_judged(outcome: Outcome) -> None:
    """The check came to a verdict: no traceback, no internal error, nothing beside the report."""
    assert outcome.code in (0, 1, 3), outcome
    assert "FC008" not in outcome.codes
    assert outcome.err == ""


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.name)
def test_a_broken_checkpoint_never_passes(path: Path, release: Path) -> None:
    for name in (*SHARDS, INDEX):
        (release / name).unlink()
    if path.is_dir():
        shutil.copytree(path, release, dirs_exist_ok=True)
    else:
        suffix = path.suffix
        shutil.copy(path, release / f"{'model' if suffix == '.safetensors' else 'weights'}{suffix}")
    outcome = cli("check", release, "--level", "headers", "--json")
    assert_judged(outcome)
    assert outcome.code != 0


VALUES = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 3.5, 1e308, 10**30, 2**31, 2**63, "", "x", "\u00b2"),
        *("\x1b[31m", "\ud800", "9" * 5000, [], [1], ["a", None], {}, {"a": {}}, [[[[]]]]),
    ]
)
DOCUMENTS: dict[str, Any] = {
    "config.json": CONFIG,
    "tokenizer.json": tokenizer(),
    "preprocessor_config.json": PREPROCESSOR,
    "tokenizer_config.json": {
        "added_tokens_decoder": {str(21): {"content": "<image>"}},
        "auto_map": {"AutoTokenizer": ["a.B", None]},
    },
    "processor_config.json": {"image_processor": PREPROCESSOR},
    "manifest.json": {
        "tool": {"name": "flamingo-ckpt"},
        "files": [{"path": "x", "sha256": "0"}],
        "tensors": [{"name": "x", "dtype": "F32", "shape": [1]}],
    },
    INDEX: {"metadata": {"total_size": 1}, "weight_map": {"x": SHARDS[0]}},
}


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a document."""
    yield path
    inner = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for name, value in inner:
        yield from places(value, (*path, name))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value at one place."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    at = changed
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return changed


CHANGES = st.sampled_from(sorted(DOCUMENTS)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(list(places(DOCUMENTS[name]))), VALUES)
)


@pytest.fixture(scope="module")
def spoilt(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that every example spoils and mends."""
    return Path(shutil.copytree(clean, tmp_path_factory.mktemp("spoilt") / "release"))


@settings(max_examples=25)
@given(change=CHANGES)
def test_any_value_anywhere_in_a_config(spoilt: Path, change: tuple[str, Any, Any]) -> None:
    name, path, value = change
    before = (spoilt / name).read_bytes() if (spoilt / name).exists() else None
    try:
        write_json(spoilt / name, with_value(DOCUMENTS[name], path, value))
        assert_judged(cli("check", spoilt, "--level", "headers", "--fix", "--json"))
    finally:
        if before is None:
            (spoilt / name).unlink()
        else:
            write(spoilt / name, before)


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("preprocessor_config.json", {**PREPROCESSOR, "crop_size": 8.5}),
        ("preprocessor_config.json", {**PREPROCESSOR, "crop_size": "8"}),
        ("preprocessor_config.json", {**PREPROCESSOR, "crop_size": [8, True]}),
        ("preprocessor_config.json", {**PREPROCESSOR, "image_mean": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"\u00b2": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}),
    ],
)
def test_values_that_once_ended_the_check(release: Path, name: str, document: Any) -> None:
    write_json(release / name, document)
    write_sums(release)
    outcome = cli("check", release, "--json")
    assert_judged(outcome)
    assert outcome.code == 1
    assert {"FC605", "FC606"} & {*outcome.codes}


FRONT = ["!!timestamp x", "!!int ''", "!!bool x", "!!float ''", "!!binary x", "2001-99-99", "<<: 3"]


@pytest.mark.parametrize("value", FRONT)
def test_front_matter_that_a_yaml_library_stumbles_over(release: Path, value: str) -> None:
    write(release / "README.md", CARD.replace("license: mit", f"license: mit\nx: {value}"))
    write_sums(release)
    outcome = cli("check", release, "--json")
    assert_judged(outcome)
    assert "FC602" in outcome.codes


@pytest.mark.parametrize("part", ["[", "? ", "- ", "{a: "])
def test_front_matter_that_nests_is_refused_early(release: Path, part: str) -> None:
    """A hundred thousand brackets take PyYAML minutes."""
    write(release / "README.md", f"---\n{part * 60_000}\n---\n")
    outcome = cli("check", release, "--level", "headers", "--json")
    assert_judged(outcome)
    assert "FC602" in outcome.codes


def test_front_matter_as_the_hub_reads_it(release: Path) -> None:
    """Blank lines may stand before it, and Windows ends its lines otherwise."""
    write(release / "README.md", "\n\n" + CARD.replace("\n", "\r\n"))
    write_sums(release)
    assert told(cli("check", release, "--json")) == NOTES


@settings(max_examples=60)
@given(data=st.binary(max_size=400))
def test_any_bytes_as_card_and_sums(spoilt: Path, data: bytes) -> None:
    from flamingo_ckpt.errors import CkptError
    from flamingo_ckpt.release.card import parse_card
    from flamingo_ckpt.release.manifest import parse_sums
    from flamingo_ckpt.release.record import find_record

    text = data.decode("utf-8", "replace")
    for parse in (parse_card, find_record, lambda one: parse_sums(one, "x")):
        for shape in (text, f"---\n{text}\n---\n"):
            with contextlib.suppress(CkptError):
                parse(shape)


# What nobody should know.

SECRETS = [
    TOKEN,
    "ghp_" + "aB1cD2eF3g" * 4,
    "AKIA" + "ABCDEFGH12345678",
    "sk-proj-" + "aB1cD2eF3g" * 4,
    "-----BEGIN RSA PRIVATE KEY-----",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9",
    "postgres://admin:Tr0ub4dor@db.example.org/x",
    f'"wandb_api_key": "{PASSWORD}"',
    f"password: '{PASSWORD}'",
    "WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567",
]
HARMLESS = [
    *("hf_" + "x" * 34, 'api_key="your-api-key-here"', "token = '<your token goes here>'"),
    *("hf_token=os.environ['HF_TOKEN_OF_MINE']", "http://user:pass@host/", "https://a.b/c:d@e"),
    *('"pad_token": "<|endoftext|>"', "secret = generate_secret_for_this_run_only", "sk-learn"),
    *("risk-averse-models-are-better-than-others-as-everybody-knows", "hf_hub_download"),
    *("password: str", 'auth_token = "$HF_TOKEN_OF_CI"', "-----BEGIN CERTIFICATE-----"),
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_seen_and_not_repeated(text: str) -> None:
    (leak,) = find_secrets(f"a\nb {text}\n") if "=" not in text else find_secrets(f"a\n{text}\n")
    assert leak.line == 2
    assert len(leak.shown.partition("...")[0]) <= 6


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret(text: str) -> None:
    assert [*find_secrets(f"{text}\n")] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("at /home/alice/x.pt,", "/home/alice/x.pt"),
        ('"/mnt/nfs/run-1"', "/mnt/nfs/run-1"),
        (r'"C:\\Users\\alice"', r":\\Users\\alice"),
        ("https://example.org/home/alice", None),
        ("see docs/home/alice", None),
        ("./data/coco", None),
        ("~/data/coco", None),
        ("and/or", None),
    ],
)
def test_paths_of_machines(text: str, found: str | None) -> None:
    assert [leak.shown for leak in find_paths(text)] == ([found] if found else [])


@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("at", [0, (4 << 20) - 7, 9 << 20])
def test_a_secret_is_found_wherever_it_stands(tmp_path: Path, coding: str, at: int) -> None:
    """Beyond any limit, across the edge of a window, in a file of any name and encoding."""
    text = f"{'abc def' * (at // 7)}\n{TOKEN}\n"
    (tmp_path / "notes").write_bytes(text.encode(coding))
    (file,) = list_files(str(tmp_path))
    seen = [leak for _, window in read_windows(file) for leak in find_secrets(window)]
    assert seen
    assert {leak.shown for leak in seen} == {f"hf_AbC... ({len(TOKEN)} characters)"}


def test_a_large_text_is_told_a_few_times_and_not_forever(release: Path) -> None:
    """Fifty megabytes of paths: what counts lines from the beginning each time never ends."""
    write(release / "notes.txt", "/home/a\n" * 2_000_000)
    outcome = cli("check", release, "--level", "headers", "--json")
    assert_judged(outcome)
    assert outcome.codes.count("FC511") == 5


def test_words_of_a_vocabulary_are_no_secrets(release: Path) -> None:
    edit_json(
        release / "tokenizer.json",
        lambda document: document["model"]["vocab"].update(
            {"/home/alice/x": 0, f'password="{PASSWORD}"': 1}
        ),
    )
    write_sums(release)
    assert told(cli("check", release, "--json")) == NOTES


def test_a_tokenizer_of_real_size_is_read(release: Path) -> None:
    """That of PaliGemma has 34 MB; a config is refused from 4 MB on."""
    document = tokenizer()
    document["merges"] = ["abcdefgh " * 10] * 60_000
    write(release / "tokenizer.json", json.dumps(document))
    write_sums(release)
    assert (release / "tokenizer.json").stat().st_size > 5 << 20
    assert told(cli("check", release, "--json")) == NOTES


# Folders.


def test_hostile_names_never_reach_the_terminal(release: Path, tmp_path: Path) -> None:
    write(release / "\x1b]0;owned\x07.txt", "x\n")
    write(release / b"\xff\xfe.bin".decode("utf-8", "surrogateescape"), b"\x80\x02.")
    edit_json(release / "config.json", lambda d: d.update(_name_or_path="/home/\x1b[2J"))
    page = tmp_path / "report.html"
    for outcome in (cli("check", release, "-v"), cli("check", release, "--output", page)):
        assert outcome.code == 1
        assert "\x1b" not in outcome.out + outcome.err
        assert "\x07" not in outcome.out
    assert "\x1b" not in page.read_text()
    assert_judged(cli("check", release, "--json"))


@pytest.mark.parametrize(
    "name", ["config.json", "README.md", "SHA256SUMS", "tokenizer.json", INDEX]
)
def test_a_pipe_or_a_device_in_place_of_a_file(release: Path, name: str) -> None:
    """Who opens a pipe waits for ever."""
    (release / name).unlink()
    os.mkfifo(release / name)
    outcome = cli("check", release, "--json")
    assert_judged(outcome)
    assert ("FC116", "error", name) in {
        (one["code"], one["severity"], one["key"]) for one in outcome.document["findings"]
    }
    (release / name).unlink()
    (release / name).symlink_to("/dev/zero")
    assert_judged(cli("check", release, "--json"))


def test_links_in_circles(release: Path) -> None:
    (release / "a").symlink_to("b")
    (release / "b").symlink_to("a")
    (release / "up").symlink_to("..")
    outcome = cli("check", release, "--json")
    assert_judged(outcome)
    found = {(one["code"], one["key"]) for one in outcome.document["findings"]}
    assert {("FC510", "a"), ("FC510", "b"), ("FC503", "up")} <= found


def test_an_archive_is_not_passed_over(release: Path) -> None:
    write(release / "weights.zip", b"PK\3\4")
    write_sums(release)
    assert told(cli("check", release, "--json")) == NOTES | {("FC116", "warning", "weights.zip")}


def test_a_view_that_stands_for_gigabytes_is_not_read_out(tmp_path: Path) -> None:
    file = FIXTURES / "broken" / "tensor-expanded.pt"
    outcome = cli("check", file, "--json")
    assert (outcome.code, outcome.document["summary"]["checks"]["values"]) == (1, "fail")
    assert "FC307" in outcome.codes


def test_a_file_that_vanishes_is_told(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (release / "gone.txt").write_text("x\n")
    real = os.lstat

    def lstat(path: Any, *more: Any, **options: Any) -> Any:
        if os.fspath(path).endswith("gone.txt"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *more, **options)

    monkeypatch.setattr("os.lstat", lstat)
    outcome = cli("check", release, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC007"])


def test_a_config_that_would_name_a_billion_labels(tmp_path: Path) -> None:
    from flamingo_ckpt.models.auto_config import refusal

    said = refusal({"model_type": "clip", "num_labels": 10**9})
    assert said is not None
    assert "num_labels" in said


@pytest.mark.parametrize("name", ["vocab", "model"])
def test_a_tokenizer_without_words_has_not_passed(release: Path, name: str) -> None:
    """It has the added tokens, and nothing else that a text consists of."""
    edit_json(
        release / "tokenizer.json",
        lambda d: d.pop("model") if name == "model" else d["model"].pop("vocab"),
    )
    write_sums(release)
    checks = cli("check", release, "--json").document["summary"]["checks"]
    assert checks["tokenizer"] == "skip"
