"""The two sides of a comparison: a checkpoint or a model, taken apart as far as its keys allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding, FormatError
from flamingo_ckpt.formats.safetensors import parse_json_object
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.layout import BASE_OF_GROUP, group_of
from flamingo_ckpt.layouts.mapping import (
    Piece,
    Reading,
    read_atoms,
)
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.provenance import PARTIAL_KEY
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.tensors import Manifest, TensorInfo

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig

_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A or B.

    Attributes:
        uri: what the user named.
        manifest: of a checkpoint; of a model, its keys without bytes.
        is_model: whether it has shapes only.
        tensors: name without wrapper prefixes -> tensor, with the name as stored.
        detection: its layout; None where its keys show none.
        reading: its keys taken apart by that layout.
        ties: of a model: canonical name -> a tensor that it keeps under another name already, as
            the head that is the embedding; a file may hold it a second time.
        frozen: of a model: name -> (group, base) of what a base supplies, for language models that
            no table knows.
        groups: parts of a model that it holds something of.
        prefix: the wrapper prefixes that were removed, or None.
        findings: about its names.
        settings: what its config says and no tensor shows, such as `vision.hidden_act`.
    """

    uri: str
    manifest: Manifest
    is_model: bool
    tensors: Mapping[str, TensorInfo]
    detection: Detection | None
    reading: Reading | None
    ties: Mapping[str, Piece] = field(default_factory=dict)
    frozen: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    groups: frozenset[str] = frozenset()
    prefix: str | None = None
    findings: tuple[Finding, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Table | None:
        """The rules of its own layout."""
        found = self.detection
        return found.layout.table(found.family) if found is not None else None

    def stored(self, name: str) -> str:
        """The key as stored, for a name without wrapper prefixes."""
        return self.tensors[name].name if name in self.tensors else name

    def lacks_by_design(self, canonical: str) -> str:
        """The base that supplies a tensor it does not hold; "" where it should hold it.

        A tower is absent as a whole or not by design. What else a language model has besides its
        layers goes by itself (training with FSDP saves the head and leaves out the last norm), but
        for a whole state dict.
        """
        if self.is_model or not self.is_partial():
            return ""
        group = group_of(canonical)
        is_there = ("vision" if group == "lm.rest" else group) in self.groups
        return "" if is_there else BASE_OF_GROUP.get(group, "")

    def is_partial(self) -> bool:
        """Whether files of its kind leave the frozen towers to their own releases."""
        if self.detection is None:
            return False
        layout = self.detection.layout
        if layout.space != "flamingo" or layout.name == "language-model":
            return False
        if not layout.hf_config:
            return True
        if PARTIAL_KEY in self.manifest.metadata:
            return True
        return _says_partial(self.manifest)


def _says_partial(manifest: Manifest) -> bool:
    """Whether a folder's config is marked partial, or is not there to claim a whole model."""
    source = manifest.open_beside("config.json")
    if source is None:
        return True
    try:
        config = parse_json_object(source.read(0, min(source.size, _MAX_CONFIG_BYTES)), source.name)
    except FormatError:
        return False
    mark = config.get("flamingo_ckpt")
    return isinstance(mark, dict) and mark.get("partial") is True


def checkpoint_side(
    manifest: Manifest, dims: Mapping[str, int], source_layout: str | None = None
) -> Side:
    """A side from a checkpoint. No layout is no fault here.

    Raises:
        CkptError: FC201 without tensors, FC208 flat parameters, FC412 two layouts fit alike.
    """
    names, prefix, findings = _names(manifest)
    among = (layout_named(source_layout).name,) if source_layout else ()
    try:
        detection: Detection | None = detect(names, manifest.uri, among=among)
    except CkptError as error:
        if error.code != "FC411":
            raise
        detection = None
    side = _side(manifest, False, names, detection, dims)
    return replace(side, prefix=prefix, findings=findings)


def _names(
    manifest: Manifest,
) -> tuple[Mapping[str, TensorInfo], str | None, tuple[Finding, ...]]:
    """Name -> tensor, the prefix, and findings. What a conversion refuses is told here."""
    try:
        chosen = choose_tensors(manifest, PlanOptions(max_expansion=float("inf")))
    except CkptError as error:
        if error.code not in ("FC202", "FC505"):
            raise
        told = replace(error.as_finding(), severity="warning")
        return _names_as_they_are(manifest), None, (told,)
    return chosen.names, chosen.prefix, chosen.findings


def _names_as_they_are(manifest: Manifest) -> dict[str, TensorInfo]:
    """Prefixes removed where that leaves no two tensors with one name."""
    bare = [strip_wrappers(tensor.name)[0] for tensor in manifest.tensors]
    counts = Counter(bare)
    return {
        name if counts[name] == 1 else tensor.name: tensor
        for name, tensor in zip(bare, manifest.tensors, strict=True)
    }


def model_side(config: ModelConfig, layout: str, dims: Mapping[str, int]) -> Side:
    """A side from what a model should hold, each tensor once."""
    from flamingo_ckpt.models.expectation import ALIAS_TREES, expect

    expectation = expect(config, layout)
    tensors = tuple(one.info() for one in expectation.canonical() if one.kind == "parameter")
    ties = [
        one.info()
        for one in expectation.tensors
        if one.alias_of is not None and not one.name.startswith(ALIAS_TREES)
    ]
    manifest = Manifest(uri=config.where, format="model", tensors=tensors, files=())
    names = {tensor.name: tensor for tensor in tensors}
    detection = detect(names, config.where, among=(layout,))
    side = _side(manifest, True, names, detection, dims)
    table = detection.layout.table(detection.family)
    frozen = {one.name: (one.group, one.base) for one in expectation.tensors if one.base}
    return replace(side, ties=read_atoms(ties, table, dims).atoms, frozen=frozen)


def _side(
    manifest: Manifest,
    is_model: bool,
    names: Mapping[str, TensorInfo],
    detection: Detection | None,
    dims: Mapping[str, int],
) -> Side:
    reading = None
    if detection is not None:
        tensors = [renamed(tensor, name) for name, tensor in names.items()]
        reading = read_atoms(tensors, detection.layout.table(detection.family), dims)
    return Side(
        uri=manifest.uri,
        manifest=manifest,
        is_model=is_model,
        tensors=names,
        detection=detection,
        reading=reading,
        groups=frozenset(group_of(name) for name in reading.atoms) if reading else frozenset(),
    )


def renamed(tensor: TensorInfo, name: str) -> TensorInfo:
    """The same tensor under another name."""
    return tensor if tensor.name == name else replace(tensor, name=name)
