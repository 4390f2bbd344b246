"""Rotary position embedding from explicit (time, row, column) positions (RoFormer, arXiv:2104.09864, on three axes)."""

import torch
from torch import Tensor


def grid_positions(frame_indices: Tensor, height: int, width: int) -> Tensor:
    """Positions of all tokens of a batch.

    frame_indices: [B, F] integer, the time index of every latent frame. height, width: in patches.
    Returns [B, F * height * width, 3] (time, row, column) in the token order frame, row, column.
    """
    device = frame_indices.device
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)
    times = frame_indices[:, :, None, None]
    return torch.stack(torch.broadcast_tensors(times, rows, columns), dim=-1).flatten(1, 3)


def rope_angles(positions: Tensor, axes_dim: tuple[int, int, int] = (44, 42, 42), theta: float = 10_000.0) -> Tensor:
    """Rotary angles for tokens at explicit positions, of any size: nothing is looked up in a table.

    positions: [..., 3] integer (time, row, column). axes_dim: the share of the head dim D each axis rotates.
    Returns [..., D / 2] angles in radians; float64 like the official Wan2.1 code, so that outputs match it.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(positions[..., axis, None].double() * theta**-exponents)
    return torch.cat(angles, dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each adjacent pair (2j, 2j + 1) of the head dim by its angle.

    x: [B, L, N, D]; cos, sin: [B, L, D / 2] float32, the same for all heads. Computed in float32, returned in x.dtype.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)
