"""What all renderings of a parity report say in the same words: numbers, facts, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.parity_stages import Row, passes_of
from flamingo_ckpt.tensors import escape

#: Said of bfloat16 and float16.
REPORTED = "reported, does not decide"
_VERDICTS = {"pass": "agree", "fail": "diverge", "error": "error", "incomplete": "incomplete"}


def short(value: Any) -> str:
    """A number with two or three digits; what is no number as a word.

    >>> [short(value) for value in (0.0, 4.8e-07, 0.4421, 1.0, "nan", float("inf"), None)]
    ['0', '4.8e-7', '0.442', '1', 'NaN', 'inf', '-']
    """
    if value is None:
        return "-"
    number = float(value)
    if not math.isfinite(number):
        return str(number).replace("nan", "NaN")
    if number == 0 or 1e-3 <= abs(number) < 999.5:
        return f"{number:.3g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def cosine(value: Any) -> str:
    """With the digits that differ from 1.

    >>> cosine(0.9999876), cosine(1.0), cosine(float("nan"))
    ('0.999988', '1', 'NaN')
    """
    return "-" if value is None else f"{float(value):.6g}".replace("nan", "NaN")


def share(value: Any) -> str:
    """A share in percent, never rounded up to all of it.

    >>> share(1.0), share(0.99999), share(0.32), share(None)
    ('100%', '99.99%', '32%', '-')
    """
    if value is None:
        return "-"
    number = float(value)
    # a share of positions is 1 or well below it; what the floor must not take is 0.57 * 1e4
    return f"{math.floor(number * 1e4 + 1e-6) / 100:g}%" if math.isfinite(number) else short(number)


def used(value: float | None) -> str:
    """How much of the tolerance, in percent; beyond ten times it, how many times.

    >>> [used(value) for value in (0.0, 0.001, 0.07, 1.004, 137500.0, float("nan"), None)]
    ['0%', '<1%', '7%', '101%', '1.4e5x', 'NaN', '-']
    """
    if value is None or not math.isfinite(value):
        return short(value)
    if value >= 10:
        return f"{short(value)}x"
    # what is beyond the tolerance must not read as all of it
    percent = max(round(value * 100), 101 if value > 1 else 0)
    return f"{percent}%" if percent or not value else "<1%"


def gates(report: Report, name: str) -> str:
    """`gates as they are`, `gates forced to 0.5`."""
    value = (report.extra.get("judgement") or {}).get("gate_value")
    forced = "gates forced open" if value is None else f"gates forced to {short(value)}"
    return {"as-is": "gates as they are", "forced": forced}.get(name, f"gates {escape(name)}")


def pass_name(report: Report, one: Mapping[str, Any]) -> str:
    """`float32, gates as they are`."""
    return f"{escape(one['dtype'])}, {gates(report, one['gates'])}"


def outcome(one: Mapping[str, Any]) -> str:
    """What a pass says: that it agrees, where it diverges, or that it does not decide."""
    if not one["decides"]:
        return REPORTED
    if one["first_divergence"] is None:
        return "agrees"
    return f"diverges at `{escape(one['first_divergence'])}`"


def marker(report: Report, row: Row, among: Sequence[int]) -> str:
    """`first divergence`, with the gates where other passes among these diverge elsewhere."""
    passes = passes_of(report)
    here = [at for at in among if at in row.first_in]
    if not here:
        return ""
    if all(at in here or passes[at]["first_divergence"] is None for at in among):
        return "first divergence"
    names = " and ".join(dict.fromkeys(gates(report, passes[at]["gates"]) for at in here))
    return f"first divergence ({names})"


def bad_values(row: Row, among: Sequence[int]) -> str:
    """`7 NaN or infinite in B alone`: of the pass with the most."""
    found = max((cell.num_bad for at in among if (cell := row.cells[at])), default=0)
    return f"{found} NaN or infinite in B alone" if found else ""


def verdict_word(report: Report) -> str:
    """`agree`, `diverge`, `failed`, `incomplete` or `error`."""
    if report.verdict == "fail" and not any(map(_diverges, passes_of(report))):
        return "failed"
    return _VERDICTS[report.verdict]


def _diverges(one: Mapping[str, Any]) -> bool:
    return bool(one["decides"]) and one["first_divergence"] is not None


def sentence(report: Report) -> str:
    """The verdict in words, for people who read one line.

    It begins with `verdict_word`.
    """
    word = verdict_word(report)
    if word == "diverge":
        return _divergence(report)
    if word == "agree":
        deciding = [one for one in passes_of(report) if one["decides"]]
        total = len(report.summary.get("layers") or ())
        stages = "the one stage is" if total == 1 else f"all {total} stages are"
        is_exact = all(float(one["max_rel"]) == 0 for one in deciding)
        how = "exactly equal" if deciding and is_exact else "within rounding"
        return f"agree: {stages} {how}" + _runs(report, deciding)
    told = sorted(report.findings, key=lambda one: one.severity != "error")
    why = escape(told[0].detail) if told else "nothing says why"
    computed = "" if passes_of(report) else "nothing was compared: "
    return f"{word}: {computed if word != 'error' else ''}{why}"


def _divergence(report: Report) -> str:
    """Every place where a pass diverges first, with its cause where one is confirmed."""
    passes = [one for one in passes_of(report) if one["decides"]]
    causes = {
        one["stage"]: f" ({escape(one['suspect'])})"
        for one in report.extra.get("blame") or ()
        if one.get("confirmed") and one.get("suspect")
    }
    places = dict.fromkeys(one["first_divergence"] for one in passes if _diverges(one))
    told = [
        f"diverge at `{escape(stage)}`"
        + _runs(report, [one for one in passes if one["first_divergence"] == stage])
        + causes.get(stage, "")
        for stage in places
    ]
    agreeing = [one for one in passes if not _diverges(one)]
    return "; ".join([*told, *(["agree" + _runs(report, agreeing)] if agreeing else [])])


def _runs(report: Report, passes: Sequence[Mapping[str, Any]]) -> str:
    """` in float32 with gates as they are and with gates forced to 0.5`."""
    grouped: dict[str, list[str]] = {}
    for one in passes:
        grouped.setdefault(escape(one["dtype"]), []).append(gates(report, one["gates"]))
    told = [f"{dtype} with {' and with '.join(names)}" for dtype, names in grouped.items()]
    return f" in {', in '.join(told)}" if told else ""


def fact_lines(report: Report) -> list[tuple[str, str]]:
    """What was fed in, what computed each side, where, and how it was judged: (word, text)."""
    extra = report.extra
    lines = [("inputs", _data(extra["data"]))] if extra.get("data") else []
    lines += [
        (name, side_text(side)) for name, side in zip("AB", extra.get("sides") or (), strict=False)
    ]
    if extra.get("environment"):
        lines.append(("ran on", _environment(extra["environment"])))
        lines += [("", escape(note)) for note in extra["environment"].get("notes") or ()]
    if extra.get("judgement"):
        lines.append(("tolerance", judgement_text(extra["judgement"])))
        lines.append(("used", "the share of the tolerance that a difference takes"))
    return lines


def _data(data: Mapping[str, Any]) -> str:
    source, seed = escape(str(data.get("source") or "")), data.get("seed")
    parts = [escape(data.get("description") or ""), source]
    parts += [f"seed {seed}"] if seed is not None else []
    told = ", ".join(part for part in parts if part)
    digest = f"sha256 {escape(data['sha256'])[:12]}" if data.get("sha256") else "no sha256"
    return f"{told}; {digest}, the same for both"


def side_text(side: Mapping[str, Any]) -> str:
    """`whole/: computed by FlamingoForConditionalGeneration, 3 forwards`."""
    forwards = side.get("num_forwards")
    parts = [f"computed by {escape(side['computed_by'])}"] if side.get("computed_by") else []
    parts += [f"config {escape(side['config'])}"] if side.get("config") else []
    bases = ", ".join(escape(base) for base in side.get("bases") or ())
    parts += [f"bases {bases}"] if bases else []
    if forwards is not None:
        parts.append(f"{forwards} forward" + ("" if forwards == 1 else "s"))
    parts += ["weights streamed"] if side.get("streamed") else []
    parts += ["not deterministic"] if side.get("deterministic") is False else []
    return f"{escape(side['uri'])}: " + (", ".join(parts) or "not computed")


def _environment(environment: Mapping[str, Any]) -> str:
    device, name = environment.get("device"), environment.get("device_name")
    threads = environment.get("num_threads")
    parts = [escape(str(device or "unknown")) + (f" ({escape(str(name))})" if name else "")]
    parts += [f"{threads} thread" + ("" if threads == 1 else "s")] if threads else []
    parts += [
        f"{library} {escape(str(environment[library]))}"
        for library in ("torch", "transformers")
        if environment.get(library)
    ]
    return ", ".join(parts)


def judgement_text(judgement: Mapping[str, Any]) -> str:
    """`16 times the noise (the first side against itself, every sum in another order)`."""
    noise = f" ({escape(judgement['noise'])})" if judgement.get("noise") else ""
    return f"{short(judgement.get('factor'))} times the noise{noise}"


def greedy_text(greedy: Mapping[str, Any]) -> str:
    """Whether both sides write the same tokens, and where they part."""
    a, b = greedy.get("a") or [], greedy.get("b") or []
    note = f" ({escape(greedy['note'])})" if greedy.get("note") else ""
    if greedy.get("equal") is None:
        return f"not run{note}"
    if greedy["equal"]:
        return f"both write the same {len(a)} token" + ("" if len(a) == 1 else "s") + note
    pairs = zip(a, b, strict=False)
    at = next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    told = " and ".join(
        f"{side} writes {tokens[at]}" if at < len(tokens) else f"{side} stops"
        for side, tokens in (("A", a), ("B", b))
    )
    return f"differ from token {at + 1} of {max(len(a), len(b))} on: {told}{note}"


def weights_text(parameters: Mapping[str, Any]) -> str:
    """`197 of 199 tensors hold the same bits; 2 differ; 1 only in A`."""
    cast = len(parameters.get("cast") or ())
    different = len(parameters.get("different") or ())
    counts = [
        (cast, "the same values in another dtype"),
        (different, "differs" if different == 1 else "differ"),
        (len(parameters.get("only_a") or ()), "only in A"),
        (len(parameters.get("only_b") or ()), "only in B"),
    ]
    compared = parameters.get("compared") or 0
    same = (
        f"{parameters['equal'] - cast} of {compared} tensors hold the same bits"
        if compared
        else "not compared"
    )
    return "; ".join([same, *(f"{number} {word}" for number, word in counts if number)])


def trial_text(trial: Mapping[str, Any]) -> str:
    """`key and value are swapped: 2e-7 left, agrees`."""
    left = float(trial["rel"])
    said = (
        "could not be run"
        if math.isnan(left) and not trial["agrees"]
        else f"{short(left)} left, " + ("agrees" if trial["agrees"] else "still diverges")
    )
    return f"{escape(trial['suspect'])}: {said}"


def suspect_text(blame: Mapping[str, Any]) -> str:
    """The suspect, or that there is none."""
    if blame.get("suspect"):
        return escape(blame["suspect"])
    return "nothing that was tried explains it" if blame.get("tried") else "nothing was tried"


def confirmation(blame: Mapping[str, Any]) -> str:
    """Whether a trial confirms the suspect; empty without one."""
    if not blame.get("suspect"):
        return ""
    return (
        "confirmed: with this one thing changed in B, the two agree"
        if blame.get("confirmed")
        else "not confirmed: no trial made the two agree"
    )
