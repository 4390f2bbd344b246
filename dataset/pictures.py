"""The pictures of one item, looked at: what is wrong with the files, and how target and controls go together."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.config import ImageDatasetConfig
from dataset.likeness import Pixels, largest_difference, shift_between
from dataset.problems import Problem
from dataset.sources import Item, Source, make_item
from utils.errors import ConfigError
from utils.files import fingerprint
from utils.images import Resize, check_image, check_mask_size, open_masked, resize_to_fill
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import Size

# Where a picture starts to suffer: choices of ours.
_ENLARGED = 1.5  # times
_HUGE = 8.0  # times what the bucket needs, each side
_CROPPED = 0.2  # share of the pixels
_SHAPE = 0.02  # relative difference of the aspect ratios; more shifts the edges by over 1 % of the side
_IDENTICAL = 4.0  # levels of 255, see `largest_difference`
_STEP = 2  # pixels of shift that resizing may cause


@dataclass(frozen=True)
class _Picture:
    """A file, decoded and brought to its bucket."""

    path: Path
    fit: Resize  # what was done to it
    pixels: Pixels  # [height, width, 3] uint8
    mask: Pixels | None  # the same, 255 where the picture counts


def look(
    config: ImageDatasetConfig, index: int, shared: OneFrameLayout, alignment: bool, source: Source
) -> tuple[Item | None, list[Problem]]:
    """The item, or None when it can't be used, and everything wrong with it. Other arguments as in `make_item`."""
    found: list[Problem] = []
    needed = len((source.layout or shared).control_indices)
    target = str(source.target)
    if len(source.controls) < needed:
        message = f"has {len(source.controls)} of {needed} control images"
        found.append(Problem("D06", target, message, "add them beside the others, or change the indices"))
    for path in source.controls[needed:]:
        message = f"is not used: {target} has {len(source.controls)} control images for {needed} indices"
        key = "control_index of the line" if source.layout else "fp_1f_clean_indices"
        found.append(Problem("D08", str(path), message, f"add an index to {key}, or remove the file"))
    item = _item(found, source, config, index, shared)
    if item is None:
        return None, found
    masks = (item.target_mask, *item.control_masks)
    paths = (item.target, *item.controls)
    target_fit = partial(Resize, bucket=item.bucket)
    control_fit = partial(item.layout.control_sizes.fit, target=item.bucket)
    fits: list[Callable[[Size], Resize]] = [target_fit, *[control_fit] * needed]
    alpha = item.alpha
    pictures = [_open(found, path, mask, alpha, fit) for path, mask, fit in zip(paths, masks, fits, strict=False)]
    _check_black(found, item, pictures)
    _check_controls(found, item)
    opened = [picture for picture in pictures if picture is not None]
    if len(opened) == len(pictures):
        target_picture, *controls = opened
        item = replace(item, control_fits=tuple(control.fit for control in controls))
        _check_sizes(found, item, opened, config)
        for control in controls:
            _compare(found, target_picture, control, alignment)
    stopped = any(problem.kind.severity == "error" for problem in found)
    return None if stopped else item, found


def _item(
    found: list[Problem], source: Source, config: ImageDatasetConfig, index: int, shared: OneFrameLayout
) -> Item | None:
    """The item, as far as its target's size is known and large enough."""
    try:
        size = check_image(source.target, "")
    except ConfigError as error:
        found.append(Problem.of_error("D15", source.target, ConfigError(str(error).lstrip())))
        return None
    try:
        return make_item(source, config, index, shared, size, "")
    except ConfigError as error:
        found.append(Problem.of_error("D16", source.target, ConfigError(str(error).lstrip())))
        return None


def _open(
    found: list[Problem], path: Path, mask: Path | None, alpha: bool, fitted: Callable[[tuple[int, int]], Resize]
) -> _Picture | None:
    """fitted: what is done to an image of a size; ConfigError when it is too small."""
    code = "D15"
    try:
        size = check_image(path, "")
        if mask is not None:
            mask_size = check_image(mask, "")
            code = "D23"
            check_mask_size(mask, mask_size, path, size)
            code = "D15"
        image, coverage = open_masked(path, "", mask, alpha)
        code = "D36"
        fit = fitted(size)
    except ConfigError as error:
        place = mask if mask is not None and str(mask) in str(error) else path
        text = str(error).replace(f"mask of  {mask}", str(mask)).removeprefix("mask ").lstrip()
        found.append(Problem.of_error(code, place, ConfigError(text)))
        return None
    shown = None if coverage is None else _filled(coverage.convert("RGB"), fit)
    return _Picture(path, fit, _filled(image, fit), shown)


