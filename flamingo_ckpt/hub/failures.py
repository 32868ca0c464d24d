"""What goes wrong with the hub, as errors that name the repository, the file and the way on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

_MAX_REASON = 200

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked for, for messages."""

    repo_id: str
    what: str
    revision: str | None

    @property
    def where(self) -> str:
        """Repository and revision."""
        at = f"@{self.revision}" if self.revision else ""
        return escape(f"{self.repo_id}{at}")

    def __str__(self) -> str:
        at = f" at `{escape(self.revision)}`" if self.revision else ""
        return f"{escape(self.what)} of `{escape(self.repo_id)}`{at}"


def guarded(call: Callable[[], _T], ask: Ask) -> _T:
    """What a call of `huggingface_hub` gives; its errors as ours, without the request in them."""
    try:
        return call()
    except CkptError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP library and the file system
        failure, cause = translated(error, ask), _cause(error)
    raise failure from cause  # out here, where no error of HTTP is around to be its context


def _cause(error: Exception) -> Exception | None:
    """Errors of HTTP carry the request with its headers, and so the token: they end here."""
    return None if _has_request(error) else error


def _has_request(error: BaseException | None) -> bool:
    while error is not None:
        if "request" in dir(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def translated(error: Exception, ask: Ask) -> CkptError:
    """Our error for one of `huggingface_hub`."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError | ValueError) and not isinstance(error, OSError):
        return CkptError(
            f"`{escape(ask.repo_id)}` with {escape(ask.what)} is nothing that the hub can have: "
            + reason_of(error),
            code="FC475",
            where=ask.where,
            hint="a repository is `owner/name`; a local path has to exist",
        )
    if isinstance(error, errors.GatedRepoError):
        return gated(ask)
    if isinstance(error, errors.RevisionNotFoundError):
        return no_revision(ask)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return no_file(ask)
    if isinstance(error, errors.RepositoryNotFoundError) or status_of(error) == 401:
        return no_repository(ask)
    cause = error.__cause__
    is_local = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.OfflineModeIsEnabled) or (is_local and cause is None):
        return not_cached(ask)
    return unreachable(
        ask, reason_of(cause if is_local and isinstance(cause, Exception) else error)
    )


def gated(ask: Ask) -> CkptError:
    """FC472."""
    return CkptError(
        f"the repository `{escape(ask.repo_id)}` is gated: {escape(ask.what)} is given to "
        "those who accepted its terms",
        code="FC472",
        where=ask.where,
        hint="accept them on the page of the repository, then log in with `hf auth login` or set "
        "HF_TOKEN",
    )


def no_repository(ask: Ask) -> CkptError:
    """FC470."""
    return CkptError(
        f"the hub has no repository `{escape(ask.repo_id)}`, or does not show it to this login",
        code="FC470",
        where=ask.where,
        hint="check its spelling; for a private one log in with `hf auth login` or set HF_TOKEN; a "
        "local path has to exist",
    )


def no_revision(ask: Ask) -> CkptError:
    """FC471 for a branch, tag or commit."""
    return CkptError(
        f"the repository `{escape(ask.repo_id)}` has no revision "
        f"`{escape(ask.revision or 'main')}`",
        code="FC471",
        where=ask.where,
        hint="name a branch, a tag or a commit of it",
    )


def no_file(ask: Ask) -> CkptError:
    """FC471 for a file or a folder."""
    return CkptError(
        f"the repository `{escape(ask.repo_id)}` has no {escape(ask.what)}"
        + (f" at `{escape(ask.revision)}`" if ask.revision else ""),
        code="FC471",
        where=ask.where,
        hint="name one of its files; names are case-sensitive",
    )


def not_cached(ask: Ask) -> CkptError:
    """FC473."""
    return CkptError(
        f"{ask} is not in the cache, and no network may be used",
        code="FC473",
        where=ask.where,
        hint="download it once while online (without `local_files_only`, HF_HUB_OFFLINE unset), "
        "or name a local path; `cache_dir` has to be the one it was downloaded to",
    )


def unreachable(ask: Ask, reason: str, hint: str | None = None) -> CkptError:
    """FC474."""
    return CkptError(
        f"cannot download {ask}: {reason}",
        code="FC474",
        where=ask.where,
        hint=hint
        or "check the connection, the proxy and HF_ENDPOINT, and try again: what has arrived is "
        "kept",
    )


def bad_answer(ask: Ask, why: str, hint: str | None = None) -> CkptError:
    """FC476."""
    return CkptError(
        f"the server's answer for {ask} is not what was asked for: {escape(why)}",
        code="FC476",
        where=ask.where,
        hint=hint
        or "a proxy, a mirror or a captive portal may stand in between: check HF_ENDPOINT and the "
        "proxy settings",
    )


def changed(ask: Ask, why: str) -> CkptError:
    """FC477."""
    return CkptError(
        f"{ask} changed on the hub while it was read: {escape(why)}",
        code="FC477",
        where=ask.where,
        hint="run the same command again; a commit as revision does not change",
    )


def status_of(error: Exception) -> int | None:
    """The status of the hub's answer, where there was one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def reason_of(error: Exception) -> str:
    """The kind of an error and its first line; of an answer of the hub the status alone."""
    status = status_of(error)
    if status is not None:
        return f"the hub answered with status {status}"
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"hf_\w+", "hf_...", line)
    return escape(f"{type(error).__name__}: {line}"[:_MAX_REASON])
