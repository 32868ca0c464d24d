"""What a converted file remembers: what came from a base, and what it lacks.

Kept in the metadata of safetensors, so that the way back gives the file that was there before.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from flamingo_ckpt.bases import Supply
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.layouts.mapping import Assembled, Reading
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.tensors import Manifest, escape
from flamingo_ckpt.vocabulary import HEAD

#: Metadata of a converted file: which canonical tensors came from a base, by the base's kind.
BASE_KEY = "flamingo_ckpt.base"

#: Metadata: the file lacks what only a base has.
PARTIAL_KEY = "flamingo_ckpt.partial"

#: Metadata: how the source spelt a key that its layout knows two spellings of (GPT-NeoX's head).
HEAD_KEY = "flamingo_ckpt.head_key"
_MAX_BASE_KEYS = 1 << 20


def supplied_before(manifest: Manifest) -> frozenset[str]:
    """Canonical names that a base supplied when the source was made."""
    text = manifest.metadata.get(BASE_KEY, "")
    if not text or len(text) > _MAX_BASE_KEYS:
        return frozenset()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return frozenset()
    if not isinstance(content, dict):
        return frozenset()
    return frozenset(
        name
        for names in content.values()
        if isinstance(names, list)
        for name in names
        if isinstance(name, str)
    )


def spelling_metadata(reading: Reading, table: Table) -> dict[str, str]:
    """How the source spells its output embedding, where that is not how its layout is written."""
    head = HEAD[0]
    place = table.place(head)
    spelt = [key for key, names in reading.names.items() if names == (head,)]
    if place is None or len(spelt) != 1 or spelt[0] == place.name:
        return {}
    return {HEAD_KEY: spelt[0]}


def spelt_as_before(
    tensors: tuple[Assembled, ...], manifest: Manifest, table: Table
) -> tuple[Assembled, ...]:
    """The head under the key that it had before, where the target layout reads that key too."""
    key = manifest.metadata.get(HEAD_KEY, "")
    match = table.match(key)
    if match is None or match.rule.canonical != HEAD[0]:
        return tensors
    return tuple(replace(one, name=key) if one.canonical == (HEAD[0],) else one for one in tensors)


def base_metadata(
    supplied: Mapping[str, str], remembered: Collection[str], partial: bool
) -> dict[str, str]:
    """The metadata of a conversion.

    Args:
        supplied: what bases supplied, canonical name -> kind.
        remembered: what bases had supplied before, and is still there.
        partial: whether a tower is missing.
    """
    metadata = {PARTIAL_KEY: "true"} if partial else {}
    # The towers are always a base's; of the rest, only what a checkpoint could also hold.
    heads = sorted({name for name in (*supplied, *remembered) if name in HEAD})
    groups: dict[str, list[str]] = {kind: [] for kind in supplied.values()}
    if heads:
        groups["language"] = heads
    if groups:
        metadata[BASE_KEY] = json.dumps(groups, sort_keys=True)
    return metadata


def base_findings(supplies: Sequence[Supply], supplied: Mapping[str, str]) -> list[Finding]:
    """How much came from each base."""
    return [
        Finding(
            code="FC421",
            severity="info",
            detail=f"{sum(kind == supply.base.kind for kind in supplied.values())} canonical "
            f"tensors come from --base-{supply.base.kind} ({escape(supply.base.manifest.uri)}, "
            f"{supply.detection.title})",
        )
        for supply in supplies
    ]
