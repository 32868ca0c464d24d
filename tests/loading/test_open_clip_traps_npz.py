"""big_vision's `.npz`, which open_clip's `load_checkpoint` copies in by a path of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import zoo
from tests.loading.open_clip_support import (
    assert_filled,
    assert_ours_fills,
    clip_model,
    ours,
    refusal,
    state_of,
    upstream_load,
)
from tests.zoo_lms import State, prepare, randomise, seeded

LAYERS = 2


def fresh(seed: int = 99, **text: Any) -> Any:
    """The zoo's SigLIP with other random weights."""
    source = zoo.siglip(layers=LAYERS)
    prepare()
    from open_clip.model import CustomTextCLIP

    config = dict(source.config)
    image = text.pop("image", None)
    config["text_cfg"] = config["text_cfg"] | text
    with seeded(seed):
        model = CustomTextCLIP(**config, init_logit_bias=-10.0)
        if image is not None:
            model.visual.trunk.set_input_size((image, image))
        randomise(model)
    return model.eval().requires_grad_(False)


def arrays(**options: Any) -> dict[str, Any]:
    return zoo.siglip(layers=LAYERS).npz(**options)


@pytest.fixture(scope="module")
def state() -> State:
    return dict(zoo.siglip(layers=LAYERS).state)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_every_arrangement(stacked: bool, prefix: str, state: State, tmp_path: Path) -> None:
    path = zoo.save_npz(arrays(stacked=stacked, prefix=prefix), tmp_path / "a.npz")
    model = fresh()
    answer = upstream_load(model, path)
    assert_filled(model, state)
    assert answer == {}  # no missing_keys to ask for
    with pytest.raises(AttributeError):
        answer.missing_keys  # noqa: B018
    for strict in (True, False):
        assert_ours_fills(path, state, model=fresh(), strict=strict)
    result = ours(fresh(), path)
    missing, unexpected = result
    assert (result.missing_keys, result.unexpected_keys) == (missing, unexpected) == ([], [])


def test_another_suffix(state: State, tmp_path: Path) -> None:
    path = zoo.save_npz(arrays(), tmp_path / "a.npz").rename(tmp_path / "a.NPZ")
    with pytest.raises(RuntimeError, match="hasRecord"):
        upstream_load(fresh(), path)
    assert_ours_fills(path, state, model=fresh())


def test_a_missing_array(state: State, tmp_path: Path) -> None:
    held = arrays()
    del held["params/txt/head/kernel"]
    path = zoo.save_npz(held, tmp_path / "a.npz")
    key = "text.text_projection.weight"
    model = fresh()
    before = state_of(model)
    for strict in (True, False):
        with pytest.raises(KeyError, match="txt/head/kernel"):
            upstream_load(model, path, strict=strict)
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert len(changed) > len(before) - 5  # half-loaded, and the caller has an exception

    model = fresh()
    with refusal(model, key):
        ours(model, path)
    kept = model.state_dict()[key].clone()
    assert ours(model, path, strict=False) == ([key], [])
    assert_filled(model, state | {key: kept})


def test_an_array_too_many(state: State, tmp_path: Path) -> None:
    held = arrays() | {"params/img/extra/kernel": np.ones((2, 2), dtype=np.float32)}
    path = zoo.save_npz(held, tmp_path / "a.npz")
    assert upstream_load(fresh(), path) == {}  # not a word
    model = fresh()
    with refusal(model, "img/extra/kernel"):
        ours(model, path)
    assert ours(model, path, strict=False) == ([], ["params/img/extra/kernel"])
    assert_filled(model, state)


def test_another_text_length(state: State, tmp_path: Path) -> None:
    from open_clip.model import resize_text_pos_embed

    path = zoo.save_npz(arrays(), tmp_path / "a.npz")
    with pytest.raises(RuntimeError, match="must match the size"):
        upstream_load(fresh(context_length=8), path)
    wanted = dict(state)
    resize_text_pos_embed(wanted, fresh(context_length=8))
    assert_ours_fills(path, wanted, model=fresh(context_length=8))
    key = "text.positional_embedding"
    cut = state | {key: state[key][:8]}
    assert_ours_fills(path, cut, model=fresh(context_length=8), text_positions="truncate")


def test_another_image_size(state: State, tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    path = zoo.save_npz(arrays(), tmp_path / "a.npz")
    with pytest.raises(AssertionError):
        upstream_load(fresh(image=64), path)
    key = "visual.trunk.pos_embed"
    table = resample_abs_pos_embed(state[key], [8, 8], [4, 4], num_prefix_tokens=0)
    assert_ours_fills(path, state | {key: table}, model=fresh(image=64))


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    path = zoo.save_npz(arrays(), tmp_path / "a.npz")
    with pytest.raises(AttributeError, match="trunk"):
        upstream_load(clip_model(), path)
    for strict in (True, False):
        model = clip_model()
        with refusal(model):
            ours(model, path, strict=strict)
