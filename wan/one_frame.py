"""One-frame use of Wan2.1: which frame sits at which time index, and what the network is told about each.

A clip of control images and one image to generate (the target), each encoded on its own as a single latent frame. The
frames are stored in time order; their RoPE time indices are chosen freely. Caching, training, training samples and
generation all use this module, and nothing else knows these rules. Source: spec formats.md sections 3 and 8.1,
cli.md section 5.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import ConfigError, suggest

log = logging.getLogger(__name__)

_KEYS = ("control_index", "target_index")
_FRAMEPACK_WORDS = ("default", "no_2x", "no_4x", "no_post")
_MASK_CHANNELS = 4


@dataclass(frozen=True)
class OneFrameLayout:
    """Where each frame of a one-frame run sits on the RoPE time axis. `str()` prints what `parse` reads."""

    control_indices: tuple[int, ...]  # time index of each control image, in the order the images are given
    target_index: int  # time index of the frame to generate

    def __post_init__(self) -> None:
        for name, indices in (("control_index", self.control_indices), ("target_index", (self.target_index,))):
            for index in indices:
                if index < 0:
                    raise ConfigError(f"{name}={index} is negative; time indices start at 0")
        if self.target_index in self.control_indices:
            free = max(self.control_indices) + 1
            raise ConfigError(
                f"target_index={self.target_index} is also a control index; give the target its own, e.g. {free}"
            )
        if len(set(self.control_indices)) < len(self.control_indices):
            listed = ";".join(map(str, self.control_indices))
            raise ConfigError(f"control_index={listed} holds an index twice; give each control image its own")

    def __str__(self) -> str:
        controls = f"control_index={';'.join(map(str, self.control_indices))}," if self.control_indices else ""
        return f"{controls}target_index={self.target_index}"

    @property
    def order(self) -> list[int]:
        """Slot -> input, where the inputs are the controls as given and then the target."""
        times = (*self.control_indices, self.target_index)
        return sorted(range(len(times)), key=times.__getitem__)

    @property
    def frame_indices(self) -> tuple[int, ...]:
        """RoPE time index of each slot, ascending."""
        return tuple(sorted((*self.control_indices, self.target_index)))

    @property
    def target_slot(self) -> int:
        """The slot that holds the generated frame."""
        return self.order.index(len(self.control_indices))

    def check_controls(self, count: int) -> None:
        """Raise ConfigError unless there is one control image per control index."""
        if count != len(self.control_indices):
            listed = ";".join(map(str, self.control_indices)) or "(none)"
            raise ConfigError(f"{count} control images for control_index={listed}; give one index per image")


def parse(text: str) -> OneFrameLayout:
    """`control_index=0;2,target_index=1` -> layout; blanks around `=`, `,` and `;` are allowed.

    As in the reference a missing target_index is 0 and a missing control_index is none. FramePack's words are ignored
    with a warning. Raises ConfigError for anything else.
    """
    values: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in _FRAMEPACK_WORDS and not equals:
            log.warning("one-frame option '%s' belongs to FramePack and has no effect on Wan", key)
        elif key not in _KEYS or not equals:
            raise ConfigError(
                f"unknown key '{key}'{suggest(key, _KEYS) or '; use control_index=..., target_index=...'}"
            )
        elif key in values:
            raise ConfigError(f"'{key}' is given twice; separate several control indices by ';'")
        else:
            values[key] = value
    controls = values.get("control_index", "")
    return OneFrameLayout(
        tuple(_index("control_index", part) for part in controls.split(";")) if controls else (),
        _index("target_index", values.get("target_index", "0")),
    )


def layout_from_toml(
    clean_indices: Sequence[int] | None, target_index: int | None, controls: int | None = None
) -> OneFrameLayout:
    """Layout of the dataset keys `fp_1f_clean_indices` and `fp_1f_target_index`; `controls`: images per item, if known.

    Both default (to [0] and 1) when an item has one control image; with more, they must be given.
    """
    if clean_indices is None:
        if controls is not None and controls > 1:
            raise ConfigError(f"fp_1f_clean_indices is missing; give {controls} indices, one per control image")
        clean_indices = [0]
    if not clean_indices:
        raise ConfigError("fp_1f_clean_indices = []: training needs at least one control image; try [0]")
    if target_index is None:
        if len(clean_indices) > 1:
            raise ConfigError(
                "fp_1f_target_index is missing; give the time index of the target, e.g. 1 between 0 and 2"
            )
        target_index = 1
    try:
        layout = OneFrameLayout(tuple(clean_indices), target_index)
    except ConfigError as error:
        message = (
            str(error).replace("control_index", "fp_1f_clean_indices").replace("target_index", "fp_1f_target_index")
        )
        raise ConfigError(message) from None
    if controls is not None:
        layout.check_controls(controls)
    return layout


def layout_of_cache(frame_indices: Sequence[int], condition: Tensor) -> OneFrameLayout:
    """Layout of a cached item that does not name it: the target is the frame whose mask is 0.

    frame_indices: one per slot; condition: [4 + C, F, H, W]. musubi-tuner fills the control slots in the order in which
    the images are given, so its image i has the i-th smallest index. Raises ConfigError unless exactly one frame is
    unmasked.
    """
    targets = [slot for slot in range(condition.shape[1]) if not condition[:_MASK_CHANNELS, slot].any()]
    if len(targets) != 1 or len(frame_indices) != condition.shape[1]:
        raise ConfigError(
            f"{len(targets)} target frames and {len(frame_indices)} indices for {condition.shape[1]} frames"
        )
    controls = tuple(index for slot, index in enumerate(frame_indices) if slot != targets[0])
    return OneFrameLayout(controls, frame_indices[targets[0]])


def stack_frames(layout: OneFrameLayout, controls: Sequence[Tensor], target: Tensor) -> Tensor:
    """A [C, 1, H, W] per control, as given, and one for the target -> [C, F, H, W] in time order."""
    layout.check_controls(len(controls))
    inputs = [*controls, target]
    return torch.cat([inputs[i] for i in layout.order], dim=1)


def unstack_frames(layout: OneFrameLayout, frames: Tensor) -> tuple[list[Tensor], Tensor]:
    """[C, F, H, W] in time order -> controls as given and target, [C, 1, H, W] each: undoes `stack_frames`."""
    inputs = [frames[:, slot : slot + 1] for _, slot in sorted((i, slot) for slot, i in enumerate(layout.order))]
    return inputs[:-1], inputs[-1]


def stack_condition(layout: OneFrameLayout, controls: Sequence[Tensor], blank: Tensor) -> Tensor:
    """A [C, 1, H, W] per control, as given, and the latent of a blank frame -> [4 + C, F, H, W].

    Four mask channels (1 = given, 0 = to generate), then the latents.
    """
    latents = stack_frames(layout, controls, blank)
    mask = torch.ones_like(latents[:_MASK_CHANNELS])
    mask[:, layout.target_slot] = 0
    return torch.cat([mask, latents])


def relayout(frames: Tensor, old: OneFrameLayout, new: OneFrameLayout) -> Tensor:
    """Frames [C, F, H, W] stacked for `old` -> the same frames in the order of `new`; mask channels move along."""
    return stack_frames(new, *unstack_frames(old, frames))


def pick_target(layout: OneFrameLayout, frames: Tensor) -> Tensor:
    """[C, F, H, W] in time order -> the generated frame [C, 1, H, W]."""
    return frames[:, layout.target_slot : layout.target_slot + 1]


def natural_indices(frame_indices: Tensor) -> Tensor:
    """[B, F] time indices -> 0 ... F-1 for every item: what musubi-tuner trains at, whatever the indices are."""
    return torch.arange(frame_indices.shape[1], device=frame_indices.device).expand_as(frame_indices)


def target_mask(layouts: Sequence[OneFrameLayout]) -> Tensor:
    """[B, F] float32: 1 for the generated frame of each item, 0 for its control images."""
    frames = len(layouts[0].order)
    return torch.eye(frames)[[layout.target_slot for layout in layouts]]


def random_target(layout: OneFrameLayout, indices: range, generator: torch.Generator) -> OneFrameLayout:
    """The layout with its target at an index drawn evenly from those of `indices` that no control has."""
    free = [index for index in indices if index not in layout.control_indices]
    if not free:
        raise ConfigError(f"no index of {indices[0]}-{indices[-1]} is free beside {layout}; give a wider range")
    drawn = torch.randint(len(free), (), generator=generator).item()
    return OneFrameLayout(layout.control_indices, free[drawn])


def clip_controls(layout: OneFrameLayout, images: int) -> list[int]:
    """Which control images give the CLIP features of a model that takes 1 (i2v) or 2 (flf2v) of them: earliest, latest.

    Returns positions in the order the controls are given; a single control serves twice.
    """
    by_time = sorted(range(len(layout.control_indices)), key=layout.control_indices.__getitem__)
    return [by_time[0], by_time[-1]][:images]


def _index(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key}={text} is no whole number; give a time index such as 1") from None
