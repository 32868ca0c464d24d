"""`config.json` of PaliGemma in the spellings of transformers 4.41 to 5.23."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.paligemma_config import hf_config, read_settings
from flamingo_ckpt.models import build, load_config
from tests.zoo_paligemma import paligemma

#: `google/paligemma-3b-pt-224`, as transformers 4.41 wrote it: what is left out has its default.
HUB: dict[str, Any] = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "_name_or_path": "final/paligemma",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "projection_dim": 2048,
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vocab_size": 257216,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
}


def settings(folder: Path, config: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return read_settings(str(folder))


def changed(**changes: Any) -> dict[str, Any]:
    """The hub's config with fields set, `text__rope_theta` in its text config; None removes."""
    config = copy.deepcopy(HUB)
    for name, value in changes.items():
        part, _, inner = name.rpartition("__")
        place = config[f"{part}_config"] if part else config
        if value is None:
            place.pop(inner, None)
        else:
            place[inner] = value
    return config


def built(folder: Path, config: dict[str, Any]) -> Any:
    found = settings(folder, config)
    return hf_config(found, found.image_token or 257152, found.dtype or "float32")


def test_the_hubs_own(tmp_path: Path) -> None:
    found = settings(tmp_path, HUB)
    assert (found.tied, found.num_rows, found.image_token) == (True, 257216, 257152)
    assert found.dtype == "float32"
    config = hf_config(found, 257152, "float32")
    text, vision = config.text_config, config.vision_config
    assert (text.head_dim, text.hidden_act, text.rms_norm_eps) == (256, "gelu_pytorch_tanh", 1e-6)
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert text.use_bidirectional_attention is True
    assert (text.num_image_tokens, vision.num_image_tokens) == (256, 256)
    assert (vision.image_size, vision.layer_norm_eps, vision.vision_use_head) == (224, 1e-6, False)
    assert (config.image_token_id, config.pad_token_id, text.pad_token_id) == (257152, 0, 0)
    assert config.name_or_path == str(tmp_path)


def test_the_same_as_the_class_makes_of_what_it_wrote(tmp_path: Path) -> None:
    from transformers import PaliGemmaConfig

    for version in (1, 2):
        zoo = paligemma(version=version, layers=2)
        folder = tmp_path / str(version)
        zoo.model.config.save_pretrained(folder)
        theirs = PaliGemmaConfig.from_pretrained(folder).to_dict()
        found = read_settings(str(folder))
        ours = hf_config(found, found.image_token or 0, "float32").to_dict()
        for config in (ours, theirs):
            # what depends on the file alone, and what programs around the model ask for
            del config["dtype"], config["_name_or_path"]
            config["vision_config"].pop("num_image_tokens", None)
            assert config.pop("vocab_size")
            assert config.pop("hidden_size")
            for part in ("text_config", "vision_config"):
                config[part].pop("dtype")
                assert config[part].pop("_name_or_path") is not None
        assert ours["text_config"] == theirs["text_config"]
        assert ours["vision_config"] == theirs["vision_config"]
        assert {k: ours[k] for k in theirs if k != "architectures"} == {
            k: v for k, v in theirs.items() if k != "architectures"
        }


