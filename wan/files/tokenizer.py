"""The tokenizer of umT5: from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import ConfigError
from utils.files import not_downloaded
from utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_REPOSITORY = "google/umt5-xxl"
_TOKENIZER_FILE = "tokenizer.json"


def check_tokenizer(directory: str | Path | None) -> None:
    """Raise ConfigError when `directory` holds no tokenizer. None stands for the hub, which is not asked here."""
    if directory is not None and not (Path(directory) / _TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"--t5_tokenizer {directory}: holds no {_TOKENIZER_FILE}; give the folder of {_TOKENIZER_REPOSITORY}'s"
        )


def load_tokenizer(directory: str | Path | None) -> PreTrainedTokenizerBase:
    """The umT5 tokenizer of a local folder, or from the hub (and its cache) with None.

    tokenizer.json is used as it is: AutoTokenizer of transformers 5 rebuilds tokenizers of class T5Tokenizer and loses
    their Unicode normalisation, which changes the tokens of full-width characters, so of most Chinese prompts.
    """
    check_tokenizer(directory)
    from transformers import PreTrainedTokenizerFast

    file = _hub_tokenizer() if directory is None else Path(directory) / _TOKENIZER_FILE
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        fits = tokenizer("").input_ids == [tokenizer.eos_token_id]
    except Exception:  # the tokenizers package raises bare Exceptions
        fits = False
    if not fits:
        reason = not_downloaded(file) or f"is not a umT5 tokenizer; use the one of {_TOKENIZER_REPOSITORY}"
        raise ConfigError(f"--t5_tokenizer {file}: {reason}")
    return tokenizer


def _hub_tokenizer() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_TOKENIZER_REPOSITORY, _TOKENIZER_FILE))
    except Exception as error:  # no network, a proxy, a missing cache: each library below has its own exceptions
        raise ConfigError(
            f"--t5_tokenizer is missing and the hub cannot be reached ({one_line(type(error).__name__)}); "
            f"download {_TOKENIZER_FILE} of {_TOKENIZER_REPOSITORY} and give its folder as --t5_tokenizer DIR"
        ) from None
