"""Which size an image of a dataset is brought to: one of a list with about the same area, nearest in aspect ratio."""

import logging
import math
from dataclasses import dataclass
from functools import cached_property

from utils.errors import ConfigError
from utils.images import STEP, floor16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Buckets:
    """The sizes of one dataset (docs/formats.md#buckets). Sizes are (width, height) in pixels."""

    resolution: tuple[int, int]  # with buckets only its area matters, without them it is the only size
    enabled: bool = False
    no_upscale: bool = False  # images of at most the area keep their size; ignored without buckets

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes in ascending order, sides are multiples of 16. Logs a warning when the resolution had to be cut."""
        width, height = self.resolution
        if not self.enabled:
            size = floor16(width), floor16(height)
            if size != self.resolution:
                log.warning("resolution %dx%d is cut to %dx%d, multiples of 16", width, height, *size)
            return (size,)
        area, side = width * height, math.isqrt(width * height)
        widths = range(max(STEP, floor16(side // 2)), side + STEP, STEP)
        pairs = [(w, floor16(area // w)) for w in widths if area // w >= STEP]
        return tuple(sorted({*pairs, *((h, w) for w, h in pairs)}))

    def choose(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that an image of `size` is resized to. Raises ConfigError for images with a side below 16."""
        width, height = size
        if min(size) < STEP:
            raise ConfigError(f"{width}x{height} pixels are too few; images need at least {STEP} a side")
        if self.enabled and self.no_upscale and width * height <= math.prod(self.resolution):
            return floor16(width), floor16(height)
        return min(self.sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))
