"""One module of a LoRA file: its tensors and the delta that they add to a weight."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LORA = ("lora_down.weight", "lora_up.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
DIFFERENCES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}  # parameter of a module -> its part
UP_BIAS = "lora_up.bias"  # PEFT's `lora_bias`: a delta of the bias, scaled like the product


def weight_delta(parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """Delta of a weight from the tensors of its module, [out, in] float32; differentiable.

    For a convolution `in` is input channels times kernel.
    LoRA (arXiv 2106.09685): scale * up @ down. LoHa (arXiv 2108.06098): scale * (w1_a @ w1_b) * (w2_a @ w2_b).
    LoKr (arXiv 2309.14859): scale * kron(w1, w2), either of which may be a product, too.
    """
    parts = {name: tensor.float() for name, tensor in parts.items()}
    if LORA[0] in parts:
        return scale * (parts[LORA[1]].flatten(1) @ parts[LORA[0]].flatten(1))
    if LOHA[0] in parts:
        return scale * ((parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]))
    return scale * torch.kron(*(_kronecker_factor(parts, name) for name in ("lokr_w1", "lokr_w2")))


def _kronecker_factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def add_delta(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta, computed in float32, in the dtype of `weight`."""
    return (weight.float() + delta).to(weight.dtype)


@dataclass(frozen=True)
class LoRAModule:
    """The tensors of a file for one module: its weight, and in distilled LoRAs also its bias and modulation."""

    parts: dict[str, Tensor]  # by the rest of the key, e.g. `lora_down.weight` or `diff_b`, without alpha
    shape: tuple[int, ...] | None  # of the weight; None when it has no delta
    rank: int | None  # None for a LoKr of two full matrices, and for a plain difference
    alpha: float

    @property
    def scale(self) -> float:
        """Factor of the product; 1 for a LoKr of two full matrices, as LyCORIS has it."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(down [rank, in ...], up [out, rank ...]) of a LoRA, without its scale; None for the other forms."""
        return (self.parts[LORA[0]], self.parts[LORA[1]]) if LORA[0] in self.parts else None

    @property
    def low_rank(self) -> bool:
        """True for LoRA, LoHa and LoKr, which alpha scales; False for plain differences."""
        return not self.parts.keys() <= {*DIFFERENCES.values()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that has a delta: `weight`, `bias`, `modulation`."""
        shapes = {leaf: tuple(self.parts[part].shape) for leaf, part in DIFFERENCES.items() if part in self.parts}
        return shapes | ({"weight": self.shape} if self.shape else {})

    def norm(self) -> float:
        """Frobenius norm of the delta of the weight; 0 without one."""
        if self.pair is None:
            return float(self.delta().norm()) if self.shape else 0.0
        # |up @ down|^2 is the sum of the products of two rank x rank matrices, so that no [out, in] is formed.
        down, up = (matrix.double().flatten(1) for matrix in self.pair)
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def delta(self, leaf: str = "weight", multiplier: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """The delta of one of the parameters in `shapes`, in its shape: float32, on `device`."""
        if DIFFERENCES[leaf] in self.parts:
            return multiplier * self.parts[DIFFERENCES[leaf]].to(device).float()
        parts = {part: tensor.to(device) for part, tensor in self.parts.items() if part not in DIFFERENCES.values()}
        return weight_delta(parts, multiplier * self.scale).reshape(self.shapes[leaf])


def rank_metadata(ranks: Collection[int], alphas: Collection[float]) -> dict[str, str]:
    """`network_dim` and `network_alpha` of a file whose modules have these; kohya's word for several is Dynamic."""
    return {
        key: str(next(iter(values))) if len(values) == 1 else "Dynamic"
        for key, values in (("network_dim", ranks), ("network_alpha", alphas))
    }
