"""diff: every single planted fault is found, and named by the key as stored in the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import zoo
from tests.diff_support import Answer, diff, embedding, key_of, misspelt, model, respelt, without

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_kind = pytest.mark.parametrize("kind", ["partial", "full", "hf"])
State = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def state_of(family: str, kind: str, **options: Any) -> State:
    if kind == "hf":
        return zoo.hf_flamingo(family, **options).state
    found = zoo.openflamingo(family, **options)
    return found.partial if kind == "partial" else found.full


def config(family: str, folder: Path, *, every_n: int = 2, layers: int = 4) -> str:
    found = zoo.openflamingo(family, every_n=every_n, layers=layers)
    return model(found.config, folder / f"{family}-{every_n}-{layers}")


def against_model(state: State, family: str, folder: Path) -> Answer:
    return diff(zoo.save_torch(state, folder / "planted.pt"), config(family, folder))


def places(state: State, family: str, kind: str) -> list[str]:
    """A key of each part of a partial file; of others, a gate and one of each frozen tower."""
    gated = ".gated_cross_attn_layer."
    gate = key_of(state, gated, "attn_gate")
    if kind == "partial":
        matrices = [key_of(state, place, "to_kv.weight") for place in ("perceiver.", gated)]
        return [gate, *matrices, embedding(family)]
    layers = f"lang_encoder.{zoo.FAMILIES[family][0]}.0.decoder_layer."
    frozen = next(name for name, t in state.items() if name.startswith(layers) and t.ndim == 2)
    fused_or_not = re.compile(r"vision_encoder\..*(in_proj_weight|q_proj.weight)$")
    return [gate, frozen, next(name for name in state if fused_or_not.match(name))]


@each_kind
@each_family
def test_one_key_is_dropped_misspelt_or_too_much(family: str, kind: str, folder: Path) -> None:
    state = state_of(family, kind)
    for key in places(state, family, kind):
        dropped = against_model(without(state, key), family, folder)
        assert (dropped.code, dropped.told) == (1, [("FC203", key)])
        assert dropped.document["missing"] == [key]
        wrong = misspelt(key)
        renamed = against_model(respelt(state, key, wrong), family, folder)
        assert (renamed.code, renamed.told) == (1, [("FC214", wrong)])
        assert renamed.document["renamed"] == [[wrong, key]]
        assert "missing" not in renamed.summary
        assert "unexpected" not in renamed.summary
        extra = against_model(state | {key + "_extra": state[key].clone()}, family, folder)
        assert (extra.code, extra.told) == (1, [("FC204", key + "_extra")])
        assert extra.summary["unexpected"] == 1


@each_kind
@each_family
def test_one_tensor_has_another_dtype_or_is_transposed(
    family: str, kind: str, folder: Path
) -> None:
    state = state_of(family, kind)
    for key in places(state, family, kind):
        told = ("FC206", key)
        cast = against_model(state | {key: state[key].bfloat16()}, family, folder)
        assert cast.code == 1
        assert told in cast.told
        assert cast.summary["changed"] == 1
        assert "BF16 here, F32 in the model" in cast.detail("FC206")
        # where another name still holds the tensor as it was, that is told too
        assert {code for code, _ in cast.told} <= {"FC206", "FC202"}
        if state[key].ndim == 2 and state[key].shape[0] != state[key].shape[1]:
            turned = against_model(state | {key: state[key].T.contiguous()}, family, folder)
            assert ("FC205", key) in turned.told
            assert "transposed" in turned.detail("FC205")


@each_kind
@each_family
def test_a_vocabulary_that_is_some_rows_off(family: str, kind: str, folder: Path) -> None:
    state = state_of(family, kind)
    key, rows = embedding(family), zoo.flamingo_rows(family)
    for count in (-3, 5):
        other = state | {key: torch.randn(rows + count, state[key].shape[1])}
        answer = against_model(other, family, folder)
        assert answer.told == [("FC216", key)]
        assert answer.detail("FC216").endswith(
            f"vocabulary of {rows + count} rows here, {rows} in the model: {-count:+d}"
        )
        assert f"--vocab-rows {rows}" in answer.errors[0]["hint"]


@pytest.mark.parametrize("kind", ["full", "hf"])
def test_a_position_embedding_for_another_image_size(kind: str, folder: Path) -> None:
    state = state_of("llama", kind)
    key = next(name for name in state if re.search(r"vision.*position\w+embedding", name))
    rows, width = state[key].shape
    answer = against_model(state | {key: torch.randn(26, width)}, "llama", folder)
    assert answer.told == [("FC216", key)]
    assert (rows, "5x5 here and of 4x4 in the model" in answer.detail("FC216")) == (17, True)
    # of another width it is wrong, not resizable
    answer = against_model(state | {key: torch.randn(rows, width + 8)}, "llama", folder)
    assert answer.told == [("FC205", key)]


@each_family
def test_the_wrong_interval(family: str, folder: Path) -> None:
    found = zoo.openflamingo(family)
    path = zoo.save_torch(found.partial, folder / "interval.pt")
    answer = diff(path, config(family, folder, every_n=1))
    assert answer.code == 1
    assert "every 2 layers, B every 1 layers" in answer.detail("FC217")
    hint = next(one["hint"] for one in answer.errors if one["code"] == "FC217")
    assert hint == "`cross_attn_every_n_layers` of the model should be 2"
    layers = zoo.FAMILIES[family][0]
    gated = zoo.openflamingo(family, every_n=1).partial.keys() - found.partial.keys()
    wanted = {name for name in gated if re.search(rf"{layers}\.[02]\.gated", name)}
    assert len(wanted) == 22
    assert set(answer.keys("FC203")) == wanted
    back = diff(config(family, folder, every_n=1), path)
    assert set(back.keys("FC204")) == wanted


def test_a_lost_block_is_no_other_interval(folder: Path) -> None:
    state = state_of("llama", "partial", every_n=1)
    kept = {name: t for name, t in state.items() if ".layers.2.gated" not in name}
    path = zoo.save_torch(kept, folder / "lost-block.pt")
    answer = diff(path, config("llama", folder, every_n=1))
    assert len(answer.keys("FC203")) == 11
    assert all(".layers.2.gated" in key for key in answer.keys("FC203"))


@each_kind
def test_a_language_model_of_another_size(kind: str, folder: Path) -> None:
    state = state_of("llama", kind)
    wide = zoo.openflamingo("llama").config
    wide["text_config"] |= {"hidden_size": 64, "num_attention_heads": 4}
    path = zoo.save_torch(state, folder / "size.pt")
    answer = diff(path, model(wide, folder / "wide"))
    assert answer.code == 1
    assert {one["code"] for one in answer.errors} == {"FC205"}
    for word in ("embed_tokens", "attn.norm.weight", "to_q.weight", "to_out.weight"):
        assert any(word in key for key in answer.keys("FC205"))
    deep = diff(path, config("llama", folder, layers=8))
    missing = deep.keys("FC203")
    assert {int(re.search(r"layers\.(\d+)", key)[1]) for key in missing} <= {4, 5, 6, 7}  # type: ignore[index]
    assert len([key for key in missing if "gated" in key]) == 22


@pytest.mark.parametrize("other", ["llama", "opt", "gptj", "gpt_neox", "mpt7b"])
def test_the_config_of_another_family(other: str, folder: Path) -> None:
    family = "gptj" if other == "llama" else "llama"
    path = zoo.save_torch(state_of(family, "partial"), folder / "family.pt")
    answer = diff(path, config(other, folder))
    assert answer.code == 1
    assert "of different families" in answer.detail("FC416")
    assert {one["code"] for one in answer.errors} == {"FC416", "FC203", "FC204"}
    # whatever is the language model's has another name there
    assert embedding(family) in answer.keys("FC204")
    assert embedding(other) in answer.keys("FC203")
    assert answer.summary["same"] == 69


def test_another_kind_of_model(folder: Path) -> None:
    clip = zoo.save_torch(zoo.clip().open_clip, folder / "clip.pt")
    answer = diff(clip, config("llama", folder))
    assert answer.code == 1
    assert "no map leads from one to the other" in answer.detail("FC416")
    assert set(answer.keys("FC204")) == set(zoo.clip().open_clip)


def test_half_one_layout_half_another(folder: Path) -> None:
    ours, theirs = state_of("llama", "partial"), state_of("llama", "hf")
    some = ("perceiver.layers.0.", "perceiver.layers.1.")
    perceiver = [name for name in ours if name.startswith(some)]
    other = {name: t for name, t in theirs.items() if name.startswith(some)}
    half = without(ours, *perceiver) | other
    answer = against_model(half, "llama", folder)
    assert answer.code == 1
    assert "`hf-flamingo`" in answer.detail("FC417")
    named = set(answer.keys("FC214")) | set(answer.keys("FC204"))
    assert named == set(other)
    wanted = {pair[1] for pair in answer.document["renamed"]} | set(answer.keys("FC203"))
    assert wanted == set(perceiver)
    # each is paired with the key that it is, not with one that looks like it
    for mine, key in answer.document["renamed"]:
        assert theirs[mine].equal(ours[key])


@each_family
def test_alias_trees_with_a_gap_or_with_other_content(family: str, folder: Path) -> None:
    state = state_of(family, "full")
    alias = key_of(state, "lang_encoder.old_decoder_blocks.1.")
    first = alias.replace("old_decoder_blocks.1", f"{zoo.FAMILIES[family][0]}.1.decoder_layer")
    gap = against_model(without(state, alias), family, folder)
    assert gap.told == [("FC203", alias)]
    assert f"`{first}`" in gap.detail("FC203")
    good = zoo.save_torch(state, folder / "good.pt")
    torn = zoo.save_torch(state | {alias: state[alias] + 1}, folder / "torn.pt")
    assert diff(torn, good, "--level", "headers").code == 0
    answer = diff(torn, good, "--level", "bits")
    assert ("FC202", alias) in answer.told or ("FC202", first) in answer.told
    assert f"`{alias}`" in answer.detail("FC202")
    # two files that disagree with themselves alike do not differ
    again = diff(torn, torn, "--level", "bits")
    assert again.code == 0
    assert {one["severity"] for one in again.findings if one["code"] == "FC202"} == {"warning"}


@each_kind
@each_family
def test_a_flipped_bit(family: str, kind: str, folder: Path) -> None:
    state = state_of(family, kind)
    good = zoo.save_torch(state, folder / "good.pt")
    key = key_of(state, "perceiver.", "to_kv.weight")
    torn = state[key].clone()
    torn.view(torch.int32)[700, 5] ^= 1
    path = zoo.save_torch(state | {key: torn}, folder / "flipped.pt")
    assert diff(path, good).code == 0
    answer = diff(path, good, "--level", "bits")
    assert answer.told == [("FC301", key)]
    data = answer.errors[0]["data"]
    assert data["first_index"] == [700, 5]
    assert data["num_elements_different"] == 1
    # across layouts, the key of A is named and the place is B's
    if kind == "partial":
        other = zoo.save_safetensors(state_of(family, "hf"), folder / "hf.safetensors")
        assert diff(path, other, "--level", "bits").told == [("FC301", key)]
        named = diff(other, path, "--level", "bits").errors[0]
        assert named["key"] == key_of(state_of(family, "hf"), "perceiver.", "to_kv.weight")
        assert f"of `{key}`" in named["detail"]


@pytest.mark.parametrize(
    ("ours", "theirs", "bits"),
    [
        ((0x7FC00001,), (0x7FC00000,), ["7fc00001", "7fc00000"]),
        ((-0x80000000,), (0,), ["80000000", "00000000"]),
        ((0x7F800001,), (0x7FC00001,), ["7f800001", "7fc00001"]),
    ],
)
def test_bits_are_compared_and_not_values(
    ours: tuple[int], theirs: tuple[int], bits: list[str], folder: Path
) -> None:
    paths = []
    for name, value in (("ours", ours), ("theirs", theirs)):
        tensor = torch.zeros(2, 3, dtype=torch.int32)
        tensor[1, 2] = value[0]
        state = {"w": tensor.view(torch.float32), "x": torch.ones(2)}
        paths.append(zoo.save_torch(state, folder / f"{name}.pt"))
    answer = diff(*paths, "--level", "bits")
    assert answer.told == [("FC301", "w")]
    assert answer.errors[0]["data"]["bits"] == bits
    assert answer.errors[0]["data"]["first_index"] == [1, 2]


def swapped(state: State, key: str, *parts: int, of: int) -> State:
    """Rows of a fused matrix with two of its parts changed round."""
    rows = list(state[key].chunk(of))
    rows[parts[0]], rows[parts[1]] = rows[parts[1]], rows[parts[0]]
    return state | {key: torch.cat(rows)}


def test_swapped_halves_of_fused_matrices(folder: Path) -> None:
    state = state_of("llama", "full")
    good = zoo.save_torch(state, folder / "good.pt")
    fused = key_of(state, "vision_encoder.", "in_proj_weight")
    kv = key_of(state, "perceiver.", "to_kv.weight")
    for key, parts, of, words in ((fused, (0, 1), 3, "qk"), (kv, (0, 1), 2, "kv")):
        path = zoo.save_torch(swapped(state, key, *parts, of=of), folder / "swapped.pt")
        answer = diff(path, good, "--level", "bits")
        assert set(answer.told) == {("FC301", key), ("FC218", key)}
        moved = {one["detail"] for one in answer.errors if one["code"] == "FC218"}
        assert moved == {
            f"`{key}`: your `{key}` ({a}) is their `{key}` ({b})"
            for a, b in ((words[0], words[1]), (words[1], words[0]))
        }


@pytest.mark.parametrize("words", [("self_attn.q_proj.weight", "self_attn.k_proj.weight")])
def test_swapped_projections(words: tuple[str, str], folder: Path) -> None:
    state = state_of("llama", "hf")
    good = zoo.save_torch(state, folder / "good.pt")
    for place in ("vision_encoder.", "decoder_layer."):
        q, k = (key_of(state, place, word) for word in words)
        path = zoo.save_torch(state | {q: state[k], k: state[q]}, folder / "swapped.pt")
        answer = diff(path, good, "--level", "bits")
        assert set(answer.told) == {(c, key) for c in ("FC301", "FC218") for key in (q, k)}
        moved = {one["detail"] for one in answer.errors if one["code"] == "FC218"}
        assert moved == {f"`{a}`: your `{a}` is their `{b}`" for a, b in ((q, k), (k, q))}


def test_a_square_matrix_that_is_transposed(folder: Path) -> None:
    state = state_of("llama", "hf")
    good = zoo.save_torch(state, folder / "good.pt")
    key = key_of(state, "decoder_layer.", "q_proj.weight")
    path = zoo.save_torch(state | {key: state[key].T.contiguous()}, folder / "turned.pt")
    assert diff(path, good).code == 0  # headers cannot tell
    answer = diff(path, good, "--level", "bits")
    assert set(answer.told) == {("FC301", key), ("FC218", key)}
    assert answer.detail("FC218").endswith("equal after transpose")


def test_a_lacking_part_of_what_the_other_layout_fuses(folder: Path) -> None:
    clip = zoo.clip()
    key = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    fused = "visual.transformer.resblocks.1.attn.in_proj_weight"
    part = zoo.save_torch(without(clip.hf, key), folder / "part.pt")
    whole = zoo.save_torch(clip.open_clip, folder / "whole.pt")
    answer = diff(part, whole)
    assert answer.told == [("FC203", fused)]
    assert f"A lacks `{key}`" in answer.detail("FC203")
    back = diff(whole, part)
    assert back.told == [("FC204", fused)]
    assert f"`{key}`" in back.detail("FC204")


def test_prefixes_in_the_middle_are_no_difference(folder: Path) -> None:
    state = state_of("llama", "partial")
    middle = {
        name.replace("gated_cross_attn_layer.", "gated_cross_attn_layer.module."): t
        for name, t in state.items()
    }
    path = zoo.save_torch(middle, folder / "middle.pt")
    assert diff(path, config("llama", folder)).code == 0
    gate = key_of(middle, "module.attn_gate")
    answer = against_model(without(middle, gate), "llama", folder)
    assert answer.told == [("FC203", gate.replace("module.", ""))]
    answer = against_model(middle | {gate: torch.zeros(2)}, "llama", folder)
    assert answer.told == [("FC205", gate)]


def test_keys_are_as_stored_with_their_prefix(folder: Path) -> None:
    state = state_of("llama", "partial")
    gate = key_of(state, "attn_gate")
    planted = without(state, gate) | {gate + "x": state[gate], "stray": torch.ones(5)}
    path = zoo.save_torch(planted, folder / "ddp.pt", wrapper="state_dict", prefix="module.")
    answer = diff(path, config("llama", folder))
    assert set(answer.told) == {("FC214", f"module.{gate}x"), ("FC204", "module.stray")}
    assert answer.document["renamed"] == [[f"module.{gate}x", gate]]


def test_two_tensors_of_one_name(folder: Path) -> None:
    state = state_of("llama", "partial")
    gate = key_of(state, "attn_gate")
    answer = against_model(state | {f"module.{gate}": state[gate] + 1}, "llama", folder)
    assert answer.told == [("FC204", f"module.{gate}")]
    assert "FC202" in {one["code"] for one in answer.findings}
    assert answer.summary["same"] == 92


@each_family
def test_the_two_directions_mirror_each_other(family: str, folder: Path) -> None:
    state = state_of(family, "partial")
    keys = places(state, family, "partial")
    planted = without(state, keys[0]) | {"stray": torch.ones(3)}
    good = zoo.save_torch(state, folder / "good.pt")
    path = zoo.save_torch(planted, folder / "planted.pt")
    for other in (good, config(family, folder)):
        here, there = diff(path, other), diff(other, path)
        assert here.document["missing"] == there.document["unexpected"] == [keys[0]]
        assert here.document["unexpected"] == there.document["missing"] == ["stray"]
        assert here.summary["same"] == there.summary["same"]
        assert here.document["expected_absent"] == there.document["expected_absent"]


def test_idefics_is_another_model_and_the_reason_is_told(folder: Path) -> None:
    path = zoo.save_safetensors(zoo.idefics(), folder / "idefics.safetensors")
    answer = diff(path, config("llama", folder))
    assert answer.code == 1
    assert "Idefics is another model" in answer.detail("FC416")
    assert set(answer.keys("FC204")) == set(zoo.idefics())
    assert diff(path, path, "--level", "bits").code == 0
