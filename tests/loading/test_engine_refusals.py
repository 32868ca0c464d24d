"""What the engine refuses or tells, where `load_state_dict` would go on or do something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.loading import LoadOptions, load_into
from tests.loading.engine_support import bits, saved


class Counting(nn.Linear):
    """Keeps something beside its tensors."""

    counter = 3

    def get_extra_state(self) -> Any:
        return torch.tensor([self.counter])

    def set_extra_state(self, state: Any) -> None:
        self.counter = int(state)


@pytest.mark.parametrize("is_there", [True, False])
def test_extra_state_is_not_lost_silently(is_there: bool, tmp_path: Path) -> None:
    source, model = Counting(3, 3), Counting(3, 3)
    source.counter = 4
    state = {k: v for k, v in source.state_dict().items() if is_there or k[0] != "_"}
    path = saved(state, tmp_path)
    with pytest.raises(LoadError, match="1 missing") as caught:
        load_into(model, path)
    assert "set_extra_state" in str(caught.value.hint)
    report = load_into(model, path, LoadOptions(policy="lenient"))
    assert report.missing_keys == ("_extra_state",)
    assert report.unexpected_keys == (("_extra_state",) if is_there else ())
    load_into(
        model,
        path,
        LoadOptions(may_miss=frozenset({"_extra_state"}), exclude=("_extra_state",)),
    )


def test_a_buffer_by_a_name_like_extra_state(tmp_path: Path) -> None:
    module: Any = nn.Linear(2, 2)
    module.register_buffer("my_extra_state", torch.zeros(2))
    state = {**module.state_dict(), "my_extra_state": torch.ones(2)}
    load_into(module, saved(state, tmp_path))
    assert module.my_extra_state.tolist() == [1, 1]


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_narrow_weights_need_their_scales(scale: str, tmp_path: Path) -> None:
    narrow = torch.ones(3, 3).to(torch.float8_e4m3fn)
    state = {"0.weight": narrow, f"0.{scale}": torch.ones(1), "0.bias": torch.ones(3)}
    model = nn.Sequential(nn.Linear(3, 3))
    path = saved(state, tmp_path, ".safetensors")
    with pytest.raises(LoadError, match="quantized weights need their scales") as caught:
        load_into(model, path, LoadOptions(policy="lenient"))
    assert caught.value.code == "FC437"
    # as they are in a model that computes with scales, and without any scale
    model[0].register_buffer(scale, torch.zeros(1))
    model[0].weight = nn.Parameter(torch.zeros(3, 3).to(torch.float8_e4m3fn))
    assert load_into(model, path).cast == {}
    alone = saved({k: v for k, v in state.items() if k != f"0.{scale}"}, tmp_path, ".safetensors")
    assert load_into(nn.Sequential(nn.Linear(3, 3)), alone).cast == {"0.weight": ("F8_E4M3", "F32")}


def test_a_complex_weight_is_no_real_one(tmp_path: Path) -> None:
    path = saved({"weight": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path)
    with pytest.raises(LoadError, match=r"`weight` is C64.*imaginary") as caught:
        load_into(nn.Linear(2, 2, bias=False), path)
    assert caught.value.code == "FC437"


@pytest.mark.parametrize("device", ["meta", "nonsense"])
@pytest.mark.parametrize("assign", [None, True])
def test_a_device_that_keeps_nothing(device: str, assign: bool | None, tmp_path: Path) -> None:
    model, path = nn.Linear(3, 3), saved(nn.Linear(3, 3).state_dict(), tmp_path)
    before = bits(model)
    with pytest.raises(CkptError, match=f"`{device}`") as caught:
        load_into(model, path, LoadOptions(device=device, assign=assign))
    assert caught.value.code == "FC006"
    assert bits(model) == before


class Doubling(nn.Linear):
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k: 2 * v for k, v in state_dict.items()}, *args, **kwargs)


def test_what_a_module_does_on_loading_is_told(tmp_path: Path) -> None:
    path = saved(nn.Linear(3, 3).state_dict(), tmp_path)
    hooked: Any = nn.Linear(3, 3)
    hooked.register_load_state_dict_post_hook(lambda *_: None)
    for model in (hooked, Doubling(3, 3)):
        (finding,) = load_into(model, path).findings
        assert (finding.code, finding.severity) == ("FC438", "warning")
    assert load_into(nn.Linear(3, 3), path).findings == ()


def test_the_prefix_that_fits_best_is_hinted(tmp_path: Path) -> None:
    """Two towers of one build: the first one's names fit too, but for its last layer."""
    towers = {"text": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))}
    towers["vision"] = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    path = saved(nn.ModuleDict(towers).state_dict(), tmp_path)
    with pytest.raises(LoadError) as caught:
        load_into(towers["vision"], path)
    assert str(caught.value.hint).startswith("6 names fit without `vision.`")


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes))


