"""A converted `.bin` release loads with transformers: nothing missing, nothing unexpected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import cli_ok, names_in, torch_facts


def make_model(kind: str) -> Any:
    """A tiny model with every weight random: default biases of 0 would hide a swap."""
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    import transformers

    common = {"vocab_size": 60, "max_position_embeddings": 16}
    if kind == "bert":
        config = transformers.BertConfig(
            **common,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        )
        model = transformers.BertForMaskedLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.OPTConfig(
            **common,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            word_embed_proj_dim=16,
        )
        model = transformers.OPTForCausalLM(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("shard_size", [None, 4000])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "opt"])
def test_from_pretrained_after_conversion(
    kind: str, shard_size: int | None, tmp_path: Path
) -> None:
    model = make_model(kind)
    src, out = tmp_path / "src", tmp_path / "out"
    model.save_pretrained(src)
    (src / "model.safetensors").unlink()
    state_dict = model.state_dict()
    assert len({t.data_ptr() for t in state_dict.values()}) < len(state_dict)  # tied weights
    torch.save(state_dict, src / "pytorch_model.bin")
    options = [] if shard_size is None else ["--max-shard-size", shard_size]
    cli_ok("convert", src, out, *options)
    cli_ok("verify", src, out)
    if shard_size is None:
        assert "model.safetensors" in names_in(out)
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
    loaded, info = type(model).from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch_facts(loaded.state_dict()) == torch_facts(state_dict)
    tokens = torch.arange(10).reshape(2, 5)
    model.eval()
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_a_torch_release_loads_too(tmp_path: Path) -> None:
    """The other way: a safetensors release to `.bin` shards."""
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "src")
    cli_ok(
        *("convert", tmp_path / "src", tmp_path / "out"),
        *("--format", "torch", "--max-shard-size", 4000),
    )
    assert "pytorch_model.bin.index.json" in names_in(tmp_path / "out")
    loaded, info = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch_facts(loaded.state_dict()) == torch_facts(model.state_dict())
