"""Reports of `parity`, built by hand: the renderings need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report

BOTH = (("as-is", "float32"), ("forced", "float32"))
NOISE = {"float32": 2e-7, "float64": 1e-15, "bfloat16": 4e-3}


def stage_names(vision: int, perceiver: int, language: int, every: int = 1) -> list[str]:
    """In the order in which a Flamingo model computes them."""
    names = [f"vision.layers.{at}" for at in range(vision)]
    names += [f"perceiver.layers.{at}" for at in range(perceiver)]
    for at in range(language):
        names += [f"xattn.{at}"] if at % every == 0 else []
        names.append(f"language.layers.{at}")
    return [*names, "logits"]


TEN = stage_names(3, 2, 2)
MANY = stage_names(24, 6, 45)  # 121 stages


def cell(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    decides = dtype in ("float32", "float64")
    noise = NOISE[dtype]
    return {
        "max_abs": noise * 2,
        "rel": noise,
        "cosine": 1.0,
        "noise": noise,
        "tolerance": noise * 16 if decides else None,
        "agrees": True if decides else None,
        "only_in": None,
        **changes,
    }


def diverging(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    decides = dtype in ("float32", "float64")
    far = {"max_abs": 2.31, "rel": 0.44, "cosine": 0.912, "agrees": False if decides else None}
    return cell(dtype, **far, **changes)


def report(
    names: Sequence[str] = TEN,
    passes: Sequence[tuple[str, str]] = BOTH,
    *,
    diverge: Mapping[str, str] | None = None,
    cells: Mapping[tuple[str, int], Mapping[str, Any] | None] | None = None,
    findings: Sequence[Finding] = (),
    verdict: str | None = None,
    uri: str = "checkpoint.pt",
    **extra: Any,
) -> Report:
    """A report whose passes diverge from `diverge[gates]` on; `cells` replaces single cells."""
    places = diverge or {}
    layers = []
    first: list[str | None] = [None] * len(passes)
    for at, name in enumerate(names):
        row: list[Any] = []
        for number, (gates, dtype) in enumerate(passes):
            place = places.get(gates)
            far = place is not None and names.index(place) <= at
            one: Any = (diverging if far else cell)(dtype)
            if cells and (name, number) in cells:
                change = cells[name, number]
                one = None if change is None else {**one, **change}
            if one and one["agrees"] is False and first[number] is None:
                first[number] = name
            row.append(one)
        layers.append({"stage": name, "module": [f"a.{name}", f"b.{name}"], "passes": row})
    told = [
        {
            "gates": gates,
            "dtype": dtype,
            "device": "cpu",
            "decides": dtype in ("float32", "float64"),
            "max_abs": 2.31 if gates in places else 4e-7,
            "max_rel": 0.44 if gates in places else 2e-7,
            "cosine": 0.912 if gates in places else 1.0,
            "argmax_agreement": 0.32 if gates in places else 1.0,
            "kl": 0.4 if gates in places else 1e-9,
            "agrees": first[number] is None if dtype != "bfloat16" else None,
            "first_divergence": first[number],
        }
        for number, (gates, dtype) in enumerate(passes)
    ]
    return Report(
        command="parity",
        argv=("parity", uri, "whole/"),
        verdict=verdict or ("fail" if any(first) else "pass"),
        exit_code=1 if any(first) else 0,
        inputs=(
            _input(uri, format="torch-zip", layout="openflamingo", prefix="module."),
            _input("whole/", format="safetensors", layout="hf-flamingo"),
        ),
        summary={"passes": told, "layers": layers},
        findings=tuple(findings),
        duration_seconds=12.3,
        extra={**_extra(uri), **extra},
    )


def _input(uri: str, **facts: Any) -> dict[str, Any]:
    empty = {"format": None, "layout": None, "prefix": None, "wrapper": None}
    return {"uri": uri, **empty, "num_tensors": 94, "num_bytes": 2611856, **facts}


def _extra(uri: str) -> dict[str, Any]:
    side = {"config": "config.json", "bases": [], "streamed": False, "deterministic": True}
    return {
        "blame": [],
        "parameters": {
            "compared": 199,
            "equal": 199,
            "cast": [],
            "different": [],
            "only_a": [],
            "only_b": [],
        },
        "greedy": {"a": [5, 6], "b": [5, 6], "equal": True, "note": None},
        "data": {
            "source": "generated",
            "seed": 0,
            "sha256": "4e0a1c77" * 8,
            "description": "3 rows of 24 tokens, 2 images of 32x32 each",
            "tensors": [{"name": "vision_x", "dtype": "F32", "shape": [3, 2, 1, 3, 32, 32]}],
        },
        "sides": [
            {"uri": uri, "computed_by": "Flamingo", "num_forwards": 5, **side},
            {"uri": "whole/", "computed_by": "Whole", "num_forwards": 1, **side, "streamed": True},
        ],
        "judgement": {"noise": "the first side against itself", "factor": 16.0, "gate_value": 0.5},
        "environment": {"device": "cpu", "device_name": "EPYC", "torch": "2.13.0", "notes": []},
        "seconds": {"load": 1.2, "forward": 3.4},
    }


def blame(stage: str = "xattn.1", **changes: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "gates": "forced",
        "tensors": [{"canonical": "xattn.1.attn.k.weight", "a": "x.to_kv", "b": "y.k_proj"}],
        "suspect": "key and value are swapped",
        "confirmed": True,
        "tried": [
            {"suspect": "query is transposed", "rel": 0.43, "agrees": False},
            {"suspect": "key and value are swapped", "rel": 2e-7, "agrees": True},
        ],
        **changes,
    }


def hidden(**extra: Any) -> Report:
    """The two agree with gates as they are, and diverge with gates forced open."""
    different = {"canonical": "xattn.1.attn.k.weight", "what": "B has here what A has at `v`"}
    return report(
        diverge={"forced": "xattn.1"},
        findings=(Finding(code="FC301", severity="error", detail="a matter of gates", key="k"),),
        **{
            "blame": [blame()],
            "greedy": {"a": [5, 6], "b": [5, 7], "equal": False, "note": "one tie"},
            "parameters": {
                "compared": 199,
                "equal": 198,
                "cast": ["a"],
                "different": [different],
                "only_a": ["vision.projection.weight"],
                "only_b": [],
            },
            **extra,
        },
    )


def ended_early(verdict: str = "incomplete") -> Report:
    """Nothing ran, and nothing but the findings says why."""
    return Report(
        command="parity",
        argv=("parity", "a.pt", "b/", "--device", "cuda"),
        verdict=verdict,
        exit_code=3 if verdict == "incomplete" else 1,
        summary={"passes": [], "layers": []},
        findings=(
            Finding(code="FC434", severity="info", detail="a note"),
            Finding(
                code="FC405",
                severity="error",
                detail="the device `cuda` is not there",
                hint="use `--device cpu`",
            ),
        ),
    )


#: As names of stages, keys, files: nothing of it may reach a terminal or a page as it is.
HOSTILE = "x</script><script>alert(1)</script>.\x1b[31m|`a`\u202e\ud800 \"'&--><!--]]>*_[b](c)"


def hostile() -> Report:
    """Every text that comes from a file is hostile."""
    names = [*TEN, HOSTILE]
    tensors = [{"canonical": HOSTILE, "a": HOSTILE, "b": HOSTILE}]
    return report(
        names,
        diverge={"forced": HOSTILE},
        uri=HOSTILE,
        findings=(
            Finding(code="FC301", severity="error", detail=HOSTILE, key=HOSTILE, hint=HOSTILE),
        ),
        blame=[blame(HOSTILE, tensors=tensors, suspect=HOSTILE)],
        parameters={
            "compared": 2,
            "equal": 1,
            "cast": [HOSTILE],
            "different": [{"canonical": HOSTILE, "what": HOSTILE}],
            "only_a": [HOSTILE],
            "only_b": [],
        },
        greedy={"a": [1], "b": [1], "equal": True, "note": HOSTILE},
        data={"source": HOSTILE, "description": HOSTILE, "sha256": HOSTILE, "tensors": []},
        environment={"device": HOSTILE, "device_name": HOSTILE, "notes": [HOSTILE]},
    )


NAN, INF = float("nan"), float("inf")


def odd_numbers() -> Report:
    """What no logarithm takes."""
    bad = {"max_abs": NAN, "rel": NAN, "cosine": NAN, "agrees": False, "num_bad": 7}
    return report(
        cells={
            ("vision.layers.0", 0): {"max_abs": 0.0, "rel": 0.0},
            ("vision.layers.1", 0): {"rel": 5e-324, "noise": 0.0, "tolerance": 0.0},
            ("vision.layers.2", 0): {"noise": INF, "tolerance": INF},
            ("perceiver.layers.0", 0): None,
            ("perceiver.layers.1", 0): {"noise": NAN, "tolerance": NAN},
            ("xattn.0", 1): bad,
            ("xattn.1", 1): {"max_abs": INF, "rel": INF, "cosine": NAN, "agrees": False},
            ("logits", 1): {"rel": 1e300, "tolerance": 1e-300, "agrees": False, "only_in": "a"},
        }
    )
