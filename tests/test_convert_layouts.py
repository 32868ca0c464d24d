"""convert --to: every layout of a Flamingo from the command line, bit for bit and back again."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.layout_support import (
    BUFFER,
    Files,
    assert_same,
    carried,
    each_model,
    metadata,
    on_disk,
    without_rows,
)
from tests.support import cli, cli_ok, facts_at, load_torch, names_in, torch_facts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("zoo"))


# -- the partial checkpoint, by itself -----------------------------------------------------------


@each_model
def test_a_partial_checkpoint_there_and_back(
    files: Files, family: str, era: str, tmp_path: Path
) -> None:
    src = files.write("partial", family, era)
    dst = tmp_path / "hf.safetensors"
    document = cli_ok("convert", src, dst, "--to", "hf-flamingo", "--json").document
    model = zoo.openflamingo(family, era=era)
    expected = on_disk(zoo.hf_flamingo(family, era=era).state)
    found = facts_at(dst)
    assert found.items() <= expected.items()
    assert len(found) == len(carried(model.partial))
    assert document["partial"]
    assert document["layout"]["from"] == "openflamingo"
    assert document["summary"]["verified"] == len(found)
    cli_ok("verify", src, dst)
    cli_ok("convert", dst, tmp_path / "back.pt", "--to", "openflamingo")
    assert_same(facts_at(tmp_path / "back.pt"), carried(model.partial))
    for name in set(torch_facts(model.partial)) - set(carried(model.partial)):
        reasons = [f["detail"] for f in document["findings"] if f["key"] == name]
        assert reasons == [
            f"`{name}` is left out: computed from the config when the model is built"
        ]


def test_a_partial_folder_says_what_it_does_not_know(files: Files, tmp_path: Path) -> None:
    src = files.write("partial", "llama")
    document = cli_ok("convert", src, tmp_path / "hf", "--to", "hf-flamingo", "--json").document
    assert names_in(tmp_path / "hf") == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "flamingo"
    assert config["cross_attn_every_n_layers"] == 2
    assert config["text_config"]["vocab_size"] == 96
    assert config["text_config"]["hidden_size"] == 48
    told = config["flamingo_ckpt"]
    assert told["partial"] is True
    assert "text_config.num_attention_heads" in told["unknown"]
    assert "num_attention_heads" not in config["text_config"]
    (note,) = [f for f in document["findings"] if f["code"] == "FC421"]
    assert "--config" in note["hint"]
    assert metadata(tmp_path / "hf")["flamingo_ckpt.partial"] == "true"


# -- the self-contained folder -------------------------------------------------------------------


# -- the whole state dict ------------------------------------------------------------------------


@each_model
def test_the_whole_state_dict_there_and_back(
    files: Files, family: str, era: str, tmp_path: Path
) -> None:
    src, hf = files.write("full", family, era), tmp_path / "hf"
    model = zoo.openflamingo(family, era=era)
    document = cli_ok(
        *("convert", src, hf, "--to", "hf-flamingo", "--config", files.config(family), "--json")
    ).document
    assert_same(facts_at(hf), on_disk(zoo.hf_flamingo(family, era=era).state))
    (proj,) = [f for f in document["findings"] if f["key"] == "vision_encoder.proj"]
    assert proj["code"] == "FC209"
    cli_ok("verify", src, hf)
    back = tmp_path / "back.pt"
    clip = files.write("clip", family, era)
    more = ["--base-vision", clip, "--config", files.config(family)]
    cli_ok("convert", hf, back, "--to", "openflamingo-full", *more)
    assert_same(facts_at(back), carried(model.full))
    # and the aliases share their storage again, as torch.save has it
    pointers = {t.data_ptr() for t in load_torch(back).values()}
    state = {n: t for n, t in model.full.items() if not BUFFER.search(n)}
    assert len(pointers) == len({t.data_ptr() for t in state.values()})


def test_upstream_loads_what_was_converted_and_computes_the_same(
    files: Files, tmp_path: Path
) -> None:
    import torch

    back = tmp_path / "back.pt"
    cli_ok(
        *("convert", files.write("full", "llama"), tmp_path / "hf.safetensors"),
        *("--to", "hf-flamingo"),
    )
    cli_ok(
        *("convert", tmp_path / "hf.safetensors", back, "--to", "openflamingo-full"),
        *("--base-vision", files.write("clip", "llama")),
    )
    source = zoo.openflamingo("llama")
    model = copy.deepcopy(zoo.openflamingo("llama", seed=3).model).double()
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in source.inputs().items()}
    model.load_state_dict(load_torch(back), strict=True)
    with torch.no_grad():
        found = model(**inputs).logits
        wanted = copy.deepcopy(source.model).double()(**inputs).logits
    assert (found - wanted).abs().max() == 0


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_a_whole_state_dict_becomes_a_release(files: Files, family: str, tmp_path: Path) -> None:
    """What is frozen is left out with reasons, by upstream's own rule."""
    src, dst = files.write("full", family, "2023"), tmp_path / "partial.pt"
    document = cli_ok("convert", src, dst, "--to", "openflamingo", "--json").document
    assert_same(facts_at(dst), carried(zoo.openflamingo(family, era="2023").partial))
    reasons = {f["key"]: f["detail"] for f in document["findings"] if f["code"] == "FC209"}
    gone = set(zoo.openflamingo(family, era="2023").full) - {*facts_at(dst)}
    gone = {n for n in gone if not re.search(r"old_decoder|gated_cross_attn_layers", n)}
    assert gone <= {*reasons}
    assert "the frozen CLIP tower comes from its own release" in reasons["vision_encoder.proj"]


