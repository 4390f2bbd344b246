"""Latent caches: the only place that knows their names, keys, metadata and when they are out of date.

musubi-tuner's format (docs/formats.md#caches) plus metadata of ours: `one_frame`, the layout with the order of the
controls, `one_frame_own`, there when the item itself and not its dataset decides on that, `one_frame_sizes`, there when
frames differ in size, and `settings`, JSON that tells what a file was made of. Targets with a mask have a further
tensor. musubi-tuner reads our files, but frames of several sizes with their padding, and we read its.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from dataset.cache_files import RECIPE, changed_reason, find_key, keys_of, opened, write_tensors
from dataset.sources import Item
from utils.dtypes import dtype_name
from utils.errors import ConfigError
from utils.files import fingerprint
from utils.images import has_alpha
from wan.frames.encoding import INDEPENDENT
from wan.frames.layout import OneFrameLayout, parse
from wan.frames.sizes import AS_TARGET, SIZE_KEYS, Size
from wan.nets.conditioning import Conditioning
from wan.nets.spec import VAE_STRIDE
from wan.nets.tokens import FrameSizes, check_sizes

_LATENT_SUFFIX = "_wan.safetensors"
_LATENT_NAME = re.compile(rf"(.+)_(\d{{4,}})x(\d{{4,}}){re.escape(_LATENT_SUFFIX)}")
_LATENTS = re.compile(r"latents_\d+x\d+x\d+_\w+")
_CONDITION = re.compile(r"latents_image_\d+x\d+x\d+_\w+")
_CLIP = re.compile(r"clip_\w+")
_INDICES = "f_indices_int32"
_TARGET_MASK = "target_mask_float32"
_OWN_LAYOUT = "one_frame_own"
_SIZES = "one_frame_sizes"  # `32x32;64x48`: width and height in pixels of the controls as given, then of the target
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
_SCRIPT = "wan_cache_latents.py"


def latent_cache_name(stem: str, size: Size) -> str:
    """`<stem>_<W>x<H>`, which tells latent caches of a folder apart; size: of the target image on disk, in pixels."""
    return f"{stem}_{size[0]:04d}x{size[1]:04d}"


def latent_cache_path(directory: Path, stem: str, size: Size) -> Path:
    """`<stem>_<W>x<H>_wan.safetensors` in the folder; size: as for `latent_cache_name`."""
    return directory / f"{latent_cache_name(stem, size)}{_LATENT_SUFFIX}"


def parse_latent_name(path: Path) -> tuple[str, tuple[int, int]]:
    """Undoes `latent_cache_path`: (stem, (width, height)). Raises ConfigError for other names."""
    match = _LATENT_NAME.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"{path}: is not named like a latent cache, <stem>_<W>x<H>{_LATENT_SUFFIX}")
    return match[1], (int(match[2]), int(match[3]))


def list_latent_caches(directory: Path) -> list[Path]:
    """Every file of the folder that is named like a latent cache, sorted."""
    return sorted(path for path in directory.iterdir() if _LATENT_NAME.fullmatch(path.name))


class EncoderFacts(TypedDict):
    """Facts recorded about VAE and CLIP: fingerprints of their files, and names of the dtypes they compute in."""

    vae: str
    clip: str
    vae_dtype: str
    clip_dtype: str


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Everything that decides on the contents of a latent cache: with equal settings it need not be made again.

    The time indices are not among them: unless there is a `causal_order`, frames can be put in any order later.
    """

    bucket: tuple[int, int]  # (width, height) that the target is resized to; the layout tells about the controls
    target: str  # fingerprints of files
    controls: tuple[str, ...]
    vae: str
    clip: str
    vae_dtype: str
    clip_dtype: str
    masks: tuple[str | None, ...] | None = None  # fingerprints of the target's and the controls' mask files
    causal_order: tuple[int, ...] | None = None  # OneFrameLayout.cache_key
    alpha: str | None = None  # "ignore" where an image has an alpha channel that would be a mask
    own_layout: str | None = None  # the layout, where the item itself and not its dataset decides on it
    recipe: int = RECIPE
    source: str = ""  # of the item: tells whose cache it is, and is not compared


@dataclass(frozen=True, eq=False)
class LatentCache:
    """One item. Frames are in time order, control images in the order in which they are given."""

    latents: Tensor  # [C, F, H, W] normalised latents in the VAE's dtype
    conditioning: Conditioning  # channels [4 + C, F, H, W] in the same dtype; clip of every control image, or None
    layout: OneFrameLayout
    target_mask: Tensor | None = None  # [h, w] float32, of the target's size, 1 where the loss counts; None: everywhere
    sizes: tuple[Size, ...] | None = None  # of the controls as given and the target, in pixels; None: all are the same

    @property
    def frame_sizes(self) -> FrameSizes | None:
        """Rows and columns of the latents of each slot; None: all fill the tensors."""
        return self.sizes and self.layout.clip.frame_sizes(self.sizes)


