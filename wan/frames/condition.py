"""Latents and conditions of one-frame clips as tensors."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils.errors import ConfigError
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import frame_of, padded
from wan.nets.tokens import FrameSizes

_MASK_CHANNELS = 4  # one per video frame of a latent frame


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
    """A [C, 1, H, W] per control, as given, and one for the target -> [C, F, H, W] in time order.

    Where their sizes differ, H and W are the largest ones and the others are padded.
    """
    layout.check_controls(len(controls))
    inputs = padded([*controls, target])
    return torch.cat([inputs[i] for i in layout.order], dim=1)


def unstack_frames(layout: OneFrameLayout, frames: Tensor) -> tuple[list[Tensor], Tensor]:
    """[C, F, H, W] in time order -> controls as given and target, [C, 1, H, W] each: undoes `stack_frames`."""
    inputs = [frames[:, slot : slot + 1] for _, slot in sorted((i, slot) for slot, i in enumerate(layout.order))]
    return inputs[:-1], inputs[-1]


def stack_condition(
    layout: OneFrameLayout, controls: Sequence[Tensor], blank: Tensor, masks: Sequence[Tensor | None] | None = None
) -> Tensor:
    """A [C, 1, H, W] per control, as given, and the latent of a blank frame -> [4 + C, F, H, W].

    Four mask channels (1 = given, 0 = to generate), then the latents. masks: [H, W] per control, 1 where it is to be
    used and 0 where not, or None to use all of it; mask channels and latents are multiplied by it.
    """
    given = [torch.cat([torch.ones_like(latents[:_MASK_CHANNELS]), latents]) for latents in controls]
    for i, mask in enumerate(masks or ()):
        if mask is not None:
            given[i] *= mask.to(given[i])
    return stack_frames(layout, given, torch.cat([torch.zeros_like(blank[:_MASK_CHANNELS]), blank]))


def causal_video(layout: OneFrameLayout, controls: Sequence[Tensor], target: Tensor) -> Tensor:
    """Pixels [3, height, width] of each image -> the video [3, 1 + 4 (F - 1), height, width] whose latents they are."""
    layout.check_controls(len(controls))
    images = [*controls, target]
    first, *others = (images[i][:, None] for i in layout.order)
    return torch.cat([first, *(image.expand(-1, _MASK_CHANNELS, -1, -1) for image in others)], dim=1)


def causal_condition_video(layout: OneFrameLayout, controls: Sequence[Tensor]) -> Tensor:
    """Pixels [3, height, width] of each control -> the video [3, 1 + 4 (F - 1), height, width] of the condition."""
    layout.check_controls(len(controls))
    video = controls[0].new_zeros(3, 1 + _MASK_CHANNELS * len(controls), *controls[0].shape[1:])
    for slot, i in enumerate(layout.order):
        if slot != layout.target_slot:
            video[:, _MASK_CHANNELS * slot] = controls[i]
    return video


def causal_condition(layout: OneFrameLayout, latents: Tensor) -> Tensor:
    """The latents [C, F, H, W] of `causal_condition_video` -> [4 + C, F, H, W] with the mask channels before them."""
    mask = torch.zeros_like(latents[:_MASK_CHANNELS])
    mask[-1] = 1
    mask[:, 0] = 1  # the only latent frame of a single video frame
    mask[:, layout.target_slot] = 0
    return torch.cat([mask, latents])


def relayout(frames: Tensor, old: OneFrameLayout, new: OneFrameLayout) -> Tensor:
    """Frames [C, F, H, W] stacked for `old` -> the same frames in the order of `new`; mask channels move along.

    Raises ConfigError when a causal layout is involved and is not the same in both.
    """
    new.check_latents(old)
    return stack_frames(new, *unstack_frames(old, frames))


def pin_controls(velocity: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
    """The velocity of a step, with that of all places which are given made exact: noise minus their latents.

    A solver that starts at `noise` then keeps them at their own noised latents, as closely as its first sigma is to 1.
    velocity, noise: [C, F, H, W]; condition: [4 + C, F, H, W] of the independent layout, where all latents that are
    given are those of a control.
    """
    given = condition[:_MASK_CHANNELS].amin(dim=0, keepdim=True) == 1
    return torch.where(given, noise - condition[_MASK_CHANNELS:], velocity)


def pick_target(layout: OneFrameLayout, frames: Tensor, sizes: FrameSizes | None = None) -> Tensor:
    """[C, F, H, W] in time order -> what the target is decoded from: that frame [C, 1, h, w] without padding.

    In the causal layout [C, 1 + n, H, W], with the n frames before it; the target is the last picture of the video.
    """
    return frames[:, : layout.target_slot + 1] if layout.causal else frame_of(frames, layout.target_slot, sizes)


def natural_indices(frame_indices: Tensor) -> Tensor:
    """[B, F] time indices -> 0 ... F-1 for every item: what musubi-tuner trains at, whatever the indices are."""
    return torch.arange(frame_indices.shape[1], device=frame_indices.device).expand_as(frame_indices)


def loss_weights(
    layouts: Sequence[OneFrameLayout], condition: Tensor, target_masks: Tensor | None, target_only: bool
) -> Tensor | None:
    """How much each frame, [B, F], or each place of it, [B, F, H, W], counts in the loss; None: all the same.

    condition: [B, 4 + C, F, H, W]. The generated frame counts where its mask in target_masks [B, H, W] is 1; control
    images where their own masks are, or, with target_only, not at all. Padding has masks of 0.
    """
    is_target = torch.eye(len(layouts[0].order))[[layout.target_slot for layout in layouts]].to(condition.device)
    given = condition[:, :_MASK_CHANNELS].amax(dim=1)
    partial = target_masks is not None or bool((given[is_target == 0] < 1).any())
    if not partial:
        return is_target if target_only else None
    own = torch.ones_like(given[:, 0]) if target_masks is None else target_masks.to(given)
    is_target = is_target[..., None, None]
    return is_target * own[:, None] + (0 if target_only else (1 - is_target) * given)


def random_target(layout: OneFrameLayout, indices: range, generator: torch.Generator) -> OneFrameLayout:
    """The layout with its target at an index drawn evenly from those of `indices` that no control has.

    In the causal layout, and where control images have sizes of their own, it stays between the same controls.
    """
    free = [index for index in indices if index not in layout.control_indices]
    if layout.causal or layout.control_sizes:
        neighbours = [sum(control < index for control in layout.control_indices) for index in free]
        free = [index for index, before in zip(free, neighbours, strict=True) if before == layout.target_slot]
    if not free:
        raise ConfigError(f"no index of {indices[0]}-{indices[-1]} is free beside {layout}; give a wider range")
    drawn = torch.randint(len(free), (), generator=generator).item()
    return replace(layout, target_index=free[drawn])


def clip_controls(layout: OneFrameLayout, images: int) -> list[int]:
    """Which control images give the CLIP features of a model that takes 1 (i2v) or 2 (flf2v) of them: earliest, latest.

    Returns positions in the order the controls are given; a single control serves twice.
    """
    by_time = sorted(range(len(layout.control_indices)), key=layout.control_indices.__getitem__)
    return [by_time[0], by_time[-1]][:images]
