"""What convert --to refuses: with the right code, the key and a way on, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CODES
from tests import zoo
from tests.support import Outcome, cli, cli_ok, facts_at, names_in


class Refusals:
    """Files of the zoo, and a conversion that has to be refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = zoo.openflamingo("llama")

    def save(self, name: str, state: Mapping[str, Any]) -> Path:
        path = self.folder / f"{name}.pt"
        return path if path.exists() else zoo.save_torch(state, path)

    def config(self, name: str = "config", **changes: Any) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(self.model.config | changes))
        return path

    @property
    def partial(self) -> Path:
        return self.save("partial", self.model.partial)

    @property
    def bases(self) -> list[Any]:
        clip = self.save("clip", self.model.clip)
        return ["--base-vision", clip, "--base-language", self.save("lm", self.model.language)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    return Refusals(tmp_path_factory.mktemp("refusals"))


def refused(code: str, folder: Path, src: Path, *options: Any, to: str = "hf-flamingo") -> Any:
    """The one finding of a conversion into `folder`, which stays empty."""
    outcome: Outcome = cli("convert", src, folder / "dst", "--to", to, *options, "--json")
    assert outcome.code == 2, outcome
    (finding,) = outcome.document["findings"]
    assert finding["code"] == code, finding
    assert finding["title"] == CODES[code]
    assert outcome.document["verdict"] == "error"
    assert names_in(folder) == []
    people = cli("convert", src, folder / "dst", "--to", to, *options)
    assert people.code == 2
    assert people.err.startswith("error: ")
    assert "Traceback" not in people.err
    assert len(people.err) < 3000
    return finding


# -- names and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("hf-flaming", "hf-flamingo"), ("openflamingo-v3", "openflamingo-v1")]
)
def test_an_unknown_layout(files: Refusals, name: str, near: str, tmp_path: Path) -> None:
    finding = refused("FC410", tmp_path, files.partial, to=name)
    assert f"there is no layout `{name}`" in finding["detail"]
    assert finding["hint"] == f"did you mean `{near}`?"
    refused("FC410", tmp_path, files.partial, "--from", name)


def test_a_key_that_no_rule_knows(files: Refusals, tmp_path: Path) -> None:
    state = files.model.partial | {"perceiver.layers.0.0.to_qq.weight": torch.ones(2)}
    src = files.save("stranger", state)
    finding = refused("FC413", tmp_path, src)
    assert "1 of 93 keys fit no rule of `openflamingo (llama)`" in finding["detail"]
    assert finding["key"] == "perceiver.layers.0.0.to_qq.weight"
    assert "--exclude" in finding["hint"]
    cli_ok("convert", src, tmp_path / "dst", "--to", "hf-flamingo", "--exclude", "*to_qq*")


def test_many_keys_are_named_in_short(files: Refusals, tmp_path: Path) -> None:
    state = files.model.partial | {f"ema.{i}": torch.ones(1) for i in range(50)}
    finding = refused("FC413", tmp_path, files.save("strangers", state))
    assert "50 of 142 keys" in finding["detail"]
    assert "and 40 more" in finding["detail"]


