"""layouts and layouts NAME: what is listed is what the tables do."""

from __future__ import annotations

import pytest

from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.layouts.registry import LAYOUTS
from tests.support import cli, cli_ok, cli_process, python

each_layout = pytest.mark.parametrize("name", LAYOUTS)


def test_the_list_for_people() -> None:
    outcome = cli_ok("layouts")
    for name, layout in LAYOUTS.items():
        (line,) = [one for one in outcome.out.splitlines() if one.startswith(f"  {name} ")]
        assert layout.title in line
        assert ("[" in line) == bool(layout.lossy or layout.read_only or layout.refused)
        assert ("read only" in line) == bool(layout.read_only)
        assert ("not convertible" in line) == bool(layout.refused)
    assert outcome.err == ""
    spaces = [one for one in outcome.out.splitlines() if one and not one.startswith(" ")]
    assert spaces[:-1] == list(dict.fromkeys(layout.space for layout in LAYOUTS.values()))


def test_the_list_for_machines() -> None:
    document = cli_ok("layouts", "--json").document
    assert (document["command"]["name"], document["verdict"]) == ("layouts", "pass")
    assert document["summary"] == {"num_layouts": len(LAYOUTS), "num_rules": 0}
    rows = {row["name"]: row for row in document["layouts"]}
    assert list(rows) == list(LAYOUTS)
    for name, layout in LAYOUTS.items():
        assert rows[name]["lossy"] == (layout.lossy or None)
        assert rows[name]["read_only"] == (layout.read_only or None)
        assert rows[name]["refused"] == (layout.refused or None)
        assert rows[name]["language_models"] == (list(FAMILIES) if layout.rules_of else [])
    for name in ("openflamingo", "openflamingo-v1", "vlm", "hf-flamingo", "open_clip", "hf-clip"):
        assert name in rows
    assert {"paligemma", *(f"paligemma-l{n}" for n in range(2, 7))} <= rows.keys()
    assert rows["idefics"]["refused"]
    assert rows["flamingo-pytorch"]["lossy"]


@each_layout
def test_every_example_fits_its_rule_and_becomes_what_is_said(name: str) -> None:
    document = cli_ok("layouts", name, "--json").document
    layout, rules = LAYOUTS[name], document["rules"]
    (row,) = document["layouts"]
    assert row["name"] == name
    assert document["summary"] == {"num_layouts": 1, "num_rules": len(rules)}
    assert rules or layout.refused
    for rule in rules:
        families = rule["language_models"] or layout.families
        for family in families:
            table = layout.table(family)
            match = table.match(rule["example"])
            assert match is not None
            assert match.rule.native == rule["key"]
            assert rule["becomes"] or rule["reason"]
            for at, canonical in enumerate(rule["becomes"]):
                index = match.arrangement.index if match.arrangement else ()
                assert match.canonical({n: at if n == "part" else 0 for n in index}) == canonical
                place = table.place(canonical)
                if rule["mode"] == "both":
                    assert place is not None
                    assert place.name == rule["example"]
        if rule["transform"] == "drop":
            assert rule["reason"]
            assert not rule["becomes"]


@each_layout
def test_a_layout_for_people(name: str) -> None:
    outcome = cli_ok("layouts", name)
    layout = LAYOUTS[name]
    assert outcome.out.startswith(f"{name}: {layout.title}\n")
    for text in (layout.lossy, layout.read_only, layout.refused):
        assert text in outcome.out
    for rule in cli_ok("layouts", name, "--json").document["rules"]:
        assert f"  {rule['key']}" in outcome.out
        assert rule["example"] in outcome.out
        # nobody is left to guess what a capture stands for
        assert "{" not in rule["example"]


def test_the_rules_that_a_language_model_alone_has_say_so() -> None:
    rules = cli_ok("layouts", "openflamingo", "--json").document["rules"]
    (opt,) = [r for r in rules if r["key"].endswith("decoder.embed_positions.weight")]
    assert opt["language_models"] == ["opt"]
    (latents,) = [r for r in rules if r["example"] == "perceiver.latents"]
    assert latents["language_models"] == []
    (fused,) = [r for r in rules if r["example"] == "perceiver.layers.3.0.to_kv.weight"]
    assert fused["becomes"] == [f"perceiver.layers.3.attn.{m}.weight" for m in "kv"]
    assert (fused["transform"], fused["axes"]) == ("split", "(part r) c -> r c")


def test_a_reason_is_given_once() -> None:
    outcome = cli_ok("layouts", "idefics")
    assert outcome.out.count("Idefics is another model") == 1


def test_an_unknown_name() -> None:
    outcome = cli("layouts", "openclip", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC410"])
    (finding,) = outcome.document["findings"]
    assert finding["hint"] == "did you mean `open_clip`?"
    outcome = cli("layouts", "\x1b[31mred")
    assert outcome.code == 2
    assert "\x1b" not in outcome.err


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys; from flamingo_ckpt.cli.main import run; run(['layouts', 'paligemma-npz']);"
        "print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    )
    done = python(code)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "set()"


def test_from_a_shell() -> None:
    outcome = cli_process("layouts", "hf-flamingo")
    assert outcome.code == 0
    assert "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn_gate" in outcome.out
    assert "\x1b" not in outcome.out
