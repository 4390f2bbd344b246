"""One module of a LoRA file: its tensors and the delta that they add to a weight."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LORA = ("lora_down.weight", "lora_up.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
DIFFERENCES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}  # parameter of a module -> its part
REPLACEMENTS = {"weight": "set_weight", "bias": "set_bias", "modulation": "set_modulation"}  # likewise: its new values
DORA = "dora_scale"  # [out, 1 ...] or [1, in, 1 ...]: the norms that the rows or columns of the changed weight get
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


def decomposed(weight: Tensor, norms: Tensor) -> Tensor:
    """DoRA (arXiv 2402.09353): a weight [out, in ...] whose rows or columns get these norms, float32.

    norms: [out, 1 ...] for the rows, as PEFT and LyCORIS have it, or [1, in, 1 ...] for the columns (LyCORIS).
    """
    weight = weight.float()
    axis = 0 if len(norms) == len(weight) else 1
    others = [dim for dim in range(weight.ndim) if dim != axis]
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (norms.float().reshape(lengths.shape) / lengths.clamp(min=torch.finfo(torch.float32).tiny))


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
        """True for LoRA, LoHa and LoKr, which alpha scales; False for plain differences and new values."""
        return not self.parts.keys() <= {*DIFFERENCES.values(), *REPLACEMENTS.values()}

    @property
    def needs_weight(self) -> bool:
        """True when the change depends on the weights that it is made to: DoRA and new values."""
        return not self.parts.keys().isdisjoint({DORA, *REPLACEMENTS.values()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that is changed: `weight`, `bias`, `modulation`."""
        parts = [*DIFFERENCES.items(), *REPLACEMENTS.items()]
        shapes = {leaf: tuple(self.parts[part].shape) for leaf, part in parts if part in self.parts}
        return shapes | ({"weight": self.shape} if self.shape else {})

    def norm(self) -> float:
        """Frobenius norm of the delta of the weight, without DoRA; 0 without one, and for new values."""
        if self.pair is None:
            return float(self.delta().norm()) if self.shape and REPLACEMENTS["weight"] not in self.parts else 0.0
        # |up @ down|^2 is the sum of the products of two rank x rank matrices, so that no [out, in] is formed.
        down, up = (matrix.double().flatten(1) for matrix in self.pair)
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def delta(self, leaf: str = "weight", multiplier: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """The delta of one of the parameters in `shapes`, in its shape: float32, on `device`; without DoRA.

        New values have none: see `change`.
        """
        if DIFFERENCES[leaf] in self.parts:
            return multiplier * self.parts[DIFFERENCES[leaf]].to(device).float()
        parts = {part: tensor.to(device) for part, tensor in self.parts.items() if part not in DIFFERENCES.values()}
        return weight_delta(parts, multiplier * self.scale).reshape(self.shapes[leaf])

    def change(self, weight: Tensor, leaf: str = "weight", multiplier: float = 1.0) -> Tensor:
        """The change that merging makes to `weight`, one of the parameters in `shapes`: float32, on its device.

        Of DoRA and new values the multiplier takes that share of the way, as ComfyUI does for DoRA.
        """
        if (new := self.parts.get(REPLACEMENTS[leaf])) is not None:
            return multiplier * (new.to(weight.device).float() - weight.float())
        if leaf != "weight" or DORA not in self.parts:
            return self.delta(leaf, multiplier, weight.device)
        changed = weight.float() + self.delta(device=weight.device)
        return multiplier * (decomposed(changed, self.parts[DORA].to(weight.device)) - weight.float())


def rank_metadata(ranks: Collection[int], alphas: Collection[float]) -> dict[str, str]:
    """`network_dim` and `network_alpha` of a file whose modules have these; kohya's word for several is Dynamic."""
    return {
        key: str(next(iter(values))) if len(values) == 1 else "Dynamic"
        for key, values in (("network_dim", ranks), ("network_alpha", alphas))
    }
