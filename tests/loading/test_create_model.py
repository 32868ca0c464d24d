"""`create_model_and_transforms`: from local files and from a hub, against upstream's own."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_ckpt.loading.flamingo import create_model_and_transforms, load_flamingo_tokenizer
from flamingo_ckpt.loading.language import resize_rows
from flamingo_ckpt.loading.places import Access
from flamingo_ckpt.loading.pretrained import load_pretrained
from tests import zoo
from tests.hub_server import HubServer, serving
from tests.loading.flamingo_files import (
    create,
    refused,
    save_parts,
    save_tokenizer,
)
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN
from tests.zoo_lms import LANG_DIM, WORDS, language_model

_PLACES = (
    "clip_vision_encoder_path",
    "clip_vision_encoder_pretrained",
    "lang_encoder_path",
    "tokenizer_path",
)
each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as hub:
        yield hub


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise)


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


def test_a_language_model_that_transformers_does_not_know_is_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on the hub: the tokenizer lies beside the config of MPT-1B."""
    import logging

    path = save_tokenizer(tmp_path / "lm")
    (path / "config.json").write_text('{"model_type": "mosaic_gpt", "d_model": 48}')
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        load_flamingo_tokenizer(str(path), Access())
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_a_tokenizer_that_ends_every_text(tmp_path: Path) -> None:
    """Upstream takes the last token of `encode("<image>")`, which here is the end of the text."""
    from tokenizers import Tokenizer, processors

    parts = save_parts("llama", tmp_path)
    path = Path(parts["tokenizer_path"]) / "tokenizer.json"
    inner = Tokenizer.from_file(str(path))
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    inner.save(str(path))
    model, _, tokenizer = create_model_and_transforms(**parts)
    assert tokenizer.encode("<image>") == [MEDIA_TOKEN, 1]
    assert (model.media_token_id, model.eoc_token_id) == (MEDIA_TOKEN, EOC_TOKEN)


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


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "flash"},
        {"force_quick_gelu": "no"},
        {"max_num_frames": 0},
        {"max_num_frames": True},
        {"vis_dim": "1024"},
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict[str, Any]) -> None:
    nowhere = dict.fromkeys(_PLACES, "/nowhere/at/all")
    with pytest.raises(TypeError, match=f"`{next(iter(options))}` is "):
        create(nowhere, **options)


def test_places_may_be_path_objects(tmp_path: Path) -> None:
    parts: dict[str, Any] = save_parts("llama", tmp_path)
    wanted = create(parts).state_dict()
    paths = {name: Path(parts[name]) for name in _PLACES if parts[name]}
    found = create(parts | paths).state_dict()
    frozen = [name for name in wanted if name.startswith(("vision_encoder", "lang_encoder.model"))]
    assert all(torch.equal(found[name], wanted[name]) for name in frozen if "gated" not in name)
