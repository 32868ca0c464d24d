"""What is expected is what upstream, transformers and open_clip themselves have in a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.clip_config import open_clip_vision
from flamingo_ckpt.models.config import ModelConfig, parse_config
from flamingo_ckpt.models.expectation import ALIAS_TREES, Expectation, ExpectedTensor, expect
from tests import zoo
from tests.support import TORCH_NAMES

#: Of the zoo: mpt7b is transformers' class, which has the head that MosaicML's has not.
FAMILIES = sorted(zoo.FAMILIES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def config(mapping: dict[str, Any]) -> ModelConfig:
    return parse_config(mapping, "config.json")


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (TORCH_NAMES[str(t.dtype)], tuple(t.shape)) for name, t in state.items()}


def expected_shapes(tensors: Iterable[ExpectedTensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def on_disk(family: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5.14 renamed the head of GPT-NeoX in memory; files have the first name."""
    if family not in ("gpt_neox", "pythia"):
        return dict(state)
    return {
        name.replace("lang_encoder.lm_head", "lang_encoder.embed_out"): state[name]
        for name in state
    }


def aliases(state: Mapping[str, Any]) -> dict[str, str]:
    """alias -> first name with the same memory, among tensors that have any."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        before = first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if before != name:
            found[name] = before
    return found


@each_family
@pytest.mark.parametrize("every_n", [1, 2, 3])
def test_openflamingo_has_upstreams_own_state_dict(family: str, every_n: int) -> None:
    made = zoo.openflamingo(family, every_n=every_n)
    found = expect(config(made.config), "openflamingo")
    wanted = on_disk(family, made.full)
    assert expected_shapes(found.tensors) == shapes(wanted)
    assert [tensor.name for tensor in found.tensors] == list(wanted)
    assert {t.name: t.alias_of for t in found.tensors if t.alias_of} == aliases(wanted)
    assert {tensor.kind for tensor in found.tensors} == {"parameter"}


def test_a_deep_perceiver_and_two_digit_layers() -> None:
    made = zoo.openflamingo("llama", every_n=4, layers=12, perceiver_depth=12)
    found = expect(config(made.config), "openflamingo")
    assert expected_shapes(found.tensors) == shapes(made.full)


@each_family
def test_a_release_holds_what_upstreams_filter_keeps(family: str) -> None:
    """Names of 2023: those of the released files, buffers of old classes aside."""
    made = zoo.openflamingo(family, era="2023")
    found = expect(config(made.config), "openflamingo")
    buffers = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
    kept = {name for name in made.partial if not name.endswith(buffers)}
    assert {tensor.name for tensor in found.tensors if tensor.in_checkpoint} == kept
    absent = [tensor for tensor in found.canonical() if not tensor.in_checkpoint]
    assert absent
    assert all(tensor.base in ("vision", "language") for tensor in absent)


def test_every_tensor_that_was_trained_has_no_base() -> None:
    made = zoo.openflamingo("opt")
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    found = expect(config(made.config), "openflamingo")
    assert {tensor.name for tensor in found.canonical() if tensor.base is None} == trained


def test_groups_of_openflamingo() -> None:
    found = expect(config(zoo.openflamingo("opt").config), "openflamingo").by_name()
    lang = "lang_encoder.model.decoder."
    groups = {
        "vision_encoder.conv1.weight": ("vision", "vision", False),
        "perceiver.latents": ("perceiver", None, True),
        f"{lang}layers.1.gated_cross_attn_layer.attn_gate": ("xattn", None, True),
        f"{lang}layers.1.decoder_layer.fc1.weight": ("lm.layers", "language", False),
        f"{lang}embed_tokens.weight": ("lm.embed", None, True),
        f"{lang}embed_positions.weight": ("lm.rest", "language", True),
        f"{lang}final_layer_norm.bias": ("lm.rest", "language", False),
        "lang_encoder.lm_head.weight": ("lm.embed", None, True),
        "lang_encoder.old_decoder_blocks.0.fc1.weight": ("lm.layers", "language", False),
        "lang_encoder.gated_cross_attn_layers.1.attn_gate": ("xattn", None, False),
    }
    seen = {
        name: (found[name].group, found[name].base, found[name].in_checkpoint) for name in groups
    }
    assert seen == groups


@each_family
def test_hf_flamingo_has_the_published_names(family: str) -> None:
    made = zoo.hf_flamingo(family, every_n=2)
    found = expect(config(made.config))
    assert found.layout == "hf-flamingo"
    assert expected_shapes(found.tensors) == shapes(on_disk(family, made.state))
    assert all(tensor.in_checkpoint for tensor in found.canonical())


def test_otter_is_flamingo_with_embeddings_of_frames() -> None:
    made = zoo.hf_flamingo("llama", model_type="otter", extra_rows=1)
    plain = expect(config(made.config))
    assert expected_shapes(plain.tensors) == shapes(made.state)
    video = expect(config(made.config | {"max_num_frames": 7, "max_num_media": 3}))
    width = made.config["vision_config"]["hidden_size"]
    added = expected_shapes(video.tensors).items() - expected_shapes(plain.tensors).items()
    assert dict(added) == {
        "perceiver.frame_embs": ("F32", (7, width)),
        "perceiver.media_time_embs": ("F32", (3, 1, width)),
    }


def test_version_1_stores_the_gated_blocks_twice() -> None:
    made = zoo.openflamingo("llama")
    state = {name: t for name, t in zoo.openflamingo_v1().items() if t.is_floating_point()}
    state = {name: t for name, t in state.items() if not name.endswith("inv_freq")}
    found = expect(config(made.config), "openflamingo-v1")
    kept = [tensor for tensor in found.tensors if tensor.in_checkpoint]
    assert expected_shapes(kept) == shapes(state)
    assert not any(tensor.name.startswith(ALIAS_TREES[0]) for tensor in found.tensors)
    assert "vision_encoder.visual.conv1.weight" in found.by_name()


def test_perceiver_and_gated_blocks_have_sizes_of_their_own() -> None:
    changes = {
        "perceiver_depth": 2,
        "perceiver_num_latents": 5,
        "perceiver_heads": 3,
        "perceiver_dim_head": 4,
        "perceiver_ff_mult": 2,
        "cross_attn_heads": 2,
        "cross_attn_dim_head": 6,
        "cross_attn_ff_mult": 3,
    }
    mapping = zoo.openflamingo("llama").config | changes
    width, d = mapping["vision_config"]["hidden_size"], mapping["text_config"]["hidden_size"]
    found = expected_shapes(expect(config(mapping), "openflamingo").canonical())
    gated = "lang_encoder.model.layers.1.gated_cross_attn_layer."
    wanted = {
        "perceiver.latents": (5, width),
        "perceiver.layers.1.0.to_kv.weight": (24, width),
        "perceiver.layers.1.1.1.weight": (2 * width, width),
        gated + "attn.to_q.weight": (12, d),
        gated + "attn.to_kv.weight": (24, width),
        gated + "ff.3.weight": (d, 3 * d),
    }
    assert {name: found[name][1] for name in wanted} == wanted
    assert "perceiver.layers.2.0.to_q.weight" not in found


def test_a_family_named_by_hand() -> None:
    """GPT-2 is no family of the tables; its class is transformers', its layers are at a path."""
    text = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50}
    mapping = zoo.openflamingo("llama").config
    mapping |= {"text_config": text, "decoder_layers_attr_name": "transformer.h"}
    mapping["cross_attn_every_n_layers"] = 3
    found = expect(config(mapping), "openflamingo")
    zoo.prepare()
    import transformers

    alone = transformers.GPT2LMHeadModel(transformers.GPT2Config(**text)).state_dict()
    language = {
        t.name.removeprefix("lang_encoder.").replace("decoder_layer.", ""): t.shape
        for t in found.tensors
        if t.name.startswith("lang_encoder.") and "gated_cross_attn" not in t.name
        if not t.name.startswith(ALIAS_TREES)
    }
    assert language == {name: tuple(tensor.shape) for name, tensor in alone.items()}
    gated = {t.name for t in found.canonical() if t.group == "xattn"}
    assert len(gated) == 11
    assert all(n.startswith("lang_encoder.transformer.h.2.gated_cross_attn_layer.") for n in gated)


