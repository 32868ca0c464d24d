"""Files and folders that went wrong with Flamingos in the wild, each as its users met it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.loading import load_checkpoint, load_into
from flamingo_ckpt.loading.flamingo import create_model_and_transforms
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.pretrained import load_pretrained
from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from tests import zoo
from tests.loading.flamingo_files import create, refused, save_language_model, save_parts
from tests.zoo_lms import WORDS

EVERY = 2


def made_of(family: str, folder: Path, **options: Any) -> Any:
    """A fresh model of a family, its frozen parts filled."""
    return create(save_parts(family, folder), cross_attn_every_n_layers=EVERY, **options)


def assert_filled(model: Any, wanted: Mapping[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert set(wanted) <= set(found)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# --- names that wrappers of training leave --------------------------------------------------------


@pytest.mark.parametrize(
    "level", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."]
)
def test_wrappers_in_the_middle_of_names(level: str, tmp_path: Path) -> None:
    """Upstream replaces `module.` anywhere, which makes `_fsdp_wrapped_` of the first of them."""
    trained = zoo.openflamingo("llama").partial
    state = {
        "module."
        + name.replace("lang_encoder.", f"lang_encoder.{level}").replace(
            "gated_cross_attn_layer.", f"gated_cross_attn_layer.{level}"
        ): tensor
        for name, tensor in trained.items()
    }
    path = zoo.save_torch(state, tmp_path / "x.pt", wrapper="model_state_dict")
    model = made_of("llama", tmp_path)
    load_pretrained(model, path)
    assert_filled(model, trained)


@pytest.mark.parametrize("family", ["llama", "mpt7b", "gpt_neox"])
def test_a_release_with_its_language_model_inside(family: str, tmp_path: Path) -> None:
    """FSDP's names defeat upstream's filter: all layers and the head are kept, the norm is not."""
    made = zoo.openflamingo(family)
    left_out = ("vision_encoder.", "norm", ".old_decoder_blocks.", ".gated_cross_attn_layers.")
    fat = {
        name: tensor
        for name, tensor in made.full.items()
        if name in made.partial
        or ".decoder_layer." in name
        or not any(part in name for part in left_out)
    }
    norms = set(made.full) - set(fat)
    norms = {name for name in norms if "norm" in name and "vision" not in name}
    norms = {name for name in norms if ".old_decoder" not in name and ".gated_" not in name}
    assert norms
    assert any(".decoder_layer." in name for name in fat)
    model = made_of(family, tmp_path)
    report = load_pretrained(model, zoo.save_torch(fat, tmp_path / "fat.pt"))
    assert_filled(model, fat)
    missing = {name for name in report.absent_by_design if not name.startswith("vision_encoder.")}
    assert missing == norms


@pytest.mark.parametrize("is_policy", [False, True])
def test_a_robots_checkpoint(is_policy: bool, tmp_path: Path) -> None:
    """Its filter keeps frozen layers under their second names alone, beside a policy of its own."""
    made = zoo.openflamingo("mpt1b")
    trees = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
    state = made.partial | {n: t for n, t in made.full.items() if n.startswith(trees)}
    wanted = dict(state)
    if is_policy:
        state |= {
            "lm_head.rnn.weight_ih_l0": torch.ones(4, 3),
            "perceiver_gripper.x": torch.ones(2),
        }
    path = zoo.save_torch(state, tmp_path / "x.pth", wrapper="model_state_dict", prefix="module.")
    model = made_of("mpt1b", tmp_path)
    if is_policy:
        error = refused("FC430", load_pretrained, model, path)
        assert isinstance(error, LoadError)
        wanted_keys = {"module.lm_head.rnn.weight_ih_l0", "module.perceiver_gripper.x"}
        assert set(error.report.unexpected_keys) == wanted_keys
        found = load_checkpoint(model, path, strict=False)
        assert set(found.unexpected_keys) == wanted_keys
    else:
        load_pretrained(model, path)
    assert_filled(model, wanted)


@pytest.mark.parametrize("whole", [False, True])
def test_adapters_are_not_passed_over(whole: bool, tmp_path: Path) -> None:
    """LoRA beside the layers, or around the whole language model: `strict=False` drops them."""
    made = zoo.openflamingo("llama")
    layer = "lang_encoder.model.layers.0.decoder_layer.self_attn.q_proj."
    weight = made.full[layer + "weight"]
    state = made.partial | {
        f"{layer}lora_A.default.weight": torch.ones(2, weight.shape[1]),
        f"{layer}lora_B.default.weight": torch.ones(weight.shape[0], 2),
    }
    if whole:
        level = "lang_encoder.base_model.model."
        state = {name.replace("lang_encoder.", level): one for name, one in state.items()}
    model = made_of("llama", tmp_path)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    for load in (load_pretrained, lambda *a: load_checkpoint(*a)):
        with pytest.raises(LoadError) as caught:
            load(model, zoo.save_torch(state, tmp_path / "x.pt"))
        assert "lora" in str(caught.value).lower()
    assert_filled(model, before)


@pytest.mark.parametrize(
    "part", ["3.gated_cross_attn_layer.attn_gate", "gated_cross_attn_layer.", "norm.weight"]
)
def test_the_interval_is_not_blamed_for_something_else(part: str, tmp_path: Path) -> None:
    """One tensor of a block is missing, or all blocks are; the interval would be whole blocks."""
    trained = zoo.openflamingo("llama").partial
    state = {name: one for name, one in trained.items() if part not in name}
    assert len(state) < len(trained)
    model = made_of("llama", tmp_path)
    error = refused("FC430", load_pretrained, model, zoo.save_torch(state, tmp_path / "x.pt"))
    assert "interval" not in f"{error} {error.hint}"
    whole = {name: one for name, one in trained.items() if "layers.3.gated" not in name}
    error = refused("FC430", load_pretrained, model, zoo.save_torch(whole, tmp_path / "y.pt"))
    assert "interval" in (error.hint or "")


# --- heads and rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_a_trained_head_of_gpt_neox_arrives(name: str, tmp_path: Path) -> None:
    """transformers renamed it in a minor release, and a load that is not strict dropped it."""
    made = zoo.openflamingo("gpt_neox", era="2023")
    state = dict(made.partial)
    head = torch.randn_like(state.pop("lang_encoder.embed_out.weight"))
    state[f"lang_encoder.{name}.weight"] = head
    model = made_of("gpt_neox", tmp_path)
    load_pretrained(model, zoo.save_torch(state, tmp_path / "x.pt"))
    assert torch.equal(model.lang_encoder.get_output_embeddings().weight, head)


def otters(seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """`final_weights.pt`: what Otter trains, its head too, and the buffers of its time."""
    state = zoo.hf_flamingo("llama", era="2023", position_ids=True, seed=seed, **options).state
    kept = ("perceiver.", "gated_cross_attn", "embed_tokens", "lm_head", "inv_freq", "position_ids")
    return {name: one for name, one in state.items() if any(part in name for part in kept)}


def test_several_of_otters_final_weights_on_one_base(tmp_path: Path) -> None:
    """One after the other: the second leaves nothing of the first, and a trained head arrives."""
    model = made_of("llama", tmp_path)
    for seed in (0, 1):
        path = zoo.save_torch(otters(seed), tmp_path / f"final_weights{seed}.pt")
        report = load_pretrained(model, path)
        assert report.layout == "hf-flamingo"
        assert_filled(model, zoo.openflamingo("llama", seed=seed).partial)
        head = model.lang_encoder.lm_head.weight
        assert torch.equal(head, otters(seed)["lang_encoder.lm_head.weight"])
        assert not any("lm_head" in name for name in report.absent_by_design)


def test_otters_answer_is_no_padding(tmp_path: Path) -> None:
    """Otter has a token more; the row that is `<PAD>` here is its `<answer>`."""
    model = made_of("llama", tmp_path)
    path = zoo.save_torch(otters(extra_rows=1), tmp_path / "final_weights.pt")
    error = refused("FC430", load_pretrained, model, path)
    rows = zoo.flamingo_rows("llama")
    assert f"{rows + 1}x" in str(error)
    assert f"{rows}x" in str(error)


def test_a_wall_of_sizes_is_a_few_lines(tmp_path: Path) -> None:
    """The checkpoint of a LLaMA into another's model: upstream lists every tensor, most twice."""
    state = {
        name: torch.cat([one, one], dim=-1) if one.ndim > 1 else one
        for name, one in zoo.openflamingo("llama", every_n=1).partial.items()
        if "embed_tokens" not in name
    }
    model = create(save_parts("llama", tmp_path))
    with pytest.raises(LoadError) as caught:
        load_pretrained(model, zoo.save_torch(state, tmp_path / "x.pt"))
    assert len(str(caught.value).splitlines()) < 30
    assert "gated_cross_attn_layers" not in str(caught.value)
    assert "old_decoder_blocks" not in str(caught.value)


