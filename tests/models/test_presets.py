"""Presets have the counts of the published files, to the last parameter."""

from __future__ import annotations

import pytest

from flamingo_ckpt.models.config import read_config
from flamingo_ckpt.models.expectation import expect
from flamingo_ckpt.models.presets import PRESETS
from flamingo_ckpt.models.torchvision_compat import import_torchvision

#: preset -> tensors, parameters of a release, and its bytes where the hub's listing has them.
RELEASES = {
    # checkpoint.pt of OpenFlamingo 2: trained parameters (the code prints them), and for GPT-NeoX
    # the head of 50280 x 2560 that the filter keeps
    "openflamingo-3b-vitl-mpt1b": (334, 1_046_992_944),
    "openflamingo-3b-vitl-mpt1b-langinstruct": (334, 1_046_992_944),
    "openflamingo-4b-vitl-rpj3b": (247, 1_089_480_736 + 128_716_800),
    "openflamingo-4b-vitl-rpj3b-langinstruct": (247, 1_089_480_736 + 128_716_800),
    "openflamingo-9b-vitl-mpt7b": (158, 1_384_781_840),
    "openflamingo-9b-deprecated": (158, 1_309_919_248),
    "med-flamingo": (158, 1_309_919_248),
    # `total_size` of the index, less 257 int64 positions that old versions of transformers wrote
    "otter-mpt1b-rpjama-init": (391 + 69 + 264 + 192 + 2, (10_234_570_952 - 257 * 8) // 4),
    # 32.525 and 32.88 GB of float32
    "otter-image-mpt7b": (391 + 69 + 88 + 192 + 2, 8_131_301_392),
    "openflamingo-9b-hf": (391 + 69 + 88 + 288 + 3, 8_220_454_928),
}
#: open_clip's own listing of its models.
CLIPS = {
    "vit-b-32": ("ViT-B-32", 302),
    "vit-b-16": ("ViT-B-16", 302),
    "vit-l-14": ("ViT-L-14", 446),
    "vit-l-14-336": ("ViT-L-14-336", 446),
    "vit-h-14": ("ViT-H-14", 686),
    "vit-bigg-14": ("ViT-bigG-14", 974),
}
#: PaliGemma -> tensors, parameters at 224 pixels.
PALIGEMMAS = {
    "paligemma-3b-pt": (603, 2_923_466_480),
    "paligemma2-3b-pt": (727, 3_032_242_416),
    "paligemma2-10b-pt": (903, 9_662_638_832),
    "paligemma2-28b-pt": (947, 27_650_487_024),
}


def counts(name: str) -> tuple[int, int]:
    summary = expect(read_config(f"model:{name}")).summary()
    return summary["num_checkpoint_tensors"], summary["num_checkpoint_parameters"]


@pytest.mark.parametrize("name", RELEASES)
def test_flamingo_releases(name: str) -> None:
    assert counts(name) == RELEASES[name]


def test_gigabytes_of_the_published_folders() -> None:
    for name, gigabytes in (("otter-image-mpt7b", 32.525), ("openflamingo-9b-hf", 32.88)):
        num_bytes = expect(read_config(name)).summary()["num_bytes"]
        assert num_bytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize(
    ("name", "canonical", "whole"),
    [
        # 296 vision, 69 perceiver, embedding, 192 decoder, 264 gated, norm; then the alias trees
        ("openflamingo-3b-vitl-mpt1b", 823, 1279),
        # the same of 927, and the tied head, which transformers' class has and MosaicML's has not
        ("openflamingo-9b-vitl-mpt7b", 647, 927 + 1),
    ],
)
def test_whole_state_dicts(name: str, canonical: int, whole: int) -> None:
    found = expect(read_config(name))
    assert (len(found.canonical()), len(found.tensors)) == (canonical, whole)


def test_parts_of_the_3b_model() -> None:
    found = expect(read_config("openflamingo-3b-vitl-mpt1b"))
    parameters: dict[str, int] = {}
    for tensor in found.canonical():
        parameters[tensor.group] = parameters.get(tensor.group, 0) + tensor.info().num_elements
    assert parameters["vision"] == 303_966_208
    assert parameters["perceiver"] == 63_019_008
    assert parameters["xattn"] == 24 * 36_708_354
    assert parameters["lm.embed"] == 50280 * 2048


@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_open_clips_own(name: str, suffix: str) -> None:
    import_torchvision()
    import open_clip

    listed, tensors = CLIPS[name]
    config = read_config(name + suffix)
    assert config.data == open_clip.get_model_config(listed + suffix) or _equal_but_defaults(
        dict(config.data), open_clip.get_model_config(listed + suffix)
    )
    assert len(expect(config).tensors) == tensors


def _equal_but_defaults(ours: dict[str, object], theirs: dict[str, object]) -> bool:
    """open_clip's files leave out what its dataclasses have by default."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    for part, make in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        assert make(**ours.pop(part)) == make(**theirs.pop(part))
    return ours == theirs


def test_vit_l_14() -> None:
    assert counts("vit-l-14") == (446, 427_616_513)
    hf = expect(read_config("vit-l-14"), "hf-clip").summary()
    assert (hf["num_tensors"], hf["num_parameters"]) == (590, 427_616_513)


@pytest.mark.parametrize("size", [224, 448, 896])
@pytest.mark.parametrize("name", PALIGEMMAS)
def test_paligemmas(name: str, size: int) -> None:
    """The size of the picture changes one thing: the number of positions."""
    tensors, parameters = PALIGEMMAS[name]
    added = ((size // 14) ** 2 - 256) * 1152
    assert counts(f"{name}-{size}") == (tensors, parameters + added)


def test_bytes_of_the_paligemma_release() -> None:
    found = expect(read_config("paligemma-3b-pt-224")).summary()
    assert (found["num_bytes"], found["dtypes"]) == (11_693_865_920, {"F32": 603})


def test_every_preset_is_counted_here() -> None:
    counted = {*RELEASES}
    counted |= {name + suffix for name in CLIPS for suffix in ("", "-quickgelu")}
    counted |= {f"{name}-{size}" for name in PALIGEMMAS for size in (224, 448, 896)}
    assert counted == set(PRESETS)
    assert all(name == name.lower() for name in PRESETS)
