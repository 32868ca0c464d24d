"""CLIP's image tower alone, as each library has it: patch tokens, and the token that is pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from flamingo_ckpt.models.config import ModelConfig


def build_tower(
    config: ModelConfig, computed_as: str, dtype: str, device: str, *, projection: bool
) -> nn.Module:
    """The tower under the name that it has in a whole model, its weights random or on meta.

    Args:
        config: of a whole CLIP in either form, or of transformers' CLIPVisionModel.
        computed_as: `open_clip` or `hf-clip`.
        dtype: of the parameters, in torch's spelling.
        device: in torch's spelling.
        projection: whether it ends with one; a tower that was saved alone may have none.

    Raises:
        CkptError: FC405 for a form of the model that the other library does not have.
    """
    import torch
    from torch import nn

    from flamingo_ckpt.models import backbones, clip_config
    from flamingo_ckpt.models.assemble import quiet_libraries
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    is_native, data = "vision_cfg" in config.data, config.data
    tower: Any
    with quiet_libraries(), torch.device(device), torch.no_grad():
        if computed_as == "open_clip":
            if is_native:
                tower = backbones.open_clip_model(data).get_submodule("visual")
            else:
                vision = data if config.kind == "clip_vision" else data["vision_config"]
                tower = backbones.open_clip_vision_tower(vision, "before_ln_post", config.where)
            if not projection:
                tower.proj = None
            model: nn.Module = nn.ModuleDict({"visual": tower})
        else:
            whole = clip_config.hf_clip_config(data, config.where) if is_native else data
            vision = whole if config.kind == "clip_vision" else whole["vision_config"]
            dim = vision.get("projection_dim") or whole.get("projection_dim")
            model = backbones.hf_vision_tower(
                {**vision, **({"projection_dim": dim} if dim else {})}, projection=projection
            )
    wanted = getattr(torch, dtype)
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(wanted)
    return model


def pooled(model: Any, pictures: Any) -> Any:
    """What a tower makes of pictures `[n, 3, height, width]`: `[n, width]`."""
    if not hasattr(model, "keys"):  # transformers'
        found = model(pictures)
        return found.image_embeds if hasattr(found, "image_embeds") else found.pooler_output
    found = model["visual"](pictures)
    return found[0] if isinstance(found, tuple) else found
