"""Tiny open_clip models of any size, and what its own loader does with a file."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from tests.zoo_clip import EMBED_DIM, VIS_DIM, open_clip_cfg
from tests.zoo_lms import State, prepare, randomise, seeded, snapshot
from tests.zoo_siglip import siglip

LAYERS = 2


def clip_model(
    *,
    image: int | tuple[int, int] = 32,
    patch: int = 8,
    context: int = 12,
    text_width: int = 36,
    kind: str = "CLIP",
    seed: int = 0,
    **options: Any,
) -> Any:
    """A random `CLIP` or `CustomTextCLIP` of open_clip, in evaluation mode.

    Args:
        image: pixels, (height, width) or a side.
        patch: pixels of a patch's side.
        context: tokens of text.
        text_width: channels of the text tower.
        kind: the class's name in `open_clip.model`.
        seed: of all parameters.
        options: for the class, such as `init_logit_bias` and `nonscalar_logit_scale`.
    """
    prepare()
    from open_clip import model as classes

    config = open_clip_cfg(LAYERS)
    config["vision_cfg"] |= {"image_size": image, "patch_size": patch}
    config["text_cfg"] |= {"context_length": context, "width": text_width}
    config["text_cfg"]["heads"] = 3 if text_width % 3 == 0 else 4
    with seeded(seed):
        model = getattr(classes, kind)(**config, **options)
        randomise(model)
    return model.eval().requires_grad_(False)


def coca_model(*, image: int = 32, context: int = 12, seed: int = 0) -> Any:
    """A random CoCa: its text tower has a class row behind the positions."""
    prepare()
    from open_clip.coca_model import CoCa

    config = open_clip_cfg(LAYERS)
    config["vision_cfg"] |= {
        "image_size": image,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    }
    config["text_cfg"] |= {"context_length": context, "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": context, "vocab_size": 99, "width": 36, "heads": 3, "layers": 1}
    with seeded(seed):
        model = CoCa(**config, multimodal_cfg=decoder)
        randomise(model)
    return model.eval().requires_grad_(False)


def resnet_model(*, image: int = 64, seed: int = 0) -> Any:
    """A random CLIP with a ModifiedResNet, whose pooling attention has the positions."""
    prepare()
    from open_clip.model import CLIP

    config = open_clip_cfg(LAYERS)
    config["vision_cfg"] = {"image_size": image, "layers": [1, 1, 1, 1], "width": 8}
    config["vision_cfg"] |= {"head_width": 64}
    with seeded(seed):
        model = CLIP(**config)
        randomise(model)
    return model.eval().requires_grad_(False)


def timm_vit(*, image: int | tuple[int, int] = 32, seed: int = 0, **options: Any) -> Any:
    """A random `VisionTransformer` of timm, by itself."""
    prepare()
    from timm.models.vision_transformer import VisionTransformer

    settings = {"embed_dim": VIS_DIM, "depth": LAYERS, "num_heads": 4, "num_classes": 0}
    with seeded(seed):
        model = VisionTransformer(img_size=image, patch_size=8, **(settings | options))
        randomise(model)
    return model.eval().requires_grad_(False)


def timm_clip(*, image: int | tuple[int, int] = 32, seed: int = 0, **options: Any) -> Any:
    """A random `CustomTextCLIP` whose vision tower is a trunk of timm."""
    prepare()
    from torch import nn

    model = clip_model(kind="CustomTextCLIP", seed=seed)
    tower = copy.deepcopy(siglip(layers=LAYERS).model.visual)
    with seeded(seed + 1):
        tower.trunk = timm_vit(image=image, seed=seed, **options)
        tower.head = nn.Sequential(nn.Linear(VIS_DIM, EMBED_DIM, bias=False))
        randomise(tower.head)
    model.visual = tower
    return model.eval().requires_grad_(False)


def upstream_load(model: Any, path: Path, **options: Any) -> Any:
    """What open_clip's `load_checkpoint` makes of a file: its answer, or what it raises."""
    prepare()
    from open_clip.factory import load_checkpoint

    return load_checkpoint(model, str(path), **options)


def state_of(model: Any) -> State:
    """A copy of its state dict, to compare with later."""
    return snapshot(model)


def assert_filled(model: Any, state: State) -> None:
    """Every tensor of the model holds the bits of `state`."""
    import torch

    filled = model.state_dict()
    assert filled.keys() == state.keys()
    for name, tensor in state.items():
        assert filled[name].dtype == tensor.dtype, name
        assert filled[name].shape == tensor.shape, name
        same = (one.contiguous().reshape(-1).view(torch.uint8) for one in (filled[name], tensor))
        assert torch.equal(*same), name


@contextlib.contextmanager
def refusal(model: Any, *words: str) -> Iterator[Any]:
    """The block raises an error of the package with all `words`, and leaves the model as it was.

    What is yielded has the error as `.value` afterwards.
    """
    before = state_of(model)
    with pytest.raises(CkptError) as caught:
        yield caught
    error = caught.value
    told = f"{error}\n{error.hint}"
    assert error.hint, told
    for word in words:
        assert word in told, told
    assert_filled(model, before)


def ours(model: Any, path: Any, **options: Any) -> Any:
    """The package's function of the same name, with the arguments that upstream's has."""
    from flamingo_ckpt.loading import load_checkpoint

    return load_checkpoint(model, path, **options)


def assert_ours_fills(path: Path, state: State, *, model: Any = None, **options: Any) -> Any:
    """Loading `path` strictly into another random model makes it `state`; returns the model."""
    model = clip_model(seed=99) if model is None else model
    result = ours(model, path, **options)
    assert result == ([], [])
    assert str(result) == "<All keys matched successfully>"
    assert_filled(model, state)
    return model