@pytest.mark.parametrize(
    "kept", ["model.embed_tokens.weight", "model.layers.0.", "model.layers.", "model."]
)
def test_a_language_model_by_itself_has_no_base(kept: str, llama: Any, tmp_path: Path) -> None:
    state = {k: v for k, v in llama.state_dict().items() if k.startswith(kept)}
    with pytest.raises(LoadError) as caught:
        load_into(llama, saved(state, tmp_path), LoadOptions(policy="partial"))
    assert caught.value.code in ("FC430", "FC431")
    assert "`partial`" not in str(caught.value.hint)


def test_hints_about_language_models(llama: Any, tmp_path: Path) -> None:
    state = llama.state_dict()
    headless = {k: v for k, v in state.items() if k != "lm_head.weight"}
    with pytest.raises(LoadError) as caught:
        load_into(llama, saved(headless, tmp_path))
    assert "`tie_word_embeddings`" in str(caught.value.hint)
    longer = {**state, "model.layers.2.mlp.up_proj.weight": torch.ones(32, 16)}
    with pytest.raises(LoadError) as caught:
        load_into(llama, saved(longer, tmp_path))
    assert "another size or version" in str(caught.value.hint)


@pytest.mark.parametrize("policy", ["strict", "lenient"])
@pytest.mark.parametrize("source", ["vision", "text"])
def test_a_tower_is_not_taken_for_the_other(source: str, policy: str, tmp_path: Path) -> None:
    """transformers calls the layers of CLIP's two towers alike, and their shapes may be equal."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    towers: dict[str, Any] = {
        "vision": CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=4, **sizes)),
        "text": CLIPTextModel(
            CLIPTextConfig(vocab_size=20, max_position_embeddings=16, eos_token_id=2, **sizes)
        ),
    }
    path = saved(towers.pop(source).state_dict(), tmp_path)
    (other,) = towers.values()
    before = bits(other)
    with pytest.raises(LoadError) as caught:
        load_into(other, path, LoadOptions(policy=policy))
    assert caught.value.code == "FC431"
    assert bits(other) == before


def test_one_glob_is_a_glob(tmp_path: Path) -> None:
    """A string is a sequence too: of globs of one character, which fit nothing."""
    options: Any = {"policy": "lenient", "exclude": "bias"}
    path = saved(nn.Linear(3, 3).state_dict(), tmp_path)
    assert load_into(nn.Linear(3, 3), path, LoadOptions(**options)).missing_keys == ("bias",)
    options = {"policy": "lenient", "include": ["b*"]}
    assert load_into(nn.Linear(3, 3), path, LoadOptions(**options)).missing_keys == ("weight",)


@pytest.mark.parametrize("grid", [4, (4,), (4, 4, 4), (4.0, 4), "44"])
def test_a_grid_is_two_numbers(grid: Any) -> None:
    with pytest.raises(CkptError, match="image_grid is") as caught:
        LoadOptions(image_grid=grid)
    assert caught.value.code == "FC006"


@pytest.mark.parametrize("policy", ["strict", "lenient", "partial"])
def test_what_a_file_need_not_have_is_told(policy: str, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    state = dict(module.state_dict())
    del state["1.num_batches_tracked"], state["0.bias"]
    options = LoadOptions(policy=policy, may_miss=frozenset({"0.bias"}))
    report = load_into(module, saved(state, tmp_path), options)
    assert report.missing_keys == ()
    assert dict(report.kept) == {
        "0.bias": "may be missing",
        "1.num_batches_tracked": "computed by the model",
    }
