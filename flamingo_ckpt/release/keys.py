"""Keys: every tensor is one that the model has, and every one that the model has is there."""

from __future__ import annotations

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.config import main_dtype
from flamingo_ckpt.release.result import Outcome, failed, skipped
from flamingo_ckpt.release.subject import Subject


def check_keys(subject: Subject) -> Outcome:
    """The checkpoint against the model that its config describes, constructed without weights."""
    if subject.manifest is None:
        return skipped("keys", "the checkpoint cannot be read")
    target = subject.named_config or subject.config_path
    if subject.config is None or target is None:
        why = (
            "the config cannot be used: " + subject.config_error.message
            if subject.config_error is not None
            else "there is no config that says which tensors the model has; --config names one"
        )
        return skipped("keys", why)
    from flamingo_ckpt.diff.compare import diff
    from flamingo_ckpt.prepare import open_sides

    uri = target if target.startswith("model:") else f"model:{target}"
    try:
        a, b, dims = open_sides(subject.uri, uri, **subject.reading)
        result = diff(a, b, level="headers", dims=dims)
    except CkptError as error:
        return failed("keys", error)
    told = (*a.findings, *result.findings)
    findings = tuple(one for one in told if not _is_in_main_dtype(one, subject))
    wrong = len({one.key for one in findings if one.severity == "error"})
    absent = len(result.expected_absent)
    alike = len(result.same) + len(told) - len(findings)
    sentence = f"{alike} of {len(a.manifest.tensors)} tensors are the model's, by name "
    sentence += "and shape"
    if absent:
        sentence += f"; {absent} absent by design"
    if wrong:
        sentence += f"; {wrong} wrong"
    return Outcome(name="keys", sentence=sentence, findings=findings)


def _is_in_main_dtype(finding: Finding, subject: Subject) -> bool:
    """Whether a tensor only has the dtype of the release where its config states another.

    That is one fault of the config (FC613), and not one of each tensor.
    """
    return finding.code == "FC206" and finding.data["dtype"][0] == main_dtype(subject)
