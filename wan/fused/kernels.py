"""The fused operations of wan/fused/plain.py, under the same names, as Triton kernels. Imported on CUDA only.

Every kernel reads and writes each number once, because memory traffic bounds them all. A program handles one row, i.e.
one token, and computes in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.fused.attention_kernels import cross_attention
from wan.memory.fp8 import FP8, SMALLEST_ROW, Fp8Rows

__all__ = [
    "cross_attention",
    "linear32",
    "linear_gelu",
    "quantized",
    "residual_add",
    "residual_norm",
    "residual_norm_",
    "rms_rope",
    "rms_rope_",
]
_FP8_MAX = tl.constexpr(torch.finfo(FP8).max)  # 448
_SMALLEST_ROW = tl.constexpr(SMALLEST_ROW)
_HALF_HEAD = 64  # numbers of a row that a kernel sees as half a head where nothing is rotated


def launch_rows(kernel, programs: int, dim: int, *arguments, numbers_per_warp: int = 1024, **constants) -> None:
    """Run `kernel` with as many threads as a row of `dim` numbers keeps busy."""
    block = triton.next_power_of_2(dim)
    warps = min(max(block // numbers_per_warp, 1), 16)
    kernel[(programs,)](*arguments, BLOCK=block, num_warps=warps, **constants)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """`stand_in` instead of None, which kernels do not take; their constants say which inputs they may read."""
    return stand_in if tensor is None else tensor


def _stride(per_batch: Tensor | None) -> int:
    """Numbers between the rows of two items of [B, dim]; 0 when all items have the one row."""
    return 0 if per_batch is None or per_batch.shape[0] == 1 else per_batch.stride(0)


@triton.jit
def _store_rows8(out, scales, row, dim, columns, mask, value):
    """Store a row in float8_e4m3fn, divided by a scale that makes its largest number 448. Masked numbers must be 0."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), _SMALLEST_ROW) / _FP8_MAX
    value = tl.minimum(tl.maximum(value * (1.0 / scale), -_FP8_MAX), _FP8_MAX)  # a division for each would cost time
    tl.store(scales + row, scale)
    tl.store(out + row * dim + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _residual_norm_kernel(
    x,
    addend,
    gate,
    scale,
    shift,
    x_out,
    out,
    out_scale,
    length,
    dim,
    eps,
    gate_stride,
    scale_stride,
    shift_stride,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    item = row // length
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    place = row * dim + columns
    value = tl.load(x + place, mask=mask, other=0.0)
    if ADD:
        change = tl.load(addend + place, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            change *= tl.load(gate + item * gate_stride + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        value += change
        tl.store(x_out + place, value, mask=mask)
    if NORM:
        centred = tl.where(mask, value - tl.sum(value, axis=0) / dim, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / dim + eps)
        factor = tl.load(scale + item * scale_stride + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        offset = tl.load(shift + item * shift_stride + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        factor = factor.to(tl.float32)
        if MODULATED:
            factor += 1.0
        normed = normed * factor + offset.to(tl.float32)
        if EIGHT_BITS:
            _store_rows8(out, out_scale, row, dim, columns, mask, normed)
        else:
            tl.store(out + place, normed.to(out.dtype.element_ty), mask=mask)


def _residual_norm(x, addend, gate, scale, shift, eps, modulated, x_out, out, out_scale=None) -> None:
    """Fill x_out (only with an addend) and out (unless it is None)."""
    rows, dim = _rows(x), x.shape[-1]
    tensors = (x, _or(addend, x), _or(gate, x), _or(scale, x), _or(shift, x), x_out, _or(out, x), _or(out_scale, x))
    sizes = (x.shape[1], dim, eps, _stride(gate), _stride(scale), _stride(shift))
    constants = {"ADD": addend is not None, "GATE": gate is not None, "NORM": out is not None}
    constants |= {"MODULATED": modulated, "EIGHT_BITS": out_scale is not None}
    launch_rows(_residual_norm_kernel, rows, dim, *tensors, *sizes, **constants)


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
    """See wan/fused/plain.py."""
    out = torch.empty(x.shape, dtype=FP8 if eight_bits else dtype, device=x.device)
    scales = torch.empty(*x.shape[:-1], 1, device=x.device) if eight_bits else None
    addend = None if addend is None else addend.contiguous()
    _residual_norm(x, addend, gate, scale, shift, eps, modulated, x, out, scales)
    return out if scales is None else Fp8Rows(out, scales)


@triton.jit
def _residual_norm_backward_kernel(
    grad_x,
    grad_out,
    x,
    gate,
    scale,
    grad,
    grad_addend,
    length,
    dim,
    eps,
    gate_stride,
    scale_stride,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    item = row // length
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    place = row * dim + columns
    total = tl.load(grad_x + place, mask=mask, other=0.0)
    if NORM:
        value = tl.load(x + place, mask=mask, other=0.0)
        centred = tl.where(mask, value - tl.sum(value, axis=0) / dim, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / dim + eps)
        normed = centred * inverse
        factor = tl.load(scale + item * scale_stride + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        factor = factor.to(tl.float32)
        if MODULATED:
            factor += 1.0
        inner = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32) * factor
        along = tl.sum(inner * normed, axis=0) / dim
        total += inverse * (inner - tl.sum(inner, axis=0) / dim - normed * along)
        tl.store(grad + place, total, mask=mask)
    if ADD:
        if GATE:
            total *= tl.load(gate + item * gate_stride + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        tl.store(grad_addend + place, total.to(grad_addend.dtype.element_ty), mask=mask)


class _ResidualNorm(torch.autograd.Function):
    """Autograd function of `residual_norm`, and without `dtype` of `residual_add`: gradients for x and the addend."""

    @staticmethod
    def forward(ctx, x, addend, gate, scale, shift, eps, modulated, dtype):
        add, norm = addend is not None, dtype is not None
        addend = addend.contiguous() if add else None
        new = torch.empty_like(x) if add else x
        out = torch.empty(x.shape, dtype=dtype, device=x.device) if norm else None
        _residual_norm(x, addend, gate, scale, shift, eps, modulated, new, out)
        ctx.save_for_backward(new if norm else None)
        ctx.modulation = gate, scale  # not saved: recomputing a block ends with the last tensor that is
        ctx.settings = eps, modulated, addend.dtype if add else None
        return new if add else x.view_as(x), out

    @staticmethod
    def backward(ctx, grad_x, grad_out):
        (x,), (gate, scale) = ctx.saved_tensors, ctx.modulation
        eps, modulated, addend_dtype = ctx.settings
        norm, add = x is not None, addend_dtype is not None
        grad_x = grad_x.contiguous()
        grad = torch.empty_like(grad_x) if norm else grad_x
        grad_addend = torch.empty_like(grad_x, dtype=addend_dtype) if add else None
        tensors = (grad_x, _or(grad_out, grad_x).contiguous(), _or(x, grad_x), _or(gate, grad_x), _or(scale, grad_x))
        sizes = (grad_x.shape[1], grad_x.shape[-1], eps, _stride(gate), _stride(scale))
        constants = {"ADD": add, "GATE": gate is not None, "NORM": norm, "MODULATED": modulated}
        launch_rows(
            *(_residual_norm_backward_kernel, _rows(grad_x), grad_x.shape[-1]),
            *(*tensors, grad, _or(grad_addend, grad), *sizes),
            **constants,
            numbers_per_warp=2048,
        )
        return grad, grad_addend, None, None, None, None, None, None


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
    """See wan/fused/plain.py; gradients reach x and addend only."""
    return _ResidualNorm.apply(x, addend, gate, scale, shift, eps, modulated, dtype)


def residual_add(x: Tensor, addend: Tensor, gate: Tensor | None) -> Tensor:
    """See wan/fused/plain.py; gradients reach x and addend only."""
    return _ResidualNorm.apply(x, addend, gate, None, None, 0.0, False, None)[0]


@triton.jit
def _rotated(value, cosines, sines, row, BACK: tl.constexpr, HEADS: tl.constexpr, HALF_HEAD: tl.constexpr):
    """A row [HEADS, 2 * HALF_HEAD] whose adjacent pairs are rotated by their angles, or back; all heads are alike."""
    place = row * HALF_HEAD + tl.arange(0, HALF_HEAD)
    cosine, sine = tl.load(cosines + place)[None, :], tl.load(sines + place)[None, :]
    if BACK:
        sine = -sine
    first, second = tl.split(tl.reshape(value, (HEADS, HALF_HEAD, 2)))
    turned = tl.join(first * cosine - second * sine, first * sine + second * cosine)
    return tl.reshape(turned, (HEADS, 2 * HALF_HEAD))


@triton.jit
def _rms_rope_kernel(
    y,
    weight,
    cosines,
    sines,
    out,
    dim,
    eps,
    y_stride,
    out_stride,
    ROPE: tl.constexpr,
    HALF_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HEADS)[:, None] * (2 * HALF_HEAD) + tl.arange(0, 2 * HALF_HEAD)[None, :]
    mask = columns < dim
    value = tl.load(y + row * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / dim + eps) * factor
    if ROPE:
        value = _rotated(value, cosines, sines, row, False, HEADS, HALF_HEAD)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rms_rope_backward_kernel(
    grad_out,
    y,
    weight,
    cosines,
    sines,
    grad,
    dim,
    eps,
    ROPE: tl.constexpr,
    HALF_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HEADS)[:, None] * (2 * HALF_HEAD) + tl.arange(0, 2 * HALF_HEAD)[None, :]
    mask = columns < dim
    inner = tl.load(grad_out + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    if ROPE:
        inner = _rotated(inner, cosines, sines, row, True, HEADS, HALF_HEAD)
    value = tl.load(y + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    inner *= tl.load(weight + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / dim + eps)
    along = tl.sum(inner * value) / dim
    result = inverse * (inner - value * inverse * inverse * along)
    tl.store(grad + row * dim + columns, result.to(grad.dtype.element_ty), mask=mask)


def _row_of_heads(cos: Tensor | None, dim: int) -> dict[str, bool | int]:
    """Constants of a kernel that sees a row as heads."""
    half = _HALF_HEAD if cos is None else cos.shape[-1]
    heads = triton.next_power_of_2(triton.cdiv(dim, 2 * half))
    return {"ROPE": cos is not None, "HALF_HEAD": half, "HEADS": heads, "num_warps": min(max(heads // 16, 1), 8)}


def _rms_rope(y: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, out: Tensor) -> None:
    dim, angles = y.shape[-1], (_or(cos, weight), _or(sin, weight))
    _rms_rope_kernel[(_rows(y),)](
        y, weight, *angles, out, dim, eps, y.stride(1), out.stride(1), **_row_of_heads(cos, dim)
    )


def rms_rope_(y: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """See wan/fused/plain.py. The rows of all items must lie at equal distances."""
    _rms_rope(y, weight, cos, sin, eps, y)
    return y


class _RmsRope(torch.autograd.Function):
    """Autograd function of `rms_rope`, with a gradient for y only."""

    @staticmethod
    def forward(ctx, y, weight, cos, sin, eps):
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        y = y.contiguous()
        _rms_rope(y, weight, cos, sin, eps, out)
        ctx.save_for_backward(y, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad_out):
        y, weight, cos, sin = ctx.saved_tensors
        grad, dim, angles = torch.empty_like(y), y.shape[-1], (_or(cos, weight), _or(sin, weight))
        _rms_rope_backward_kernel[(_rows(y),)](
            grad_out.contiguous(), y, weight, *angles, grad, dim, ctx.eps, **_row_of_heads(cos, dim)
        )
        return grad, None, None, None, None


def rms_rope(y: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """See wan/fused/plain.py; a gradient reaches y only."""
    return _RmsRope.apply(y, weight, cos, sin, eps)


@triton.jit
def _quantize_kernel(x, out, scales, dim, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    value = tl.load(x + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # x (1 + tanh(z)) / 2 = x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        value *= tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    _store_rows8(out, scales, row, dim, columns, mask, value)


def quantized(x: Tensor, gelu: bool = False) -> Fp8Rows:
    """See wan/fused/plain.py."""
    x = x.contiguous()
    rows = Fp8Rows(torch.empty(x.shape, dtype=FP8, device=x.device), torch.empty(*x.shape[:-1], 1, device=x.device))
    launch_rows(_quantize_kernel, _rows(x), x.shape[-1], x, *rows, x.shape[-1], GELU=gelu)
    return rows


def linear32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See wan/fused/plain.py. The weights are read in the dtype they are stored in.

    x is the sum of three bfloat16 numbers, 8 bits of its mantissa each, whose products with bfloat16 weights are exact
    in float32.
    """
    if weight.dtype != torch.bfloat16:
        return torch.nn.functional.linear(x, weight.float(), bias.float())
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1]
    products = torch.mm(torch.cat(parts), weight.t(), out_dtype=torch.float32)
    return products.unflatten(0, (3, -1)).sum(0) + bias.float()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See wan/fused/plain.py: cuBLAS applies the tanh form to its float32 sums."""
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])
