"""Models built on meta compute what ordinary ones do, buffers that no file holds included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.loading import LoadOptions, load_into, rebuild_buffers
from tests import zoo
from tests.loading.engine_support import assert_same, saved
from tests.support import python
from tests.zoo_clip import open_clip_cfg

TOKENS = torch.tensor([[3, 5, 7, 2, 9, 4]])


def _buffers(model: Any) -> dict[str, Any]:
    return dict(model.named_buffers())


def _assert_buffers(model: Any, reference: Any) -> None:
    ours, theirs = _buffers(model), _buffers(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "opt", "gptj", "mpt7b"])
def test_language_models(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    flamingo = zoo.openflamingo(family)
    config = AutoConfig.for_model(**flamingo.text_config)
    reference = AutoModelForCausalLM.from_config(config).eval()
    reference.load_state_dict(flamingo.language, strict=False)
    reference.tie_weights()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    load_into(model, saved(flamingo.language, tmp_path, ".safetensors"))
    assert_same(model, reference)
    _assert_buffers(model, reference)
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)


@pytest.mark.parametrize("version", [1, 2])
def test_paligemma(version: int, tmp_path: Path) -> None:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    pali = zoo.paligemma(version=version)
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**pali.config)).eval()
    load_into(model, saved(pali.layout("L1"), tmp_path, ".safetensors"))
    assert_same(model, pali.model)
    _assert_buffers(model, pali.model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    inputs = zoo.paligemma_inputs(pali)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, pali.model(**inputs).logits)


def test_clip_of_both_libraries(tmp_path: Path) -> None:
    from open_clip.model import CLIP, CustomTextCLIP
    from transformers import CLIPConfig, CLIPModel

    clip = zoo.clip()
    path = saved(clip.hf, tmp_path, ".safetensors")
    pixels, words = torch.randn(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
    for kind, reference in ((CLIP, clip.open_clip_model), (CustomTextCLIP, clip.custom_model)):
        with torch.device("meta"):
            model = kind(**open_clip_cfg(4)).eval()
        load_into(model, path)
        assert_same(model, reference)
        _assert_buffers(model, reference)
        with torch.no_grad():
            for ours, theirs in zip(model(pixels, words), reference(pixels, words), strict=True):
                # the last bit depends on where in memory a weight begins
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**clip.config)).eval()
    load_into(model, path, LoadOptions(device="cpu"))
    _assert_buffers(model, clip.hf_model)


def test_rebuilding_alone_keeps_what_is_there() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**zoo.openflamingo("llama").text_config)
    model = AutoModelForCausalLM.from_config(config)
    model.model.rotary_emb.inv_freq.fill_(3.0)
    assert rebuild_buffers(model) == ()
    assert model.model.rotary_emb.inv_freq.unique().tolist() == [3.0]


MEMORY = """
import resource, sys, torch
from torch import nn
from flamingo_ckpt.loading import load_into

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 4096, bias=False) for _ in range(12))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

model = Net()
if sys.argv[1] == "half":
    model.half()
import flamingo_ckpt.loading.engine, flamingo_ckpt.loading.resize
before = peak()
load_into(model, sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize(("suffix", "how"), [(".pt", "half"), (".safetensors", "place")])
def test_no_second_copy_is_made(suffix: str, how: str, tmp_path: Path) -> None:
    """192 MiB of weights, filled in place: as they are, and cast."""
    state = {f"layers.{at}.weight": torch.full((4096, 1024), float(at)) for at in range(12)}
    path = saved(state, tmp_path, suffix)
    done = python(MEMORY, how, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40
