"""Normalisation over channels and activation as one Triton kernel with its gradient, for training the VAE on a GPU.

Between narrow convolutions they are most of the work: PyTorch's own operations read and write each number ten times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # that a program works on
_EPS = 1e-12


@triton.jit
def _forward_kernel(x, gain, out, rows, EPS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    place, mask = row[:, None].to(tl.int64) * DIM + column[None, :], (row < rows)[:, None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / DIM + EPS)
    value = value * scale[:, None] * tl.load(gain + column).to(tl.float32)[None, :]
    tl.store(out + place, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(x, gain, grad, grad_x, grad_gain, rows, EPS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    place, mask = row[:, None].to(tl.int64) * DIM + column[None, :], (row < rows)[:, None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / DIM + EPS)[:, None]
    value = value * scale
    factor = tl.load(gain + column).to(tl.float32)[None, :]
    scaled = value * factor
    gate = tl.sigmoid(scaled)
    change = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32) * gate * (1 + scaled * (1 - gate))
    tl.store(grad_gain + tl.program_id(0) * DIM + column, tl.sum(change * value, axis=0))
    change = change * factor
    change = scale * (change - value * (tl.sum(change * value, axis=1) / DIM)[:, None])
    tl.store(grad_x + place, change.to(grad_x.dtype.element_ty), mask=mask)


class _NormalisedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, gain)
        rows, dim = x.shape
        out = torch.empty_like(x)
        _forward_kernel[(triton.cdiv(rows, _ROWS),)](x, gain, out, rows, EPS=_EPS, DIM=dim, ROWS=_ROWS)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        rows, dim = x.shape
        programs = triton.cdiv(rows, _ROWS)
        grad_x, grad_gain = torch.empty_like(x), torch.empty(programs, dim, device=x.device)
        _backward_kernel[(programs,)](
            x, gain, grad.contiguous(), grad_x, grad_gain, rows, EPS=_EPS, DIM=dim, ROWS=_ROWS
        )
        return grad_x, grad_gain.sum(0).to(gain.dtype)


def normalised_silu(rows: Tensor, gain: Tensor) -> Tensor:
    """silu(row / its root mean square * gain): rows [L, C], gain [C], C a power of two -> [L, C] in the dtype of rows.

    ChannelNorm of wan/nets/vae.py and the activation after it.
    """
    return _NormalisedSilu.apply(rows, gain)
