"""CLIP's text features depend on a number in the config that no tensor shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from tests import zoo_clip
from tests.zoo_clip import open_clip_cfg

#: The end of these texts is not their highest token, and stands in them once.
END = 7


def texts() -> torch.Tensor:
    tokens = torch.randint(20, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, [4]] = END
    return tokens


def config_with(**text: Any) -> dict[str, Any]:
    config = open_clip_cfg(2)
    return config | {"text_cfg": config["text_cfg"] | text}


def features(config: dict[str, Any], layout: str) -> torch.Tensor:
    made = zoo_clip.clip(layers=2)
    model: Any = build(parse_config(config, ""), layout, dtype="float32").eval()
    model.load_state_dict(made.open_clip if layout == "open_clip" else made.hf)
    with torch.no_grad():
        if layout == "open_clip":
            found: torch.Tensor = model.encode_text(texts())
        else:
            found = model.get_text_features(input_ids=texts()).pooler_output
    return found


def test_pooling_at_a_token_that_is_told() -> None:
    """MetaCLIP 2's small model ends its texts with 1; transformers is told the same."""
    told = config_with(pool_type="eos", eos_id=END)
    wanted = features(told, "open_clip")
    assert torch.allclose(features(told, "hf-clip"), wanted, atol=1e-5)
    assert (features(config_with(), "hf-clip") - wanted).abs().max() > 0.1


@pytest.mark.parametrize("given", [{"eos_id": 2}, {}])
def test_the_token_2_has_no_name_in_transformers(given: dict[str, int]) -> None:
    """There it means the highest token, and MetaCLIP 2's large models really end with 2."""
    config = config_with(pool_type="eos", **given)
    with pytest.raises(CkptError, match=r"text_cfg\.eos_id.* is 2") as caught:
        build(parse_config(config, ""), "hf-clip")
    assert caught.value.code == "FC405"
    build(parse_config(config, ""), "open_clip", "meta")


@pytest.mark.parametrize(("end", "is_highest"), [(END, False), (2, True), (98, True)])
def test_the_end_that_a_config_of_transformers_tells(end: int, is_highest: bool) -> None:
    made = zoo_clip.clip(layers=2)
    config = made.config | {"text_config": made.config["text_config"] | {"eos_token_id": end}}
    wanted = features(config, "open_clip")
    told = config_with() if is_highest else config_with(pool_type="eos", eos_id=END)
    assert torch.allclose(features(told, "open_clip"), wanted, atol=1e-6)
    if end != 98:  # which not every text here has
        assert torch.allclose(features(config, "hf-clip"), wanted, atol=1e-5)