@pytest.mark.parametrize("family", ["opt", "mpt7b"])
def test_a_tied_head_stays_tied(family: str, tmp_path: Path) -> None:
    """The file has it under both names; where they differ, neither is taken."""
    head, embedding = (f"lang_encoder.{name}.weight" for name in reversed(zoo.FAMILIES[family][1:]))
    state = dict(zoo.openflamingo(family).partial)
    assert head in state
    model = made_of(family, tmp_path)
    load_pretrained(model, zoo.save_torch(state, tmp_path / "x.pt"))
    language = model.lang_encoder
    assert language.get_output_embeddings().weight is language.get_input_embeddings().weight
    assert torch.equal(language.get_output_embeddings().weight, state[head])
    state[head] = state[head] + 1
    path = zoo.save_torch(state, tmp_path / "other.pt")
    with pytest.raises(LoadError) as caught:
        load_pretrained(model, path)
    assert head in str(caught.value)
    assert embedding in str(caught.value)


# --- names and numbers of more than one digit, and `ff` in other words ----------------------------


def test_a_port_of_twelve_layers_over_an_mpt(tmp_path: Path) -> None:
    """Otter's converter renames one digit, and the `ff` of MPT's own `ffn`."""
    options: dict[str, Any] = {"perceiver_depth": 12, "layers": 12, "every_n": 4}
    made = zoo.hf_flamingo("mpt7b", **options)
    assert any(".ffn.up_proj" in name for name in made.state)
    model = build(parse_config(made.source.config, "config.json"), "openflamingo")
    path = zoo.save_safetensors(made.state, tmp_path / "model.safetensors")
    load_into(model, path, LoadOptions(may_miss=frozenset({"vision_encoder.proj"})))
    wanted = made.source.full
    del wanted["vision_encoder.proj"]
    assert_filled(model, wanted)


