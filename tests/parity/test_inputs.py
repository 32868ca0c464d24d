"""What both models are fed: the same bits everywhere, and the user's own tensors or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.config import ModelConfig, parse_config
from flamingo_ckpt.parity.inputs import (
    Inputs,
    generate,
    image_size,
    image_token,
    media_token,
    pictures,
    set_media_token,
)
from flamingo_ckpt.parity.own_inputs import read_inputs
from tests import zoo
from tests.parity.sides import Sides, parity
from tests.support import cli

State = dict[str, torch.Tensor]
ROWS, SIZE = 60, 28
MEDIA, EOC, PAD = 57, 56, 58


def flamingo(text: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = {
        "model_type": "flamingo",
        "cross_attn_every_n_layers": 1,
        "media_token_id": MEDIA,
        "eoc_token_id": EOC,
        "text_config": {
            "model_type": "llama",
            "vocab_size": ROWS,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "pad_token_id": PAD,
            "max_position_embeddings": 32,
            **(text or {}),
        },
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": 14,
        },
    }
    return parse_config(config | changes, "flamingo")


def open_clip(text: dict[str, Any] | None = None, **vision: Any) -> ModelConfig:
    sizes = {"width": 8, "layers": 1}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**sizes, "head_width": 4, "image_size": SIZE, "patch_size": 14, **vision},
        "text_cfg": {
            **sizes,
            "heads": 2,
            "context_length": 9,
            "vocab_size": ROWS,
            **(text or {}),
        },
    }
    return parse_config(config, "open_clip")


def hf_clip(**text: Any) -> ModelConfig:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = {
        "model_type": "clip",
        "projection_dim": 8,
        "vision_config": {**sizes, "image_size": SIZE, "patch_size": 14},
        "text_config": {**sizes, "vocab_size": ROWS, "max_position_embeddings": 9, **text},
    }
    return parse_config(config, "hf-clip")


def paligemma(**changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {
        "model_type": "paligemma",
        "projection_dim": 8,
        "image_token_index": MEDIA,
        "text_config": {
            **sizes,
            "model_type": "gemma",
            "vocab_size": ROWS,
            "num_attention_heads": 2,
            "head_dim": 4,
        },
        "vision_config": {
            **sizes,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": 14,
        },
    }
    given = {name: value for name, value in (config | changes).items() if value is not None}
    return parse_config(given, "paligemma")


def clip_vision() -> ModelConfig:
    config = {**hf_clip().data["vision_config"], "model_type": "clip_vision_model"}
    return parse_config(config, "clip_vision")


def kind_of(config: ModelConfig) -> str:
    return "tower" if config.kind == "clip_vision" else config.kind


def made(config: ModelConfig, seed: int = 0) -> Inputs:
    return generate(kind_of(config), config, config, seed)


#: Never to be changed unawares: reports of two machines, or of two versions, are compared by them.
GOLDEN: tuple[tuple[str, Callable[[], ModelConfig], int, str], ...] = (
    ("flamingo", flamingo, 0, "03e8295c9d1183108285517ce4d9323183034233f7f2dc1d0b0197da23d43865"),
    ("flamingo", flamingo, 1, "e21ce1252ebaeaeed58643e813a27bd1ba75679fa8cf00cf4b1db847d21e7429"),
    (
        "flamingo-plain",
        lambda: flamingo(media_token_id=None, eoc_token_id=None),
        0,
        "325968f26c6d024af3d145f83a3d48785d398f53a40bb9ddcb7eb03d83c42484",
    ),
    ("open_clip", open_clip, 0, "28075c2651f7cb2e2e74e5b40f2182ce661768c3be201c184b0770705fd247d4"),
    ("hf-clip", hf_clip, 0, "28075c2651f7cb2e2e74e5b40f2182ce661768c3be201c184b0770705fd247d4"),
    ("tower", clip_vision, 0, "270c8a6fd943410122de5c31d62c6d16d9c3356a3011f9201bd0ea38e4836e72"),
    ("paligemma", paligemma, 0, "c7e931ebfecca04100f0f949a6d50d7b1eec0147d71fed4642ca7cd610331ef3"),
)
golden = pytest.mark.parametrize(
    ("config", "seed", "digest"),
    [pytest.param(*one[1:], id=f"{one[0]}-{one[2]}") for one in GOLDEN],
)


# --- generated ------------------------------------------------------------------------------------


@golden
def test_generated_inputs_are_these_bits(
    config: Callable[[], ModelConfig], seed: int, digest: str
) -> None:
    found = made(config(), seed)
    assert found.sha256() == digest
    assert (found.source, found.seed) == ("generated", seed)


@pytest.fixture
def other_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@golden
def test_nothing_that_is_set_changes_them(
    config: Callable[[], ModelConfig], seed: int, digest: str, other_settings: None
) -> None:
    drawn = torch.get_rng_state()
    assert made(config(), seed).sha256() == digest
    assert torch.get_rng_state().equal(drawn)


def test_the_digest_sees_names_dtypes_shapes_and_bytes() -> None:
    tokens = torch.arange(6).view(2, 3)
    variants = [
        {"lang_x": tokens},
        {"text": tokens},
        {"lang_x": tokens.int()},
        {"lang_x": tokens.view(3, 2)},
        {"lang_x": tokens + 1},
        {"lang_x": tokens, "attention_mask": tokens},
    ]
    digests = [Inputs(kind="flamingo", tensors=one, source="").sha256() for one in variants]
    assert len(set(digests)) == len(variants)
    turned = Inputs(kind="flamingo", tensors={"lang_x": tokens.T.contiguous().T}, source="")
    assert turned.sha256() == digests[0]  # values, not strides


def test_a_flamingo_has_every_case_that_its_mask_knows() -> None:
    """Text before the first of several images, an image at once, none at all, padding."""
    found = made(flamingo())
    assert (found.media_token_id, found.note) == (MEDIA, "")
    tokens, mask = found.tokens, found.mask
    assert mask is not None
    assert (tuple(tokens.shape), tuple(found.pixels.shape)) == ((3, 24), (3, 2, 1, 3, SIZE, SIZE))
    places = [(row == MEDIA).nonzero().flatten().tolist() for row in tokens]
    assert places == [[4, 12], [0, 5], []]
    assert tokens[0, 11] == EOC  # a chunk ends before the next image
    assert (~mask).sum(dim=1).tolist() == [0, 4, 0]
    assert not mask[1, -4:].any()
    assert (tokens[1, -4:] == PAD).all()
    words = tokens[mask & (tokens != MEDIA)]
    assert {EOC} == set(words.tolist()) & {EOC, PAD, 0, 1, 2}
    assert len(words.unique()) > 20
    assert found.pixels.flatten(0, 2).flatten(1).unique(dim=0).shape[0] == 6  # all different
    assert found.describe() == f"3 rows of 24 tokens, each with 2 images of {SIZE}x{SIZE}"


def test_a_model_that_takes_less() -> None:
    found = made(flamingo(max_num_media=1))
    assert found.pixels.shape[1] == 1
    assert [(row == MEDIA).sum() for row in found.tokens] == [1, 1, 0]
    assert "an image of" in found.describe()
    assert made(flamingo({"max_position_embeddings": 9})).tokens.shape == (3, 9)


def test_only_tokens_that_both_have() -> None:
    b = flamingo({"vocab_size": 20}, media_token_id=None, eoc_token_id=None)
    found = generate("flamingo", flamingo(), b, 0)
    words = found.tokens[found.tokens != MEDIA]
    assert int(words[~torch.isin(words, torch.tensor([EOC]))].max()) < 20
    assert int(found.tokens.max()) == MEDIA  # that A says so is a fault of B


def test_which_token_stands_for_an_image() -> None:
    silent = flamingo(media_token_id=None)
    assert media_token(flamingo(), silent) == (MEDIA, "")
    assert media_token(silent, flamingo()) == (MEDIA, "")
    token, note = media_token(silent, silent)
    assert token == ROWS - 1
    assert "media_token_id" in note
    assert note in made(silent).document()["description"]
    module = torch.nn.Module()
    set_media_token(module, made(silent))
    assert module.media_token_id == ROWS - 1
    set_media_token(module, made(open_clip()))
    assert module.media_token_id == ROWS - 1
    assert image_token(paligemma()) == MEDIA
    assert image_token(paligemma(image_token_index=None, image_token_id=3)) == 3


def test_pictures_are_those_of_eight_bits() -> None:
    for is_siglip, mean, std in (
        (True, (0.5,) * 3, (0.5,) * 3),
        (False, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ):
        found = pictures(3, 2, (20, 35), is_siglip=is_siglip).double().numpy()
        assert found.shape == (2, 3, 20, 35)
        values = (found * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))) * 255
        assert np.abs(values - values.round()).max() < 1e-4
        assert values.min() >= -1e-4
        assert values.max() <= 255.0001
        assert values.std() > 40
    assert not pictures(3, 1, (8, 8), is_siglip=True).equal(pictures(4, 1, (8, 8), is_siglip=True))
    assert image_size(open_clip(image_size=[28, 42])) == (28, 42)
    assert made(open_clip(image_size=[28, 42])).pixels.shape == (3, 3, 28, 42)


def ends_of(found: Inputs, end: int) -> list[list[int]]:
    return [(row == end).nonzero().flatten().tolist() for row in found.tokens]


@pytest.mark.parametrize(
    ("config", "end"),
    [
        (open_clip(), ROWS - 1),
        (open_clip({"pool_type": "eos", "eos_id": 5}), 5),
        (hf_clip(eos_token_id=2), ROWS - 1),
        (hf_clip(eos_token_id=7), 7),
    ],
)
def test_texts_of_clip_end_where_both_libraries_pool(config: ModelConfig, end: int) -> None:
    found = made(config)
    assert (tuple(found.tokens.shape), found.mask) == ((3, 9), None)
    assert ends_of(found, end) == [[8], [5], [2]]
    assert (found.tokens[1, 6:] == 0).all()
    assert (found.tokens[2, 3:] == 0).all()
    if end == ROWS - 1:
        assert found.tokens.argmax(dim=1).tolist() == [8, 5, 2]


def test_a_tower_is_shown_what_the_whole_model_is() -> None:
    found = made(clip_vision())
    assert list(found.tensors) == ["image"]
    assert found.pixels.equal(made(hf_clip()).pixels)
    assert found.describe() == f"3 images of {SIZE}x{SIZE}"


def test_a_paligemma_has_a_token_for_each_patch() -> None:
    found = made(paligemma())
    tokens, mask = found.tokens, found.mask
    assert mask is not None
    assert (tuple(tokens.shape), tuple(found.pixels.shape)) == ((2, 14), (2, 3, SIZE, SIZE))
    assert (tokens[:, :4] == MEDIA).all()
    assert not (tokens[:, 4:] == MEDIA).any()
    assert (~mask).sum(dim=1).tolist() == [0, 3]
    types = found.tensors["token_type_ids"]
    # the last words of each row are an answer, which is causal, and the rest a prompt, which is not
    assert types.tolist() == [[0] * 9 + [1] * 5, [0] * 8 + [1] * 3 + [0] * 3]
    assert (types[:, :4] == 0).all()


def test_a_paligemma_whose_config_names_no_token_for_pictures() -> None:
    data = {k: v for k, v in paligemma().data.items() if not k.startswith("image_token_")}
    with pytest.raises(CkptError) as caught:
        image_token(parse_config(data, "config.json"))
    assert (caught.value.code, caught.value.where) == ("FC468", "config.json")
    assert image_token(parse_config(data | {"image_token_id": 7}, "config.json")) == 7
    both = {"image_token_index": None, "image_token_id": 7}
    assert image_token(parse_config(data | both, "config.json")) == 7


def test_the_document_tells_all_of_it() -> None:
    document = made(paligemma()).document()
    assert document["sha256"] == made(paligemma()).sha256()
    assert (document["source"], document["seed"]) == ("generated", 0)
    assert document["description"] == f"2 rows of 14 tokens, each with an image of {SIZE}x{SIZE}"
    assert document["tensors"][0] == {
        "name": "pixel_values",
        "dtype": "F32",
        "shape": [2, 3, SIZE, SIZE],
    }
    assert {one["dtype"] for one in document["tensors"][1:]} == {"I64"}


# --- the user's own -------------------------------------------------------------------------------


def flamingo_tensors() -> State:
    return {
        "vision_x": torch.linspace(-1, 1, 2 * 3 * SIZE**2).view(2, 1, 1, 3, SIZE, SIZE),
        "lang_x": torch.tensor([[MEDIA, 3, 4], [5, MEDIA, 6]]),
    }


def clip_tensors() -> State:
    pixels = torch.linspace(-1, 1, 2 * 3 * SIZE**2).view(2, 3, SIZE, SIZE)
    return {"image": pixels, "text": torch.arange(18).view(2, 9)}


def paligemma_tensors() -> State:
    ids = torch.tensor([[MEDIA] * 4 + [2, 9], [MEDIA] * 4 + [2, 8]])
    return {"pixel_values": clip_tensors()["image"], "input_ids": ids}


def write(state: State, path: Path) -> str:
    return str(zoo.save_safetensors(state, path / "inputs.safetensors"))


def read(state: State, config: ModelConfig, path: Path) -> Inputs:
    return read_inputs(write(state, path), kind_of(config), config, config)


def assert_holds(found: Inputs, state: State) -> None:
    assert sorted(found.tensors) == sorted(state)
    for name, tensor in state.items():
        assert found.tensors[name].equal(tensor), name
        assert found.tensors[name].dtype == tensor.dtype, name


def test_good_files(tmp_path: Path) -> None:
    state = flamingo_tensors()
    found = read(state, flamingo(), tmp_path)
    ones = torch.ones_like(state["lang_x"])
    assert_holds(found, state | {"attention_mask": ones})
    assert found.source == str(tmp_path / "inputs.safetensors")
    assert (found.seed, found.media_token_id) == (None, MEDIA)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert_holds(
        read(state | {"attention_mask": mask}, flamingo(), tmp_path),
        state | {"attention_mask": mask},
    )
    assert_holds(read(clip_tensors(), open_clip(), tmp_path), clip_tensors())
    assert_holds(read(clip_tensors(), hf_clip(), tmp_path), clip_tensors())
    # CLIP compares every picture with every text
    texts = {"text": torch.ones(3, 9, dtype=torch.int64)}
    assert_holds(read(clip_tensors() | texts, hf_clip(), tmp_path), clip_tensors() | texts)
    gemma = paligemma_tensors()
    types = torch.zeros_like(gemma["input_ids"])
    assert_holds(
        read(gemma, paligemma(), tmp_path),
        gemma | {"attention_mask": torch.ones_like(types), "token_type_ids": types},
    )


def test_other_dtypes_and_no_axis_of_frames(tmp_path: Path) -> None:
    state = flamingo_tensors()
    state["vision_x"] = state["vision_x"].half().float()
    given = {
        "vision_x": state["vision_x"][:, :, 0].half(),
        "lang_x": state["lang_x"].int(),
        "attention_mask": torch.ones(2, 3, dtype=torch.bool),
    }
    wanted = state | {"attention_mask": torch.ones_like(state["lang_x"])}
    assert_holds(read(given, flamingo(), tmp_path), wanted)


@pytest.mark.parametrize(
    ("config", "tensors"), [(flamingo(), flamingo_tensors()), (hf_clip(), clip_tensors())]
)
def test_transformers_names_will_do(config: ModelConfig, tensors: State, tmp_path: Path) -> None:
    pixels, text = tensors.values()
    found = read({"pixel_values": pixels, "input_ids": text}, config, tmp_path)
    assert found.sha256() == read(tensors, config, tmp_path).sha256()


def test_other_formats_hold_inputs_too(tmp_path: Path) -> None:
    state = clip_tensors()
    paths = [
        zoo.save_torch(state, tmp_path / "inputs.pt"),
        zoo.save_npz({name: one.numpy() for name, one in state.items()}, tmp_path / "inputs.npz"),
    ]
    # a wrapped one has another entry beside it, and its tensors all the same
    paths.append(zoo.save_torch(state, tmp_path / "wrapped.pt", wrapper="state_dict"))
    for path in paths:
        assert_holds(read_inputs(str(path), "clip", open_clip(), open_clip()), state)


def changed(state: State, **changes: torch.Tensor | None) -> State:
    return {name: one for name, one in (state | changes).items() if one is not None}


IDS = flamingo_tensors()["lang_x"]
PIXELS = flamingo_tensors()["vision_x"]


@pytest.mark.parametrize(
    ("key", "words", "changes"),
    [
        ("lang_x", "there is no `lang_x`", {"lang_x": None}),
        ("vision_x", "there is no `vision_x`", {"vision_x": None}),
        ("lang_x", "whole numbers", {"lang_x": IDS[0]}),
        ("lang_x", "whole numbers", {"lang_x": IDS.float()}),
        ("lang_x", "whole numbers", {"lang_x": IDS[:, :0]}),
        ("lang_x", "whole numbers", {"lang_x": IDS.bool()}),
        ("lang_x", "whole numbers", {"lang_x": IDS.to(torch.complex64)}),
        ("attention_mask", "hides a whole row", {"attention_mask": torch.zeros(IDS.shape)}),
        ("attention_mask", "hides a whole row", {"attention_mask": IDS * 0 + 0.5}),
        ("vision_x", "floating-point", {"vision_x": PIXELS.to(torch.uint8)}),
        ("vision_x", "shape", {"vision_x": PIXELS[0, 0]}),
        ("vision_x", "shape", {"vision_x": PIXELS[:1]}),
        ("vision_x", "shape", {"vision_x": PIXELS[:, :0]}),
        ("vision_x", "shape", {"vision_x": PIXELS[..., :27]}),
        ("vision_x", "shape", {"vision_x": PIXELS.movedim(3, -1)}),
        ("attention_mask", "another shape", {"attention_mask": torch.ones(2, 4)}),
        ("lang_x", "beyond the vocabulary of 60 rows", {"lang_x": IDS + 3}),
        ("lang_x", "beyond the vocabulary", {"lang_x": IDS - 4}),
        ("labels", "`labels` is none of", {"labels": IDS + 1}),
        ("pixel_values", "under two names", {"pixel_values": PIXELS + 1}),
        ("image", "`image` is none of", {"image": PIXELS + 1}),
    ],
)
def test_what_does_not_serve_is_named(
    tmp_path: Path, key: str, words: str, changes: dict[str, torch.Tensor | None]
) -> None:
    with pytest.raises(CkptError) as caught:
        read(changed(flamingo_tensors(), **changes), flamingo(), tmp_path)
    error = caught.value
    # of two names for one tensor, whichever comes last is told
    keys = {key, "vision_x"} if "two names" in words else {key}
    assert (error.code, error.where) == ("FC484", str(tmp_path / "inputs.safetensors"))
    assert error.key in keys
    assert words in error.message
    assert error.hint


@pytest.mark.parametrize(
    ("config", "tensors", "key"),
    [
        (open_clip(), {"image": PIXELS[:, 0]}, "image"),
        (open_clip(), {"text": torch.full((2, 9), ROWS)}, "text"),
        (open_clip(), {"text": clip_tensors()["text"][:, :-1]}, "text"),
        (hf_clip(), {"text": clip_tensors()["text"][:, :-1]}, "text"),
        (open_clip(), {"attention_mask": torch.ones(2, 9)}, "attention_mask"),
        (open_clip(), {"image": PIXELS[:, 0, 0, :2]}, "image"),
        (hf_clip(), {"text": torch.zeros(2, 9)}, "text"),
    ],
)
def test_of_clip_too(config: ModelConfig, tensors: State, key: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        read(clip_tensors() | tensors, config, tmp_path)
    assert (caught.value.code, caught.value.key) == ("FC484", key)


def test_of_a_tower_too(tmp_path: Path) -> None:
    state = {"image": clip_tensors()["image"]}
    assert_holds(read(state, clip_vision(), tmp_path), state)
    assert_holds(read({"pixel_values": state["image"]}, clip_vision(), tmp_path), state)
    for changes, key in (
        ({"text": clip_tensors()["text"]}, "text"),
        ({"image": state["image"][0]}, "image"),
    ):
        with pytest.raises(CkptError) as caught:
            read(state | changes, clip_vision(), tmp_path)
        assert (caught.value.code, caught.value.key) == ("FC484", key)


def test_of_paligemma_too(tmp_path: Path) -> None:
    state = paligemma_tensors()
    for changes, key in (
        ({"pixel_values": state["pixel_values"][:, None]}, "pixel_values"),
        ({"input_ids": state["input_ids"] + 10}, "input_ids"),
        ({"attention_mask": torch.ones(1, 6)}, "attention_mask"),
        ({"token_type_ids": torch.ones(2, 5)}, "token_type_ids"),
        ({"vision_x": state["pixel_values"] + 1}, "vision_x"),
    ):
        with pytest.raises(CkptError) as caught:
            read(state | changes, paligemma(), tmp_path)
        assert (caught.value.code, caught.value.key) == ("FC484", key)


@pytest.mark.parametrize("name", ["\u202etxt", "a\u200bb", "`quoted`", "é"])
def test_hostile_names_are_escaped(tmp_path: Path, name: str) -> None:
    with pytest.raises(CkptError) as caught:
        read(flamingo_tensors() | {name: torch.ones(2)}, flamingo(), tmp_path)
    assert caught.value.code == "FC484"
    assert caught.value.message.isprintable()


def test_names_that_are_none_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CkptError) as caught:
        read(flamingo_tensors() | {"red\x1b[31m": torch.ones(2)}, flamingo(), tmp_path)
    assert "\x1b" not in caught.value.message
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.safetensors", "nowhere.safetensors"):
        with pytest.raises(CkptError):
            read_inputs(str(tmp_path / name), "flamingo", flamingo(), flamingo())


def test_from_the_command_line(sides: Sides, tmp_path: Path) -> None:
    pair = sides.clip()
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    state = {"image": torch.linspace(-2, 2, 6 * 32**2).view(2, 3, 32, 32), "text": tokens}
    path = write(state, tmp_path)
    answer = parity(pair.a, pair.b, *pair.options, "--inputs", path)
    assert answer.code == 0
    data = answer.document["data"]
    assert (data["source"], data["seed"]) == (path, None)
    path = write(state | {"text": tokens + 90}, tmp_path)
    found = cli("parity", pair.a, pair.b, *pair.options, "--inputs", path, "--json")
    assert (found.code, found.codes) == (2, ["FC484"])
    assert found.document["findings"][0]["key"] == "text"
