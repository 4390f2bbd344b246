"""Inputs of the DiT beside the text: known frames as input channels, and image features."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """Inputs of a model kind that are made of images; None where the kind, or the use, has none.

    Shapes are those of a batch; for a single item the axis B is missing everywhere. A NamedTuple, so that torch finds
    the tensors in it.
    """

    channels: Tensor | None = None  # [B, C, F, H, W], behind the noisy latents; C is 20 (4 mask, 16 latent) in i2v
    clip: Tensor | None = None  # CLIP features [B, images, 257, D], or of all images together [B, tokens, D]
    given: Tensor | None = None  # [B, F, H, W], 1 where a frame's pixels are known, 0 where not; None: known nowhere

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """`change` applied to every tensor that is there."""
        return Conditioning(*(None if tensor is None else change(tensor) for tensor in self))

    def item(self, number: int) -> "Conditioning":
        """One item of a batch."""
        return self.map(lambda tensor: tensor[number])

    def known(self, latents: Tensor) -> Tensor:
        """`given`, all 0 in place of None. latents: [B, C, F, H, W], whose frames these are."""
        return torch.zeros_like(latents.select(-4, 0)) if self.given is None else self.given

    def select(self, frames: Sequence[int] | Tensor) -> "Conditioning":
        """The frames of these numbers, in this order."""
        pick = [
            None if tensor is None else tensor.index_select(-3, torch.as_tensor(frames, device=tensor.device))
            for tensor in (self.channels, self.given)
        ]
        return Conditioning(pick[0], self.clip, pick[1])

    @staticmethod
    def stack(items: Sequence["Conditioning"]) -> "Conditioning":
        """A batch of single items, all of which have the same fields."""
        fields = zip(*items, strict=True)
        return Conditioning(*(None if tensors[0] is None else torch.stack(tensors) for tensors in fields))
