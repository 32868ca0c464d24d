"""OpenFlamingo's tables: every key of upstream's models, in every layout, for every language model.

The files themselves are converted in `tests/test_convert_layouts.py`; here the tables speak alone.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.mapping import Reading, assemble, read_atoms
from flamingo_ckpt.layouts.registry import LAYOUTS
from flamingo_ckpt.tensors import TORCH_DTYPES, TensorInfo
from tests import zoo

NAMES = {
    "mpt1b": "mosaic_gpt",
    "mpt7b": "mpt",
    "gpt_neox": "gpt_neox",
    "pythia": "gpt_neox",
    "llama": "llama",
    "opt": "opt",
    "gptj": "gptj",
}
each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_era = pytest.mark.parametrize("era", ["now", "2023"])
GROUPS = {"vision", "perceiver", "xattn", "lm.embed", "lm.layers", "lm.rest"}


def read(layout: str, family: str, state: Any) -> Reading:
    infos = [
        TensorInfo(
            name=name,
            dtype=TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")],
            shape=tuple(tensor.shape),
        )
        for name, tensor in state.items()
    ]
    reading = read_atoms(infos, LAYOUTS[layout].table(NAMES[family]), {})
    assert not reading.unknown
    assert not reading.bent
    return reading


def names_of(layout: str, family: str, atoms: Any) -> set[str]:
    assembly = assemble(atoms, LAYOUTS[layout].table(NAMES[family]), {})
    assert not assembly.faults
    return {one.name for one in assembly.tensors}


@each_family
@each_era
def test_every_layout_says_the_same_of_one_model(family: str, era: str) -> None:
    """Canonical names and shapes do not depend on the layout that they came from."""
    model = zoo.openflamingo(family, era=era)
    full = read("openflamingo-full", family, model.full)
    shapes = {name: piece.shape for name, piece in full.atoms.items()}
    assert {group_of(name) for name in shapes} == GROUPS
    hf = read("hf-flamingo", family, zoo.hf_flamingo(family, era=era).state)
    assert {name: piece.shape for name, piece in hf.atoms.items()} == {
        name: shape for name, shape in shapes.items() if name != "vision.projection.weight"
    }
    partial = read("openflamingo", family, model.partial)
    assert {n: piece.shape for n, piece in partial.atoms.items()}.items() <= shapes.items()
    # the language model alone, but for its rows
    own = read("language-model", family, model.language)
    assert own.atoms.keys() == {name for name in shapes if name.startswith("lm.")}
    assert all(
        piece.shape[1:] == shapes[name][1:]
        for name, piece in own.atoms.items()
        if name.startswith(("lm.embed", "lm.head"))
    )


@each_family
def test_only_buffers_are_dropped_and_each_has_its_reason(family: str) -> None:
    for era in ("now", "2023"):
        state = zoo.openflamingo(family, era=era).full
        dropped = read("openflamingo-full", family, state).dropped
        buffers = {n for n in state if re.search(r"inv_freq$|attention\.(masked_)?bias$", n)}
        assert {*dropped} == buffers
        assert set(dropped.values()) <= {"computed from the config when the model is built"}


@each_family
def test_every_gated_block_has_upstreams_eleven_tensors(family: str) -> None:
    model = zoo.openflamingo(family, layers=12, every_n=4)
    atoms = read("openflamingo", family, model.partial).atoms
    layers: dict[int, set[str]] = {}
    for name in atoms:
        if name.startswith("xattn."):
            layers.setdefault(int(name.split(".")[1]), set()).add(name.split(".", 2)[2])
    assert sorted(layers) == [3, 7, 11]
    # keys and values are one tensor there
    wanted = {"attn_gate", "mlp_gate", "mlp.fc1.weight", "mlp.fc2.weight"}
    wanted |= {f"{part}.norm.{p}" for part in ("attn", "mlp") for p in ("weight", "bias")}
    wanted |= {f"attn.{m}.weight" for m in ("q", "k", "v", "out")}
    assert all(leaves == wanted for leaves in layers.values())
    assert len(wanted) == 11 + 1


@each_family
def test_the_aliases_are_upstreams(family: str) -> None:
    """Every second name of the whole state dict, and no other."""
    state = zoo.openflamingo(family).full
    reading = read("openflamingo-full", family, state)
    table = LAYOUTS["openflamingo-full"].table(NAMES[family])
    aliases: set[str] = set()
    for name in reading.atoms:
        aliases |= {*table.aliases(name)}
    trees = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
    assert aliases == {name for name in state if name.startswith(trees)}
    first = names_of("openflamingo-full", family, reading.atoms)
    neox = {"lang_encoder.embed_out.weight"} if "gpt_neox" in NAMES[family] else set()
    head = {"lang_encoder.lm_head.weight"} if neox else set()
    assert first - neox == {name for name in state if not name.startswith(trees)} - head


@pytest.mark.parametrize("layout", ["openflamingo", "openflamingo-full", "hf-flamingo", "vlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_of_a_decoder_layer_is_taken_for_another_familys(layout: str, family: str) -> None:
    """A table knows the decoder layers of its own language model and of no other."""
    for other in zoo.FAMILIES:
        if NAMES[other] == family:
            continue
        state = zoo.openflamingo(other).full
        layers = [n for n in state if ".decoder_layer." in n and "old_decoder" not in n]
        table = LAYOUTS[layout].table(family)
        top = "lang_model" if layout == "vlm" else "lang_encoder"
        keys = [name.replace("lang_encoder", top) for name in layers]
        known = [key for key in keys if table.match(key)]
        # both MPTs call the attention's projections alike
        leaves = {key.split("decoder_layer.")[1] for key in known}
        assert leaves <= {"attn.Wqkv.weight", "attn.out_proj.weight"}


def test_a_projection_between_widths_has_a_place_in_the_next_generation_alone() -> None:
    place = LAYOUTS["vlm"].table("llama").place("perceiver.projection.weight")
    assert place is not None
    assert place.name == "vision_tokenizer.projection.weight"
    for name in ("openflamingo", "hf-flamingo"):
        assert LAYOUTS[name].table("llama").place("perceiver.projection.weight") is None
