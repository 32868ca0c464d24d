"""A Flamingo made into something else, and asked for likelihoods, as its users write it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import zoo
from tests.loading.flamingo_files import save_parts
from tests.loading.folders import write_folder

REGIONS, VOXELS, WIDTH = 7, 50, 20


class BrainEncoder(torch.nn.Module):
    """`[n, regions, voxels]` to `[n, regions, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(VOXELS, WIDTH)

    def forward(self, scans: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.proj(scans)
        return found


def adapted(parts: dict[str, str], seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A Flamingo that looks at brains; `<image>` marks the place of a scan."""
    from flamingo_ckpt import create_model_and_transforms

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _, tokenizer = create_model_and_transforms(
            **parts, cross_attn_every_n_layers=2, vis_dim=WIDTH, **options
        )
        model.vision_encoder = BrainEncoder()
    return model, tokenizer


def batch_of(tokenizer: Any, text: str, frames: int, seed: int = 0) -> dict[str, torch.Tensor]:
    from flamingo_ckpt.training import mask_labels

    lang_x = tokenizer([text], return_tensors="pt")["input_ids"]
    media = tokenizer.convert_tokens_to_ids("<image>")
    number = int((lang_x == media).sum())
    generator = torch.Generator().manual_seed(seed)
    return {
        "vision_x": torch.randn(1, number, frames, REGIONS, VOXELS, generator=generator),
        "lang_x": lang_x,
        "attention_mask": torch.ones_like(lang_x),
        "labels": mask_labels(lang_x, media_token_id=media),
    }


@pytest.mark.parametrize(("frames", "is_trained"), [(1, True), (1, False), (3, True)])
def test_a_brain_encoder_in_place_of_clip(frames: int, is_trained: bool, tmp_path: Path) -> None:
    """Create, replace, train on two sources with checkpointing, save, load into another, speak."""
    from flamingo_ckpt import load_pretrained, save_checkpoint
    from flamingo_ckpt.training import Source, parameter_groups, train_step

    parts = save_parts("llama", tmp_path)
    options: dict[str, Any] = {"gradient_checkpointing": True}
    if frames > 1:
        options["max_num_frames"] = frames
    model, tokenizer = adapted(parts, **options)
    model.vision_encoder.requires_grad_(is_trained)
    before = copy.deepcopy(model.vision_encoder.state_dict())
    one = batch_of(tokenizer, "<image>An image of two cats.<|endofchunk|>", frames)
    two = batch_of(tokenizer, "<image>a bathroom<|endofchunk|><image>sink.<|endofchunk|>", frames)
    sources = [
        Source(name="captions", batches=[one], loss_multiplier=0.2),
        Source(name="pages", batches=[two], loss_multiplier=1.0),
    ]
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    model.train()
    losses = [train_step(model, optimizer, sources).losses for _ in range(8)]
    assert all(losses[-1][name] < losses[0][name] for name in ("captions", "pages"))
    after = model.vision_encoder.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after) is is_trained

    save_checkpoint(model, tmp_path / "checkpoint.pt")
    other, _ = adapted(parts, seed=1, **options)
    if not is_trained:  # then it has its own weights, as CLIP has
        other.vision_encoder.load_state_dict(before)
        other.vision_encoder.requires_grad_(False)
    report = load_pretrained(other, tmp_path / "checkpoint.pt")
    assert ("vision" in report.absent_by_design.values()) is not is_trained
    wanted, found = model.state_dict(), other.state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    prompt = {name: one[name] for name in ("vision_x", "lang_x", "attention_mask")}
    asked = {"max_new_tokens": 3, "do_sample": False}
    words = model.eval().generate(**prompt, **asked)
    assert torch.equal(other.generate(**prompt, **asked), words)
    with torch.no_grad():
        seen = model(**prompt).logits
        blind = model(**{**prompt, "vision_x": -prompt["vision_x"]}).logits
    assert (seen - blind).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["mpt1b", "mpt7b", "gpt_neox", "llama", "opt"])
def test_the_likelihood_of_several_endings(family: str, tmp_path: Path) -> None:
    """As upstream's evaluation ranks classes: pictures and prompt are computed once."""
    from flamingo_ckpt import create_model_and_transforms, load_pretrained

    model, image_processor, tokenizer = create_model_and_transforms(
        **save_parts(family, tmp_path), cross_attn_every_n_layers=2
    )
    released = zoo.save_torch(zoo.openflamingo(family).partial, tmp_path / "checkpoint.pt")
    load_pretrained(model, released)
    assert callable(image_processor)
    vision_x = torch.randn(1, 2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = "<image>An image of two cats.<|endofchunk|><image>An image of"
    context = tokenizer([text], return_tensors="pt")
    endings = [tokenizer(one, return_tensors="pt")["input_ids"] for one in ("sink", "a bathroom")]
    assert [one.shape[1] for one in endings] == [1, 2]

    found, wanted = [], []
    with torch.inference_mode():
        model.cache_media(input_ids=context["input_ids"], vision_x=vision_x)
        start = model(
            vision_x=None,
            lang_x=context["input_ids"],
            attention_mask=context["attention_mask"],
            clear_conditioned_layers=False,
            use_cache=True,
        )
        for ending in endings:
            mask = torch.ones(1, context["input_ids"].shape[1] + ending.shape[1])
            logits = model(
                vision_x=None,
                lang_x=ending,
                attention_mask=mask,
                clear_conditioned_layers=False,
                past_key_values=copy.deepcopy(start.past_key_values),
                use_cache=True,
            ).logits
            logits = torch.cat((start.logits[:, -1:], logits[:, :-1]), dim=1)
            found.append(likelihood(logits, ending))
        model.uncache_media()
        for ending in endings:
            whole = torch.cat((context["input_ids"], ending), dim=1)
            logits = model(vision_x, whole, torch.ones_like(whole)).logits
            wanted.append(likelihood(logits[:, -ending.shape[1] - 1 : -1], ending))
            blind = model(-vision_x, whole, torch.ones_like(whole)).logits
            assert (blind - logits).abs().max() > 1e-3
    assert torch.allclose(torch.stack(found), torch.stack(wanted), atol=1e-4)
    assert (found[0] - found[1]).abs() > 1e-3


def likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).sum()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clip_not_strict(suffix: str, tmp_path: Path) -> None:
    """One tower into a whole CLIP: the other stays, and is told."""
    from flamingo_ckpt import load_checkpoint

    made = zoo.clip()
    tower = {n: t for n, t in made.open_clip.items() if n.startswith("visual.")}
    save = zoo.save_torch if suffix == ".pt" else zoo.save_safetensors
    path = save(tower, tmp_path / f"tower{suffix}")
    model = copy.deepcopy(made.open_clip_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="missing"):
        load_checkpoint(model, str(path), strict=True)
    missing, unexpected = load_checkpoint(model, str(path), strict=False)
    after = model.state_dict()
    assert not unexpected
    assert set(missing) == set(after) - set(tower)
    assert all(torch.equal(after[name], tower.get(name, before[name])) for name in after)


def test_paligemma_from_bin_by_way_of_the_converter(tmp_path: Path) -> None:
    """`.bin` has to be converted first; the head that is the embedding is dropped, and told."""
    made = zoo.paligemma(version=1)
    state = made.layout("L1")
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    write_folder(tmp_path / "bin", made.config, {}, shards=1)
    for file in (tmp_path / "bin").glob("*.safetensors*"):
        file.unlink()
    zoo.save_torch(state, tmp_path / "bin" / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-m", "flamingo_ckpt", "convert", tmp_path / "bin", tmp_path / "st"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "language_model.lm_head.weight" in done.stdout + done.stderr

    from flamingo_ckpt import load_hf_model

    model, tokenizer = load_hf_model(str(tmp_path / "st"), "cpu")
    assert tokenizer.padding_side == "right"
    inputs = zoo.paligemma_inputs(made)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, made.model(**inputs).logits)
