"""Tables of positions that open_clip's `load_checkpoint` trips over, and what ours does with them.

The oracle is open_clip's own resize where that is right, timm's `resample_abs_pos_embed` elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import zoo
from tests.loading.open_clip_support import (
    LAYERS,
    assert_filled,
    assert_ours_fills,
    clip_model,
    coca_model,
    ours,
    refusal,
    resnet_model,
    state_of,
    timm_clip,
    upstream_load,
)
from tests.zoo_lms import State

IMAGE, TEXT = "visual.positional_embedding", "positional_embedding"


@pytest.fixture(scope="module")
def state() -> State:
    return state_of(clip_model(seed=1))


def saved(state: State, tmp_path: Path, name: str = "a.pt") -> Path:
    return zoo.save_torch(state, tmp_path / name)


def resampled(
    table: torch.Tensor, src: tuple[int, int], dst: tuple[int, int], num_prefix: int = 1
) -> torch.Tensor:
    """timm's resize of a table [rows, width]."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(table[None], list(dst), list(src), num_prefix_tokens=num_prefix)[
        0
    ]


# --- sizes that open_clip knows --------------------------------------------------------------


@pytest.mark.parametrize(("image", "options"), [(64, {}), (16, {}), ((32, 64), {"image_grid": 4})])
def test_another_image_size(
    image: Any, options: dict[str, Any], state: State, tmp_path: Path
) -> None:
    path = saved(state, tmp_path)
    model = clip_model(image=image)
    upstream_load(model, path)
    wanted = state_of(model)
    assert not torch.equal(wanted[IMAGE][1:2], state[IMAGE][1:2])
    grid = {"image_grid": (4, 4)} if options else {}
    assert_ours_fills(path, wanted, model=clip_model(image=image, seed=99), **grid)
    if options:
        # a square is the likely form of 16 cells, and not the only one
        other = clip_model(image=image, seed=99)
        with refusal(other, IMAGE, "4x8", "image_grid=(4, 4)") as caught:
            ours(other, path)
        assert caught.value.code == "FC440"


