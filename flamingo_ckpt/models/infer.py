"""What the shapes in a checkpoint say about its model, and what they cannot say.

Shapes prove sizes. They do not prove how a width divides into heads, which activation stands
between two matrices, or which tokens a tower handed on: such fields are `unknown`, and what would
be assumed for them is said apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.families import FAMILIES, Family

Shapes = Mapping[str, tuple[int, ...]]

_HEAD_WIDTH = 64
#: Widths of vision towers whose heads are not 64 wide: So400m/14, H/14, g/14, bigG/14.
_VISION_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
#: Width of the only Gemma (2, 27B) under a PaliGemma whose heads are not 256 wide.
_GEMMA_HEAD_DIM = {4608: 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """A config as far as shapes prove it.

    Attributes:
        config: the fields that are proven, nested as in a `config.json`.
        unknown: dotted names of fields that shapes cannot tell, in order.
        assumed: what would be assumed for some of them. A number of layers is a lower bound.
    """

    config: dict[str, Any]
    unknown: tuple[str, ...]
    assumed: Mapping[str, Any]


@dataclass(slots=True)
class _Draft:
    """An answer in the making."""

    config: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)

    def proven(self, dotted: str, value: Any) -> None:
        """Put a value at its place."""
        *sections, name = dotted.split(".")
        at = self.config
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value

    def cannot_tell(self, dotted: str, assumed: Any = None) -> None:
        """Note a field that shapes do not prove."""
        self.unknown.append(dotted)
        if assumed is not None:
            self.assumed[dotted] = assumed


def infer_config(atoms: Shapes, *, family: str | None = None) -> Inferred:
    """The config of a model, from the shapes of some or all of its tensors.

    Args:
        atoms: canonical name (`perceiver.latents`, `xattn.3.attn.q.weight`, ...) -> shape.
        family: name of the language model's family, where it is known; decoder leaves tell too.

    Raises:
        CkptError: FC406 where gated layers stand at places that no `cross_attn_every_n_layers`
            explains.

    >>> infer_config({"perceiver.latents": (64, 1024)}).config["perceiver_num_latents"]
    64
    """
    draft = _Draft()
    spaces = {name.split(".")[0] for name in atoms}
    if spaces & {"perceiver", "xattn"}:
        draft.proven("model_type", "flamingo")
        _perceiver(atoms, draft)
        _gated(atoms, draft)
        _language(atoms, draft, family, "text_config.")
        _vision(atoms, draft, "vision_config.", is_flamingo=True)
    elif "projector" in spaces:
        draft.proven("model_type", "paligemma")
        _paligemma(atoms, draft)
    elif "text" in spaces:
        draft.proven("model_type", "clip")
        _clip(atoms, draft)
    elif "vision" in spaces:
        draft.proven("model_type", "clip_vision_model")
        _vision(atoms, draft, "")
    else:
        _language(atoms, draft, family, "")
    return Inferred(config=draft.config, unknown=tuple(draft.unknown), assumed=draft.assumed)


def cross_attn_interval(layers: Iterable[int]) -> int | None:
    """`cross_attn_every_n_layers` from the numbers of the layers that have a gated block.

    Returns None for no layers. The c-th block stands at layer `interval * (c + 1) - 1`.

    Raises:
        CkptError: FC406, naming the layers, where no interval puts blocks exactly there.

    >>> cross_attn_interval([3, 7, 11])
    4
    """
    found = sorted(set(layers))
    if not found:
        return None
    interval = found[0] + 1
    expected = list(range(interval - 1, found[-1] + 1, interval))
    if found == expected:
        return interval
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    parts = [f"no block at {_numbers(missing)}"] if missing else []
    parts += [f"one too many at {_numbers(extra)}"] if extra else []
    raise CkptError(
        f"gated cross-attention at the layers {_numbers(found)} fits no interval: with one every "
        f"{interval}, there is {' and '.join(parts)}",
        code="FC406",
        hint="blocks belong at layers n-1, 2n-1, 3n-1, ...; some are missing, or were renumbered",
    )


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:16]))
    return shown if len(numbers) <= 16 else f"{shown} and {len(numbers) - 16} more"


def _indices(atoms: Shapes, prefix: str) -> list[int]:
    """The layer numbers under a prefix, sorted."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(match[1]) for name in atoms if (match := pattern.match(name))})


def _size(atoms: Shapes, prefix: str, leaf: str, axis: int) -> int | None:
    """A size of a leaf of the first layer under a prefix that has it."""
    for index in _indices(atoms, prefix):
        shape = atoms.get(f"{prefix}{index}.{leaf}")
        if shape is not None and len(shape) > axis:
            return shape[axis]
    return None


def _axis(atoms: Shapes, name: str, axis: int) -> int | None:
    shape = atoms.get(name)
    return shape[axis] if shape is not None and len(shape) > axis else None


def _depth(atoms: Shapes, prefix: str) -> int | None:
    """The number of layers, where they are all there from the first on."""
    found = _indices(atoms, prefix)
    return len(found) if found and found == list(range(len(found))) else None


