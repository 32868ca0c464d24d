"""Configs: where they are found, what is completed, and every way they can be wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.config import ModelConfig, parse_config, read_config
from flamingo_ckpt.models.presets import PRESETS

Change = dict[str, Any]


def preset(name: str) -> dict[str, Any]:
    return copy.deepcopy(dict(PRESETS[name].config))


def flamingo() -> dict[str, Any]:
    return preset("openflamingo-9b-hf")


def changed(mapping: dict[str, Any], change: Change) -> dict[str, Any]:
    """Set dotted fields; `...` removes one."""
    for dotted, value in change.items():
        *sections, name = dotted.split(".")
        at = mapping
        for section in sections:
            at = at[section]
        if value is ...:
            del at[name]
        else:
            at[name] = value
    return mapping


def parse(mapping: object) -> ModelConfig:
    return parse_config(mapping, "config.json")


def refused(mapping: object, code: str, *words: str) -> CkptError:
    with pytest.raises(CkptError) as caught:
        parse(mapping)
    assert caught.value.code == code, caught.value.message
    assert caught.value.where == "config.json"
    for word in words:
        assert word in caught.value.message + (caught.value.hint or "")
    return caught.value


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        ("openflamingo-3b-vitl-mpt1b", "flamingo", "openflamingo"),
        ("med-flamingo", "flamingo", "openflamingo-v1"),
        ("otter-image-mpt7b", "flamingo", "hf-flamingo"),
        ("vit-b-32", "clip", "open_clip"),
        ("paligemma-3b-pt-224", "paligemma", "paligemma"),
    ],
)
def test_presets_with_and_without_model(name: str, kind: str, layout: str) -> None:
    found = read_config(name)
    assert (found.kind, found.layout, found.where) == (kind, layout, f"model:{name}")
    assert read_config(f"model:{name}") == found


def test_a_file_a_folder_and_a_preset_are_one_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(flamingo()))
    by_file, by_folder = read_config(f"model:{file}"), read_config(str(tmp_path))
    assert by_file == by_folder
    assert by_file.where == str(file)
    assert by_file.digest == read_config("openflamingo-9b-hf").digest


def test_a_config_of_hugging_faces_kind_comes_before_open_clips(tmp_path: Path) -> None:
    wrapped = {"model_cfg": preset("vit-b-32"), "preprocess_cfg": {"mean": [0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(wrapped))
    assert read_config(str(tmp_path)).digest == read_config("vit-b-32").digest
    (tmp_path / "config.json").write_text(json.dumps(flamingo()))
    assert read_config(str(tmp_path)).kind == "flamingo"


def test_the_digest_is_of_the_content() -> None:
    mapping = flamingo()
    backwards = dict(reversed(mapping.items()))
    assert parse(mapping).digest == parse(backwards).digest
    assert parse(mapping).digest == parse(mapping | {"perceiver_depth": 6}).digest
    assert parse(mapping).digest != parse(mapping | {"perceiver_depth": 7}).digest


def test_parsing_leaves_the_mapping_alone() -> None:
    for name in PRESETS:
        mapping = preset(name)
        before = copy.deepcopy(mapping)
        found = parse(mapping)
        assert mapping == before
        assert found.data is not mapping


def test_upstreams_fixed_sizes_are_filled_in() -> None:
    data = parse(flamingo()).data
    assert [data[f"perceiver_{name}"] for name in ("depth", "num_latents", "dim_head")] == [
        6,
        64,
        64,
    ]
    assert [data[f"cross_attn_{name}"] for name in ("dim_head", "heads", "ff_mult")] == [64, 8, 4]


def test_transformers_defaults_are_filled_in_where_its_configs_leave_them_out() -> None:
    found = parse({"model_type": "clip", "vision_config": {"patch_size": 16}, "text_config": {}})
    assert (found.kind, found.layout) == ("clip", "hf-clip")
    assert found.data["vision_config"]["hidden_size"] == 768
    assert found.data["vision_config"]["patch_size"] == 16
    assert found.data["text_config"]["hidden_size"] == 512
    hub = preset("paligemma-3b-pt-224")  # as on the hub: no size of the picture
    del hub["vision_config"]["image_size"]
    assert parse(hub).data["vision_config"]["image_size"] == 224


def test_a_family_by_its_class_alone() -> None:
    mapping = changed(flamingo(), {"text_config.model_type": ...})
    assert parse(mapping).kind == "flamingo"


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_plain_language_models(key: str) -> None:
    text = flamingo()["text_config"]
    found = parse({name: value for name, value in text.items() if name != key})
    assert (found.kind, found.layout) == ("language", "language-model")


def test_a_family_named_by_hand_needs_no_table() -> None:
    text = {"model_type": "gpt2", "n_layer": 4, "block_size": 2048}
    mapping = flamingo() | {"text_config": text, "decoder_layers_attr_name": "transformer.h"}
    assert parse(mapping).kind == "flamingo"
    assert parse(text | {"decoder_layers_attr_name": "transformer.h"}).kind == "language"


@pytest.mark.parametrize("field", ["n_layer", "num_local_experts", "encoder_layers"])
def test_a_family_named_by_hand_is_bounded_too(field: str) -> None:
    text = {"model_type": "gpt2", field: 10**8}
    mapping = flamingo() | {"text_config": text, "decoder_layers_attr_name": "transformer.h"}
    refused(mapping, "FC401", f"text_config.{field}")


def test_an_interval_longer_than_a_family_named_by_hand() -> None:
    text = {"model_type": "gpt2", "n_layer": 3}
    mapping = flamingo() | {"text_config": text, "decoder_layers_attr_name": "transformer.h"}
    refused(mapping, "FC408", "3 layers")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        "text_config",
        "vision_config",
        "cross_attn_every_n_layers",
        "text_config.hidden_size",
        "text_config.intermediate_size",
        "text_config.num_attention_heads",
        "text_config.num_hidden_layers",
        "text_config.vocab_size",
        "vision_config.hidden_size",
        "vision_config.image_size",
        "vision_config.intermediate_size",
        "vision_config.num_attention_heads",
        "vision_config.num_hidden_layers",
        "vision_config.patch_size",
    ],
)
@pytest.mark.parametrize("value", [..., None])
def test_missing_fields(field: str, value: object) -> None:
    refused(changed(flamingo(), {field: value}), "FC401", f"has no `{field}`")


@pytest.mark.parametrize(
    "change",
    [
        {"text_config": []},
        {"text_config.hidden_size": "4096"},
        {"text_config.hidden_size": 4096.0},
        {"text_config.hidden_size": True},
        {"text_config.num_hidden_layers": 0},
        {"text_config.num_hidden_layers": -1},
        {"text_config.num_hidden_layers": 10**9},
        {"text_config.vocab_size": 10**12},
        {"text_config.architectures": "LlamaForCausalLM"},
        {"text_config.model_type": 3},
        {"text_config.tie_word_embeddings": "no"},
        {"text_config.attention_bias": 1},
        {"vision_config.image_size": [224, 224]},
        {"vision_config.num_hidden_layers": 5000},
        {"cross_attn_every_n_layers": 0},
        {"cross_attn_every_n_layers": "4"},
        {"perceiver_depth": 10**6},
        {"perceiver_heads": 0},
        {"max_num_frames": -1},
        {"max_num_media": 1.5},
        {"torch_dtype": "int8"},
        {"torch_dtype": "float33"},
        {"dtype": 32},
        {"decoder_layers_attr_name": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_wrong_types_and_absurd_sizes(change: Change) -> None:
    refused(changed(flamingo(), change), "FC401", f"`{next(iter(change))}` is ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config.num_attention_heads": 33}, ["`text_config.hidden_size` is 4096", "(33)"]),
        ({"text_config.num_key_value_heads": 5}, ["num_attention_heads", "num_key_value_heads"]),
        ({"vision_config.num_attention_heads": 15}, ["`vision_config.hidden_size` is 1024"]),
        ({"vision_config.patch_size": 225}, ["patch_size", "larger than the image"]),
        ({"vision_config.image_size": 16384, "vision_config.patch_size": 1}, ["too many patches"]),
        ({"cross_attn_every_n_layers": 33}, ["33", "32 layers", "no layer would get"]),
        ({"text_config.model_type": "mpt"}, ["`mpt`", "LlamaForCausalLM"]),
        ({"dtype": "bfloat16"}, ["`bfloat16`", "`float32`"]),
    ],
)
def test_contradictions(change: Change, words: list[str]) -> None:
    refused(changed(flamingo(), change), "FC408", *words)


def test_an_unknown_family_is_answered_with_the_known_ones_and_the_way_out() -> None:
    mapping = changed(flamingo(), {"text_config.model_type": "bloom"})
    mapping["text_config"]["architectures"] = ["BloomForCausalLM"]
    error = refused(mapping, "FC403", "`bloom`", "mosaic_gpt", "mpt", "gpt_neox", "llama", "opt")
    assert error.hint is not None
    assert "decoder_layers_attr_name" in error.hint
    del mapping["text_config"]["model_type"]
    refused(mapping, "FC403", "`BloomForCausalLM`")
    del mapping["text_config"]["architectures"]
    refused(mapping, "FC401", "has no `text_config.model_type`")


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("mpt", "expansion_ratio", 2),
        ("mpt", "no_bias", False),
        ("mpt", "attn_config", {"qk_ln": True}),
        ("mpt", "attn_config", {"alibi": False}),
        ("mpt", "attn_config", {"attn_type": "multiquery_attention"}),
        ("mosaic_gpt", "alibi", False),
        ("mosaic_gpt", "attn_qk_ln", False),
        ("mosaic_gpt", "no_bias", False),
    ],
)
def test_options_that_have_no_module_tree(model_type: str, field: str, value: object) -> None:
    name = {"mpt": "otter-image-mpt7b", "mosaic_gpt": "otter-mpt1b-rpjama-init"}[model_type]
    refused(changed(preset(name), {f"text_config.{field}": value}), "FC405", field)


def test_adapters_are_no_part_of_a_tree() -> None:
    refused(flamingo() | {"lora_config": {"r": 8}}, "FC405", "lora_config", "merge")


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"embed_dim": "512"}, "FC401", "embed_dim"),
        ({"vision_cfg": None}, "FC401", "vision_cfg"),
        ({"text_cfg": ...}, "FC401", "text_cfg"),
        ({"vision_cfg.layers": [1, 2]}, "FC401", "four stages"),
        ({"vision_cfg.layers": [1, 2, 3, 10**7]}, "FC401", "vision_cfg.layers"),
        ({"vision_cfg.layers": 10**7}, "FC401", "vision_cfg.layers"),
        ({"vision_cfg.image_size": [10**9, 224]}, "FC401", "vision_cfg.image_size"),
        ({"vision_cfg.image_size": [224, 224, 224]}, "FC401", "vision_cfg.image_size"),
        ({"vision_cfg.mlp_ratio": 1e9}, "FC401", "vision_cfg.mlp_ratio"),
        ({"text_cfg.mlp_ratio": "4"}, "FC401", "text_cfg.mlp_ratio"),
        ({"text_cfg.heads": 7}, "FC408", "text_cfg.heads"),
        ({"vision_cfg.head_width": 100}, "FC408", "vision_cfg.head_width"),
        ({"text_cfg.hf_model_name": "roberta-base"}, "FC405", "hf_model_name"),
        ({"multimodal_cfg": {"width": 512}}, "FC405", "multimodal_cfg"),
    ],
)
def test_open_clips_form(change: Change, code: str, word: str) -> None:
    refused(changed(preset("vit-b-32"), change), code, word)


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"text_config.model_type": "llama"}, "FC401", "`gemma`"),
        ({"text_config.hidden_size": ...}, "FC401", "text_config.hidden_size"),
        ({"vision_config": ...}, "FC401", "vision_config"),
        ({"vision_config.vision_use_head": 1}, "FC401", "vision_use_head"),
        ({"text_config.num_key_value_heads": 3}, "FC408", "num_key_value_heads"),
        ({"projection_dim": 1024}, "FC408", "projection_dim"),
    ],
)
def test_paligemma(change: Change, code: str, word: str) -> None:
    refused(changed(preset("paligemma-3b-pt-224"), change), code, word)


@pytest.mark.parametrize(
    ("mapping", "code", "word"),
    [
        ([], "FC401", "not a JSON object"),
        ({}, "FC401", "model_type"),
        ({"model_type": 1}, "FC401", "model_type"),
        ({"model_type": "bert"}, "FC403", "paligemma"),
        ({"model_type": "idefics\x1b[31m"}, "FC403", r"\x1b"),
        ({"model_type": "clip", "vision_config": {}}, "FC401", "text_config"),
        ({"model_type": "clip_vision_model", "patch_size": 0}, "FC401", "patch_size"),
    ],
)
def test_no_model_at_all(mapping: object, code: str, word: str) -> None:
    refused(mapping, code, word)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 1}', "two fields `a`"),
        (b'{"b": {"a\\u001b": 1, "a\\u001b": 2}}', r"two fields `a\x1b`"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b" " * ((4 << 20) + 1), "larger than"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, raw: bytes, word: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(raw)
    with pytest.raises(CkptError) as caught:
        read_config(str(file))
    assert caught.value.code == "FC401"
    assert caught.value.where == str(file)
    assert word in caught.value.message


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CkptError, match=r"has no config\.json") as caught:
        read_config(str(tmp_path))
    assert caught.value.code == "FC404"
    with pytest.raises(CkptError, match=r"there is no `.*absent\.json`") as caught:
        read_config(str(tmp_path / "absent.json"))
    assert caught.value.code == "FC404"
    with pytest.raises(CkptError, match="neither a file or folder nor a preset") as caught:
        read_config("model:something")
    assert caught.value.code == "FC404"
    assert "vit-b-32" in (caught.value.hint or "")


def test_a_name_that_is_nearly_a_preset() -> None:
    with pytest.raises(CkptError) as caught:
        read_config("model:OpenFlamingo-3B-vitl-mpt1b")
    assert "`model:openflamingo-3b-vitl-mpt1b`" in (caught.value.hint or "")


def test_an_unreadable_file(tmp_path: Path) -> None:
    loop = tmp_path / "config.json"
    loop.symlink_to("/proc/self/mem")  # opens, and cannot be read from its beginning
    with pytest.raises(CkptError, match="cannot read") as caught:
        read_config(str(loop))
    assert caught.value.code == "FC404"
