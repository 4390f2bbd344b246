"""The files of a dataset -> items: a target image, its control images and its caption (spec dataset.md 3, 4 and 10)."""

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.config import DatasetsConfig, ImageDatasetConfig
from utils.errors import ConfigError
from utils.images import IMAGE_SUFFIXES, check_image
from wan.one_frame import OneFrameLayout, layout_from_toml

log = logging.getLogger(__name__)

_SHOWN = 3  # messages about many files name this many
_CONTROL_KEY = re.compile(r"control_path(?:_([0-9]+))?")
_SECOND_TARGET = re.compile(r"image_path_0*[1-9][0-9]*")


@dataclass(frozen=True)
class Item:
    """One example to train on. Sizes are (width, height) in pixels."""

    stem: str  # file name of the target without suffix; names the caches, unique within a dataset
    target: Path
    controls: tuple[Path, ...]  # one per control index of the layout, in that order; empty when not asked for
    caption: str
    dataset: int  # position of its dataset in the configuration
    size: tuple[int, int]  # of the target file, upright
    bucket: tuple[int, int]  # what target and controls are resized to
    layout: OneFrameLayout


@dataclass(frozen=True)
class _Source:
    """What the folder or list says about an item, before any image is looked at."""

    target: Path
    caption: str
    controls: tuple[Path, ...]  # all there are


def find_all_items(config: DatasetsConfig, need_controls: bool) -> list[Item]:
    """The items of all datasets, in the order of the configuration; see `find_items`."""
    try:
        return [item for i, dataset in enumerate(config.datasets) for item in find_items(dataset, i, need_controls)]
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error}") from None


def find_items(config: ImageDatasetConfig, index: int, need_controls: bool) -> list[Item]:
    """The items of one dataset: a folder's in the order of their names, a JSONL file's in its own order.

    config: from `read_config` with its sources checked; index: its position there; need_controls: find the control
    images as well and refuse items with fewer of them than there are control indices. Images are not decoded, only
    their headers are read. Raises ConfigError, starting with `datasets[index]`, when files are missing, broken or too
    small, when two targets have one stem, and when there is no item at all.
    """
    place = f"datasets[{index}]"
    try:
        if config.image_directory is not None:
            key, control_key = f"{place}.image_directory", f"{place}.control_directory"
            sources = _from_folder(config, place, need_controls)
        else:
            key = control_key = f"{place}.image_jsonl_file"
            sources = _from_jsonl(config.image_jsonl_file, key)
    except OSError as error:
        raise ConfigError(f"{place}: {error.filename} cannot be read ({error.strerror}); check the file") from None
    _refuse_same_stems(sources, key)
    layout = _check_controls(sources, config, place) if need_controls else config.layout
    items = []
    for source in sources:
        controls = source.controls[: len(layout.control_indices)] if need_controls else ()
        size = check_image(source.target, key)
        for control in controls:
            check_image(control, control_key)
        try:
            bucket = config.buckets.choose(size)
        except ConfigError as error:
            raise ConfigError(f"{key} {source.target}: {error}") from None
        items.append(Item(source.target.stem, source.target, controls, source.caption, index, size, bucket, layout))
    return items


def _from_folder(config: ImageDatasetConfig, place: str, need_controls: bool) -> list[_Source]:
    targets = _images(config.image_directory)
    controls: dict[str, tuple[Path, ...]] = {}
    if need_controls and config.control_directory is not None:
        controls = _match({target.stem for target in targets}, _images(config.control_directory), place)
    sources, uncaptioned = [], []
    for target in targets:
        caption_file = target.with_name(target.stem + config.caption_extension)
        if caption_file.is_file():
            caption = _read_text(caption_file, f"{place}.caption_extension").strip()
            sources.append(_Source(target, caption, controls.get(target.stem, ())))
        else:
            uncaptioned.append(target)
    if not sources:
        reason = f"no image has a caption file ({config.caption_extension})" if targets else "holds no images"
        raise ConfigError(f"{place}.image_directory {config.image_directory}: {reason}; check the path and the names")
    if uncaptioned:
        log.warning(
            "%s: %s skipped for want of a caption file: %s", place, _images_are(uncaptioned), _some(uncaptioned)
        )
    return sources


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in IMAGE_SUFFIXES and path.is_file())