@pytest.mark.parametrize(
    "name", ["a#.#.w", "perceiver.layers.#.0.to_q.weight", "x" * 5000, "é" * 99, "q.\u0663.w"]
)
def test_hostile_keys(files: Refusals, name: str, tmp_path: Path) -> None:
    state = files.model.partial | {name: torch.ones(1)}
    src = zoo.save_torch(state, tmp_path / "src.pt")
    outcome = cli("convert", src, tmp_path / "dst", "--to", "hf-flamingo", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC413"])
    cli_ok("inspect", src)


def test_half_one_layout_and_half_another(files: Refusals, tmp_path: Path) -> None:
    theirs = zoo.hf_flamingo("llama").state
    halves = {n: t for n, t in theirs.items() if n.startswith("perceiver.layers.0.")}
    src = files.save("halves", files.model.partial | halves)
    finding = refused("FC417", tmp_path, src)
    assert "92 of 103 keys are `openflamingo (llama)`" in finding["detail"]
    assert "and 11 are `hf-flamingo`" in finding["detail"]
    assert finding["key"] in theirs
    assert "--exclude" in finding["hint"]


def test_nothing_that_is_known(tmp_path: Path) -> None:
    src = zoo.save_torch({"a": torch.ones(1), "b.c": torch.ones(1)}, tmp_path / "in" / "src.pt")
    (tmp_path / "out").mkdir()
    finding = refused("FC411", tmp_path / "out", src)
    assert "`a`, `b.c`" in finding["detail"]


def test_idefics_is_no_flamingo(files: Refusals, tmp_path: Path) -> None:
    src = files.save("idefics", zoo.idefics())
    for finding in (
        refused("FC416", tmp_path, src),
        refused("FC416", tmp_path, files.partial, to="idefics"),
    ):
        assert "not interchangeable" in finding["detail"]
        assert "Idefics is another model" in finding["detail"]


def test_another_kind_of_model(files: Refusals, tmp_path: Path) -> None:
    finding = refused("FC416", tmp_path, files.partial, to="hf-clip")
    assert "`openflamingo` names the tensors of a flamingo model" in finding["detail"]
    assert "`hf-clip` those of a clip model" in finding["detail"]
    clip = files.save("clip", files.model.clip)
    refused("FC416", tmp_path, clip, "--config", files.config(), to="hf-clip")


def test_layouts_that_are_only_read(files: Refusals, tmp_path: Path) -> None:
    clip = files.save("clip", files.model.clip)
    finding = refused("FC416", tmp_path, clip, to="hf-clip-text")
    assert "is read and never written" in finding["detail"]
    gemma = files.save("gemma", zoo.paligemma().layout("L1"))
    refused("FC416", tmp_path, gemma, to="paligemma-peft")


# -- against the model ---------------------------------------------------------------------------


@pytest.mark.parametrize(("every_n", "told"), [(1, "0, 1, 2, 3"), (3, "2"), (4, "3")])
@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_interval(
    files: Refusals, every_n: int, told: str, whole: bool, tmp_path: Path
) -> None:
    config = files.config(f"every-{every_n}", cross_attn_every_n_layers=every_n)
    bases = files.bases if whole else []
    finding = refused("FC217", tmp_path, files.partial, "--config", config, *bases)
    assert finding["detail"] == (
        "gated cross-attention stands before the decoder layers 1, 3, and by the config before "
        + told
    )
    assert "cross_attn_every_n_layers" in finding["hint"]


@pytest.mark.parametrize("key", ["perceiver.norm.weight", "perceiver.layers.2.0.to_kv.weight"])
def test_a_key_that_is_missing(files: Refusals, key: str, tmp_path: Path) -> None:
    state = files.model.partial
    del state[key]
    src = zoo.save_torch(state, files.folder / f"without-{key}.pt")
    for bases in ([], files.bases):
        finding = refused("FC203", tmp_path, src, "--config", files.config(), *bases)
        assert finding["key"] == key.replace(".0.to_kv", ".to_kv")
        assert "and neither the checkpoint nor a base supplies it" in finding["detail"]


def test_a_base_that_is_cut_short(files: Refusals, tmp_path: Path) -> None:
    state = files.model.language
    del state["model.layers.2.mlp.up_proj.weight"]
    base = ["--base-language", files.save("short", state)]
    finding = refused("FC203", tmp_path, files.partial, "--config", files.config(), *base)
    assert "lang_encoder.model.layers.2.decoder_layer.mlp.up_proj.weight" in finding["detail"]


def test_what_a_base_supplies_is_absent_by_design(files: Refusals, tmp_path: Path) -> None:
    config = ["--config", files.config()]
    outcome = cli_ok(
        "convert", files.partial, tmp_path / "a", "--to", "hf-flamingo", *config, "--json"
    )
    assert outcome.document["summary"]["expected_absent"] == 185 - 92
    outcome = cli_ok(
        *("convert", files.partial, tmp_path / "b", "--to", "hf-flamingo", *config, "--json"),
        *files.bases[:2],
    )
    assert outcome.document["summary"]["expected_absent"] == 38


def test_a_key_that_the_model_lacks(files: Refusals, tmp_path: Path) -> None:
    state = files.model.partial
    deeper = {n.replace("layers.5", "layers.6"): t for n, t in state.items() if "layers.5" in n}
    src = files.save("deeper", state | deeper)
    finding = refused("FC204", tmp_path, src, "--config", files.config())
    assert "the model has no `perceiver.layers.6." in finding["detail"]


def test_a_config_that_contradicts_the_shapes(files: Refusals, tmp_path: Path) -> None:
    config = files.config("latents", perceiver_num_latents=32)
    finding = refused("FC205", tmp_path, files.partial, "--config", config)
    assert finding["detail"] == "`perceiver.latents` is 64x64, and the model's is 32x64"
    assert str(config) in finding["hint"]
    text = files.model.config["text_config"] | {"vocab_size": 97}
    config = files.config("rows", text_config=text)
    finding = refused("FC205", tmp_path, files.partial, "--config", config)
    assert "is 96x48, and the model's is 97x48" in finding["detail"]


def test_a_config_that_is_given_is_held_against_a_file_that_stays(
    files: Refusals, tmp_path: Path
) -> None:
    src = files.folder / "same.safetensors"
    if not src.exists():
        cli_ok("convert", files.partial, src, "--to", "hf-flamingo")
    wrong = files.config("every-1", cross_attn_every_n_layers=1)
    refused("FC217", tmp_path, src, "--config", wrong)
    cli_ok("convert", src, tmp_path / "dst", "--to", "hf-flamingo", "--config", files.config())
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["text_config"] == json.loads(files.config().read_text())["text_config"]
    assert config["flamingo_ckpt"] == {"partial": True}


def test_a_whole_folder_without_a_config(files: Refusals, tmp_path: Path) -> None:
    finding = refused("FC421", tmp_path, files.partial, *files.bases)
    assert "heads, activation, epsilon" in finding["detail"]
    assert "--config" in finding["hint"]
    assert ".safetensors" in finding["hint"]
    cli_ok(
        *("convert", files.partial, tmp_path / "a.safetensors", "--to", "hf-flamingo"),
        *files.bases,
    )


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "FC401"),
        ("[]", "FC401"),
        ('{"model_type": "flamingo"}', "FC401"),
        ('{"model_type": "t5"}', "FC403"),
    ],
)
def test_a_config_that_is_none(files: Refusals, content: str, code: str, tmp_path: Path) -> None:
    config = files.folder / "broken.json"
    config.write_text(content)
    refused(code, tmp_path, files.partial, "--config", config)
    refused("FC404", tmp_path, files.partial, "--config", files.folder / "nowhere.json")


