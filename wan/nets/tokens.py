"""Tokens of latent frames, some of which may be smaller than their slots."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.nets.spec import PATCH, VAE_STRIDE

FrameSizes = tuple[tuple[int, int], ...]
"""Rows and columns of the latents of each slot, both even. In its place None where all frames fill their slots."""


def check_sizes(sizes: FrameSizes, shape: Sequence[int]) -> None:
    """Raise ValueError unless these can be the sizes of the frames of latents [F, H, W]."""
    frames, height, width = shape
    fits = (0 < rows <= height and 0 < columns <= width for rows, columns in sizes)
    if len(sizes) != frames or not all(fits) or any(rows % PATCH[1] or columns % PATCH[2] for rows, columns in sizes):
        raise ValueError(f"frame sizes {sizes} of latents {tuple(shape)}; give each frame two even sides within them")


def inner_tokens(x: Tensor, grid: tuple[int, int, int], sizes: FrameSizes | None) -> Tensor:
    """Tokens [B, f * h * w, dim] of a grid (f, h, w) -> [B, L, dim], those of the frames alone."""
    if sizes is None:
        return x
    frames = x.unflatten(1, grid).unbind(1)
    return torch.cat([frame[:, :h, :w].flatten(1, 2) for frame, (h, w) in zip(frames, _grids(sizes), strict=True)], 1)


def with_padding(x: Tensor, grid: tuple[int, int, int], sizes: FrameSizes | None) -> Tensor:
    """Undoes `inner_tokens`, with zeros for the tokens of the padding."""
    if sizes is None:
        return x
    parts = x.split([h * w for h, w in _grids(sizes)], dim=1)
    frames = [
        F.pad(part.unflatten(1, (h, w)), (0, 0, 0, grid[2] - w, 0, grid[1] - h))
        for part, (h, w) in zip(parts, _grids(sizes), strict=True)
    ]
    return torch.stack(frames, dim=1).flatten(1, 3)


def token_count(shape: Sequence[int], sizes: FrameSizes | None) -> int:
    """Tokens of latents [F, H, W]."""
    if sizes is None:
        return math.prod(shape) // math.prod(PATCH)
    return sum(h * w for h, w in _grids(sizes))


def token_grid(shape: Sequence[int]) -> tuple[int, int, int]:
    """Frames, rows and columns of the tokens of latents [F, H, W]."""
    frames, height, width = shape
    return frames // PATCH[0], height // PATCH[1], width // PATCH[2]


def _grids(sizes: FrameSizes) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of each slot."""
    return [(rows // PATCH[1], columns // PATCH[2]) for rows, columns in sizes]


def frame_tokens(size: tuple[int, int]) -> int:
    """Tokens of a frame of (width, height) pixels."""
    return size[0] // (VAE_STRIDE * PATCH[1]) * (size[1] // (VAE_STRIDE * PATCH[2]))
