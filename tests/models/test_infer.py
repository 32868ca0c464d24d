"""What shapes prove is the config they came from, and nothing more is claimed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import clip_config
from flamingo_ckpt.models.config import parse_config, read_config
from flamingo_ckpt.models.expectation import expect
from flamingo_ckpt.models.families import FAMILIES
from flamingo_ckpt.models.fields import lookup
from flamingo_ckpt.models.infer import Inferred, cross_attn_interval, infer_config
from flamingo_ckpt.models.presets import PRESETS
from tests import zoo

Atoms = dict[str, tuple[int, ...]]

#: Names of the Hugging Face port -> canonical ones; written here for the tests alone.
_RENAMES = (
    (r"perceiver\.layers\.(\d+)\.feed_forward\.0\.(.+)", r"perceiver.layers.\1.mlp.norm.\2"),
    (r"perceiver\.layers\.(\d+)\.feed_forward\.1\.(.+)", r"perceiver.layers.\1.mlp.fc1.\2"),
    (r"perceiver\.layers\.(\d+)\.feed_forward\.3\.(.+)", r"perceiver.layers.\1.mlp.fc2.\2"),
    (r"perceiver\.layers\.(\d+)\.to_(q|kv|out)\.(.+)", r"perceiver.layers.\1.attn.\2.\3"),
    (r"perceiver\.layers\.(\d+)\.(norm_.+)", r"perceiver.layers.\1.attn.\2"),
    (r".+\.(\d+)\.gated_cross_attn_layer\.feed_forward\.0\.(.+)", r"xattn.\1.mlp.norm.\2"),
    (r".+\.(\d+)\.gated_cross_attn_layer\.feed_forward\.1\.(.+)", r"xattn.\1.mlp.fc1.\2"),
    (r".+\.(\d+)\.gated_cross_attn_layer\.feed_forward\.3\.(.+)", r"xattn.\1.mlp.fc2.\2"),
    (r".+\.(\d+)\.gated_cross_attn_layer\.ff_gate", r"xattn.\1.mlp_gate"),
    (r".+\.(\d+)\.gated_cross_attn_layer\.attn\.to_(q|kv|out)\.(.+)", r"xattn.\1.attn.\2.\3"),
    (r".+\.(\d+)\.gated_cross_attn_layer\.(.+)", r"xattn.\1.\2"),
    (r"lang_encoder\..+\.(\d+)\.decoder_layer\.(.+)", r"lm.layers.\1.\2"),
    (r"lang_encoder\..+embed_positions\.weight", "lm.embed_positions.weight"),
    (r"lang_encoder\.(lm_head|embed_out)\.(.+)", r"lm.head.\2"),
    (r"lang_encoder\..+norm.*\.(weight|bias)|lang_encoder\..+ln_f\.(weight|bias)", r"lm.norm"),
    (r".*vision_model\.embeddings\.(.+)", r"vision.\1"),
    (r".*vision_model\.encoder\.layers\.(\d+)\.mlp\.(.+)", r"vision.layers.\1.mlp.\2"),
    (r".*text_model\.embeddings\.(.+)", r"text.\1"),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.(.+)", r"text.layers.\1.mlp.\2"),
    (r"(visual|text)_projection\.weight", r"\1.projection.weight"),
    (r"multi_modal_projector\.linear\.(.+)", r"projector.\1"),
    (r"language_model\.model\.layers\.(.+)", r"lm.layers.\1"),
    (r"language_model\.model\.embed_tokens\.weight", "lm.embed_tokens.weight"),
)


def canonical(name: str, group: str) -> str:
    if group == "lm.embed":
        return "lm.embed_tokens.weight"
    for pattern, replacement in _RENAMES:
        if re.fullmatch(pattern, name):
            found = re.sub(pattern, replacement, name)
            return found.replace("visual.", "vision.")
    return name


def atoms_of(mapping: dict[str, Any], layout: str) -> Atoms:
    """Every tensor of a model that its layout stores, under canonical names."""
    atoms: Atoms = {}
    for tensor in expect(parse_config(mapping, "config.json"), layout).canonical():
        name = canonical(tensor.name, tensor.group)
        if ".attn.kv." in name:  # keys and values are tensors of their own
            rows, columns = tensor.shape
            for part in "kv":
                atoms[name.replace(".kv.", f".{part}.")] = (rows // 2, columns)
        else:
            atoms[name] = tensor.shape
    return atoms


def check_against(found: Inferred, mapping: dict[str, Any]) -> None:
    """What is proven is what the config says, whatever a config may leave out aside."""
    data = parse_config(mapping, "config.json").data

    def walk(proven: dict[str, Any], at: str) -> None:
        for name, value in proven.items():
            if isinstance(value, dict):
                walk(value, f"{at}{name}.")
                continue
            wanted = lookup(data, at + name)
            if wanted is not None and name != "architectures":
                assert value == wanted, at + name

    walk(found.config, "")
    assert not set(_dotted(found.config)) & set(found.unknown)
    assert set(found.assumed) <= set(found.unknown)
    assert len(set(found.unknown)) == len(found.unknown)


def _dotted(config: dict[str, Any], at: str = "") -> list[str]:
    return [
        name
        for key, value in config.items()
        for name in (_dotted(value, f"{at}{key}.") if isinstance(value, dict) else [at + key])
    ]


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
@pytest.mark.parametrize("every_n", [1, 2, 3])
def test_a_whole_flamingo(family: str, every_n: int) -> None:
    mapping = zoo.openflamingo(family, every_n=every_n).config
    found = infer_config(atoms_of(mapping, "hf-flamingo"))
    check_against(found, mapping)
    own = FAMILIES[found.config["text_config"]["model_type"]]
    text = found.config["text_config"]
    assert own.name == mapping["text_config"]["model_type"]
    assert text[own.num_layers] == 4
    assert text[own.hidden_size] == mapping["text_config"][own.hidden_size]
    assert text["vocab_size"] == mapping["text_config"]["vocab_size"]
    assert found.config["cross_attn_every_n_layers"] == every_n
    vision = {"hidden_size", "patch_size", "image_size", "num_hidden_layers", "intermediate_size"}
    assert set(found.config["vision_config"]) == vision


def test_what_is_unknown_of_a_whole_flamingo() -> None:
    found = infer_config(atoms_of(zoo.openflamingo("llama").config, "hf-flamingo"))
    assert set(found.unknown) == {
        "perceiver_heads",
        "perceiver_dim_head",
        "cross_attn_heads",
        "cross_attn_dim_head",
        "text_config.num_attention_heads",
        "text_config.tie_word_embeddings",
        "text_config.layer_norm_eps",
        "vision_config.num_attention_heads",
        "vision_config.layer_norm_eps",
        "vision_config.hidden_act",
        "token_point",
    }
    assert (found.assumed["perceiver_heads"], found.assumed["perceiver_dim_head"]) == (8, 64)
    assert found.assumed["vision_config.hidden_act"] == "quick_gelu"


def test_a_release_of_9b() -> None:
    """A partial checkpoint: no decoder layers, no vision tower."""
    data = dict(read_config("openflamingo-9b-vitl-mpt7b").data)
    atoms = {
        name: shape
        for name, shape in atoms_of(data, "hf-flamingo").items()
        if name.startswith(("perceiver.", "xattn.", "lm.embed_tokens."))
    }
    found = infer_config(atoms)
    assert found.config == {
        "model_type": "flamingo",
        "perceiver_depth": 6,
        "perceiver_num_latents": 64,
        "perceiver_ff_mult": 4,
        "cross_attn_every_n_layers": 4,
        "cross_attn_ff_mult": 4,
        "text_config": {"vocab_size": 50280, "hidden_size": 4096},
        "vision_config": {"hidden_size": 1024},
    }
    assert "text_config.model_type" in found.unknown
    assert found.assumed["text_config.num_hidden_layers"] == 32
    assert "vision_config.patch_size" in found.unknown
    told = infer_config(atoms, family="mpt")
    assert told.config["text_config"] == {"model_type": "mpt", "vocab_size": 50280, "d_model": 4096}
    assert told.assumed["text_config.n_layers"] == 32


def test_embeddings_of_frames_and_media() -> None:
    mapping = zoo.openflamingo("llama").config | {"max_num_frames": 7, "max_num_media": 3}
    found = infer_config(atoms_of(mapping, "hf-flamingo"))
    assert (found.config["max_num_frames"], found.config["max_num_media"]) == (7, 3)


@pytest.mark.parametrize(
    ("inner", "heads"), [(512, 8), (64, 1), (1024, 16), (96, None), (500, None)]
)
def test_heads_are_assumed_only_where_they_divide(inner: int, heads: int | None) -> None:
    found = infer_config({"perceiver.layers.0.attn.q.weight": (inner, 32)})
    assert "perceiver_heads" in found.unknown
    assert found.assumed.get("perceiver_heads") == heads


def test_a_ratio_that_is_no_whole_number_is_unknown() -> None:
    found = infer_config({"perceiver.layers.0.mlp.fc1.weight": (100, 32)})
    assert "perceiver_ff_mult" in found.unknown
    assert infer_config({"xattn.0.mlp.fc1.weight": (96, 32)}).config["cross_attn_ff_mult"] == 3


def test_a_layer_that_is_missing_makes_the_depth_unknown() -> None:
    atoms = {f"perceiver.layers.{i}.attn.q.weight": (512, 32) for i in (0, 1, 3)}
    assert "perceiver_depth" in infer_config(atoms).unknown


def test_a_picture_that_is_no_square_is_unknown() -> None:
    atoms = {
        "vision.class_embedding": (8,),
        "vision.patch_embedding.weight": (8, 3, 4, 4),
        "vision.position_embedding.weight": (17, 8),
    }
    assert infer_config(atoms).config["image_size"] == 16
    found = infer_config(atoms | {"vision.position_embedding.weight": (16, 8)})
    assert "image_size" in found.unknown


def test_a_whole_model_without_a_head_is_tied() -> None:
    atoms = {"lm.embed_tokens.weight": (9, 4), "lm.layers.0.self_attn.q_proj.weight": (4, 4)}
    assert infer_config(atoms).config["tie_word_embeddings"] is True
    head = infer_config(atoms | {"lm.head.weight": (9, 4)})
    assert "tie_word_embeddings" in head.unknown
    assert head.assumed["tie_word_embeddings"] is False


def test_clip_and_its_tower() -> None:
    mapping = zoo.clip().config
    atoms = atoms_of(mapping, "hf-clip")
    found = infer_config(atoms)
    check_against(found, mapping)
    assert found.config["model_type"] == "clip"
    assert {"projection_dim", "vision_config", "text_config"} <= set(found.config)
    assert "text_config.eos_token_id" in found.unknown
    tower = infer_config({k: v for k, v in atoms.items() if k.startswith("vision.")})
    assert tower.config["model_type"] == "clip_vision_model"
    assert tower.config["projection_dim"] == mapping["projection_dim"]


@pytest.mark.parametrize("version", [1, 2])
def test_paligemma(version: int) -> None:
    mapping = zoo.paligemma(version=version).config
    found = infer_config(atoms_of(mapping, "paligemma"))
    check_against(found, mapping)
    assert found.config["text_config"]["model_type"] == {1: "gemma", 2: "gemma2"}[version]
    assert found.config["projection_dim"] == mapping["projection_dim"]
    assert found.config["vision_config"]["vision_use_head"] is False


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith(("vit-", "paligemma"))])
def test_assumptions_are_right_for_everything_published(name: str) -> None:
    config = read_config(name)
    is_clip = config.kind == "clip"
    data = clip_config.hf_clip_config(config.data, name) if is_clip else dict(config.data)
    found = infer_config(atoms_of(data, "hf-clip" if is_clip else "paligemma"))
    check_against(found, data)
    assumed = {dotted: lookup(data, dotted) for dotted in found.assumed}
    known = {dotted: value for dotted, value in assumed.items() if value is not None}
    assert {dotted: found.assumed[dotted] for dotted in known} == known
    assert "vision_config.num_attention_heads" in known
    assert "text_config.num_attention_heads" in known


# -- the interval ----------------------------------------------------------------------------------


@given(interval=st.integers(1, 12), number=st.integers(1, 12))
def test_every_interval_is_found(interval: int, number: int) -> None:
    layers = [interval * (c + 1) - 1 for c in range(number)]
    assert cross_attn_interval(reversed(layers)) == interval


@given(interval=st.integers(1, 8), number=st.integers(3, 9), data=st.data())
def test_one_missing_in_the_middle_is_found(
    interval: int, number: int, data: st.DataObject
) -> None:
    layers = [interval * (c + 1) - 1 for c in range(number)]
    gone = data.draw(st.sampled_from(layers[1:-1]))
    left = [layer for layer in layers if layer != gone]
    with pytest.raises(CkptError, match=rf"no block at .*\b{gone}\b") as caught:
        cross_attn_interval(left)
    assert caught.value.code == "FC406"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3, 7, 12], "there is no block at 11 and one too many at 12"),
        ([1, 2, 3], "there is one too many at 2"),
        ([2, 4], "there is one too many at 4"),
        ([0, 2, 4], "there is no block at 1, 3"),
    ],
)
def test_layers_that_fit_no_interval(layers: list[int], message: str) -> None:
    """Among them the phase of other Flamingos, whose first block stands at layer 0."""
    with pytest.raises(CkptError) as caught:
        infer_config({f"xattn.{layer}.attn_gate": (1,) for layer in layers})
    assert caught.value.code == "FC406"
    assert message in caught.value.message
    assert ", ".join(map(str, layers)) in caught.value.message


def test_no_blocks_prove_no_interval() -> None:
    assert cross_attn_interval([]) is None
    found = infer_config({"perceiver.latents": (64, 1024)})
    assert "cross_attn_every_n_layers" in found.unknown