# -- other layouts of the family -----------------------------------------------------------------


def test_v1_there_and_back(tmp_path: Path) -> None:
    state = zoo.openflamingo_v1()
    src, v2, back = (tmp_path / name for name in ("v1.pt", "v2.safetensors", "back.pt"))
    zoo.save_torch(state, src, prefix="module.", wrapper="model_state_dict")
    document = cli_ok("convert", src, v2, "--to", "openflamingo", "--json").document
    assert_same(facts_at(v2), carried(zoo.openflamingo("llama").partial))
    dropped = {f["key"] for f in document["findings"] if f["code"] == "FC209"}
    assert {f"module.{name}" for name in state if BUFFER.search(name)} <= dropped
    assert document["inputs"][0]["layout"] == "openflamingo-v1"
    cli_ok("verify", src, v2)
    cli_ok("convert", v2, back, "--to", "openflamingo-v1")
    assert_same(facts_at(back), carried(state))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_next_generation_keeps_all_but_its_new_tokens(
    files: Files, family: str, tmp_path: Path
) -> None:
    state = zoo.vlm(family, whole=True)
    src, dst = tmp_path / "vlm.pt", tmp_path / "out.safetensors"
    zoo.save_torch(state, src)
    document = cli_ok("convert", src, dst, "--to", "openflamingo-full", "--json").document
    full = on_disk(zoo.openflamingo(family).full)
    embed, head = (f"lang_encoder.{zoo.FAMILIES[family][at]}.weight" for at in (1, 2))
    head = head.replace("lm_head", "embed_out") if "gpt_neox" in embed else head
    own = {embed, head, head.replace("weight", "bias")}
    found = facts_at(dst)
    assert {n: one for n, one in found.items() if n not in own}.items() <= full.items()
    assert found[embed] == torch_facts(state)[embed.replace("lang_encoder.", "lang_model.")]
    lost = {f["key"] for f in document["findings"] if f["code"] == "FC209"}
    assert {name for name in state if "additional" in name} <= lost
    # what came over goes back
    cli_ok("convert", dst, tmp_path / "back.pt", "--to", "vlm")
    back, wanted = facts_at(tmp_path / "back.pt"), torch_facts(state)
    if "gpt_neox" in embed:
        back = {n.replace("embed_out", "lm_head"): one for n, one in back.items()}
    assert back.items() <= wanted.items()
    missing = {n for n in wanted.keys() - back.keys() if "gated_cross_attn_layers" not in n}
    added = {n for n in missing if "additional" in n or n.endswith("lm_head.bias")}
    assert missing == added


