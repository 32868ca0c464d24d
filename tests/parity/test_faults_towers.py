"""parity: every fault planted in a CLIP or a PaliGemma is found and blamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import zoo
from tests.parity.planting import (
    State,
    flip,
    scale,
    swap,
    swap_parts,
    transpose,
    unload,
    zero_rows,
)
from tests.parity.sides import Pair, Sides, assert_blamed, fault, parity
from tests.zoo_paligemma import WORDS

SEEN = ("FC301", "FC480")
SETTING = ("FC407", "FC480")
each_version = pytest.mark.parametrize("version", [1, 2])


# --- CLIP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_query_and_key_of_a_tower(tower: str, sides: Sides) -> None:
    place = f"{tower}_model.encoder.layers.1.self_attn."
    names = [f"{place}{name}_proj.weight" for name in "qk"]
    answer = sides.clip().answer(lambda state: swap(state, *names) and None)
    assert_blamed(answer, SEEN, fault(f"{tower}.layers.1", names, "are swapped"))
    assert answer.diverges_at == {"as-is": f"{tower}.layers.1"}


@pytest.fixture(scope="module")
def native(sides: Sides) -> Pair:
    """transformers' CLIP, and a folder of open_clip's."""
    state = zoo.clip(layers=2).open_clip
    folder = zoo.save_folder(state, {}, sides.folder / "native")
    (folder / "config.json").unlink()
    config = {"model_cfg": zoo.open_clip_cfg(2)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return Pair(a=sides.clip().b, b=folder, spare=sides.folder / "planted")


@pytest.mark.parametrize(
    ("parts", "words"),
    [((0, 1), ("q.weight", "k.weight")), ((1, 2), ("k.weight", "v.weight"))],
)
def test_parts_of_a_fused_matrix(
    parts: tuple[int, int], words: tuple[str, str], native: Pair
) -> None:
    key = "transformer.resblocks.0.attn.in_proj_weight"
    answer = native.answer(lambda state: swap_parts(state, key, *parts, of=3))
    assert_blamed(answer, SEEN, fault("text.layers.0", key, "are swapped", *words))
    assert {one["key"] for one in answer.errors} - {None} == {key}


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("text.embeddings", "text_model.embeddings.position_embedding.weight"),
        ("image_features", "visual_projection.weight"),
        ("text_features", "text_projection.weight"),
    ],
)
def test_another_sign(stage: str, key: str, sides: Sides) -> None:
    answer = sides.clip().answer(lambda state: scale(state, key, -1))
    assert_blamed(answer, SEEN, fault(stage, key, "other sign"))


def test_another_temperature(sides: Sides) -> None:
    answer = sides.clip().answer(lambda state: scale(state, "logit_scale", 1.01))
    assert_blamed(answer, SEEN, fault("logits", "logit_scale", "differs"))


def test_a_transposed_matrix_a_lost_norm_and_a_flipped_bit(sides: Sides) -> None:
    turned = "text_model.encoder.layers.0.self_attn.out_proj.weight"
    flipped = "visual_projection.weight"
    norm = "vision_model.pre_layrnorm"

    def plant(state: State) -> None:
        transpose(state, turned)
        flip(state, flipped, 29)
        unload(state, norm)

    assert_blamed(
        sides.clip().answer(plant),
        SEEN,
        fault("vision.pre_norm", [f"{norm}.weight", f"{norm}.bias"], "was not loaded"),
        fault("text.layers.0", turned, "is transposed"),
        fault("image_features", flipped, "a bit is flipped"),
    )


@pytest.mark.parametrize(
    ("tower", "field", "value", "stage"),
    [
        ("vision", "hidden_act", "gelu", "vision.layers.0"),
        ("text", "hidden_act", "gelu", "text.layers.0"),
        ("text", "layer_norm_eps", 1e-6, "text.layers.0"),
    ],
)
def test_a_wrong_setting_of_a_tower(
    tower: str, field: str, value: object, stage: str, sides: Sides
) -> None:
    answer = sides.clip().answer(
        None, lambda config: config[f"{tower}_config"].update({field: value})
    )
    words = f"`{tower}.{field}` is {value!r} in B's config"
    assert_blamed(answer, SETTING, fault(stage, (), words))


def test_the_activation_that_openai_did_not_train_with(native: Pair) -> None:
    """open_clip's own config says it with one word for both towers."""

    def wrong(config: dict[str, object]) -> None:
        config["model_cfg"]["quick_gelu"] = False  # type: ignore[index]

    b = native.planted()
    path = b / "open_clip_config.json"
    config = json.loads(path.read_text())
    wrong(config)
    path.write_text(json.dumps(config))
    answer = parity(native.a, b)
    assert (answer.code, answer.codes) == (1, ["FC407", "FC480", "FC483"])
    first = answer.blame[0]
    assert (first.stage, first.confirmed, first.keys) == ("vision.layers.0", True, ())
    assert "hidden_act" in first.suspect
    assert {one.stage for one in answer.blame} <= {"vision.layers.0", "text.layers.0"}
    assert all(one.confirmed for one in answer.blame)