# --- Flamingo's own parts -------------------------------------------------------------------------


def _perceiver(atoms: Shapes, draft: _Draft) -> None:
    prefix = "perceiver.layers."
    _put(draft, "perceiver_depth", _depth(atoms, prefix), 6)
    _put(draft, "perceiver_num_latents", _axis(atoms, "perceiver.latents", 0), 64)
    _heads(draft, "perceiver_", _size(atoms, prefix, "attn.q.weight", 0))
    _ratio(draft, "perceiver_ff_mult", _rows_and_columns(atoms, prefix, "mlp.fc1.weight"))
    for name, tensor in (("max_num_frames", "frame_embs"), ("max_num_media", "media_time_embs")):
        rows = _axis(atoms, f"perceiver.{tensor}", 0)
        if rows is not None:
            draft.proven(name, rows)


def _gated(atoms: Shapes, draft: _Draft) -> None:
    every = cross_attn_interval(_indices(atoms, "xattn."))
    _put(draft, "cross_attn_every_n_layers", every)
    _heads(draft, "cross_attn_", _size(atoms, "xattn.", "attn.q.weight", 0))
    _ratio(draft, "cross_attn_ff_mult", _rows_and_columns(atoms, "xattn.", "mlp.fc1.weight"))


def _rows_and_columns(atoms: Shapes, prefix: str, leaf: str) -> tuple[int | None, int | None]:
    return _size(atoms, prefix, leaf, 0), _size(atoms, prefix, leaf, 1)


def _put(draft: _Draft, name: str, value: Any, assumed: Any = None) -> None:
    if value is None:
        draft.cannot_tell(name, assumed)
    else:
        draft.proven(name, value)


def _heads(draft: _Draft, prefix: str, inner: int | None) -> None:
    """A width of attention proves the product of heads and their width, not the two."""
    known = inner is None or inner % _HEAD_WIDTH == 0
    heads = (inner or 8 * _HEAD_WIDTH) // _HEAD_WIDTH
    draft.cannot_tell(prefix + "heads", heads if known else None)
    draft.cannot_tell(prefix + "dim_head", _HEAD_WIDTH if known else None)


