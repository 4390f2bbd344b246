"""Cache files of captions: names, keys, metadata, and when one is out of date (docs/formats.md#text-caches)."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.cache_files import RECIPE, changed_reason, find_key, keys_of, opened, write_tensors
from utils.dtypes import dtype_name
from utils.errors import ConfigError

log = logging.getLogger(__name__)

_SUFFIX = "_wan_te.safetensors"
_TEXT = re.compile(r"varlen_t5_\w+")
_SCRIPT = "wan_cache_text_encoder_outputs.py"


def text_cache_path(directory: Path, stem: str) -> Path:
    """`<stem>_wan_te.safetensors`."""
    return directory / f"{stem}{_SUFFIX}"


def list_text_caches(directory: Path) -> list[Path]:
    """Every file of the folder that is named like a text cache, sorted."""
    return sorted(path for path in directory.iterdir() if path.name.endswith(_SUFFIX))


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Everything but the caption that decides on the contents of a text cache."""

    t5: str  # fingerprint of the file
    dtype: str
    recipe: int = RECIPE
    source: str = ""  # of the item: tells whose cache it is, and is not compared


@dataclass(frozen=True)
class TextHeader:
    """Shape, caption and metadata of a text cache, read without its tensor."""

    length: int  # tokens
    width: int
    caption: str | None
    metadata: Mapping[str, str]


def write_text_cache(path: Path, embedding: Tensor, caption: str, settings: TextSettings | None = None) -> None:
    """Write the embedding [L, D] of a caption whole.

    As in the reference, whatever else an existing file holds is kept.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    if path.is_file():
        try:
            with opened(path, _SCRIPT) as file:
                tensors = {key: file.get_tensor(key).clone() for key in keys_of(file) if not _TEXT.fullmatch(key)}
                metadata = file.metadata() or {}
        except ConfigError as error:
            log.warning("%s; replaced", error)
    if metadata.get("caption1", caption) != caption:
        log.warning("%s: the caption has changed; replaced", path)
    tensors[f"varlen_t5_{dtype_name(embedding.dtype)}"] = embedding
    write_tensors(path, tensors, {**metadata, "caption1": caption}, settings)


def read_text_header(path: Path) -> TextHeader:
    """Shape and metadata. Raises ConfigError when the file is damaged or no text cache."""
    with opened(path, _SCRIPT) as file:
        length, width = file.get_slice(_text_key(path, file)).get_shape()
        metadata = file.metadata() or {}
    return TextHeader(length, width, metadata.get("caption1"), metadata)


def read_text_cache(path: Path) -> Tensor:
    """The embedding [L, D] in its stored dtype. Raises ConfigError as `read_text_header` does."""
    with opened(path, _SCRIPT) as file:
        embedding: Tensor = file.get_tensor(_text_key(path, file))
        return embedding.clone()


def text_stale_reason(path: Path, caption: str, expected: TextSettings, warned: set[Path] | None = None) -> str | None:
    """Why the text cache at `path` must be made again, or None. warned: as for `latent_stale_reason`."""
    if not path.is_file():
        return "not cached yet"
    try:
        header = read_text_header(path)
    except ConfigError:
        return "no readable text cache"
    if header.caption != caption:
        return "caption changed"
    reasons = {
        "t5": "other T5",
        "dtype": "T5 dtype {} -> {}",
        "recipe": "made by another version of this script",
    }
    return changed_reason(path, header.metadata, expected, reasons, set() if warned is None else warned)


def _text_key(path: Path, file: Any) -> str:
    key = find_key(file, _TEXT)
    if key is None or len(file.get_slice(key).get_shape()) != 2:
        raise ConfigError(f"{path}: holds no text embedding; delete it and run {_SCRIPT} again")
    return key
