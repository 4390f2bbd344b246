"""Pictures: any file -> upright 8-bit RGB, filling a given size, pixels <-> tensors, the size of a generated image."""

import importlib
import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from utils.errors import TOO_MANY_FILES, ConfigError
from utils.files import not_downloaded, require_file

log = logging.getLogger(__name__)
Levels = np.ndarray[Any, np.dtype[Any]]  # [height, width] or [height, width, 3]

for _plugin in ("pillow_avif", "pillow_jxl"):  # optional packages that teach Pillow more formats when imported
    with suppress(ImportError):
        importlib.import_module(_plugin)

_JPEG_XL = (".jxl",) if ".jxl" in Image.registered_extensions() else ()
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", *_JPEG_XL)
"""File name endings of a dataset's images, in small letters or capitals (docs/formats.md#dataset-file)."""

_OTHER_SUFFIXES = frozenset([*Image.registered_extensions(), ".heic", ".heif", ".jxl"]) - {*IMAGE_SUFFIXES, ".pdf"}

_DECODED = frozenset(["PNG", "JPEG", "WEBP", "BMP", "AVIF", "JXL", "GIF", "TIFF", "PPM"])
"""Pillow's names of the formats that are read, by decoders within the process. A file of another one, EPS among them,
would be handed to programs of the system (Ghostscript), whatever its name ends in."""

# Workflows and colour profiles of sound files are longer than Pillow's 1 MB; there is still an end to it.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26, 1 << 28

_PADDING = 512  # zeros at the end of a compressed file that no encoder writes, but a download that was cut leaves
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"  # of a JPEG

STEP = 16
"""Sides of encoded images are multiples of this: the VAE shrinks by 8 and a DiT token covers 2 x 2 latents."""

LONGEST_SIDE = 1 << 14
"""Pixels of the longest side that may be asked for. A typing error beyond it would compute for hours."""

_ORIENTATION = ExifTags.Base.Orientation
_SIDEWAYS = (5, 6, 7, 8)  # EXIF 2.32, section 4.6.4: width and height change places


def named_like_image(path: Path) -> bool:
    """Whether a dataset takes the file of a folder for an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def named_like_other_image(path: Path) -> bool:
    """Whether the name is that of a picture that datasets do not take out of folders, such as a GIF."""
    return path.suffix.lower() in _OTHER_SUFFIXES


def open_image(path: str | Path, what: str) -> Image.Image:
    """The picture in `path` as an upright 8-bit RGB image, whatever its mode.

    EXIF orientation is applied (in a PNG only when it is stored ahead of the pixels). 16-bit grey keeps its upper 8
    bits, as Pillow does for 16-bit colour; floating-point grey of 0 to 1 is scaled. Transparency is dropped without a
    background, like in musubi-tuner; a picture that really has transparent pixels is named in a warning, of which
    scripts show the first alone. Raises ConfigError, starting with `what` (a flag or key), when the file is missing,
    broken or larger than Pillow's limit against decompression bombs.
    """
    path = require_file(path, what)
    rgb, alpha = _open(path, what)
    if alpha is not None:
        log.warning(
            "%s has transparent pixels: they show the colour stored beneath; paint a background if that is not wanted."
            " Further such images are not reported",
            path,
            extra={"once": "transparent pixels"},
        )
    return rgb


def open_masked(
    path: str | Path, what: str, mask: str | Path | None = None, alpha: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """The picture as `open_image` gives it, and an 8-bit grey image of its size that is 255 where it counts.

    That is the picture in the file `mask`, else the alpha channel unless `alpha` is False; None when there is neither
    or it is 255 throughout. Raises ConfigError like `open_image`, and when the two sizes differ.
    """
    rgb, coverage = _open(require_file(path, what), what)
    if not alpha:
        coverage = None
    if mask is not None:
        coverage = _open(require_file(mask, f"mask of {what}"), f"mask of {what}")[0].convert("L")
        check_mask_size(mask, coverage.size, path, rgb.size)
    return rgb, None if coverage is None or coverage.getextrema()[0] == 255 else coverage


def has_alpha(path: Path, what: str) -> bool:
    """Whether the file has transparency, from its header. Raises ConfigError like `open_image`."""
    try:
        with _opened(require_file(path, what)) as image:
            return image.has_transparency_data
    except Exception as error:  # Pillow's decoders raise nearly any type on broken files
        raise _unreadable(path, what, error) from None


def check_mask_size(mask: str | Path, mask_size: tuple[int, int], path: str | Path, size: tuple[int, int]) -> None:
    """Raise ConfigError unless the mask has the size of its image."""
    if mask_size != size:
        raise ConfigError(
            "mask {}: has {}x{} pixels, its image {} has {}x{}; give them one size".format(
                mask, *mask_size, path, *size
            )
        )


def check_image(path: str | Path, what: str) -> tuple[int, int]:
    """(width, height) of the upright picture, from the file's header. Raises ConfigError like `open_image`."""
    path = require_file(path, what)
    try:
        with _opened(path) as image:
            sideways = _orientation(image) in _SIDEWAYS
            return image.size[::-1] if sideways else image.size
    except Exception as error:  # as above
        raise _unreadable(path, what, error) from None


