"""Things that nobody wants to publish: keys, passwords, tokens, and paths of one's own machine.

What is found is never repeated: only its first characters and its length are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

_VALUE: Final = "a value under a name of secrets"
#: (what it is, how it looks, what every such text holds: regular expressions are slow). Forms that
#: their issuers document, or that are unmistakable.
_SECRETS: Final = (
    ("a Hugging Face token", r"\bhf_[A-Za-z0-9]{30,}\b", ("hf_",)),
    ("a Hugging Face organisation token", r"\bapi_org_[A-Za-z0-9]{30,}\b", ("api_org_",)),
    (
        "a GitHub token",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    ),
    ("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}", ("glpat-",)),
    ("an AWS access key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", ("AKIA", "ASIA")),
    ("a Google API key", r"\bAIza[0-9A-Za-z_-]{35}", ("AIza",)),
    ("a Slack token", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}", ("xox",)),
    ("an API key", r"\bsk-(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{32,}", ("sk-",)),
    ("a package index token", r"\bpypi-[A-Za-z0-9_-]{50,}", ("pypi-",)),
    ("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----", ("PRIVATE KEY-----",)),
    (
        "a JSON web token",
        r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}"
        r"\.[A-Za-z0-9_-]{10,2000}",
        (".eyJ",),
    ),
    (
        "a password in an address",
        r"://[^\s/:@\"']{1,64}:(?P<word>[^\s/@\"']{3,64})@",
        ("://",),
    ),
    (
        _VALUE,
        r"(?:api[_-]?key|secret(?:[_-]?key)?|passwd|password|access[_-]?token|auth[_-]?token"
        r"|wandb[_-]?key|hf[_-]?token)[\"']?\s{0,8}[:=]\s{0,8}"
        r"(?:[\"'](?P<quoted>[^\"'\s]{12,200})[\"']"
        r"|(?P<bare>[A-Za-z0-9+/_-]{20,200})[ \t]{0,8}\r?$)",
        ("key", "secret", "passw", "token"),
    ),
)
#: Where people are shown what to write: `hf_xxxxxxxx`, `<token>`, `your-api-key`, `$HF_TOKEN`.
_PLACEHOLDER: Final = re.compile(
    r"[<{$]|(?:pass(?:word|wd)?|token|secret|user)$|x+$|\*+$"
    r"|.*(?:your|example|placeholder|change_?me|redacted|dummy|\.\.\.)",
    re.IGNORECASE,
)
_MIN_DISTINCT = 7
#: That of a URL or of a relative path is none, hence what may stand before; a literal comes first,
#: which is what makes a search fast.
_PATHS: Final = (
    re.compile(
        r"/(?<![\w./~:-]/)(?:home|Users|root|mnt|scratch|data|gpfs|lustre|nfs|fsx|workspace|tmp"
        r"|admin)/[\w.@+-]+(?:/[\w.@+-]+)*"
    ),
    re.compile(r":\\\\?Users\\\\?[\w.@+-]+"),
)
_COMPILED: Final = tuple(
    (what, re.compile(pattern, re.IGNORECASE | re.MULTILINE if what == _VALUE else 0), needles)
    for what, pattern, needles in _SECRETS
)
_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Something found in a text.

    Attributes:
        what: in words.
        shown: as much of it as may be told.
        line: counted from 1.
    """

    what: str
    shown: str
    line: int


def find_secrets(text: str, *, is_vocabulary: bool = False) -> Iterator[Leak]:
    """What looks like a secret, each place once; words of a vocabulary have no values."""
    seen: set[int] = set()
    for what, pattern in _patterns(text, is_vocabulary):
        for match in pattern.finditer(text):
            if match.start() in seen or _is_placeholder(match):
                continue
            seen.add(match.start())
            yield Leak(what=what, shown=_masked(match[0]), line=_line(text, match.start()))


def find_paths(text: str) -> Iterator[Leak]:
    """Absolute paths of somebody's machine."""
    for match in chain.from_iterable(pattern.finditer(text) for pattern in _PATHS):
        yield Leak(what="a path", shown=match[0][:120], line=_line(text, match.start()))


def without_secrets(text: str) -> str:
    """A text that quotes what strangers wrote, with each secret in it masked."""
    for _, pattern in _patterns(text):
        text = pattern.sub(
            lambda match: match[0] if _is_placeholder(match) else _masked(match[0]), text
        )
    return text


def _patterns(text: str, is_vocabulary: bool = False) -> Iterator[tuple[str, re.Pattern[str]]]:
    """The patterns that can be in a text."""
    for what, pattern, needles in _COMPILED:
        if what == _VALUE and is_vocabulary:
            continue
        searched = text.lower() if what == _VALUE else text
        if any(needle in searched for needle in needles):
            yield what, pattern


def _is_placeholder(match: re.Match[str]) -> bool:
    """Whether it stands for a secret, and is none: words for readers, or one letter repeated."""
    groups = match.groupdict()
    value = next((one for one in groups.values() if one), match[0])
    if groups and _PLACEHOLDER.match(value):
        return True
    if groups.get("bare") and not re.search(r"\d", value):
        return True  # the name of a variable
    return "word" not in groups and len(set(value)) < _MIN_DISTINCT


def _masked(secret: str) -> str:
    return f"{secret[:_SHOWN]}... ({len(secret)} characters)"


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
