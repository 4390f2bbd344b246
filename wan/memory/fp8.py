"""Linear layers whose frozen weights are kept in 8 bits (docs/formats.md#fp8-weights).

float8_e4m3fn: 1 sign, 4 exponent and 3 mantissa bits, largest value 448, no infinity (arXiv 2209.05433). Weights of the
kinds `cast` and `scaled` are turned back into the compute dtype for each call, which saves memory, not time, and works
on any device. With the kind `rows` the inputs are rounded as well and the GPU multiplies the 8-bit numbers.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
# A plain cast; a cast after a division by scales, one per 64 columns of a row; or one per row
FP8Kind = Literal["cast", "scaled", "rows"]
SMALLEST_ROW = 1e-12  # a row whose largest number is below is scaled as if this were it
_MAX = torch.finfo(FP8).max
_BLOCK = 64  # input columns that share a scale
_SMALLEST_SCALE = 1e-8
_NEVER = re.compile(r"norm|patch_embedding|text_embedding|time_embedding|time_projection|head|modulation|img_emb")


class Fp8Rows(NamedTuple):
    """Rows in 8 bits: [..., n] float8 times scale [..., 1] float32."""

    values: Tensor
    scale: Tensor


def quantize_rows(x: Tensor) -> Fp8Rows:
    """[..., n] of any float dtype; the largest number of each row becomes 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ROW) / _MAX
    return Fp8Rows((x / scale).clamp(-_MAX, _MAX).to(FP8), scale)


def product_of_rows(x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x weight^T + bias in `dtype`; x [..., in], weight [out, in].

    A GPU of compute capability 8.9 or above multiplies the 8-bit numbers and rounds to bfloat16, all that torch has for
    scaled rows. On a CPU it is the same in float32.
    """
    if not x.values.is_cuda:
        out = F.linear(x.values.float(), weight.values.float()) * x.scale * weight.scale[:, 0]
        return (out if bias is None else out + bias.float()).to(dtype)
    values, scale = x.values.flatten(0, -2), x.scale.flatten(0, -2)
    out = torch._scaled_mm(
        values,
        weight.values.t(),
        scale,
        weight.scale.t(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.values.shape[:-1]).to(dtype)


def quantize(weight: Tensor, kind: FP8Kind) -> tuple[Tensor, Tensor | None]:
    """weight [out, in] -> (float8 [out, in], scale in the dtype of `weight`, or None for a cast).

    scaled: weight = float8 * scale with one scale per row and 64 columns, [out, in / 64, 1], or per row, [out, 1], when
    64 does not divide `in`. Values that are beyond 448 nevertheless become 448. rows: see `quantize_rows`.
    """
    if kind == "rows":
        return quantize_rows(weight)
    values, scale = weight.float(), None
    if kind == "scaled":
        parts = _parts(values)
        smallest = max(_SMALLEST_SCALE, torch.finfo(weight.dtype).tiny)  # 1e-8 is 0 in float16
        # Rounded first, so that the division here is by the numbers that `dequantize` multiplies by
        scale = (parts.abs().amax(-1, keepdim=True) / _MAX).clamp(min=smallest).to(weight.dtype)
        values = (parts / scale.float()).reshape(weight.shape)
    return values.clamp(-_MAX, _MAX).to(FP8), scale


def dequantize(quantized: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`: [out, in] in `dtype`."""
    weight = quantized.to(dtype)
    if scale is None:
        return weight
    parts = weight if scale.ndim == weight.ndim else _parts(weight)
    return (parts * scale).reshape(weight.shape).to(dtype)


def _parts(weight: Tensor) -> Tensor:
    """[out, in] -> [out, in / 64, 64] when that is possible: the last dimension shares a scale."""
    return weight.unflatten(1, (-1, _BLOCK)) if weight.shape[1] % _BLOCK == 0 else weight


class _Fp8Product(torch.autograd.Function):
    """F.linear that saves 8-bit weights for backward, which dequantises them again. Only x gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(quantized, scale)
        ctx.dtype = dtype
        return F.linear(x, dequantize(quantized, scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        quantized, scale = ctx.saved_tensors
        return gradient @ dequantize(quantized, scale, ctx.dtype), None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer with a float8 weight, computed in `compute_dtype`; `weight` is made on each access.

    Parameters: `quantized` [out, in], `scale_weight`, see `quantize`, and `bias` [out].
    """

    scale_weight: nn.Parameter | None

    def __init__(self, base: nn.Linear, compute_dtype: torch.dtype, kind: FP8Kind) -> None:
        """Empty, of the shape and on the device of `base`."""
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a full weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.compute_dtype, self.kind = compute_dtype, kind

        def empty(*shape: int, dtype: torch.dtype = compute_dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=base.weight.device), requires_grad=False)

        self.quantized = empty(self.out_features, self.in_features, dtype=FP8)
        if kind == "cast":
            scale = None
        elif kind == "scaled":
            scale = empty(*_parts(self.quantized).shape[:-1], 1)
        else:
            scale = empty(self.out_features, 1, dtype=torch.float32)
        self.register_parameter("scale_weight", scale)
        self.register_parameter("bias", None if base.bias is None else empty(self.out_features))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter of nn.Linear, here made on each access
        """[out, in] in the compute dtype."""
        return dequantize(self.quantized, self.scale_weight, self.compute_dtype)

    @property
    def rows(self) -> Fp8Rows:
        """The quantised weight of the kind `rows`: [out, in] and a scale per row."""
        assert self.scale_weight is not None
        return Fp8Rows(self.quantized, self.scale_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], both in the compute dtype. The kind `rows` has no gradient."""
        if self.kind == "rows":
            return product_of_rows(quantize_rows(x), self.rows, self.bias, self.compute_dtype)
        inputs = x, self.quantized, self.scale_weight, self.bias, self.compute_dtype
        return _Fp8Product.apply(*inputs)  # type: ignore[no-untyped-call]  # torch does not annotate it


def is_dit_weight(name: str) -> bool:
    """Whether the weight of the linear layer `name` of a DiT is kept in fp8: inside blocks; the others are small."""
    return "blocks" in name and not _NEVER.search(name)


def is_inner_dit_weight(name: str, blocks: int) -> bool:
    """`is_dit_weight` for the kind `rows`, which rounds inputs too: the first and the last block are left out."""
    return is_dit_weight(name) and not re.match(rf"blocks\.(0|{blocks - 1})\.", name)


def use_fp8_(
    model: nn.Module, dtype: torch.dtype, kind: FP8Kind, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Fp8Linear]:
    """Put an empty Fp8Linear that computes in `dtype` in place of every linear layer whose name is `wanted`.

    Returns {name of the weight that it replaces: layer}, for `fp8_entries`.
    """
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and wanted(name):
            parent, _, child = name.rpartition(".")
            layers[f"{name}.weight"] = layer = Fp8Linear(module, dtype, kind).train(module.training)
            setattr(model.get_submodule(parent), child, layer)
    return layers


def fp8_entries(layers: Mapping[str, Fp8Linear], key: str, tensor: Tensor) -> dict[str, Tensor]:
    """One entry of a full state dict -> the entries for a model in which `use_fp8_` put `layers`."""
    if key not in layers:
        return {key: tensor}
    quantized, scale = quantize(tensor, layers[key].kind)
    name = key.removesuffix("weight")
    return {f"{name}quantized": quantized} | ({} if scale is None else {f"{name}scale_weight": scale})
