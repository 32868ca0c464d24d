"""Tables of positions: decided on shapes, bit for bit what open_clip and timm compute."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.file_grid import grid_from_config
from flamingo_ckpt.loading.position_tables import PositionTable
from flamingo_ckpt.loading.resize import plan_resize, resize_table
from tests.loading.open_clip_support import clip_model

WIDTH = 6


def image_table(grid: tuple[int, int], *, num_prefix: int = 1, batched: bool = False) -> Any:
    rows = grid[0] * grid[1] + num_prefix
    return PositionTable(
        kind="image",
        shape=(1, rows, WIDTH) if batched else (rows, WIDTH),
        num_positions=rows - num_prefix,
        grid=grid,
        num_prefix=num_prefix,
    )


def text_table(length: int, *, num_suffix: int = 0) -> Any:
    rows = length + num_suffix
    return PositionTable(
        kind="text", shape=(rows, WIDTH), num_positions=length, num_suffix=num_suffix
    )


def resized(source: torch.Tensor, table: Any, **options: Any) -> torch.Tensor:
    plan = plan_resize("table", source.shape, table, **options)
    assert plan is not None
    before = source.clone()
    found = resize_table(source, plan)
    assert source.view(torch.uint8).equal(before.view(torch.uint8))
    assert found.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
    assert tuple(found.shape) == table.shape
    assert found.dtype == source.dtype
    assert found.is_contiguous()
    return found


def refused(shape: tuple[int, ...], table: Any, **options: Any) -> CkptError:
    with pytest.raises(CkptError) as caught:
        plan_resize("visual.positional_embedding", shape, table, where="f.pt", **options)
    error = caught.value
    assert error.key == "visual.positional_embedding"
    assert "`visual.positional_embedding`" in error.message
    assert error.where == "f.pt"
    assert error.hint
    return error


@pytest.mark.parametrize("image", [64, 16, (32, 64), (16, 64)])
def test_square_source_is_resized_as_open_clip_does(image: Any) -> None:
    from open_clip.model import resize_pos_embed

    key = "visual.positional_embedding"
    source = clip_model(image=32).state_dict()[key]
    model = clip_model(image=image)
    state = {key: source.clone()}
    resize_pos_embed(state, model)
    grid = model.visual.grid_size
    table = PositionTable(
        kind="image",
        shape=tuple(model.visual.positional_embedding.shape),
        num_positions=grid[0] * grid[1],
        grid=grid,
        num_prefix=1,
    )
    plan = plan_resize(key, source.shape, table, image_grid=(4, 4))
    assert plan is not None
    found = resize_table(source, plan)
    if image == (16, 64):  # as many cells: open_clip takes 4x4 for 2x8
        assert torch.equal(state[key], source)
        assert not torch.equal(found, source)
    else:
        assert torch.equal(found, state[key])


@pytest.mark.parametrize(("src", "dst"), [((4, 4), (7, 7)), ((6, 3), (2, 9)), ((2, 8), (4, 4))])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_any_grid_is_resized_as_timm_does(
    src: tuple[int, int], dst: tuple[int, int], num_prefix: int
) -> None:
    from timm.layers import resample_abs_pos_embed

    source = torch.randn(1, src[0] * src[1] + num_prefix, WIDTH)
    wanted = resample_abs_pos_embed(source, list(dst), list(src), num_prefix_tokens=num_prefix)
    table = image_table(dst, num_prefix=num_prefix, batched=True)
    found = resized(source, table, image_grid=src)
    assert torch.equal(found, wanted)
    assert torch.equal(found[:, :num_prefix], source[:, :num_prefix])
    flat = resized(source[0], image_table(dst, num_prefix=num_prefix), image_grid=src)
    assert torch.equal(flat, wanted[0])


@pytest.mark.parametrize("context", [7, 20])
def test_text_is_resized_as_open_clip_does(context: int) -> None:
    from open_clip.model import resize_text_pos_embed

    source = clip_model(context=12).state_dict()["positional_embedding"]
    model = clip_model(context=context)
    state = {"positional_embedding": source.clone()}
    resize_text_pos_embed(state, model)
    table = PositionTable(kind="text", shape=(context, source.shape[1]), num_positions=context)
    plan = plan_resize("positional_embedding", source.shape, table)
    assert plan is not None
    assert torch.equal(resize_table(source, plan), state["positional_embedding"])
    assert (plan.src_grid, plan.dst_grid, plan.kernel) == ((12,), (context,), "linear")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_go_through_float32(dtype: torch.dtype) -> None:
    source = torch.randn(17, WIDTH).to(dtype)
    with pytest.raises(NotImplementedError):  # what open_clip runs into on a CPU
        torch.nn.functional.interpolate(
            source[1:].reshape(1, 4, 4, -1).movedim(-1, 1), (8, 8), mode="bicubic", antialias=True
        )
    table = image_table((8, 8))
    found = resized(source, table)
    assert torch.equal(found, resized(source.float(), table).to(dtype))
    assert torch.equal(found[:1], source[:1])
    text = resized(source, text_table(9))
    assert torch.equal(text, resized(source.float(), text_table(9)).to(dtype))


def test_float64_stays_float64() -> None:
    source = torch.randn(17, WIDTH, dtype=torch.float64)
    exact, rounded = (resized(s, image_table((5, 5))) for s in (source, source.float()))
    assert not torch.equal(exact, rounded.double())
    assert torch.allclose(exact, rounded.double(), atol=1e-5)


def test_class_row_is_kept_bit_for_bit_even_where_it_is_no_number() -> None:
    source = torch.randn(17, WIDTH)
    source[0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3e38, 1.0])
    found = resized(source, image_table((3, 3)))
    assert torch.equal(found[0].view(torch.int32), source[0].view(torch.int32))
    assert found[1:].isfinite().all()


def test_class_row_of_coca_is_no_position() -> None:
    source = torch.randn(13, WIDTH)
    found = resized(source, text_table(8, num_suffix=1))
    assert torch.equal(found[-1], source[-1])
    assert torch.equal(found[:-1], resized(source[:-1], text_table(8)))
    cut = resized(source, text_table(8, num_suffix=1), text_positions="truncate")
    assert torch.equal(cut, torch.cat([source[:8], source[-1:]]))


def test_truncate_cuts_and_refuses_to_lengthen() -> None:
    source = torch.randn(12, WIDTH)
    assert torch.equal(resized(source, text_table(8), text_positions="truncate"), source[:8])
    error = refused((12, WIDTH), text_table(20), text_positions="truncate")
    assert error.code == "FC443"
    assert "12" in error.message
    assert "20" in error.message
    assert "linear" in str(error.hint)
    assert plan_resize("t", (8, WIDTH), text_table(8), text_positions="truncate") is None
    assert refused((8, WIDTH), text_table(8), text_positions="cut").code == "FC443"


def test_naflex_tables_carry_their_grid() -> None:
    from timm.layers import resample_abs_pos_embed

    source = torch.randn(1, 4, 4, WIDTH)
    table = PositionTable(kind="image", shape=(1, 2, 8, WIDTH), num_positions=16, grid=(2, 8))
    flat = resample_abs_pos_embed(source.flatten(1, 2), [2, 8], [4, 4], num_prefix_tokens=0)
    assert torch.equal(resized(source, table), flat.reshape(1, 2, 8, WIDTH))


def test_what_is_the_same_is_left_alone() -> None:
    assert plan_resize("t", (17, WIDTH), image_table((4, 4))) is None
    assert plan_resize("t", (17, WIDTH), image_table((2, 8)), image_grid=(2, 8)) is None
    # 2x5 again, most likely, since no square has 10 cells
    assert plan_resize("t", (11, WIDTH), image_table((2, 5))) is None
    assert plan_resize("t", (12, WIDTH), text_table(12)) is None


def test_equal_counts_are_not_equal_grids() -> None:
    error = refused((17, WIDTH), image_table((2, 8)))
    assert error.code == "FC440"
    assert "2x8" in error.message
    assert "image_grid=(4, 4)" in str(error.hint)
    plan = plan_resize("t", (17, WIDTH), image_table((4, 4)), image_grid=(2, 8))
    assert plan is not None
    assert (plan.src_grid, plan.dst_grid, plan.inferred) == ((2, 8), (4, 4), False)


@pytest.mark.parametrize(
    ("rows", "table"),
    [
        (1 + 8, image_table((4, 4))),  # 2x4 or 4x2?
        (1 + 16, image_table((4, 8))),  # 4x4, 2x8?
        (1 + 18, image_table((2, 8))),
        (20, image_table((4, 4), num_prefix=0)),
    ],
)
def test_a_grid_that_could_be_several_is_refused(rows: int, table: Any) -> None:
    error = refused((rows, WIDTH), table)
    assert error.code == "FC440"
    assert "image_grid=" in str(error.hint)
    assert str(rows - table.num_prefix) in error.message


def test_table_without_class_row_into_a_model_with_one() -> None:
    for rows in ({"image_grid": (4, 4)}, {}):
        error = refused((16, WIDTH), image_table((4, 4)), **rows)
        assert error.code == "FC442"
        assert "[17, 6]" in error.message
        assert "16 rows" in error.message
    # of another size nothing but the caller can tell it
    assert "class row" in str(refused((64, WIDTH), image_table((4, 4))).hint)
    assert refused((64, WIDTH), image_table((4, 4)), image_grid=(8, 8)).code == "FC442"


def test_table_with_class_row_into_a_model_without() -> None:
    table = image_table((4, 4), num_prefix=0)
    assert refused((17, WIDTH), table).code == "FC442"
    assert refused((65, WIDTH), table, image_grid=(8, 8)).code == "FC442"


@pytest.mark.parametrize("grid", [(3, 5), (0, 16), (-4, -4), (16, 2)])
def test_a_told_grid_must_fit(grid: tuple[int, int]) -> None:
    error = refused((17, WIDTH), image_table((8, 8)), image_grid=grid)
    assert error.code == "FC444"
    assert str(grid) in error.message
    assert "16" in str(error.hint)


def test_width_cannot_be_resized() -> None:
    for table in (image_table((4, 4)), text_table(17)):
        error = refused((17, WIDTH + 2), table)
        assert error.code == "FC441"
        assert "[17, 8]" in error.message
        assert "[17, 6]" in error.message


@pytest.mark.parametrize("shape", [(17,), (1, 17, WIDTH), (1, WIDTH), (0, WIDTH)])
def test_what_is_no_table_is_refused(shape: tuple[int, ...]) -> None:
    assert refused(shape, image_table((4, 4))).code == "FC445"


def test_the_record_tells_the_grids() -> None:
    plan = plan_resize("v", (17, WIDTH), image_table((8, 8)))
    assert plan is not None
    finding = plan.as_finding()
    assert (finding.code, finding.severity, finding.key) == ("FC446", "info", "v")
    assert "4x4" in finding.detail
    assert "8x8" in finding.detail
    assert "bicubic" in finding.detail
    assert "image_grid=" in str(finding.hint)
    text = plan_resize("t", (12, WIDTH), text_table(8))
    assert text is not None
    assert "truncate" in str(text.as_finding().hint)


@given(
    src=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dst=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_prefix=st.integers(0, 3),
)
def test_constant_tables_stay_constant(
    src: tuple[int, int], dst: tuple[int, int], num_prefix: int
) -> None:
    rows = src[0] * src[1] + num_prefix
    source = torch.full((rows, WIDTH), 0.625)
    table = image_table(dst, num_prefix=num_prefix)
    plan = plan_resize("t", source.shape, table, image_grid=src)
    assert (plan is None) == (src == dst)
    if plan is not None:
        found = resize_table(source, plan)
        assert tuple(found.shape) == table.shape
        assert torch.allclose(found, torch.full(table.shape, 0.625), rtol=1e-6)


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2))
def test_nothing_but_squares_and_equal_counts_is_inferred(
    rows: int, height: int, width: int, num_prefix: int
) -> None:
    table = image_table((height, width), num_prefix=num_prefix)
    count = rows - num_prefix
    square = count > 0 and math.isqrt(count) ** 2 == count
    as_it_is = count == height * width and (height == width or not square)
    if not as_it_is and not (square and height == width):
        with pytest.raises(CkptError) as caught:
            plan_resize("t", (rows, WIDTH), table)
        assert caught.value.code in ("FC440", "FC442", "FC445")
        return
    plan = plan_resize("t", (rows, WIDTH), table)
    assert (plan is None) == as_it_is
    if plan is not None:
        assert plan.inferred
        assert plan.src_grid == (math.isqrt(count),) * 2


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        ({"model_cfg": {"vision_cfg": {"image_size": 224, "patch_size": 16}}}, (14, 14)),
        ({"vision_cfg": {"image_size": [32, 64], "patch_size": 8}}, (4, 8)),
        ({"vision_config": {"image_size": 30, "patch_size": 8}}, (3, 3)),
        ({"image_size": 32, "patch_size": [8, 4]}, (4, 8)),
        ({"vision_config": {"image_size": 224}}, None),
        ({"image_size": 4, "patch_size": 8}, None),
        ({"image_size": "big", "patch_size": 0}, None),
        ({"model_cfg": None}, None),
        ({"image_size": True, "patch_size": True}, None),
    ],
)
def test_a_config_tells_the_grid(config: Any, grid: Any) -> None:
    before = copy.deepcopy(config)
    assert grid_from_config(config) == grid
    assert config == before
