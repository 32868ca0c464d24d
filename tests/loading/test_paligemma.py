"""`load_hf_model`: what it loads, and that it computes what the same weights compute elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.engine import LoadOptions, load_into
from flamingo_ckpt.loading.paligemma import load_hf_model, load_paligemma
from tests.loading.folders import write_config, write_folder, write_tokenizer, write_weights
from tests.loading.from_scratch import FromScratch, careless_load
from tests.zoo_lms import randomise
from tests.zoo_paligemma import LAYOUTS, WORDS, PaliGemmaZoo, inputs, paligemma

LAYERS = 2


@pytest.fixture(scope="module")
def zoo() -> PaliGemmaZoo:
    return paligemma(layers=LAYERS)


@pytest.fixture(scope="module")
def untied() -> PaliGemmaZoo:
    return paligemma(layers=LAYERS, tied=False)


def same_state(model: Any, zoo: PaliGemmaZoo) -> None:
    state = model.state_dict()
    assert state.keys() == zoo.memory.keys()
    for name, tensor in zoo.memory.items():
        assert torch.equal(state[name], tensor), name
    assert not any(one.is_meta for one in (*model.parameters(), *model.buffers()))


def logits(model: Any, zoo: PaliGemmaZoo) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(zoo)).logits


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", [*LAYOUTS, "L6 nested"])
def test_every_layout(tmp_path: Path, name: str, version: int) -> None:
    zoo = paligemma(version=version, layers=LAYERS)
    state = zoo.l6_nested if name == "L6 nested" else zoo.layout(name)
    model, tokenizer = load_hf_model(write_folder(tmp_path, zoo.config, state), "cpu")
    same_state(model, zoo)
    assert type(model).__name__ == "PaliGemmaForConditionalGeneration"
    assert not model.training
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model, zoo), logits(zoo.model, zoo))
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", [1, 2])
def test_the_same_bits_as_from_pretrained(tmp_path: Path, version: int, dtype: torch.dtype) -> None:
    from transformers import PaliGemmaForConditionalGeneration

    zoo = paligemma(version=version, layers=LAYERS)
    state = {name: tensor.to(dtype) for name, tensor in zoo.layout("L1").items()}
    config = zoo.config | {"dtype": str(dtype).removeprefix("torch.")}
    write_folder(tmp_path, config, state)
    ours, _ = load_hf_model(tmp_path, "cpu")
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert ours.dtype == theirs.dtype == dtype
    told = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == told[name].dtype
        assert torch.equal(buffer, told[name]), name
    batch = inputs(zoo)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.no_grad():
        out, expected = ours(**batch), theirs(**batch)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.image_hidden_states, expected.image_hidden_states)
        # as the processor marks a prefix: all of it is seen from everywhere
        kinds = torch.zeros_like(batch["input_ids"])
        assert torch.equal(
            ours(**batch, token_type_ids=kinds).logits,
            theirs(**batch, token_type_ids=kinds).logits,
        )
    assert not ours.training
    assert ours.config.to_dict().keys() == theirs.config.to_dict().keys()


def test_as_its_users_write_it(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    from flamingo_ckpt import load_hf_model as load

    # as the hub's config, which says nothing of the picture's tokens in this version
    vision = {k: v for k, v in zoo.config["vision_config"].items() if k != "num_image_tokens"}
    write_folder(tmp_path, zoo.config | {"vision_config": vision}, zoo.layout("L1"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(str(tmp_path), device)
    model = model.to(device).eval()
    num_image_tokens = model.config.vision_config.num_image_tokens
    size = model.config.vision_config.image_size
    tokenizer.add_bos_token = tokenizer.add_eos_token = False
    prompt = "<image> " * num_image_tokens + tokenizer.bos_token + " w7 w8"
    inputs_ = tokenizer([prompt], return_tensors="pt", padding="longest", truncation=True)
    assert inputs_["input_ids"].tolist() == [[WORDS] * num_image_tokens + [2, 7, 8]]
    pixels = torch.zeros(1, 3, size, size, device=device)
    with torch.no_grad():
        logits = model(**inputs_.to(device), pixel_values=pixels).logits
    assert logits.shape == (1, num_image_tokens + 3, model.config.text_config.vocab_size)


def test_the_attention_asked_for(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    # As the processor marks a prefix. Without it, the class's eager attention is causal, and its
    # fused one is not.
    kinds = torch.zeros_like(inputs(zoo)["input_ids"])
    for name in ("eager", "sdpa"):
        model, _ = load_hf_model(tmp_path, "cpu", attn_implementation=name)
        for part in (model, model.model.language_model, model.model.vision_tower):
            assert part.config._attn_implementation == name
        with torch.no_grad():
            ours = model(**inputs(zoo), token_type_ids=kinds).logits
            theirs = zoo.model(**inputs(zoo), token_type_ids=kinds).logits
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(CkptError, match="cannot construct the model") as caught:
        load_hf_model(tmp_path, "cpu", attn_implementation="magic")
    assert caught.value.code == "FC405"


def test_greedy_tokens(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    model, tokenizer = load_hf_model(write_folder(tmp_path, zoo.config, zoo.layout("L1")), "cpu")
    batch = inputs(zoo)
    ours = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, zoo.model.generate(**batch, max_new_tokens=4, do_sample=False))
    assert ours.shape[1] > batch["input_ids"].shape[1]
    tokenizer.batch_decode(ours)


def test_a_batch_padded_right(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    _, tokenizer = load_hf_model(write_folder(tmp_path, zoo.config, zoo.layout("L1")), "cpu")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["padding_side"] == "left", "what the folder says itself"
    batch = tokenizer(["<image> w7", "<image> w7 w8 w9"], padding=True)
    assert batch["input_ids"] == [[WORDS, 7, 0, 0], [WORDS, 7, 8, 9]]


def test_generation_config(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    plain, _ = load_hf_model(tmp_path, "cpu")
    assert plain.generation_config.max_new_tokens is None
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 1}')
    model, _ = load_hf_model(tmp_path, "cpu")
    assert model.generation_config.max_new_tokens == 3
    batch = inputs(zoo)
    made = model.generate(**batch, do_sample=False).shape[1] - batch["input_ids"].shape[1]
    assert 1 <= made <= 3
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens"')
    with pytest.raises(CkptError, match="generation config") as caught:
        load_hf_model(tmp_path, "cpu")
    assert caught.value.code == "FC408"


def test_a_pooling_head_that_nobody_asked_for(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """Built from a config that does not mention it, and saved with it."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = {k: v for k, v in zoo.config.items() if k != "model_type"}
    vision = {k: v for k, v in config["vision_config"].items() if k != "vision_use_head"}
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**config | {"vision_config": vision}))
    randomise(model)
    model.eval().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["vision_config"]["vision_use_head"] is True
    loaded = load_paligemma(tmp_path, "cpu")
    assert torch.equal(logits(loaded.model, zoo), logits(model, zoo))
    (note,) = [one for one in loaded.report.findings if one.code == "FC209"]
    assert note.detail.startswith("11 tensors")


