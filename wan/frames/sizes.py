"""Frames of several sizes: which one a control image has, and one tensor [C, F, H, W] for all frames.

A smaller frame sits in the top left corner of its slot; the rest of the slot is padding, which no network sees and no
loss counts. Sizes of images are (width, height) in pixels, those of frames multiples of 16.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from utils.errors import ConfigError
from utils.images import LONGEST_SIDE, STEP, Resize, floor16
from wan.nets.tokens import FrameSizes

SIZE_KEYS = ("control_resolution", "no_resize_control")

Size = tuple[int, int]


@dataclass(frozen=True)
class ControlSizes:
    """Sizes of control images: without either field that of the target (docs/formats.md#control-sizes)."""

    resolution: Size | None = None  # their own size, of which only the area counts
    no_resize: bool = False  # they keep their size; with a resolution those up to its area do

    def __bool__(self) -> bool:
        """Whether they may have another size than the target."""
        return self.resolution is not None or self.no_resize

    def __str__(self) -> str:
        """Nothing, or `control_resolution=512x768,no_resize_control=true`."""
        values = ("{}x{}".format(*self.resolution) if self.resolution else "", "true" * self.no_resize)
        return ",".join(f"{key}={value}" for key, value in zip(SIZE_KEYS, values, strict=True) if value)

    def fit(self, size: Size, target: Size) -> Resize:
        """How a control image of this size becomes a frame. ConfigError when a side would be below 16 pixels."""
        area = math.prod(self.resolution or ())
        if self.no_resize and (self.resolution is None or math.prod(size) <= area):
            fit = Resize(size, (floor16(size[0]), floor16(size[1])), crop_only=True)
        else:
            fit = Resize(size, _nearest(area, size[0] / size[1]) if self else target)
        if min(fit.bucket) < STEP:
            raise ConfigError(f"{size[0]}x{size[1]} pixels leave a side below {STEP} with {self}; use another image")
        return fit


AS_TARGET = ControlSizes()


def parse_resolution(text: str) -> Size:
    """`512` or `512x768` (width, height) -> size. ConfigError for other texts."""
    match = re.fullmatch(r"(\d{2,5})(?:x(\d{2,5}))?", text)
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or min(size) < STEP or max(size) > LONGEST_SIDE:
        raise ConfigError(
            f"control_resolution={text} is not a size of at least {STEP} a side and at most "
            f"{LONGEST_SIDE}; give e.g. 512 or 512x768"
        )
    return size


def _nearest(area: int, ratio: float) -> Size:
    """The size nearest in aspect ratio among five with about this area, in multiples of 16 pixels."""
    middle = floor16(int(math.sqrt(area * ratio)))
    widths = [width for k in range(-2, 3) if (width := middle + STEP * k) > 0]
    sizes = [(width, height) for width in widths if (height := floor16(area // width)) > 0]
    return min(sizes, key=lambda size: abs(size[0] / size[1] - ratio), default=(0, 0))


def padded(frames: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [..., h, w] -> [..., H, W] of the largest h and w, zeros below and to the right of them."""
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (-2, -1))
    return [pad_to(frame, height, width) for frame in frames]


def pad_to(frame: Tensor, height: int, width: int) -> Tensor:
    """[..., h, w] -> [..., height, width]; the tensor itself where that is its size."""
    missing = width - frame.shape[-1], height - frame.shape[-2]
    return F.pad(frame, (0, missing[0], 0, missing[1])) if any(missing) else frame


def frame_of(frames: Tensor, slot: int, sizes: FrameSizes | None) -> Tensor:
    """[C, F, H, W] -> that frame [C, 1, h, w] without padding."""
    rows, columns = (None, None) if sizes is None else sizes[slot]
    return frames[:, slot : slot + 1, :rows, :columns]