def test_a_resize_is_in_the_report(state: State, tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_into

    path = saved(state, tmp_path)
    report = load_into(clip_model(image=64, context=8), path)
    told = [(one.key, one.src_grid, one.dst_grid, one.kernel) for one in report.resized]
    assert sorted(told) == [
        (TEXT, (12,), (8,), "linear"),
        (IMAGE, (4, 4), (8, 8), "bicubic, antialias"),
    ]
    assert [one.code for one in report.findings].count("FC446") == 2
    assert load_into(clip_model(), path).resized == ()


@pytest.mark.parametrize("context", [16, 8])
def test_another_text_length(context: int, state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    model = clip_model(context=context)
    upstream_load(model, path)
    assert_ours_fills(path, state_of(model), model=clip_model(context=context, seed=99))
    custom = clip_model(kind="CustomTextCLIP", context=context)
    upstream_load(custom, path)
    fresh = clip_model(kind="CustomTextCLIP", context=context, seed=99)
    assert_ours_fills(path, state_of(custom), model=fresh)


def test_text_is_cut_on_request(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    shorter = clip_model(context=8)
    upstream_load(shorter, path)  # every token at another place than it was trained on
    assert not torch.equal(shorter.positional_embedding, state[TEXT][:8])
    wanted = state | {TEXT: state[TEXT][:8]}
    assert_ours_fills(path, wanted, model=clip_model(context=8, seed=99), text_positions="truncate")
    longer = clip_model(context=16, seed=99)
    with refusal(longer, TEXT, "12", "16", "linear") as caught:
        ours(longer, path, text_positions="truncate")
    assert caught.value.code == "FC443"


# --- grids and counts ------------------------------------------------------------------------


def test_as_many_cells_in_another_form(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    model = clip_model(image=(16, 64))
    upstream_load(model, path)
    assert_filled(model, state)  # a table for 4x4, as it is, on a grid of 2x8
    model = clip_model(image=(16, 64), seed=99)
    with refusal(model, IMAGE, "2x8", "image_grid=(4, 4)"):
        ours(model, path)
    wanted = state | {IMAGE: resampled(state[IMAGE], (4, 4), (2, 8))}
    assert_ours_fills(path, wanted, model=model, image_grid=(4, 4))
    assert_ours_fills(path, state, model=model, image_grid=(2, 8))


def test_a_square_number_of_cells_that_is_no_square(tmp_path: Path) -> None:
    from flamingo_ckpt.loading import load_into

    source = state_of(clip_model(image=(16, 64), seed=1))
    path = saved(source, tmp_path)
    model = clip_model(image=64)
    upstream_load(model, path)
    square = resampled(source[IMAGE], (4, 4), (8, 8))
    assert torch.equal(model.state_dict()[IMAGE], square)
    right = source | {IMAGE: resampled(source[IMAGE], (2, 8), (8, 8))}
    assert_ours_fills(path, right, model=clip_model(image=64, seed=99), image_grid=(2, 8))
    # untold it is taken for a square as well, and that is told
    (finding,) = (one for one in load_into(model, path).findings if one.code == "FC446")
    assert "4x4" in finding.detail
    assert "image_grid=" in str(finding.hint)


def test_a_count_that_is_no_square(tmp_path: Path) -> None:
    source = state_of(clip_model(image=(16, 32), seed=1))
    path = saved(source, tmp_path)
    with pytest.raises(RuntimeError, match=r"Sizes of tensors must match"):
        upstream_load(clip_model(), path)
    model = clip_model(seed=99)
    with refusal(model, IMAGE, "8 positions", "4x4", "image_grid="):
        ours(model, path)
    wanted = source | {IMAGE: resampled(source[IMAGE], (2, 4), (4, 4))}
    assert_ours_fills(path, wanted, model=model, image_grid=(2, 4))
    assert_ours_fills(path, source, model=clip_model(image=(16, 32), seed=99))


def test_a_folder_whose_config_tells_the_grid(tmp_path: Path) -> None:
    source = state_of(clip_model(image=(16, 64), seed=1))
    saved(source, tmp_path, "open_clip_pytorch_model.bin")
    same, square = clip_model(image=(16, 64), seed=99), clip_model(image=64, seed=99)
    with refusal(same, IMAGE, "2x8"):
        ours(same, tmp_path)
    config = {"model_cfg": {"vision_cfg": {"image_size": [16, 64], "patch_size": 8}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert_ours_fills(tmp_path, source, model=same)
    wanted = source | {IMAGE: resampled(source[IMAGE], (2, 8), (8, 8))}
    assert_ours_fills(tmp_path, wanted, model=square)
    # the caller knows better, and a config of another size is of another model
    assert_ours_fills(tmp_path, source, model=clip_model(seed=99), image_grid=(4, 4))
    config["model_cfg"]["vision_cfg"]["image_size"] = [16, 80]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with refusal(same, IMAGE, "2x8"):
        ours(same, tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with refusal(same, IMAGE, "2x8"):
        ours(same, tmp_path)


def test_a_grid_that_does_not_fit(state: State, tmp_path: Path) -> None:
    model = clip_model(image=64, seed=99)
    with refusal(model, IMAGE, "(3, 5)", "16") as caught:
        ours(model, saved(state, tmp_path), image_grid=(3, 5))
    assert caught.value.code == "FC444"


def test_a_table_without_its_class_row(state: State, tmp_path: Path) -> None:
    path = saved(state | {IMAGE: state[IMAGE][1:].clone()}, tmp_path)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        upstream_load(clip_model(), path)
    for strict in (True, False):
        model = clip_model(seed=99)
        with refusal(model, IMAGE, "16 rows", "[17, 64]", "class row") as caught:
            ours(model, path, strict=strict)
        assert caught.value.code == "FC442"


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_on_a_cpu(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = saved(narrow, tmp_path)
    with pytest.raises(NotImplementedError, match="not implemented for"):
        upstream_load(clip_model(image=64), path)
    table = resampled(narrow[IMAGE].float(), (4, 4), (8, 8)).to(dtype)
    wanted = narrow | {IMAGE: table}
    model = clip_model(image=64, seed=99)
    ours(model, path)
    assert_filled(model, {name: tensor.float() for name, tensor in wanted.items()})
    assert_ours_fills(path, wanted, model=clip_model(image=64, seed=99).to(dtype))


def test_float64_is_not_rounded(state: State, tmp_path: Path) -> None:
    wide = {name: tensor.double() / 3 for name, tensor in state.items()}
    path = saved(wide, tmp_path)
    model = clip_model(image=64).double()
    upstream_load(model, path)
    assert_ours_fills(path, state_of(model), model=clip_model(image=64, seed=99).double())


# --- towers whose tables open_clip does not resize -------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_prefix"),
    [({}, 1), ({"class_token": False, "global_pool": "avg"}, 0), ({"reg_tokens": 2}, 3)],
    ids=["class", "none", "registers"],
)
def test_a_trunk_of_timm(options: dict[str, Any], num_prefix: int, tmp_path: Path) -> None:
    source = state_of(timm_clip(seed=1, **options))
    path = saved(source, tmp_path)
    key = "visual.trunk.pos_embed"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(key)}"):
            upstream_load(timm_clip(image=64, **options), path, strict=strict)
    wanted = source | {key: resampled(source[key][0], (4, 4), (8, 8), num_prefix)[None]}
    assert_ours_fills(path, wanted, model=timm_clip(image=64, seed=99, **options))


def test_a_trunk_of_timm_that_changes_its_size_afterwards(tmp_path: Path) -> None:
    source = state_of(timm_clip(image=64, seed=1))
    path = saved(source, tmp_path)
    model = timm_clip(image=32, seed=99)
    model.visual.trunk.set_input_size((64, 64))  # as `force_image_size` does
    assert_ours_fills(path, source, model=model)


def test_a_resnet(tmp_path: Path) -> None:
    source = state_of(resnet_model(image=64, seed=1))
    path = saved(source, tmp_path)
    key = "visual.attnpool.positional_embedding"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(key)}"):
            upstream_load(resnet_model(image=96), path, strict=strict)
    wanted = source | {key: resampled(source[key], (2, 2), (3, 3))}
    assert_ours_fills(path, wanted, model=resnet_model(image=96, seed=99))


def test_towers_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    clip = zoo.clip(layers=LAYERS)
    config = type(clip.hf_model.config).from_dict(clip.hf_model.config.to_dict())
    config.vision_config.image_size = 48
    config.text_config.max_position_embeddings = 9
    open_clip = clip_model(image=48, context=9)
    upstream_load(open_clip, saved(clip.open_clip, tmp_path))
    wanted = zoo.hf_from_open_clip(state_of(open_clip))
    for state in (clip.open_clip, clip.hf):
        path = saved(state, tmp_path, "b.pt")
        assert_ours_fills(path, wanted, model=CLIPModel(config))
        fresh = clip_model(image=48, context=9, seed=99)
        assert_ours_fills(path, state_of(open_clip), model=fresh)


# --- text ------------------------------------------------------------------------------------


def test_another_text_width(state: State, tmp_path: Path) -> None:
    path = saved(state | {TEXT: torch.randn(12, 48)}, tmp_path)
    with pytest.raises(AssertionError, match="text pos_embed width changed!"):
        upstream_load(clip_model(), path)
    for strict in (True, False):
        model = clip_model(seed=99)
        with refusal(model, TEXT, "[12, 48]", "[12, 36]"):
            ours(model, path, strict=strict)


def test_coca_keeps_its_class_row(tmp_path: Path) -> None:
    key = "text.positional_embedding"
    source = state_of(coca_model(seed=1))
    path = saved(source, tmp_path)
    assert_ours_fills(path, source, model=coca_model(seed=99))
    model = coca_model(image=64, context=8)
    upstream_load(model, path)
    theirs = state_of(model)
    assert not torch.equal(theirs[key][-1], source[key][-1])  # moved as if it were a position
    shorter = state_of(clip_model(context=8)) | {TEXT: source[key][:-1]}
    from open_clip.model import resize_text_pos_embed

    resize_text_pos_embed(shorter, clip_model(context=8))
    wanted = theirs | {key: torch.cat([shorter[TEXT], source[key][-1:]])}
    assert_ours_fills(path, wanted, model=coca_model(image=64, context=8, seed=99))
    cut = theirs | {key: torch.cat([source[key][:8], source[key][-1:]])}
    assert_ours_fills(
        path,
        cut,
        model=coca_model(image=64, context=8, seed=99),
        text_positions="truncate",
    )
