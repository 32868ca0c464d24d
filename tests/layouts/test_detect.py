"""Detection: by keys alone, with its evidence, and an error where two layouts are as good."""

from __future__ import annotations

from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.registry import LAYOUTS, layout_named
from flamingo_ckpt.layouts.rules import rename
from tests import zoo

FAMILY_NAMES = {
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


def found(state: Any) -> tuple[str, tuple[str, ...]]:
    detection = detect(state, "file.pt")
    assert not detection.unknown
    assert detection.num_fit == detection.num_keys == len({*state})
    return detection.layout.name, detection.families


@each_family
@each_era
def test_flamingos_and_their_language_models(family: str, era: str) -> None:
    model = zoo.openflamingo(family, era=era)
    name = FAMILY_NAMES[family]
    layout, families = found(model.partial)
    assert layout == "openflamingo"
    assert name in families
    # the two MPTs name everything alike that a partial checkpoint holds
    assert {*families} <= ({"mosaic_gpt", "mpt"} if "mpt" in family else {name})
    assert found(model.full) == ("openflamingo-full", (name,))
    assert found(zoo.hf_flamingo(family, era=era).state) == ("hf-flamingo", (name,))
    assert found(model.language) == ("language-model", (name,))
    assert found(model.clip) == ("open_clip", ())


@each_family
@pytest.mark.parametrize("whole", [True, False])
def test_the_next_generation(family: str, whole: bool) -> None:
    layout, families = found(zoo.vlm(family, whole=whole))
    assert layout == "vlm"
    assert FAMILY_NAMES[family] in families


def test_v1_and_the_others() -> None:
    assert found(zoo.openflamingo_v1()) == ("openflamingo-v1", ("llama",))
    clip = zoo.clip()
    assert found(clip.open_clip)[0] == found(clip.openai)[0] == "open_clip"
    assert found(clip.custom_text)[0] == "open_clip-custom"
    for state in (clip.hf, clip.hf_vision, clip.hf_vision_flat, clip.hf_vision_projection):
        assert found(state)[0] == "hf-clip"
    gemma = zoo.paligemma()
    names = {name: found(gemma.layout(name))[0] for name in zoo.PALIGEMMA_LAYOUTS}
    assert names == {"L1": "paligemma"} | {f"L{n}": f"paligemma-l{n}" for n in range(2, 7)}
    assert detect(zoo.idefics(), "x").layout.name == "idefics"


@pytest.mark.parametrize("layers", [4, 12])
@pytest.mark.parametrize("every_n", [1, 2, 4])
def test_interval_and_depth_do_not_matter(every_n: int, layers: int) -> None:
    if (every_n, layers) == (1, 12):
        return
    model = zoo.hf_flamingo("llama", every_n=every_n, layers=layers)
    assert found(model.state)[0] == "hf-flamingo"
    assert found(model.source.partial)[0] == "openflamingo"


def test_the_order_of_the_keys_and_keys_that_are_twice_do_not_matter() -> None:
    names = [*zoo.openflamingo("opt").partial]
    first = detect(names, "x")
    assert detect([*reversed(names), *names], "y") == first


def test_the_evidence_is_counted() -> None:
    names = [*zoo.hf_flamingo("llama").state]
    detection = detect([*names, "what.is.this", "lang_encoder.more"], "x")
    assert detection.layout.name == "hf-flamingo"
    assert detection.unknown == ("what.is.this", "lang_encoder.more")
    assert (detection.num_fit, detection.num_keys) == (len(names), len(names) + 2)
    assert detection.runner_up is not None
    other, count = detection.runner_up
    fits = LAYOUTS[other].table("llama")
    assert count == sum(fits.match(name) is not None for name in names)
    assert 0 < count < len(names)
    assert detection.evidence == (
        f"{len(names)} of {len(names) + 2} keys fit; next best: {other}, {count}"
    )
    assert detection.title == "hf-flamingo (llama)"


def test_keys_of_two_layouts_are_told_apart() -> None:
    hf, ours = zoo.hf_flamingo("llama").state, zoo.openflamingo("llama").partial
    theirs = {name for name in ours if name.startswith("perceiver.layers.0.")}
    detection = detect([*hf, *theirs], "x")
    assert detection.layout.name == "hf-flamingo"
    assert detection.elsewhere is not None
    other, names = detection.elsewhere
    assert other.startswith("openflamingo")
    assert {*names} == {*detection.unknown} == theirs


@pytest.mark.parametrize(
    "names",
    [
        [],
        [""],
        ["weight"],
        ["a.b.c", "d"],
        ["#"],
        ["blocks.0.w"],
        ["\0", "\x1b[31m"],
        ["perceiver"],
    ],
)
def test_keys_without_evidence(names: list[str]) -> None:
    with pytest.raises(CkptError, match="no layout has any evidence") as caught:
        detect(names, "some/file.pt")
    assert caught.value.code == "FC411"
    assert caught.value.where == "some/file.pt"
    assert "\x1b" not in str(caught.value)
    assert "--from" in str(caught.value.hint)


def test_what_fits_two_layouts_and_means_two_things_is_asked_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = {name: rename({"{layer}.w": f"vision.{{layer}}.{name}"}) for name in ("one", "two")}
    layouts = {
        name: Layout(name=name, title="", space="clip", rules=rules[meaning])
        for name, meaning in (("first", "one"), ("second", "two"), ("third", "one"))
    }
    monkeypatch.setattr("flamingo_ckpt.layouts.detect.LAYOUTS", layouts)
    with pytest.raises(CkptError) as caught:
        detect(["3.w", "11.w"], "x")
    assert caught.value.code == "FC412"
    assert str(caught.value) == "the keys fit `first` and `second` equally well (2 of 2)"
    assert caught.value.hint == "say which: --from first, or --from second"
    for name in layouts:
        assert detect(["3.w"], "x", among=(name,)).layout.name == name
    # two names of one meaning are no question
    del layouts["second"]
    assert detect(["3.w"], "x").layout.name == "first"


def test_from_names_a_layout_even_where_nothing_fits() -> None:
    detection = detect(["a.b"], "x", among=("vlm",))
    assert detection.layout.name == "vlm"
    assert (detection.num_fit, detection.unknown) == (0, ("a.b",))
    with pytest.raises(CkptError, match="there is no layout `hf-flaming`") as caught:
        layout_named("hf-flaming")
    assert caught.value.hint == "did you mean `hf-flamingo`?"
    with pytest.raises(CkptError, match=r"`\\x1b\[31m`"):
        layout_named("\x1b[31m")
