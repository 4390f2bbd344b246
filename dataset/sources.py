"""The files of a dataset -> items: a target image, its control images and its caption.

Rules: docs/formats.md#lists and docs/formats.md#control-matching.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.config import DatasetsConfig, ImageDatasetConfig, ImageFolder, ImageList, image_source
from utils.errors import ConfigError, suggest
from utils.files import name_key
from utils.images import (
    IMAGE_SUFFIXES,
    Resize,
    check_image,
    check_mask_size,
    named_like_image,
    named_like_other_image,
)
from utils.parsing import parse_json
from utils.text import some
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import Size

log = logging.getLogger(__name__)

_CONTROL_KEY = re.compile(r"control_(path|mask)(?:_([0-9]{1,9}))?")
_SECOND_TARGET = re.compile(r"image_path_0*[1-9][0-9]*")
_OWN_INDICES = ("control_index", "target_index")
_FIELDS = ("image_path", "caption", "control_path", "control_mask", "target_mask", *_OWN_INDICES)


@dataclass(frozen=True)
class Item:
    """One example to train on. Sizes are (width, height) in pixels."""

    stem: str  # file name of the target without suffix; names the caches, unique within a dataset
    target: Path
    controls: tuple[Path, ...]  # one per control index of the layout, in that order; empty when not asked for
    caption: str
    dataset: int  # position of its dataset in the configuration
    size: tuple[int, int]  # of the target file, upright
    bucket: tuple[int, int]  # what the target is resized to
    layout: OneFrameLayout
    owns_layout: bool  # the layout is the item's own, whatever its dataset says
    target_mask: Path | None
    control_masks: tuple[Path | None, ...]  # as many as controls
    control_fits: tuple[Resize, ...] = ()  # what is done to each control
    alpha: bool = True  # alpha channels of images without a mask file are masks
    source: str = ""  # the folder or list that it comes from, as the configuration names it

    @property
    def target_fit(self) -> Resize:
        """Resizing and cropping of the target."""
        return Resize(self.size, self.bucket)

    @property
    def unmasked(self) -> tuple[Path, ...]:
        """The images without a mask file, whose alpha channel may be one."""
        files = zip((self.target, *self.controls), (self.target_mask, *self.control_masks), strict=True)
        return tuple(path for path, mask in files if mask is None)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of the frames in pixels: the controls as given, then the target."""
        return *(fit.bucket for fit in self.control_fits), self.bucket


@dataclass(frozen=True)
class Source:
    """An item as the folder or list names it, before any image is looked at."""

    target: Path
    caption: str
    controls: tuple[Path, ...] = ()  # all there are
    control_masks: tuple[Path | None, ...] = ()  # as many
    target_mask: Path | None = None
    layout: OneFrameLayout | None = None  # where the item has its own


def find_all_items(config: DatasetsConfig) -> list[Item]:
    """Items of all datasets, in the order of the configuration; see `find_items`."""
    return _of_all(config, find_items)


def find_all_targets(config: DatasetsConfig) -> list[Item]:
    """Items of all datasets without their control images and masks: all that caching of captions needs."""
    return _of_all(config, find_targets)


def _of_all(config: DatasetsConfig, find: Callable[[ImageDatasetConfig, int], list[Item]]) -> list[Item]:
    try:
        return [item for i, dataset in enumerate(config.datasets) for item in find(dataset, i)]
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error}") from None


def find_items(config: ImageDatasetConfig, index: int) -> list[Item]:
    """The items of one dataset: a folder's in the order of their names, a JSONL file's in its own order.

    index: its position in the configuration. Images are not decoded, only their headers are read. Raises ConfigError,
    starting with `datasets[index]`, when files are missing, broken or too small, when an item has fewer control images
    than control indices, when two targets have one stem, and when there is no item at all.
    """
    place = f"datasets[{index}]"
    source = image_source(place, config)
    key = _images_key(source, place)
    control_key = f"{place}.control_directory" if isinstance(source, ImageFolder) else key
    sources = _read_sources(source, config, place)
    shared = _check_controls(sources, config, place)
    items = []
    for one in sources:
        item = make_item(one, config, index, shared, check_image(one.target, key), key)
        items.append(_with_fits(item, key, control_key))
    return items


def find_targets(config: ImageDatasetConfig, index: int) -> list[Item]:
    """The items of one dataset without control images, masks and layouts of their own. Raises as `find_items` does."""
    place = f"datasets[{index}]"
    source = image_source(place, config)
    key = _images_key(source, place)
    if isinstance(source, ImageFolder):
        source = replace(source, controls=None, target_masks=None)
    items = []
    for one in _read_sources(source, config, place):
        bare = Source(one.target, one.caption)
        items.append(make_item(bare, config, index, config.layout, check_image(one.target, key), key))
    return items


