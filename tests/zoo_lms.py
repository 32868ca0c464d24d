"""Tiny random language models, and what every part of the zoo shares.

The sizes all differ from one another, so that a tensor that went to the wrong place has the wrong
shape; `padded` families have a vocabulary that is longer than their tokenizer, as on the hub.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

State = dict[str, Any]

#: Rows before Flamingo's tokens; `<|endofchunk|>` and `<image>` are the next two, then `<PAD>`.
WORDS = 93
#: Rows of the families whose vocabulary is padded: the resize cuts them.
PADDED_ROWS = 128
LANG_DIM, LANG_HEADS = 48, 4
POSITIONS = 64

#: family -> (path of the decoder layers, input embedding, output head or None), as upstream has it.
FAMILIES = {
    "mpt1b": ("transformer.blocks", "transformer.wte", None),
    "mpt7b": ("transformer.blocks", "transformer.wte", "lm_head"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in", "lm_head"),
    "pythia": ("gpt_neox.layers", "gpt_neox.embed_in", "lm_head"),
    "llama": ("model.layers", "model.embed_tokens", "lm_head"),
    "opt": ("model.decoder.layers", "model.decoder.embed_tokens", "lm_head"),
    "gptj": ("transformer.h", "transformer.wte", "lm_head"),
}
#: OPT's tokenizer has a padding token, so only two tokens are added.
_OWN_PAD = {"opt"}
_PADDED = {"mpt1b", "mpt7b", "gpt_neox", "gptj"}


def base_rows(family: str) -> int:
    """Rows of the embedding before Flamingo's tokens are added."""
    return PADDED_ROWS if family in _PADDED else WORDS


def flamingo_rows(family: str) -> int:
    """Rows of the embedding with Flamingo's tokens."""
    return WORDS + (2 if family in _OWN_PAD else 3)


def prepare() -> None:
    """Make open_clip, timm and CLIP in transformers importable; call before importing them."""
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of our own, and the caller's untouched."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise(module: Any) -> None:
    """Noise on every parameter: norms leave 1, biases and gates leave 0, no two stay equal."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.5 if name.endswith(("_gate", "logit_bias")) else 0.1
            # Wide matrices get less, or every softmax has one winner.
            if parameter.ndim > 1:
                scale = 0.3 / math.sqrt(parameter.shape[-1])
            parameter.add_(torch.randn_like(parameter) * scale)


def snapshot(module: Any) -> State:
    """A copy of a module's state dict; tensors that share memory share it in the copy too."""
    import copy

    return {name: tensor.detach() for name, tensor in copy.deepcopy(module.state_dict()).items()}


def language_model(family: str, layers: int) -> Any:
    """A random causal language model in evaluation mode, before Flamingo's tokens."""
    if family == "mpt1b":
        model = _mosaic_gpt_class()(_mosaic_gpt_config(layers))
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(_config(family, layers))
    randomise(model)
    return model.eval()


def _config(family: str, layers: int) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": base_rows(family),
        "hidden_size": LANG_DIM,
        "num_hidden_layers": layers,
        "num_attention_heads": LANG_HEADS,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    if family == "llama":
        return transformers.LlamaConfig(intermediate_size=112, **common)
    if family == "opt":
        return transformers.OPTConfig(
            ffn_dim=4 * LANG_DIM,
            word_embed_proj_dim=LANG_DIM,
            dropout=0.0,
            pad_token_id=1,
            **common,
        )
    if family in ("gpt_neox", "pythia"):
        # RedPajama runs its two branches one after the other, Pythia side by side.
        return transformers.GPTNeoXConfig(
            intermediate_size=4 * LANG_DIM, use_parallel_residual=family == "pythia", **common
        )
    if family == "gptj":
        return transformers.GPTJConfig(
            vocab_size=base_rows(family),
            n_positions=POSITIONS,
            n_embd=LANG_DIM,
            n_layer=layers,
            n_head=LANG_HEADS,
            rotary_dim=4,
            bos_token_id=2,
            eos_token_id=2,
        )
    if family == "mpt7b":
        return transformers.MptConfig(
            d_model=LANG_DIM,
            n_heads=LANG_HEADS,
            n_layers=layers,
            vocab_size=base_rows(family),
            max_seq_len=POSITIONS,
        )
    raise ValueError(f"no family {family!r}: one of {', '.join(FAMILIES)}")


def _mosaic_gpt_config(layers: int) -> Any:
    return _mosaic_gpt_class().config_class(
        d_model=LANG_DIM,
        n_heads=LANG_HEADS,
        n_layers=layers,
        mlp_ratio=4,
        max_seq_len=POSITIONS,
        vocab_size=base_rows("mpt1b"),
        alibi=True,
        no_bias=True,
        attn_qk_ln=True,
        tie_word_embeddings=False,
    )


@functools.cache
def _mosaic_gpt_class() -> Any:
    """MosaicML's 1B model, which transformers never had: its key names and its arithmetic."""
    import torch
    import transformers
    from torch import nn

    class MosaicGPTConfig(transformers.PretrainedConfig):
        model_type = "mosaic_gpt"

    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.Wqkv = nn.Linear(dim, 3 * dim, bias=False)
            self.q_ln = nn.LayerNorm(dim, bias=False)
            self.k_ln = nn.LayerNorm(dim, bias=False)
            self.out_proj = nn.Linear(dim, dim, bias=False)

        def forward(self, x: Any, bias: Any) -> Any:
            q, k, v = self.Wqkv(x).chunk(3, dim=-1)
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in (self.q_ln(q), self.k_ln(k), v)
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
            return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.mlp_up = nn.Linear(dim, 4 * dim, bias=False)
            self.mlp_down = nn.Linear(4 * dim, dim, bias=False)

        def forward(self, x: Any) -> Any:
            return self.mlp_down(nn.functional.gelu(self.mlp_up(x)))

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.ln_1 = nn.LayerNorm(dim, bias=False)
            self.attn = Attention(dim, heads)
            self.ln_2 = nn.LayerNorm(dim, bias=False)
            self.mlp = Mlp(dim)

        def forward(self, x: Any, attention_mask: Any = None) -> Any:
            x = x + self.attn(self.ln_1(x), self._bias(x, attention_mask))
            return x + self.mlp(self.ln_2(x))

        def _bias(self, x: Any, attention_mask: Any) -> Any:
            length, lowest = x.shape[1], torch.finfo(x.dtype).min
            slopes = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1) / self.heads)
            distance = torch.arange(1 - length, 1).to(x.dtype)
            bias = (slopes[:, None].to(x.dtype) * distance)[None, :, None, :]
            if attention_mask is not None:
                bias = bias.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            return bias.expand(-1, -1, length, -1).masked_fill(future, lowest)

    class MosaicGPT(transformers.PreTrainedModel):
        config_class = MosaicGPTConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(config.vocab_size, config.d_model),
                    "blocks": nn.ModuleList(
                        Block(config.d_model, config.n_heads) for _ in range(config.n_layers)
                    ),
                    "ln_f": nn.LayerNorm(config.d_model, bias=False),
                }
            )
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.transformer.wte

        def set_input_embeddings(self, value: Any) -> None:
            self.transformer.wte = value

        def get_output_embeddings(self) -> None:
            return None

        def forward(
            self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **_: Any
        ) -> Any:
            x = self.transformer.wte(input_ids)
            for block in self.transformer.blocks:
                x = block(x, attention_mask=attention_mask)
            logits = self.transformer.ln_f(x) @ self.transformer.wte.weight.T
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    return MosaicGPT
