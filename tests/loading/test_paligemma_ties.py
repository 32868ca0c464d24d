"""The output head, which is the embedding or is not, and the tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.paligemma import load_hf_model, load_paligemma
from tests.loading.folders import write_config, write_folder, write_tokenizer
from tests.loading.from_scratch import careless_load
from tests.loading.paligemma_support import from_pretrained, loads, refused
from tests.zoo_paligemma import PaliGemmaZoo, paligemma

LAYERS = 2
HEAD, EMBED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
LAYER = "language_model.model.layers.1."


@pytest.fixture(scope="module")
def zoo() -> PaliGemmaZoo:
    return paligemma(layers=LAYERS)


@pytest.fixture(scope="module")
def untied() -> PaliGemmaZoo:
    return paligemma(layers=LAYERS, tied=False)


# --- f: ties --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["L1", "L2", "L3", "L4", "L5"])
def test_a_head_of_its_own_stays(tmp_path: Path, untied: PaliGemmaZoo, name: str) -> None:
    write_folder(tmp_path, untied.config, untied.layout(name))
    if name == "L1":
        careless = careless_load(tmp_path).state_dict()
        assert torch.equal(careless[HEAD], careless[EMBED]), "the head was trained, and is lost"
    model, _ = load_hf_model(tmp_path, "cpu")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, untied.memory["lm_head.weight"])
    assert model.config.tie_word_embeddings is False
    assert model.config.get_text_config().tie_word_embeddings is False
    loads(tmp_path, untied)


def test_a_trained_head_in_a_tied_config(tmp_path: Path, untied: PaliGemmaZoo) -> None:
    text = untied.config["text_config"] | {"tie_word_embeddings": True}
    config = untied.config | {"tie_word_embeddings": True, "text_config": text}
    error = refused(write_folder(tmp_path, config, untied.layout("L1")))
    assert error.code == "FC457"
    assert HEAD in error.message
    assert EMBED in error.message
    assert "`text_config.tie_word_embeddings`" in error.message
    for part in (config, text):
        del part["tie_word_embeddings"]
    write_config(tmp_path, config)
    assert "true by default" in refused(tmp_path).message


def test_no_head_in_an_untied_config(tmp_path: Path, untied: PaliGemmaZoo) -> None:
    state = untied.layout("L1", head=False)
    write_folder(tmp_path, untied.config, state)
    model, info = from_pretrained(tmp_path)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert 0.01 < float(model.lm_head.weight.detach().std()) < 0.03, "random"
    error = refused(tmp_path)
    assert error.code == "FC457"
    assert "`tie_word_embeddings`" in error.message


@pytest.mark.parametrize("name", ["L1", "L2", "L3", "L4", "L5"])
def test_both_names_of_one_tensor(tmp_path: Path, zoo: PaliGemmaZoo, name: str) -> None:
    state = {key: tensor.clone() for key, tensor in zoo.layout(name, head=True).items()}
    write_folder(tmp_path, zoo.config, state)
    loaded = load_paligemma(tmp_path, "cpu")
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    (note,) = [one for one in loaded.report.findings if one.code == "FC210"]
    assert "bit for bit" in note.detail


def test_one_bit_makes_two_tensors(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    state = {key: tensor.clone() for key, tensor in zoo.layout("L1", head=True).items()}
    state[HEAD][-1, -1] = -0.0  # equal as a number to the zero of the padding
    assert torch.equal(state[HEAD], state[EMBED])
    assert refused(write_folder(tmp_path, zoo.config, state)).code == "FC457"


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["L1", "L2", "L3", "L4", "L5"])
def test_only_the_head_is_stored(tmp_path: Path, zoo: PaliGemmaZoo, name: str, prefix: str) -> None:
    state = zoo.layout(name, head=True)
    del state[next(key for key in state if key.endswith("embed_tokens.weight"))]
    state = {prefix + key: tensor for key, tensor in state.items()}
    loaded = load_paligemma(write_folder(tmp_path, zoo.config, state), "cpu")
    loads(tmp_path, zoo)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert [one.code for one in loaded.report.findings] == ["FC210"]


def test_a_shared_head_in_a_torch_file(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    torch.save(zoo.layout("L4", head=True), tmp_path / "pytorch_model.bin")
    loads(tmp_path, zoo)


# --- the tokenizer, and folders that are none -----------------------------------------------------


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


def _larger_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"new{at}": at for at in range(193, 400)}
    path.write_text(json.dumps(content))


def _tokenizer_with_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('evil-ran', 'w')\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_tokenizer, "no tokenizer"),
        (_broken_tokenizer, "cannot be read"),
        (_larger_tokenizer, "400 tokens, and the vocabulary 256 rows"),
    ],
)
def test_a_tokenizer_that_does_not_serve(
    tmp_path: Path, zoo: PaliGemmaZoo, spoil: Callable[[Path], None], words: str
) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    spoil(tmp_path)
    error = refused(tmp_path)
    assert error.code == "FC456"
    assert words in error.message


def test_a_tokenizers_code_is_not_run(
    tmp_path: Path, zoo: PaliGemmaZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    _tokenizer_with_code(tmp_path)
    with contextlib.suppress(CkptError):
        load_hf_model(tmp_path, "cpu")
    assert not (tmp_path / "evil-ran").exists()


def test_a_class_that_pads_left_whatever_it_is_told(
    tmp_path: Path, zoo: PaliGemmaZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    real = transformers.AutoTokenizer.from_pretrained

    def stubborn(*args: Any, **options: Any) -> Any:
        tokenizer = real(*args, **options)
        tokenizer.padding_side = "left"
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stubborn)
    error = refused(tmp_path)
    assert (error.code, "pads left" in error.message) == ("FC456", True)


def test_no_picture_token_anywhere(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    config = {k: v for k, v in zoo.config.items() if k != "image_token_index"}
    write_folder(tmp_path, config, zoo.layout("L1"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("<image>", "<other>"))
    error = refused(tmp_path)
    assert (error.code, "image_token_index" in error.message) == ("FC401", True)
