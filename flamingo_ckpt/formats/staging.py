"""Put files and folders in place atomically: staged beside the destination, synced, renamed.

At no moment does the destination look complete without being so. What a killed run leaves behind is
a hidden staging entry that holds a lock no longer; the next run to the same place removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flamingo_ckpt.errors import WriteError
from flamingo_ckpt.formats.linux import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

_MARK = ".flamingo-staging-"
_ASIDE = ".flamingo-replaced-"


@contextmanager
def staged_file(dst: str, *, overwrite: bool) -> Iterator[str]:
    """Give the path of a new empty file beside `dst`; move it to `dst` when the body succeeds.

    Raises:
        WriteError: FC003 where `dst` exists and may not be replaced, FC004 where it cannot be.
    """
    recover(dst)
    check_replaceable(dst, overwrite=overwrite, folder=False)
    with _explained(dst):
        staging = _staging_name(dst)
        # 0o666 leaves the mode to the umask, as `cp` does.
        fd = os.open(
            staging, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
        )
    try:
        with _explained(dst):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield staging
            os.fsync(fd)
            if overwrite:
                os.replace(staging, dst)
            else:
                _rename_new(staging, dst)
            sync_folder(os.path.dirname(dst) or ".")
    except BaseException:
        _unlink_quietly(staging)
        raise
    finally:
        os.close(fd)


@contextmanager
def staged_folder(dst: str, *, overwrite: bool, keep: Callable[[str], bool]) -> Iterator[str]:
    """Give the path of a new folder beside `dst`; exchange it with `dst` when the body succeeds.

    Args:
        dst: the folder to make or replace.
        overwrite: whether it may exist with something in it.
        keep: whether an entry of the existing folder goes along, by its name; one that the body
            made itself is never replaced.

    Raises:
        WriteError: FC003 or FC004.
    """
    dst = os.path.abspath(dst)  # `.` has no name to stage beside
    recover(dst)
    check_replaceable(dst, overwrite=overwrite, folder=True)
    with _explained(dst):
        staging = _staging_name(dst)
        os.mkdir(staging, 0o777)
        fd = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _explained(dst):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield staging
            if os.path.isdir(dst):
                _keep_entries(dst, staging, [name for name in os.listdir(dst) if keep(name)])
            os.fsync(fd)
            replaced = _put_folder(staging, dst, overwrite=overwrite)
            sync_folder(os.path.dirname(dst) or ".")
            if replaced:
                # The new one is in place; what cannot be removed now, the next run removes.
                shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(fd)


def check_replaceable(dst: str, *, overwrite: bool, folder: bool) -> None:
    """Raise FC003 or FC004 before any work is done, where `dst` cannot become what is asked."""
    if not dst:
        raise WriteError("the destination is empty", code="FC004", hint="name a file or a folder")
    parent = os.path.dirname(dst.rstrip("/")) or "."
    if folder and os.path.ismount(dst):
        raise WriteError(
            f"`{dst}` is a mount point, which cannot be exchanged",
            code="FC004",
            where=dst,
            hint="name a folder in it",
        )
    if os.path.islink(dst.rstrip("/")):
        raise WriteError(
            f"`{dst}` is a symbolic link",
            code="FC004",
            where=dst,
            hint="name what it points to, or remove the link",
        )
    if not os.path.isdir(parent):
        raise WriteError(
            f"there is no folder `{parent}`", code="FC004", where=dst, hint=f"mkdir -p {parent}"
        )
    if not os.path.lexists(dst):
        return
    if os.path.isdir(dst) != folder:
        kind = "a folder" if os.path.isdir(dst) else "not a folder"
        raise WriteError(
            f"`{dst}` exists and is {kind}",
            code="FC003",
            where=dst,
            hint="name another destination"
            + ("" if folder else ", or a folder as it is: without a file suffix"),
        )
    if not overwrite and not (folder and not os.listdir(dst)):
        raise WriteError(
            f"`{dst}` exists",
            code="FC003",
            where=dst,
            hint="to replace it: --overwrite",
        )


def sync_folder(path: str) -> None:
    """Make a rename or a new name in this folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path: str, data: bytes) -> None:
    """A small new file, synced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        write_all(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at_path(path: str, data: bytes) -> None:
    """Into an existing file, such as a staged one."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        write_all(fd, memoryview(data), 0)
    finally:
        os.close(fd)


