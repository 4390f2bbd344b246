"""The fused operations of wan/fused/dit.py in plain PyTorch: the reference of the kernels, for tests and CPUs.

x is the float32 residual stream [B, L, dim]; gate, scale and shift are [B or 1, dim]; cos and sin are [B, L, D / 2].
Names that end in _ write their result over their input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.memory.fp8 import Fp8Rows, quantize_rows
from wan.nets.rope import apply_rope

__all__ = [
    *("cross_attention", "linear32", "linear_gelu", "quantized"),
    *("residual_add", "residual_norm", "residual_norm_", "rms_rope", "rms_rope_"),
]


def residual_add(x: Tensor, addend: Tensor, gate: Tensor | None) -> Tensor:
    """x + addend * gate, float32."""
    return x + (addend if gate is None else addend * gate[:, None])


def residual_norm(
    x: Tensor,
    addend: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    modulated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(x', layer_norm(x') * scale + shift in `dtype`) with x' = x + addend * gate.

    modulated: scale counts from 1 as adaLN's does; otherwise scale and shift are weight and bias of the normalisation.
    """
    if addend is not None:
        x = residual_add(x, addend, gate)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return x, (normed * (scale[:, None].float() + modulated) + shift[:, None].float()).to(dtype)


def residual_norm_(
    x: Tensor,
    addend: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    modulated: bool,
    dtype: torch.dtype,
    eight_bits: bool = False,
) -> Tensor | Fp8Rows:
    """Second result of `residual_norm`; x' is written over x. eight_bits: the result is quantised row by row."""
    new, out = residual_norm(x, addend, gate, scale, shift, eps, modulated, torch.float32 if eight_bits else dtype)
    x.copy_(new)
    return quantize_rows(out) if eight_bits else out


def rms_rope(y: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """RMS normalisation of [B, L, dim] over all heads, then, with angles, their rotation; rounded once, at the end."""
    normed = F.rms_norm(y.float(), y.shape[-1:], weight.float(), eps)
    if cos is not None and sin is not None:
        heads = normed.unflatten(-1, (-1, 2 * cos.shape[-1]))
        normed = apply_rope(heads, cos, sin).flatten(2)
    return normed.to(y.dtype)


def rms_rope_(y: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """`rms_rope` written over its input, whose rows may lie apart."""
    return y.copy_(rms_rope(y, weight, cos, sin, eps))


def linear32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias of float32 [B, in] and weights of any dtype, computed and returned in float32."""
    return F.linear(x, weight.float(), bias.float())


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias), in its tanh form."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def quantized(x: Tensor, gelu: bool = False) -> Fp8Rows:
    """x, or gelu(x) in its tanh form, quantised row by row."""
    return quantize_rows(F.gelu(x.float(), approximate="tanh") if gelu else x)


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, text_rows: int, repeats: int) -> Tensor:
    """Attention of q [B, L, N, D] to the text plus that to the image: [B, L, N, D].

    keys, values: [B, rows, N, D], the first `text_rows` those of the text, whose last row counts `repeats` times.
    """
    counts = torch.zeros(text_rows, dtype=q.dtype, device=q.device)
    counts[-1].fill_(math.log(repeats))  # an assignment would copy from the host, which no CUDA graph can
    q, keys, values = (tensor.transpose(1, 2) for tensor in (q, keys, values))
    text, image = slice(None, text_rows), slice(text_rows, None)
    found = F.scaled_dot_product_attention(q, keys[:, :, text], values[:, :, text], counts.expand(q.shape[2], -1))
    if keys.shape[2] > text_rows:
        found = found + F.scaled_dot_product_attention(q, keys[:, :, image], values[:, :, image])
    return found.transpose(1, 2)
