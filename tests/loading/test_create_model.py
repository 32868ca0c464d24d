"""`create_model_and_transforms`: from local files and from a hub, against upstream's own."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.loading.flamingo import create_model_and_transforms, load_flamingo_tokenizer
from flamingo_ckpt.loading.language import resize_rows
from flamingo_ckpt.loading.places import Access
from flamingo_ckpt.loading.pretrained import load_pretrained
from flamingo_ckpt.loading.vision import load_vision_tower
from tests import zoo
from tests.hub_server import HubServer, serving
from tests.loading.flamingo_files import (
    named_clip,
    save_open_clip,
    save_parts,
    save_tokenizer,
)
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN, VISION_LAYERS
from tests.zoo_lms import LANG_DIM, WORDS, language_model

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as hub:
        yield hub


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def refused(code: str, call: Any, *arguments: Any, **options: Any) -> CkptError:
    with pytest.raises(CkptError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, caught.value
    return caught.value


# --- against upstream -----------------------------------------------------------------------------


@each_family
def test_with_a_checkpoint_it_is_upstreams_model(family: str, tmp_path: Path) -> None:
    made = zoo.openflamingo(family)
    model, _, tokenizer = create_model_and_transforms(
        **save_parts(family, tmp_path),
        cross_attn_every_n_layers=made.every_n,
        attn_implementation="eager",
    )
    report = load_pretrained(model, zoo.save_torch(made.partial, tmp_path / "checkpoint.pt"))
    assert report.absent_by_design
    assert (model.eoc_token_id, model.media_token_id) == (EOC_TOKEN, MEDIA_TOKEN)
    assert len(tokenizer) == zoo.flamingo_rows(family)

    theirs = copy.deepcopy(made.model).double()
    inputs = made.inputs()
    inputs["vision_x"] = inputs["vision_x"].double()
    with torch.no_grad():
        wanted, found = theirs(**inputs).logits, model.double()(**inputs).logits
    # new tokens have no trained rows in a head of its own
    found, wanted = found[..., :WORDS], wanted[..., :WORDS]
    if family == "mpt1b":  # the zoo has a class of its own for it, which multiplies in other order
        assert torch.allclose(found, wanted, atol=1e-13, rtol=0)
    else:
        assert torch.equal(found, wanted)
    assert (model.vision_encoder(inputs["vision_x"][:, 0, 0])[1] != 0).all()


@each_family
def test_the_same_is_trained_as_upstream(family: str, tmp_path: Path) -> None:
    made = zoo.openflamingo(family)
    parts = save_parts(family, tmp_path)
    for frozen in (False, True):
        model, _, _ = create_model_and_transforms(
            **parts, cross_attn_every_n_layers=made.every_n, freeze_lm_embeddings=frozen
        )
        embedding = {f"lang_encoder.{zoo.FAMILIES[family][1]}.weight"}
        wanted = {name for name, one in made.model.named_parameters() if one.requires_grad}
        found = {name for name, one in model.named_parameters() if one.requires_grad}
        assert found == wanted - (embedding if frozen else set())
        assert not model.training


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_upstreams_own_function_gives_the_same(tmp_path: Path) -> None:
    """Upstream's factory itself; its tower is then told which tokens it was trained with."""
    from open_flamingo import create_model_and_transforms as upstream

    made, parts = zoo.openflamingo("opt"), save_parts("opt", tmp_path)
    clip = f"local-dir:{parts.pop('clip_vision_encoder_path')}"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs, their_processor, their_tokenizer = upstream(clip, use_local_files=True, **parts)
    ours, processor, tokenizer = create_model_and_transforms(
        clip, use_local_files=True, attn_implementation="eager", **parts
    )
    theirs.vision_encoder.final_ln_after_pool = True
    ours.load_state_dict(theirs.state_dict())  # the same keys
    theirs, ours = theirs.double().eval(), ours.double().eval()

    text = "<image>An image of two cats.<|endofchunk|><image>a"
    assert tokenizer(text)["input_ids"] == their_tokenizer(text)["input_ids"]
    pictures = [picture(0), picture(1)]
    assert all(torch.equal(processor(one), their_processor(one)) for one in pictures)
    inputs = {
        "vision_x": torch.stack([processor(one) for one in pictures])[None, :, None].double(),
        "lang_x": torch.tensor([tokenizer(text)["input_ids"]]),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["lang_x"])
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    trained = [name for name, one in theirs.named_parameters() if one.requires_grad]
    assert trained == [name for name, one in ours.named_parameters() if one.requires_grad]
    assert made.every_n != 1  # the default was taken


