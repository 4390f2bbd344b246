"""How alike two pictures of one size are: whether anything differs, and whether one is shifted against the other."""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""An RGB picture: [height, width, 3]."""

_BLOCK = 16  # pixels a side
_SAME = 12  # levels of 255 that compression and resizing may change in a pixel
_MOSTLY = 0.6  # share of the pixels


def largest_difference(one: Pixels, other: Pixels) -> float:
    """The mean difference, in levels of 255, of the blocks of 16 x 16 pixels that differ most.

    Images are [height, width, 3] uint8; their sides are multiples of 16. Compression spreads its error over the
    picture, while an edit, however small, changes some block.
    """
    difference = np.abs(one.astype(np.float32) - other.astype(np.float32)).mean(axis=2)
    height, width = difference.shape
    blocks = difference.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return float(blocks.mean(axis=(1, 3)).max())


def shift_between(one: Pixels, other: Pixels) -> tuple[int, int] | None:
    """(right, down) in pixels by which `other` is moved against `one`; None where most of the picture is not the same.

    The peak of the phase correlation (Kuglin and Hines 1975), believed when moving back by it makes most pixels equal
    and at least halves the difference. Images as in `largest_difference`; moves of up to a quarter of the size.
    """
    grey = [image.astype(np.float32).mean(axis=2) for image in (one, other)]
    height, width = grey[0].shape
    window = np.outer(np.hanning(height), np.hanning(width))
    spectra = [np.fft.fft2((image - image.mean()) * window) for image in grey]
    cross = spectra[1] * spectra[0].conj()
    peak = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-9)).real.argmax()
    down, right = (int(place) for place in np.unravel_index(peak, (height, width)))
    down, right = (down - height if down > height // 2 else down), (right - width if right > width // 2 else right)
    if (down, right) == (0, 0) or abs(down) > height // 4 or abs(right) > width // 4:
        return None
    before = np.abs(grey[0] - grey[1])
    after = np.abs(_overlap(grey[0], -down, -right) - _overlap(grey[1], down, right))
    same = (after < _SAME).mean() >= _MOSTLY
    return (right, down) if same and after.mean() < before.mean() / 2 else None


def _overlap(image: NDArray[np.float32], down: int, right: int) -> NDArray[np.float32]:
    """The part of an image moved by (down, right) that shows the original: no rows and columns that came in."""
    height, width = image.shape
    return image[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
