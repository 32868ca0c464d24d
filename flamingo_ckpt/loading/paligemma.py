"""`load_hf_model`: a folder with a PaliGemma becomes a model and a tokenizer, or an error.

The function that programs written from scratch around PaliGemma have, with the model class of
transformers. It loads any of the layouts in which PaliGemma is stored, and nothing by halves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.loading.devices import check_device
from flamingo_ckpt.loading.engine import LoadOptions, LoadReport, load_into
from flamingo_ckpt.loading.paligemma_config import PaliGemmaSettings, hf_config, read_settings
from flamingo_ckpt.loading.paligemma_tokenizer import check_tokenizer, load_tokenizer
from flamingo_ckpt.loading.paligemma_weights import examine
from flamingo_ckpt.tensors import TORCH_DTYPES, escape

if TYPE_CHECKING:
    import torch
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

_HEAD_KEY = "lm_head.weight"
_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPaliGemma:
    """A PaliGemma, and how it came about.

    Attributes:
        model: in evaluation mode.
        tokenizer: pads right.
        report: what was loaded, cast, and inferred.
    """

    model: PaliGemmaForConditionalGeneration
    tokenizer: Any
    report: LoadReport


def load_hf_model(
    model_path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    dtype: str | torch.dtype | None = None,
    layout: str | None = None,
    wrapper_key: str | None = None,
    npy_bfloat16: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PaliGemmaForConditionalGeneration, Any]:
    """A PaliGemma and its tokenizer from a folder; `load_paligemma` gives the report as well.

    The model is in evaluation mode, as after `from_pretrained`. The tokenizer pads right. The
    folder holds `config.json`, the tokenizer and the weights: safetensors or torch files, one or
    several with an index, in any layout, or big_vision's `.npz`.

    Args:
        model_path: the folder.
        device: of the model: `cpu`, `cuda`, `cuda:1`, `mps`, or a device of torch.
        dtype: to cast to, such as `bfloat16`; None keeps the file's, which must be one for all.
        layout: of the file's keys, by name; None: by evidence.
        wrapper_key: of torch files: the weights are under this key.
        npy_bfloat16: read 2-byte void elements of `.npz` as bfloat16.
        attn_implementation: `eager` or `sdpa`; None is the class's own choice.

    Raises:
        LoadError: keys are missing, or unexpected, or of another shape; with a grouped report.
        CkptError: FC401 to FC405 about the config, FC456 the tokenizer, FC205 another picture size,
            FC418 another vocabulary, FC457 ties, FC458 several dtypes, FC459 adapters or quantised
            weights; and what opening the files raises.
    """
    loaded = load_paligemma(
        model_path,
        device,
        dtype=dtype,
        layout=layout,
        wrapper_key=wrapper_key,
        npy_bfloat16=npy_bfloat16,
        attn_implementation=attn_implementation,
    )
    return loaded.model, loaded.tokenizer


def load_paligemma(
    model_path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    dtype: str | torch.dtype | None = None,
    layout: str | None = None,
    wrapper_key: str | None = None,
    npy_bfloat16: bool = False,
    attn_implementation: str | None = None,
) -> LoadedPaliGemma:
    """The same as `load_hf_model`, with the report of the load.

    Raises:
        CkptError: as `load_hf_model`.
    """
    folder = os.fspath(model_path)
    if not os.path.isdir(folder):
        raise CkptError(
            f"there is no folder `{escape(folder)}`",
            code="FC404",
            hint="download the release first: its folder holds config, tokenizer and weights",
        )
    wanted = _dtype_name(dtype)
    check_device(device)
    settings = read_settings(folder)
    manifest = open_checkpoint(folder, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    weights = examine(manifest, settings, layout, will_cast=wanted is not None)
    _import_models()
    tokenizer = load_tokenizer(folder)
    image_token = check_tokenizer(tokenizer, settings, folder)
    config = hf_config(
        settings, image_token, wanted or weights.dtype or "float32", weights.num_rows
    )
    model = _build(config, settings.where, attn_implementation)
    report = load_into(
        model,
        weights.manifest,
        LoadOptions(
            policy="strict",
            layout=weights.layout,
            config=settings.model,
            device=device,
            may_miss=frozenset({_HEAD_KEY}) if settings.tied else frozenset(),
        ),
    )
    notes = [*settings.notes, *weights.notes]
    if weights.num_rows < settings.num_rows:
        notes.append(_add_rows(model, weights.num_rows, settings))
    _use_generation_config(model, folder)
    model.train(False)
    report = replace(report, findings=(*report.findings, *notes))
    return LoadedPaliGemma(model=model, tokenizer=tokenizer, report=report)


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """`bfloat16`, of a name or an object of torch."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    known = TORCH_DTYPES.get(name)
    if known is None or not known.is_real_float or known.bits < 16:
        raise CkptError(
            f"dtype={escape(repr(dtype))[:60]} is no dtype that a model computes in",
            code="FC006",
            hint='"bfloat16", "float16", "float32" or "float64"',
        )
    return name


def _import_models() -> None:
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()


def _build(
    config: PaliGemmaConfig, where: str, attn_implementation: str | None
) -> PaliGemmaForConditionalGeneration:
    """The model on meta: its shapes and no memory."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    make: Any = PaliGemmaForConditionalGeneration._from_config
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with torch.device("meta"):
            model: PaliGemmaForConditionalGeneration = make(config, dtype=config.dtype, **options)
    except Exception as error:  # whatever the class makes of its config
        raise CkptError(
            f"cannot construct the model: {type(error).__name__}: "
            f"{escape((str(error).splitlines() or [''])[0])}",
            code="FC405",
            where=where,
        ) from error
    return model


def _add_rows(model: Any, have: int, settings: PaliGemmaSettings) -> Finding:
    """Rows of zeros after the tokens, which big_vision's files end with.

    Args:
        model: loaded.
        have: rows of the file.
        settings: tell how many are wanted.
    """
    import torch
    from torch import nn

    rows = settings.num_rows
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    for module in (embedding, head):
        if module is head and is_tied:
            head.weight = embedding.weight
            continue
        stored = module.weight
        grown = torch.zeros((rows, stored.shape[1]), dtype=stored.dtype, device=stored.device)
        grown[:have] = stored.detach()
        module.weight = nn.Parameter(grown, requires_grad=stored.requires_grad)
    embedding.num_embeddings = head.out_features = rows
    model.config.text_config.vocab_size = rows
    model.model.vocab_size = model.model.language_model.vocab_size = rows
    return Finding(
        code="FC418",
        severity="info",
        key="model.language_model.embed_tokens.weight",
        detail=f"{rows - have} rows of zeros follow its {have}, as {settings.where} says",
        data={"rows": rows, "source_rows": have, "zero_rows": rows - have},
    )


def _use_generation_config(model: PaliGemmaForConditionalGeneration, folder: str) -> None:
    """What the release says of `generate`, where it says something."""
    path = os.path.join(folder, _GENERATION_CONFIG)
    if not os.path.isfile(path):
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the class makes of its fields
        raise CkptError(
            f"the generation config cannot be read: {type(error).__name__}: "
            f"{escape((str(error).splitlines() or [''])[0])}",
            code="FC408",
            where=path,
        ) from error
