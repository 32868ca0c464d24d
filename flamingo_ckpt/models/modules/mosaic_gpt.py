"""MosaicGPT, the language model of OpenFlamingo-3B (`mpt-1b-redpajama-200b`).

It was published as code on the hub and has no class in transformers. Its successor MPT has other
names, and no norms on queries and keys. Names of parameters and the arithmetic are those of the
published class; the class is transformers' kind, so that it generates, resizes and saves as any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo_ckpt.models.modules.attention import merge_heads, split_heads


class MosaicGPTConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a `MosaicGPT`; registered nowhere.

    Args:
        d_model, n_heads, n_layers, mlp_ratio, vocab_size: sizes.
        max_seq_len: what the model was trained on; nothing is refused beyond it.
        alibi_bias_max: the slopes of ALiBi fall to 2 to the minus this.
        initializer_range: standard deviation of random weights.
        **kwargs: of every config of transformers. Fields of the published class that have one
            value here (`alibi`, `attn_qk_ln`, `no_bias`) are kept as they are.
    """

    model_type = "mosaic_gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        d_model: int = 2048,
        n_heads: int = 16,
        n_layers: int = 24,
        mlp_ratio: int = 4,
        vocab_size: int = 50432,
        max_seq_len: int = 2048,
        alibi_bias_max: int = 8,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.mlp_ratio = mlp_ratio
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.alibi_bias_max = alibi_bias_max
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # The head is the embedding, and has no name of its own to be tied to.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


def mosaic_config(text: Mapping[str, Any]) -> MosaicGPTConfig:
    """The config object for a checked `text_config`; null means the default."""
    noise = ("model_type", "architectures", "auto_map", "torch_dtype", "transformers_version")
    given = {
        name: value
        for name, value in text.items()
        if value is not None and name not in noise and not name.startswith("_")
    }
    return MosaicGPTConfig(**given)


