"""`load_checkpoint` as open_clip's users call it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt import IncompatibleKeys, LoadError, load_checkpoint
from flamingo_ckpt.errors import CkptError
from tests import zoo
from tests.loading.engine_support import assert_same, saved, scrambled
from tests.loading.open_clip_support import coca_model


def test_what_it_returns_is_what_torch_returns(tmp_path: Path) -> None:
    clip = zoo.clip()
    model = scrambled(clip.open_clip_model)
    found = load_checkpoint(model, saved(clip.open_clip, tmp_path))
    assert isinstance(found, IncompatibleKeys)
    assert repr(found) == str(found) == "<All keys matched successfully>"
    missing, unexpected = found
    assert missing == unexpected == []
    assert found.report.num_loaded == len(clip.open_clip)
    state = clip.open_clip | {"extra": torch.ones(1)}
    del state["ln_final.bias"]
    theirs = copy.deepcopy(clip.open_clip_model).load_state_dict(state, strict=False)
    found = load_checkpoint(model, saved(state, tmp_path), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == tuple(theirs)
    assert repr(found) == repr(theirs).removeprefix("_")
    assert copy.copy(found).report is found.report
    with pytest.raises(RuntimeError, match="1 missing, 1 unexpected"):
        load_checkpoint(model, str(tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_positional_arguments_and_every_suffix(
    device: Any, weights_only: bool, suffix: str, tmp_path: Path
) -> None:
    clip = zoo.clip()
    model = scrambled(clip.open_clip_model)
    path = saved(clip.open_clip, tmp_path, suffix)
    load_checkpoint(model, path, True, weights_only, device)
    assert_same(model, clip.open_clip_model)


def test_weights_only_false_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "was_run",))

    path = tmp_path / "evil.pt"
    torch.save({"state_dict": zoo.clip().open_clip, "beside": Evil()}, path)
    with pytest.raises(CkptError) as caught:
        load_checkpoint(scrambled(zoo.clip().open_clip_model), path, weights_only=False)
    assert caught.value.code.startswith("FC5")
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)


def test_coca_and_a_tower_of_timm(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    reference = coca_model()
    model = scrambled(reference)
    load_checkpoint(model, saved(reference.state_dict(), tmp_path, prefix="module."))
    assert_same(model, reference)
    tower = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    other = scrambled(tower)
    load_checkpoint(other, saved(tower.state_dict(), tmp_path, wrapper="model"))
    assert_same(other, tower)


def test_a_folder_with_an_index(tmp_path: Path) -> None:
    pali = zoo.paligemma()
    pali.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = scrambled(pali.model)
    assert repr(load_checkpoint(model, tmp_path)) == "<All keys matched successfully>"
    assert_same(model, pali.model)
    model = scrambled(pali.model)
    load_checkpoint(model, tmp_path / "model.safetensors.index.json")
    assert_same(model, pali.model)


def test_a_bias_that_the_file_has_no_idea_of(tmp_path: Path) -> None:
    siglip = zoo.siglip()
    state = dict(siglip.state)
    del state["logit_bias"]
    model = scrambled(siglip.model)
    found = load_checkpoint(model, saved(state, tmp_path))
    assert float(model.logit_bias) == 0.0
    assert list(found.report.zero_filled) == ["logit_bias"]
    with pytest.raises(LoadError, match="logit_bias"):
        load_checkpoint(
            scrambled(zoo.clip().open_clip_model),
            saved(zoo.clip().open_clip | {"logit_bias": torch.ones(())}, tmp_path),
        )