# -- bases ---------------------------------------------------------------------------------------


def lm(files: Refusals, hidden: int = 48, layers: int = 4) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=93,
        hidden_size=hidden,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    path = files.folder / f"llama-{hidden}-{layers}.pt"
    return zoo.save_torch(transformers.LlamaForCausalLM(config).state_dict(), path)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("size", "told"),
    [
        ({"hidden": 64}, "was trained on a language model of width 48, the base's is 64"),
        ({"layers": 2}, "before layer 3 at last, and the base has 2 layers"),
        ({"layers": 8}, "before layer 3 at last, and the base has 8 layers"),
    ],
)
def test_a_language_model_of_another_size(
    files: Refusals, size: dict[str, int], told: str, with_config: bool, tmp_path: Path
) -> None:
    options = ["--config", files.config()] if with_config else []
    finding = refused(
        "FC420", tmp_path, files.partial, *options, "--base-language", lm(files, **size)
    )
    assert told in finding["detail"]
    assert finding["hint"] == "name the release that the checkpoint was trained on"


def test_a_tower_of_another_width(files: Refusals, tmp_path: Path) -> None:
    clip = files.model.clip | {"visual.class_embedding": torch.randn(32)}
    src = files.save("narrow", clip)
    finding = refused("FC420", tmp_path, files.partial, "--base-vision", src)
    assert "was trained on a vision model of width 64, the base's is 32" in finding["detail"]


def test_a_language_model_of_another_family(files: Refusals, tmp_path: Path) -> None:
    base = files.save("opt", zoo.openflamingo("opt").language)
    finding = refused("FC420", tmp_path, files.partial, "--base-language", base)
    assert finding["detail"] == "the checkpoint's language model is llama, the base's is opt"
    # and where the keys leave two families open, both are named
    mpt = files.save("mpt", zoo.openflamingo("mpt7b", era="2023").partial)
    finding = refused("FC420", tmp_path, mpt, "--base-language", base)
    assert "mosaic_gpt or mpt, the base's is opt" in finding["detail"]


def test_a_config_of_another_family(files: Refusals, tmp_path: Path) -> None:
    config = files.folder / "opt.json"
    config.write_text(json.dumps(zoo.openflamingo("opt").config))
    finding = refused("FC204", tmp_path, files.partial, "--config", config)
    told = "the checkpoint's language model is llama, and the config's is opt"
    assert finding["detail"] == told


def test_bases_that_were_swapped(files: Refusals, tmp_path: Path) -> None:
    _, clip, _, language = files.bases
    finding = refused("FC420", tmp_path, files.partial, "--base-vision", language)
    assert "--base-vision is `language-model (llama)`" in finding["detail"]
    assert "open_clip" in finding["hint"]
    finding = refused("FC420", tmp_path, files.partial, "--base-language", clip)
    assert "--base-language is `open_clip`" in finding["detail"]


def test_a_base_with_keys_that_no_rule_knows(files: Refusals, tmp_path: Path) -> None:
    base = files.save("odd", files.model.language | {"model.layers.0.adapter": torch.ones(1)})
    finding = refused("FC413", tmp_path, files.partial, "--base-language", base)
    assert finding["key"] == "model.layers.0.adapter"


# -- two sources for one tensor ------------------------------------------------------------------


