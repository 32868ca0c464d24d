"""Numbers of heads that a config tells and no tensor's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig


def head_counts(config: ModelConfig | None) -> dict[str, int]:
    """Numbers of heads, by the axis names of the layouts' tables."""
    if config is None:
        return {}
    vision = config.data if config.kind == "clip_vision" else config.data.get("vision_config", {})
    text = config.data.get("text_config", {})
    found = {
        "visionheads": vision.get("num_attention_heads"),
        "lmheads": text.get("num_attention_heads"),
        "kvheads": text.get("num_key_value_heads"),
        "textheads": text.get("num_attention_heads"),
    }
    return {name: size for name, size in found.items() if isinstance(size, int)}
