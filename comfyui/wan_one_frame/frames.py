"""One-frame clips as tensors of ComfyUI: which image sits where in time, and the condition that the DiT sees.

The rules are those of the scripts (docs/formats.md#conditioning), the forms are ComfyUI's: images are
[B, height, width, 3] in [0, 1], latents [1, 16, F, H, W] are not normalised, and a mask is 1 where pixels are made.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4  # video frames of each latent frame after the first
MASK_CHANNELS = 4
GREY = 0.5  # a frame without an image, 0 in [-1, 1]
LAYOUTS = ("independent", "causal")


@dataclass(frozen=True)
class Frames:
    """Time indices of control images and target. Raises ValueError for those that can't be."""

    controls: tuple[int, ...]  # time index of each control image, in the order in which they are given
    target: int
    layout: str = "independent"  # or causal: the images are one video

    def __post_init__(self) -> None:
        times = (*self.controls, self.target)
        if not self.controls:
            raise ValueError("control_index is missing; write one per control image, e.g. control_index=0")
        if min(times) < 0 or len(set(times)) < len(times):
            raise ValueError(f"{self}: each image and the target need a time index of their own, 0 or more")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout} is unknown; use {' or '.join(LAYOUTS)}")
        if self.layout == "causal" and self.order[0] == len(self.controls):
            raise ValueError(f"{self}: the causal layout begins with a control image")

    def __str__(self) -> str:
        layout = "" if self.layout == LAYOUTS[0] else f",layout={self.layout}"
        return f"control_index={';'.join(map(str, self.controls))},target_index={self.target}{layout}"

    @property
    def times(self) -> tuple[int, ...]:
        """Time index of each latent frame, ascending."""
        return tuple(sorted((*self.controls, self.target)))

    @property
    def order(self) -> tuple[int, ...]:
        """Latent frame -> number of the control image, or their count for the target."""
        inputs = (*self.controls, self.target)
        return tuple(sorted(range(len(inputs)), key=inputs.__getitem__))

    @property
    def target_slot(self) -> int:
        """Number of the target's latent frame."""
        return self.times.index(self.target)

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of the earliest and the latest control image."""
        by_time = [source for source in self.order if source < len(self.controls)]
        return by_time[0], by_time[-1]


def parse(text: str) -> Frames:
    """`control_index=0;2,target_index=1,layout=causal`, as the scripts write it. ValueError for anything else."""
    values: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in ("control_resolution", "no_resize_control"):
            raise ValueError(f"{key}: control images of another size than the target can't be used in ComfyUI")
        if key not in ("control_index", "target_index", "layout") or not equals:
            raise ValueError(f"'{item}' is unknown; write control_index=0,target_index=1")
        if key in values:
            raise ValueError(f"{key} is given twice; separate several control indices by ';'")
        values[key] = value
    try:
        controls = tuple(int(part) for part in values.get("control_index", "").split(";") if part.strip())
        target = int(values.get("target_index", "0"))
    except ValueError:
        raise ValueError(f"'{text}': time indices are whole numbers, as in control_index=0,target_index=1") from None
    return Frames(controls, target, values.get("layout", LAYOUTS[0]))


def from_metadata(metadata: Mapping[str, str]) -> tuple[Frames, tuple[int, int]]:
    """Frames, width and height that a LoRA was trained for. Raises ValueError when its file does not tell."""
    text = metadata.get("ss_one_frame")
    size = re.fullmatch(r"(\d+)x(\d+)", metadata.get("ss_one_frame_size", ""))
    if text is None or size is None:
        raise ValueError(
            "does not say what it was trained for; load it by LoraLoaderModelOnly, and type indices and size"
        )
    frames = parse(text)
    if metadata.get("ss_one_frame_legacy_indices") == "True":  # trained at 0 ... F-1, whatever was asked for
        places = [frames.times.index(time) for time in (*frames.controls, frames.target)]
        frames = replace(frames, controls=tuple(places[:-1]), target=places[-1])
    return frames, (int(size[1]), int(size[2]))


@dataclass(frozen=True)
class LatentSpace:
    """How ComfyUI makes latents, and what the DiT sees of them."""

    encode: Callable[[Tensor], Tensor]  # a video [T, height, width, 3] -> [1, 16, 1 + (T - 1) / 4, H, W]
    normalise: Callable[[Tensor], Tensor]
    denormalise: Callable[[Tensor], Tensor]


def condition(
    frames: Frames, images: Sequence[Tensor], masks: Sequence[Tensor | None], space: LatentSpace
) -> tuple[Tensor, Tensor]:
    """Latents [1, 16, F, H, W] and mask [1, 4, F, H, W] for `concat_latent_image` and `concat_mask`.

    images: [1, height, width, 3] per control, of the target's size. masks: [1, height, width] in 0..1, where an image
    is used, or None for all of it. ValueError unless there is one image per index, and for masks of a causal layout.
    """
    if len(images) != len(frames.controls):
        raise ValueError(f"{len(images)} control images for {frames}; give one index per image")
    if frames.layout == "independent":
        return _independent(frames, images, masks, space)
    if any(mask is not None for mask in masks):
        raise ValueError(f"{frames}: masks of control images need layout=independent")
    return _causal(frames, images, space)


def _independent(
    frames: Frames, images: Sequence[Tensor], masks: Sequence[Tensor | None], space: LatentSpace
) -> tuple[Tensor, Tensor]:
    blank = space.encode(torch.full_like(images[0], GREY))
    inputs = [(space.encode(image), torch.ones_like(blank[:, :MASK_CHANNELS])) for image in images]
    for number, mask in enumerate(masks):
        if mask is not None:
            latents, used = inputs[number]
            used = used * F.avg_pool2d(mask[:, None], PIXELS_PER_LATENT).to(used)[:, :, None]
            inputs[number] = space.denormalise(space.normalise(latents) * used[:, :1]), used
    inputs.append((blank, torch.zeros_like(blank[:, :MASK_CHANNELS])))
    latents, used = (torch.cat([inputs[source][part] for source in frames.order], dim=2) for part in (0, 1))
    return latents, 1 - used


def _causal(frames: Frames, images: Sequence[Tensor], space: LatentSpace) -> tuple[Tensor, Tensor]:
    video = torch.full_like(images[0], GREY).repeat(1 + FRAMES_PER_LATENT * (len(frames.times) - 1), 1, 1, 1)
    for slot, source in enumerate(frames.order):
        if source < len(images):
            video[FRAMES_PER_LATENT * slot] = images[source][0]
    latents = space.encode(video)
    used = torch.zeros_like(latents[:, :MASK_CHANNELS])
    used[:, -1] = 1  # one channel per video frame: the last of four is the image
    used[:, :, 0] = 1
    used[:, :, frames.target_slot] = 0
    return latents, 1 - used


def rope_at(times: Sequence[int], encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`rope_encode` of ComfyUI's Wan model for latent frames at these time indices.

    encode: that of the model, which places t frames at t_start, t_start + 1, ... and returns [1, t * h * w, ...]
    """

    def rope_encode(t: int, h: int, w: int, t_start: int = 0, **options: object) -> Tensor:
        if t != len(times):
            raise ValueError(f"{t} latent frames for the time indices {list(times)}; take the latent of Wan one-frame")
        return torch.cat([encode(1, h, w, t_start=t_start + time, **options) for time in times], dim=1)

    return rope_encode
