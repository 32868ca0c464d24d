"""The tokenizer of a release folder: from its files alone, padded right, and fitting the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    from flamingo_ckpt.loading.paligemma_config import PaliGemmaSettings

#: Any of these holds a vocabulary.
_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
IMAGE_TOKEN: Final = "<image>"  # noqa: S105


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder, padded right whatever its own config says.

    Nothing is downloaded and no code from the folder is run.

    Raises:
        CkptError: FC456 without a tokenizer, or with one that cannot be used.
    """
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _VOCABULARIES):
        raise CkptError(
            "the folder has no tokenizer: " + " or ".join(f"`{n}`" for n in _VOCABULARIES[:2]),
            code="FC456",
            where=folder,
            hint="copy the tokenizer's files from the release that the weights were trained from",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="right", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the libraries make of broken files
        raise CkptError(
            f"the tokenizer cannot be read: {type(error).__name__}: "
            f"{escape((str(error).splitlines() or [''])[0])[:300]}",
            code="FC456",
            where=folder,
            hint="a tokenizer that brings its own code is not run",
        ) from error
    if tokenizer.padding_side != "right":
        raise CkptError(
            f"the tokenizer pads {tokenizer.padding_side} and ignores `padding_side`",
            code="FC456",
            where=folder,
        )
    return tokenizer


def check_tokenizer(tokenizer: Any, settings: PaliGemmaSettings, folder: str) -> int:
    """The id of the picture's token, on which tokenizer and config must agree.

    Raises:
        CkptError: FC456 where the tokenizer is of another vocabulary, FC401 where neither tells
            the picture's token.
    """
    if len(tokenizer) > settings.num_rows:
        raise CkptError(
            f"the tokenizer has {len(tokenizer)} tokens, and the vocabulary {settings.num_rows} "
            "rows: some tokens have no embedding",
            code="FC456",
            where=folder,
            hint="it belongs to another model, or tokens were added after the weights were saved",
        )
    told: int | None = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    told = None if told == tokenizer.unk_token_id else told
    wanted = settings.image_token
    if told is None and wanted is None:
        raise CkptError(
            f"the config has no `image_token_index`, and the tokenizer knows no `{IMAGE_TOKEN}`",
            code="FC401",
            where=settings.where,
            hint="the releases of PaliGemma have 257152",
        )
    if told is not None and wanted is not None and told != wanted:
        raise CkptError(
            f"`image_token_index` is {wanted}, and the tokenizer's `{IMAGE_TOKEN}` "
            f"is {told}: pictures would go where no token asks for one",
            code="FC456",
            where=settings.where,
            hint="config and tokenizer are of different releases",
        )
    found = wanted if told is None else told
    assert found is not None, "checked above"
    return found
