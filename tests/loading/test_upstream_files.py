"""open_clip's function as its users call it: create a model, load a file, look at the logits.

The models, the files and the expected logits are made by open_clip, timm and transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import zoo
from tests.loading.open_clip_support import assert_filled, clip_model, state_of, timm_vit
from tests.zoo_clip import open_clip_cfg
from tests.zoo_lms import State, randomise, seeded

NAME = "zoo-ViT-T-8"


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """open_clip, with a small model among those it knows by name."""
    import open_clip

    folder = tmp_path_factory.mktemp("model_configs")
    config = open_clip_cfg(2)
    config["text_cfg"] |= {"vocab_size": 49408, "context_length": 20}
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return open_clip


@pytest.fixture(scope="module")
def trained(open_clip: Any) -> Any:
    """What somebody trained."""
    with seeded(1):
        model = open_clip.create_model(NAME)
        randomise(model)
    return model.eval().requires_grad_(False)


def features(model: Any, num_words: int = 49408) -> list[torch.Tensor]:
    """Image and text features and their logits, of the same inputs each time."""
    with seeded(7), torch.no_grad():
        pictures = torch.randn(2, 3, 32, 32)
        tokens = torch.randint(1, num_words, (2, model.context_length))
    model.eval()
    with torch.no_grad():
        image = model.encode_image(pictures, normalize=True)
        text = model.encode_text(tokens, normalize=True)
        return [image, text, model.logit_scale.exp() * image @ text.T]


def assert_same(model: Any, other: Any, *, num_words: int = 49408) -> None:
    """The weights are the same bits; the answers too, but for the order of float32 sums."""
    assert_filled(model, other.state_dict())
    pairs = zip(features(model, num_words), features(other, num_words), strict=True)
    for one, two in pairs:
        # where a weight lies in memory decides how a matrix product is cut
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_signature_is_upstreams(open_clip: Any) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    theirs = inspect.signature(open_clip.load_checkpoint).parameters.values()
    ours = list(inspect.signature(load_checkpoint).parameters.values())
    for one, other in zip(theirs, ours, strict=False):
        assert (one.name, one.default) == (other.name, other.default)
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in ours[len(theirs) :])


WRITERS: dict[str, Callable[[State, Path], object]] = {
    "epoch_3.pt": lambda state, path: torch.save(
        {
            "epoch": 3,
            "name": "run",
            "state_dict": {"module." + name: tensor for name, tensor in state.items()},
            "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1}]},
        },
        path,
    ),
    "weights.pth": torch.save,
    "open_clip_pytorch_model.bin": torch.save,
    "open_clip_model.safetensors": zoo.save_safetensors,
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_create_and_load(name: str, open_clip: Any, trained: Any, tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    path = tmp_path / name
    WRITERS[name](trained.state_dict(), path)
    theirs = open_clip.create_model(NAME, pretrained=str(path))
    assert_same(theirs, trained)

    model, _, _ = open_clip.create_model_and_transforms(NAME)
    incompatible_keys = load_checkpoint(model, str(path))
    assert str(incompatible_keys) == "<All keys matched successfully>"
    assert_same(model, trained)

    model = open_clip.create_model(NAME)
    missing, unexpected = load_checkpoint(model, path, strict=False, device="cpu")
    assert (missing, unexpected) == ([], [])
    assert_same(model, trained)


def test_models_train_on_after_a_load(open_clip: Any, trained: Any, tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    torch.save(trained.state_dict(), tmp_path / "a.pt")
    model = open_clip.create_model(NAME)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load_checkpoint(model, tmp_path / "a.pt")
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()
    model.encode_image(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    moved = model.state_dict()["visual.conv1.weight"]
    assert not torch.equal(moved, trained.state_dict()["visual.conv1.weight"])


def test_not_strict_tells_what_is_left(open_clip: Any, trained: Any, tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    state = state_of(trained)
    left_out = state.pop("visual.proj")
    state["head.weight"] = torch.randn(3, 3)
    torch.save(state, tmp_path / "a.pt")
    model = open_clip.create_model(NAME)
    theirs = open_clip.load_checkpoint(model, str(tmp_path / "a.pt"), strict=False)
    model = open_clip.create_model(NAME)
    ours = load_checkpoint(model, tmp_path / "a.pt", strict=False)
    assert ours == theirs == (["visual.proj"], ["head.weight"])
    assert repr(ours) == repr(theirs).removeprefix("_")
    with pytest.raises(RuntimeError, match=r"visual\.proj"):
        load_checkpoint(model, tmp_path / "a.pt", strict=True)
    with torch.no_grad():
        model.visual.proj.copy_(left_out)
    assert_same(model, trained)


def test_a_larger_picture(open_clip: Any, trained: Any, tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    torch.save(trained.state_dict(), tmp_path / "a.pt")
    theirs = open_clip.create_model(NAME, pretrained=str(tmp_path / "a.pt"), force_image_size=48)
    model = open_clip.create_model(NAME, force_image_size=48)
    load_checkpoint(model, tmp_path / "a.pt")
    assert_filled(model, theirs.state_dict())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16"])
def test_models_of_less_precision(
    precision: str, open_clip: Any, trained: Any, tmp_path: Path
) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    torch.save(trained.state_dict(), tmp_path / "a.pt")
    theirs = open_clip.create_model(
        NAME, pretrained=str(tmp_path / "a.pt"), precision=precision
    ).state_dict()
    model = open_clip.create_model(NAME, precision=precision)
    load_checkpoint(model, tmp_path / "a.pt")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])


def test_siglip_of_big_vision(open_clip: Any, tmp_path: Path) -> None:
    from open_clip.model import CustomTextCLIP

    from flamingo_ckpt.loading import load_checkpoint

    source = zoo.siglip(layers=2)
    path = zoo.save_npz(source.npz(), tmp_path / "siglip.npz")
    theirs = CustomTextCLIP(**source.config, init_logit_bias=-10.0)
    open_clip.load_checkpoint(theirs, str(path))
    model = CustomTextCLIP(**source.config, init_logit_bias=-10.0)
    result = load_checkpoint(model, path, strict=True)
    assert str(result) == "<All keys matched successfully>"
    words = source.config["text_cfg"]["vocab_size"]
    assert_same(model, theirs, num_words=words)
    assert torch.equal(model.logit_bias, theirs.logit_bias)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_clip_that_transformers_saved(as_folder: bool, tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    clip = zoo.clip(layers=2)
    clip.hf_model.save_pretrained(tmp_path)
    model = clip_model(seed=99)
    load_checkpoint(model, tmp_path if as_folder else tmp_path / "model.safetensors")
    assert_same(model, clip.open_clip_model, num_words=99)
    back = type(clip.hf_model)(clip.hf_model.config)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    load_checkpoint(back, tmp_path / "open_clip_pytorch_model.bin")
    for name, tensor in clip.hf.items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_a_trunk_that_timm_saved(tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_checkpoint

    source = timm_vit(seed=1)
    torch.save(
        {"state_dict": source.state_dict(), "arch": "vit", "metric": 0.5}, tmp_path / "a.pth"
    )
    model = timm_vit(seed=99)
    assert load_checkpoint(model, tmp_path / "a.pth") == ([], [])
    pictures = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pictures), source(pictures))


def test_a_vision_tower_of_open_clip_into_timm(tmp_path: Path) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    from flamingo_ckpt.loading import load_checkpoint

    source = clip_model(seed=1)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    options = {"pre_norm": True, "num_classes": 40}
    theirs = timm_vit(seed=99, **options)
    theirs.load_state_dict(checkpoint_filter_fn(state_of(source), theirs))
    model = timm_vit(seed=99, **options)
    tower = {n: t for n, t in source.state_dict().items() if n.startswith("visual.")}
    torch.save(tower, tmp_path / "b.pt")
    load_checkpoint(model, tmp_path / "b.pt")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
