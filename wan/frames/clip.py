"""A clip: frames at freely chosen RoPE time indices, each given, generated, or denoised for a while and dropped.

Frames are stored in time order; order, indices and what is kept and decoded follow from the slots. The rules are in
docs/formats.md#conditioning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from utils.errors import ConfigError
from wan.frames.sizes import Size, padded
from wan.nets.spec import VAE_STRIDE
from wan.nets.tokens import FrameSizes


class Role(Enum):
    """The part of a frame in a clip. The network denoises all frames, whatever their role."""

    GIVEN = "given"  # an image of the user's: the condition shows it
    GENERATED = "generated"  # new, and kept
    SCRATCH = "scratch"  # new, takes part in the first steps only, then dropped (ChronoEdit, arXiv 2510.04290)


@dataclass(frozen=True)
class Slot:
    """One latent frame."""

    time_index: int  # on the RoPE time axis
    role: Role
    source: int  # number of the frame among the inputs: the given ones as the user lists them, then the new ones


@dataclass(frozen=True)
class Clip:
    """The slots of a clip, ascending in time. Raises ValueError for slots at one index or in another order."""

    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        times = [slot.time_index for slot in self.slots]
        if times != sorted(set(times)):
            raise ValueError(f"time indices {times}; each slot needs its own, and they have to ascend")

    @classmethod
    def one_frame(cls, controls: Sequence[int], target: int) -> "Clip":
        """Control images at these time indices, in the order in which they are given, and one frame to generate."""
        given = [Slot(time, Role.GIVEN, number) for number, time in enumerate(controls)]
        return cls(_ascending([*given, Slot(target, Role.GENERATED, len(given))]))

    def with_scratch(self, count: int) -> "Clip":
        """The clip with `count` SCRATCH frames, spread evenly between the target and the control next to it.

        That is the control before the target or, without one, the first after it. Raises ConfigError when there is
        none, or not enough free indices in between.
        """
        if not count:
            return self
        target, controls = self.slots[self.target_slot].time_index, [slot.time_index for slot in self.given]
        neighbour = max((time for time in controls if time < target), default=min(controls, default=None))
        if neighbour is None:
            raise ConfigError(f"--reasoning_frames {count}: need a control image to lie between it and the target")
        gap, parts = target - neighbour, count + 1
        if count > abs(gap) - 1:
            raise ConfigError(
                f"--reasoning_frames {count}: between control_index={neighbour} and target_index={target} are "
                f"{abs(gap) - 1} free time indices; give at most as many, or an index further away, e.g. "
                f"target_index={neighbour + count + 1}"
            )
        direction = 1 if gap > 0 else -1
        times = sorted(neighbour + direction * (abs(gap) * k // parts) for k in range(1, parts))
        added = [Slot(time, Role.SCRATCH, len(self.slots) + k) for k, time in enumerate(times)]
        return Clip(_ascending([*self.slots, *added]))

    @property
    def order(self) -> tuple[int, ...]:
        """Slot -> source."""
        return tuple(slot.source for slot in self.slots)

    @property
    def time_indices(self) -> tuple[int, ...]:
        """RoPE time index of each slot, ascending."""
        return tuple(slot.time_index for slot in self.slots)

    @property
    def given(self) -> list[Slot]:
        """Slots of given frames, ascending in time."""
        return [slot for slot in self.slots if slot.role is Role.GIVEN]

    def numbers(self, *roles: Role) -> list[int]:
        """Numbers of the slots that have one of these roles, ascending."""
        return [number for number, slot in enumerate(self.slots) if slot.role in roles]

    @cached_property
    def kept(self) -> list[int]:
        """Numbers of the slots that are there in all steps."""
        return self.numbers(Role.GIVEN, Role.GENERATED)

    @cached_property
    def target_slot(self) -> int:
        """Number of the slot that is generated, of several the last one."""
        return self.numbers(Role.GENERATED)[-1]

    def slots_in(self, other: "Clip") -> list[int]:
        """For each slot of this clip the number of the one in `other` that has the same source."""
        places = {slot.source: number for number, slot in enumerate(other.slots)}
        return [places[slot.source] for slot in self.slots]

    def stack(self, inputs: Sequence[Tensor]) -> Tensor:
        """One [C, 1, h, w] per source -> [C, F, H, W] in time order.

        Where their sizes differ, H and W are the largest ones and the others are padded. Raises ValueError for another
        number of inputs.
        """
        if len(inputs) != len(self.slots):
            raise ValueError(f"{len(inputs)} inputs for {len(self.slots)} slots")
        inputs = padded(inputs)
        return torch.cat([inputs[source] for source in self.order], dim=1)

    def interleave(self, kept: Tensor, scratch: Tensor) -> Tensor:
        """[C, n, H, W] of the kept slots and [C, m, H, W] of the SCRATCH ones -> [C, n + m, H, W], in time order."""
        numbers = [*self.kept, *self.numbers(Role.SCRATCH)]
        return torch.cat([kept, scratch], dim=1)[:, sorted(range(len(numbers)), key=numbers.__getitem__)]

    def frame_sizes(self, sizes: Sequence[Size]) -> FrameSizes | None:
        """Rows and columns of the latents of each slot; None when all are the same.

        sizes: width and height in pixels of the sources but the SCRATCH frames, which have the size of the target.
        """
        if len(set(sizes)) < 2:
            return None
        target = sizes[self.slots[self.target_slot].source]
        pixels = [target if slot.role is Role.SCRATCH else sizes[slot.source] for slot in self.slots]
        return tuple((height // VAE_STRIDE, width // VAE_STRIDE) for width, height in pixels)


def _ascending(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    return tuple(sorted(slots, key=lambda slot: slot.time_index))