def alibi_bias(
    num_heads: int,
    num_keys: int,
    alibi_bias_max: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """What is added to the scores for distance: `[1, heads, 1, keys]`, 0 at the last key.

    It is the same for every query, other than in the paper (Press et al. 2022): a constant for a
    query changes no softmax.
    """
    number = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
    slopes = 2.0 ** (-float(alibi_bias_max) * number / num_heads)
    # bfloat16 knows no whole numbers beyond 256 but multiples: multiply first, round then
    exact = torch.promote_types(dtype, torch.float32)
    distance = torch.arange(1 - num_keys, 1, device=device).to(exact)
    return (slopes[:, None].to(exact) * distance)[None, :, None, :].to(dtype)


class MosaicAttention(nn.Module):
    """Self-attention with ALiBi; queries and keys are normalised over the full width."""

    def __init__(self, config: MosaicGPTConfig, index: int) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.index = index
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.q_ln = nn.LayerNorm(width, bias=False)
        self.k_ln = nn.LayerNorm(width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, bias: torch.Tensor, cache: Any) -> torch.Tensor:
        """What each token takes from those before it.

        Args:
            hidden_states: `[batch, tokens, d_model]`.
            bias: `[batch, heads, tokens, keys]`, to be added to the scores.
            cache: keys after their norm, and values; or None.
        """
        queries, keys, values = self.Wqkv(hidden_states).chunk(3, dim=-1)
        heads = self.config.n_heads
        queries = split_heads(self.q_ln(queries), heads)
        keys, values = split_heads(self.k_ln(keys), heads), split_heads(values, heads)
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        if self.config._attn_implementation == "sdpa":
            found = scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        else:
            scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5 + bias
            found = scores.softmax(-1) @ values
        taken: torch.Tensor = self.out_proj(merge_heads(found))
        return taken


class MosaicMLP(nn.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, d_model: int, mlp_ratio: int) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(d_model, mlp_ratio * d_model, bias=False)
        self.mlp_down = nn.Linear(mlp_ratio * d_model, d_model, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., d_model]` to the same."""
        out: torch.Tensor = self.mlp_down(gelu(self.mlp_up(hidden_states)))
        return out


class MosaicBlock(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """One decoder layer, norms first."""

    def __init__(self, config: MosaicGPTConfig, index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = MosaicAttention(config, index)
        self.ln_2 = nn.LayerNorm(config.d_model, bias=False)
        self.mlp = MosaicMLP(config.d_model, config.mlp_ratio)

    def forward(
        self, hidden_states: torch.Tensor, bias: torch.Tensor, past_key_values: Any = None
    ) -> torch.Tensor:
        """`[batch, tokens, d_model]` to the same; arguments as for `MosaicAttention`."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), bias, past_key_values)
        after: torch.Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return after


class MosaicGPT(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The language model; its head is the embedding, under no name of its own.

    Args:
        config: a `MosaicGPTConfig`.

    >>> config = MosaicGPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=30)
    >>> MosaicGPT(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 30])
    """

    config_class = MosaicGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MosaicBlock"]  # noqa: RUF012 (an instance variable of the base)
    _supports_sdpa = True

    def __init__(self, config: MosaicGPTConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.d_model),
                "blocks": nn.ModuleList(
                    [MosaicBlock(config, index) for index in range(config.n_layers)]
                ),
                "ln_f": nn.LayerNorm(config.d_model, bias=False),
            }
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens, which is the head too."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> None:
        """None: there is no module for the head."""
        return

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits for the next token.

        Args:
            input_ids: `[batch, tokens]`.
            attention_mask: `[batch, keys]`, 0 for padding; keys are those of the cache and the
                tokens.
            past_key_values: a cache of transformers.
            inputs_embeds: `[batch, tokens, d_model]`, instead of `input_ids`.
            labels: `[batch, tokens]`, -100 where no loss is wanted; they are shifted here.
            use_cache: give a cache back; the config says what None is.
            output_hidden_states: give what goes into each layer, and what comes out of the last
                norm, `[batch, tokens, d_model]` each; the config says what None is.
            output_attentions: cannot be had.
            return_dict: False for a tuple; the config says what None is.
            logits_to_keep: only those of the last tokens; 0 for all.
            **kwargs: what transformers hands to every model, and has no meaning here.

        Returns:
            A `CausalLMOutputWithPast`: `logits` `[batch, tokens, vocab_size]`; `loss`,
            `past_key_values` and `hidden_states` where asked for.

        Raises:
            ValueError: neither tokens nor embeddings, or both; a mask of another length; a cache
                of fixed length; attentions are asked for.
        """
        del kwargs  # positions are ALiBi's
        if output_attentions:
            raise ValueError("a MosaicGPT does not give its attentions")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of `input_ids` and `inputs_embeds`")
        wte = self.transformer["wte"]
        hidden_states = wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("a MosaicGPT needs a cache that grows, such as `DynamicCache`")
        bias = self._bias(hidden_states, attention_mask, past_key_values)
        passed = []
        for block in self.transformer.get_submodule("blocks").children():
            passed.append(hidden_states)
            hidden_states = block(hidden_states, bias, past_key_values=past_key_values)
        hidden_states = self.transformer["ln_f"](hidden_states)
        passed.append(hidden_states)
        logits = hidden_states[:, -logits_to_keep:] @ wte.weight.T
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = cross_entropy(shifted[0].float(), shifted[1], ignore_index=-100)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(passed) if output_hidden_states else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _bias(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """Distance, padding and causality in one: `[batch or 1, heads, tokens, keys]`."""
        num_past = 0 if cache is None else int(cache.get_seq_length())
        num_tokens, dtype = hidden_states.shape[1], hidden_states.dtype
        num_keys, lowest = num_past + num_tokens, torch.finfo(dtype).min
        device = hidden_states.device
        bias = alibi_bias(
            self.config.n_heads, num_keys, self.config.alibi_bias_max, dtype=dtype, device=device
        )
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[1] != num_keys:
                raise ValueError(
                    f"`attention_mask` has the shape {tuple(attention_mask.shape)}; wanted are "
                    f"two axes, the second for {num_keys} keys"
                )
            bias = bias.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
        future = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=device)
        return bias.expand(-1, -1, num_tokens, -1).masked_fill(future.triu(num_past + 1), lowest)
