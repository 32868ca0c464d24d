"""Things that nobody wants to publish: keys, passwords, tokens, and paths of one's own machine.

What is found is never repeated: only its first characters and its length are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: (what it is, how it looks). Forms that their issuers document, or that are unmistakable.
_SECRETS: Final = (
    ("a Hugging Face token", r"\bhf_[A-Za-z0-9]{30,}\b"),
    ("a Hugging Face organisation token", r"\bapi_org_[A-Za-z0-9]{30,}\b"),
    ("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b"),
    ("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("an AWS access key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    ("a Google API key", r"\bAIza[0-9A-Za-z_-]{35}"),
    ("a Slack token", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    ("an API key", r"\bsk-(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{32,}"),
    ("a package index token", r"\bpypi-[A-Za-z0-9_-]{50,}"),
    ("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    (
        "a JSON web token",
        r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}"
        r"\.[A-Za-z0-9_-]{10,2000}",
    ),
    (
        "a password in an address",
        r"\b[a-z][a-z0-9+.-]{1,15}://[^\s/:@\"']{1,64}:(?P<word>[^\s/@\"']{3,64})@",
    ),
    (
        "a value under a name of secrets",
        r"(?:api[_-]?key|secret(?:[_-]?key)?|passwd|password|access[_-]?token|auth[_-]?token"
        r"|wandb[_-]?key|hf[_-]?token)[\"']?\s{0,8}[:=]\s{0,8}"
        r"(?:[\"'](?P<quoted>[^\"'\s]{12,200})[\"']"
        r"|(?P<bare>[A-Za-z0-9+/_-]{20,200})[ \t]{0,8}\r?$)",
    ),
)
#: Where people are shown what to write: `hf_xxxxxxxx`, `<token>`, `your-api-key`, `$HF_TOKEN`.
_PLACEHOLDER: Final = re.compile(
    r"[<{$]|(?:pass(?:word|wd)?|token|secret|user)$|x+$|\*+$"
    r"|.*(?:your|example|placeholder|change_?me|redacted|dummy|\.\.\.)",
    re.IGNORECASE,
)
_MIN_DISTINCT = 7
_PATHS: Final = re.compile(
    r"(?<![\w./~:-])(?:/(?:home|Users|root|mnt|scratch|data|gpfs|lustre|nfs|fsx|workspace|tmp|admin)"
    r"/[\w.@+-]+(?:/[\w.@+-]+)*|[A-Za-z]:\\\\?Users\\\\?[\w.@+-]+)"
)
_COMPILED: Final = tuple(
    (what, re.compile(pattern, re.IGNORECASE | re.MULTILINE if "names" in what else 0))
    for what, pattern in _SECRETS
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


def find_secrets(text: str) -> Iterator[Leak]:
    """What looks like a secret, each place once."""
    seen: set[int] = set()
    for what, pattern in _COMPILED:
        for match in pattern.finditer(text):
            if match.start() in seen or _is_placeholder(match):
                continue
            seen.add(match.start())
            yield Leak(what=what, shown=_masked(match[0]), line=_line(text, match.start()))


def find_paths(text: str) -> Iterator[Leak]:
    """Absolute paths of somebody's machine."""
    for match in _PATHS.finditer(text):
        yield Leak(what="a path", shown=match[0][:120], line=_line(text, match.start()))


def without_secrets(text: str) -> str:
    """A text that quotes what strangers wrote, with each secret in it masked."""
    for _, pattern in _COMPILED:
        text = pattern.sub(
            lambda match: match[0] if _is_placeholder(match) else _masked(match[0]), text
        )
    return text


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
