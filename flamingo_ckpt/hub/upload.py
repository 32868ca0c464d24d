"""Commits to the hub, through `huggingface_hub`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.hub import failures
from flamingo_ckpt.hub.failures import Ask
from flamingo_ckpt.hub.http import origin
from flamingo_ckpt.hub.names import PUBLIC_ENDPOINT, HubUri, endpoint, is_offline, is_public
from flamingo_ckpt.tensors import escape

_TOKEN_HEADERS = ("authorization", "cookie")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A file of a commit.

    Attributes:
        path: in the repository.
        content: its bytes, or the path of a file that is too large for memory.
        sha256: what it has to be.
    """

    path: str
    content: bytes | str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A commit that was made.

    Attributes:
        oid: its hash.
        url: of its page.
        pull_request: of the page of the pull request, where one was opened.
    """

    oid: str
    url: str
    pull_request: str | None


def create_repository(repo_id: str, *, private: bool) -> None:
    """Make an empty repository for a model.

    Raises:
        CkptError: FC473 offline, FC474 unreachable, FC478 refused.
    """
    ask = Ask(repo_id=repo_id, what="the new repository", revision=None)

    def call() -> None:
        from huggingface_hub import HfApi

        HfApi(endpoint=endpoint()).create_repo(repo_id, private=private, repo_type="model")

    with _token_stays_home():
        _uploading(call, ask)


def commit_files(
    place: HubUri,
    additions: Sequence[Addition],
    *,
    message: str,
    description: str,
    parent: str,
    pull_request: bool,
    shows_progress: bool,
) -> Commit:
    """Upload files and commit them.

    Args:
        place: repository and branch.
        additions: what to write; what else the branch holds stays.
        message: first line.
        description: the rest.
        parent: the commit that the branch has to be at.
        pull_request: open one instead of moving the branch.
        shows_progress: whether `huggingface_hub` may draw its bars.

    Raises:
        CkptError: FC473 offline, FC474 unreachable, FC478 refused, FC609 for a file that is no
            longer what it was.
    """
    ask = Ask(repo_id=place.repo_id, what="the commit", revision=place.revision)

    def call() -> Commit:
        from huggingface_hub import CommitOperationAdd, HfApi

        operations = [
            CommitOperationAdd(path_in_repo=one.path, path_or_fileobj=one.content)
            for one in additions
        ]
        for one, operation in zip(additions, operations, strict=True):
            if operation.upload_info.sha256.hex() != one.sha256:
                raise _not_the_same(one, place)
        info = HfApi(endpoint=endpoint()).create_commit(
            place.repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            revision=place.revision,
            create_pr=pull_request,
            parent_commit=parent,
        )
        return Commit(oid=info.oid, url=info.commit_url, pull_request=info.pr_url)

    with _settled_transport(shows_progress), _token_stays_home():
        return _uploading(call, ask)


def _not_the_same(one: Addition, place: HubUri) -> CkptError:
    return CkptError(
        f"`{escape(one.path)}` changed since its digest was taken",
        code="FC609",
        where=str(place),
        hint="wait until its writer has finished, check the folder again, then push it",
    )


@contextmanager
def _settled_transport(shows_progress: bool) -> Iterator[None]:
    """Xet asks no other endpoint than the public one; bars are drawn where they are wanted."""
    if not is_public():
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    import huggingface_hub.utils as utils
    from huggingface_hub import constants

    library: Any = utils
    if not is_public():
        constants.HF_HUB_DISABLE_XET = True
    silences = not shows_progress and not library.are_progress_bars_disabled()
    if silences:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if silences:
            library.enable_progress_bars()


@contextmanager
def _token_stays_home() -> Iterator[None]:
    """Take the token out of every request to another host than the endpoint.

    The store of large files names the addresses where it is told of an upload, and the client
    would send the token wherever they lead.
    """
    if is_offline():
        yield
        return
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    home = origin(endpoint() or PUBLIC_ENDPOINT)
    library: Any = _http

    def strip(request: Any) -> None:
        if origin(str(request.url)) != home:
            for name in _TOKEN_HEADERS:
                request.headers.pop(name, None)

    def guard(client: Any) -> Mapping[str, list[Any]]:
        before: Mapping[str, list[Any]] = client.event_hooks
        client.event_hooks = {**before, "request": [*before.get("request", ()), strip]}
        return before

    def make() -> Any:
        client = factory()
        guard(client)
        return client

    client, factory = get_session(), library._GLOBAL_CLIENT_FACTORY
    before = guard(client)
    # The library throws its client away when a connection fails, and makes another.
    library._GLOBAL_CLIENT_FACTORY = make
    try:
        yield
    finally:
        library._GLOBAL_CLIENT_FACTORY = factory
        client.event_hooks = {**before}
        if get_session() is not client:
            library.close_session()


def _uploading(call: Callable[[], _T], ask: Ask) -> _T:
    """As `failures.guarded`, with words for the other direction."""
    if is_offline():
        raise CkptError(
            f"{ask} needs the network, which HF_HUB_OFFLINE forbids",
            code="FC473",
            where=ask.where,
            hint="unset HF_HUB_OFFLINE",
        )
    try:
        return call()
    except CkptError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP library and the file system
        told = _told(error)
        status = failures.status_of(told)
        reason = failures.reason_of(told)
        is_refusal = status is not None and 400 <= status < 500 and status not in (408, 429)
        if status is not None and is_refusal:
            failure = _refused(ask, status)
        elif isinstance(error, ValueError) and not isinstance(error, OSError):
            failure = _invalid(ask, reason)
        else:
            failure = _broken(ask, reason)
    raise failure  # out here: errors of HTTP carry the request, and so the token


def _told(error: Exception) -> Exception:
    """What a store answered, where the client wraps it: that one file could not be uploaded."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def _refused(ask: Ask, status: int) -> CkptError:
    why = {
        401: "there is no login, or it is no longer valid",
        403: "this login may not write there",
        404: "there is no such repository or branch for this login",
        409: "it exists already",
        412: "the branch moved while this was on its way",
    }.get(status, f"it answered with status {status}")
    return CkptError(
        f"the hub refuses {ask}: {why}",
        code="FC478",
        where=ask.where,
        hint="push again, which looks at the branch anew"
        if status == 412
        else "log in with a token that may write (`hf auth login`), or leave --direct out: a pull "
        "request needs no right to the branch",
    )


def _invalid(ask: Ask, reason: str) -> CkptError:
    return CkptError(
        f"the hub refuses {ask}: {reason}",
        code="FC478",
        where=ask.where,
        hint="mend what it names: often the block at the top of README.md",
    )


def _broken(ask: Ask, reason: str) -> CkptError:
    return CkptError(
        f"cannot upload {ask}: {reason}",
        code="FC474",
        where=ask.where,
        hint="check the connection and run the same command again: large files that have arrived "
        "are not sent twice",
    )
