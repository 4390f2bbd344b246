"""Cross attention to text and image at once, as Triton kernels with gradients. Imported on CUDA only.

A frame asks a few hundred keys: there the attention kernels of libraries, made for long sequences, spend their time on
reading and writing. The text keeps one row for all of its padding, which counts as often as it stands for; the backward
pass is that of FlashAttention 2 (arXiv 2307.08691), with no atomic additions, so that it repeats to the bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.fused import plain

_KEYS = _QUERIES = 64  # that a program holds at a time; with more, fewer programs share a multiprocessor


@triton.jit
def _starts(length, rows, heads, DIM: tl.constexpr):
    """Of the item and the head of a program: where its queries and its keys begin, and how far their rows are apart."""
    item, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    stride = heads * DIM
    return item * length * stride + head * DIM, item * rows * stride + head * DIM, stride


@triton.jit
def _queries(length, QUERIES: tl.constexpr):
    """Those of a program: their places, which of them there are, and where the numbers of each, for the text, lie."""
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    return place, place < length, tl.program_id(1).to(tl.int64) * 2 * length + place


@triton.jit
def _tile(base, rows, end, stride, DIM: tl.constexpr):
    """Some rows of a head: [rows, DIM], zeros from row `end` on."""
    columns = tl.arange(0, DIM)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=rows[:, None] < end, other=0.0)


@triton.jit
def _scores(q, k, rows, end, log_repeats, factor):
    """Logarithms, to the base 2, of the weights before normalisation: [queries, keys]; row `end` - 1 counts often."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    scores += tl.where(rows == end - 1, log_repeats, 0.0)[None, :]
    return tl.where((rows < end)[None, :], scores, -float("inf"))


