"""Cross attention to text and image at once, as Triton kernels with gradients. Imported on CUDA only.

With a few hundred keys the attention kernels of libraries, made for long sequences, spend their time on reading and
writing. The text keeps one row for all of its padding, which counts as often as it stands for. Backward is that of
FlashAttention 2 (arXiv 2307.08691), with its names (s, p, do, dp, delta, dq, dk, dv; lse, the log-sum-exp, here to the
base 2), and without atomic additions, so that it repeats to the bit.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.fused import plain

_KEYS = _QUERIES = 64  # rows that a program holds at a time; with more, fewer programs share a multiprocessor


@triton.jit
def _starts(length, rows, heads, DIM: tl.constexpr):
    """(offset of the queries, offset of the keys, distance of rows) of this program's item and head, in numbers."""
    item, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    stride = heads * DIM
    return item * length * stride + head * DIM, item * rows * stride + head * DIM, stride


@triton.jit
def _queries(length, QUERIES: tl.constexpr):
    """(row indices, mask, offsets into per-row statistics of the text) of this program's queries."""
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    return rows, rows < length, tl.program_id(1).to(tl.int64) * 2 * length + rows


@triton.jit
def _tile(ptr, rows, end, stride, DIM: tl.constexpr):
    """Rows of a head: [rows, DIM], zeros from row `end` on."""
    columns = tl.arange(0, DIM)
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=rows[:, None] < end, other=0.0)


