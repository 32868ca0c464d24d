"""Addresses on the hub."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.hub import HubUri, LocalCopy, is_repo_id, parse_uri


@pytest.mark.parametrize(
    ("text", "revision", "path"),
    [
        ("hf://a/b", None, ""),
        ("hf://a/b/", None, ""),
        ("hf://a/b@main", "main", ""),
        ("hf://a/b@v1.0/sub/model.safetensors", "v1.0", "sub/model.safetensors"),
        ("hf://a/b/sub/", None, "sub"),
        ("hf://a/b@refs/pr/12", "refs/pr/12", ""),
        ("hf://a/b@refs/pr/12/x.pt", "refs/pr/12", "x.pt"),
        ("hf://a/b@refs%2Fpr%2F12/x.pt", "refs/pr/12", "x.pt"),
        ("hf://a/b@refs/convert/parquet/x", "refs/convert/parquet", "x"),
        ("hf://a/b@feature%2Fnew/x", "feature/new", "x"),
        ("hf://a/b/x@y.pt", None, "x@y.pt"),
        ("hf://a/b@" + "0" * 40, "0" * 40, ""),
    ],
)
def test_what_an_address_names(text: str, revision: str | None, path: str) -> None:
    uri = parse_uri(text)
    assert uri == HubUri(repo_id="a/b", revision=revision, path=path)
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://a",
        "hf://a/",
        "hf:///b",
        "hf://a/b@",
        "hf://a/b@/x",
        "hf://a/b@../x",
        "hf://a/b@-x",
        "hf://a/b@a%2F..%2Fb",
        "hf://a/b@refs%00x",
        "hf://a/b/../c",
        "hf://a/b/./c",
        "hf://a/b//c",
        "hf://a/b/c\\d",
        "hf://a/b/c\x1b[31m",
        "hf://a b/c",
        "hf://datasets/a/b",
        "hf://../b",
        "a/b",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(CkptError) as caught:
        parse_uri(text)
    assert caught.value.code == "FC475"
    assert "\x1b" not in caught.value.message


SEGMENT = st.from_regex(r"[A-Za-z0-9_@%+ -][A-Za-z0-9._@%+ -]{0,8}", fullmatch=True)


@given(
    st.from_regex(r"[A-Za-z0-9]{1,6}/[A-Za-z0-9]{1,6}", fullmatch=True),
    st.none() | st.from_regex(r"[a-z0-9]{1,5}(/[a-z0-9]{1,5}){0,2}", fullmatch=True),
    st.lists(SEGMENT, max_size=3),
)
def test_what_is_written_is_read_again(
    repo_id: str, revision: str | None, parts: list[str]
) -> None:
    if repo_id.split("/")[0] in ("datasets", "spaces", "kernels", "buckets"):
        return
    uri = HubUri(repo_id=repo_id, revision=revision, path="/".join(parts))
    assert parse_uri(str(uri)) == uri


def test_a_local_copy_is_a_path_that_knows_its_origin() -> None:
    copy = LocalCopy.of("some/where", uri="hf://a/b", remote={"revision": "0"})
    assert copy == "some/where"
    assert (copy.uri, copy.remote["revision"], copy.left) == ("hf://a/b", "0", ())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("openflamingo/OpenFlamingo-3B-vitl-mpt1b", True),
        ("gpt2", True),
        ("a/b/c", False),
        ("./a", False),
        ("/a/b", False),
        ("a/b.", False),
        ("a b", False),
        ("", False),
    ],
)
def test_what_can_be_a_repository(text: str, wanted: bool) -> None:
    assert is_repo_id(text) is wanted
