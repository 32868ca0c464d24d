"""One step of training, compared with upstream's loop written out and with plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures.make_training_checkpoint import _process_group as one_process
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.training import (
    IGNORED,
    Source,
    mask_labels,
    parameter_groups,
    train_step,
)
from tests import training_support as support
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN

PAD = 1


def upstream_caption_labels(tokens: torch.Tensor) -> torch.Tensor:
    """`train_one_epoch` on pairs: its three assignments."""
    labels = tokens.clone()
    labels[labels == PAD] = -100
    labels[labels == MEDIA_TOKEN] = -100
    return labels


def upstream_page_labels(tokens: torch.Tensor) -> torch.Tensor:
    """`train_one_epoch` on interleaved pages: token by token, as it walks them."""
    labels = tokens.clone()
    labels[labels == PAD] = -100
    for row in labels:
        at = 0
        while at < len(row) and row[at] != MEDIA_TOKEN:
            row[at] = -100
            at += 1
        for end in torch.where(row == EOC_TOKEN)[0].tolist():
            at = end + 1
            while at < len(row) and row[at] != MEDIA_TOKEN:
                row[at] = -100
                at += 1
    labels[labels == MEDIA_TOKEN] = -100
    return labels


texts = st.lists(
    st.lists(st.sampled_from([PAD, 5, 6, MEDIA_TOKEN, EOC_TOKEN]), min_size=9, max_size=9),
    min_size=1,
    max_size=4,
)


@given(texts)
def test_labels_are_upstreams(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    kept = tokens.clone()
    pairs = mask_labels(tokens, media_token_id=MEDIA_TOKEN, pad_token_id=PAD)
    pages = mask_labels(
        tokens, media_token_id=MEDIA_TOKEN, eoc_token_id=EOC_TOKEN, pad_token_id=PAD
    )
    assert torch.equal(pairs, upstream_caption_labels(tokens))
    assert torch.equal(pages, upstream_page_labels(tokens))
    assert torch.equal(tokens, kept)


def test_the_end_of_a_chunk_is_predicted_and_what_follows_is_not() -> None:
    tokens = torch.tensor([[7, MEDIA_TOKEN, 8, 9, EOC_TOKEN, 10, MEDIA_TOKEN, 11, EOC_TOKEN]])
    labels = mask_labels(tokens, media_token_id=MEDIA_TOKEN, eoc_token_id=EOC_TOKEN)
    i = IGNORED
    assert labels.tolist() == [[i, i, 8, 9, EOC_TOKEN, i, i, 11, EOC_TOKEN]]


def test_padding_that_is_also_the_end_of_text_is_told_by_the_mask() -> None:
    tokens = torch.tensor([[MEDIA_TOKEN, 8, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 0]])
    labels = mask_labels(tokens, media_token_id=MEDIA_TOKEN, attention_mask=mask)
    assert labels.tolist() == [[IGNORED, 8, 2, IGNORED]]


FORMS = {
    "float32": {},
    "bf16": {"autocast_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_both_sources_goes_down(form: str, checkpointing: bool) -> None:
    model = support.flamingo(checkpointing=checkpointing)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = support.optimizer(model)
    losses = [support.steps(model, run, range(1), **FORMS[form])[0] for _ in range(5)]
    for name, less in (("captions", 0.1), ("pages", 0.5)):
        assert losses[-1][name] < losses[0][name] - less
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.dtype == torch.float32


def test_checkpointing_changes_no_bit() -> None:
    after = []
    for checkpointing in (False, True):
        model = support.flamingo(checkpointing=checkpointing)
        losses = support.steps(model, support.optimizer(model), range(2))
        after.append((losses, model.perceiver.latents.detach().clone()))
    assert after[0][0] == after[1][0]
    assert torch.equal(after[0][1], after[1][1])


def test_bf16_computes_in_it_and_float32_does_not() -> None:
    losses = []
    for options in FORMS.values():
        model = support.flamingo()
        losses.append(support.steps(model, support.optimizer(model), range(1), **options)[0])
    difference = abs(losses[0]["pages"] - losses[1]["pages"])
    assert 1e-6 < difference < 0.1


def test_one_step_is_upstreams_written_out() -> None:
    """Multipliers, the two rows of the embedding, clipping, AdamW, the schedule."""
    ours, plain = support.flamingo(), support.flamingo()
    run, expected = support.optimizer(ours), support.optimizer(plain)
    for seed in range(3):
        found = train_step(ours, run[0], support.sources(seed), lr_scheduler=run[1])
        for source in support.sources(seed):
            loss = plain(**source.batches[0])[0]
            assert found.losses[source.name] == loss.item()
            (loss * source.loss_multiplier).backward()
        weight = plain.lang_encoder.get_input_embeddings().weight
        mask = torch.zeros_like(weight.grad)
        mask[[MEDIA_TOKEN, EOC_TOKEN]] = 1
        weight.grad = weight.grad * mask
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert found.grad_norm == float(norm)
        assert found.stepped
        expected[0].step()
        expected[1].step()
        expected[0].zero_grad(set_to_none=True)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(one.grad is None for one in ours.parameters())


def changed_rows(model: Any, **options: Any) -> list[int]:
    weight = model.lang_encoder.get_input_embeddings().weight
    before = weight.detach().clone()
    support.steps(model, support.optimizer(model), range(1), **options)
    return sorted(torch.where((weight != before).any(dim=1))[0].tolist())


def test_only_the_rows_of_the_added_tokens_change() -> None:
    assert changed_rows(support.flamingo()) == [EOC_TOKEN, MEDIA_TOKEN]
    assert changed_rows(support.flamingo(), embedding_rows=[5]) in ([], [5])
    assert len(changed_rows(support.flamingo(), embedding_rows="all")) > 10


def test_rows_that_are_not_there_are_refused() -> None:
    """A negative one would be a row from the end."""
    for rows in ([5, 96], [-1]):
        with pytest.raises(CkptError, match=f"has {rows[-1]}, and the rows are 0 to 95") as caught:
            changed_rows(support.flamingo(), embedding_rows=rows)
        assert caught.value.code == "FC464"
    rows = torch.tensor([EOC_TOKEN, MEDIA_TOKEN])
    assert changed_rows(support.flamingo(), embedding_rows=rows) == [EOC_TOKEN, MEDIA_TOKEN]


def test_a_batch_may_have_no_mask() -> None:
    model, batch = support.flamingo(), support.captions()
    source = Source(name="captions", batches=[{**batch, "attention_mask": None}])
    assert train_step(model, support.optimizer(model)[0], [source]).stepped


def test_a_model_of_which_nothing_is_trained_is_refused() -> None:
    model = support.flamingo()
    run = support.optimizer(model)[0]
    model.requires_grad_(False)
    source = Source(name="captions", batches=[support.captions()])
    with pytest.raises(CkptError, match="depends on nothing that is trained") as caught:
        train_step(model, run, [source])
    assert caught.value.code == "FC464"


def test_a_frozen_embedding_needs_no_tokens() -> None:
    model = support.flamingo()
    support.freeze(model, embedding=False)
    model.eoc_token_id = None
    assert changed_rows(model) == []


def test_a_model_that_does_not_know_its_tokens_is_refused() -> None:
    model = support.flamingo()
    model.eoc_token_id = None
    with pytest.raises(CkptError, match=r"tokens of the model are \[94, None\]") as caught:
        changed_rows(model)
    assert caught.value.code == "FC464"


def test_several_batches_of_a_source_are_one_large_one() -> None:
    """Of equal numbers of labels, the mean of the means is the mean."""
    whole = support.pages(0, rows=4)
    halves = [support.part(whole, rank, 2) for rank in range(2)]
    results = []
    for batches in ([whole], halves):
        model = support.flamingo()
        result = train_step(
            model, support.optimizer(model)[0], [Source(name="pages", batches=batches)]
        )
        results.append((result, model.perceiver.latents.detach().clone()))
    (one, first), (two, second) = results
    assert one.losses["pages"] == pytest.approx(two.losses["pages"], rel=1e-5)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)
    assert torch.allclose(first, second, atol=1e-5)


def test_a_gradient_that_is_not_finite_makes_no_step() -> None:
    model = support.flamingo()
    run = support.optimizer(model)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    bad = support.captions()
    bad["vision_x"] = bad["vision_x"] * float("inf")
    result = train_step(
        model, run[0], [Source(name="captions", batches=[bad])], lr_scheduler=run[1]
    )
    assert not result.stepped
    assert result.grad_norm != result.grad_norm
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    assert all(one.grad is None for one in model.parameters())
    assert run[1].last_epoch == 0
    assert run[0].state_dict()["state"] == {}


def test_gradients_are_clipped_to_the_norm_or_left() -> None:
    norms = []
    for most in (None, 0.5):
        model = support.flamingo()
        seen: list[float] = []
        run = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        run.register_step_pre_hook(
            lambda found, *_, seen=seen: seen.append(
                float(
                    torch.nn.utils.get_total_norm(
                        [p.grad for g in found.param_groups for p in g["params"]]
                    )
                )
            )
        )
        result = train_step(model, run, support.sources(), max_grad_norm=most)
        norms.append((result.grad_norm, seen[0]))
    (free, left), (measured, clipped) = norms
    assert free == measured
    assert left == pytest.approx(free, rel=1e-6)
    assert clipped == pytest.approx(0.5, rel=1e-4)


def test_groups_are_upstreams() -> None:
    model = support.flamingo()
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    ids = [{id(one) for one in group["params"]} for group in groups]
    gated = {id(one) for one in model.lang_encoder.gated_cross_attn_layers.parameters()}
    assert ids[0] == gated
    assert ids[0] | ids[1] == {id(one) for one in model.parameters() if one.requires_grad}
    assert not ids[0] & ids[1]


class NoLoss(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def test_what_is_no_step_is_refused() -> None:
    model = NoLoss()
    run = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"x": torch.ones(2)}
    cases = [
        ([], "needs a source"),
        ([Source(name="a", batches=[])], "every source a batch"),
        ([Source(name="a", batches=[batch]), Source(name="a", batches=[batch])], "one name"),
        ([Source(name="a", batches=[batch])], "NoLoss gives no loss"),
    ]
    for given_sources, message in cases:
        with pytest.raises(CkptError, match=message) as caught:
            train_step(model, run, given_sources)
        assert caught.value.code == "FC464"


def test_below_ddp_it_is_the_same_step() -> None:
    plain, wrapped = support.flamingo(), support.flamingo()
    expected = support.steps(plain, support.optimizer(plain), range(2))
    with one_process():
        ddp = torch.nn.parallel.DistributedDataParallel(wrapped)
        assert support.steps(ddp, support.optimizer(ddp), range(2)) == expected
    for (name, a), (_, b) in zip(plain.named_parameters(), wrapped.named_parameters(), strict=True):
        assert torch.equal(a, b), name