def _filled(image: Image.Image, fit: Resize) -> Pixels:
    return resize_to_fill(np.asarray(image), fit.bucket, fit.crop_only)


def _check_black(found: list[Problem], item: Item, pictures: list[_Picture | None]) -> None:
    for i, picture in enumerate(pictures):
        if picture is None or picture.mask is None:
            continue
        mask = (item.target_mask, *item.control_masks)[i] or picture.path
        if i > 0 and not item.layout.encoding.takes_masks and item.control_masks[i - 1] is not None:
            message = f"masks of controls are not for the {item.layout.encoding.name} layout"
            found.append(Problem("D26", str(mask), message, "remove it, or fp_1f_layout"))
        elif not picture.mask.any():
            message = f"masks all of {picture.path}" if mask != picture.path else "is transparent all over"
            fix = "paint white what is to be used" + (", or leave the item out" if i == 0 else "")
            found.append(Problem("D25" if i else "D24", str(mask), message, fix))


def _check_sizes(found: list[Problem], item: Item, pictures: list[_Picture], config: ImageDatasetConfig) -> None:
    larger = "use a larger picture or a lower resolution"
    if not config.bucket_no_upscale:
        larger += f", or set bucket_no_upscale{'' if config.enable_bucket else ' and enable_bucket'} = true"
    for picture in pictures:
        fit, name = picture.fit, str(picture.path)
        size, bucket = ("{}x{}".format(*each) for each in (fit.size, fit.bucket))
        if fit.scale > _ENLARGED:
            message = f"{size} pixels are enlarged {fit.scale:.1f} times to {bucket}"
            found.append(Problem("D17", name, message, larger))
        if fit.scale < 1 / _HUGE:
            message = f"{size} pixels are {1 / fit.scale:.0f} times what {bucket} needs"
            found.append(Problem("D18", name, message, "shrink it, so that caching reads it faster"))
    fit = pictures[0].fit
    if fit.cropped > _CROPPED:
        message = f"{fit.cropped:.0%} of it is cropped to fit {'{}x{}'.format(*item.bucket)}"
        fix = "crop it yourself" + ("" if config.enable_bucket else ", or set enable_bucket = true")
        found.append(Problem("D19", str(item.target), message, fix))
    width, height = item.size
    for control in () if item.layout.control_sizes else pictures[1:]:
        ratio = control.fit.size[0] / control.fit.size[1] / (width / height)
        if max(ratio, 1 / ratio) > 1 + _SHAPE:
            message = f"{'{}x{}'.format(*control.fit.size)} is another shape than the {width}x{height} of its target"
            found.append(Problem("D20", str(control.path), message, "crop both alike, or their contents don't align"))


def _compare(found: list[Problem], target: _Picture, control: _Picture, alignment: bool) -> None:
    shown = resize_to_fill(control.pixels, target.fit.bucket)
    if largest_difference(target.pixels, shown) < _IDENTICAL:
        message = f"is nearly the same picture as its target {target.path}"
        found.append(Problem("D21", str(control.path), message, "there is nothing to learn from it; check the pair"))
    elif alignment and (shift := shift_between(shown, target.pixels)) and max(map(abs, shift)) >= _STEP:
        message = f"is shifted by {shift[0]:+d},{shift[1]:+d} pixels (right, down) against {control.path}"
        found.append(Problem("D22", str(target.path), message, "align the two, unless the move is to be learnt"))


def _check_controls(found: list[Problem], item: Item) -> None:
    """Controls that are one picture."""
    first: dict[str, Path] = {}
    for path in item.controls:
        if path.is_file() and (same := first.setdefault(fingerprint(path), path)) is not path:
            message = f"is the same picture as {same}, another control of {item.target}"
            found.append(Problem("D09", str(path), message, "give each index its own picture"))
