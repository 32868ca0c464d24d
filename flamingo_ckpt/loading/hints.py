"""Why a checkpoint does not fit, as far as its names tell, and the way on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from flamingo_ckpt.errors import LoadError, name_some
from flamingo_ckpt.loading.match import Matching
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.report import LoadReport
from flamingo_ckpt.loading.targets import Target
from flamingo_ckpt.tensors import escape

#: Parts of names under which embeddings are kept; their rows are the vocabulary.
_VOCABULARY = ("embed_tokens", "wte", "embed_in", "embed_out", "lm_head", "token_embedding")

#: Ends of the names of an output head.
_HEADS = ("lm_head.weight", "embed_out.weight")

#: The layout of a language model without a Flamingo around it.
_LANGUAGE_MODEL = "language-model"

#: Parts of models that layouts tell, and that make no sense by halves.
GROUPS = frozenset({"vision", "text", "perceiver", "xattn", "lm.layers"})
_MIN_TOWER = 5
#: The number of a gated block, in the name of one of its tensors or in the second name of it.
_BLOCK = re.compile(r"\.(\d+)\.gated_cross_attn_layer\.|\.gated_cross_attn_layers\.(\d+)\.")


def refuse_other_family(matching: Matching, report: LoadReport) -> None:
    """Raise FC432 where the file's language model is of another kind than the module's.

    Their widths may be the same, and then gated blocks of one would fit the other.
    """
    if matching.file is None or matching.model is None:
        return
    theirs, ours = set(matching.file.families), set(matching.model.families)
    if not theirs or not ours or theirs & ours:
        return
    raise LoadError(
        f"the file's language model is {' or '.join(sorted(theirs))}, the model's is "
        f"{' or '.join(sorted(ours))}",
        report=report,
        code="FC432",
        where=report.uri,
        hint="build the model on the language model that the checkpoint was trained on",
    )


def is_flamingo(matching: Matching) -> bool:
    """Whether the module is a Flamingo, which has bases, and not one of them."""
    layout = matching.model.layout if matching.model else None
    return layout is not None and layout.space == "flamingo" and layout.name != _LANGUAGE_MODEL


def lost_towers(matching: Matching, unexpected: Sequence[str]) -> list[str]:
    """Parts that both sides have and of which nothing was matched.

    Parts are those that a layout tells; without one, the first components of names, where a few
    tensors may as well be a head that was replaced.
    """
    loaded = {_part(load.target.key, matching.groups) for load in matching.loads}
    ours = Counter(_part(target.key, matching.groups) for target in matching.missing)
    theirs = Counter(_part(key, matching.file_groups) for key in unexpected)
    return sorted(
        part
        for part in ours.keys() & theirs.keys() - loaded
        if min(ours[part], theirs[part]) >= (2 if part in GROUPS else _MIN_TOWER)
    )


def _part(key: str, groups: Mapping[str, str]) -> str:
    return groups.get(key) or key.partition(".")[0]


def for_names(matching: Matching, unexpected: Sequence[str], targets: Sequence[Target]) -> str:
    """What to do where the names of the two sides have little in common."""
    if prefix := _missing_prefix(unexpected, targets):
        return prefix
    file = f"`{matching.file.title}`" if matching.file else "no layout that is known"
    model = f"`{matching.model.title}`" if matching.model else "none that is known"
    return (
        f"the file's names are {file}, the model's are {model}; `flamingo-ckpt diff` and `inspect` "
        "show both"
    )


def _missing_prefix(unexpected: Sequence[str], targets: Sequence[Target]) -> str:
    """A prefix that all names of one side have and the other's lack; "" for none."""
    ours = {name for target in targets for name in target.names}
    for depth in (1, 2, 3):
        cut: dict[str, int] = {}
        for key in unexpected:
            parts = key.split(".")
            if len(parts) > depth and ".".join(parts[depth:]) in ours:
                prefix = ".".join(parts[:depth])
                cut[prefix] = cut.get(prefix, 0) + 1
        for prefix, count in sorted(cut.items(), key=lambda one: -one[1])[:1]:
            if 2 * count > len(ours):
                return (
                    f"{count} names fit without `{escape(prefix)}.`: load into the part of a model "
                    f"that this is, or save the weights without it"
                )
    for name in ("visual", "model", "lang_encoder", "vision_encoder"):
        inside = sum(f"{name}.{key}" in ours for key in unexpected)
        if 2 * inside > len(unexpected) > 0:
            return f"the names are those of `model.{name}`: load into that"
    return ""


def _is_other_interval(matching: Matching, report: LoadReport) -> bool:
    """Whether whole gated blocks are in the file alone, or in the model alone beside others."""

    def blocks(keys: Iterable[str], groups: Mapping[str, str]) -> set[str]:
        found = (_BLOCK.search(key) for key in keys if groups.get(key) == "xattn")
        return {one[1] or one[2] for one in found if one}

    filled = blocks((load.target.key for load in matching.loads), matching.groups)
    lacking = blocks(report.missing_keys, matching.groups) - filled
    extra = blocks(report.unexpected_keys, matching.file_groups) - filled
    return bool(extra or (lacking and filled))


def for_misfit(matching: Matching, report: LoadReport, options: LoadOptions) -> str:
    """The way on from missing, unexpected and misshapen keys."""
    rows = [
        (key, file[0], model[0])
        for key, (file, model) in report.mismatched.items()
        if file and model and file[1:] == model[1:] and any(w in key for w in _VOCABULARY)
    ]
    if rows:
        key, have, want = rows[0]
        return (
            f"`{key}` has {have} rows in the file and {want} in the model: resize the model "
            f"(`resize_token_embeddings({have})`), or the file (`convert --vocab-rows {want}`); "
            "rows are never cut silently"
        )
    if _is_other_interval(matching, report):
        return (
            "the gated cross-attention blocks are at other layers: build the model with the "
            "checkpoint's interval (`cross_attn_every_n_layers`; `inspect` shows it)"
        )
    if any(key.rpartition(".")[2] == "_extra_state" for key in report.missing_keys):
        return (
            "what modules keep beside their tensors is not read from a file: `strict=False`, and "
            "`set_extra_state` where it matters"
        )
    if report.left_on_meta and not report.missing_keys and not report.unexpected_keys:
        return (
            "build the module on a real device, or fill "
            + name_some(list(report.left_on_meta), 3, where="")
            + " before"
        )
    if is_flamingo(matching) and options.policy == "strict" and report.missing_keys:
        return (
            "a checkpoint without its frozen towers is loaded with the policy `partial`, as by "
            "`load_pretrained`"
        )
    head = [key for key in report.missing_keys if key.endswith(_HEADS)]
    if head and len(report.missing_keys) == len(head) and not report.unexpected_keys:
        return (
            f"the file has no `{escape(head[0])}`: if its head is its embedding, tie the model's "
            "(`tie_word_embeddings`)"
        )
    if report.mismatched and not (report.missing_keys or report.unexpected_keys):
        key = next(iter(report.mismatched))
        return (
            f"the names fit and sizes do not: build the model with those of the file, or leave "
            f"`{escape(key)}` out with exclude="
        )
    if matching.file and matching.model and matching.file.title == matching.model.title:
        return (
            f"both sides' names are `{matching.file.title}`: the model is of another size or "
            "version; `flamingo-ckpt diff` and `inspect` show where"
        )
    return for_names(matching, report.unexpected_keys, ())