def test_rows_of_the_vocabulary_of_clip(sides: Sides) -> None:
    key = "text_model.embeddings.token_embedding.weight"
    rows = zoo.open_clip_cfg(2)["text_cfg"]["vocab_size"]
    pair = sides.clip()
    zeroed = pair.answer(lambda state: zero_rows(state, key, rows - 1))
    words = f"row {rows - 1} of {rows} differ"
    assert_blamed(zeroed, SEEN, fault("text.embeddings", key, words))
    cut = pair.answer(lambda state: state.update({key: state[key][: rows - 4]}))
    assert_blamed(cut, ("FC205",), fault("logits", key, "not resized"))


def test_positions_of_another_grid(sides: Sides) -> None:
    key = "vision_model.embeddings.position_embedding.weight"

    def plant(state: State) -> None:
        state[key] = torch.cat((state[key], torch.randn(9, 64)))

    pair = sides.clip()
    both = pair.answer(plant, lambda config: config["vision_config"].update(image_size=40))
    words = "`vision.image_size` is 40 in B's config and 32 in A's"
    assert_blamed(both, ("FC301", *SETTING), fault("vision.embeddings", key, words))
    assert_blamed(pair.answer(plant), ("FC205",), fault("logits", key, "not resized"))


def test_a_tensor_of_clip_that_is_missing_or_too_much(sides: Sides) -> None:
    key = "text_model.encoder.layers.1.mlp.fc1.bias"
    pair = sides.clip()
    missing = pair.answer(lambda state: state.pop(key) is None or None)
    assert_blamed(missing, ("FC203",), fault("logits", key, "not in B"))
    more = pair.answer(lambda state: state.update(logit_bias=torch.ones(())))
    assert (more.code, more.codes, more.told("FC204")) == (1, ["FC204"], ["logit_bias"])
    assert more.blame == []


# --- PaliGemma ------------------------------------------------------------------------------------

TOWER, TEXT = "model.vision_tower.", "model.language_model."


@each_version
def test_four_faults_of_paligemma_in_order(version: int, sides: Sides) -> None:
    tower = [f"{TOWER}encoder.layers.0.self_attn.{name}_proj.weight" for name in "qk"]
    turned = f"{TOWER}encoder.layers.1.self_attn.out_proj.weight"
    kv = [f"{TEXT}layers.0.self_attn.{name}_proj.weight" for name in "kv"]
    norm = f"{TEXT}layers.1.input_layernorm.weight"

    def plant(state: State) -> None:
        swap(state, *tower)
        transpose(state, turned)
        swap(state, *kv)
        state[norm] = torch.zeros_like(state[norm])  # 1 is added to it when it is used

    assert_blamed(
        sides.paligemma(version).answer(plant),
        SEEN,
        fault("vision.layers.0", tower, "are swapped"),
        fault("vision.layers.1", turned, "is transposed"),
        fault("lm.layers.0", kv, "are swapped"),
        fault("lm.layers.1", norm, "was not loaded"),
    )