@triton.jit
def _scores(q, k, rows, end, log_repeats, factor):
    """Scores to the base 2: [queries, keys]; that of row `end` - 1 counts 2^log_repeats times."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    s += tl.where(rows == end - 1, log_repeats, 0.0)[None, :]
    return tl.where((rows < end)[None, :], s, -float("inf"))


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    start,
    end,
    stride,
    log_repeats,
    factor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Attention to the rows from `start` to `end`: output [QUERIES, DIM], and log-sum-exp to the base 2, [QUERIES]."""
    row_max = tl.full((QUERIES,), -float("inf"), tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIM), tl.float32)
    for first in range(start, end, KEYS):
        rows = first + tl.arange(0, KEYS)
        s = _scores(q, _tile(k_ptr, rows, end, stride, DIM), rows, end, log_repeats, factor)
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        p = tl.exp2(s - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, axis=1)
        v = _tile(v_ptr, rows, end, stride, DIM)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
    return acc / row_sum[:, None], row_max + tl.log2(row_sum)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    out_image_ptr,
    lse_ptr,
    length,
    text_rows,
    rows,
    heads,
    log_repeats,
    factor,
    IMAGE: tl.constexpr,
    TRAINS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    start, origin, stride = _starts(length, rows, heads, DIM)
    k_ptr += origin
    v_ptr += origin
    q_rows, mask, lse_offsets = _queries(length, QUERIES)
    q = _tile(q_ptr + start, q_rows, length, stride, DIM)
    offsets = start + q_rows[:, None] * stride + tl.arange(0, DIM)[None, :]
    out, lse = _attend(q, k_ptr, v_ptr, 0, text_rows, stride, log_repeats, factor, QUERIES, KEYS, DIM)
    if TRAINS:
        tl.store(lse_ptr + lse_offsets, lse, mask=mask)
    if IMAGE:
        out_image, lse = _attend(q, k_ptr, v_ptr, text_rows, rows, stride, 0.0, factor, QUERIES, KEYS, DIM)
        out += out_image
        if TRAINS:
            tl.store(lse_ptr + length + lse_offsets, lse, mask=mask)
            tl.store(out_image_ptr + offsets, out_image.to(out_ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _query_gradient(
    q,
    do,
    delta,
    lse,
    k_ptr,
    v_ptr,
    start,
    end,
    stride,
    log_repeats,
    factor,
    dq,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """`dq` plus the gradient through the rows from `start` to `end`, not scaled yet: [queries, DIM]."""
    for first in range(start, end, KEYS):
        rows = first + tl.arange(0, KEYS)
        k, v = _tile(k_ptr, rows, end, stride, DIM), _tile(v_ptr, rows, end, stride, DIM)
        p = tl.exp2(_scores(q, k, rows, end, log_repeats, factor) - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None]
        dq = tl.dot((p * dp).to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    out_image_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    length,
    text_rows,
    rows,
    heads,
    log_repeats,
    factor,
    scale,
    IMAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    start, origin, stride = _starts(length, rows, heads, DIM)
    k_ptr += origin
    v_ptr += origin
    q_rows, mask, lse_offsets = _queries(length, QUERIES)
    q = _tile(q_ptr + start, q_rows, length, stride, DIM)
    do = _tile(do_ptr + start, q_rows, length, stride, DIM)
    out = _tile(out_ptr + start, q_rows, length, stride, DIM).to(tl.float32)
    dq = tl.zeros((QUERIES, DIM), tl.float32)
    if IMAGE:
        out_image = _tile(out_image_ptr + start, q_rows, length, stride, DIM).to(tl.float32)
        out -= out_image
        delta = tl.sum(out_image * do.to(tl.float32), axis=1)
        tl.store(delta_ptr + length + lse_offsets, delta, mask=mask)
        lse = tl.load(lse_ptr + length + lse_offsets, mask=mask, other=0.0)
        dq = _query_gradient(q, do, delta, lse, k_ptr, v_ptr, text_rows, rows, stride, 0.0, factor, dq, KEYS, DIM)
    delta = tl.sum(out * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + lse_offsets, delta, mask=mask)
    lse = tl.load(lse_ptr + lse_offsets, mask=mask, other=0.0)
    dq = _query_gradient(
        q,
        do,
        delta,
        lse,
        k_ptr,
        v_ptr,
        0,
        text_rows,
        stride,
        log_repeats,
        factor,
        dq,
        KEYS,
        DIM,
    )
    offsets = start + q_rows[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(dq_ptr + offsets, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    length,
    text_rows,
    rows,
    heads,
    log_repeats,
    factor,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    start, origin, stride = _starts(length, rows, heads, DIM)
    chunk, text_chunks = tl.program_id(0), tl.cdiv(text_rows, KEYS)
    of_text = chunk < text_chunks
    first = tl.where(of_text, chunk * KEYS, text_rows + (chunk - text_chunks) * KEYS)
    end = tl.where(of_text, text_rows, rows)
    k_rows = first + tl.arange(0, KEYS)
    k, v = _tile(k_ptr + origin, k_rows, end, stride, DIM), _tile(v_ptr + origin, k_rows, end, stride, DIM)
    bias = tl.where(k_rows == text_rows - 1, log_repeats, 0.0)
    lse_offsets = (tl.program_id(1).to(tl.int64) * 2 + tl.where(of_text, 0, 1)) * length
    dk, dv = tl.zeros((KEYS, DIM), tl.float32), tl.zeros((KEYS, DIM), tl.float32)
    for first_query in range(0, length, QUERIES):
        q_rows = first_query + tl.arange(0, QUERIES)
        mask = q_rows < length
        q = _tile(q_ptr + start, q_rows, length, stride, DIM)
        do = _tile(do_ptr + start, q_rows, length, stride, DIM)
        lse = tl.load(lse_ptr + lse_offsets + q_rows, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + lse_offsets + q_rows, mask=mask, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * factor + bias[:, None]
        p = tl.exp2(s - lse[None, :])
        dv = tl.dot(p.to(v.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :]
        dk = tl.dot((p * dp).to(k.dtype), q, dk, input_precision="ieee")
    offsets = origin + k_rows[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(k.dtype), mask=(k_rows < end)[:, None])
    tl.store(dv_ptr + offsets, dv.to(v.dtype), mask=(k_rows < end)[:, None])


def _settings(q: Tensor, keys: Tensor, text_rows: int, repeats: int) -> dict[str, int | float]:
    """Arguments that all kernels take."""
    return {
        "length": q.shape[1],
        "text_rows": text_rows,
        "rows": keys.shape[1],
        "heads": q.shape[2],
        "log_repeats": math.log2(repeats),
        "factor": q.shape[3] ** -0.5 / math.log(2),
        "KEYS": _KEYS,
        "DIM": q.shape[3],
        "QUERIES": _QUERIES,
        "num_warps": 4,
        "num_stages": 2,
    }


def _forward(q: Tensor, keys: Tensor, values: Tensor, text_rows: int, repeats: int, trains: bool) -> tuple[Tensor, ...]:
    """(output [B, L, N, D], the part of the image, log-sum-exp [B, N, 2, L] float32); the last two if `trains`."""
    batch, length, heads, _ = q.shape
    image = keys.shape[1] > text_rows
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out_image = torch.empty_like(out) if image and trains else out
    lse = torch.empty(batch, heads, 2, length, device=q.device) if trains else out
    _forward_kernel[(triton.cdiv(length, _QUERIES), batch * heads)](
        *(q, keys, values, out, out_image, lse),
        **_settings(q, keys, text_rows, repeats),
        IMAGE=image,
        TRAINS=trains,
    )
    return out, out_image, lse


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, values: Tensor, text_rows: int, repeats: int) -> Tensor:
        out, out_image, lse = _forward(q, keys, values, text_rows, repeats, trains=True)
        ctx.save_for_backward(q, keys, values, out, out_image, lse)
        ctx.settings = text_rows, repeats
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, keys, values, out, out_image, lse = ctx.saved_tensors
        (batch, length, heads, dim), (_, rows, *_) = q.shape, keys.shape
        text_rows, repeats = ctx.settings
        do, delta, dq = do.contiguous(), torch.empty_like(lse), torch.empty_like(q)
        settings = _settings(q, keys, text_rows, repeats) | {"scale": dim**-0.5}
        _query_gradient_kernel[(triton.cdiv(length, _QUERIES), batch * heads)](
            *(q, keys, values, out, out_image, do, lse, delta, dq),
            **settings,
            IMAGE=rows > text_rows,
        )
        dk, dv = torch.empty_like(keys), torch.empty_like(values)
        chunks = triton.cdiv(text_rows, _KEYS) + triton.cdiv(rows - text_rows, _KEYS)
        _key_gradient_kernel[(chunks, batch * heads)](
            *(q, keys, values, do, lse, delta, dk, dv),
            **settings,
        )
        return dq, dk, dv, None, None


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, text_rows: int, repeats: int) -> Tensor:
    """See wan/fused/plain.py, which also computes in float32, for which the kernels have no room."""
    if q.dtype == torch.float32 and q.is_cuda:
        return plain.cross_attention(q, keys, values, text_rows, repeats)
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    if torch.is_grad_enabled():
        out: Tensor = _CrossAttention.apply(q, keys, values, text_rows, repeats)
        return out
    return _forward(q, keys, values, text_rows, repeats, trains=False)[0]
