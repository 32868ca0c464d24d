"""Tokenizer: the tokens that the model was trained with, and a row of the embedding for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.result import Outcome, failed, skipped
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import escape
from flamingo_ckpt.vocabulary import EMBED

_TEXT_EMBED = "text.token_embedding.weight"
_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")
_ANY = (*_FILES, "tokenizer.model", "merges.txt", "spiece.model", "vocab.txt")
#: kind of model -> tokens that it does not work without.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "flamingo": ("<image>", "<|endofchunk|>"),
    "paligemma": ("<image>",),
}
#: config field -> the token that it is the id of.
_IDS: Mapping[str, Mapping[str, str]] = {
    "flamingo": {"media_token_id": "<image>", "eoc_token_id": "<|endofchunk|>"},
    "paligemma": {"image_token_index": "<image>", "image_token_id": "<image>"},
}
_INTEGER: Final = re.compile(r"[0-9]{1,9}")
#: The tokenizer of PaliGemma has 34 MB.
_MAX_BYTES: Final = 256 << 20
#: Rows beyond the last token that padding to a multiple explains.
_MAX_PADDING = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What the tokenizer's files say.

    Attributes:
        ids: token -> id.
        files: that were read.
        conflicts: (token, file, id there) where a file contradicts one before it.
    """

    ids: Mapping[str, int]
    files: tuple[str, ...]
    conflicts: tuple[tuple[str, str, int], ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows that an embedding needs: one more than the highest id."""
        return max(self.ids.values(), default=-1) + 1


def check_tokenizer(subject: Subject) -> Outcome:
    """Tokens of the tokenizer against the rows of the embedding and the ids in the config."""
    if not subject.is_folder:
        return skipped("tokenizer", "a single file has no tokenizer; check the folder")
    if not any(name in subject.by_path for name in _ANY):
        return _absent(subject)
    try:
        tokens = read_tokens(subject)
    except CkptError as error:
        return failed("tokenizer", error)
    if tokens is None:
        return skipped(
            "tokenizer",
            "it is not in a form that is read here: there is neither a `tokenizer.json` nor a "
            "`vocab.json` with words in it",
        )
    rows = _rows(subject)
    kind = subject.config.kind if subject.config is not None else ""
    findings = [*_conflicts(tokens), *_needed(tokens, kind, subject)]
    if rows is not None:
        findings += _fit(tokens, rows)
    sentence = f"{tokens.num_rows} ids in {', '.join(f'`{one}`' for one in tokens.files)}"
    if rows is not None:
        sentence += f", {rows} rows in the embedding"
    return Outcome(
        name="tokenizer",
        sentence=sentence,
        findings=tuple(findings),
        is_skipped=rows is None,
    )


def _absent(subject: Subject) -> Outcome:
    kind = subject.config.kind if subject.config is not None else ""
    if kind not in _NEEDED:
        return skipped("tokenizer", "the folder has no tokenizer")
    return Outcome(
        name="tokenizer",
        sentence="the folder has no tokenizer",
        findings=(
            Finding(
                code="FC605",
                severity="warning",
                key="tokenizer.json",
                detail=f"there is no tokenizer, and a {kind} model has tokens of its own: "
                + ", ".join(f"`{one}`" for one in _NEEDED[kind]),
                hint="save the tokenizer that the model was trained with into the folder",
            ),
        ),
        is_skipped=True,
    )


def read_tokens(subject: Subject) -> Tokens | None:
    """The tokens by the JSON files of a tokenizer, or None where it has none that list them.

    Raises:
        CkptError: FC401 for what is not JSON, FC605 for ids that are none.
    """
    ids: dict[str, int] = {}
    read: list[str] = []
    has_vocabulary = False
    conflicts: list[tuple[str, str, int]] = []
    for name in _FILES:
        try:
            document = subject.json_of(name, _MAX_BYTES)
        except CkptError as error:
            raise error.at(name) from None
        if not isinstance(document, Mapping):
            continue
        found = _tokens_in(name, document)
        if name in ("tokenizer.json", "vocab.json"):
            has_vocabulary |= bool(_words(document) if name == "tokenizer.json" else found)
        if found:
            read.append(name)
        for token, number in found:
            if type(number) is not int or not 0 <= number < 1 << 31:
                raise CkptError(
                    f"`{name}` gives `{escape(str(token))[:60]}` the id "
                    f"{escape(repr(number))[:40]}",
                    code="FC605",
                    where=name,
                )
            if ids.setdefault(token, number) != number:
                conflicts.append((token, name, number))
    if not has_vocabulary:
        return None
    return Tokens(ids=ids, files=tuple(read), conflicts=tuple(conflicts))


def _tokens_in(name: str, document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if name == "tokenizer.json":
        return _fast(document)
    if name == "tokenizer_config.json":
        added = document.get("added_tokens_decoder")
        if not isinstance(added, Mapping):
            return []
        return [
            (one["content"], int(number) if _INTEGER.fullmatch(number) else number)
            for number, one in added.items()
            if isinstance(one, Mapping) and isinstance(one.get("content"), str)
        ]
    return [(token, number) for token, number in document.items() if isinstance(token, str)]


def _words(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The vocabulary of a fast tokenizer, without what was added to it."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        return list(vocabulary.items())
    return [  # unigram: pairs of a piece and its score
        (one[0], at)
        for at, one in enumerate(vocabulary if isinstance(vocabulary, list) else ())
        if isinstance(one, list) and one and isinstance(one[0], str)
    ]


def _fast(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = _words(document)
    added = document.get("added_tokens")
    for one in added if isinstance(added, list) else ():
        if isinstance(one, Mapping) and isinstance(one.get("content"), str):
            found.append((one["content"], one.get("id")))
    return found


def _rows(subject: Subject) -> int | None:
    side = subject.side
    if side is None or side.reading is None:
        return None
    for name in (EMBED, _TEXT_EMBED):
        if name in side.reading.atoms:
            return side.reading.atoms[name].shape[0]
    return None


def _conflicts(tokens: Tokens) -> Iterator[Finding]:
    """Files of one tokenizer that do not agree: which of them counts depends on its reader."""
    for token, name, number in tokens.conflicts:
        is_needed = any(token in needed for needed in _NEEDED.values())
        yield _unfit(
            token,
            f"`{name}` gives `{escape(token)[:60]}` the id {number}, another file of the tokenizer "
            f"{tokens.ids[token]}",
            "save the tokenizer again: one of its files is of another one",
            severity="error" if is_needed else "warning",
        )


def _needed(tokens: Tokens, kind: str, subject: Subject) -> Iterator[Finding]:
    for token in _NEEDED.get(kind, ()):
        if token not in tokens.ids:
            yield _unfit(
                token,
                f"the tokenizer has no `{token}`, which a {kind} model was trained with",
                "add it as training did, and save the tokenizer again",
            )
    data = subject.config.data if subject.config is not None else {}
    for field, token in _IDS.get(kind, {}).items():
        said, has = data.get(field), tokens.ids.get(token)
        if isinstance(said, int) and has is not None and said != has:
            yield _unfit(
                field,
                f"the config says `{field}` is {said}, the tokenizer gives `{token}` the id {has}",
                "tokenizer and config are of different releases",
            )


def _fit(tokens: Tokens, rows: int) -> Iterator[Finding]:
    if tokens.num_rows > rows:
        last = max(tokens.ids, key=lambda one: tokens.ids[one])
        yield _unfit(
            "embedding",
            f"the tokenizer has ids up to {tokens.num_rows - 1} (`{escape(last)[:60]}`), the "
            f"embedding {rows} rows",
            "the embedding was not resized for the added tokens, or is of another release",
        )
    elif rows - tokens.num_rows >= _MAX_PADDING:
        yield _unfit(
            "embedding",
            f"the embedding has {rows} rows, {rows - tokens.num_rows} more than the tokenizer has "
            "ids",
            "is it this model's tokenizer, with its added tokens?",
            severity="warning",
        )


def _unfit(key: str, detail: str, hint: str, severity: str = "error") -> Finding:
    return Finding(code="FC605", severity=severity, key=key, detail=detail, hint=hint)
