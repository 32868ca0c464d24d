"""diff: what is good is exit 0, whatever the layout, and the counts are those of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.diff_support import diff, embedding, model, without
from tests.support import cli_ok

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_era = pytest.mark.parametrize("era", ["now", "2023"])

#: keys of the language model's own layers, in a model of four: what a partial file leaves out
LANGUAGE_KEYS = {
    "mpt1b": 4 * 8 + 1,
    "mpt7b": 4 * 6 + 1,
    "gpt_neox": 4 * 12 + 2 + 1,
    "pythia": 4 * 12 + 2 + 1,
    "llama": 4 * 9 + 1 + 1,
    "opt": 4 * 16 + 2,
    "gptj": 4 * 10 + 2 + 2,
}
PERCEIVER, GATED = 69, 2 * 11
#: class, patch and position embedding, two norms and `proj`, three layers of twelve
OPEN_CLIP_VISION, HF_VISION = 3 + 4 + 1 + 3 * 12, 3 + 4 + 3 * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diff")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def partial(family: str, era: str, folder: Path, **options: Any) -> Path:
    path = folder / f"{family}-{era}-{len(options)}-partial.pt"
    if not path.exists():
        zoo.save_torch(zoo.openflamingo(family, era=era).partial, path, **options)
    return path


def full(family: str, era: str, folder: Path) -> Path:
    path = folder / f"{family}-{era}-full.pt"
    if not path.exists():
        zoo.save_torch(zoo.openflamingo(family, era=era).full, path)
    return path


def hf(family: str, era: str, folder: Path) -> Path:
    path = folder / f"{family}-{era}-hf"
    if not path.exists():
        found = zoo.hf_flamingo(family, era=era)
        zoo.save_folder(found.state, found.config, path)
    return path


def config(family: str, folder: Path) -> str:
    return model(zoo.openflamingo(family).config, folder / f"{family}-config")


@each_era
@each_family
def test_a_good_partial_checkpoint(family: str, era: str, folder: Path) -> None:
    trained = len(zoo.openflamingo(family, era=era).partial)
    for wrapped in ({}, {"wrapper": "model_state_dict", "prefix": "module."}):
        answer = diff(partial(family, era, folder, **wrapped), config(family, folder))
        assert answer.code == 0
        assert {one["code"] for one in answer.findings} <= {"FC209", "FC210", "FC215"}
        keys = answer.document["expected_absent"]
        by_base = [list(keys.values()).count(base) for base in ("vision", "language")]
        # a head that is trained with the rest, as GPT-NeoX's of 2023, is not absent
        heads = answer.summary["same"] - PERCEIVER - GATED - 1
        tied = 1 if family == "opt" or (family, era) == ("mpt7b", "now") else 0
        positions = 1 if family == "opt" else 0
        assert by_base == [
            OPEN_CLIP_VISION,
            LANGUAGE_KEYS[family] - max(heads - tied - positions, 0),
        ]
        assert answer.summary == {"same": answer.summary["same"], "expected_absent": sum(by_base)}
        assert answer.summary["same"] <= trained
        assert answer.document["inputs"][0]["prefix"] == ("module." if wrapped else None)


@each_era
@each_family
def test_a_good_whole_state_and_a_good_folder(family: str, era: str, folder: Path) -> None:
    for path, vision in (
        (full(family, era, folder), OPEN_CLIP_VISION),
        (hf(family, era, folder), HF_VISION),
    ):
        answer = diff(path, config(family, folder))
        assert answer.code == 0
        tied = 1 if family == "opt" or (family, era) == ("mpt7b", "now") else 0
        positions = 1 if family == "opt" else 0
        same = PERCEIVER + GATED + 1 + LANGUAGE_KEYS[family] + vision + tied + positions
        assert answer.summary == {"same": same}
        # its own config is a model as it stands
        if path.is_dir():
            assert diff(path, f"model:{path}/config.json").summary == {"same": same}
            back = diff(config(family, folder), path)
            assert (back.code, back.summary) == (0, {"same": same})


@each_family
def test_across_layouts_every_bit_is_compared(family: str, folder: Path) -> None:
    era = "now"
    paths = partial(family, era, folder), full(family, era, folder), hf(family, era, folder)
    trained = len(zoo.openflamingo(family, era=era).partial)
    pairs = [(a, b) for a in paths for b in paths if a != b]
    answers = {pair: diff(*pair, "--level", "bits") for pair in pairs}
    for (a, b), answer in answers.items():
        assert answer.code == 0, (a, b, answer.errors)
        if paths[0] in (a, b):
            assert answer.summary["same"] == trained
        back = answers[b, a].document["expected_absent"]
        assert back == answer.document["expected_absent"]


def test_buffers_that_nothing_needs_are_told_and_no_difference(folder: Path) -> None:
    answer = diff(full("gpt_neox", "2023", folder), config("gpt_neox", folder))
    state = zoo.openflamingo("gpt_neox", era="2023").full
    buffers = {name for name in state if name.endswith((".bias", "_bias", "inv_freq"))} & {
        name for name in state if ".attention." in name and "dense" not in name
    }
    buffers = {name for name in buffers if "query_key_value" not in name}
    assert set(answer.keys("FC209")) == buffers
    assert answer.code == 0


def test_a_tied_head_may_be_stored_or_not(folder: Path) -> None:
    state = zoo.hf_flamingo("opt").state
    head = "lang_encoder.lm_head.weight"
    stored = zoo.save_safetensors(state, folder / "stored.safetensors")
    dropped = zoo.save_safetensors(without(state, head), folder / "dropped.safetensors")
    told = diff(stored, config("opt", folder))
    assert told.code == 0
    assert told.keys("FC210") == [head]
    assert diff(dropped, config("opt", folder)).keys("FC210") == []
    # what is in a file decides: headers show two tensors, bits that they are copies
    assert diff(dropped, stored).told == [("FC203", head)]
    for pair in ((dropped, stored), (stored, dropped)):
        answer = diff(*pair, "--level", "bits")
        assert answer.code == 0
        assert answer.keys("FC210") == [head]
    apart = state | {head: state[head] + 1}
    other = zoo.save_safetensors(apart, folder / "apart.safetensors")
    assert diff(dropped, other, "--level", "bits").told == [("FC203", head)]


def test_a_tied_head_in_torch_files_is_one_tensor(folder: Path) -> None:
    state = zoo.openflamingo("opt").full
    dropped = zoo.save_torch(without(state, "lang_encoder.lm_head.weight"), folder / "untied.pt")
    for pair in ((dropped, full("opt", "now", folder)), (full("opt", "now", folder), dropped)):
        answer = diff(*pair)
        assert answer.code == 0
        assert answer.keys("FC210") == ["lang_encoder.lm_head.weight"]


def test_a_folder_that_says_it_is_partial(folder: Path) -> None:
    src = partial("llama", "now", folder)
    cli_ok("convert", src, folder / "partial-hf", "--to", "hf-flamingo")
    answer = diff(folder / "partial-hf", config("llama", folder))
    assert answer.code == 0
    assert answer.summary["same"] == PERCEIVER + GATED + 1
    assert answer.summary["expected_absent"] == HF_VISION + LANGUAGE_KEYS["llama"]
    assert diff(folder / "partial-hf", src, "--level", "bits").code == 0
    # one that claims to be whole and is not, is not good
    state = zoo.hf_flamingo("llama").state
    kept = {name: t for name, t in state.items() if not name.startswith("vision_encoder.")}
    zoo.save_folder(kept, zoo.hf_flamingo("llama").config, folder / "claims-all")
    answer = diff(folder / "claims-all", config("llama", folder))
    assert answer.summary["missing"] == HF_VISION


def test_version_one_and_the_next_generation(folder: Path) -> None:
    path = zoo.save_torch(zoo.openflamingo_v1(), folder / "v1.pt")
    answer = diff(path, config("llama", folder))
    assert answer.code == 0
    assert answer.summary["same"] == PERCEIVER + GATED + 1
    vlm = zoo.save_torch(zoo.vlm("llama"), folder / "vlm.pt")
    told = diff(vlm, config("llama", folder))
    assert (told.code, told.told) == (1, [("FC203", embedding("llama"))])


def test_clip_in_all_its_layouts(folder: Path) -> None:
    clip = zoo.clip()
    files = {
        "open_clip": zoo.save_safetensors(clip.open_clip, folder / "open_clip.safetensors"),
        "custom": zoo.save_torch(clip.custom_text, folder / "custom.pt"),
        "openai": zoo.save_torch(clip.openai, folder / "openai.pt"),
        "hf": zoo.save_folder(clip.hf, clip.config, folder / "hf-clip"),
    }
    count = dict.fromkeys(files, 110) | {"hf": 142}
    for a in files:
        assert diff(files[a], f"model:{files['hf']}/config.json").code == 0
        for b in files:
            answer = diff(files[a], files[b], "--level", "bits")
            assert (answer.code, answer.summary) == (0, {"same": count[b]})


def test_half_of_clip_lacks_the_other_half(folder: Path) -> None:
    clip = zoo.clip()
    vision = zoo.save_folder(clip.hf_vision, clip.vision_config, folder / "clip-vision")
    whole = zoo.save_safetensors(clip.open_clip, folder / "clip-whole.safetensors")
    assert diff(vision, f"model:{vision}/config.json").summary == {"same": 71}
    here, there = diff(vision, whole), diff(whole, vision)
    outside = {name for name in clip.open_clip if not name.startswith("visual.")} | {"visual.proj"}
    assert set(here.keys("FC203")) == set(there.keys("FC204")) == outside
    assert here.document["missing"] == there.document["unexpected"]


@pytest.mark.parametrize("version", [1, 2])
def test_paligemma_in_all_its_layouts(version: int, folder: Path) -> None:
    found = zoo.paligemma(version=version)
    root = folder / f"paligemma{version}"
    files = [
        zoo.save_folder(found.layout(n), found.config, root / n) for n in zoo.PALIGEMMA_LAYOUTS
    ]
    count = len(found.layout("L1"))
    expected = model(found.config, root / "model")
    for path in files:
        assert diff(path, expected).summary == {"same": count}
        for a, b in ((path, files[0]), (files[3], path)):
            answer = diff(a, b, "--level", "bits")
            assert (answer.code, answer.summary) == (0, {"same": count})


@pytest.mark.parametrize("version", [1, 2])
def test_big_vision_arrays_are_the_same_but_for_the_padding(version: int, folder: Path) -> None:
    found = zoo.paligemma(version=version)
    arrays = zoo.save_npz(found.npz(), folder / f"{version}.npz")
    plain = zoo.save_safetensors(found.layout("L1"), folder / f"{version}.safetensors")
    expected = model(found.config, folder / f"npz-model{version}")
    config_file = expected.removeprefix("model:")
    count = len(found.layout("L1")) - 1
    forth = diff(arrays, plain, "--level", "bits")
    back = diff(plain, arrays, "--level", "bits", "--config", config_file)
    embed = "params/llm/embedder/input_embedding", "language_model.model.embed_tokens.weight"
    for answer, key, same, by in (
        (forth, embed[0], count, "+64"),
        (diff(arrays, expected), embed[0], count, "+64"),
        (back, embed[1], len(found.npz()) - 1, "-64"),
    ):
        assert answer.told == [("FC216", key)]
        assert by in answer.detail("FC216")
        assert answer.summary == {"same": same, "changed": 1}


@each_family
def test_keys_are_the_weakest_and_bits_the_strongest_level(family: str, folder: Path) -> None:
    state = zoo.openflamingo(family).partial
    path = partial(family, "now", folder)
    gate = next(name for name in state if name.endswith("attn_gate"))
    value = zoo.save_torch(state | {gate: state[gate] + 1}, folder / "value.pt")
    dtype = zoo.save_torch(state | {gate: state[gate].double()}, folder / "dtype.pt")
    levels = ("keys", "headers", "bits")
    assert [diff(value, path, "--level", level).code for level in levels] == [0, 0, 1]
    assert [diff(dtype, path, "--level", level).code for level in levels] == [0, 1, 1]
