"""MosaicGPT against an implementation of its own that knows no cache and no kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.models.modules.mosaic_gpt import MosaicGPT, MosaicGPTConfig, mosaic_config
from tests.zoo_lms import language_model, seeded


def pair(kernel: str = "eager") -> tuple[Any, MosaicGPT]:
    """(the zoo's, ours), with equal weights, in float64."""
    with seeded(0):
        oracle = language_model("mpt1b", 3).double().eval()
    config = mosaic_config(oracle.config.to_dict())
    config._attn_implementation = kernel
    model = MosaicGPT(config).double().eval()
    model.load_state_dict(oracle.state_dict())
    return oracle, model


def tokens(number: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 90, (2, number), generator=generator)


@pytest.mark.parametrize("padded", [slice(0, 0), slice(-2, None), slice(0, 3)])
def test_logits_bit_for_bit(padded: slice) -> None:
    oracle, model = pair()
    mask = torch.ones_like(tokens())
    mask[0, padded] = 0
    with torch.no_grad():
        wanted = oracle(tokens(), attention_mask=mask).logits
        assert torch.equal(model(tokens(), attention_mask=mask, use_cache=False).logits, wanted)
        fused = pair("sdpa")[1](tokens(), attention_mask=mask, use_cache=False).logits
    assert 0 < float((fused - wanted).abs().max()) < 1e-13


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("pieces", [[4, 5], [1] * 9, [3, 1, 5]])
def test_a_cache_changes_rounding_only(kernel: str, pieces: list[int]) -> None:
    model = pair(kernel)[1]
    mask = torch.ones_like(tokens())
    mask[0, :2] = 0
    cache, found, read = None, [], 0
    with torch.no_grad():
        wanted = model(tokens(), attention_mask=mask).logits
        for piece in tokens().split(pieces, dim=1):
            read += piece.shape[1]
            output = model(piece, mask[:, :read], past_key_values=cache)
            cache = output.past_key_values
            found.append(output.logits)
    # what stands at padding means nothing: nothing is there to attend to
    distance = (torch.cat(found, dim=1) - wanted)[mask.bool()]
    assert float(distance.abs().max()) < 1e-13
    assert model(tokens(), use_cache=False).past_key_values is None


def test_embeddings_last_logits_and_loss() -> None:
    model = pair()[1]
    with torch.no_grad():
        whole = model(tokens(), labels=tokens(), use_cache=False)
        embedded = model.get_input_embeddings()(tokens())
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, whole.logits)
        last = model(tokens(), logits_to_keep=2, use_cache=False).logits
    assert torch.allclose(last, whole.logits[:, -2:], atol=1e-14)
    rows, wanted = whole.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()
    assert float(whole.loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(rows, wanted)), abs=1e-6
    )
    ignored = torch.where(tokens() == tokens()[:, 1:2], -100, tokens())
    with torch.no_grad():
        assert float(model(tokens(), labels=ignored).loss) != pytest.approx(float(whole.loss))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of `input_ids`"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(2, 4)}, "for 9 keys"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(2, 1, 9, 9)}, "two axes"),
    ],
)
def test_what_makes_no_sense(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair()[1](**arguments)


def test_alibi_in_bfloat16() -> None:
    """bfloat16 knows no odd number beyond 256: distances are not rounded before they are scaled."""
    from flamingo_ckpt.models.modules.mosaic_gpt import alibi_bias

    sizes = {"num_heads": 8, "num_keys": 2048, "alibi_bias_max": 8, "device": torch.device("cpu")}
    exact = alibi_bias(**sizes, dtype=torch.float32)
    assert exact[0, 0, 0, -3:].tolist() == [-1.0, -0.5, 0.0]
    assert float(exact[0, 7, 0, 0]) == -2047 / 256
    assert torch.equal(alibi_bias(**sizes, dtype=torch.bfloat16), exact.bfloat16())


def test_greedy_and_beams_with_and_without_a_cache() -> None:
    model = pair()[1]
    options: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        found = model.generate(tokens(), **options, **more)
        assert torch.equal(found, model.generate(tokens(), **options, **more, use_cache=False))
        assert found.shape == (2, 14)


def test_embeddings_are_resized() -> None:
    model = pair()[1]
    before = model(tokens()).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    after = model(tokens()).logits
    assert after.shape[-1] == model.config.vocab_size == 140
    assert torch.allclose(after[..., : before.shape[-1]], before, atol=1e-14)
    assert model.get_output_embeddings() is None


def test_gradient_checkpointing() -> None:
    model = pair()[1].train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    wanted = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    calls: list[int] = []
    model.transformer["blocks"][0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert len(calls) == 2
    assert all(torch.equal(one.grad, wanted[name]) for name, one in model.named_parameters())


def test_a_folder_of_it(tmp_path: Path) -> None:
    model = pair()[1]
    model.save_pretrained(tmp_path)
    again = MosaicGPT.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert set(again.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens()).logits, model(tokens()).logits)


def test_the_config_is_registered_nowhere() -> None:
    import transformers

    assert "mosaic_gpt" not in transformers.CONFIG_MAPPING
    assert MosaicGPTConfig(n_layers=3).num_hidden_layers == 3


def test_hidden_states() -> None:
    """What goes into each layer, then what the head is given; never silently nothing."""
    model = pair()[1]
    with torch.no_grad():
        output = model(tokens(), output_hidden_states=True)
        embedded = model.get_input_embeddings()(tokens())
        plain = model(tokens(), return_dict=False)
    assert len(output.hidden_states) == model.config.n_layers + 1
    assert torch.equal(output.hidden_states[0], embedded)
    weight = model.get_input_embeddings().weight
    assert torch.equal(output.hidden_states[-1] @ weight.T, output.logits)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], output.logits)
    with pytest.raises(ValueError, match="attentions"):
        model(tokens(), output_attentions=True)


def test_a_static_cache_is_refused() -> None:
    """It would be longer than the mask, at positions that hold nothing yet."""
    with pytest.raises(ValueError, match="a cache that grows"):
        pair()[1].generate(tokens(), max_new_tokens=2, cache_implementation="static")
