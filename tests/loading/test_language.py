"""The language model of a Flamingo: any form of files, no code of theirs, nothing left random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import LoadError
from flamingo_ckpt.loading.flamingo import create_model_and_transforms
from tests import zoo
from tests.loading.flamingo_files import (
    create,
    refused,
    save_parts,
)
from tests.zoo_lms import LANG_DIM, WORDS


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


def test_generate_goes_by_the_folders_own_settings(tmp_path: Path) -> None:
    parts = save_parts("llama", tmp_path)
    path = Path(parts["lang_encoder_path"]) / "generation_config.json"
    path.write_text(json.dumps({"pad_token_id": 7, "eos_token_id": [1, 2], "max_length": 33}))
    settings = create(parts).lang_encoder.generation_config
    assert (settings.pad_token_id, settings.eos_token_id, settings.max_length) == (7, [1, 2], 33)
    path.write_text("{")
    refused("FC401", create, parts)


@pytest.mark.parametrize("content", ["[]", "null", '{"max_new_tokens": -5}'])
def test_a_generation_config_that_is_none(content: str, tmp_path: Path) -> None:
    parts = save_parts("llama", tmp_path)
    path = Path(parts["lang_encoder_path"], "generation_config.json")
    path.write_text(content)
    assert refused("FC401", create, parts).where == str(path)


def test_a_token_of_minus_one_is_no_token(tmp_path: Path) -> None:
    """LLaMA 1 writes it; as a filler of rows it would be an index out of range."""
    parts = save_parts("llama", tmp_path)
    path = Path(parts["lang_encoder_path"], "generation_config.json")
    path.write_text('{"pad_token_id": -1, "bos_token_id": 1}')
    settings = create(parts).lang_encoder.generation_config
    assert (settings.pad_token_id, settings.bos_token_id) == (WORDS + 2, 1)


@pytest.mark.parametrize("family", ["opt", "llama", "mpt1b", "gptj"])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_file_without_the_prefix_of_its_base(family: str, wrapper: str, tmp_path: Path) -> None:
    """As the hub's OPT has it: the model was saved without its head, which is tied."""
    parts = save_parts(family, tmp_path)
    wanted = create(parts).state_dict()
    folder = Path(parts["lang_encoder_path"])
    base = {"opt": "model.", "llama": "model."}.get(family, "transformer.")
    state = zoo.openflamingo(family, layers=4).language
    if family == "opt":
        del state["lm_head.weight"]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    bare = {wrapper + name.removeprefix(base): tensor for name, tensor in state.items()}
    torch.save(bare, folder / "pytorch_model.bin")
    found = create(parts).state_dict()
    frozen = [name for name in wanted if name.startswith("lang_encoder.") and "gated" not in name]
    assert len(frozen) > 30
    assert all(torch.equal(found[name], wanted[name]) for name in frozen)


def test_masks_of_old_files_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    """GPT-2's class names them by a pattern that fits a bias of the model as well."""
    from transformers import GPT2Config, GPT2LMHeadModel

    parts = save_parts("llama", tmp_path)
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2)
    language = GPT2LMHeadModel(config)
    config.save_pretrained(folder)
    state = {
        name.removeprefix("transformer."): torch.randn_like(tensor)
        for name, tensor in language.state_dict().items()
        if name != "lm_head.weight"
    }
    masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 8, 8) for index in range(2)}
    torch.save(state | masks, folder / "pytorch_model.bin")
    options = {"lang_encoder_path": str(folder), "decoder_layers_attr_name": "transformer.h"}
    model = create(parts | options)
    found = model.lang_encoder.old_decoder_blocks[1].attn.c_attn.bias
    assert torch.equal(found, state["h.1.attn.c_attn.bias"])
    torch.save(state | {"h.0.attn.stranger": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="stranger"):
        create(parts | options)
