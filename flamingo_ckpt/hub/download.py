"""Whole files, through `huggingface_hub` and its cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from flamingo_ckpt.hub.failures import Ask, guarded
from flamingo_ckpt.hub.names import endpoint, is_offline

#: What a config or a tokenizer is made of. No code, and no weights.
CONFIG_FILES: Final = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.vocab", "*.bpe")


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    on_bytes: Callable[[int], None] | None = None,
    force: bool = False,
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
        on_bytes: told of bytes as they arrive, instead of `huggingface_hub`'s own progress bar.
        force: download it also where the cache has it.

    Raises:
        CkptError: FC470 no such repository (or none that this login may see), FC471 no such file
            or revision, FC472 a gated repository, FC473 offline and not in the cache, FC474 the
            hub cannot be reached or its answer is broken, FC475 an invalid name.
    """
    ask = Ask(repo_id=repo_id, what=f"`{filename}`", revision=revision)

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
                endpoint=endpoint(),
                force_download=force,
                tqdm_class=_counter(on_bytes) if on_bytes else None,
            )
        )

    return guarded(call, ask)


def _counter(on_bytes: Callable[[int], None]) -> Any:
    """A progress bar that draws nothing and counts."""
    import huggingface_hub.utils as utils

    bar: Any = utils.tqdm  # type: ignore[attr-defined]

    class Counter(bar):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options["disable"] = True
            on_bytes(int(options.get("initial") or 0))
            super().__init__(*arguments, **options)

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    return Counter


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
    ask = Ask(repo_id=repo_id, what=what, revision=revision)

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
                endpoint=endpoint(),
            )
        )

    return guarded(call, ask)


def cached_snapshot(repo_id: str, revision: str | None) -> str:
    """The folder of the cache with what was downloaded of a revision; nobody is asked.

    Raises:
        CkptError: FC473 where there is nothing.
    """
    ask = Ask(repo_id=repo_id, what="a checkpoint", revision=revision)

    def call() -> str:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(repo_id, revision=revision, local_files_only=True))

    return guarded(call, ask)


def remember_revision(snapshot: str, revision: str | None) -> None:
    """Note in the cache which commit a branch was at, as a download by its name does.

    Without it, what was downloaded by commit could not be found by the branch's name offline.

    Args:
        snapshot: the folder of a commit, `.../snapshots/COMMIT`.
        revision: as the user named it.
    """
    snapshots, commit = os.path.split(snapshot)
    if os.path.basename(snapshots) != "snapshots" or revision == commit:
        return
    path = os.path.join(os.path.dirname(snapshots), "refs", *(revision or "main").split("/"))
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="ascii") as file:
            file.write(commit)
    except OSError:
        pass  # a cache that may not be written is one for reading


def _folder(cache_dir: str | os.PathLike[str] | None) -> str | None:
    return None if cache_dir is None else os.fspath(cache_dir)
