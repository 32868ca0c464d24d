"""Keys: every tensor is one that the model has, and every one that the model has is there."""

from __future__ import annotations

from flamingo_ckpt.errors import CkptError
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
    findings = (*a.findings, *result.findings)
    wrong = len({one.key for one in findings if one.severity == "error"})
    absent = len(result.expected_absent)
    sentence = f"{len(result.same)} of {len(a.manifest.tensors)} tensors are the model's, by name "
    sentence += "and shape"
    if absent:
        sentence += f"; {absent} absent by design"
    if wrong:
        sentence += f"; {wrong} wrong"
    return Outcome(name="keys", sentence=sentence, findings=findings)