def _images_key(source: ImageFolder | ImageList, place: str) -> str:
    """Place and key of the dataset file that name the images of a dataset."""
    return f"{place}.image_directory" if isinstance(source, ImageFolder) else f"{place}.image_jsonl_file"


def read_sources(config: ImageDatasetConfig, index: int) -> list[Source]:
    """The entries of a dataset's folder or list, before any image is looked at. Raises as `find_items` does."""
    place = f"datasets[{index}]"
    return _read_sources(image_source(place, config), config, place)


def _read_sources(source: ImageFolder | ImageList, config: ImageDatasetConfig, place: str) -> list[Source]:
    key = _images_key(source, place)
    try:
        sources = _from_jsonl(source, config, key) if isinstance(source, ImageList) else _from_folder(source, place)
    except OSError as error:
        raise ConfigError(f"{place}: {error.filename} cannot be read ({error.strerror}); check the file") from None
    _refuse_same_stems(sources, key)
    return sources


def make_item(
    source: Source,
    config: ImageDatasetConfig,
    index: int,
    shared: OneFrameLayout,
    size: tuple[int, int],
    key: str,
) -> Item:
    """The item of a source whose target has `size`; shared: the layout of those without one of their own.

    Its `control_fits` are left to who looks at the control images.
    """
    layout = source.layout or shared
    count = len(layout.control_indices)
    try:
        bucket = config.buckets.choose(size)
    except ConfigError as error:
        raise ConfigError(f"{key} {source.target}: {error}") from None
    return Item(
        stem=source.target.stem,
        target=source.target,
        controls=source.controls[:count],
        caption=source.caption,
        dataset=index,
        size=size,
        bucket=bucket,
        layout=layout,
        owns_layout=source.layout is not None,
        target_mask=source.target_mask,
        control_masks=source.control_masks[:count],
        alpha=config.alpha == "mask",
        source=config.source,
    )


def _with_fits(item: Item, key: str, control_key: str) -> Item:
    """Look at the headers of controls and masks."""
    if item.target_mask is not None:
        _check_mask(item.target_mask, item.target, item.size, key)
    fits = []
    for control, mask in zip(item.controls, item.control_masks, strict=True):
        size = check_image(control, control_key)
        try:
            fits.append(item.layout.control_sizes.fit(size, item.bucket))
        except ConfigError as error:
            raise ConfigError(f"{control_key} {control}: {error}") from None
        if mask is not None:
            _check_mask(mask, control, size, control_key)
            if not item.layout.encoding.takes_masks:
                raise ConfigError(
                    f"{control_key} {control}: has a mask, which the {item.layout.encoding.name} layout does not take; "
                    "remove it or fp_1f_layout"
                )
    return replace(item, control_fits=tuple(fits))


def _check_mask(mask: Path, image: Path, size: tuple[int, int], key: str) -> None:
    check_mask_size(mask, check_image(mask, f"mask of {key}"), image, size)


def _from_folder(folder: ImageFolder, place: str) -> list[Source]:
    targets = list_images(folder.targets)
    stems = {stem_key(target) for target in targets}
    controls: dict[str, tuple[Path, ...]] = {}
    control_masks: dict[Path, Path] = {}
    target_masks: dict[Path, Path] = {}
    if folder.controls is not None:
        control_masks, candidates = masks_beside(stems, list_images(folder.controls))
        controls, strangers = match_controls(stems, candidates)
        if strangers:
            log.warning(
                "%s.control_directory: %s ignored, because the name doesn't end in _<number>: %s",
                place,
                _images_are(strangers),
                some(path.name for path in strangers),
            )
    if folder.target_masks is not None:
        target_masks = _target_masks(targets, folder.target_masks, place)
    for name, path in (("image_directory", folder.targets), ("control_directory", folder.controls)):
        if path is not None and (others := list_other_pictures(path)):
            suffixes = f"{', '.join(IMAGE_SUFFIXES[:-1])} or {IMAGE_SUFFIXES[-1]}"
            what = f"{_images_are(others)} ignored, because the name doesn't end in {suffixes}"
            log.warning("%s.%s: %s: %s", place, name, what, some(other.name for other in others))
    captions = caption_files(folder)
    sources, uncaptioned = [], []
    for target in targets:
        if stem_key(target) in captions:
            caption = read_text(captions[stem_key(target)], f"{place}.caption_extension").strip()
            own = controls.get(stem_key(target), ())
            masks = tuple(control_masks.get(control) for control in own)
            sources.append(Source(target, caption, own, masks, target_masks.get(target)))
        else:
            uncaptioned.append(target)
    if not sources:
        reason = f"no image has a caption file ({folder.caption_extension})" if targets else "holds no images"
        raise ConfigError(f"{place}.image_directory {folder.targets}: {reason}; check the path and the names")
    if uncaptioned:
        log.warning(
            "%s: %s skipped without a caption file: %s",
            place,
            _images_are(uncaptioned),
            some(path.name for path in uncaptioned),
        )
    return sources