@pytest.mark.parametrize("form", ["hf", "open_clip"])
def test_clip_in_both_layouts_from_both_forms(form: str) -> None:
    made = zoo.clip()
    mapping = made.config if form == "hf" else zoo.open_clip_cfg(4)
    one = config(mapping)
    assert one.layout == {"hf": "hf-clip", "open_clip": "open_clip"}[form]
    assert expected_shapes(expect(one, "open_clip").tensors) == shapes(made.open_clip)
    assert expected_shapes(expect(one, "hf-clip").tensors) == shapes(made.hf)


def test_custom_text_clip() -> None:
    found = expect(config(zoo.open_clip_cfg(4) | {"custom_text": True}))
    assert expected_shapes(found.tensors) == shapes(zoo.clip().custom_text)
    groups = {tensor.name.split(".")[0]: tensor.group for tensor in found.tensors}
    assert groups == {"visual": "vision", "text": "text", "logit_scale": "logits"}


def test_clip_vision_tower_under_the_names_that_every_version_reads() -> None:
    made = zoo.clip()
    found = expect(config(made.vision_config))
    assert expected_shapes(found.tensors) == shapes(made.hf_vision)
    projected = made.vision_config | {"architectures": ["CLIPVisionModelWithProjection"]}
    assert expected_shapes(expect(config(projected)).tensors) == shapes(made.hf_vision_projection)


