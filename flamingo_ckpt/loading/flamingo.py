"""OpenFlamingo's way in: a model of two pretrained towers, its image processor, its tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.devices import check_device
from flamingo_ckpt.loading.language import load_language_model, resize_rows
from flamingo_ckpt.loading.places import Access, config_folder
from flamingo_ckpt.loading.vision import load_vision_tower
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flamingo_ckpt.models.modules.flamingo import Flamingo

_logger = logging.getLogger(__name__)

END_OF_CHUNK: Final = "<|endofchunk|>"
MEDIA: Final = "<image>"
PAD: Final = "<PAD>"
#: What `flamingo_kwargs` may hold; the last two are of the towers, the others of the model.
_OPTIONS = (
    "vis_dim",
    "max_num_frames",
    "attn_implementation",
    "gradient_checkpointing",
    "force_quick_gelu",
    "device",
)

_CHOICES: Final = {
    "attn_implementation": ("sdpa", "eager"),
    "force_quick_gelu": (None, True, False),
}


def create_model_and_transforms(
    clip_vision_encoder_path: str | os.PathLike[str],
    clip_vision_encoder_pretrained: str | os.PathLike[str] | None,
    lang_encoder_path: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str],
    cross_attn_every_n_layers: int = 1,
    use_local_files: bool = False,
    decoder_layers_attr_name: str | None = None,
    freeze_lm_embeddings: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    **flamingo_kwargs: Any,
) -> tuple[Flamingo, Callable[[Any], torch.Tensor], Any]:
    """Build a Flamingo of a pretrained vision tower and a pretrained language model, in float32.

    Resampler and gated cross-attention are new: random, with all gates closed, so that the model
    speaks as the language model does until `load_pretrained` fills them or they are trained.
    Everything is frozen but those and (unless told otherwise) the input embeddings.

    The tokenizer gets `<|endofchunk|>` and `<image>`, and `<PAD>` where it has no padding token;
    the vocabulary is then resized to it, which is a cut where it was padded. The rows of new
    tokens are the same in every construction, also those of a head that is not tied.

    Args:
        clip_vision_encoder_path: a model name of open_clip, such as `ViT-L-14`; a folder with an
            `open_clip_config.json` or a `config.json` of transformers' CLIP; a repository with
            one of them, `owner/name` with or without `hf-hub:`.
        clip_vision_encoder_pretrained: with a name: a tag such as `openai`, or a file in any
            format and layout. A tag decides on QuickGELU; for a file the name does (`ViT-L-14` or
            `ViT-L-14-quickgelu`). None with a name gives a RANDOM tower, as upstream does, and
            logs a warning. With a folder or repository: None for its own weights.
        lang_encoder_path: a folder with a language model, or a repository of the hub. Its own code
            is never run: MosaicGPT (`mpt-1b-redpajama-200b`) and MPT have classes here, whatever
            the folder is called.
        tokenizer_path: a folder with a tokenizer, or a repository of the hub.
        cross_attn_every_n_layers: a gated block stands before every n-th decoder layer.
        use_local_files: never touch the network: the hub's cache has to have everything.
        decoder_layers_attr_name: path of the decoder layers of a language model that is not known.
        freeze_lm_embeddings: freeze the input embeddings as well.
        cache_dir: of the hub's cache, instead of its usual place.
        **flamingo_kwargs: `gradient_checkpointing`; `max_num_frames`, for video; `vis_dim`, where
            the tower will be replaced by one of that width; `attn_implementation` (`sdpa`,
            `eager`) of resampler and blocks; `force_quick_gelu` (True, False), against what the
            tower's name or tag says; `device`.

    Returns:
        (model, image processor, tokenizer). The model is in evaluation mode. The processor makes
        `[3, height, width]` of a PIL picture.

    Raises:
        TypeError: an unknown keyword, or one of `flamingo_kwargs` of another type.
        LoadError: weights that do not fill their tower; nothing is left random silently.
        CkptError: FC450 to FC455 for what cannot be found or used, FC470 to FC475 from the hub.
    """
    _check_options(flamingo_kwargs)
    access = Access(cache_dir=cache_dir, local_files_only=use_local_files)
    device = flamingo_kwargs.pop("device", None)
    check_device(device)
    quick_gelu = flamingo_kwargs.pop("force_quick_gelu", None)
    tokenizer = load_flamingo_tokenizer(os.fspath(tokenizer_path), access)
    language = load_language_model(
        os.fspath(lang_encoder_path),
        access,
        decoder_layers_attr_name=decoder_layers_attr_name,
        device=device,
    )
    _check_interval(cross_attn_every_n_layers, language.module.get_submodule(language.layers))
    weights = clip_vision_encoder_pretrained
    tower = load_vision_tower(
        os.fspath(clip_vision_encoder_path),
        None if weights is None else os.fspath(weights),
        access,
        force_quick_gelu=quick_gelu,
        device=device,
    )
    resize_rows(language.module, len(tokenizer))
    _take_padding(language.module, tokenizer)

    from flamingo_ckpt.models.modules.flamingo import Flamingo

    model = Flamingo.from_towers(
        tower.module,
        language.module,
        layers=language.layers,
        every=cross_attn_every_n_layers,
        eoc_token_id=tokenizer.convert_tokens_to_ids(END_OF_CHUNK),
        media_token_id=tokenizer.convert_tokens_to_ids(MEDIA),
        **{"vis_dim": tower.width, **flamingo_kwargs},
    ).eval()
    if device is not None:
        model.to(device)
    freeze(model, freeze_lm_embeddings=freeze_lm_embeddings)
    num_trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    _logger.info("Flamingo model initialized with %d trainable parameters", num_trained)
    return model, tower.image_processor, tokenizer


def freeze(model: Flamingo, *, freeze_lm_embeddings: bool = False) -> None:
    """Freeze all but the resampler, the gated blocks and (unless told) the input embeddings."""
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    language: Any = model.lang_encoder
    language.gated_cross_attn_layers.requires_grad_(True)
    if not freeze_lm_embeddings:
        language.get_input_embeddings().requires_grad_(True)


def load_flamingo_tokenizer(path: str, access: Access) -> Any:
    """A tokenizer with Flamingo's tokens: `<|endofchunk|>`, `<image>`, and `<PAD>` if it needs one.

    Special tokens that it has already stay special. Its padding side is its own.

    Raises:
        CkptError: FC454 where there is none that can be read without running its code.
    """
    folder = config_folder(path, access, "tokenizer")
    from transformers import AutoTokenizer

    from flamingo_ckpt.models.assemble import quiet_libraries

    try:
        # It leaves files open for the garbage collector, and wonders at a language model's config
        # beside the tokenizer whose type it does not know.
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever the libraries make of what is in the folder
        raise CkptError(
            f"the tokenizer cannot be read: {type(error).__name__}: "
            f"{escape((str(error).splitlines() or [''])[0])[:300]}",
            code="FC454",
            where=folder,
            hint="a folder with `tokenizer.json` is read by every version of transformers; a "
            "tokenizer that brings its own code is not run",
        ) from error
    # The second argument: keep the special tokens that are there. Its name varies by version.
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK, MEDIA]}, False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _take_padding(language: Any, tokenizer: Any) -> None:
    """`generate` asks for the token that fills up rows; transformers else warns and takes `eos`."""
    settings = getattr(language, "generation_config", None)
    if settings is not None and settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


def _check_options(options: dict[str, Any]) -> None:
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise TypeError(
            "create_model_and_transforms() got unexpected keyword arguments "
            + ", ".join(f"'{name}'" for name in unknown)
            + "; flamingo_kwargs may be "
            + ", ".join(f"'{name}'" for name in _OPTIONS)
        )
    for name, choices in _CHOICES.items():
        if name in options and options[name] not in choices:
            raise TypeError(f"`{name}` is {options[name]!r}, not one of {choices}")
    for name in ("vis_dim", "max_num_frames"):
        value = options.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise TypeError(f"`{name}` is {value!r}, not a number from 1")


def _check_interval(every: int, layers: nn.Module) -> None:
    num_layers = len(list(layers.children()))
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= num_layers:
        raise CkptError(
            f"`cross_attn_every_n_layers` is {every!r}, but the language model has {num_layers} "
            "layers",
            code="FC455",
            hint=f"from 1 (before each) to {num_layers} (before the last)",
        )