# --- folders --------------------------------------------------------------------------------------


def test_the_tokenizer_class_of_early_llamas(tmp_path: Path) -> None:
    """A class that transformers never released stands in the configs of converted LLaMAs."""
    parts = save_parts("llama", tmp_path)
    path = Path(parts["tokenizer_path"]) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "LLaMATokenizer"}
    path.write_text(json.dumps(config))
    plain = create_model_and_transforms(**save_parts("llama", tmp_path / "plain"))[2]
    _, _, tokenizer = create_model_and_transforms(**parts)
    text = "<image>An image of two cats.<|endofchunk|>"
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]


@pytest.mark.parametrize(
    ("family", "architectures"),
    [
        ("llama", None),
        ("llama", ["LLaMAForCausalLM"]),
        ("gpt_neox", ["GPTNeoXForCausalLM"]),
        ("gpt_neox", ["AdoptedGPTNeoXForCausalLM"]),  # has OPT's letters in it
        ("opt", None),
    ],
)
def test_the_class_name_does_not_choose_the_layers(
    family: str, architectures: list[str] | None, tmp_path: Path
) -> None:
    """Upstream searches the class's name for letters: `gptneo` was found in GPT-NeoX."""
    parts = save_parts(family, tmp_path)
    path = Path(parts["lang_encoder_path"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": architectures}))
    model = create(parts)
    layers = model.lang_encoder.get_submodule(zoo.FAMILIES[family][0])
    assert all(hasattr(layer, "gated_cross_attn_layer") for layer in layers)


def test_gpt_neo_is_not_taken_for_gpt_neox(tmp_path: Path) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    )
    parts = save_parts("llama", tmp_path)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    parts["lang_encoder_path"] = str(tmp_path / "neo")
    error = refused("FC403", create, parts)
    assert "gpt_neo" in str(error)
    assert "decoder_layers_attr_name" in str(error.hint)
    model = create(parts, decoder_layers_attr_name="transformer.h")
    assert hasattr(model.lang_encoder.transformer.h[1], "gated_cross_attn_layer")


def test_mpt_1b_may_be_called_anything(tmp_path: Path) -> None:
    """Upstream gives it what its class lacks where the path has a certain name in it."""
    folder = save_language_model("mpt1b", tmp_path / "my_model")
    parts = save_parts("mpt1b", tmp_path) | {"lang_encoder_path": str(folder)}
    model = create(parts)
    tokens = torch.tensor([[model.media_token_id, 4, 5]])
    loss = model(torch.randn(1, 1, 1, 3, 32, 32), tokens, labels=tokens).loss
    assert loss.isfinite()
    assert len(model.lang_encoder.get_input_embeddings().weight) == zoo.flamingo_rows("mpt1b")


# --- as upstream's users go on writing it ---------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_torchs_own_load_of_a_release(family: str, tmp_path: Path) -> None:
    """`model.load_state_dict(torch.load(path), strict=False)` fits, and says what ours says."""
    made = zoo.openflamingo(family)
    path = zoo.save_torch(made.partial, tmp_path / "checkpoint.pt")
    model, other = (made_of(family, tmp_path / name) for name in ("a", "b"))
    missing, unexpected = model.load_state_dict(torch.load(path, map_location="cpu"), strict=False)
    report = load_pretrained(other, path)
    assert not unexpected
    assert report.absent_by_design
    assert set(report.absent_by_design) <= set(missing)
    assert_filled(other, model.state_dict())


def test_the_report_tells_whether_what_is_missing_matters(tmp_path: Path) -> None:
    """`IncompatibleKeys` with hundreds of names is what users ask about."""
    model = made_of("llama", tmp_path)
    path = zoo.save_torch(zoo.openflamingo("llama").partial, tmp_path / "checkpoint.pt")
    report = load_pretrained(model, path)
    said = str(report)
    assert len(said.splitlines()) < 12
    numbers = re.search(
        r"absent by design, (\d+) of the language base and (\d+) of the vision", said
    )
    assert numbers is not None, said
    bases = Counter(report.absent_by_design.values())
    assert [int(one) for one in numbers.groups()] == [bases["language"], bases["vision"]]
    assert "--json" not in said  # which a program has not
    with pytest.raises(CkptError):
        load_checkpoint(model, path, strict=True)
