"""Frozen linear layers that share one input, and the LoRA beside each, as one operation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.memory.fp8 import Fp8Linear, dequantize


class LowRankLayer(Protocol):
    """A frozen linear layer with a LoRA beside it, as `wan.lora.layers.LoRALinear` is."""

    base: nn.Linear
    lora_down: nn.Linear  # weight [rank, in] float32
    lora_up: nn.Linear  # weight [out, rank] float32

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA matrices of layers that share one input, in the dtype that products are computed in."""

    downs: Tensor  # [ranks of all layers, in], each times the scale of its layer
    ups: list[Tensor]  # [out, rank] per layer


@torch.no_grad()
def cast_low_rank(groups: Sequence[Sequence[LowRankLayer]], dtype: torch.dtype) -> list[LowRank]:
    """Cast the LoRA matrices of each group of layers to `dtype`, with batched kernels for all groups."""
    made: list[LowRank] = []
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    scales: list[float] = []
    for layers in groups:
        downs, ups = [layer.lora_down.weight for layer in layers], [layer.lora_up.weight for layer in layers]
        ranks = [len(down) for down in downs]
        one = LowRank(downs[0].new_empty(sum(ranks), downs[0].shape[1], dtype=dtype), [])
        one.ups.extend(torch.empty_like(up, dtype=dtype) for up in ups)
        sources += [*downs, *ups]
        targets += [*torch.split(one.downs, ranks), *one.ups]
        scales += [*(layer.scale for layer in layers), *[1.0] * len(ups)]
        made.append(one)
    torch._foreach_copy_(targets, torch._foreach_mul(sources, scales))
    return made


def lora_products(
    x: Tensor, layers: Sequence[LowRankLayer], low_rank: LowRank | None = None, read: bool = True
) -> tuple[Tensor, ...]:
    """x weight^T + bias + scale (x down^T) up^T of each layer: [..., in] -> [..., out] each, in the dtype of x.

    low_rank: what `cast_low_rank` makes of the layers, if that has been done already. read: False leaves the large
    product out, for a pass that only backward needs. Gradients reach x, down and up, the latter in float32.
    """
    low_rank = low_rank or cast_low_rank([layers], x.dtype)[0]
    matrices = [matrix for layer in layers for matrix in (layer.lora_down.weight, layer.lora_up.weight)]
    products: tuple[Tensor, ...] = _LoRAProducts.apply(  # type: ignore[no-untyped-call] # torch does not annotate it
        x, layers, low_rank, read, *matrices
    )
    return products


class _LoRAProducts(torch.autograd.Function):
    """Autograd of `lora_products`, which keeps x and x down^T beside weights and matrices.

    The large products are added to the small ones: cuBLAS reads what is there while it computes, so that this takes
    less time than a further pass over the result.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[LowRankLayer], low_rank: LowRank, read: bool, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        low = rows @ low_rank.downs.t()
        ctx.ranks, ctx.scales = [up.shape[1] for up in low_rank.ups], [layer.scale for layer in layers]
        outs = []
        for layer, up, part in zip(layers, low_rank.ups, torch.split(low, ctx.ranks, dim=1), strict=True):
            out = F.linear(part, up, layer.base.bias)
            if read:
                out.addmm_(rows, layer.base.weight.t())
            outs.append(out.view(*x.shape[:-1], out.shape[1]))
        weights, scales, ctx.fp8_dtypes = zip(*(_stored(layer.base) for layer in layers), strict=True)
        ctx.save_for_backward(x, low, low_rank.downs, *low_rank.ups, *weights, *scales)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, low, downs, *rest), count = ctx.saved_tensors, len(gradients)
        ups, stored = rest[:count], zip(rest[count : 2 * count], rest[2 * count :], ctx.fp8_dtypes, strict=True)
        rows = [gradient.flatten(0, -2) for gradient in gradients]
        low_gradients = [gradient @ up for gradient, up in zip(rows, ups, strict=True)]
        parts = torch.split(low, ctx.ranks, dim=1)
        up_gradients = [_product32(gradient.t(), part) for gradient, part in zip(rows, parts, strict=True)]
        scaled = [part * scale for part, scale in zip(low_gradients, ctx.scales, strict=True)]
        down_gradients = torch.split(_product32(_joined(scaled).t(), x.flatten(0, -2)), ctx.ranks)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _joined(low_gradients) @ downs
            for gradient, weight in zip(rows, stored, strict=True):
                x_gradient.addmm_(gradient, _usable(*weight))
            x_gradient = x_gradient.view(x.shape)
        pairs = zip(down_gradients, up_gradients, strict=True)
        return x_gradient, None, None, None, *(gradient for pair in pairs for gradient in pair)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _stored(base: nn.Linear) -> tuple[Tensor, Tensor | None, torch.dtype | None]:
    """The weight of a frozen layer, or its fp8 numbers with their scale and the dtype that they are computed in."""
    if isinstance(base, Fp8Linear):
        return base.quantized, base.scale_weight, base.compute_dtype
    return base.weight, None, None


def _usable(stored: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return stored if dtype is None else dequantize(stored, scale, dtype)


def _product32(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32 where they have 16 bits; cuBLAS does not round its sums before."""
    if a.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
