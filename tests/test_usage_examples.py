"""The examples of the four systems that the loaders come from, as their users write them.

Local paths and a hub on this machine stand where theirs name the real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import zoo
from tests.hub_server import HubServer, serving
from tests.loading.flamingo_files import named_clip, save_parts
from tests.loading.folders import write_folder
from tests.zoo_clip import open_clip_cfg

EVERY = 2
FAMILIES = ["mpt1b", "mpt7b", "gpt_neox", "llama", "opt"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as hub:
        yield hub


def pictures() -> list[Image.Image]:
    """Two demonstrations and a query, of three sizes."""
    random = np.random.default_rng(0)
    shapes = [(40, 60, 3), (32, 32, 3), (64, 48, 3)]
    return [Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]


# --- OpenFlamingo: create, download, load partially, generate -------------------------------------


def publish(family: str, server: HubServer, folder: Path) -> None:
    """A CLIP, a language model with its tokenizer, and a checkpoint, each in its repository."""
    parts = save_parts(family, folder)
    server.push_folder("timm/vit_tiny.openai", Path(parts["clip_vision_encoder_path"]))
    lang = Path(parts["lang_encoder_path"])
    for file in Path(parts["tokenizer_path"]).iterdir():
        (lang / file.name).write_bytes(file.read_bytes())
    server.push_folder("someone/lm", lang)
    trained = zoo.openflamingo(family, every_n=EVERY).partial
    path = zoo.save_torch(trained, folder / "checkpoint.pt")
    server.push("openflamingo/OpenFlamingo-Tiny", {"checkpoint.pt": path.read_bytes()})


def few_shot(model: Any, image_processor: Any, tokenizer: Any) -> tuple[str, Any, Any]:
    """The example of OpenFlamingo's README from its step 2 on."""
    demo_image_one, demo_image_two, query_image = pictures()
    vision_x = [
        image_processor(demo_image_one).unsqueeze(0),
        image_processor(demo_image_two).unsqueeze(0),
        image_processor(query_image).unsqueeze(0),
    ]
    vision_x = torch.cat(vision_x, dim=0)
    vision_x = vision_x.unsqueeze(1).unsqueeze(0)
    assert vision_x.shape == (1, 3, 1, 3, 32, 32)

    tokenizer.padding_side = "left"
    lang_x = tokenizer(
        [
            "<image>An image of two cats.<|endofchunk|><image>An image of a bathroom sink."
            "<|endofchunk|><image>An image of"
        ],
        return_tensors="pt",
    )
    generated_text = model.generate(
        vision_x=vision_x,
        lang_x=lang_x["input_ids"],
        attention_mask=lang_x["attention_mask"],
        max_new_tokens=20,
        num_beams=3,
    )
    return tokenizer.decode(generated_text[0]), generated_text, lang_x["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_openflamingo(
    family: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = {"hf_hub": "timm/vit_tiny.openai/", "quick_gelu": True}
    clip = named_clip(monkeypatch, {"openai": tag})
    publish(family, server, tmp_path)

    from flamingo_ckpt import create_model_and_transforms, load_pretrained

    model, image_processor, tokenizer = create_model_and_transforms(
        clip_vision_encoder_path=clip,
        clip_vision_encoder_pretrained="openai",
        lang_encoder_path="someone/lm",
        tokenizer_path="someone/lm",
        cross_attn_every_n_layers=EVERY,
        cache_dir=str(tmp_path / "cache"),
    )
    load_pretrained(model, "openflamingo/OpenFlamingo-Tiny", cache_dir=tmp_path / "cache")
    text, generated, prompt = few_shot(model, image_processor, tokenizer)
    assert text.startswith("<image> An image of two cats")
    assert torch.equal(generated[:, : prompt.shape[1]], prompt)
    assert prompt.shape[1] < generated.shape[1] <= prompt.shape[1] + 20

    # and the pictures are looked at
    vision_x = torch.stack([image_processor(one) for one in pictures()])[None, :, None]
    with torch.no_grad():
        seen = model(vision_x, prompt).logits
        other = model(vision_x.flip(1), prompt).logits
    assert (seen - other).abs().max() > 1e-4


def test_openflamingo_in_two_steps(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Download first, as its README does; everything else from local paths, offline."""
    from huggingface_hub import hf_hub_download

    from flamingo_ckpt import create_model_and_transforms, load_pretrained

    parts = save_parts("opt", tmp_path)
    publish("opt", server, tmp_path / "published")
    checkpoint_path = hf_hub_download(
        "openflamingo/OpenFlamingo-Tiny",
        "checkpoint.pt",
        cache_dir=tmp_path / "cache",
        endpoint=server.endpoint,
    )
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, image_processor, tokenizer = create_model_and_transforms(
        **parts, cross_attn_every_n_layers=EVERY, use_local_files=True
    )
    assert load_pretrained(model, checkpoint_path, device="cpu").num_loaded > 90
    text, _, _ = few_shot(model, image_processor, tokenizer)
    assert "An image of two cats" in text
    assert server.requests == []


def test_the_loaders_are_found_without_torch() -> None:
    """The names are there at once, and what they need is imported when they are taken."""
    script = (
        "import sys, flamingo_ckpt\n"
        "names = {'create_model_and_transforms', 'load_pretrained', 'load_checkpoint',"
        " 'load_hf_model', 'save_checkpoint'}\n"
        "assert names <= set(dir(flamingo_ckpt)), dir(flamingo_ckpt)\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from flamingo_ckpt import create_model_and_transforms, load_pretrained\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


# --- PaliGemma from scratch: one function ---------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_paligemma(shards: int, tmp_path: Path) -> None:
    made = zoo.paligemma(version=1)
    write_folder(tmp_path, made.config, made.layout("L1"), shards=shards)

    from flamingo_ckpt import load_hf_model

    model_path, device = str(tmp_path), "cpu"
    model, tokenizer = load_hf_model(model_path, device)
    model = model.to(device).eval()
    assert tokenizer.padding_side == "right"
    inputs = zoo.paligemma_inputs(made)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, made.model(**inputs).logits)


# --- open_clip: load anything into a CLIP ---------------------------------------------------------


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "clip.pt", "clip.safetensors"])
def test_open_clip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    made = zoo.clip()
    if name.endswith(".safetensors"):
        path = zoo.save_safetensors(made.hf, tmp_path / name)  # transformers' names
    else:
        path = zoo.save_torch(
            made.open_clip, tmp_path / name, wrapper="state_dict", prefix="module."
        )
    from open_clip import factory

    from flamingo_ckpt import load_checkpoint

    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-Tiny-8", open_clip_cfg(4))
    model = open_clip.create_model("ViT-Tiny-8")
    incompatible_keys = load_checkpoint(model, str(path), strict=True)
    assert str(incompatible_keys) == "<All keys matched successfully>"
    missing, unexpected = load_checkpoint(model, path, strict=False, weights_only=False)
    assert not missing
    assert not unexpected
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        wanted = made.open_clip_model.encode_image(image)
        assert torch.equal(model.eval().encode_image(image), wanted)


def test_open_clip_from_big_vision(tmp_path: Path) -> None:
    made = zoo.siglip()
    path = zoo.save_npz(made.npz(), tmp_path / "siglip.npz")

    import copy

    from flamingo_ckpt import load_checkpoint

    model = copy.deepcopy(made.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    missing, unexpected = load_checkpoint(model, path)
    assert not missing
    assert not unexpected
    for found, wanted in zip(model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(found, wanted)


# --- the Hub's conversion of .bin to safetensors --------------------------------------------------


def test_bin_to_safetensors(tmp_path: Path) -> None:
    """Load, drop duplicate names, save, reload, compare."""
    from safetensors.torch import load_file

    made = zoo.openflamingo("opt")
    source = tmp_path / "release"
    state = dict(made.language)
    assert state["lm_head.weight"] is not None  # the embedding under a second name
    zoo.save_torch(state, source / "pytorch_model.bin")
    command = [sys.executable, "-m", "flamingo_ckpt", "convert", str(source), str(tmp_path / "st")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "st" / "model.safetensors")
    assert set(state) - set(found) in ({"lm_head.weight"}, {"model.decoder.embed_tokens.weight"})
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
