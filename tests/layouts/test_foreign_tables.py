"""What of other people's Flamingos is carried, and what is named and left out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.foreign import LAYOUTS
from flamingo_ckpt.layouts.mapping import Assembled, assemble
from flamingo_ckpt.layouts.registry import LAYOUTS as ALL_LAYOUTS
from tests.layouts.carry import assert_same_bits, carry, read
from tests.zoo_lms import State, prepare
from tests.zoo_others import flamingo_mini, idefics, lucidrains

MINI, PYTORCH, IDEFICS = LAYOUTS
OPENFLAMINGO = ALL_LAYOUTS["openflamingo"]
#: Eleven blocks and perceiver layers, so that 10 must not sort before 2.
MANY = {"layers": 22, "depth": 11}


def on_opt(state: State) -> State:
    """flamingo-mini with OPT's place for the gated blocks, the language model left out."""
    return {
        name.replace(".lm.h.", ".lm.decoder.layers."): tensor
        for name, tensor in state.items()
        if not name.startswith("flamingo.lm") or ".xattn_block." in name
    }


def blocks_and_perceiver(state: State) -> State:
    """A released OpenFlamingo's keys of a flamingo-mini, renamed by hand."""
    import torch

    found: State = {}
    for name, tensor in on_opt(state).items():
        if name.endswith((".time_pos_emb", ".to_v.weight")):
            continue
        new = name.replace("flamingo.resampler.", "perceiver.")
        new = new.replace("flamingo.lm.", "lang_encoder.model.")
        new = new.replace(".xattn_block.", ".gated_cross_attn_layer.")
        new = new.replace(".ffw.", ".ff.").replace("alpha_attn", "attn_gate")
        new = new.replace("alpha_ffw", "ff_gate")
        if name.endswith(".to_k.weight"):
            tensor = torch.cat([tensor, state[name.replace(".to_k.", ".to_v.")]])
            new = new.replace(".to_k.", ".to_kv.")
        found[new] = tensor
    return found


def in_openflamingo(source: Any, state: State, family: str) -> tuple[dict[str, Assembled], Any]:
    reading = read(source, state)
    made = assemble(reading.atoms, OPENFLAMINGO.table(family), {})
    assert not made.faults
    left_out = {name: reading.atoms[name].loss for name in made.unplaced}
    return {one.name: one for one in made.tensors}, left_out


@pytest.mark.parametrize("spelling", [lambda state: state, on_opt], ids=["gpt2", "opt"])
def test_blocks_and_perceiver_of_flamingo_mini_become_openflamingos(spelling):
    import torch

    state = flamingo_mini(**MANY)
    source = spelling(state)
    found, left_out = in_openflamingo(MINI, source, "opt")
    wanted = blocks_and_perceiver(state)
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        runs = []
        for piece in found[name].pieces:
            offset, sizes, strides = piece.view.flat()
            flat = source[piece.source.name].flatten()
            runs.append(torch.as_strided(flat, sizes, strides, offset).flatten())
        assert torch.equal(torch.cat(runs).reshape(found[name].shape), tensor), name
    assert list(left_out) == ["perceiver.time_pos_emb"]
    assert "flamingo-mini" in left_out["perceiver.time_pos_emb"]


def test_the_index_of_a_decoder_layer_is_kept():
    found, _ = in_openflamingo(MINI, flamingo_mini(**MANY), "opt")
    gates = {int(name.split(".")[4]) for name in found if name.endswith("attn_gate")}
    assert gates == set(range(0, 22, 2))


def test_flamingo_mini_comes_back_as_on_opt():
    state = flamingo_mini(**MANY)
    assert_same_bits(carry(MINI, MINI, state), on_opt(state))
    assert_same_bits(carry(MINI, MINI, on_opt(state)), on_opt(state))


def perceiver_and_blocks(state: State) -> State:
    return {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("perceiver_resampler.") or re.match(r"layers\.\d+\.1\.", name)
    }


def test_flamingo_pytorch_comes_back():
    state = lucidrains(**MANY)
    assert_same_bits(carry(PYTORCH, PYTORCH, state), perceiver_and_blocks(state))