def test_saved_by_the_class_and_loaded_again(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    model, tokenizer = load_hf_model(write_folder(tmp_path / "a", zoo.config, zoo.layout("L1")))
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    same_state(load_hf_model(tmp_path / "b", "cpu")[0], zoo)


def test_weights_stay_in_the_file(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """Mapped: the process has no copy, and writing to a weight does not reach the file."""
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=2)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    loaded = load_paligemma(tmp_path, "cpu")
    assert loaded.report.num_mapped == loaded.report.num_loaded == len(zoo.memory) - 1
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1)
    assert {path: path.read_bytes() for path in files} == files


# --- how the weights are stored ------------------------------------------------------------------


def test_shards_of_safetensors(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=3)
    same_state(load_hf_model(tmp_path, "cpu")[0], zoo)


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files(tmp_path: Path, zoo: PaliGemmaZoo, shards: int) -> None:
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    state = zoo.layout("L2")
    names = list(state)
    weight_map = {}
    for at in range(shards):
        file = (
            f"pytorch_model-{at + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        )
        part = {name: state[name] for name in names[at::shards]}
        torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same_state(load_hf_model(tmp_path, "cpu")[0], zoo)


class _Bomb:
    def __reduce__(self) -> Any:
        return (open, ("bomb-went-off", "w"))


def test_a_pickle_runs_nothing(
    tmp_path: Path, zoo: PaliGemmaZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    torch.save(zoo.layout("L1") | {"bomb": _Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CkptError) as caught:
        load_hf_model(tmp_path, "cpu")
    assert caught.value.code in ("FC501", "FC502")
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_arrays_of_big_vision(tmp_path: Path, version: int, prefix: str) -> None:
    zoo = paligemma(version=version, layers=LAYERS)
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    np.savez(tmp_path / "pt_224.npz", **zoo.npz(prefix=prefix))
    loaded = load_paligemma(tmp_path, "cpu")
    same_state(loaded.model, zoo)
    model, rows = loaded.model, zoo.config["text_config"]["vocab_size"]
    embedding = model.get_input_embeddings()
    assert embedding.weight.shape[0] == embedding.num_embeddings == rows
    assert model.lm_head.weight is embedding.weight
    assert model.lm_head.out_features == model.config.text_config.vocab_size == rows
    assert not embedding.weight[WORDS:].any()
    (note,) = [one for one in loaded.report.findings if one.code == "FC418"]
    assert note.data == {"rows": rows, "source_rows": WORDS, "zero_rows": rows - WORDS}
    assert torch.equal(logits(model, zoo), logits(zoo.model, zoo))
    assert torch.equal(
        model.generate(**inputs(zoo), max_new_tokens=2, do_sample=False),
        zoo.model.generate(**inputs(zoo), max_new_tokens=2, do_sample=False),
    )


def test_arrays_as_long_as_the_vocabulary(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    config = zoo.config | {"text_config": zoo.config["text_config"] | {"vocab_size": WORDS}}
    write_config(tmp_path, config)
    write_tokenizer(tmp_path)
    np.savez(tmp_path / "a.npz", **zoo.npz())
    # `<image>` is beyond the last row, which transformers allows and the tokenizer check does not
    with pytest.raises(CkptError, match="193 tokens, and the vocabulary 192 rows") as caught:
        load_hf_model(tmp_path, "cpu")
    assert caught.value.code == "FC456"


def test_only_big_vision_may_lack_rows(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    text = zoo.config["text_config"]
    for rows in (text["vocab_size"] + 64, text["vocab_size"] - 32):
        config = zoo.config | {"text_config": text | {"vocab_size": rows}}
        write_folder(tmp_path, config, zoo.layout("L1"))
        with pytest.raises(CkptError, match=f"256 rows, and .* is {rows}") as caught:
            load_hf_model(tmp_path, "cpu")
        assert caught.value.code == "FC418"


def test_a_wrapped_state_dict(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    state = {f"module.{name}": tensor for name, tensor in zoo.layout("L4").items()}
    torch.save({"epoch": 3, "model": state, "ema": state}, tmp_path / "pytorch_model.bin")
    same_state(load_hf_model(tmp_path, "cpu", wrapper_key="model")[0], zoo)


# --- dtype and device -----------------------------------------------------------------------------


def test_the_dtype_of_the_file(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """Kept, also where the config says another: a cast is asked for, never implied."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in zoo.layout("L1").items()}
    write_folder(tmp_path, zoo.config | {"dtype": "float32"}, state)
    loaded = load_paligemma(tmp_path, "cpu")
    assert {one.dtype for one in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config.dtype == torch.bfloat16
    assert not loaded.report.cast
    assert {one.dtype for one in careless_load(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "torch.float64"])
def test_a_dtype_asked_for(tmp_path: Path, zoo: PaliGemmaZoo, dtype: Any) -> None:
    loaded = load_paligemma(
        write_folder(tmp_path, zoo.config, zoo.layout("L1")), "cpu", dtype=dtype
    )
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    state = loaded.model.state_dict()
    for name, tensor in zoo.memory.items():
        assert torch.equal(state[name], tensor.to(wanted)), name
    assert len(loaded.report.cast) == loaded.report.num_loaded == len(zoo.memory) - 1
    assert loaded.model.dtype == loaded.model.config.dtype == wanted


def test_several_dtypes(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    from transformers import PaliGemmaForConditionalGeneration

    state = zoo.layout("L1")
    for name in state:
        if "norm" not in name:
            state[name] = state[name].to(torch.bfloat16)
    write_folder(tmp_path, zoo.config | {"dtype": "bfloat16"}, state)
    flattened = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert {one.dtype for one in flattened.parameters()} == {torch.bfloat16}, "without a word"
    with pytest.raises(CkptError, match=r"several dtypes \(\d+ BF16, \d+ F32\)") as caught:
        load_hf_model(tmp_path, "cpu")
    assert caught.value.code == "FC458"
    assert "dtype='bfloat16'" in (caught.value.hint or "")
    loaded = load_paligemma(tmp_path, "cpu", dtype="float32")
    norm = loaded.model.state_dict()["model.language_model.norm.weight"]
    assert torch.equal(norm, zoo.memory["model.language_model.norm.weight"])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "wide", torch.int64])
def test_a_dtype_that_no_model_has(tmp_path: Path, zoo: PaliGemmaZoo, dtype: Any) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    with pytest.raises(CkptError, match="dtype=") as caught:
        load_hf_model(tmp_path, "cpu", dtype=dtype)
    assert caught.value.code == "FC006"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors(tmp_path: Path, zoo: PaliGemmaZoo, dtype: torch.dtype) -> None:
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    state = zoo.layout("L1")
    write_folder(tmp_path, zoo.config, state | {key: state[key].to(dtype)})
    with pytest.raises(CkptError, match="quantised") as caught:
        load_hf_model(tmp_path, "cpu", dtype="float32")
    assert (caught.value.code, caught.value.key) == ("FC459", key)


def test_device_by_name_and_object(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    for device in ("cpu", torch.device("cpu")):
        model, _ = load_hf_model(tmp_path, device)
        assert {one.device.type for one in model.parameters()} == {"cpu"}
        assert {one.device.type for one in model.buffers()} == {"cpu"}


# --- a module from scratch ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["L1", "L4", "L5"])
def test_a_module_written_from_scratch(tmp_path: Path, tied: bool, name: str) -> None:
    zoo = paligemma(layers=LAYERS, tied=tied)
    write_weights(tmp_path, zoo.layout(name))
    model = FromScratch(zoo.config, tied=tied)
    missing = frozenset({"language_model.lm_head.weight"}) if tied else frozenset()
    load_into(model, tmp_path / "model.safetensors", LoadOptions(may_miss=missing))
    torch.testing.assert_close(logits_from_scratch(model, zoo), logits(zoo.model, zoo))


def logits_from_scratch(model: FromScratch, zoo: PaliGemmaZoo) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(zoo))
