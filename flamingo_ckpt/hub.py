"""The Hub: files by repository, name and revision, on the local disk.

Nothing else in the package touches the network. The cache, its place (`HF_HOME`), the endpoint
(`HF_ENDPOINT`), offline mode (`HF_HUB_OFFLINE`) and the login are those of `huggingface_hub`, which
does the work; the two settings of the environment are read at each call. What goes wrong becomes
one error that names the repository, the file, the revision and the way on. Tokens are handed over
and never shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

#: What a config or a tokenizer is made of. No code, and no weights.
CONFIG_FILES: Final = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.vocab", "*.bpe")
_TRUE = ("1", "ON", "YES", "TRUE")
_MAX_REASON = 200

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    """What is asked for, for messages."""

    repo_id: str
    what: str
    revision: str | None

    @property
    def where(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return escape(f"{self.repo_id}{at}")


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> str:
    """The local path of one file of a repository; downloaded unless the cache has it.

    Args:
        repo_id: `owner/name`.
        filename: path in the repository.
        revision: branch, tag or commit; None is the main branch. A file of a full commit that is
            in the cache is given without asking anybody.
        cache_dir: instead of `huggingface_hub`'s own.
        local_files_only: never ask the network.
        token: instead of that of the login; False sends none.

    Raises:
        CkptError: FC470 no such repository (or none that this login may see), FC471 no such file
            or revision, FC472 a gated repository, FC473 offline and not in the cache, FC474 the
            hub cannot be reached or its answer is broken, FC475 an invalid name.
    """
    ask = _Ask(repo_id=repo_id, what=f"`{filename}`", revision=revision)

    def call() -> str:
        from huggingface_hub import hf_hub_download

        return str(
            hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                cache_dir=_folder(cache_dir),
                local_files_only=local_files_only or is_offline(),
                token=token,
                endpoint=_endpoint(),
            )
        )

    return _guarded(call, ask)


def snapshot(
    repo_id: str,
    allow_patterns: Sequence[str] = CONFIG_FILES,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> str:
    """The local folder of a repository with the files that fit a pattern, such as a tokenizer.

    Args:
        repo_id: `owner/name`.
        allow_patterns: globs over the paths in the repository; nothing else is fetched.
        revision: as for `download`.
        cache_dir: as for `download`.
        local_files_only: as for `download`.
        token: as for `download`.

    Raises:
        CkptError: as `download`.
    """
    what = ", ".join(f"`{one}`" for one in allow_patterns)
    ask = _Ask(repo_id=repo_id, what=what, revision=revision)

    def call() -> str:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=_folder(cache_dir),
                local_files_only=local_files_only or is_offline(),
                allow_patterns=list(allow_patterns),
                token=token,
                endpoint=_endpoint(),
            )
        )

    return _guarded(call, ask)


def is_repo_id(text: str) -> bool:
    """Whether a text can be the id of a repository: `owner/name` or, for old ones, `name`.

    >>> is_repo_id("openflamingo/OpenFlamingo-3B-vitl-mpt1b"), is_repo_id("./folder/x.pt")
    (True, False)
    """
    return bool(
        re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text)
    ) and not text.endswith((".git", ".", "-"))


def is_offline() -> bool:
    """Whether the environment forbids asking the hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


def _endpoint() -> str | None:
    """`huggingface_hub` reads it once, when it is imported, which may have been before."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def _folder(cache_dir: str | os.PathLike[str] | None) -> str | None:
    return None if cache_dir is None else os.fspath(cache_dir)


def _guarded(call: Callable[[], _T], ask: _Ask) -> _T:
    try:
        return call()
    except CkptError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP library and the file system
        failure, cause = _translated(error, ask), _cause(error)
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


def _translated(error: Exception, ask: _Ask) -> CkptError:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError | ValueError) and not isinstance(error, OSError):
        return _error(
            f"`{escape(ask.repo_id)}` with {escape(ask.what)} is nothing that the hub can have: "
            + _reason(error),
            "FC475",
            ask,
            "a repository is `owner/name`; a local path has to exist",
        )
    if isinstance(error, errors.GatedRepoError):
        return _error(
            f"the repository `{escape(ask.repo_id)}` is gated: {escape(ask.what)} is given to "
            "those who accepted its terms",
            "FC472",
            ask,
            "accept them on the page of the repository, then log in with `hf auth login` or set "
            "HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return _absent(error, ask)
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
        return _error(
            f"the hub has no repository `{escape(ask.repo_id)}`, or does not show it to this login",
            "FC470",
            ask,
            "check its spelling; for a private one log in with `hf auth login` or set HF_TOKEN; a "
            "local path has to exist",
        )
    return _unreachable(error, ask)


def _absent(error: Exception, ask: _Ask) -> CkptError:
    from huggingface_hub import errors

    repo = escape(ask.repo_id)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"the repository `{repo}` has no revision `{escape(ask.revision or 'main')}`"
        hint = "name a branch, a tag or a commit of it"
    else:
        message = f"the repository `{repo}` has no {escape(ask.what)}" + (
            f" at `{escape(ask.revision)}`" if ask.revision else ""
        )
        hint = "name one of its files; names are case-sensitive"
    return _error(message, "FC471", ask, hint)


def _unreachable(error: Exception, ask: _Ask) -> CkptError:
    from huggingface_hub import errors

    what = f"{escape(ask.what)} of `{escape(ask.repo_id)}`" + (
        f" at `{escape(ask.revision)}`" if ask.revision else ""
    )
    cause = error.__cause__
    is_local = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.OfflineModeIsEnabled) or (is_local and cause is None):
        return _error(
            f"{what} is not in the cache, and no network may be used",
            "FC473",
            ask,
            "download it once while online (without `local_files_only`, HF_HUB_OFFLINE unset), "
            "or name a local path; `cache_dir` has to be the one it was downloaded to",
        )
    reason = cause if is_local and isinstance(cause, Exception) else error
    return _error(
        f"cannot download {what}: {_reason(reason)}",
        "FC474",
        ask,
        "check the connection, the proxy and HF_ENDPOINT, and try again: what has arrived is kept",
    )


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _reason(error: Exception) -> str:
    """The kind of an error and its first line; of an answer of the hub the status alone."""
    status = _status(error)
    if status is not None:
        return f"the hub answered with status {status}"
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"hf_\w+", "hf_...", line)
    return escape(f"{type(error).__name__}: {line}"[:_MAX_REASON])


def _error(message: str, code: str, ask: _Ask, hint: str) -> CkptError:
    return CkptError(message, code=code, where=ask.where, hint=hint)
