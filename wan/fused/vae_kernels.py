"""Normalisation, SiLU and softmax of the fused VAE as Triton kernels. Imported on CUDA only."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.fused.kernels import launch_rows


@triton.jit
def _channel_norm_kernel(x, gain, out, rows, dim, root, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (row[:, None] < rows) & (columns[None, :] < dim)
    place = row[:, None] * dim + columns[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(gain + columns, mask=columns < dim, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)  # F.normalize's eps
    value = value * (root / norm)[:, None] * factor[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def channel_norm(x: Tensor, gain: Tensor, silu: bool) -> Tensor:
    """The VAE's normalisation of [B, C, H, W] over C, then SiLU if asked for. Channels-last, in and out."""
    x = x.contiguous(memory_format=torch.channels_last)
    out, dim = torch.empty_like(x), x.shape[1]
    rows, block = x.numel() // dim, triton.next_power_of_2(dim)
    together = max(4096 // block, 1)
    _channel_norm_kernel[(triton.cdiv(rows, together),)](
        x, gain, out, rows, dim, dim**0.5, SILU=silu, ROWS=together, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _softmax_kernel(x, out, dim, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    value = tl.load(x + row * dim + columns, mask=mask, other=-float("inf")) * factor
    value = tl.exp2(value - tl.max(value, axis=0))
    tl.store(out + row * dim + columns, (value / tl.sum(value, axis=0)).to(out.dtype.element_ty), mask=mask)


def softmax(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(x * scale) along the rows of a float32 [L, n], in `dtype`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch_rows(_softmax_kernel, len(x), x.shape[1], x, out, x.shape[1], scale / math.log(2))
    return out