@dataclass(frozen=True)
class LatentHeader:
    """Shapes, layout and metadata of a latent cache, read without its tensors."""

    frames: int
    height: int  # of the latents
    width: int
    clip: tuple[int, int] | None  # (images, width of the features)
    layout: OneFrameLayout
    sizes: tuple[Size, ...] | None  # as in LatentCache
    metadata: Mapping[str, str]

    @property
    def owns_layout(self) -> bool:
        """Whether the item itself and not its dataset decides on the layout."""
        return _OWN_LAYOUT in self.metadata

    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height) of the encoded target in pixels."""
        return self.sizes[-1] if self.sizes else (self.width * VAE_STRIDE, self.height * VAE_STRIDE)


def write_latent_cache(path: Path, cache: LatentCache, settings: LatentSettings | None = None) -> None:
    """Write one item whole. NaNs become 0 with a warning, as in the reference.

    The suffix of the CLIP key is the dtype of the latents, whatever dtype the features have
    (docs/formats.md#latent-caches).
    """
    _, (width, height) = parse_latent_name(path)
    shape, dtype = "x".join(map(str, cache.latents.shape[1:])), dtype_name(cache.latents.dtype)
    tensors: dict[str, Tensor | None] = {
        f"latents_{shape}_{dtype}": cache.latents,
        f"latents_image_{shape}_{dtype}": cache.conditioning.channels,
        _INDICES: torch.tensor(cache.layout.clip.time_indices, dtype=torch.int32),
    }
    tensors |= {f"clip_{dtype}": cache.conditioning.clip, _TARGET_MASK: cache.target_mask}
    metadata = {"width": str(width), "height": str(height), "one_frame": str(cache.layout)}
    if settings is not None and settings.own_layout is not None:
        metadata[_OWN_LAYOUT] = "true"
    if cache.sizes is not None and cache.frame_sizes is not None:
        metadata[_SIZES] = ";".join("{}x{}".format(*size) for size in cache.sizes)
    write_tensors(path, {key: tensor for key, tensor in tensors.items() if tensor is not None}, metadata, settings)


def read_header(path: Path) -> LatentHeader:
    """Shapes, layout and metadata. Raises ConfigError when the file is damaged or no one-frame cache."""
    with opened(path, _SCRIPT) as file:
        return _header(path, file)


def read_latent_cache(path: Path) -> LatentCache:
    """One item, also from a file of musubi-tuner's. Raises ConfigError as `read_header` does."""
    with opened(path, _SCRIPT) as file:
        header = _header(path, file)
        # Copies, because a tensor that still maps the file would keep Windows from replacing it.
        latents, channels = (file.get_tensor(find_key(file, pattern)).clone() for pattern in (_LATENTS, _CONDITION))
        clip = file.get_tensor(find_key(file, _CLIP)).clone() if header.clip else None
        mask = file.get_tensor(_TARGET_MASK).clone() if _TARGET_MASK in keys_of(file) else None
    clip = clip if clip is None or clip.dim() == 3 else clip[None]
    conditioning = Conditioning(channels, clip, header.layout.encoding.given(channels))
    return LatentCache(latents, conditioning, header.layout, mask, header.sizes)


def latent_settings(item: Item, models: EncoderFacts) -> LatentSettings:
    """The settings of an item's cache. Reads the item's files."""
    masks = tuple(None if mask is None else fingerprint(mask) for mask in (item.target_mask, *item.control_masks))
    return LatentSettings(
        bucket=item.bucket,
        target=fingerprint(item.target),
        controls=tuple(fingerprint(path) for path in item.controls),
        masks=masks if any(masks) else None,
        causal_order=item.layout.cache_key,
        alpha=None if item.alpha or not any(has_alpha(path, "image") for path in item.unmasked) else "ignore",
        own_layout=str(item.layout) if item.owns_layout else None,
        source=item.source,
        **models,
    )


def ignores_alpha(path: Path) -> bool:
    """Whether the cache says that alpha channels of its images were left out. ConfigError for a damaged file."""
    return _recorded(read_header(path).metadata).get("alpha") == "ignore"


def _recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a cache was made with; empty where it holds none."""
    try:
        return dict(json.loads(metadata.get("settings", "{}")))
    except (TypeError, ValueError):
        return {}


def latent_source_reason(path: Path, item: Item, warned: set[Path] | None = None) -> str | None:
    """Like `latent_stale_reason`, whatever VAE and CLIP it was made with. Raises ConfigError for a damaged file."""
    metadata = read_header(path).metadata
    if "settings" not in metadata:
        sources = (item.target, *item.controls, item.target_mask, *item.control_masks)
        if any(source is not None and source.stat().st_mtime > path.stat().st_mtime for source in sources):
            return "an image is newer than the cache"
    recorded = _recorded(metadata)
    models = EncoderFacts(
        vae=recorded.get("vae", ""),
        clip=recorded.get("clip", ""),
        vae_dtype=recorded.get("vae_dtype", ""),
        clip_dtype=recorded.get("clip_dtype", ""),
    )
    return latent_stale_reason(path, latent_settings(item, models), item.layout, warned)


def latent_stale_reason(
    path: Path,
    expected: LatentSettings,
    layout: OneFrameLayout | None = None,
    warned: set[Path] | None = None,
) -> str | None:
    """Why the cache at `path` must be made again, or None. layout: of the item.

    A file without settings is musubi-tuner's. It is kept when its size and frame count fit, with a warning unless its
    folder is in `warned`, to which the folder is added.
    """
    if not path.is_file():
        return "not cached yet"
    try:
        header = read_header(path)
    except ConfigError:
        return "no readable one-frame cache"
    if header.bucket != expected.bucket:
        return "bucket {}x{} -> {}x{}".format(*header.bucket, *expected.bucket)
    if header.frames != len(expected.controls) + 1:
        return f"number of control images {header.frames - 1} -> {len(expected.controls)}"
    encoding, sizes = (header.layout.encoding, AS_TARGET) if layout is None else (layout.encoding, layout.control_sizes)
    if header.layout.encoding != encoding or header.layout.cache_key != expected.causal_order:
        return "other one-frame layout"
    if header.layout.control_sizes != sizes:
        return f"{' or '.join(SIZE_KEYS)} changed"
    reasons = {
        "target": "target image changed",
        "controls": "control image changed",
        "masks": "mask changed",
        "alpha": "other use of alpha channels",
        "own_layout": "indices of the item changed",
        "vae": "other VAE",
        "clip": "other CLIP",
        "vae_dtype": "VAE dtype {} -> {}",
        "clip_dtype": "CLIP dtype {} -> {}",
        "recipe": "made by another version of this script",
    }
    return changed_reason(path, header.metadata, expected, reasons, set() if warned is None else warned)


def layout_of_cache(time_indices: Sequence[int], given: Tensor) -> OneFrameLayout:
    """Layout of a cached item that does not name it: the target is the frame of which nothing is given.

    time_indices: one per slot; given: [F, H, W]. musubi-tuner fills the control slots in the order in which the images
    are given, so its image i has the i-th smallest index. Raises ConfigError unless there is one target.
    """
    targets = [slot for slot, frame in enumerate(given) if not frame.any()]
    if len(targets) != 1 or len(time_indices) != len(given):
        raise ConfigError(f"{len(targets)} target frames and {len(time_indices)} indices for {len(given)} frames")
    controls = tuple(index for slot, index in enumerate(time_indices) if slot != targets[0])
    return OneFrameLayout(controls, time_indices[targets[0]])


def _header(path: Path, file: Any) -> LatentHeader:
    latents, condition = find_key(file, _LATENTS), find_key(file, _CONDITION)
    if latents is None or condition is None or _INDICES not in keys_of(file):
        raise ConfigError(f"{path}: is not a one-frame cache; run {_SCRIPT} again with --one_frame")
    shape, metadata, clip = file.get_slice(latents).get_shape(), file.metadata() or {}, find_key(file, _CLIP)
    clip_shape = file.get_slice(clip).get_shape() if clip else None  # [images, 257, D], of plain i2v caches [257, D]
    indices = file.get_tensor(_INDICES).tolist()
    try:
        if len(shape) != 4 or file.get_slice(condition).get_shape()[1:] != shape[1:]:
            raise ConfigError("its latents and its conditioning differ in size")
        if "one_frame" in metadata:
            layout = parse(metadata["one_frame"])
        else:
            layout = layout_of_cache(indices, INDEPENDENT.given(file.get_slice(condition)[:, :, :1, :1]))
        if list(layout.clip.time_indices) != indices or len(indices) != shape[1]:
            raise ConfigError(f"its layout {layout} does not fit {shape[1]} frames at {indices}")
        sizes = _sizes(metadata, shape[1:]) if _SIZES in metadata else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; delete it and run {_SCRIPT} again") from None
    images = None if clip_shape is None else (clip_shape[0] if len(clip_shape) == 3 else 1, clip_shape[-1])
    _, frames, height, width = shape
    return LatentHeader(frames, height, width, images, layout, sizes, metadata)


def _sizes(metadata: Mapping[str, str], shape: Sequence[int]) -> tuple[Size, ...]:
    """Sizes in pixels of the controls and the target. ConfigError unless they fit latents [F, H, W] of this shape."""
    try:
        sizes = tuple(_size(part) for part in metadata[_SIZES].split(";"))
        check_sizes(tuple((height // VAE_STRIDE, width // VAE_STRIDE) for width, height in sizes), shape)
    except ValueError:
        raise ConfigError(f"its {_SIZES} {metadata[_SIZES]} do not fit {tuple(shape)}") from None
    return sizes


def _size(text: str) -> Size:
    """`64x48` -> (64, 48). ValueError for other texts."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return int(match[1]), int(match[2])