def list_images(folder: Path) -> list[Path]:
    """The images of a dataset's folder by name, with links to files that are not there, which opening them tells."""
    return sorted(path for path in folder.iterdir() if named_like_image(path) and _file_or_link(path))


def list_other_pictures(folder: Path) -> list[Path]:
    """The files of a dataset's folder that are named like pictures of kinds that it does not take."""
    return sorted(path for path in folder.iterdir() if named_like_other_image(path) and path.is_file())


def caption_files(folder: ImageFolder) -> dict[str, Path]:
    """Key of a target's stem -> the file that holds its caption, or a link to one that is not there."""
    end = name_key(folder.caption_extension)
    names = {name_key(path.name): path for path in folder.targets.iterdir() if _file_or_link(path)}
    return {name.removesuffix(end): path for name, path in names.items() if name.endswith(end)}


def stem_key(path: Path) -> str:
    """Equal for files whose names without suffix are the same, see `name_key`."""
    return name_key(path.stem)


def _file_or_link(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())


def masks_beside(stems: set[str], images: list[Path]) -> tuple[dict[Path, Path], list[Path]]:
    """Control image -> its mask, `<name>_mask` beside it, and the images that are no masks; stems: keys of targets."""
    masked = {f"{stem_key(path)}_mask": path for path in images}
    names = {path: stem_key(path) for path in images}
    found = {masked[name]: path for path, name in names.items() if name in masked and name not in stems}
    return found, [path for path in images if path not in found.values()]


def _target_masks(targets: list[Path], folder: Path, place: str) -> dict[Path, Path]:
    """Target -> the image of the same name in the folder; ConfigError when no target has one."""
    by_stem = {stem_key(path): path for path in list_images(folder)}
    found = {target: by_stem[stem_key(target)] for target in targets if stem_key(target) in by_stem}
    if not found:
        raise ConfigError(f"{place}.target_mask_directory {folder}: holds no image named like a target; check the path")
    if bare := [target for target in targets if target not in found]:
        log.info(
            "%s: %s without a file in target_mask_directory: %s",
            place,
            _images_are(bare),
            some(path.name for path in bare),
        )
    return found


def match_controls(stems: set[str], candidates: list[Path]) -> tuple[dict[str, tuple[Path, ...]], list[Path]]:
    """Key of a target's stem -> its control images in order: `S`, then `S_0`, `S_1`, ... by number, then by file name.

    Also returns the images that begin like a target but don't end in a number.

    A control image belongs to the longest stem S with which its name begins, `S.` or `S_`; captions play no part in
    that, so the images of an uncaptioned target don't go to another one.
    """
    found: dict[str, list[tuple[int, str, Path]]] = {}
    strangers = []
    for path in candidates:
        name, own = name_key(path.name), stem_key(path)
        ends = [i for i, letter in enumerate(name) if letter in "._"]
        stem = next((name[:end] for end in reversed(ends) if name[:end] in stems), None)
        number = own.rpartition("_")[2]
        if stem is None:
            continue
        if own == stem:
            found.setdefault(stem, []).append((0, path.name, path))
        elif number.isdecimal():
            found.setdefault(stem, []).append((int(number) + 1, path.name, path))
        else:
            strangers.append(path)
    return {stem: tuple(path for *_, path in sorted(numbered)) for stem, numbered in found.items()}, strangers


def _from_jsonl(source: ImageList, config: ImageDatasetConfig, place: str) -> list[Source]:
    path, sources = source.path, []
    for number, line in enumerate(read_text(path, place).split("\n"), start=1):  # splitlines() also cuts at U+2028
        if line.strip():
            try:
                sources.append(parse_line(line, config))
            except ConfigError as error:
                raise ConfigError(f"{place} {path}:{number}: {error}") from None
    if not sources:
        raise ConfigError(f"{place} {path}: holds no images; write one JSON object a line")
    return sources