def _match(stems: set[str], candidates: list[Path], place: str) -> dict[str, tuple[Path, ...]]:
    """Stem of a target -> its control images in order: `S`, then `S_0`, `S_1`, ... by number, then by file name.

    A control image belongs to the longest stem S with which its name begins, `S.` or `S_`; captions play no part in
    that, so the images of an uncaptioned target don't go to another one.
    """
    found: dict[str, list[tuple[int, str, Path]]] = {}
    strangers = []
    for path in candidates:
        ends = [i for i, letter in enumerate(path.name) if letter in "._"]
        stem = next((path.name[:end] for end in reversed(ends) if path.name[:end] in stems), None)
        number = path.stem.rpartition("_")[2]
        if stem is None:
            continue
        if path.stem == stem:
            found.setdefault(stem, []).append((0, path.name, path))
        elif number.isdecimal():
            found.setdefault(stem, []).append((int(number) + 1, path.name, path))
        else:
            strangers.append(path)
    if strangers:
        log.warning(
            "%s.control_directory: %s ignored, because the name doesn't end in _<number>: %s",
            place,
            _images_are(strangers),
            _some(strangers),
        )
    return {stem: tuple(path for *_, path in sorted(numbered)) for stem, numbered in found.items()}


def _from_jsonl(path: Path, place: str) -> list[_Source]:
    sources = []
    for number, line in enumerate(_read_text(path, place).split("\n"), start=1):  # splitlines() also cuts at U+2028
        if line.strip():
            try:
                sources.append(_parse_line(line))
            except ConfigError as error:
                raise ConfigError(f"{place} {path}:{number}: {error}") from None
    if not sources:
        raise ConfigError(f"{place} {path}: holds no images; write one JSON object a line")
    return sources


def _parse_line(line: str) -> _Source:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is no JSON ({error.msg} at column {error.colno}); correct the line") from None
    if not isinstance(fields, dict):
        raise ConfigError('is no JSON object; write {"image_path": ..., "caption": ..., "control_path": ...}')
    controls: dict[int, Path] = {}
    for key in fields:
        if _SECOND_TARGET.fullmatch(key):
            raise ConfigError(f"{key}: several targets per item are not supported; write one line for each")
        if match := _CONTROL_KEY.fullmatch(key):
            number = int(match[1] or 0)
            if number in controls:
                raise ConfigError(f"{key}: there is a control image {number} already; number them 0, 1, 2, ...")
            controls[number] = Path(_text_field(fields, key))
    if "video_path" in fields:
        raise ConfigError("video_path: video datasets are not supported yet; give image_path")
    target = _text_field(fields, "image_path_0" if "image_path_0" in fields else "image_path")
    return _Source(
        Path(target), _text_field(fields, "caption", blank=True), tuple(controls[n] for n in sorted(controls))
    )


def _text_field(fields: dict[str, Any], key: str, blank: bool = False) -> str:
    if key not in fields:
        raise ConfigError(f"'{key}' is missing; add it")
    value = fields[key]
    if not isinstance(value, str) or not (blank or value.strip()):
        raise ConfigError(f"{key} = {json.dumps(value, ensure_ascii=False)}: is no text; write it in quotes")
    return value


def _refuse_same_stems(sources: list[_Source], place: str) -> None:
    first: dict[str, Path] = {}
    for source in sources:
        same = first.setdefault(os.path.normcase(source.target.stem), source.target)
        if same is not source.target:
            raise ConfigError(f"{place}: {same} and {source.target} would share their cache files; rename one of them")


def _check_controls(sources: list[_Source], config: ImageDatasetConfig, place: str) -> OneFrameLayout:
    """The layout, after comparing it with the control images that were found."""
    most = max(len(source.controls) for source in sources)
    if most == 0:
        fix = "add control_directory" if config.image_directory is not None else "add control_path to each line"
        if config.control_directory is not None:
            fix = f"name the files in {config.control_directory} like the targets"
        raise ConfigError(f"{place}: no image has a control image, and one-frame training needs them; {fix}")
    try:  # without indices, one control image is assumed, and finding more than one is an error
        layout = layout_from_toml(
            config.clean_indices, config.target_index, most if config.clean_indices is None else None
        )
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    needed = len(layout.control_indices)
    lacking = [source.target for source in sources if len(source.controls) < needed]
    if lacking:
        raise ConfigError(
            f"{place}.fp_1f_clean_indices = {list(layout.control_indices)}: {_images_are(lacking)} without {needed}"
            f" control image{'s' * (needed > 1)}: {_some(lacking)}; add them or change the indices"
        )
    if surplus := [source.target for source in sources if len(source.controls) > needed]:
        log.warning("%s: only the first %d control images are used for %s", place, needed, _some(surplus))
    return layout


def _read_text(path: Path, place: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _images_are(paths: list[Path]) -> str:
    return "1 image is" if len(paths) == 1 else f"{len(paths)} images are"


def _some(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
