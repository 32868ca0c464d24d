"""Card: a README with a license, and the models that this one was made from, pinned."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.release.folder import read_text
from flamingo_ckpt.release.record import find_record
from flamingo_ckpt.release.result import Outcome, failed, skipped
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.release.yaml_text import load_yaml
from flamingo_ckpt.tensors import escape

CARD_NAME: Final = "README.md"
_MAX_BYTES = 4 << 20
#: As the hub reads it: blank lines may stand before it.
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MAX_FRONT = 256 << 10
#: How a card pins a repository: as people write it, and as links to the hub have it.
_PIN = re.compile(r"(?:@|/(?:tree|commit|blob|resolve)/)[0-9a-f]{40}\b")
_ID = string.ascii_letters + string.digits + "._-/"
_MAX_ID = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A model card.

    Attributes:
        text: all of it.
        data: its front matter.
    """

    text: str
    data: Mapping[str, Any]

    @property
    def base_models(self) -> tuple[str, ...]:
        """The ids that `base_model` names."""
        named = self.data.get("base_model")
        found = named if isinstance(named, list) else [named]
        return tuple(one for one in found if isinstance(one, str) and one.strip())

    def line_of(self, field: str) -> int:
        """The line of a field of the front matter; 1 where it is not there."""
        for at, line in enumerate(self.text.splitlines(), start=1):
            if line.startswith(f"{field}:"):
                return at
        return 1


def parse_card(text: str) -> Card:
    """A card from its text; one without front matter has no fields.

    Raises:
        CkptError: FC602 for front matter that is not YAML, or not a mapping.
    """
    match = _FRONT.match(text)
    if match is None:
        return Card(text=text, data={})
    front = match[1] or ""
    try:
        data = load_yaml(front, _MAX_FRONT)
    except ValueError as error:
        raise CkptError(
            f"the front matter of `{CARD_NAME}` is not YAML: {escape(str(error))[:200]}",
            code="FC602",
            where=CARD_NAME,
            hint="the hub cannot read it either",
        ) from None
    if data is not None and not isinstance(data, Mapping):
        raise CkptError(
            f"the front matter of `{CARD_NAME}` is no list of fields",
            code="FC602",
            where=CARD_NAME,
            hint="write `license: mit` and its like between the two lines of ---",
        )
    return Card(text=text, data=data or {})


def check_card(
    subject: Subject, licenses: tuple[str, ...] = (), content_digest: str | None = None
) -> Outcome:
    """License, base models and conversion record of the card.

    Args:
        subject: the release.
        licenses: that the policy allows; empty for any.
        content_digest: of the weights as they are, to compare the record with; None where they
            were not read.
    """
    if not subject.is_folder:
        return skipped("card", "a single file has no card; check the folder")
    file = subject.by_path.get(CARD_NAME)
    if file is None or not file.is_regular:
        finding = _finding(
            "FC602",
            "error",
            CARD_NAME,
            f"there is no `{CARD_NAME}`",
            "write one; its front matter needs at least `license:` and `base_model:`",
            1,
        )
        return Outcome(name="card", sentence="the folder has no card", findings=(finding,))
    try:
        card = parse_card(read_text(file, _MAX_BYTES))
        record = find_record(card.text)
    except CkptError as error:
        return failed("card", error)
    findings = [
        *_license(card, licenses),
        *_base_models(card, subject),
        *_record(card, record, content_digest),
    ]
    told = []
    if card.data.get("license"):
        told.append(f"license `{escape(str(card.data['license']))[:60]}`")
    if card.base_models:
        told.append("made from " + ", ".join(f"`{escape(one)[:80]}`" for one in card.base_models))
    if record is not None:
        told.append("with a conversion record")
    return Outcome(
        name="card",
        sentence=", ".join(told) or "it says neither license nor base model",
        findings=tuple(findings),
    )


def _license(card: Card, allowed: tuple[str, ...]) -> Iterator[Finding]:
    named = card.data.get("license")
    if not isinstance(named, str | list) or not named:
        yield _finding(
            "FC601",
            "error",
            "license",
            f"`{CARD_NAME}` has no `license`",
            "add `license: mit`, or the one that holds, to its front matter; for one of your own "
            "`license: other` with `license_name` and `license_link`",
            1,
        )
        return
    names = [str(one) for one in (named if isinstance(named, list) else [named])]
    line = card.line_of("license")
    if "other" in names and not card.data.get("license_name"):
        yield _finding(
            "FC601",
            "warning",
            "license",
            "the license is `other`, and `license_name` does not say which",
            "add `license_name` and `license_link`",
            line,
        )
    refused = [one for one in names if allowed and one not in allowed]
    if refused:
        yield _finding(
            "FC601",
            "error",
            "license",
            f"the license is `{escape(refused[0])[:60]}`, the policy allows "
            + ", ".join(f"`{one}`" for one in allowed),
            "choose one of them, or extend `licenses` in the policy",
            line,
        )


def _base_models(card: Card, subject: Subject) -> Iterator[Finding]:
    if not card.base_models:
        if _is_flamingo(subject):
            yield _finding(
                "FC603",
                "error",
                "base_model",
                f"`{CARD_NAME}` names no `base_model`, and a Flamingo is made of two: a CLIP and a "
                "language model",
                "add `base_model:` with the id of the language model to its front matter",
                1,
            )
        return
    pinned = _pinned(card.text)
    for name in dict.fromkeys(card.base_models):
        if name.strip() in pinned:
            continue
        yield _finding(
            "FC603",
            "warning",
            name,
            f"`{CARD_NAME}` names `{escape(name)[:100]}` without a commit: what is there may "
            "change",
            f"write `{escape(name)[:100]}@` and the 40 digits of the commit somewhere in the card",
            card.line_of("base_model"),
        )


def _is_flamingo(subject: Subject) -> bool:
    """By its config, and where it has none by its trained parts: a language model alone is none."""
    if subject.config is not None:
        return subject.config.kind == "flamingo"
    reading = subject.side.reading if subject.side is not None else None
    return reading is not None and any(
        group_of(name) in ("perceiver", "xattn") for name in reading.atoms
    )


def _pinned(text: str) -> set[str]:
    """The ids of repositories that stand before a commit."""
    found = set()
    for match in _PIN.finditer(text):
        before = text[max(0, match.start() - _MAX_ID) : match.start()]
        named = before[len(before.rstrip(_ID)) :].split("/")
        found.add("/".join(named[-2:]))
        found.add(named[-1] if len(named) == 1 else "")
    return found - {""}


def _record(
    card: Card, record: Mapping[str, Any] | None, content_digest: str | None
) -> Iterator[Finding]:
    if record is None:
        yield _finding(
            "FC611",
            "info",
            "record",
            f"`{CARD_NAME}` has no conversion record",
            "`flamingo-ckpt check --source SRC --record` writes one",
            1,
        )
        return
    said = record.get("content")
    if content_digest is not None and said != content_digest:
        yield _finding(
            "FC611",
            "error",
            "record",
            f"the conversion record in `{CARD_NAME}` is of other weights: it says "
            f"`{escape(str(said))[:60]}`, they are `{content_digest}`",
            "`flamingo-ckpt check --source SRC --record` writes it again",
            1 + card.text[: card.text.index("flamingo-ckpt conversion record")].count("\n"),
        )


def _finding(code: str, severity: str, key: str, detail: str, hint: str, line: int) -> Finding:
    return Finding(
        code=code,
        severity=severity,
        key=key,
        detail=detail,
        hint=hint,
        data={"file": CARD_NAME, "line": line},
    )
