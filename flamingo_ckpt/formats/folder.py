"""A release folder is more than its weights: what goes along, what needs asking for, what stays.

Decided by kind, from names and first bytes; nothing is opened beyond its first bytes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from flamingo_ckpt.formats.source import FileSource, check_contained

# Data that a reader of the release needs: configs, tokenizers, processors, cards, pictures.
_CARRIED_SUFFIXES = frozenset(
    """
    .json .txt .md .model .jinja .tiktoken .yaml .yml .spm .vocab .bpe .merges .rst .pdf
    .png .jpg .jpeg .gif .svg .webp
    """.split()
)
_CARRIED_NAMES = frozenset(
    """
    .gitattributes license licence notice copying readme modelfile merges vocab use_policy
    acceptable_use_policy
    """.split()
)
_CODE_SUFFIXES = frozenset({".py"})
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
#: Files that a checkpoint writer made: weights, their shards and their indexes.
WEIGHT_FILES = re.compile(
    r"(model|pytorch_model)(\.[A-Za-z0-9_]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin|npz)"
    r"|(model\.safetensors|pytorch_model\.bin)(\.[A-Za-z0-9_]+)?\.index(\.[A-Za-z0-9_]+)?\.json"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFiles:
    """The files of a folder beside the weights that are read, as relative paths, sorted.

    Attributes:
        carried: configs, tokenizer, processor, card.
        code: Python files and pickles: only on request.
        left: everything else, with the reason.
    """

    carried: tuple[str, ...]
    code: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def sort_files(folder: str, weights: set[str], skip: str = "") -> FolderFiles:
    """Sort the files of `folder`, except those in `weights`.

    Args:
        folder: the source.
        weights: relative names of the files that are read.
        skip: a path that is not looked into: the destination, should it lie in the source.

    Raises:
        UnsafeError: FC503 for a link that leads out of the folder, unless it is to be left anyway.
    """
    carried: list[str] = []
    code: list[str] = []
    left: list[tuple[str, str]] = []
    for relative in _walk(folder, os.path.realpath(skip) if skip else ""):
        if relative in weights:
            continue
        name = os.path.basename(relative)
        suffix = os.path.splitext(name)[1].lower()
        path = os.path.join(folder, relative)
        if WEIGHT_FILES.fullmatch(name):
            left.append((relative, "other weights, or their index"))
        elif not os.path.isfile(path):
            left.append((relative, "not a regular file"))
        elif suffix in _CODE_SUFFIXES or suffix in _PICKLE_SUFFIXES:
            code.append(relative)
        elif is_carried(name):
            (code if _is_pickle(path) else carried).append(relative)
        else:
            left.append((relative, "not a config, tokenizer, processor or card"))
    for relative in (*carried, *code):
        check_contained(folder, os.path.join(folder, relative))
    return FolderFiles(carried=tuple(carried), code=tuple(code), left=tuple(left))


def is_carried(name: str) -> bool:
    """Whether a file is data that a reader of a release needs, by its name."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in _CARRIED_SUFFIXES or _stem(name) in _CARRIED_NAMES


def is_code(name: str) -> bool:
    """Whether a file is a program, by its name."""
    return os.path.splitext(name)[1].lower() in _CODE_SUFFIXES


def is_pickle(name: str) -> bool:
    """Whether a file is of a kind that is a pickle or holds one, by its name."""
    return os.path.splitext(name)[1].lower() in _PICKLE_SUFFIXES


def _stem(name: str) -> str:
    return name.lower() if name.startswith(".") else os.path.splitext(name)[0].lower()


def _walk(folder: str, skip: str) -> list[str]:
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != skip
        )
        inside = os.path.relpath(root, folder)
        found += [name if inside == "." else os.path.join(inside, name) for name in files]
    return sorted(name for name in found if not _is_hidden(name))


def _is_hidden(relative: str) -> bool:
    name = os.path.basename(relative)
    return name.startswith(".") and name != ".gitattributes"


def _is_pickle(path: str) -> bool:
    source = FileSource(path)
    head = source.read(0, min(4, source.size))
    return head[:1] == b"\x80" or head == b"PK\3\4"
