"""A tiny Flamingo that can be trained in a moment, and batches for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from flamingo_ckpt.training import Source, mask_labels, parameter_groups, train_step
from tests import zoo
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN
from tests.zoo_lms import WORDS, seeded

Batch = dict[str, torch.Tensor]
#: Of the zoo's models: small, with a gated block before every decoder layer.
OPTIONS = {"layers": 2, "every_n": 1, "perceiver_depth": 2}


def flamingo(family: str = "llama", *, device: str = "cpu", checkpointing: bool = False) -> Any:
    """Ours, with the weights of the zoo's upstream model, frozen as upstream freezes."""
    source = zoo.openflamingo(family, **OPTIONS)
    model: Any = build(parse_config(source.config, "the zoo"), device=device)
    if device != "meta":
        model.load_state_dict(source.full)
    model.media_token_id, model.eoc_token_id = MEDIA_TOKEN, EOC_TOKEN
    freeze(model)
    if checkpointing:
        model.use_gradient_checkpointing()
    return model.train()


def freeze(model: Any, *, embedding: bool = True) -> None:
    """Upstream's freezing rule."""
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(embedding)


def captions(seed: int = 0, rows: int = 2) -> Batch:
    """One picture and a caption in each row, of one length."""
    with seeded(seed):
        tokens = torch.randint(3, WORDS, (rows, 8))
        pictures = torch.randn(rows, 1, 1, 3, 32, 32)
    tokens[:, 0], tokens[:, -1] = MEDIA_TOKEN, EOC_TOKEN
    labels = mask_labels(tokens, media_token_id=MEDIA_TOKEN)
    return {
        "vision_x": pictures,
        "lang_x": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
    }


def pages(seed: int = 0, rows: int = 2) -> Batch:
    """Two pictures in each row, with text before, between and after."""
    with seeded(seed + 1000):
        tokens = torch.randint(3, WORDS, (rows, 14))
        pictures = torch.randn(rows, 2, 1, 3, 32, 32)
    tokens[:, [2, 9]], tokens[:, [6, 12]] = MEDIA_TOKEN, EOC_TOKEN
    labels = mask_labels(tokens, media_token_id=MEDIA_TOKEN, eoc_token_id=EOC_TOKEN)
    return {
        "vision_x": pictures,
        "lang_x": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
    }


def part(batch: Mapping[str, torch.Tensor], rank: int, size: int) -> Batch:
    """The rows of one process."""
    return {name: tensor.chunk(size)[rank] for name, tensor in batch.items()}


def sources(seed: int = 0, rank: int = 0, size: int = 1) -> list[Source]:
    """Two sources with multipliers, as upstream's two data sets."""
    return [
        Source(name="captions", batches=[part(captions(seed), rank, size)], loss_multiplier=0.2),
        Source(name="pages", batches=[part(pages(seed), rank, size)], loss_multiplier=1.0),
    ]


def optimizer(model: Any, lr: float = 1e-3) -> tuple[Any, Any]:
    """AdamW in upstream's groups, with a warm-up."""
    found = torch.optim.AdamW(parameter_groups(model, 0.1), lr=lr)
    return found, torch.optim.lr_scheduler.LambdaLR(found, lambda step: min(1.0, (step + 1) / 3))


def steps(model: Any, run: tuple[Any, Any], seeds: range, **options: Any) -> list[dict[str, float]]:
    """Several steps; the losses of each."""
    found, scheduler = run
    return [
        dict(train_step(model, found, sources(seed), lr_scheduler=scheduler, **options).losses)
        for seed in seeds
    ]