def png_text(path: Path, key: str) -> str | None:
    """The text of that key in a PNG file, None when it has none. Raises whatever Pillow does for other files."""
    with Image.open(path, formats=("PNG",)) as image:
        text = image.info.get(key)
    return text if isinstance(text, str) else None


@dataclass(frozen=True)
class Resize:
    """Scaling and cropping by which `resize_to_fill` brings an image to a bucket. Sizes are (width, height)."""

    size: tuple[int, int]
    bucket: tuple[int, int]
    crop_only: bool = False  # the image keeps its scale

    @property
    def scale(self) -> float:
        """The factor on both sides; above 1 the image is enlarged."""
        return 1.0 if self.crop_only else max(self.bucket[0] / self.size[0], self.bucket[1] / self.size[1])

    @property
    def resized(self) -> tuple[int, int]:
        """Size of the image before the centre is cut out."""
        width, height = (int(side * self.scale + 0.5) for side in self.size)
        return width, height

    @property
    def cropped(self) -> float:
        """The share of its pixels that is cut off, 0 to 1."""
        return 0.0 if self.size == self.bucket else 1 - math.prod(self.bucket) / math.prod(self.resized)


def resize_to_fill(image: Levels | Image.Image, size: tuple[int, int], crop_only: bool = False) -> Levels:
    """Resize an RGB image [height, width, 3] uint8 until it covers `size` (width, height), then cut out the centre.

    Enlarges with Pillow's Lanczos filter and shrinks by area averaging, within one level of OpenCV's INTER_AREA, as
    musubi-tuner does (docs/formats.md#resizing). crop_only: only cut, out of an image that covers `size` already.
    Returns [size[1], size[0], 3] uint8; the image itself when it has the size already.
    """
    image = np.asarray(image)
    height, width = image.shape[:2]
    if (width, height) == tuple(size):
        return image
    scale = 1.0 if crop_only else max(size[0] / width, size[1] / height)
    new_width, new_height = int(width * scale + 0.5), int(height * scale + 0.5)
    if scale > 1:
        image = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS))
    elif scale < 1:
        means = _means(_means(image, 0, new_height), 1, new_width)
        image = (means + 0.5).astype(np.uint8)
    left, top = (new_width - size[0]) // 2, (new_height - size[1]) // 2
    return image[top : top + size[1], left : left + size[0]]