def test_blocks_and_perceiver_of_flamingo_pytorch_keep_their_names_inside():
    state = lucidrains(**MANY)
    found, left_out = in_openflamingo(PYTORCH, state, "gptj")
    wanted = {
        re.sub(
            r"^layers\.(\d+)\.1\.",
            r"lang_encoder.transformer.h.\1.gated_cross_attn_layer.",
            name.replace("perceiver_resampler.", "perceiver."),
        ): name
        for name in perceiver_and_blocks(state)
        if not name.endswith("media_pos_emb")
    }
    assert sorted(found) == sorted(wanted)
    for name, old in wanted.items():
        assert found[name].shape == tuple(state[old].shape)
        assert {piece.source.name for piece in found[name].pieces} == {old}
    assert list(left_out) == ["perceiver.media_pos_emb"]
    assert "flamingo-pytorch" in left_out["perceiver.media_pos_emb"]


@pytest.mark.parametrize(
    ("layout", "state", "wanted"),
    [
        (MINI, flamingo_mini(), r"flamingo\.lm(_head)?\.(?!.*xattn_block)"),
        (PYTORCH, lucidrains(), r"token_emb|to_logits|layers\.\d+\.0\."),
    ],
    ids=["mini", "pytorch"],
)
def test_the_rest_of_a_model_is_dropped_with_a_reason(layout, state, wanted):
    reading = read(layout, state)
    assert not reading.unknown
    assert set(reading.dropped) == {name for name in state if re.match(wanted, name)}
    assert all("language model" in reason for reason in reading.dropped.values())


def test_the_towers_of_flamingo_mini_are_known_key_by_key():
    prepare()
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        GPT2Config,
        GPT2Model,
        OPTConfig,
        OPTModel,
    )

    gpt2 = GPT2Model(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=12, n_head=2))
    opt = OPTModel(
        OPTConfig(
            vocab_size=9,
            hidden_size=8,
            word_embed_proj_dim=4,
            ffn_dim=12,
            num_hidden_layers=12,
            num_attention_heads=2,
            max_position_embeddings=8,
            do_layer_norm_before=True,
        )
    )
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )
    names = [f"flamingo.lm.{name}" for model in (gpt2, opt) for name in model.state_dict()]
    # a layer with a gated block before it is wrapped, the others are not
    names += [re.sub(r"((?:\.h|layers)\.\d+)\.", r"\1.lm_block.", name) for name in names]
    names += [
        "flamingo.vision_encoder.vision_model." + name.removeprefix("vision_model.")
        for name in clip.state_dict()
    ]
    names += ["flamingo.vision_encoder.vision_model.embeddings.position_ids"]
    matches = {name: MINI.table().match(name) for name in names}
    assert not [name for name, match in matches.items() if match is None]
    assert all(match.rule.drop for match in matches.values() if match)


def idefics_model(*, qk_norms: bool) -> Any:
    prepare()
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    return IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=50,
            additional_vocab_size=3,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=4,
            qk_layer_norms=qk_norms,
            cross_layer_interval=2,
            use_resampler=True,
            vision_config={
                "embed_dim": 24,
                "image_size": 8,
                "patch_size": 4,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 30,
            },
            perceiver_config={
                "use_resampler": True,
                "resampler_n_latents": 4,
                "resampler_depth": 2,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "qk_layer_norms_perceiver": qk_norms,
            },
        )
    )


@pytest.mark.parametrize("qk_norms", [True, False])
def test_idefics_of_transformers_is_known_key_by_key_and_carries_nothing(qk_norms):
    state = idefics_model(qk_norms=qk_norms).state_dict()
    reading = read(IDEFICS, state)
    assert not reading.unknown
    assert not reading.atoms
    assert detect(state, "model").layout is IDEFICS


def test_idefics_says_why_it_is_no_flamingo():
    for word in ("RMSNorm", "SwiGLU", "ReLU", "query and key", "as wide as"):
        assert word in IDEFICS.refused
    assert not assemble(read(MINI, flamingo_mini()).atoms, IDEFICS.table(), {}).tensors


@pytest.mark.parametrize(
    ("layout", "state"),
    [
        (MINI, flamingo_mini()),
        (MINI, on_opt(flamingo_mini())),
        (PYTORCH, lucidrains()),
        (PYTORCH, perceiver_and_blocks(lucidrains())),
        (IDEFICS, idefics()),
    ],
    ids=["mini", "mini-opt", "pytorch", "pytorch-part", "idefics"],
)
def test_each_is_recognised_by_its_keys(layout, state):
    found = detect(state, "model")
    assert (found.layout.name, found.num_fit) == (layout.name, len(state))


@pytest.mark.parametrize("layout", [MINI, PYTORCH], ids=["mini", "pytorch"])
def test_they_are_marked_lossy(layout):
    assert "the perceiver and the gated blocks alone" in layout.lossy
