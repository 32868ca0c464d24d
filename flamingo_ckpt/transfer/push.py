"""A folder to the hub: exactly the files that a passing check has seen, with exactly their bytes.

What is hidden stays here, links are not followed out, and nothing is deleted over there. After the
commit the hub is asked what it holds, and that is compared with what was to be sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from flamingo_ckpt import hub
from flamingo_ckpt.errors import CkptError, Finding, UnsafeError, name_some
from flamingo_ckpt.formats.folder import WEIGHT_FILES
from flamingo_ckpt.formats.source import check_contained
from flamingo_ckpt.hub.http import Http
from flamingo_ckpt.hub.listing import HubFile, Listing, list_folder, pin
from flamingo_ckpt.hub.upload import Addition, Commit, commit_files, create_repository
from flamingo_ckpt.tensors import escape, has_control
from flamingo_ckpt.transfer.digests import git_blob_id, sha256_of
from flamingo_ckpt.transfer.pull import RECORD_NAME

#: Hidden files that a repository is meant to have.
_HIDDEN_SENT: Final = (".gitattributes", ".gitignore")
# Smaller files are held in memory between digest and upload, so that nothing can come in between.
_IN_MEMORY_BYTES: Final = 10 << 20
#: Checks without which nothing is sent: the weights can be read, and nothing in them runs.
_ALWAYS: Final = ("container", "safety")
NO_CHECK: Final = "No check was run (--no-check)."


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A file of the folder.

    Attributes:
        path: in the folder, with `/`.
        full: on this machine.
        num_bytes: its size.
        sha256: its digest.
    """

    path: str
    full: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushFile:
    """One file that is to be there.

    Attributes:
        local: it.
        target: its path in the repository.
        status: `new`, `changed` or `same`.
    """

    local: LocalFile
    target: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What a push sends.

    Attributes:
        uri: as the user wrote it.
        place: repository, branch and folder in it.
        head: the commit that the branch is at; None where the repository is to be made.
        files: of the folder, by path.
        left: (path, why) of files that stay here.
        stays: paths over there that the folder does not have.
        findings: what is worth knowing.
    """

    uri: str
    place: hub.HubUri
    head: str | None
    files: tuple[PushFile, ...]
    left: tuple[tuple[str, str], ...]
    stays: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def sent(self) -> list[PushFile]:
        """The files that are not over there already."""
        return [one for one in self.files if one.status != "same"]


def list_local(
    folder: str, report_path: str | None, on_bytes: Callable[[int], None] = lambda _: None
) -> tuple[list[LocalFile], list[tuple[str, str]]]:
    """The files of a folder with their digests, and those that are never sent, with the reason.

    Args:
        folder: to push.
        report_path: the report of its check, which is no part of the release.
        on_bytes: told of bytes as they are read.

    Raises:
        CkptError: FC002 where it is no folder or cannot be read.
        UnsafeError: FC503 for a link that leads out, FC505 for a name with control characters.
    """
    if not os.path.isdir(folder):
        raise CkptError(f"`{escape(folder)}` is no folder", code="FC002", where=escape(folder))
    report = os.path.realpath(report_path) if report_path else ""
    found: list[LocalFile] = []
    left: list[tuple[str, str]] = []
    for path in _walk(folder):
        full = os.path.join(folder, *path.split("/"))
        if _is_hidden(path):
            left.append((path, "hidden"))
        elif report and os.path.realpath(full) == report:
            left.append((path, "the report of the check"))
        else:
            _check_entry(folder, path, full)
            digest, num_bytes = sha256_of(full, on_bytes)
            found.append(LocalFile(path=path, full=full, num_bytes=num_bytes, sha256=digest))
    return found, left


def num_bytes_of(folder: str) -> int:
    """About as much as `list_local` will read; 0 where that cannot be told."""
    total = 0
    for path in _walk(folder):
        try:
            total += 0 if _is_hidden(path) else os.stat(os.path.join(folder, path)).st_size
        except OSError:
            pass  # what is wrong with it is said when it is read
    return total


def _walk(folder: str) -> list[str]:
    """Relative paths of all that is no folder, links to folders among them; hidden folders once."""
    found: list[str] = []
    for root, folders, files in os.walk(folder, onerror=_refuse):
        inside = os.path.relpath(root, folder)
        start = "" if inside == "." else inside.replace(os.sep, "/") + "/"
        stays = [
            one for one in folders if one.startswith(".") or os.path.islink(os.path.join(root, one))
        ]
        folders[:] = sorted(set(folders) - set(stays))
        found += [start + name for name in (*files, *stays)]
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    """What cannot be listed could hold anything."""
    raise CkptError(
        f"cannot list `{escape(str(error.filename))}`: {error.strerror}",
        code="FC002",
        where=str(error.filename),
    )


def _is_hidden(path: str) -> bool:
    is_dotted = any(part.startswith(".") for part in path.split("/"))
    return path == RECORD_NAME or (is_dotted and path.rpartition("/")[2] not in _HIDDEN_SENT)


def _check_entry(folder: str, path: str, full: str) -> None:
    if has_control(path) or "\\" in path:
        raise UnsafeError(
            f"`{escape(path)}` is no name for a file of a repository", code="FC505", where=folder
        )
    if os.path.isdir(full):
        raise UnsafeError(
            f"`{escape(path)}` is a link to a folder, which is not followed",
            code="FC503",
            where=folder,
            hint="put the files themselves there",
        )
    check_contained(folder, full)
    if not os.path.isfile(full):
        raise CkptError(f"`{escape(path)}` is no regular file", code="FC002", where=folder)


def match_report(
    document: Mapping[str, Any], path: str, files: Sequence[LocalFile], folder: str
) -> None:
    """Hold the files to what a report of `check` has seen.

    Args:
        document: the report.
        path: of its file, for messages.
        files: of the folder.
        folder: for messages.

    Raises:
        CkptError: FC630 where it is no report that passed; FC631 for a file that it has not seen;
            FC609 for one with other bytes, or one that is gone.
    """
    _require_pass(document, path)
    seen = {str(one["path"]): one for one in document["files"] if isinstance(one, Mapping)}
    here = {one.path: one for one in files}
    unseen = [one for one in here if one not in seen]
    if unseen:
        raise CkptError(
            "not among the files that the check saw: " + name_some([escape(one) for one in unseen]),
            code="FC631",
            where=folder,
            key=escape(unseen[0]),
            hint="check the folder again, or take them out of it",
        )
    other = [
        one.path
        for one in files
        if (seen[one.path].get("sha256"), seen[one.path].get("num_bytes"))
        != (one.sha256, one.num_bytes)
    ]
    gone = [one for one in seen if one not in here and not _is_hidden(one)]
    if other or gone:
        names = [escape(one) for one in (*other, *gone)]
        raise CkptError(
            f"the report is of other bytes: {name_some(names)} "
            + ("changed since" if other else "is gone" if len(gone) == 1 else "are gone"),
            code="FC609",
            where=path,
            key=names[0],
            hint=f"check the folder again: `flamingo-ckpt check {escape(folder)} --output "
            f"{escape(path)}`",
        )


def _require_pass(document: Mapping[str, Any], path: str) -> None:
    command = document.get("command")
    name = command.get("name") if isinstance(command, Mapping) else None
    why = ""
    if name != "check":
        why = f"it is a report of `{escape(str(name))}`, not of `check`"
    elif document.get("verdict") != "pass" or document.get("exit_code") != 0:
        why = f"its verdict is `{escape(str(document.get('verdict')))}`"
    elif document.get("level") != "all":
        why = f"only `{escape(str(document.get('level')))}` were checked, not every byte"
    elif not isinstance(document.get("files"), list | tuple):
        why = "it lists no files"
    elif idle := _not_run(document):
        why = f"`{idle}` did not run, whatever its policy requires"
    if why:
        raise CkptError(
            f"this report is not one of a passing check: {why}",
            code="FC630",
            where=path,
            hint="run `flamingo-ckpt check` on the folder and mend what it finds",
        )


def _not_run(document: Mapping[str, Any]) -> str:
    """What no policy can make a push go without; "" where it ran."""
    summary = document.get("summary")
    checks = summary.get("checks") if isinstance(summary, Mapping) else None
    checks = checks if isinstance(checks, Mapping) else {}
    return next((one for one in _ALWAYS if checks.get(one) not in ("pass", "warn")), "")


def no_report(folder: str) -> CkptError:
    """FC630 for a push without a report."""
    return CkptError(
        "a push needs the report of a passing check",
        code="FC630",
        where=folder,
        hint=f"`flamingo-ckpt check {escape(folder)} --output report.json`, then `--report "
        "report.json`; `--no-check` goes without, and says so in the commit",
    )


def plan_push(
    uri: str,
    files: Sequence[LocalFile],
    left: Sequence[tuple[str, str]],
    *,
    create: bool,
) -> PushPlan:
    """Compare the folder with what the hub holds.

    Args:
        uri: `hf://OWNER/NAME[@BRANCH][/FOLDER]`.
        files: of the folder.
        left: of the folder, and not sent.
        create: whether a repository that does not exist is to be made.

    Raises:
        CkptError: FC001 nothing to send, FC470 no such repository and `create` is false; else what
            the hub raises.
    """
    place = hub.parse_uri(uri)
    if not files:
        raise CkptError(
            "there is nothing to send", code="FC001", hint="hidden files are never sent"
        )
    head, listing = _remote_state(place, create)
    over_there = {one.path: one for one in listing.files} if listing else {}
    planned = tuple(
        PushFile(local=one, target=target, status=_status(one, over_there.get(target)))
        for one in files
        for target in [place.join(one.path).path]
    )
    targets = {one.target for one in planned}
    stays = tuple(path for path in over_there if path not in targets)
    findings = tuple(
        Finding(
            code="FC631",
            severity="warning",
            key=escape(path),
            detail=f"`{escape(path)}` stays in the repository, and the check has not seen it",
            hint="delete it on the hub if it is not part of this release",
        )
        for path in stays
        if WEIGHT_FILES.fullmatch(path.rpartition("/")[2])
    )
    return PushPlan(
        uri=uri,
        place=place,
        head=head,
        files=planned,
        left=tuple(left),
        stays=stays,
        findings=findings,
    )


def _remote_state(place: hub.HubUri, create: bool) -> tuple[str | None, Listing | None]:
    http = Http()
    try:
        pinned = pin(http, hub.HubUri(repo_id=place.repo_id, revision=place.revision))
    except CkptError as error:
        if error.code != "FC470":
            raise
        if create:
            return None, None
        error.hint = "--create makes it (and --private hides it); else check its spelling and login"
        raise
    listing = list_folder(http, pinned, recursive=True)
    start = f"{place.path}/" if place.path else ""
    below = tuple(one for one in listing.files if one.path.startswith(start))
    return pinned.revision, Listing(uri=pinned, files=below)


def _status(local: LocalFile, remote: HubFile | None) -> str:
    if remote is None:
        return "new"
    return "same" if _is_same(local, remote) else "changed"


def _is_same(local: LocalFile, remote: HubFile) -> bool:
    if remote.num_bytes != local.num_bytes:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == local.sha256
    if remote.blob_id is None or local.num_bytes > _IN_MEMORY_BYTES:
        return False
    with open(local.full, "rb") as file:
        return git_blob_id(file.read()) == remote.blob_id


def run_push(
    plan: PushPlan,
    *,
    message: str,
    description: str,
    direct: bool,
    private: bool,
    shows_progress: bool,
) -> Commit:
    """Send what is not there, commit, and compare what the hub has then.

    Args:
        plan: from `plan_push`, with something to send.
        message: first line of the commit.
        description: the rest of it.
        direct: move the branch; otherwise a pull request is opened.
        private: of a repository that is made.
        shows_progress: whether bars may be drawn.

    Raises:
        CkptError: FC474, FC478; FC609 for a file that changed since its digest was taken.
    """
    head = plan.head
    if head is None:
        create_repository(plan.place.repo_id, private=private)
        head = pin(Http(), hub.HubUri(repo_id=plan.place.repo_id)).revision
    assert head is not None
    before = {one.local.path: _identity(one.local.full) for one in plan.sent}
    # A revision that is itself a pull request is committed to.
    is_request = (plan.place.revision or "").startswith("refs/pr/")
    commit = commit_files(
        plan.place,
        [_addition(one) for one in plan.sent],
        message=message,
        description=description,
        parent=head,
        pull_request=not direct and not is_request,
        shows_progress=shows_progress,
    )
    moved = [one for one in plan.sent if _identity(one.local.full) != before[one.local.path]]
    _compare(plan, commit, [one.target for one in moved])
    return commit


def _identity(path: str) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _addition(one: PushFile) -> Addition:
    content: bytes | str = one.local.full
    if one.local.num_bytes <= _IN_MEMORY_BYTES:
        with open(one.local.full, "rb") as file:
            content = file.read()
    return Addition(path=one.target, content=content, sha256=one.local.sha256)


def _compare(plan: PushPlan, commit: Commit, moved: Sequence[str]) -> None:
    """What the hub lists at the new commit has to be what was to be sent."""
    at = hub.HubUri(repo_id=plan.place.repo_id, revision=commit.oid)
    listing = list_folder(Http(), at, recursive=True)
    over_there = {one.path: one for one in listing.files}
    wrong = [
        one.target
        for one in plan.files
        if one.target not in over_there
        or (one.target not in moved and not _is_as_sent(one.local, over_there[one.target]))
    ]
    if wrong or moved:
        raise CkptError(
            f"commit `{commit.oid}` does not hold what the check saw: "
            + name_some([escape(one) for one in dict.fromkeys([*wrong, *moved])]),
            code="FC478" if not moved else "FC609",
            where=commit.pull_request or commit.url,
            hint="do not merge it, or revert it; then check the folder and push again",
        )


def _is_as_sent(local: LocalFile, remote: HubFile) -> bool:
    if remote.sha256 is None and local.num_bytes > _IN_MEMORY_BYTES:
        return remote.num_bytes == local.num_bytes
    return _is_same(local, remote)
