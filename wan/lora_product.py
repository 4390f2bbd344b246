"""A frozen linear layer and the LoRA beside it as one operation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.fp8 import dequantize


class LoRAProduct(torch.autograd.Function):
    """x weight^T + bias + scale (x down^T) up^T in the dtype of x, with gradients for x, down and up.

    stored: the weight, or its fp8 numbers with their `fp8_scale`, which are turned into `fp8_dtype` for each product.
    Beside them it keeps x and x down^T, and it adds in place: nothing else as large as input or output is made.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        stored: Tensor,
        fp8_scale: Tensor | None,
        fp8_dtype: torch.dtype | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        weight = stored if fp8_dtype is None else dequantize(stored, fp8_scale, fp8_dtype)
        low, out = F.linear(x, down), F.linear(x, weight, bias)
        out.flatten(0, -2).addmm_(low.flatten(0, -2), up.t(), alpha=scale)
        ctx.save_for_backward(x, stored, fp8_scale, down, up, low)
        ctx.scale, ctx.fp8_dtype = scale, fp8_dtype
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, stored, fp8_scale, down, up, low = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        low_gradient = (rows @ up).mul_(ctx.scale)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            weight = stored if ctx.fp8_dtype is None else dequantize(stored, fp8_scale, ctx.fp8_dtype)
            x_gradient = (rows @ weight).addmm_(low_gradient, down).unflatten(0, gradient.shape[:-1])
        down_gradient = low_gradient.t() @ x.flatten(0, -2)
        up_gradient = (rows.t() @ low.flatten(0, -2)).mul_(ctx.scale)
        return x_gradient, None, None, None, None, down_gradient, up_gradient, None