def test_two_copies_of_a_key(files: Refusals, tmp_path: Path) -> None:
    state = files.model.partial
    state |= {f"module.{n}": t + 1 for n, t in state.items() if n == "perceiver.latents"}
    finding = refused("FC202", tmp_path, files.save("copies", state))
    assert "two source keys map to `perceiver.latents`" in finding["detail"]


@pytest.mark.parametrize(
    "tree", ["old_decoder_blocks.2.mlp.up_proj", "gated_cross_attn_layers.1.attn.to_q"]
)
def test_alias_trees_that_differ(files: Refusals, tree: str, tmp_path: Path) -> None:
    state, key = files.model.full, f"lang_encoder.{tree}.weight"
    other = state[key].clone()
    src = zoo.save_torch(state | {key: other}, files.folder / "equal.pt")
    cli_ok("convert", src, tmp_path / "a.safetensors", "--to", "hf-flamingo")
    (tmp_path / "a.safetensors").unlink()
    other[0, 0] += 1
    src = zoo.save_torch(state | {key: other}, files.folder / "differ.pt")
    finding = refused("FC202", tmp_path, src, "--config", files.config())
    assert "are two names of one tensor, and differ" in finding["detail"]
    assert key in finding["detail"]
    assert "--exclude" in finding["hint"]
    outcome = cli("verify", src, src, "--to", "hf-flamingo")
    assert outcome.code == 2
    assert "FC202" not in outcome.out


def test_two_names_of_one_read_key(tmp_path: Path) -> None:
    """`embed_out` and `lm_head` of one GPT-NeoX have to be one tensor."""
    state = zoo.openflamingo("gpt_neox").full
    head = state["lang_encoder.lm_head.weight"]
    both = state | {"lang_encoder.embed_out.weight": head + 1}
    src = zoo.save_torch(both, tmp_path / "in" / "a.pt")
    (tmp_path / "out").mkdir()
    refused("FC202", tmp_path / "out", src, to="openflamingo")
    both["lang_encoder.embed_out.weight"] = head
    src = zoo.save_torch(both, tmp_path / "in" / "b.pt")
    cli_ok("convert", src, tmp_path / "out" / "b.safetensors", "--to", "hf-flamingo")


# -- shapes and options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "told"), [((1023, 64), "an axis of 1023 cannot be divided by 2"), ((64,), "2 axes")]
)
def test_a_shape_that_no_layout_gives(
    files: Refusals, shape: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    key = "perceiver.layers.0.0.to_kv.weight"
    src = zoo.save_torch(
        files.model.partial | {key: torch.ones(shape)}, files.folder / f"bent{len(shape)}.pt"
    )
    finding = refused("FC415", tmp_path, src)
    assert finding["key"] == key
    assert told in finding["detail"]


def test_an_empty_tensor_comes_out_empty(files: Refusals, tmp_path: Path) -> None:
    key = "perceiver.layers.0.0.to_kv.weight"
    state = files.model.partial | {key: torch.empty(0, 64)}
    src = zoo.save_torch(state, tmp_path / "src.pt")
    cli_ok("convert", src, tmp_path / "dst.safetensors", "--to", "hf-flamingo")
    assert facts_at(tmp_path / "dst.safetensors")["perceiver.layers.0.to_kv.weight"].data == b""


def test_options_that_need_a_target(files: Refusals, tmp_path: Path) -> None:
    for options in (
        ["--from", "openflamingo"],
        ["--vocab-rows", "9"],
        ["--config", str(files.config())],
        files.bases[:2],
    ):
        outcome = cli("convert", files.partial, tmp_path / "dst", *options, "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC006"])
        assert str(options[0]) in outcome.document["findings"][0]["detail"]
    assert names_in(tmp_path) == []


def test_from_helps_where_the_evidence_is_thin(tmp_path: Path) -> None:
    """Three keys that say nothing of their own, read as the layout that is named."""
    state = {f"perceiver.{n}": torch.randn(4, 4) for n in ("frame_embs", "media_time_embs")}
    src = zoo.save_torch(state, tmp_path / "src.pt")
    for name in ("openflamingo", "hf-flamingo"):
        dst = tmp_path / f"{name}.safetensors"
        cli_ok("convert", src, dst, "--from", name, "--to", "openflamingo-full")
        assert facts_at(dst).keys() == state.keys()
    outcome = cli(
        "convert", src, tmp_path / "x", "--from", "open_clip", "--to", "hf-clip", "--json"
    )
    assert (outcome.code, outcome.codes) == (2, ["FC413"])


def test_the_name_of_a_file_says_nothing(files: Refusals, tmp_path: Path) -> None:
    clip = zoo.save_torch(files.model.clip, tmp_path / "openflamingo-9b.hf-flamingo.pt")
    outcome = cli_ok("convert", clip, tmp_path / "out.safetensors", "--to", "hf-clip", "--json")
    assert outcome.document["layout"]["from"] == "open_clip"