def _ratio(draft: _Draft, name: str, sizes: tuple[int | None, int | None]) -> None:
    rows, columns = sizes
    whole = rows is not None and columns and rows % columns == 0
    _put(draft, name, rows // columns if whole and rows and columns else None, 4)


# --- language models ------------------------------------------------------------------------------


def _language(atoms: Shapes, draft: _Draft, name: str | None, at: str) -> None:
    leaves = {re.sub(r"^lm\.layers\.\d+\.", "", one) for one in atoms if _is_decoder(one)}
    signed = [one for one in FAMILIES.values() if one.signature in leaves]
    family = FAMILIES.get(name or "") or (signed[0] if len(signed) == 1 else None)
    _put(draft, at + "model_type", family.name if family is not None else None)
    _put(draft, at + "vocab_size", _axis(atoms, "lm.embed_tokens.weight", 0))
    width = _axis(atoms, "lm.embed_tokens.weight", 1)
    if atoms.get("lm.project_in.weight"):
        draft.proven(at + "word_embed_proj_dim", width)
        width = None
    width = width or _size(atoms, "xattn.", "attn.norm.weight", 0)
    _put(draft, at + (family.hidden_size if family else "hidden_size"), width)
    _language_layers(atoms, draft, family, at)
    draft.cannot_tell(at + (family.num_heads if family else "num_attention_heads"))
    positions = _axis(atoms, "lm.embed_positions.weight", 0)
    if positions is not None:
        draft.proven(at + "max_position_embeddings", positions - 2)  # OPT's offset
    if family is None or family.name != "mosaic_gpt":  # which has no head, whatever its config says
        _tie(atoms, draft, bool(leaves), at)
    draft.cannot_tell(at + "layer_norm_eps")


def _is_decoder(name: str) -> bool:
    return re.match(r"lm\.layers\.\d+\.", name) is not None


def _language_layers(atoms: Shapes, draft: _Draft, family: Family | None, at: str) -> None:
    field_name = at + (family.num_layers if family else "num_hidden_layers")
    depth, gated = _depth(atoms, "lm.layers."), _indices(atoms, "xattn.")
    # Layers after the last gated block leave no trace in a partial checkpoint.
    _put(draft, field_name, depth, gated[-1] + 1 if gated else None)
    if family is None:
        draft.cannot_tell(at + "intermediate_size")
        return
    rows, columns = _rows_and_columns(atoms, "lm.layers.", family.up_projection)
    if family.mlp:
        _put(draft, at + family.mlp, rows)
    elif family.name == "mosaic_gpt":
        _ratio(draft, at + "mlp_ratio", (rows, columns))
    elif family.name == "gptj":
        _put(draft, at + "n_inner", rows)


def _tie(atoms: Shapes, draft: _Draft, has_decoder: bool, at: str) -> None:
    """A whole model without a head of its own is tied; a head that is there may be a copy."""
    if has_decoder and "lm.head.weight" not in atoms:
        draft.proven(at + "tie_word_embeddings", True)
    else:
        draft.cannot_tell(at + "tie_word_embeddings", False if "lm.head.weight" in atoms else None)


# --- vision and text towers -----------------------------------------------------------------------


def _vision(atoms: Shapes, draft: _Draft, at: str, *, is_flamingo: bool = False) -> None:
    patch = atoms.get("vision.patch_embedding.weight")
    width = patch[0] if patch else None
    if width is None and is_flamingo:
        # Latents are as wide as the tower, and so is what the gated blocks take.
        width = _axis(atoms, "perceiver.latents", 1) or _size(atoms, "xattn.", "attn.k.weight", 1)
    _put(draft, at + "hidden_size", width)
    _put(draft, at + "patch_size", patch[3] if patch and len(patch) == 4 else None)
    _put(draft, at + "image_size", _image_size(atoms, patch))
    _tower(atoms, draft, "vision.", at, width)
    projection = _axis(atoms, "vision.projection.weight", 0)
    if projection is not None or not is_flamingo:
        _put(draft, at + "projection_dim", projection)
    activation = "quick_gelu" if is_flamingo else None  # OpenAI's CLIP, under every release
    draft.cannot_tell(at + "hidden_act", activation)
    if is_flamingo:
        draft.cannot_tell("token_point", "before post_layernorm, without the class token")


def _image_size(atoms: Shapes, patch: tuple[int, ...] | None) -> int | None:
    """Side of the picture in pixels, where the position rows are a square."""
    rows = _axis(atoms, "vision.position_embedding.weight", 0)
    if rows is None or not patch or len(patch) != 4:
        return None
    rows -= "vision.class_embedding" in atoms
    side = math.isqrt(max(rows, 0))
    return side * patch[3] if side * side == rows and side else None


def _tower(atoms: Shapes, draft: _Draft, prefix: str, at: str, width: int | None) -> None:
    layers = prefix + "layers."
    _put(draft, at + "num_hidden_layers", _depth(atoms, layers))
    _put(draft, at + "intermediate_size", _size(atoms, layers, "mlp.fc1.weight", 0))
    heads = width // _HEAD_WIDTH if width and width % _HEAD_WIDTH == 0 else None
    if prefix == "vision.":
        heads = _VISION_HEADS.get(width or 0, heads)
    draft.cannot_tell(at + "num_attention_heads", heads)
    draft.cannot_tell(at + "layer_norm_eps", 1e-5 if "vision.class_embedding" in atoms else None)


def _clip(atoms: Shapes, draft: _Draft) -> None:
    _vision(atoms, draft, "vision_config.")
    width = _axis(atoms, "text.token_embedding.weight", 1)
    _put(draft, "text_config.vocab_size", _axis(atoms, "text.token_embedding.weight", 0))
    _put(draft, "text_config.hidden_size", width)
    positions = _axis(atoms, "text.position_embedding.weight", 0)
    _put(draft, "text_config.max_position_embeddings", positions)
    _tower(atoms, draft, "text.", "text_config.", width)
    draft.cannot_tell("text_config.hidden_act")
    draft.cannot_tell("text_config.eos_token_id")
    _put(draft, "projection_dim", _axis(atoms, "text.projection.weight", 0))


def _paligemma(atoms: Shapes, draft: _Draft) -> None:
    at, layers = "text_config.", "lm.layers."
    has_gemma2_norm = _size(atoms, layers, "pre_feedforward_layernorm.weight", 0) is not None
    family = "gemma2" if has_gemma2_norm else "gemma" if _indices(atoms, layers) else None
    _put(draft, at + "model_type", family)
    _put(draft, at + "vocab_size", _axis(atoms, "lm.embed_tokens.weight", 0))
    _put(draft, at + "hidden_size", _axis(atoms, "lm.embed_tokens.weight", 1))
    _put(draft, at + "num_hidden_layers", _depth(atoms, layers))
    _put(draft, at + "intermediate_size", _size(atoms, layers, "mlp.gate_proj.weight", 0))
    queries = _size(atoms, layers, "self_attn.q_proj.weight", 0)
    keys = _size(atoms, layers, "self_attn.k_proj.weight", 0)
    dim = _GEMMA_HEAD_DIM.get(_axis(atoms, "lm.embed_tokens.weight", 1) or 0, 256)
    known = queries is not None and keys is not None and queries % dim == keys % dim == 0
    draft.cannot_tell(at + "head_dim", dim if known else None)
    draft.cannot_tell(at + "num_attention_heads", (queries or 0) // dim if known else None)
    draft.cannot_tell(at + "num_key_value_heads", (keys or 0) // dim if known else None)
    _tie(atoms, draft, family is not None, at)
    _put(draft, "projection_dim", _axis(atoms, "projector.weight", 0))
    _vision(atoms, draft, "vision_config.")
    draft.proven("vision_config.vision_use_head", "vision.head.probe" in atoms)
