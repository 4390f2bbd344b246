"""Latents and conditions of clips as tensors, and what training and sampling read off them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wan.frames.clip import Clip, Role
from wan.nets.conditioning import Conditioning
from wan.nets.spec import MASK_CHANNELS, TIME_STRIDE


def stack_condition(
    clip: Clip, controls: Sequence[Tensor], blank: Tensor, masks: Sequence[Tensor | None] | None = None
) -> Tensor:
    """A [C, 1, H, W] per given frame, by source, and the latent of a blank frame -> [4 + C, F, H, W].

    Four mask channels (1 = given, 0 = to generate), then the latents. masks: [H, W] per given frame, 1 where it is to
    be used and 0 where not, or None to use all of it; mask channels and latents are multiplied by it.
    """
    given = [torch.cat([torch.ones_like(latents[:MASK_CHANNELS]), latents]) for latents in controls]
    for i, mask in enumerate(masks or ()):
        if mask is not None:
            given[i] *= mask.to(given[i])
    blank = torch.cat([torch.zeros_like(blank[:MASK_CHANNELS]), blank])
    return clip.stack([*given, *[blank] * (len(clip.slots) - len(clip.given))])


def causal_video(clip: Clip, images: Sequence[Tensor]) -> Tensor:
    """Pixels [3, height, width] per source -> the video [3, 1 + 4 (F - 1), height, width] whose latents they are."""
    first, *others = (images[source][:, None] for source in clip.order)
    return torch.cat([first, *(image.expand(-1, TIME_STRIDE, -1, -1) for image in others)], dim=1)


def causal_condition_video(clip: Clip, controls: Sequence[Tensor]) -> Tensor:
    """Pixels [3, height, width] per given frame -> the video [3, 1 + 4 (F - 1), height, width] of the condition."""
    video = controls[0].new_zeros(3, 1 + TIME_STRIDE * (len(clip.slots) - 1), *controls[0].shape[1:])
    for number, slot in enumerate(clip.slots):
        if slot.role is Role.GIVEN:
            video[:, TIME_STRIDE * number] = controls[slot.source]
    return video


def causal_condition(clip: Clip, latents: Tensor) -> Tensor:
    """The latents [C, F, H, W] of `causal_condition_video` -> [4 + C, F, H, W] with the mask channels before them."""
    mask = torch.zeros_like(latents[:MASK_CHANNELS])
    mask[-1] = 1
    mask[:, 0] = 1  # the only latent frame of a single video frame
    mask[:, clip.numbers(Role.GENERATED, Role.SCRATCH)] = 0
    return torch.cat([mask, latents])


def pin_controls(velocity: Tensor, conditioning: Conditioning, noise: Tensor) -> Tensor:
    """The velocity of a step, with that of all places which are given made exact: noise minus their latents.

    A solver that starts at `noise` then keeps them at their own noised latents, as closely as its first sigma is to 1.
    velocity, noise: [C, F, H, W]; conditioning: of one item, by an encoding that `knows_latents`.
    """
    if conditioning.channels is None:
        return velocity
    given = conditioning.known(noise).eq(1)
    return torch.where(given, noise - conditioning.channels[MASK_CHANNELS:], velocity)


def natural_indices(frame_indices: Tensor) -> Tensor:
    """[B, F] time indices -> 0 ... F-1 for every item: what musubi-tuner trains at, whatever the indices are."""
    return torch.arange(frame_indices.shape[1], device=frame_indices.device).expand_as(frame_indices)


def loss_weights(clips: Sequence[Clip], given: Tensor, target_masks: Tensor | None, target_only: bool) -> Tensor | None:
    """How much each frame, [B, F], or each place of it, [B, F, H, W], counts in the loss; None: all the same.

    given: [B, F, H, W] of a `Conditioning`. Generated frames count where their mask in target_masks [B, H, W] is 1;
    given ones where they are given, or, with target_only, not at all. Padding has masks of 0.
    """
    roles = [[slot.role is Role.GENERATED for slot in clip.slots] for clip in clips]
    is_target = torch.tensor(roles, dtype=torch.float32, device=given.device)
    partial = target_masks is not None or bool((given[is_target == 0] < 1).any())
    if not partial:
        return is_target if target_only else None
    own = torch.ones_like(given[:, 0]) if target_masks is None else target_masks.to(given)
    is_target = is_target[..., None, None]
    return is_target * own[:, None] + (0 if target_only else (1 - is_target) * given)


def clip_controls(clip: Clip, images: int) -> list[int]:
    """Sources of the frames for the CLIP features of a model that takes 1 (i2v) or 2 (flf2v) of them: earliest, latest.

    A single given frame serves twice.
    """
    by_time = [slot.source for slot in clip.given]
    return [by_time[0], by_time[-1]][:images]
