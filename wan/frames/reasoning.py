"""Frames between a control image and the target that are denoised along in the first steps and then dropped.

The network works out on them how the one image becomes the other (ChronoEdit, arXiv 2510.04290, "temporal reasoning").
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from utils.errors import ConfigError
from wan.frames.layout import OneFrameLayout
from wan.nets.spec import TIME_STRIDE
from wan.nets.tokens import FrameSizes


@dataclass(frozen=True)
class ReasoningFrames:
    """Where such frames sit beside those of a layout. They are given nothing: no image, mask channels of 0."""

    layout: OneFrameLayout
    count: int

    def __post_init__(self) -> None:
        if not self.count:
            return
        if self._neighbour is None:
            raise ConfigError(f"--reasoning_frames {self.count}: need a control image to lie between it and the target")
        free = abs(self._gap) - 1
        if self.count > free:
            raise ConfigError(
                f"--reasoning_frames {self.count}: between control_index={self._neighbour} and "
                f"target_index={self.layout.target_index} are {free} free time indices; give at most as many, or an "
                f"index further away, e.g. target_index={self._neighbour + self.count + 1}"
            )

    @property
    def _neighbour(self) -> int | None:
        """Time index of the control before the target, or, without one, of that after it; None without controls."""
        controls, target = self.layout.control_indices, self.layout.target_index
        before = [index for index in controls if index < target]
        return max(before) if before else min(controls, default=None)

    @property
    def _gap(self) -> int:
        return self.layout.target_index - self._neighbour

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """Their time indices, ascending, spread evenly between the target and the control next to it."""
        if not self.count:
            return ()
        direction, parts = (1 if self._gap > 0 else -1), self.count + 1
        return tuple(sorted(self._neighbour + direction * (abs(self._gap) * k // parts) for k in range(1, parts)))

    @cached_property
    def _order(self) -> list[int]:
        """Slot of all frames in time order -> place among the layout's own frames and then these."""
        times = (*self.layout.frame_indices, *self.indices)
        return sorted(range(len(times)), key=times.__getitem__)

    @property
    def frame_indices(self) -> tuple[int, ...]:
        """RoPE time index of each slot, the layout's own frames included."""
        return tuple(sorted((*self.layout.frame_indices, *self.indices)))

    @property
    def own_slots(self) -> list[int]:
        """The slots of the layout's own frames, in time order."""
        return [slot for slot, i in enumerate(self._order) if i < len(self.layout.frame_indices)]

    @property
    def added_slots(self) -> list[int]:
        """The slots of these frames."""
        return [slot for slot, i in enumerate(self._order) if i >= len(self.layout.frame_indices)]

    def insert(self, own: Tensor, added: Tensor) -> Tensor:
        """[C, F, H, W] of the layout's own frames and [C, n, H, W] of these -> [C, F + n, H, W] in time order."""
        return torch.cat([own, added], dim=1)[:, self._order]

    def insert_sizes(self, own: FrameSizes | None) -> FrameSizes | None:
        """Those of the layout's own frames -> of all slots: these frames have the target's size."""
        if own is None:
            return None
        sizes = [*own, *[own[self.layout.target_slot]] * self.count]
        return tuple(sizes[i] for i in self._order)

    def lengthen(self, video: Tensor) -> Tensor:
        """The video [3, frames, height, width] of a causal condition with these frames, grey, before the target's."""
        cut = 1 + TIME_STRIDE * (self.layout.target_slot - 1)  # a latent frame after the first holds so many frames
        grey = video.new_zeros(3, TIME_STRIDE * self.count, *video.shape[2:])
        return torch.cat([video[:, :cut], grey, video[:, cut:]], dim=1)
