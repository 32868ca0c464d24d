"""The tables of positions of real modules are found, with their grids, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.loading.position_tables import PositionTable, position_tables
from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from tests import zoo
from tests.loading.open_clip_support import (
    clip_model,
    coca_model,
    resnet_model,
    timm_clip,
    timm_vit,
)


def found(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """name -> (kind, grid or length, prefix, suffix), each checked against the parameter."""
    tables = position_tables(module)
    shapes = {strip_wrappers(n)[0]: tuple(t.shape) for n, t in module.state_dict().items()}
    for name, table in tables.items():
        assert table.shape == shapes[name]
        assert table.width == shapes[name][-1]
        rows = table.num_prefix + table.num_positions + table.num_suffix
        assert rows == torch.Size(table.shape[:-1]).numel()
    return {name: describe(table) for name, table in tables.items()}


def describe(table: PositionTable) -> tuple[Any, ...]:
    place = table.grid if table.kind == "image" else table.num_positions
    return table.kind, place, table.num_prefix, table.num_suffix


SQUARE = ("image", (4, 4), 1, 0)
TEXT = ("text", 12, 0, 0)


def test_open_clip() -> None:
    assert found(clip_model()) == {
        "visual.positional_embedding": SQUARE,
        "positional_embedding": TEXT,
    }
    assert found(clip_model(kind="CustomTextCLIP", image=(16, 64))) == {
        "visual.positional_embedding": ("image", (2, 8), 1, 0),
        "text.positional_embedding": TEXT,
    }
    assert found(clip_model().visual) == {"positional_embedding": SQUARE}


def test_coca_has_a_class_row_behind_its_text() -> None:
    assert found(coca_model()) == {
        "visual.positional_embedding": SQUARE,
        "text.positional_embedding": ("text", 12, 0, 1),
    }


def test_resnet_has_its_positions_in_the_pooling_attention() -> None:
    assert found(resnet_model(image=96)) == {
        "visual.attnpool.positional_embedding": ("image", (3, 3), 1, 0),
        "positional_embedding": TEXT,
    }


@pytest.mark.parametrize(
    ("options", "table"),
    [
        ({}, SQUARE),
        ({"image": (16, 64)}, ("image", (2, 8), 1, 0)),
        ({"class_token": False, "global_pool": "avg"}, ("image", (4, 4), 0, 0)),
        ({"no_embed_class": True}, ("image", (4, 4), 0, 0)),
        ({"reg_tokens": 3}, ("image", (4, 4), 4, 0)),
        ({"reg_tokens": 3, "no_embed_class": True}, ("image", (4, 4), 0, 0)),
        ({"dynamic_img_size": True}, SQUARE),
    ],
)
def test_timm_trunks(options: dict[str, Any], table: tuple[Any, ...]) -> None:
    assert found(timm_vit(**options)) == {"pos_embed": table}
    assert found(timm_clip(**options))["visual.trunk.pos_embed"] == table


def test_other_modules_of_timm() -> None:
    from timm.layers.attention_pool2d import AttentionPool2d
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    eva = Eva(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    assert found(eva) == {"pos_embed": SQUARE}
    rotary = Eva(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        use_abs_pos_emb=False,
        num_classes=0,
    )
    assert found(rotary) == {}
    naflex = NaFlexVit(
        NaFlexVitCfg(patch_size=8, embed_dim=16, depth=1, num_heads=2, pos_embed_grid_size=(2, 8)),
        num_classes=0,
    )
    assert found(naflex) == {"embeds.pos_embed": ("image", (2, 8), 0, 0)}
    assert found(AttentionPool2d(16, feat_size=(2, 3), num_heads=2)) == {
        "pos_embed": ("image", (2, 3), 1, 0)
    }


def test_transformers_clip() -> None:
    clip = zoo.clip(layers=2)
    assert found(clip.hf_model) == {
        "vision_model.embeddings.position_embedding.weight": SQUARE,
        "text_model.embeddings.position_embedding.weight": TEXT,
    }


def test_transformers_siglip() -> None:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipConfig, SiglipModel

    text = {"vocab_size": 30, "max_position_embeddings": 9, "pad_token_id": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes["num_hidden_layers"] = 1
    vision = {"image_size": 32, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text | sizes, vision_config=vision | sizes))
    assert found(model) == {
        "vision_model.embeddings.position_embedding.weight": ("image", (4, 4), 0, 0),
        "text_model.embeddings.position_embedding.weight": ("text", 9, 0, 0),
    }
    second = Siglip2VisionModel(Siglip2VisionConfig(num_patches=16, patch_size=8, **sizes))
    assert list(found(second).values()) == [("image", (4, 4), 0, 0)]


def test_paligemma_of_transformers() -> None:
    tables = found(zoo.paligemma().model)
    assert [(name.split(".")[-2], table[0]) for name, table in tables.items()] == [
        ("position_embedding", "image")
    ]


@pytest.mark.parametrize("family", ["opt", "mpt1b", "gptj"])
def test_language_models_have_none_that_may_be_resized(family: str) -> None:
    assert found(zoo.openflamingo(family).model) == {"vision_encoder.positional_embedding": SQUARE}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("openflamingo", "vision_encoder.positional_embedding"),
        ("hf-flamingo", "vision_encoder.vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_our_own_flamingos(layout: str, name: str) -> None:
    config = parse_config(zoo.openflamingo("opt").config, "config.json")
    assert found(build(config, layout, device="meta")) == {name: SQUARE}


class OpenAiVision(nn.Module):
    """As OpenAI's own package has it: no grid, but pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.input_resolution = 32
        self.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(17, 16))


def test_the_original_tower() -> None:
    assert found(OpenAiVision()) == {"positional_embedding": SQUARE}


class WithoutClass(nn.Module):
    """A tower like open_clip's that pools by the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.grid_size = (2, 8)
        self.positional_embedding = nn.Parameter(torch.randn(16, 16))


def test_a_tower_without_a_class_token() -> None:
    module = WithoutClass()
    assert found(module) == {"positional_embedding": ("image", (2, 8), 0, 0)}
    module.class_embedding = nn.Parameter(torch.randn(16))
    assert found(module) == {}  # 16 rows are no class row and 16 positions


def test_wrappers_do_not_show() -> None:
    plain = {"visual.positional_embedding": SQUARE, "positional_embedding": TEXT}
    model = clip_model()
    assert found(nn.DataParallel(model)) == plain
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert found(compiled) == plain
    model.visual = torch.compile(model.visual, backend="eager")
    assert found(model) == plain


def test_meta_modules_and_modules_without_any() -> None:
    with torch.device("meta"):
        model = clip_model()
    assert len(found(model)) == 2
    assert found(nn.Linear(3, 3)) == {}
