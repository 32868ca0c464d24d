"""One step of training a Flamingo, and the labels for it; where batches come from is elsewhere.

The step is that of OpenFlamingo's training (open_flamingo 2.0.1, `train_utils.py`): several sources
of data, each with a multiplier of its loss; gradients of the input embedding for the added tokens
only; gradients clipped by their norm. Otherwise than there, a step whose gradient is not finite is
left out on every process alike, and gradients are clipped once, when all batches have added theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError

if TYPE_CHECKING:
    import torch
    from torch import nn

#: What a loss does not look at, in torch and in transformers.
IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What one source of data gives for a step.

    Attributes:
        name: what its loss is called.
        batches: each the arguments of the model: `vision_x [B, T_img, F, C, H, W]`, and
            `lang_x`, `attention_mask`, `labels`, all `[B, T]`, or None where the model takes it.
            Of several, the loss is the mean: gradients are accumulated.
        loss_multiplier: how much its loss counts.
    """

    name: str
    batches: Sequence[Mapping[str, torch.Tensor | None]]
    loss_multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did.

    Attributes:
        losses: of each source, before its multiplier, on this process.
        grad_norm: of all gradients together, before they were clipped, over all processes.
        stepped: whether the optimizer made its step; it does not where the norm is not finite.
    """

    losses: Mapping[str, float]
    grad_norm: float
    stepped: bool


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sources: Sequence[Source],
    *,
    lr_scheduler: Any = None,
    autocast_dtype: torch.dtype | None = None,
    max_grad_norm: float | None = 1.0,
    embedding_rows: str | Sequence[int] = "added",
) -> StepResult:
    """Forward and backward over every batch of every source, and one step of the optimizer.

    Args:
        model: a Flamingo, or what wraps it for parallel training.
        optimizer: over what is trained.
        sources: the data of this step; batches are moved to where the model is.
        lr_scheduler: makes its step after the optimizer's.
        autocast_dtype: `torch.bfloat16` computes in it where that is safe, with weights as they
            are; None computes in their own dtype.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        embedding_rows: which rows of a trained input embedding may change: `added`, those of the
            model's media and end-of-chunk tokens, `all`, or their ids. Rows are held by their
            gradient, so an optimizer with weight decay for the embedding would still move them.

    Raises:
        CkptError: FC464 where there is no batch, two sources have one name, a model gives no loss
            or one that nothing trained has a part in, `embedding_rows` names rows that are not
            there, or `added` is asked of a model that does not know its tokens.
    """
    import torch

    _check_sources(sources)
    rows = _rows(model, embedding_rows)
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    losses: dict[str, float] = {}
    for source in sources:
        total = torch.zeros((), device=device)
        for batch in source.batches:
            # What autocast keeps of the weights is freed with the block, before they can change.
            with _autocast(device, autocast_dtype):
                loss = _loss(model, _moved(batch, device))
            share: Any = loss / len(source.batches)
            (share * source.loss_multiplier).backward()
            total += share.detach()
        losses[source.name] = float(total)
    if rows is not None:
        _keep_rows(_embedding(model), rows)
    norm = _clip([one for one in model.parameters() if one.grad is not None], max_grad_norm)
    stepped = math.isfinite(norm)
    if stepped:
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(losses=losses, grad_norm=norm, stepped=stepped)


def mask_labels(
    lang_x: torch.Tensor,
    *,
    media_token_id: int,
    eoc_token_id: int | None = None,
    pad_token_id: int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Labels for the loss: the tokens themselves, and `IGNORED` where none is to be predicted.

    Padding and media tokens never are. With `eoc_token_id` the rule is the one for interleaved
    pages: only what follows an image counts, up to and with the end of its chunk; text before the
    first image and between a chunk and the next image does not. Without it, all text counts, as for
    pairs of an image and its caption.

    Args:
        lang_x: token ids `[batch, tokens]`.
        media_token_id: the token that stands for an image.
        eoc_token_id: the token that ends a chunk, for interleaved pages.
        pad_token_id: the token of padding, where it is a token of its own.
        attention_mask: `[batch, tokens]`, 0 at padding; for tokenizers whose padding is also the
            end of a text.

    Returns:
        `[batch, tokens]`, a new tensor.

    >>> import torch
    >>> page = torch.tensor([[7, 99, 8, 98, 9]])
    >>> mask_labels(page, media_token_id=99, eoc_token_id=98).tolist()
    [[-100, -100, 8, 98, -100]]
    """
    ignored = lang_x == media_token_id
    if pad_token_id is not None:
        ignored = ignored | (lang_x == pad_token_id)
    if attention_mask is not None:
        ignored = ignored | (attention_mask == 0)
    if eoc_token_id is not None:
        ignored = ignored | ~_in_chunk(lang_x, media_token_id, eoc_token_id)
    return lang_x.masked_fill(ignored, IGNORED)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained in upstream's two groups: with weight decay, and without.

    Decay is for the gated cross-attention alone; an embedding of which only some rows are trained
    must have none.
    """
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    with_decay = [one for name, one in trained if "gated_cross_attn" in name]
    without = [one for name, one in trained if "gated_cross_attn" not in name]
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]


def _in_chunk(lang_x: torch.Tensor, media: int, eoc: int) -> torch.Tensor:
    """Whether the last image up to a token comes after the last end of a chunk before it."""
    import torch

    places = torch.arange(1, lang_x.shape[1] + 1, device=lang_x.device).expand_as(lang_x)
    last_image = torch.where(lang_x == media, places, 0).cummax(dim=1).values
    last_end = torch.where(lang_x == eoc, places, 0).cummax(dim=1).values
    before = torch.nn.functional.pad(last_end[:, :-1], (1, 0))
    return last_image > before


def _check_sources(sources: Sequence[Source]) -> None:
    names = [source.name for source in sources]
    if not sources or not all(source.batches for source in sources):
        raise _refused("a step needs a source, and every source a batch")
    if len(set(names)) != len(names):
        raise _refused(
            f"two sources have one name: {names}",
            "several batches of one source are its `batches`: their gradients are accumulated",
        )


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    import torch

    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: None if part is None else part.to(device) for key, part in batch.items()}


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    import torch

    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        raise _refused(f"the {type(model).__name__} gives no loss", "put `labels` into every batch")
    if not loss.requires_grad:
        raise _refused(
            "the loss depends on nothing that is trained",
            "let a parameter of the model require a gradient",
        )
    return loss


def _flamingo(model: nn.Module) -> Any:
    """The module that knows the language model, below wrappers for parallel training."""
    inner: Any = model
    while not hasattr(inner, "lang_encoder"):
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            return None
    return inner


def _embedding(model: nn.Module) -> Any:
    flamingo = _flamingo(model)
    return None if flamingo is None else flamingo.lang_encoder.get_input_embeddings().weight


def _rows(model: nn.Module, wanted: str | Sequence[int]) -> list[int] | None:
    """Ids of the rows that may change; None where all may, or none is trained."""
    weight = _embedding(model)
    if weight is None or not weight.requires_grad or wanted == "all":
        return None
    if not isinstance(wanted, str):
        return _checked_rows(wanted, int(weight.shape[0]))
    flamingo = _flamingo(model)
    rows = [getattr(flamingo, name, None) for name in ("media_token_id", "eoc_token_id")]
    if wanted != "added" or None in rows:
        raise _refused(
            f"`embedding_rows` is {wanted!r}, and the tokens of the model are {rows}",
            "give the ids of the added tokens, or 'all'",
        )
    return [int(row) for row in rows if row is not None]


def _checked_rows(wanted: Sequence[int], num_rows: int) -> list[int]:
    rows = [int(row) for row in wanted]
    strange = [row for row in rows if not 0 <= row < num_rows]
    if strange:
        raise _refused(f"`embedding_rows` has {strange[0]}, and the rows are 0 to {num_rows - 1}")
    return rows


def _keep_rows(weight: Any, rows: Sequence[int]) -> None:
    """Zero the gradient of every other row, also where this process has only some of the rows."""
    import torch

    if weight.grad is None:
        return
    frozen = torch.ones(weight.shape[0], 1, dtype=torch.bool)
    frozen[list(rows)] = False
    gradient = weight.grad
    frozen = frozen.to(gradient.device)
    if hasattr(gradient, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        split: Any = distribute_tensor(
            frozen.expand(gradient.shape).contiguous(),
            gradient.device_mesh,
            gradient.placements,
            src_data_rank=None,
        )
        gradient, frozen = gradient.to_local(), split.to_local()
    gradient.masked_fill_(frozen, 0)


def _clip(parameters: Sequence[torch.Tensor], max_norm: float | None) -> float:
    """The norm of all gradients; they are scaled down to `max_norm`."""
    import torch
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    norm: Any = get_total_norm([one.grad for one in parameters if one.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if max_norm is not None and bool(torch.isfinite(norm)):
        clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _refused(message: str, hint: str | None = None) -> CkptError:
    return CkptError(message, code="FC464", hint=hint)