def parse_line(line: str, config: ImageDatasetConfig) -> Source:
    """An item of a JSONL file. Raises ConfigError for what is wrong with its line."""
    try:
        fields = parse_json(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not JSON ({error.msg} at column {error.colno}); correct the line") from None
    if not isinstance(fields, dict):
        raise ConfigError('is not a JSON object; write {"image_path": ..., "caption": ..., "control_path": ...}')
    files: dict[str, dict[int, Path]] = {"path": {}, "mask": {}}
    if "video_path" in fields:
        raise ConfigError("video_path: video datasets are not supported yet; give image_path")
    if {"image_path", "image_path_0"} <= fields.keys():
        raise ConfigError("image_path_0: is the same as image_path, which is given too; remove one of them")
    for key in fields:
        if _SECOND_TARGET.fullmatch(key):
            raise ConfigError(f"{key}: several targets per item are not supported; write one line for each")
        match = _CONTROL_KEY.fullmatch(key)
        if match is None and key not in (*_FIELDS, "image_path_0"):
            raise ConfigError(f"unknown key '{key}'{suggest(key, _FIELDS) or '; known are ' + ', '.join(_FIELDS)}")
        if match:
            number, numbered = int(match[2] or 0), files[match[1]]
            if number in numbered:
                raise ConfigError(f"{key}: there is a control image {number} already; number them 0, 1, 2, ...")
            numbered[number] = Path(_text_field(fields, key))
    target = Path(_text_field(fields, "image_path_0" if "image_path_0" in fields else "image_path"))
    controls, masks = files["path"], files["mask"]
    if lonely := sorted(masks.keys() - controls.keys()):
        raise ConfigError(f"control_mask_{lonely[0]}: there is no control image {lonely[0]}; add its control_path")
    order = sorted(controls)
    return Source(
        target=target,
        caption=_text_field(fields, "caption", blank=True),
        controls=tuple(controls[number] for number in order),
        control_masks=tuple(masks.get(number) for number in order),
        target_mask=Path(_text_field(fields, "target_mask")) if "target_mask" in fields else None,
        layout=_own_layout(fields, len(controls), config),
    )


def _own_layout(fields: dict[str, Any], controls: int, config: ImageDatasetConfig) -> OneFrameLayout | None:
    """The layout that a line asks for by `control_index` and `target_index`; a missing one is the dataset's."""
    if not fields.keys() & {*_OWN_INDICES}:
        return None
    indices, target = (fields.get(key) for key in _OWN_INDICES)
    if type(indices) is int:
        indices = [indices]
    if indices is not None and not (isinstance(indices, list) and all(type(index) is int for index in indices)):
        raise ConfigError(
            f"control_index = {json.dumps(indices)}: is not a list of whole numbers; write for example [0]"
        )
    if target is not None and type(target) is not int:
        raise ConfigError(f"target_index = {json.dumps(target)}: is not a whole number; write for example 1")
    indices = config.clean_indices if indices is None else indices
    target = config.target_index if target is None else target
    return config.layout_of(indices, target, controls, _OWN_INDICES)


def _text_field(fields: dict[str, Any], key: str, blank: bool = False) -> str:
    if key not in fields:
        raise ConfigError(f"'{key}' is missing; add it")
    value = fields[key]
    if not isinstance(value, str) or not (blank or value.strip()):
        raise ConfigError(f"{key} = {json.dumps(value, ensure_ascii=False)}: is not text; write it in quotes")
    return value


def _refuse_same_stems(sources: list[Source], place: str) -> None:
    first: dict[str, Path] = {}
    for source in sources:
        same = first.setdefault(stem_key(source.target), source.target)
        if same == source.target and same is not source.target:
            raise ConfigError(
                f"{place}: {same} is the target of two items, which would share their cache files; for the second one, "
                "copy or link it under another name"
            )
        if same is not source.target:
            raise ConfigError(f"{place}: {same} and {source.target} would share their cache files; rename one of them")


def _check_controls(sources: list[Source], config: ImageDatasetConfig, place: str) -> OneFrameLayout:
    """The layout of the items without one of their own, after comparing it with the control images they have."""
    sources = [source for source in sources if source.layout is None]
    if not sources:
        return config.layout
    most = max(len(source.controls) for source in sources)
    if most == 0:
        fix = "add control_directory" if config.image_directory is not None else "add control_path to each line"
        if config.control_directory is not None:
            fix = f"name the files in {config.control_directory} like the targets"
        raise ConfigError(f"{place}: no image has a control image, and one-frame training needs them; {fix}")
    try:  # without indices, one control image is assumed, and finding more than one is an error
        assumed = most if config.clean_indices is None else None
        layout = config.layout_of(config.clean_indices, config.target_index, assumed)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    needed = len(layout.control_indices)
    lacking = [source.target for source in sources if len(source.controls) < needed]
    if lacking:
        raise ConfigError(
            f"{place}.fp_1f_clean_indices = {list(layout.control_indices)}: {_images_are(lacking)} without {needed}"
            f" control image{'s' * (needed > 1)}: {some(path.name for path in lacking)}; add them or change the indices"
        )
    if surplus := [source.target for source in sources if len(source.controls) > needed]:
        log.warning(
            "%s: only the first %d control images are used for %s", place, needed, some(path.name for path in surplus)
        )
    return layout


def read_text(path: Path, place: str) -> str:
    """A UTF-8 file. Raises ConfigError when it is none, OSError when it can't be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _images_are(paths: list[Path]) -> str:
    return "1 image is" if len(paths) == 1 else f"{len(paths)} images are"