@pytest.mark.parametrize("family", ["mpt7b", "llama"])
def test_many_layers(files: Files, family: str, tmp_path: Path) -> None:
    sizes = {"layers": 12, "every_n": 4, "perceiver_depth": 12}
    folder = files.whole(family, **sizes)
    found = facts_at(folder)
    wanted = carried(zoo.hf_flamingo(family, **sizes).state)
    assert found.keys() == wanted.keys()
    assert {n for n in wanted if found[n] != wanted[n]} <= {"lang_encoder.lm_head.weight"}
    assert json.loads((folder / "config.json").read_text())["perceiver_depth"] == 12
    cli_ok("convert", folder, tmp_path / "back.pt", "--to", "openflamingo")
    assert_same(facts_at(tmp_path / "back.pt"), carried(zoo.openflamingo(family, **sizes).partial))


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_both_names_of_a_gpt_neox_head_are_read(files: Files, name: str, tmp_path: Path) -> None:
    state = {
        re.sub(r"^embed_out|^lm_head", name, key): tensor
        for key, tensor in zoo.openflamingo("gpt_neox").language.items()
    }
    src = zoo.save_torch(state, tmp_path / "lm.pt")
    cli_ok(
        *("convert", files.write("partial", "gpt_neox"), tmp_path / "out", "--to", "hf-flamingo"),
        *("--config", files.config("gpt_neox"), "--base-language", src),
        *("--base-vision", files.write("clip", "gpt_neox")),
    )
    assert facts_at(tmp_path / "out") == facts_at(files.whole("gpt_neox"))


# -- what files are met with ---------------------------------------------------------------------


@pytest.mark.parametrize("src_options", [{"prefix": "module."}, {"wrapper": "model_state_dict"}])
def test_wrappers_and_prefixes(files: Files, src_options: Any, tmp_path: Path) -> None:
    src = zoo.save_torch(zoo.openflamingo("opt").partial, tmp_path / "src.pt", **src_options)
    cli_ok("convert", src, tmp_path / "a.safetensors", "--to", "hf-flamingo")
    plain = files.write("partial", "opt")
    cli_ok("convert", plain, tmp_path / "b.safetensors", "--to", "hf-flamingo")
    assert facts_at(tmp_path / "a.safetensors") == facts_at(tmp_path / "b.safetensors")


def test_a_published_port_with_all_its_quirks(tmp_path: Path) -> None:
    """`module.`, position ids, one row more, and the tower without its level."""
    for flat in (False, True):
        port = zoo.hf_flamingo(
            *("llama",),
            module_prefix=True,
            position_ids=True,
            extra_rows=1,
            flat_vision=flat,
            model_type="otter",
        )
        folder = zoo.save_folder(port.state, port.config, tmp_path / f"hf-{flat}")
        dst = tmp_path / f"{flat}.pt"
        cli_ok("convert", folder, dst, "--to", "openflamingo")
        found, wanted = facts_at(dst), carried(zoo.openflamingo("llama").partial)
        embed = "lang_encoder.model.embed_tokens.weight"
        assert found[embed].shape == (97, 48)
        found[embed] = without_rows(found[embed], 96)
        assert_same(found, wanted)


@pytest.mark.parametrize("target", ["out.pt", "out.npz", "shards", "bin"])
def test_into_every_format(files: Files, target: str, tmp_path: Path) -> None:
    options: dict[str, list[Any]] = {
        "shards": ["--max-shard-size", "100KB"],
        "bin": ["--format", "torch"],
    }
    src, dst = files.write("partial", "llama"), tmp_path / target
    more = [*files.bases("llama"), "--config", files.config("llama")]
    cli_ok("convert", src, dst, "--to", "hf-flamingo", *more, *options.get(target, []))
    assert facts_at(dst) == facts_at(files.whole("llama"))
    cli_ok("verify", src, dst, *more)
    if target == "shards":
        assert len(list(dst.glob("model-*-of-*.safetensors"))) > 5
        cli_ok("convert", dst, tmp_path / "back.pt", "--to", "openflamingo")
        assert_same(facts_at(tmp_path / "back.pt"), carried(zoo.openflamingo("llama").partial))