# --- the tokenizer and the rows -------------------------------------------------------------------


def test_tokens_are_added_once_and_those_there_stay_special(tmp_path: Path) -> None:
    path = str(save_tokenizer(tmp_path / "plain"))
    tokenizer = load_flamingo_tokenizer(path, Access())
    names = ["<|endofchunk|>", "<image>", "<PAD>"]
    assert tokenizer.convert_tokens_to_ids(names) == [WORDS, WORDS + 1, WORDS + 2]
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_flamingo_tokenizer(str(tmp_path / "again"), Access())
    assert again.convert_tokens_to_ids(names) == [WORDS, WORDS + 1, WORDS + 2]
    assert len(again) == len(tokenizer) == WORDS + 3
    assert set(names) <= set(again.all_special_tokens)

    with_pad = str(save_tokenizer(tmp_path / "pad", pad="<mine>"))
    tokenizer = load_flamingo_tokenizer(with_pad, Access())
    assert tokenizer.pad_token == "<mine>"
    assert len(tokenizer) == WORDS + 2


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_new_rows_are_the_same_in_every_construction(family: str) -> None:
    """Also those of a head that no checkpoint holds; and nobody else's random numbers are used."""
    rows = zoo.base_rows(family) + 5
    made = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = language_model(family, 2)
        old = [
            one.weight.detach().clone()
            for one in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        resize_rows(model, rows)
        new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for before, after in zip(old, new, strict=True):
            assert after.shape[0] == rows
            assert torch.equal(after[:-5], before)
            assert 0.01 < after[-5:].std() < 0.04
        made.append([one[-5:] for one in new])
        if family == "gptj":
            bias = model.get_output_embeddings().bias
            assert bias.shape == (rows,)
            assert (bias[-5:] == 0).all()
            assert (bias[:-5] != 0).any()
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert not torch.equal(*made[0])


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    model, _, tokenizer = create_model_and_transforms(**save_parts("gpt_neox", tmp_path))
    embedding = model.lang_encoder.get_input_embeddings().weight
    assert embedding.shape == (len(tokenizer), LANG_DIM)
    base = zoo.openflamingo("gpt_neox").language["gpt_neox.embed_in.weight"]
    assert base.shape[0] > len(tokenizer)
    assert torch.equal(embedding, base[: len(tokenizer)])


# --- the language model ---------------------------------------------------------------------------


def create(parts: dict[str, Any], **options: Any) -> Any:
    return create_model_and_transforms(**{**parts, **options})[0]


def test_mosaic_gpt_by_any_other_name(tmp_path: Path) -> None:
    """Upstream goes by the folder's name; the config says what it is, and its code is not run."""
    parts = save_parts("mpt1b", tmp_path)
    folder = Path(parts["lang_encoder_path"])
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.MosaicGPT", "AutoConfig": "code.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    model = create(parts)
    assert type(model.lang_encoder).__name__ == "MosaicGPT"
    assert not ran.exists()


def test_mpt_with_a_config_of_remote_code(tmp_path: Path) -> None:
    """MPT-7B's own config; its files have no head, which transformers' class ties."""
    parts = save_parts("mpt7b", tmp_path)
    folder = Path(parts["lang_encoder_path"])
    made = zoo.openflamingo("mpt7b", era="2023")
    assert "lm_head.weight" not in made.language
    config = {
        "architectures": ["MPTForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "attn_config": {"alibi": True, "attn_impl": "torch", "attn_type": "multihead_attention"},
        "d_model": LANG_DIM,
        "expansion_ratio": 4,
        "init_device": "cpu",
        "model_type": "mpt",
        "n_heads": 4,
        "n_layers": 4,
        "no_bias": True,
        "torch_dtype": "bfloat16",
        "vocab_size": zoo.base_rows("mpt7b"),
    }
    zoo.save_folder(made.language, config, folder)
    model = create(parts)
    assert type(model.lang_encoder).__name__ == "MptForCausalLM"
    head, embedding = model.lang_encoder.lm_head, model.lang_encoder.transformer.wte
    assert head.weight is embedding.weight
    assert embedding.weight.dtype == torch.float32


def test_old_files_with_buffers_and_the_old_name_of_a_head(tmp_path: Path) -> None:
    parts = save_parts("gpt_neox", tmp_path)
    made = zoo.openflamingo("gpt_neox", era="2023")
    assert "embed_out.weight" in made.language
    zoo.save_folder(made.language, made.text_config, Path(parts["lang_encoder_path"]))
    model = create(parts)
    head = model.lang_encoder.get_output_embeddings().weight
    assert torch.equal(head, made.language["embed_out.weight"][: len(head)])


@pytest.mark.parametrize("form", ["bin", "sharded", "sharded bin"])
def test_forms_of_files(form: str, tmp_path: Path) -> None:
    parts = save_parts("llama", tmp_path)
    folder = Path(parts["lang_encoder_path"])
    state = dict(zoo.openflamingo("llama").language)
    (folder / "model.safetensors").unlink()
    suffix = "bin" if "bin" in form else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    save = zoo.save_torch if suffix == "bin" else zoo.save_safetensors
    if "sharded" in form:
        names = sorted(state)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"{stem}-{number:05}-of-00002.{suffix}"
            save({name: state[name] for name in part}, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    else:
        save(state, folder / f"{stem}.{suffix}")
    model = create(parts)
    found = model.lang_encoder.model.layers[2].decoder_layer.mlp.up_proj.weight
    assert torch.equal(found, state["model.layers.2.mlp.up_proj.weight"])


@pytest.mark.parametrize("lost", ["model.norm.weight", "lm_head.weight"])
def test_a_missing_weight_is_an_error(lost: str, tmp_path: Path) -> None:
    parts = save_parts("llama", tmp_path)
    made = zoo.openflamingo("llama")
    state = {name: one for name, one in made.language.items() if name != lost}
    zoo.save_folder(state, made.text_config, Path(parts["lang_encoder_path"]))
    with pytest.raises(LoadError, match=lost) as caught:
        create(parts)
    assert caught.value.report.missing_keys == (lost,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    parts = save_parts("llama", tmp_path)
    folder = Path(parts["lang_encoder_path"])
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    refused("FC501", create, parts)
    assert not (tmp_path / "ran").exists()


def test_a_family_that_is_not_known_needs_its_layers_named(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=24, n_layer=2, n_head=2)
    language = transformers.GPT2LMHeadModel(config)
    parts = save_parts("llama", tmp_path)
    zoo.save_folder(language.state_dict(), config.to_dict(), Path(parts["lang_encoder_path"]))
    assert "`decoder_layers_attr_name`" in (refused("FC403", create, parts).hint or "")
    error = refused("FC453", create, parts, decoder_layers_attr_name="transformer.blocks")
    assert "`transformer.h`" in (error.hint or "")
    model = create(parts, decoder_layers_attr_name="transformer.h")
    inputs = zoo.openflamingo("llama").inputs()
    with torch.no_grad():
        assert model(**inputs).logits.shape == (2, 12, WORDS + 3)


def test_generate_knows_the_padding(tmp_path: Path) -> None:
    model, _, tokenizer = create_model_and_transforms(**save_parts("llama", tmp_path))
    assert model.lang_encoder.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.lang_encoder.generation_config.eos_token_id == 2


# --- the vision tower -----------------------------------------------------------------------------


def tower(path: Any, pretrained: str | None = None, **options: Any) -> Any:
    return load_vision_tower(str(path), pretrained, Access(), **options)


def tokens_of(found: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        tokens: torch.Tensor = found.module.double()(pixels.double())[1]
    return tokens


def expected_tokens(*, quick_gelu: bool = True) -> torch.Tensor:
    """Of transformers' CLIP: its last hidden state without the class token."""
    made = zoo.clip(layers=VISION_LAYERS, quick_gelu=quick_gelu)
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    vision = copy.deepcopy(made.hf_model).double().vision_model
    with torch.no_grad():
        tokens: torch.Tensor = vision(pixel_values=pixels.double()).last_hidden_state[:, 1:]
    return tokens


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-12, rtol=0)


def test_the_tokens_that_openflamingo_was_trained_on(tmp_path: Path) -> None:
    made = zoo.clip(layers=VISION_LAYERS)
    found = tower(save_open_clip(tmp_path, made.open_clip))
    assert close(tokens_of(found), expected_tokens())
    assert found.width == 64
    assert found.config["hidden_act"] == "quick_gelu"
    found.module.final_ln_after_pool = False  # what an open_clip of today does by itself
    assert (tokens_of(found) - expected_tokens()).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel", "hub form"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_folder_of_transformers(kind: str, quick_gelu: bool, tmp_path: Path) -> None:
    made = zoo.clip(layers=VISION_LAYERS, quick_gelu=quick_gelu)
    state = {
        "CLIPModel": made.hf,
        "CLIPVisionModel": made.hf_vision_flat,
        "hub form": made.hf_vision,
    }[kind]
    config = made.config if kind == "CLIPModel" else made.vision_config
    folder = zoo.save_folder(state, config, tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    found = tower(folder)
    assert close(tokens_of(found), expected_tokens(quick_gelu=quick_gelu))
    grey = found.image_processor(Image.new("RGB", (50, 40), (128, 128, 128)))
    wanted = 128 / 255 - torch.tensor([0.1, 0.2, 0.3])
    assert torch.allclose(grey[:, 0, 0], wanted)
    assert ("proj" in dict(found.module.named_parameters())) == (kind == "CLIPModel")


@pytest.mark.parametrize("layout", ["open_clip", "custom_text", "openai", "hf", "hf_vision"])
def test_a_name_and_a_file_of_any_layout(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = named_clip(monkeypatch) + "-quickgelu"
    made = zoo.clip(layers=VISION_LAYERS)
    path = zoo.save_torch(getattr(made, layout), tmp_path / "clip.pt")
    if layout == "hf_vision":  # without the projection, which the name promises
        with pytest.raises(LoadError, match="proj"):
            tower(name, str(path))
        return
    assert close(tokens_of(tower(name, str(path))), expected_tokens())


def test_a_file_does_not_say_its_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = named_clip(monkeypatch)
    path = str(zoo.save_torch(zoo.clip(layers=VISION_LAYERS).open_clip, tmp_path / "clip.pt"))
    found = tower(name, path)
    assert f"`{name}-quickgelu`" in caplog.text
    assert found.config["hidden_act"] == "gelu"
    assert not close(tokens_of(found), expected_tokens())
    caplog.clear()
    assert close(tokens_of(tower(name, path, force_quick_gelu=True)), expected_tokens())
    assert "quickgelu" not in caplog.text


@pytest.mark.parametrize("place", ["someone/clip/", "someone/clip/open_clip_model.safetensors"])
def test_a_tag_says_its_activation(
    place: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip since 2.29 builds `ViT-L-14` with `openai` wrongly, and warns."""
    tag = {"hf_hub": place, "quick_gelu": True, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    name = named_clip(monkeypatch, {"openai": tag})
    made = zoo.clip(layers=VISION_LAYERS)
    server.push_folder("someone/clip", save_open_clip(tmp_path / "clip", made.open_clip))
    access = Access(cache_dir=tmp_path / "cache")
    found = load_vision_tower(name, "openai", access)
    assert close(tokens_of(found), expected_tokens())
    assert found.image_processor(Image.new("RGB", (50, 40)))[0, 0, 0] == 0
    error = refused("FC452", load_vision_tower, name, "opanai", access)
    assert "`opanai` is neither a file nor a tag" in error.message
    assert "openai" in (error.hint or "")


def test_the_real_tag_of_the_releases() -> None:
    import open_clip

    tag = open_clip.get_pretrained_cfg("ViT-L-14", "openai")
    assert tag["quick_gelu"]
    assert tag["hf_hub"]


def test_no_weights_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = tower(named_clip(monkeypatch))
    assert "RANDOM weights" in caplog.text
    assert not any(one.is_meta for one in found.module.parameters())
    assert tokens_of(found).shape == (2, 16, 64)


def test_a_tower_with_a_tensor_too_few(tmp_path: Path) -> None:
    state = zoo.clip(layers=VISION_LAYERS).open_clip
    lost = "visual.transformer.resblocks.1.ln_2.bias"
    del state[lost]
    with pytest.raises(LoadError) as caught:
        tower(save_open_clip(tmp_path, state))
    assert "ln_2.bias" in str(caught.value.report.missing_keys)


def test_towers_without_patch_tokens(tmp_path: Path) -> None:
    refused("FC451", tower, "RN50")
    refused("FC451", tower, "ViT-B-16-SigLIP")
    refused("FC451", tower, "coca_ViT-B-32")
    refused("FC450", tower, "ViT-Z-99")
    made = zoo.openflamingo("llama")
    refused("FC451", tower, zoo.save_folder(made.language, made.text_config, tmp_path))


# --- the hub --------------------------------------------------------------------------------------


def test_everything_from_the_hub_and_then_from_its_cache(server: HubServer, tmp_path: Path) -> None:
    local = save_parts("llama", tmp_path / "local")
    lm = Path(local["lang_encoder_path"])
    (lm / "remote.py").write_text("raise SystemExit")
    (lm / "extra.bin").write_bytes(b"not wanted")
    for name in ("clip_vision_encoder_path", "lang_encoder_path", "tokenizer_path"):
        server.push_folder(f"someone/{name}", Path(local[name]))
    parts = {name: f"someone/{name}" if value else "" for name, value in local.items()}
    parts["clip_vision_encoder_path"] = "hf-hub:" + parts["clip_vision_encoder_path"]
    parts["cache_dir"] = str(tmp_path / "cache")
    model = create(parts)
    assert not [one for one in server.requests if "remote.py" in one.path or "extra" in one.path]
    server.requests.clear()
    again = create(parts, use_local_files=True)
    assert server.requests == []
    wanted, found = model.state_dict(), again.state_dict()
    assert list(wanted) == list(found)
    frozen = [name for name in wanted if "gated" not in name and "perceiver" not in name]
    assert all(torch.equal(wanted[name], found[name]) for name in frozen)
    parts["cache_dir"] = str(tmp_path / "empty")
    refused("FC473", create, parts, use_local_files=True)
    assert server.requests == []


def test_a_repository_without_weights(server: HubServer, tmp_path: Path) -> None:
    parts = save_parts("llama", tmp_path)
    config = (Path(parts["lang_encoder_path"]) / "config.json").read_bytes()
    server.push("someone/lm", {"config.json": config})
    error = refused("FC471", create, parts, lang_encoder_path="someone/lm", cache_dir=tmp_path)
    assert "has no weights" in error.message


# --- arguments ------------------------------------------------------------------------------------


def test_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = save_parts("llama", tmp_path)
    with pytest.raises(TypeError, match=r"'max_frames', 'depth'.*'max_num_frames'"):
        create(parts, max_frames=4, depth=3)
    for every in (0, 5, True):
        refused("FC455", create, parts, cross_attn_every_n_layers=every)
    refused("FC450", create, parts, lang_encoder_path="./nothing")
    refused("FC450", create, parts, tokenizer_path=str(tmp_path / "lm" / "config.json"))
    error = refused("FC454", create, parts, tokenizer_path=parts["clip_vision_encoder_path"])
    assert "tokenizer" in error.message

    with caplog.at_level(logging.INFO):
        model = create(
            parts, max_num_frames=3, gradient_checkpointing=True, vis_dim=20, device="cpu"
        )
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert f"{trained} trainable parameters" in caplog.text
    assert model.perceiver.frame_embs.shape == (3, 20)
    model.vision_encoder = torch.nn.Identity()
    tokens = torch.randn(1, 2, 2, 7, 20)  # two films of two frames, seven tokens each
    labels = torch.tensor([[MEDIA_TOKEN, 5, MEDIA_TOKEN, 6]])
    output = model(tokens, labels, labels=labels)
    output.loss.backward()
    assert all(one.grad is not None for one in model.perceiver.parameters())
