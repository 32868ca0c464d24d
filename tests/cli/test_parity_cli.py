"""parity: exit codes, the JSON contract, and that nothing is left behind or changed."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import zoo
from tests.cli.test_contract import check_document
from tests.parity.planting import embedding
from tests.parity.sides import CLIP_STAGES, FLAMINGO_STAGES, Pair, Sides
from tests.report import goldens
from tests.support import FIXTURES, Outcome, cli, tree

PASS_FIELDS = {
    *("gates", "dtype", "device", "decides", "max_abs", "max_rel", "cosine"),
    *("argmax_agreement", "kl", "agrees", "first_divergence"),
}
CELL_FIELDS = {"max_abs", "rel", "cosine", "noise", "tolerance", "agrees", "only_in"}
TOP_FIELDS = {
    *("schema_version", "tool", "command", "verdict", "exit_code", "inputs", "summary"),
    *("findings", "duration_seconds"),
    *("blame", "parameters", "greedy", "data", "sides", "judgement", "environment", "seconds"),
}


@pytest.fixture(autouse=True)
def _frozen() -> None:
    gc.freeze()


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; it has to be empty in the end."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def asked(pair: Pair, *more: object, b: Path | None = None) -> Outcome:
    """`parity --json` with everything that the pair needs; one document, and not a word beside."""
    outcome = cli("parity", pair.a, b or pair.b, *pair.options, *more, "--json")
    check_document(outcome, "parity")
    assert outcome.err == ""
    return outcome


def faulty(pair: Pair) -> Path:
    return pair.planted(lambda state: state.update(logit_scale=torch.tensor(1.0)))


# --- exit codes -----------------------------------------------------------------------------------


def test_two_that_agree_are_0_and_two_that_differ_are_1(
    sides: Sides, scratch: Path, request: pytest.FixtureRequest
) -> None:
    pair = sides.clip()
    planted = faulty(pair)
    before = tree(sides.folder)
    good, bad = asked(pair), asked(pair, b=planted)
    assert (good.code, good.document["verdict"], good.codes) == (0, "pass", [])
    assert (bad.code, bad.document["verdict"]) == (1, "fail")
    assert set(bad.codes) == {"FC301", "FC480", "FC483"}
    for name, outcome in (("parity", good), ("parity-fail", bad)):
        if request.config.getoption("--update-goldens"):
            text = outcome.out.replace(str(sides.folder), "TMP").replace(str(scratch), "TMP")
            goldens.write(name, goldens.normal(json.loads(text)))
    for outcome, b in ((good, pair.b), (bad, planted)):
        told = [(one["uri"], one["layout"]) for one in outcome.document["inputs"]]
        assert told == [(str(pair.a), "open_clip"), (str(b), "hf-clip")]
    assert tree(sides.folder) == before
    assert list(scratch.iterdir()) == []


def test_without_json_the_exit_code_is_the_same(sides: Sides, scratch: Path) -> None:
    pair = sides.clip()
    for b, code, options in ((pair.b, 0, []), (faulty(pair), 1, []), (pair.spare, 1, ["-q"])):
        outcome = cli("parity", pair.a, b, *pair.options, *options)
        assert (outcome.code, outcome.err) == (code, "")
        assert bool(outcome.out) == (not options)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there_is_3(
    device: str, sides: Sides, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = asked(sides.clip(), "--device", device)
    assert (outcome.code, outcome.document["verdict"], outcome.codes) == (
        3,
        "incomplete",
        ["FC482"],
    )
    (finding,) = outcome.document["findings"]
    assert finding["severity"] == "error"
    assert f"not run: `--device {device}` needs a GPU" in finding["detail"]
    # nothing is listed that was not run
    assert outcome.document["summary"] == {"passes": [], "layers": []}
    assert outcome.document["parameters"]["compared"] == 0
    assert "not run" in cli("parity", sides.clip().a, sides.clip().b, "--device", device).out


def test_without_a_device_the_cpu_computes_where_there_is_no_gpu(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    document = asked(sides.clip()).document
    assert document["summary"]["passes"][0]["device"] == "cpu"
    assert document["environment"]["device"] == "cpu"
    assert document["environment"]["notes"] == ["not run on a GPU"]


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ((), ["vision", "language"]),
        (("--base-vision",), ["language"]),
        (("--base-language",), ["vision"]),
    ],
)
def test_bases_that_are_not_named_are_3(
    given: tuple[str, ...], lacking: list[str], sides: Sides, scratch: Path
) -> None:
    pair = sides.flamingo("llama")
    named = dict(zip(pair.options[::2], pair.options[1::2], strict=True))
    options = [word for name in given for word in (name, named[name])]
    for a, b, side in ((pair.a, pair.b, "A"), (pair.b, pair.a, "B")):
        outcome = cli("parity", a, b, *options, "--json")
        document = check_document(outcome, "parity")
        assert (outcome.code, outcome.codes) == (3, ["FC482"])
        (finding,) = document["findings"]
        assert finding["data"] == {"side": side, "missing_bases": lacking}
        assert f"{side} is partial by design" in finding["detail"]
        assert finding["hint"] == "name them: " + " and ".join(f"--base-{one}" for one in lacking)
        assert document["summary"] == {"passes": [], "layers": []}
    assert list(scratch.iterdir()) == []


def test_both_sides_without_bases(sides: Sides) -> None:
    pair = sides.flamingo("llama")
    outcome = cli("parity", pair.a, pair.a, "--config", pair.options[5], "--json")
    assert (outcome.code, outcome.codes) == (3, ["FC482", "FC482"])


def closed(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: torch.zeros_like(tensor) if key.endswith("_gate") else tensor
        for key, tensor in state.items()
    }


def test_closed_gates_and_no_forced_ones_are_3(sides: Sides, scratch: Path) -> None:
    pair = sides.flamingo("llama")
    b = pair.planted(closed)
    options = ("--greedy", "0", "--json")
    alone = cli("parity", b, b, "--gates", "as-is", *options)
    document = check_document(alone, "parity")
    assert (alone.code, document["verdict"], alone.codes) == (3, "incomplete", ["FC482"])
    assert "all 4 gates are 0" in document["findings"][0]["detail"]
    assert [one["gates"] for one in document["summary"]["passes"]] == ["as-is"]
    both = cli("parity", b, b, *options)
    assert (both.code, both.codes) == (0, ["FC485"])
    assert both.document["findings"][0]["severity"] == "info"
    forced = cli("parity", b, b, "--gates", "forced", *options)
    assert forced.code == 0
    assert [one["gates"] for one in forced.document["summary"]["passes"]] == ["forced"]

    def one_open(state: dict[str, Any]) -> dict[str, Any]:
        key = next(name for name in state if name.endswith("attn_gate"))
        return {**closed(state), key: state[key]}

    other = cli("parity", pair.planted(one_open), sides.folder / "planted", *options)
    assert (other.code, other.codes) == (0, ["FC485"])
    assert "3 of 4 gates are 0" in other.document["findings"][0]["detail"]


def test_a_fault_before_closed_gates_is_1_and_not_3(sides: Sides) -> None:
    """What did run and was bad is the answer."""
    pair = sides.flamingo("llama")
    reference = zoo.save_folder(
        closed(pair.state),
        json.loads((pair.b / "config.json").read_text()),
        sides.folder / "closed",
    )
    key = "lang_encoder.model.norm.weight"
    b = pair.planted(lambda state: {**closed(state), key: -state[key]})
    outcome = cli("parity", reference, b, "--gates", "as-is", "--greedy", "0", "--json")
    assert outcome.code == 1
    assert {"FC301", "FC480", "FC482", "FC483"} == set(outcome.codes)


# --- what cannot be answered ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--device", "abacus"), "FC006"),
        (("--device", "mps"), "FC006"),
        (("--device", "meta"), "FC006"),
        (("--device", "cpu:x"), "FC006"),
        (("--gates", "half"), "FC006"),
        (("--gates", ""), "FC006"),
        (("--gates", "as-is,"), "FC006"),
        (("--gates", "as-is;forced"), "FC006"),
        (("--gates", "forced"), "FC006"),  # CLIP has none
        (("--gates", "as-is,forced"), "FC006"),
        (("--dtype", "int8"), "FC006"),
        (("--seed", "-1"), "FC006"),
        (("--greedy", "-1"), "FC006"),
        (("--max-memory", "much"), "FC006"),
        (("--reference", "open-flamingo"), "FC006"),  # it computes no CLIP
        (("--reference", "somebody"), "FC006"),
        (("--inputs", "x.safetensors", "--image", "cat.png"), "FC006"),
        (("--inputs", "x.safetensors", "--prompt", "a cat"), "FC006"),
        (("--inputs", "x.safetensors", "--prompt", ""), "FC006"),
        (("--tokenizer", "here"), "FC006"),
        (("--inputs", "absent.safetensors"), "FC002"),
        (("--config", "absent.json"), "FC404"),
        (("--frobnicate",), "FC006"),
    ],
)
def test_what_is_asked_for_cannot_be_done(
    options: tuple[str, ...], code: str, sides: Sides, scratch: Path
) -> None:
    pair = sides.clip()
    config = () if "--config" in options else pair.options
    outcome = cli("parity", pair.a, pair.b, *config, *options, "--json")
    check_document(outcome, "parity")
    assert (outcome.code, outcome.err, outcome.codes) == (2, "", [code])
    assert list(scratch.iterdir()) == []
    plain = cli("parity", pair.a, pair.b, *config, *options)
    assert (plain.code, plain.out) == (2, "")
    assert plain.err.startswith("error: ")
    assert "Traceback" not in plain.err


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_places_are_wanted(count: int) -> None:
    outcome = cli("parity", *["x"] * count, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC006"])


def test_two_kinds_of_model(sides: Sides) -> None:
    for a, b in (
        (sides.clip().b, sides.paligemma_folder(1, "L4")),
        (sides.flamingo("llama").b, sides.clip().b),
    ):
        outcome = cli("parity", a, b, "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC416"])
        assert "model" in outcome.document["findings"][0]["detail"]


def test_a_model_that_is_not_computed_here(sides: Sides, tmp_path: Path) -> None:
    """Of another family, and one whose attention no Flamingo has."""
    idefics = zoo.save_safetensors(zoo.idefics(), tmp_path / "idefics.safetensors")
    for path in (idefics, FIXTURES / "tiny.safetensors"):
        outcome = cli("parity", path, path, "--json")
        check_document(outcome, "parity")
        assert outcome.code == 2
        assert outcome.codes[0] in ("FC411", "FC416")


def test_the_config_of_another_kind(sides: Sides) -> None:
    pair = sides.clip()
    config = sides.paligemma_folder(1, "L4") / "config.json"
    outcome = cli("parity", pair.a, pair.b, "--config", config, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC416"])
    assert outcome.document["where"] == str(config)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("damage", ["cut", "empty", "absent"])
def test_a_file_that_cannot_be_read(
    side: str, damage: str, sides: Sides, scratch: Path, tmp_path: Path
) -> None:
    pair = sides.clip()
    broken = tmp_path / "broken.safetensors"
    if damage != "absent":
        whole = (pair.b / "model.safetensors").read_bytes()
        broken.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    a, b = (broken, pair.b) if side == "a" else (pair.b, broken)
    outcome = cli("parity", a, b, "--json")
    check_document(outcome, "parity")
    assert (outcome.code, outcome.document["verdict"]) == (2, "error")
    assert outcome.document["where"] == str(broken)
    assert list(scratch.iterdir()) == []


def test_a_torch_file_with_a_flipped_bit(sides: Sides, scratch: Path, tmp_path: Path) -> None:
    """torch itself loads it without a word; the checksum of its archive tells."""
    pair = sides.clip()
    raw = bytearray(pair.a.read_bytes())
    state = zoo.clip(layers=2).open_clip
    place = raw.index(state["visual.proj"].numpy().tobytes()[:64])
    raw[place + 20] ^= 0x10
    torn = tmp_path / "torn.pt"
    torn.write_bytes(raw)
    outcome = cli("parity", pair.b, torn, *pair.options, "--json")
    check_document(outcome, "parity")
    assert (outcome.code, outcome.codes) == (2, ["FC105"])
    assert outcome.document["where"].startswith(str(torn))
    assert list(scratch.iterdir()) == []


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def other(name: str, value: object, section: str | None = None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads(path.read_text())
        (config if section is None else config[section])[name] = value
        path.write_text(json.dumps(config))

    return change


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut, id="cut off"),
        pytest.param(other("model_type", "gptj", "text_config"), id="another family"),
        pytest.param(other("vision_tokens", "sideways"), id="unknown setting"),
    ],
)
def test_a_config_that_does_not_serve_is_not_replaced_by_the_other_sides(
    damage: Callable[[Path], None], side: str, sides: Sides
) -> None:
    """It lies beside the weights and nothing can be loaded with it: that is no pass."""
    pair = sides.flamingo("llama")
    b = pair.planted()
    damage(b / "config.json")
    a, b = (pair.b, b) if side == "B" else (b, pair.b)
    outcome = cli("parity", a, b, "--gates", "as-is", "--greedy", "0", "--json")
    assert outcome.code in (1, 2), outcome.document["findings"]
    assert not any("has no config" in one["detail"] for one in outcome.document["findings"])


def test_no_config_anywhere(sides: Sides, tmp_path: Path) -> None:
    model = zoo.clip(layers=2)
    bare = zoo.save_safetensors(model.hf, tmp_path / "bare.safetensors")
    outcome = cli("parity", sides.clip().a, bare, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC421"])
    assert "--config" in outcome.document["findings"][0]["hint"]


def test_a_reference_that_does_not_fit_its_own_config(sides: Sides) -> None:
    pair = sides.flamingo("llama")
    key = embedding("llama").replace("embed_tokens", "norm")
    a = pair.planted(lambda state: state.pop(key) is None or None)
    outcome = cli("parity", a, pair.b, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC430"])
    assert outcome.document["where"] == str(a)
    (finding,) = outcome.document["findings"]
    assert finding["key"] == key
    assert "A is the reference" in finding["hint"]


def test_a_layout_that_it_does_not_have(sides: Sides) -> None:
    outcome = asked(sides.clip(), "--from", "hf-clip")
    assert outcome.code == 2
    assert asked(sides.clip(), "--from", "open_clip").code == 0


# --- the document ---------------------------------------------------------------------------------


def test_the_fields_of_the_document(sides: Sides, scratch: Path) -> None:
    pair = sides.flamingo("llama")
    before = tree(sides.folder)
    outcome = asked(pair, "--dtype", "float32", "--dtype", "bfloat16", "--greedy", "3")
    document = outcome.document
    assert set(document) == TOP_FIELDS
    assert set(document["summary"]) == {"passes", "layers"}
    passes = document["summary"]["passes"]
    assert [(one["dtype"], one["gates"]) for one in passes] == [
        *(("float32", "as-is"), ("float32", "forced")),
        *(("bfloat16", "as-is"), ("bfloat16", "forced")),
    ]
    for one in passes:
        assert set(one) == PASS_FIELDS
        decides = one["dtype"] == "float32"
        assert (one["decides"], one["agrees"]) == (decides, True if decides else None)
        assert one["first_divergence"] is None
        assert 0 <= one["max_rel"] < 0.1
        assert one["cosine"] == pytest.approx(1, abs=1e-2)
        assert 0 <= one["argmax_agreement"] <= 1
    assert [layer["stage"] for layer in document["summary"]["layers"]] == list(FLAMINGO_STAGES)
    for layer in document["summary"]["layers"]:
        assert set(layer) == {"stage", "module", "passes"}
        assert len(layer["module"]) == 2
        assert len(layer["passes"]) == len(passes)
        for cell, one in zip(layer["passes"], passes, strict=True):
            more = {"argmax_agreement", "kl"} if layer["stage"] == "logits" else set()
            assert set(cell) == CELL_FIELDS | more
            assert (cell["tolerance"] is None) == (not one["decides"])
            assert cell["rel"] <= one["max_rel"]
    assert set(document["parameters"]) == {
        *("compared", "equal", "cast", "different", "only_a", "only_b"),
    }
    assert set(document["greedy"]) == {"a", "b", "equal", "note"}
    assert document["greedy"]["a"] == document["greedy"]["b"]
    assert len(document["greedy"]["a"]) == 3
    assert document["data"]["seed"] == 0
    assert len(document["data"]["sha256"]) == 64
    assert [one["name"] for one in document["data"]["tensors"]] == [
        *("vision_x", "lang_x", "attention_mask"),
    ]
    first, second = document["sides"]
    assert (first["uri"], second["uri"]) == (str(pair.a), str(pair.b))
    assert first["bases"] == [str(pair.options[1]), str(pair.options[3])]
    assert second["bases"] == []
    assert second["config"].endswith("config.json")
    assert document["judgement"]["factor"] == 8
    assert document["judgement"]["gate_value"] == 0.5
    assert document["environment"]["torch"] == torch.__version__
    assert tree(sides.folder) == before
    assert list(scratch.iterdir()) == []


def test_the_fields_of_blame(sides: Sides) -> None:
    pair = sides.clip()
    document = asked(pair, b=faulty(pair)).document
    (blame,) = document["blame"]
    assert set(blame) == {"stage", "gates", "tensors", "suspect", "confirmed", "tried"}
    assert blame["tensors"] == [
        {"canonical": "logit_scale", "a": "logit_scale", "b": "logit_scale"}
    ]
    assert blame["confirmed"] is True
    assert all(set(one) == {"suspect", "rel", "agrees"} for one in blame["tried"])
    (different,) = document["parameters"]["different"]
    assert different["canonical"] == "logit_scale"
    assert document["parameters"]["compared"] == document["parameters"]["equal"] + 1
    (only,) = [one for one in document["summary"]["layers"] if not one["passes"][0]["agrees"]]
    assert only["stage"] == document["summary"]["passes"][0]["first_divergence"] == "logits"


def test_numbers_that_are_none_are_strings(sides: Sides) -> None:
    pair = sides.clip()
    b = pair.planted(lambda state: state.update(logit_scale=torch.tensor(float("nan"))))
    outcome = asked(pair, b=b)
    assert outcome.code == 1
    json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (one,) = outcome.document["summary"]["passes"]
    assert (one["max_rel"], one["first_divergence"]) == ("nan", "logits")
    (cell,) = outcome.document["summary"]["layers"][-1]["passes"]
    assert (cell["rel"], cell["num_bad"], cell["agrees"]) == ("nan", 9, False)


def test_a_report_is_written_beside_the_answer(sides: Sides, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    outcome = asked(sides.clip(), "--output", report)
    assert outcome.code == 0
    written = json.loads(report.read_text())
    assert {**written, "duration_seconds": 0} == {**outcome.document, "duration_seconds": 0}


def test_the_same_seed_gives_the_same_inputs(sides: Sides) -> None:
    pair = sides.clip()
    documents = [asked(pair, "--seed", seed).document for seed in (0, 5, 5)]
    digests = [one["data"]["sha256"] for one in documents]
    assert digests[0] != digests[1] == digests[2]
    assert [one["data"]["seed"] for one in documents] == [0, 5, 5]
    assert documents[1]["summary"] == documents[2]["summary"]
    assert documents[0]["summary"] != documents[1]["summary"]


def test_the_order_of_gates_and_dtypes_is_ours(sides: Sides) -> None:
    pair = sides.flamingo("opt")
    options = ("--gates", "forced, as-is,forced", "--dtype", "float32", "--dtype", "float32")
    passes = asked(pair, *options, "--greedy", "0").document["summary"]["passes"]
    assert [(one["gates"], one["dtype"]) for one in passes] == [
        *(("as-is", "float32"), ("forced", "float32")),
    ]


def test_inputs_of_ones_own(sides: Sides, tmp_path: Path) -> None:
    pair = sides.clip()
    path = tmp_path / "inputs.safetensors"
    words = torch.randint(1, 98, (2, 12))
    words[:, -1] = 98
    own = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": words}
    save_file(own, path)
    document = asked(pair, "--inputs", path).document
    assert document["verdict"] == "pass"
    assert [one["stage"] for one in document["summary"]["layers"]] == list(CLIP_STAGES)
    data = document["data"]
    assert (data["source"], data["seed"]) == (str(path), None)
    assert {one["name"]: one["shape"] for one in data["tensors"]} == {
        "image": [2, 3, 32, 32],
        "text": [2, 12],
    }
    save_file({**own, "input_ids": words + 50}, path)
    outcome = cli("parity", pair.a, pair.b, *pair.options, "--inputs", path, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC484"])
    assert outcome.document["where"] == str(path)


# --- what is left behind --------------------------------------------------------------------------


def test_a_check_that_breaks_off_leaves_nothing(
    sides: Sides, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flamingo_ckpt.parity import check

    seen: list[list[Path]] = []

    def broken(*_: object) -> None:
        seen.append(list(scratch.rglob("*.trace")))
        raise KeyboardInterrupt

    pair = sides.clip()
    before = tree(sides.folder)
    monkeypatch.setattr(check, "compare_parameters", broken)
    outcome = cli("parity", pair.a, pair.b, *pair.options, "--json")
    assert outcome.code == 130
    assert len(seen[0]) == 1  # there was something to leave
    assert list(scratch.iterdir()) == []
    assert tree(sides.folder) == before


def test_a_file_that_is_changed_while_it_is_compared(
    sides: Sides, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer would be about weights that are there no more."""
    from flamingo_ckpt.parity import check

    model = zoo.clip(layers=2)
    b = zoo.save_folder(model.hf, model.config, tmp_path / "b")
    compare = check.compare_parameters

    def changing(*both: Any) -> Any:
        found = compare(*both)
        zoo.save_safetensors(
            {**model.hf, "logit_scale": torch.tensor(9.0)}, b / "other.safetensors"
        )
        (b / "other.safetensors").rename(b / "model.safetensors")
        return found

    monkeypatch.setattr(check, "compare_parameters", changing)
    pair = sides.clip()
    outcome = cli("parity", pair.a, b, *pair.options, "--json")
    assert outcome.code == 2
    assert outcome.document["where"] is not None
    assert list(scratch.iterdir()) == []