def test_a_width_of_mlp_that_its_ratio_falls_short_of() -> None:
    """open_clip cuts width * ratio to a whole number, and mlp / width * width may be just below."""
    vision = zoo.clip().config["vision_config"] | {"num_attention_heads": 1}
    sizes = [(width, mlp) for width in range(1, 120) for mlp in range(1, 120)]
    assert any(int(width * (mlp / width)) != mlp for width, mlp in sizes)
    for width, mlp in sizes:
        tower = open_clip_vision(vision | {"hidden_size": width, "intermediate_size": mlp})
        assert int(width * tower["mlp_ratio"]) == mlp


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_paligemma_in_the_hubs_layout(version: int, tied: bool) -> None:
    made = zoo.paligemma(version=version, tied=tied)
    found = expect(config(made.config))
    assert found.layout == "paligemma"
    assert expected_shapes(found.canonical()) == shapes(made.layout("L1"))
    head = found.by_name()["language_model.lm_head.weight"]
    assert (head.alias_of is not None, head.in_checkpoint) == (tied, not tied)
    assert {t.group for t in found.tensors} == {
        "vision",
        "projector",
        "lm.embed",
        "lm.layers",
        "lm.rest",
    }


@each_family
def test_a_language_model_alone(family: str) -> None:
    made = zoo.openflamingo(family)
    found = expect(config(made.text_config))
    names = {"lm_head.weight": "embed_out.weight"} if family in ("gpt_neox", "pythia") else {}
    wanted = {names.get(name, name): tensor for name, tensor in made.language.items()}
    assert expected_shapes(found.tensors) == shapes(wanted)
    assert found.by_name()[zoo.FAMILIES[family][1] + ".weight"].group == "lm.embed"


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype_is_the_configs(field: str) -> None:
    mapping = zoo.openflamingo("llama").config
    del mapping["torch_dtype"]
    assert {t.dtype for t in expect(config(mapping)).tensors} == {"F32"}
    assert {t.dtype for t in expect(config(mapping | {field: "bfloat16"})).tensors} == {"BF16"}