@triton.jit
def _attend(
    q,
    keys,
    values,
    start,
    end,
    stride,
    log_repeats,
    factor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Attention to the rows from `start` to `end`: values [QUERIES, DIM], and the logarithm of the normaliser."""
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    found = tl.zeros((QUERIES, DIM), tl.float32)
    for first in range(start, end, KEYS):
        rows = first + tl.arange(0, KEYS)
        scores = _scores(q, _tile(keys, rows, end, stride, DIM), rows, end, log_repeats, factor)
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(weights, axis=1)
        v = _tile(values, rows, end, stride, DIM)
        found = tl.dot(weights.to(v.dtype), v, found * decay[:, None], input_precision="ieee")
        largest = new
    return found / total[:, None], largest + tl.log2(total)


@triton.jit
def _forward_kernel(
    q,
    keys,
    values,
    out,
    out_image,
    normalisers,
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
    keys += origin
    values += origin
    place, mask, lines = _queries(length, QUERIES)
    asked = _tile(q + start, place, length, stride, DIM)
    cells = start + place[:, None] * stride + tl.arange(0, DIM)[None, :]
    found, normaliser = _attend(asked, keys, values, 0, text_rows, stride, log_repeats, factor, QUERIES, KEYS, DIM)
    if TRAINS:
        tl.store(normalisers + lines, normaliser, mask=mask)
    if IMAGE:
        seen, normaliser = _attend(asked, keys, values, text_rows, rows, stride, 0.0, factor, QUERIES, KEYS, DIM)
        found += seen
        if TRAINS:
            tl.store(normalisers + length + lines, normaliser, mask=mask)
            tl.store(out_image + cells, seen.to(out.dtype.element_ty), mask=mask[:, None])
    tl.store(out + cells, found.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _query_gradient(
    q,
    gradient,
    delta,
    normaliser,
    keys,
    values,
    start,
    end,
    stride,
    log_repeats,
    factor,
    total,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """`total` and what the rows from `start` to `end` add to it: [queries, DIM]."""
    for first in range(start, end, KEYS):
        rows = first + tl.arange(0, KEYS)
        k, v = _tile(keys, rows, end, stride, DIM), _tile(values, rows, end, stride, DIM)
        weights = tl.exp2(_scores(q, k, rows, end, log_repeats, factor) - normaliser[:, None])
        change = tl.dot(gradient, tl.trans(v), input_precision="ieee") - delta[:, None]
        total = tl.dot((weights * change).to(k.dtype), k, total, input_precision="ieee")
    return total


@triton.jit
def _query_gradient_kernel(
    q,
    keys,
    values,
    out,
    out_image,
    gradient,
    normalisers,
    deltas,
    q_gradient,
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
    keys += origin
    values += origin
    place, mask, lines = _queries(length, QUERIES)
    asked = _tile(q + start, place, length, stride, DIM)
    coming = _tile(gradient + start, place, length, stride, DIM)
    found = _tile(out + start, place, length, stride, DIM).to(tl.float32)
    total = tl.zeros((QUERIES, DIM), tl.float32)
    if IMAGE:
        seen = _tile(out_image + start, place, length, stride, DIM).to(tl.float32)
        found -= seen
        delta = tl.sum(seen * coming.to(tl.float32), axis=1)
        tl.store(deltas + length + lines, delta, mask=mask)
        normaliser = tl.load(normalisers + length + lines, mask=mask, other=0.0)
        total = _query_gradient(
            asked, coming, delta, normaliser, keys, values, text_rows, rows, stride, 0.0, factor, total, KEYS, DIM
        )
    delta = tl.sum(found * coming.to(tl.float32), axis=1)
    tl.store(deltas + lines, delta, mask=mask)
    normaliser = tl.load(normalisers + lines, mask=mask, other=0.0)
    total = _query_gradient(
        asked,
        coming,
        delta,
        normaliser,
        keys,
        values,
        0,
        text_rows,
        stride,
        log_repeats,
        factor,
        total,
        KEYS,
        DIM,
    )
    cells = start + place[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(q_gradient + cells, (total * scale).to(q_gradient.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _key_gradient_kernel(
    q,
    keys,
    values,
    gradient,
    normalisers,
    deltas,
    k_gradient,
    v_gradient,
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
    places = first + tl.arange(0, KEYS)
    k, v = _tile(keys + origin, places, end, stride, DIM), _tile(values + origin, places, end, stride, DIM)
    bias = tl.where(places == text_rows - 1, log_repeats, 0.0)
    lines = (tl.program_id(1).to(tl.int64) * 2 + tl.where(of_text, 0, 1)) * length
    k_total, v_total = tl.zeros((KEYS, DIM), tl.float32), tl.zeros((KEYS, DIM), tl.float32)
    for at in range(0, length, QUERIES):
        place = at + tl.arange(0, QUERIES)
        mask = place < length
        asked = _tile(q + start, place, length, stride, DIM)
        coming = _tile(gradient + start, place, length, stride, DIM)
        normaliser = tl.load(normalisers + lines + place, mask=mask, other=float("inf"))
        delta = tl.load(deltas + lines + place, mask=mask, other=0.0)
        scores = tl.dot(k, tl.trans(asked), input_precision="ieee") * factor + bias[:, None]
        weights = tl.exp2(scores - normaliser[None, :])
        v_total = tl.dot(weights.to(v.dtype), coming, v_total, input_precision="ieee")
        change = tl.dot(v, tl.trans(coming), input_precision="ieee") - delta[None, :]
        k_total = tl.dot((weights * change).to(k.dtype), asked, k_total, input_precision="ieee")
    cells = origin + places[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(k_gradient + cells, (k_total * scale).to(k.dtype), mask=(places < end)[:, None])
    tl.store(v_gradient + cells, v_total.to(v.dtype), mask=(places < end)[:, None])


def _numbers(q: Tensor, keys: Tensor, text_rows: int, repeats: int) -> dict:
    """What all kernels are told."""
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
    """The result; with `trains` also the part of the image, and the logarithms of both normalisers."""
    batch, length, heads, _ = q.shape
    image = keys.shape[1] > text_rows
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out_image = torch.empty_like(out) if image and trains else out
    normalisers = torch.empty(batch, heads, 2, length, device=q.device) if trains else out
    _forward_kernel[(triton.cdiv(length, _QUERIES), batch * heads)](
        *(q, keys, values, out, out_image, normalisers),
        **_numbers(q, keys, text_rows, repeats),
        IMAGE=image,
        TRAINS=trains,
    )
    return out, out_image, normalisers


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, keys, values, text_rows, repeats):
        out, out_image, normalisers = _forward(q, keys, values, text_rows, repeats, trains=True)
        ctx.save_for_backward(q, keys, values, out, out_image, normalisers)
        ctx.settings = text_rows, repeats
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, keys, values, out, out_image, normalisers = ctx.saved_tensors
        (batch, length, heads, dim), (_, rows, *_) = q.shape, keys.shape
        text_rows, repeats = ctx.settings
        gradient, deltas, q_gradient = gradient.contiguous(), torch.empty_like(normalisers), torch.empty_like(q)
        numbers = _numbers(q, keys, text_rows, repeats) | {"scale": dim**-0.5}
        _query_gradient_kernel[(triton.cdiv(length, _QUERIES), batch * heads)](
            *(q, keys, values, out, out_image, gradient, normalisers, deltas, q_gradient),
            **numbers,
            IMAGE=rows > text_rows,
        )
        k_gradient, v_gradient = torch.empty_like(keys), torch.empty_like(values)
        chunks = triton.cdiv(text_rows, _KEYS) + triton.cdiv(rows - text_rows, _KEYS)
        _key_gradient_kernel[(chunks, batch * heads)](
            *(q, keys, values, gradient, normalisers, deltas, k_gradient, v_gradient),
            **numbers,
        )
        return q_gradient, k_gradient, v_gradient, None, None


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, text_rows: int, repeats: int) -> Tensor:
    """See wan/fused/plain.py, which also computes in float32, for which the kernels have no room."""
    if q.dtype == torch.float32 and q.is_cuda:
        return plain.cross_attention(q, keys, values, text_rows, repeats)
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    if torch.is_grad_enabled():
        return _CrossAttention.apply(q, keys, values, text_rows, repeats)
    return _forward(q, keys, values, text_rows, repeats, trains=False)[0]
