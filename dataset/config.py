"""The dataset configuration file (TOML or JSON) -> frozen dataclasses. Rules: docs/formats.md#dataset-file."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset.buckets import Buckets
from utils.errors import ConfigError, suggest
from utils.files import require_file
from utils.images import LONGEST_SIDE, STEP
from utils.parsing import parse_json, parse_toml
from wan.frames.encoding import Encoding, encoding_named
from wan.frames.layout import ALPHA, INDEX_KEYS, OneFrameLayout, layout_from_toml
from wan.frames.sizes import AS_TARGET, ControlSizes

log = logging.getLogger(__name__)


# Readers of one value: the value as the file gives it -> the field's value, or ConfigError with reason and fix.
def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ConfigError("must be true or false; write one without quotes")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):  # 1.0 does not count either
        raise ConfigError("is not a whole number; write one without quotes or decimal point")
    return value


def _count(value: object) -> int:
    count = _integer(value)
    if count < 1:
        raise ConfigError("is too small; use 1 or more")
    return count


def _indices(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(index) is int for index in value):
        raise ConfigError("is not a list of whole numbers; write for example [0]")
    return tuple(value)


def _size(value: object) -> tuple[int, int]:
    size = [value, value] if type(value) is int else value
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise ConfigError("is not a size; write [width, height] as whole numbers, or one number for a square")
    if min(size) < STEP:
        raise ConfigError(f"is too small; each side needs at least {STEP} pixels")
    if max(size) > LONGEST_SIDE:
        raise ConfigError(f"is too large; each side may have at most {LONGEST_SIDE} pixels")
    return size[0], size[1]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError("is not text; write it in quotes")
    return value


def _suffix(value: object) -> str:
    suffix = _text(value)
    if "." not in suffix:
        raise ConfigError(f"has no dot; write '.{suffix}'")
    return suffix


def _layout_name(value: object) -> str:
    return encoding_named(_text(value)).name


def _alpha(value: object) -> str:
    text = _text(value)
    if text not in ALPHA:
        raise ConfigError(f"is unknown{suggest(text, ALPHA) or '; use mask or ignore'}")
    return text


def _path(value: object) -> Path:
    text = _text(value)
    if any(ord(letter) < 32 for letter in text):  # "data\target" holds a tab
        raise ConfigError("holds a control character; write / instead of \\, or use single quotes")
    return Path(text)


def _setting(
    read: Callable[[Any], Any], default: Any = dataclasses.MISSING, key: str | None = None, general: bool = False
) -> Any:
    """A field that is also a key of [[datasets]] (named `key`, or like the field) and, with `general`, of [general]."""
    return dataclasses.field(default=default, metadata={"read": read, "key": key, "general": general})


@dataclass(frozen=True, kw_only=True)
class ImageDatasetConfig:
    """One [[datasets]] entry with every default filled in. Sizes are (width, height) in pixels."""

    resolution: tuple[int, int] = _setting(_size, (960, 544), general=True)
    caption_extension: str | None = _setting(_suffix, None, general=True)
    batch_size: int = _setting(_count, 1, general=True)
    num_repeats: int = _setting(_count, 1, general=True)
    enable_bucket: bool = _setting(_flag, False, general=True)
    bucket_no_upscale: bool = _setting(_flag, False, general=True)
    alpha: str = _setting(_alpha, "mask", general=True)  # one of ALPHA
    image_directory: Path | None = _setting(_path, None)
    image_jsonl_file: Path | None = _setting(_path, None)  # used only without image_directory
    control_directory: Path | None = _setting(_path, None)  # used only with image_directory
    target_mask_directory: Path | None = _setting(_path, None)  # used only with image_directory
    cache_directory: Path = _setting(_path)  # default: image_directory
    validation: bool = _setting(_flag, False)  # never trained on; the loss of its items shows how training goes
    clean_indices: tuple[int, ...] | None = _setting(_indices, None, key="fp_1f_clean_indices")
    target_index: int | None = _setting(_integer, None, key="fp_1f_target_index")
    layout_name: str | None = _setting(_layout_name, None, key="fp_1f_layout")  # None: independent
    control_resolution: tuple[int, int] | None = _setting(_size, None)
    no_resize_control: bool = _setting(_flag, False)
    no_post: bool = _setting(_flag, False, key="fp_1f_no_post")  # for FramePack; no effect on Wan
    latent_window_size: int = _setting(_count, 9, key="fp_latent_window_size")  # for FramePack; no effect on Wan

    @property
    def source(self) -> str:
        """The folder or list of the images."""
        path = self.image_directory or self.image_jsonl_file
        return "" if path is None else path.as_posix()

    @property
    def layout(self) -> OneFrameLayout:
        """The RoPE time indices of an item's frames. Raises ConfigError for indices that don't fit together."""
        return self.layout_of(self.clean_indices, self.target_index)

    def layout_of(
        self,
        clean_indices: Sequence[int] | None,
        target_index: int | None,
        controls: int | None = None,
        keys: tuple[str, str] = INDEX_KEYS,
    ) -> OneFrameLayout:
        """Layout of an item with these indices and this number of control images, if known; see `layout_from_toml`."""
        return layout_from_toml(clean_indices, target_index, controls, self.encoding, keys, self.control_sizes)

    def layout_of_cached(self, cached: OneFrameLayout, owned: bool) -> OneFrameLayout:
        """The layout of an item whose latents are cached at another one; owned: by the item, not by its dataset.

        Without indices in the configuration an item keeps those that it is cached at.
        """
        if owned or (self.clean_indices is None and self.target_index is None):
            return dataclasses.replace(cached, encoding=self.encoding, control_sizes=self.control_sizes)
        return self.layout_of(self.clean_indices, self.target_index, len(cached.control_indices))

    @property
    def encoding(self) -> Encoding:
        """How images become latent frames."""
        return encoding_named(self.layout_name)

    @property
    def control_sizes(self) -> ControlSizes:
        """Sizes that control images are brought to."""
        return ControlSizes(self.control_resolution, self.no_resize_control)

    @cached_property
    def buckets(self) -> Buckets:
        """The sizes that targets, and controls without sizes of their own, are brought to."""
        return Buckets(self.resolution, self.enable_bucket, self.bucket_no_upscale)


@dataclass(frozen=True)
class ImageFolder:
    """Targets with their captions in files beside them; control images and masks are matched by name."""

    targets: Path
    caption_extension: str
    controls: Path | None
    target_masks: Path | None


@dataclass(frozen=True)
class ImageList:
    """A JSONL file that names the images and captions of each item."""

    path: Path


@dataclass(frozen=True)
class DatasetsConfig:
    """A whole dataset configuration file."""

    datasets: tuple[ImageDatasetConfig, ...]
    path: Path  # of the file, for messages

    @property
    def layout_name(self) -> str | None:
        """The layout of all datasets; None when they differ."""
        names = {dataset.layout_name for dataset in self.datasets}
        return names.pop() if len(names) == 1 else None

    @property
    def alpha(self) -> str:
        """The `alpha` of all datasets; where they differ, that of masks."""
        found = {dataset.alpha for dataset in self.datasets}
        return found.pop() if len(found) == 1 else "mask"

    @property
    def control_sizes(self) -> ControlSizes:
        """Control sizes of all datasets; where they differ, the size of the target."""
        sizes = {dataset.control_sizes for dataset in self.datasets}
        return sizes.pop() if len(sizes) == 1 else AS_TARGET


_FIELDS = {field.metadata["key"] or field.name: field for field in dataclasses.fields(ImageDatasetConfig)}
_GENERAL = {key: field for key, field in _FIELDS.items() if field.metadata["general"]}

_NO_IMAGES = "has no images; add image_directory or image_jsonl_file"
_NO_VIDEO = "video datasets are not supported yet; use image_directory or image_jsonl_file"
_OTHER_NAMES = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
_REFUSED = {
    **dict.fromkeys(("video_directory", "video_jsonl_file", "target_frames", "frame_extraction"), _NO_VIDEO),
    **dict.fromkeys(("frame_stride", "frame_sample", "max_frames", "source_fps"), _NO_VIDEO),
    "multiple_target": "is not supported, it is for Qwen-Image-Layered only; remove the key",
}


def read_config(
    path: str | Path, batch_size: int | None = None, layout: str | None = None, alpha: str | None = None
) -> DatasetsConfig:
    """Read and check a dataset configuration file, but not the files that it names: see `image_source`.

    A value comes from the [[datasets]] entry, else from [general], else (batch_size, layout, alpha) from the command
    line, else from the default. Raises ConfigError with one line for anything the user must fix.
    """
    path = require_file(path, "--dataset_config")
    command_line: dict[str, Any] = {"layout_name": layout} | ({} if alpha is None else {"alpha": alpha})
    if batch_size is not None:
        command_line["batch_size"] = _read("--batch_size", _count, batch_size)
    try:
        return DatasetsConfig(_read_datasets(_load(path), command_line), path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _load(path: Path) -> Any:
    if path.suffix.lower() not in (".toml", ".json"):
        raise ConfigError(f"suffix '{path.suffix}' is unknown; name the file .toml or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); check the file") from None
    try:
        if path.suffix.lower() == ".toml":
            return parse_toml(text)
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {error.lineno}: {error.msg}; correct the JSON there") from None


def _read_datasets(document: Any, defaults: dict[str, Any]) -> tuple[ImageDatasetConfig, ...]:
    if not isinstance(document, Mapping):
        raise ConfigError("holds no table; write 'general' and 'datasets'")
    for key in document:
        if key not in ("general", "datasets"):
            raise ConfigError(_unknown(key, ("general", "datasets")))
    general, entries = document.get("general", {}), document.get("datasets", [])
    if not isinstance(general, Mapping):
        raise ConfigError("general: is not a table; write [general] and its keys below")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError("datasets: is not a list of tables; write [[datasets]] with two brackets")
    if not entries:
        raise ConfigError("holds no dataset; add a [[datasets]] entry")
    defaults = defaults | _read_table("general", general, _GENERAL)
    datasets = [
        _complete(f"datasets[{i}]", defaults | _read_table(f"datasets[{i}]", entry, _FIELDS))
        for i, entry in enumerate(entries)
    ]
    _check_caches(datasets)
    return tuple(datasets)


def _read_table(place: str, table: Mapping[str, Any], known: Mapping[str, dataclasses.Field[Any]]) -> dict[str, Any]:
    """Keys as the file names them -> values by field name."""
    values = {}
    for key, value in table.items():
        if key in _OTHER_NAMES:
            log.warning("%s.%s: is called %s now", place, key, _OTHER_NAMES[key])
            key = _OTHER_NAMES[key]
            if key in table:
                raise ConfigError(f"{place}.{key}: is given twice, under an older name too; remove that one")
        if key in _REFUSED:
            raise ConfigError(f"{place}.{key}: {_REFUSED[key]}")
        if key not in known and key in _FIELDS:
            raise ConfigError(f"{place}.{key}: belongs to one dataset; move it below [[datasets]]")
        if key not in known:
            raise ConfigError(f"{place}: {_unknown(key, known)}")
        values[known[key].name] = _read(f"{place}.{key}", known[key].metadata["read"], value)
    return values


def _read(place: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ConfigError as error:
        shown = json.dumps(value, ensure_ascii=False, default=str)  # spelt as in the file, and on one line
        raise ConfigError(f"{place} = {shown}: {error}") from None


def _unknown(key: str, known: Iterable[str]) -> str:
    return f"unknown key '{key}'{suggest(key, known) or '; known are ' + ', '.join(known)}"


def _complete(place: str, values: dict[str, Any]) -> ImageDatasetConfig:
    if "image_directory" not in values and "image_jsonl_file" not in values:
        raise ConfigError(f"{place}: {_NO_IMAGES}")
    if "cache_directory" not in values and "image_directory" not in values:
        raise ConfigError(f"{place}.cache_directory: is missing; a JSONL dataset needs a folder for its caches")
    dataset = ImageDatasetConfig(**{"cache_directory": values.get("image_directory"), **values})
    try:
        _ = dataset.layout
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    return dataset


def image_source(place: str, dataset: ImageDatasetConfig) -> ImageFolder | ImageList:
    """Where the images of a dataset come from.

    Raises ConfigError, starting with `place`, unless these files and folders exist and make sense together.
    """
    if dataset.image_directory is None:
        if dataset.image_jsonl_file is None:
            raise ConfigError(f"{place}: {_NO_IMAGES}")
        path = require_file(dataset.image_jsonl_file, f"{place}.image_jsonl_file")
        if dataset.control_directory is not None:
            log.warning("%s.control_directory is ignored: a JSONL file names its control images itself", place)
        if dataset.target_mask_directory is not None:
            log.warning("%s.target_mask_directory is ignored: a JSONL file names its masks itself", place)
        return ImageList(path)
    if dataset.image_jsonl_file is not None:
        log.warning("%s.image_jsonl_file is ignored: image_directory is given too", place)
    for key in ("image_directory", "control_directory", "target_mask_directory"):
        folder = getattr(dataset, key)
        if folder is not None and not folder.is_dir():
            kind = "is a file, not a folder" if folder.exists() else "does not exist"
            raise ConfigError(f"{place}.{key} {folder}: {kind}; check the path")
    for key, what in (("control_directory", "control images"), ("target_mask_directory", "masks")):
        folder = getattr(dataset, key)
        if folder is not None and _same(folder) == _same(dataset.image_directory):
            raise ConfigError(f"{place}.{key}: is the image_directory too; give {what} their own folder")
    if dataset.caption_extension is None:
        raise ConfigError(f'{place}.caption_extension: is missing; add for example caption_extension = ".txt"')
    return ImageFolder(
        dataset.image_directory, dataset.caption_extension, dataset.control_directory, dataset.target_mask_directory
    )


def _check_caches(datasets: list[ImageDatasetConfig]) -> None:
    """Two datasets in one cache folder would train on, and clean away, each other's files."""
    owners: dict[str, int] = {}
    for i, dataset in enumerate(datasets):
        first = owners.setdefault(_same(dataset.cache_directory), i)
        if first != i:
            raise ConfigError(
                f"datasets[{i}].cache_directory {dataset.cache_directory}: is the cache of datasets[{first}] too;"
                " give each dataset its own cache_directory"
            )


def _same(path: Path) -> str:
    """Equal for two spellings of one path."""
    return os.path.normcase(path.resolve())