def to_levels(image: Levels | Image.Image) -> Tensor:
    """RGB image [height, width, 3] uint8 -> [3, height, width] uint8.

    Laid out by NumPy: in each thread that reads images torch would start threads of its own.
    """
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def as_pixels(levels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], x / 127.5 - 1, with the same bits on every device; what is float stays as it is."""
    if levels.is_floating_point():
        return levels
    values = levels.float()
    return values / values.new_tensor(127.5) - 1  # CUDA multiplies by the inverse of a Python number


def to_pixels(image: Levels | Image.Image) -> Tensor:
    """RGB image [height, width, 3] uint8 -> [3, height, width] float32 in [-1, 1]."""
    return as_pixels(to_levels(image))


def from_pixels(pixels: Tensor) -> Image.Image:
    """[3, height, width] in [-1, 1] -> 8-bit RGB image: trunc(clamp((x + 1) / 2, 0, 1) * 255)."""
    levels = ((pixels.detach().cpu().float() + 1) / 2).clamp(0, 1) * 255
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def floor16(pixels: int) -> int:
    """The largest multiple of 16 that is not above `pixels`."""
    return pixels - pixels % STEP


def size_for_area(width: int, height: int, image_width: int, image_height: int) -> tuple[int, int]:
    """Size of a generated image: the area asked for (width x height), the aspect ratio of the input image.

    Returns (width, height), multiples of 16: floor(sqrt(area / aspect) / 16) * 16 and the same with area * aspect
    (docs/formats.md#output-size). Computed in whole numbers: in floats, as in the official code, 832 x 480 for an
    image of that size comes out as 832 x 464. Raises ConfigError when a side comes out below 16.
    """
    if min(width, height) < STEP:
        raise ConfigError(f"{width}x{height} pixels are too few; ask for at least {STEP} a side")
    area = width * height
    result = (
        floor16(math.isqrt(area * image_width // image_height)),
        floor16(math.isqrt(area * image_height // image_width)),
    )
    if min(result) < STEP:
        raise ConfigError(
            f"{width}x{height} pixels in the shape of the {image_width}x{image_height} image leave a side below {STEP};"
            " ask for a larger size or crop the image"
        )
    return result


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of an opened image, 1 when it has none or it can't be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        # The base class method: the one for PNG decodes all pixels in search of EXIF data behind them.
        orientation: int = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return orientation
    except Exception:  # a broken EXIF block doesn't make the picture unusable
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> None:
    """Turn decoded pixels in place; `orientation`, of the header, counts and not what the decoder has found later."""
    image.info.clear()
    image.getexif()[_ORIENTATION] = orientation
    ImageOps.exif_transpose(image, in_place=True)


def _opened(path: Path) -> Image.Image:
    """The file, by its header. Raises UnidentifiedImageError when it has none of the formats that are read."""
    Image.init()  # knows the formats of all plugins, optional packages among them
    return Image.open(path, formats=sorted(_DECODED & set(Image.OPEN)))


def _open(path: Path, what: str) -> tuple[Image.Image, Image.Image | None]:
    """Upright RGB image and, when it has transparent pixels, its alpha channel."""
    try:
        with _opened(path) as image:
            orientation, alpha = _orientation(image), None
            _check_complete(path, image)
            if image.mode == "F":
                rgb = _from_floats(np.asarray(image))
            elif image.mode.startswith("I"):  # Pillow's own conversion clips these to 255 instead of scaling them
                rgb = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
            elif image.has_transparency_data:
                rgba = image.convert("RGBA")
                rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
            else:
                rgb = image.convert("RGB")
        for part in (rgb, alpha):
            if part is not None:
                _turn_upright(part, orientation)
        return rgb, None if alpha is None or alpha.getextrema()[0] == 255 else alpha
    except Exception as error:  # Pillow's decoders raise nearly any type on broken files
        raise _unreadable(path, what, error) from None


def _check_complete(path: Path, image: Image.Image) -> None:
    """Raise ValueError for a file whose end is nothing but zeros, in formats whose decoders take that for a picture.

    Formats without compression can't tell it from black pixels. A WebP of one colour ends in a zero for about 40 blocks
    of 16 x 16 pixels.
    """
    if image.format not in ("JPEG", "WEBP", "AVIF", "JXL"):
        return
    with path.open("rb") as file:
        file.seek(-min(_PADDING, path.stat().st_size), 2)
        if file.read().strip(b"\0"):
            return
        file.seek(0)
        data = file.read()
    if image.format == "JPEG":
        complete = data.rfind(_END_OF_IMAGE) > data.rfind(_START_OF_SCAN)
    else:
        complete = len(data) - len(data.rstrip(b"\0")) < math.prod(image.size) // (16 * 16 * 16)
    if not complete:
        raise ValueError("the end of the file is missing, there are only zeros; its download was cut")


def _from_floats(values: Levels) -> Image.Image:
    """A grey picture in floating-point numbers of 0 to 1, or whole ones up to 255. ValueError for other numbers."""
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        values = values * 255 + 0.5
    elif not (low >= 0 and high <= 255 and (values == values.round()).all()):
        raise ValueError(f"floating-point numbers of {low:g} to {high:g} have no scale; save it with 8 or 16 bits")
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _unreadable(path: Path, what: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in TOO_MANY_FILES:
        return error
    if reason := not_downloaded(path):
        return ConfigError(f"{what} {path}: {reason}")
    unknown = isinstance(error, UnidentifiedImageError)  # its own message repeats the path
    reason = (
        "not an image, or of an unknown format" if unknown else " ".join(str(error).split()) or type(error).__name__
    )
    return ConfigError(f"{what} {path}: cannot be read as an image ({reason}); replace the file")


def _means(image: Levels, axis: int, new: int) -> Levels:
    """The mean over each of `new` equal parts of an axis of [height, width, 3], float64; new <= its length.

    Sums of pixels less and plus the shares of those at the edges. Not by BLAS, whose rounding depends on the processor
    and on the number of threads.
    """
    old = image.shape[axis]
    edges = np.arange(new + 1) * (old / new)
    first = edges.astype(int)
    shares = np.expand_dims(edges - first, tuple({0, 1, 2} - {axis}))
    at_edges = shares * image.take(np.minimum(first, old - 1), axis)
    sums = np.add.reduceat(image, first[:-1], axis, dtype=np.float64)
    sums += np.diff(at_edges, axis=axis)
    sums *= new / old
    return sums