@pytest.mark.parametrize(
    ("version", "section", "field", "value", "stage"),
    [
        (1, "vision", "hidden_act", "gelu", "vision.layers.0"),
        (1, "text", "hidden_act", "relu", "lm.layers.0"),
        (1, "text", "rms_norm_eps", 1e-5, "lm.layers.0"),
        (2, "text", "hidden_activation", "gelu", "lm.layers.0"),
        (2, "text", "query_pre_attn_scalar", 64, "lm.layers.0"),
        (2, "text", "final_logit_softcapping", 1.0, "logits"),
    ],
)
def test_a_wrong_setting_of_paligemma(
    version: int, section: str, field: str, value: object, stage: str, sides: Sides
) -> None:
    answer = sides.paligemma(version).answer(
        None, lambda config: config[f"{section}_config"].update({field: value})
    )
    part = "language" if section == "text" else section
    words = f"`{part}.{field}` is {value!r} in B's config"
    assert_blamed(answer, SETTING, fault(stage, (), words))


def test_two_layers_of_paligemma_in_each_others_place(sides: Sides) -> None:
    keys: list[list[str]] = [[], []]

    def plant(state: State) -> None:
        keys[0] = [key for key in state if key.startswith(f"{TEXT}layers.0.")]
        keys[1] = [swap(state, key, key.replace(".layers.0.", ".layers.1."))[1] for key in keys[0]]

    told = "another tensor's content"
    assert_blamed(
        sides.paligemma(2).answer(plant),
        SEEN,
        fault("lm.layers.0", keys[0], told),
        fault("lm.layers.1", keys[1], told),
    )


def test_bits_of_paligemma(sides: Sides) -> None:
    pair = sides.paligemma(2)
    low, high = f"{TEXT}layers.1.mlp.up_proj.weight", f"{TOWER}embeddings.patch_embedding.weight"
    unseen = pair.answer(lambda state: flip(state, low, 0))
    assert (unseen.code, unseen.codes, unseen.told("FC301")) == (1, ["FC301"], [low])
    assert unseen.blame == []
    seen = pair.answer(lambda state: flip(state, high, 29))
    assert_blamed(seen, SEEN, fault("vision.embeddings", high, "a bit is flipped"))


def test_projector_and_embedding(sides: Sides) -> None:
    projector, table = "model.multi_modal_projector.linear.weight", f"{TEXT}embed_tokens.weight"
    pair = sides.paligemma(2)
    scaled = pair.answer(lambda state: scale(state, projector, 1.01))
    assert_blamed(scaled, SEEN, fault("projector", projector, "is A's times 1.01"))
    moved = pair.answer(lambda state: state.update({table: state[table].roll(1, 0)}))
    assert_blamed(moved, SEEN, fault("lm.embed_tokens", table, "same rows in another order"))


def test_a_vocabulary_without_room_for_the_image(sides: Sides) -> None:
    key = f"{TEXT}embed_tokens.weight"
    pair = sides.paligemma(1)
    answer = pair.answer(lambda state: state.update({key: state[key][:WORDS].clone()}))
    # padding rows that nothing reads: all tokens of the inputs but the image's are there
    assert_blamed(answer, ("FC205", "FC301", "FC418"), fault("logits", key, "not resized"))
    assert answer.told("FC205") == answer.told("FC418") == [key]


def test_a_tensor_of_paligemma_that_is_missing_or_too_much(sides: Sides) -> None:
    key = f"{TOWER}post_layernorm.bias"
    pair = sides.paligemma(1)
    missing = pair.answer(lambda state: state.pop(key) is None or None)
    assert_blamed(missing, ("FC203",), fault("logits", key, "not in B"))
    stray = f"{TEXT}layers.1.post_feedforward_layernorm.weight"
    more = pair.answer(lambda state: state.update({stray: torch.ones(40)}))
    assert (more.code, more.told("FC204")) == (1, [stray])


@each_version
def test_a_fault_in_big_visions_arrays(version: int, sides: Sides, tmp_path: Path) -> None:
    """Stacked over layers and transposed: the array is named, and the layer in it."""
    arrays = zoo.paligemma(version=version, layers=2).npz()
    name = "params/llm/layers/attn/attn_vec_einsum/w"
    arrays[name] = arrays[name].copy()
    arrays[name][1] *= -1
    faulty = zoo.save_npz(arrays, tmp_path / "faulty.npz")
    answer = parity(sides.paligemma_folder(version, "L4"), faulty, "--greedy", "0")
    words = ("other sign", "lm.layers.1.self_attn.o_proj.weight")
    assert_blamed(answer, SEEN, fault("lm.layers.1", name, *words))