def write_all(fd: int, block: memoryview, offset: int) -> None:
    """All of `block` at `offset`, however often the system has to be asked."""
    while block:
        written = os.pwrite(fd, block, offset)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        block, offset = block[written:], offset + written


def check_space(folder: str, num_bytes: int, dst: str) -> None:
    """Raise FC004 where the disk has less room than the plan needs."""
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if num_bytes > free:
        raise WriteError(
            f"{num_bytes} bytes are needed, the disk has {free} free",
            code="FC004",
            where=dst,
            hint="free some space, or name a destination on another disk",
        )


def _staging_name(dst: str, mark: str = _MARK) -> str:
    folder, name = os.path.split(dst)
    return os.path.join(folder, f".{name[:200]}{mark}{secrets.token_hex(6)}")


def recover(dst: str) -> None:
    """Remove what a killed run left for this destination; a live one holds its lock.

    Where there is no renameat2, a run can be killed between its two renames: then the old folder
    stands aside, and is put back before anything is decided about it.
    """
    dst = os.path.abspath(dst)
    folder, name = os.path.split(dst)
    if not os.path.isdir(folder):
        return
    with _explained(dst):
        _recover(dst, folder, name)


def _recover(dst: str, folder: str, name: str) -> None:
    for entry in os.listdir(folder):
        if entry.startswith(f".{name[:200]}{_ASIDE}"):
            aside = os.path.join(folder, entry)
            if os.path.lexists(dst):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(aside, dst)
        if not entry.startswith(f".{name[:200]}{_MARK}"):
            continue
        path = os.path.join(folder, entry)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                _unlink_quietly(path)
        finally:
            os.close(fd)


def _keep_entries(dst: str, staging: str, keep: list[str]) -> None:
    for name in keep:
        src, new = os.path.join(dst, name), os.path.join(staging, name)
        if os.path.lexists(new):
            continue
        if os.path.isdir(src) and not os.path.islink(src):
            shutil.copytree(src, new, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(src, new)


def _link_or_copy(src: str, dst: str) -> None:
    try:
        os.link(src, dst, follow_symlinks=False)
    except OSError:
        shutil.copy2(src, dst, follow_symlinks=False)


def _put_folder(staging: str, dst: str, *, overwrite: bool) -> str | None:
    """Move the staged folder to `dst`; returns where the old one is now, if there was one."""
    if not os.path.lexists(dst):
        _rename_new(staging, dst)
        return None
    if renameat2(staging, dst, RENAME_EXCHANGE):
        if not overwrite and (not os.path.isdir(staging) or os.listdir(staging)):
            renameat2(staging, dst, RENAME_EXCHANGE)
            raise _came_meanwhile(dst)
        return staging
    aside = _staging_name(dst, _ASIDE)
    os.rename(dst, aside)
    try:
        if not overwrite and (not os.path.isdir(aside) or os.listdir(aside)):
            raise _came_meanwhile(dst)
        os.rename(staging, dst)
    except BaseException:
        os.rename(aside, dst)
        raise
    return aside


def _rename_new(staging: str, dst: str) -> None:
    """Rename, but never over something that came into being meanwhile."""
    if not renameat2(staging, dst, RENAME_NOREPLACE):
        if os.path.lexists(dst):
            raise _came_meanwhile(dst)
        os.rename(staging, dst)


def _came_meanwhile(dst: str) -> OSError:
    return FileExistsError(errno.EEXIST, "it came into being meanwhile", dst)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


_HINTS = {
    errno.ENOSPC: "free some space, or name a destination on another disk",
    errno.EDQUOT: "your quota is full; name a destination elsewhere",
    errno.EROFS: "the destination is read-only; name another",
    errno.EACCES: "you may not write there; name another destination",
    errno.EPERM: "you may not write there; name another destination",
    errno.EEXIST: "to replace it: --overwrite",
}


@contextmanager
def _explained(dst: str) -> Iterator[None]:
    """Turn the system's errors into ours, with the way on."""
    try:
        yield
    except OSError as error:
        code = "FC003" if error.errno == errno.EEXIST else "FC004"
        raise WriteError(
            f"cannot write `{dst}`: {error.strerror or error}",
            code=code,
            where=dst,
            hint=_HINTS.get(error.errno or 0),
        ) from error