def test_a_cast_on_the_way(files: Files, tmp_path: Path) -> None:
    import torch

    src, dst = files.write("partial", "llama"), tmp_path / "half"
    more = [*files.bases("llama"), "--config", files.config("llama"), "--dtype", "bfloat16"]
    cli_ok("convert", src, dst, "--to", "hf-flamingo", *more)
    wanted = torch_facts(
        {
            name: torch.frombuffer(bytearray(one.data), dtype=torch.float32)
            .reshape(one.shape)
            .bfloat16()
            for name, one in facts_at(files.whole("llama")).items()
        }
    )
    assert_same(facts_at(dst), wanted)
    cli_ok("verify", src, dst, *more)
    assert cli("verify", src, dst, *more[:-2]).code == 1
    # and half of a half is the same bits in every layout
    cli_ok("convert", dst, tmp_path / "back.pt", "--to", "openflamingo")
    half = {n: t.bfloat16() for n, t in zoo.openflamingo("llama").partial.items()}
    assert_same(facts_at(tmp_path / "back.pt"), torch_facts(half))


def test_a_square_view_that_is_not_contiguous_is_turned_all_the_same(tmp_path: Path) -> None:
    """A projection that is a slice of something wider has strides of its own."""
    import torch

    clip = zoo.clip(layers=2)
    wide = torch.randn(40, 80)
    state = clip.open_clip | {"text_projection": wide[:, ::2]}
    square = state | {"text_projection": torch.randn(40, 80)[:, :40]}
    for at, one in enumerate((state, square)):
        src, dst = tmp_path / f"{at}.pt", tmp_path / f"{at}.safetensors"
        zoo.save_torch(one, src)
        options = ["--max-expansion", "4"]
        cli_ok("convert", src, dst, "--to", "hf-clip", *options)
        found = facts_at(dst)["text_projection.weight"]
        assert found == torch_facts({"x": one["text_projection"].T.contiguous()})["x"]


def test_a_file_that_is_in_the_layout_already_stays_as_it_is(files: Files, tmp_path: Path) -> None:
    src = files.whole("llama")
    document = cli_ok("convert", src, tmp_path / "out", "--to", "hf-flamingo", "--json").document
    assert "FC422" in [f["code"] for f in document["findings"]]
    assert facts_at(tmp_path / "out") == facts_at(src)
    for name in names_in(src):
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()


def test_dry_run_says_what_would_be_done(files: Files, tmp_path: Path) -> None:
    src = files.write("partial", "llama")
    more = ["--to", "hf-flamingo", *files.bases("llama"), "--config", files.config("llama")]
    dry = cli_ok("convert", src, tmp_path / "out", *more, "--dry-run", "--json").document
    assert names_in(tmp_path) == []
    plan = {row["name"]: row for row in dry["plan"]}
    assert {n: (r["dtype"], tuple(r["shape"])) for n, r in plan.items()} == {
        n: (one.dtype, one.shape) for n, one in facts_at(files.whole("llama")).items()
    }
    gate = "lang_encoder.model.layers.1.gated_cross_attn_layer.feed_forward.1.weight"
    assert plan[gate]["source"] == gate.replace("feed_forward", "ff")
    assert not plan[gate]["transformed"]
    attention = "vision_encoder.vision_model.encoder.layers.0.self_attn.k_proj.weight"
    assert plan[attention]["source"] == "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert plan[attention]["transformed"]


def test_what_goes_through_is_counted(files: Files, tmp_path: Path) -> None:
    src = files.write("partial", "mpt1b")
    more = ["--to", "hf-flamingo", "--config", files.config("mpt1b")]
    document = cli_ok("convert", src, tmp_path / "a", *more, "--json").document
    summary, state = document["summary"], zoo.openflamingo("mpt1b").partial
    hf = zoo.hf_flamingo("mpt1b").state
    assert summary["num_tensors"] == len(state)
    assert summary["renamed"] == len(state.keys() - hf.keys())
    assert summary["transformed"] == summary["cast"] == summary["dropped"] == 0
    assert summary["expected_absent"] == len(hf) - len(state)
    more += files.bases("mpt1b")
    summary = cli_ok("convert", src, tmp_path / "b", *more, "--json").document["summary"]
    assert summary["num_tensors"] == len(hf)
    assert summary["expected_absent"] == 0
    # q, k, v and their biases in each of three layers of the tower
    assert summary["transformed"] == 3 * 3 * 2
