"""A report of `check` with something of everything, built by hand: renderings need no release."""

from __future__ import annotations

from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report, to_document
from tests.report.parity_support import hidden

NAMES = ("container", "keys", "bits", "values", "parity", "safety", "card", "signature")
STATUS = {"bits": "skip", "signature": "skip", "values": "warn", "card": "fail", "parity": "fail"}


def check(**changes: Any) -> Report:
    """Two errors, two warnings, a required check that did not run, and a waiver."""
    parity = to_document(hidden())
    fields = ("summary", "blame", "parameters", "greedy", "data", "sides", "judgement", "seconds")
    findings = [
        finding("FC601", "error", "card", "`README.md` has no `license`", file="README.md", line=1),
        finding("FC480", "error", "parity", "diverges at `xattn.1`"),
        finding("FC623", "warning", "bits", "`bits` is required, and was not run"),
        finding("FC351", "warning", "values", "`a.gate` is exactly 0", key="a.gate"),
    ]
    told: dict[str, Any] = {
        "command": "check",
        "argv": ("check", "out/", "--policy", "p.toml"),
        "verdict": "fail",
        "exit_code": 1,
        "inputs": (release(),),
        "summary": {
            "errors": 2,
            "warnings": 2,
            "skipped": 2,
            "waived": 1,
            "checks": {name: STATUS.get(name, "pass") for name in NAMES},
        },
        "findings": tuple(findings),
        "duration_seconds": 3.5,
        "extra": {
            "level": "all",
            "checks": [row(name, findings) for name in NAMES],
            "files": [{"path": "README.md", "num_bytes": 12, "sha256": "ab" * 32}],
            "source": "checkpoint.pt",
            "policy": {"source": "p.toml", "sha256": "cd" * 32, "required": ["bits"], "waivers": 1},
            "waived": [
                {
                    "code": "FC352",
                    "key": "a.inv_freq",
                    "detail": "`a.inv_freq` has 2 NaN",
                    "severity": "error",
                    "check": "values",
                    "reason": "a buffer, computed again at load",
                    "owner": "release-team",
                    "until": "2027-01-31",
                }
            ],
            "parity": {name: parity[name] for name in fields},
            "bits": None,
            "content": None,
            "tensors": [
                {"name": f"layers.{at}.w", "dtype": "F32", "shape": [2, 2], "num_bytes": 16}
                | {"shard": None}
                for at in range(3)
            ],
            "fixes": [{"path": "a.safetensors", "what": "mode 0600 to 0644", "applied": False}],
        },
    }
    return Report(**{**told, **changes})


def release(uri: str = "out/") -> dict[str, Any]:
    none = {"layout": None, "prefix": None, "wrapper": None}
    return {"uri": uri, "format": "safetensors", **none, "num_tensors": 3, "num_bytes": 48}


def finding(
    code: str, severity: str, name: str, detail: str, key: str | None = None, **data: Any
) -> Finding:
    data = {"check": name, **data}
    hint = "the way on" if severity == "error" else None
    return Finding(code=code, severity=severity, detail=detail, key=key, hint=hint, data=data)


def row(name: str, findings: list[Finding]) -> dict[str, Any]:
    own = [one for one in findings if one.data["check"] == name]
    return {
        "name": name,
        "status": STATUS.get(name, "pass"),
        "required": name == "bits",
        "sentence": f"what was seen of `{name}`",
        "num_errors": sum(one.severity == "error" for one in own),
        "num_warnings": sum(one.severity == "warning" for one in own),
        "num_waived": int(name == "values"),
        "seconds": 0.25,
    }
