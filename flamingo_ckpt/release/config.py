"""Config: it can be read, agrees with the shapes, and has what loaders ask of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.models.config import ModelConfig
from flamingo_ckpt.release.result import Outcome, finding_of, skipped
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.tensors import TORCH_DTYPES, distinct, escape

_DTYPE_FIELDS = ("dtype", "torch_dtype")


def check_config(subject: Subject) -> Outcome:
    """The release's config against its tensors and against what reads it."""
    if not subject.is_folder and subject.named_config is None:
        return skipped("config", "a single file has no config; check the folder")
    if subject.config_error is not None:
        return _refused(subject, subject.config_error)
    if subject.config is None:
        return _absent(subject)
    told = [f"a {subject.config.kind} model"]
    findings: list[Finding] = []
    compared = []
    for config in _configs(subject, subject.config):
        differences = _shapes(subject, config)
        compared.append(differences is not None)
        findings += differences or []
    if subject.config_path is not None:
        document = subject.json_of(subject.relative(subject.config_path))
        if subject.config_path.endswith("config.json") and "model_type" in document:
            findings += _loaders(document, subject.relative(subject.config_path))
        findings += _dtypes(subject)
    else:
        told.append("by --config")
    if not all(compared):
        told.append("not compared with the tensors, whose layout is not known")
    elif not any(one.code == "FC604" for one in findings):
        told.append("agrees with the shapes of the tensors")
    return Outcome(
        name="config",
        sentence=", ".join(told),
        findings=tuple(findings),
        is_skipped=not all(compared),
    )


def _configs(subject: Subject, config: ModelConfig) -> tuple[ModelConfig, ...]:
    """The config that was named, and the release's own: the one that its users will have."""
    if subject.named_config is None or subject.config_path is None:
        return (config,)
    from flamingo_ckpt.models.config import read_config

    return (config, read_config(os.path.abspath(subject.config_path)))


def _refused(subject: Subject, error: CkptError) -> Outcome:
    """A config that cannot be used; that of a partial model holds only what its shapes prove."""
    assert subject.config_path is not None
    name = subject.relative(subject.config_path)
    try:
        document = subject.json_of(name)
    except CkptError:
        document = None
    mark = document.get("flamingo_ckpt") if isinstance(document, Mapping) else None
    if isinstance(mark, Mapping) and mark.get("partial") is True:
        return skipped(
            "config", f"`{name}` is marked partial: it holds what the shapes prove, and no more"
        )
    finding = error.as_finding()
    return Outcome(
        name="config",
        sentence=error.message,
        findings=(
            Finding(
                code=finding.code,
                severity="error",
                key=name,
                detail=finding.detail,
                hint=finding.hint,
                data={"file": name},
            ),
        ),
        is_skipped=True,
    )


def _absent(subject: Subject) -> Outcome:
    layout = subject.side.detection.layout if subject.side and subject.side.detection else None
    if layout is None or not layout.hf_config:
        return skipped(
            "config",
            "the folder has no config, and names in its layout come without one; --config names "
            "the model",
        )
    return Outcome(
        name="config",
        sentence="the folder has no config.json",
        findings=(
            Finding(
                code="FC610",
                severity="error",
                key="config.json",
                detail=f"there is no `config.json`, and `{layout.name}` is loaded by one",
                hint="copy that of the model; `flamingo-ckpt convert --config` writes it",
            ),
        ),
    )


def _shapes(subject: Subject, config: ModelConfig) -> list[Finding] | None:
    """FC604 for each field that says another size than the tensors have; None for no comparison."""
    from flamingo_ckpt.models.infer import infer_config

    side = subject.side
    if side is None or side.reading is None:
        return None
    shapes = {name: piece.shape for name, piece in side.reading.atoms.items()}
    try:
        proven = infer_config(shapes)
    except CkptError as error:
        return [finding_of(error)]
    where = subject.path_of(config.where) or config.where
    form, findings = _hf_form(config), []
    for dotted, found in _flat(proven.config, ""):
        said = _at(form, dotted)
        if type(said) is type(found) and type(said) is int and said != found:
            finding = Finding(
                code="FC604",
                severity="error",
                key=dotted,
                detail=f"`{escape(where)}` says `{dotted}` is {said}, the tensors have {found}",
                hint="the config is of another model, or was not saved again after a change",
                data={"file": where, "config": said, "tensors": found},
            )
            findings.append(finding)
    return findings


def _hf_form(config: ModelConfig) -> Mapping[str, Any]:
    if config.layout != "open_clip":
        return config.data
    from flamingo_ckpt.models.clip_config import hf_clip_config

    return hf_clip_config(config.data, config.where)


def _flat(mapping: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _at(mapping: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(name)
    return mapping


def _loaders(document: Mapping[str, Any], name: str) -> Iterator[Finding]:
    """What `AutoConfig` and `AutoModel` need, asked of transformers itself."""
    if not document.get("architectures"):
        yield _lacks(
            name,
            "warning",
            "`architectures` is missing: `AutoModel` and the hub cannot tell the class",
            'add the name of the class, as in `"architectures": ["CLIPModel"]`',
        )
    model_type = str(document["model_type"])
    from flamingo_ckpt.models.auto_config import is_known, refusal

    if not is_known(model_type):
        if document.get("auto_map"):
            return
        yield _lacks(
            name,
            "info",
            f"`AutoConfig` of transformers knows no `model_type` `{escape(model_type)}`: the "
            "release is loaded by the code that it is for",
            "say in the card what loads it; here `flamingo_ckpt.load_hf_model` does",
        )
        return
    reason = refusal(document)
    if reason is not None:
        yield _lacks(
            name,
            "error",
            f"`AutoConfig` refuses it: {reason}",
            "mend the field that it names",
        )


def _lacks(name: str, severity: str, detail: str, hint: str) -> Finding:
    return Finding(
        code="FC610",
        severity=severity,
        key=name,
        detail=f"`{name}`: {detail}",
        hint=hint,
        data={"file": name},
    )


def _dtypes(subject: Subject) -> Iterator[Finding]:
    """FC613: transformers makes the model in the dtype that the config states."""
    for field, said, held in dtype_faults(subject):
        assert subject.config_path is not None
        name = subject.relative(subject.config_path)
        yield Finding(
            code="FC613",
            severity="warning",
            key=f"{name}: {field}",
            detail=f"`{name}` says `{field}` is {escape(said)}, the weights are {held}",
            hint="`check --fix --yes` states the dtype of the weights",
            data={"file": name, "config": said, "tensors": held},
        )


def dtype_faults(subject: Subject) -> list[tuple[str, str, str]]:
    """(field, what the config says, what most parameters are), where the two differ."""
    held = main_dtype(subject)
    if held is None or subject.config_path is None or subject.config_error is not None:
        return []
    document = subject.json_of(subject.relative(subject.config_path))
    faults = []
    for field in _DTYPE_FIELDS:
        said = document.get(field)
        known = TORCH_DTYPES.get(said.removeprefix("torch.")) if isinstance(said, str) else None
        if known is not None and known.name != held:
            faults.append((field, str(said), held))
    return faults


def main_dtype(subject: Subject) -> str | None:
    """The floating-point dtype of most parameters, as safetensors spells it."""
    if subject.manifest is None:
        return None
    counts: Counter[str] = Counter()
    for tensor in distinct(subject.manifest.tensors):
        if tensor.dtype.is_real_float:
            counts[tensor.dtype.name] += tensor.num_elements
    return counts.most_common(1)[0][0] if counts else None