@pytest.mark.parametrize(
    "rope",
    [
        {"text__rope_theta": 20000.0},
        {"text__rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        {"text__rope_parameters": {"rope_theta": 20000.0}},
        {"text__rope_theta": 20000.0, "text__rope_parameters": {"rope_theta": 20000.0}},
    ],
)
def test_spellings_of_the_rotary_base(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = built(tmp_path, changed(**rope))
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 20000.0}


def test_an_older_scaled_rotary_embedding(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    config = built(tmp_path, changed(text__rope_theta=20000.0, text__rope_scaling=scaling))
    assert config.text_config.rope_parameters == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 20000.0,
    }


@pytest.mark.parametrize("names", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_both_names_of_the_dtype(tmp_path: Path, names: tuple[str, ...]) -> None:
    told: dict[str, Any] = {"torch_dtype": None, **dict.fromkeys(names, "bfloat16")}
    config = changed(text__torch_dtype="float16", **told)
    found = settings(tmp_path, config)
    assert found.dtype == "bfloat16"
    # the parts have no dtype of their own: the file's is for all of them
    assert "torch_dtype" not in found.model.data["text_config"]


def test_a_padding_id_in_the_text_config_is_no_error(tmp_path: Path) -> None:
    """A loader that passes both to the text config's class dies of version 5's configs."""
    assert built(tmp_path, changed(text__pad_token_id=0)).text_config.pad_token_id == 0
    only_inner = changed(pad_token_id=None, text__pad_token_id=3)
    assert built(tmp_path, only_inner).text_config.pad_token_id == 3
    both = built(tmp_path, changed(pad_token_id=1, text__pad_token_id=3))
    assert (both.pad_token_id, both.text_config.pad_token_id) == (1, 3)
    assert built(tmp_path, changed(pad_token_id=3)).text_config.pad_token_id == 3


@pytest.mark.parametrize("without", ["text__num_image_tokens", "vision__num_image_tokens"])
def test_image_tokens_are_filled_in(tmp_path: Path, without: str) -> None:
    config = built(tmp_path, changed(**{without: None}))
    assert config.text_config.num_image_tokens == config.vision_config.num_image_tokens == 256


def test_a_trimmed_config_of_larger_pictures(tmp_path: Path) -> None:
    trimmed = changed(vision__num_image_tokens=1024, text__num_image_tokens=1024)
    found = settings(tmp_path, trimmed)
    assert hf_config(found, 257152, "float32").vision_config.image_size == 448
    assert [note.code for note in found.notes] == ["FC408"]
    assert "1024 image tokens" in found.notes[0].detail


def test_image_tokens_that_contradict_the_picture(tmp_path: Path) -> None:
    with pytest.raises(CkptError, match=r"`num_image_tokens` is 256.* have 1024") as caught:
        settings(tmp_path, changed(vision__image_size=448))
    assert caught.value.code == "FC408"
    with pytest.raises(CkptError, match="num_image_tokens") as caught:
        settings(tmp_path, changed(text__num_image_tokens=1024))
    assert caught.value.code == "FC408"


def test_no_pooling_head(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig

    assert SiglipVisionConfig().vision_use_head, "the class's default, which no PaliGemma means"
    for told in (None, False, True):
        config = built(tmp_path, changed(vision__vision_use_head=told))
        assert config.vision_config.vision_use_head is False


def test_the_vocabulary_may_stand_at_the_top(tmp_path: Path) -> None:
    assert settings(tmp_path, changed(text__vocab_size=None)).num_rows == 257216
    assert settings(tmp_path, changed(vocab_size=257152)).num_rows == 257216
    with pytest.raises(CkptError, match=r"no `text_config.vocab_size`") as caught:
        settings(tmp_path, changed(text__vocab_size=None, vocab_size=None))
    assert caught.value.code == "FC401"


def test_the_picture_token_has_no_default(tmp_path: Path) -> None:
    from transformers import PaliGemmaConfig

    assert PaliGemmaConfig().image_token_index == 256000, "the class's default"
    assert settings(tmp_path, changed(image_token_index=None)).image_token is None
    renamed = changed(image_token_index=None, image_token_id=257152)
    assert settings(tmp_path, renamed).image_token == 257152
    assert built(tmp_path, renamed).image_token_index == 257152
    with pytest.raises(CkptError, match="image_token_id") as caught:
        settings(tmp_path, changed(image_token_id=7))
    assert caught.value.code == "FC408"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_activation": "relu"}, "relu"),
        ({"hidden_act": "gelu", "hidden_activation": "relu"}, "relu"),
    ],
)
@pytest.mark.parametrize("gemma", ["gemma", "gemma2"])
def test_spellings_of_the_activation(
    tmp_path: Path, gemma: str, fields: dict[str, Any], expected: str
) -> None:
    config = changed(text__model_type=gemma)
    config["text_config"] |= fields
    text = built(tmp_path, config).text_config
    assert (text.hidden_act if gemma == "gemma" else text.hidden_activation) == expected


def test_an_activation_that_the_class_would_replace(tmp_path: Path) -> None:
    from transformers import GemmaConfig

    assert GemmaConfig(hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"
    with pytest.raises(CkptError, match="exact `gelu`") as caught:
        settings(tmp_path, changed(text__hidden_activation="gelu"))
    assert caught.value.code == "FC405"


@pytest.mark.parametrize(
    ("top", "inner", "tied"),
    [
        (None, None, True),
        (True, None, True),
        (None, True, True),
        (True, True, True),
        (False, None, False),
        (None, False, False),
        (False, False, False),
        # version 5 writes the inner default beside an upper `false`, version 4 the other way round
        (False, True, False),
        (True, False, False),
    ],
)
def test_one_false_is_a_head_of_its_own(
    tmp_path: Path, top: bool | None, inner: bool | None, tied: bool
) -> None:
    config = changed()
    for place, value in ((config, top), (config["text_config"], inner)):
        if value is not None:
            place["tie_word_embeddings"] = value
    assert settings(tmp_path, config).tied is tied
    object_ = built(tmp_path, config)
    assert object_.tie_word_embeddings is object_.text_config.tie_word_embeddings is tied


def test_what_version_5_writes_of_an_untied_model(tmp_path: Path) -> None:
    from transformers import PaliGemmaConfig

    text, vision = HUB["text_config"], HUB["vision_config"]
    config = PaliGemmaConfig(
        text_config=dict(text),
        vision_config=dict(vision),
        tie_word_embeddings=False,
        image_token_index=257152,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["tie_word_embeddings"] is True, "the inner one's default"
    assert read_settings(str(tmp_path)).tied is False
    model: Any = build(load_config(tmp_path), device="meta")
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_a_turned_off_soft_cap_stays_off(tmp_path: Path) -> None:
    config = changed(text__model_type="gemma2")
    config["text_config"] |= {"final_logit_softcapping": None, "query_pre_attn_scalar": 224}
    text = built(tmp_path, config).text_config
    assert (text.final_logit_softcapping, text.attn_logit_softcapping) == (None, 50.0)
    assert text.query_pre_attn_scalar == 224


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CkptError, match=r"quantised.*bitsandbytes") as caught:
        settings(tmp_path, changed(quantization_config={"quant_method": "bitsandbytes"}))
    assert caught.value.code == "FC459"


def test_code_in_a_config_is_left_there(tmp_path: Path) -> None:
    found = settings(tmp_path, changed(auto_map={"AutoModel": "evil.py"}))
    assert "auto_map" not in found.model.data


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, "FC404", "no config.json"),
        ("{", "FC401", "not valid JSON"),
        ('{"a": 1, "a": 2}', "FC401", "occurs twice"),
        ("[]", "FC401", "not a JSON object"),
        ('{"model_type": "llama"}', "FC403", "'llama'"),
        ('{"model_type": "paligemma"}', "FC401", "text_config"),
    ],
)
def test_no_config_of_a_paligemma(
    tmp_path: Path, content: str | None, code: str, words: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CkptError, match=words) as caught:
        read_settings(str(tmp_path))
    assert caught.value.code == code
    assert os.fspath(tmp_path) in (caught.value.where or "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text__hidden_size": "wide"}, "`text_config.hidden_size` is 'wide'"),
        ({"text__rope_parameters": 3}, "`text_config.rope_parameters` is 3"),
        ({"text__rope_theta": "x"}, "`text_config.rope_theta` is 'x'"),
        ({"vision__model_type": "clip_vision_model"}, "`vision_config.model_type`"),
        ({"vision__vision_use_head": 1}, "`vision_config.vision_use_head` is 1"),
        ({"image_token_index": -1}, "`image_token_index` is -1"),
        ({"torch_dtype": "int8"}, "`dtype` is 'int8'"),
    ],
)
def test_fields_of_a_wrong_kind(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CkptError, match=words) as caught:
        settings(tmp_path, changed(**changes))
    assert caught.value.code == "FC401"


def test_a_class_that_refuses_the_config(tmp_path: Path) -> None:
    found = settings(tmp_path, changed(text__max_position_embeddings="many"))
    with pytest.raises(CkptError, match="cannot construct the config") as caught:
        hf_config(found, 257152, "float32")
    assert caught.value.code == "FC405"