def test_a_layout_that_the_model_has_no_form_in() -> None:
    with pytest.raises(CkptError, match="no form in the layout `open_clip`") as caught:
        expect(config(zoo.openflamingo("llama").config), "open_clip")
    assert caught.value.code == "FC405"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision_cfg", {"attentional_pool": True}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"no_ln_pre": True}),
        ("vision_cfg", {"ls_init_value": 0.1}),
        ("vision_cfg", {"qk_norm": True}),
        ("vision_cfg", {"image_size": [32, 16]}),
        ("vision_cfg", {"layers": [1, 1, 1, 1]}),
        ("vision_cfg", {"timm_model_name": "vit_tiny_patch16_224"}),
        ("text_cfg", {"embed_cls": True}),
        ("text_cfg", {"proj_bias": True}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"pool_type": "last"}),
    ],
)
def test_what_transformers_clip_lacks_is_refused_by_name(part: str, change: dict[str, Any]) -> None:
    mapping = zoo.open_clip_cfg(4)
    mapping[part] |= change
    with pytest.raises(CkptError, match=f"`{part}.{next(iter(change))}`") as caught:
        expect(config(mapping), "hf-clip")
    assert caught.value.code == "FC405"


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model_type": "no_such_type"}, "FC403", "no model of the type"),
        ({"model_type": "clip_vision_model"}, "FC403", "no causal language model"),
        ({"model_type": "gpt2", "n_embd": 15, "n_head": 2}, "FC405", "cannot construct"),
    ],
)
def test_what_transformers_refuses(changes: dict[str, Any], code: str, message: str) -> None:
    mapping = zoo.openflamingo("llama").config
    mapping |= {"text_config": changes, "decoder_layers_attr_name": "transformer.h"}
    with pytest.raises(CkptError, match=message) as caught:
        expect(config(mapping))
    assert (caught.value.code, caught.value.where) == (code, "config.json")


def test_a_path_that_is_no_list_of_layers() -> None:
    text = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50}
    mapping = zoo.openflamingo("llama").config | {"text_config": text}
    for path in ("transformer.layers", "transformer.ln_f"):
        with pytest.raises(CkptError, match="cannot construct") as caught:
            expect(config(mapping | {"decoder_layers_attr_name": path}))
        assert caught.value.code == "FC405"


def test_counts() -> None:
    def tensor(name: str, **changes: Any) -> ExpectedTensor:
        facts = {"dtype": "F32", "shape": (2, 3), "kind": "parameter", "alias_of": None}
        facts |= {"group": "lm.rest", "base": None, "in_checkpoint": True} | changes
        return ExpectedTensor(name=name, **facts)

    found = Expectation(
        layout="openflamingo",
        tensors=(
            tensor("a"),
            tensor("tied", alias_of="a"),
            tensor("tied_too", alias_of="a"),
            tensor(ALIAS_TREES[0] + "0.x", alias_of="a"),
            tensor("frozen", in_checkpoint=False),
            tensor("positions", kind="buffer", dtype="I64", shape=(5,)),
        ),
    )
    assert found.summary() == {
        "num_tensors": 3,
        "num_parameters": 12,
        "num_bytes": 24 + 24 + 40,
        "dtypes": {"F32": 2, "I64": 1},
        "tied_groups": 1,
        "num_checkpoint_tensors": 1,
        "num_checkpoint_parameters": 6,
    }
    assert found.tied_groups() == [["a", "tied", "tied_too"]]
    assert found.alias_trees() == {"lang_encoder.old_decoder_blocks": 1}


def test_constructing_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither on the caller's random numbers and defaults nor on the terminal."""
    import torch

    from flamingo_ckpt.models.construct import construct

    made = config(zoo.openflamingo("opt").config)
    capfd.readouterr()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    assert construct(made, "openflamingo")
    assert construct(made, "hf-flamingo")
    assert torch.equal(torch.rand(4), wanted)
    assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float32, "cpu")
    assert capfd.readouterr() == ("", "")
