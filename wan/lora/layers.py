"""Linear layers of frozen weights with a trainable LoRA, LoHa or LoKr beside them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.lora.module import LORA, add_delta, weight_delta
from wan.lora.options import NetworkConfig
from wan.lora.product import lora_products
from wan.memory.recompute import StochasticLayer
from wan.memory.sharding import full_tensor


class AdaptedLinear(StochasticLayer):
    """A frozen linear layer, here called base, and what training adds to its weight.

    In train mode the addition is computed beside the base; in eval mode it is merged into the weight for each call, so
    that an image made during training is bit for bit the one that the saved file makes. The base is an nn.Linear or
    anything with its attributes, e.g. one that dequantises `weight` when asked.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, config: NetworkConfig):
        super().__init__()
        self.base = base
        self.rank, self.alpha = rank, alpha
        self.rank_dropout, self.module_dropout = config.extra.rank_dropout, config.extra.module_dropout
        self.is_stochastic = bool(self.rank_dropout or self.module_dropout)  # random numbers, in train mode
        self.enabled = True

    @property
    def scale(self) -> float:
        """The factor of the product of the trained matrices."""
        return self.alpha / self.rank

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained matrices, float32, by their name in a file; the delta is linear in each of them."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]: x times the delta of the weight, as it is added to the output in train mode."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The delta of the weight: [out, in] float32."""
        return weight_delta(self.trained, self.scale)

    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta()`, a scalar tensor."""
        whole = {name: full_tensor(tensor) for name, tensor in self.trained.items()}
        norm: Tensor = weight_delta(whole, self.scale).norm()
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype that the base returns."""
        if not self.enabled:
            plain: Tensor = self.base(x)
            return plain
        if not self.training:
            return F.linear(x, add_delta(self.base.weight, self.delta()), self.base.bias)
        result: Tensor = self.base(x)
        branch = self.branch(x)
        if self.module_dropout:
            # Times 0 instead of left out: every parameter gets a gradient in every process, and nothing is recompiled.
            branch = branch * (torch.rand((), device=x.device) >= self.module_dropout)
        return result + branch.to(result.dtype)


class LoRALinear(AdaptedLinear):
    """LoRA (arXiv 2106.09685): the delta is alpha / rank * up @ down; down [rank, in], up [out, rank]."""

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        config: NetworkConfig,
        device: torch.device,
        generator: torch.Generator | None,
    ):
        super().__init__(base, rank, alpha, config)
        inputs, outputs = base.in_features, base.out_features
        self.lora_down = _empty_linear(inputs, rank, device)
        self.lora_up = _empty_linear(rank, outputs, device)
        # Kaiming uniform with a = sqrt(5) is this bound; drawn on the CPU, so that a seed means the same on any device.
        bound = 1 / math.sqrt(inputs)
        initial = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_down.weight.copy_(initial)
            self.lora_up.weight.zero_()
        self.dropout = config.network_dropout or 0.0
        self.is_stochastic = self.is_stochastic or self.dropout > 0

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in LORA}

    @property
    def uses_product_kernel(self) -> bool:
        """True when `lora_products` can replace `forward`: enabled, in train mode, without dropout."""
        return self.enabled and self.training and not self.is_stochastic

    def forward(self, x: Tensor) -> Tensor:
        return lora_products(x, [self])[0] if self.uses_product_kernel else super().forward(x)

    def branch(self, x: Tensor) -> Tensor:
        low = F.dropout(F.linear(x, self.lora_down.weight.to(x.dtype)), self.dropout)
        if self.rank_dropout:
            # Whole ranks of an item, the rest times 1 / (1 - p).
            kept = torch.ones(len(x), *[1] * (x.ndim - 2), self.rank, device=x.device, dtype=x.dtype)
            low = low * F.dropout(kept, self.rank_dropout)
        return F.linear(low, self.lora_up.weight.to(x.dtype)) * self.scale

    def delta_norm(self) -> Tensor:
        # |up @ down|^2 is the sum of the products of two rank x rank matrices, so that no [out, in] is formed.
        down, up = (full_tensor(tensor).float() for tensor in self.trained.values())
        return self.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def _empty_linear(inputs: int, outputs: int, device: torch.device) -> nn.Linear:
    """A float32 linear layer without bias, whose weight is still to be filled."""
    return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.float32).to_empty(device=device)


class LycorisLinear(AdaptedLinear):
    """LoHa or LoKr; the package lycoris-lora makes the matrices and computes the product in train mode."""

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        config: NetworkConfig,
        device: torch.device,
        generator: torch.Generator | None,
    ):
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule

        extra = config.extra
        options = {
            "factor": extra.factor,
            "decompose_both": extra.decompose_both,
            "full_matrix": extra.full_matrix,
            "unbalanced_factorization": extra.unbalanced_factorization,
        }
        # It reads nothing but sizes from its layer, so it gets one without weights: no copy, no guess about its kind.
        sizes = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        seed = int(torch.randint(1 << 62, (), generator=generator, device="cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if config.kind == "loha":
                adapter = LohaModule("", sizes, lora_dim=rank, alpha=alpha)
            else:
                adapter = LokrModule("", sizes, lora_dim=rank, alpha=alpha, **options)
        super().__init__(base, rank, adapter.scale * rank, config)
        self.adapter = adapter.to(device)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.adapter.named_parameters())

    def branch(self, x: Tensor) -> Tensor:
        result: Tensor = self.adapter.bypass_forward_diff(x)
        if self.rank_dropout:
            kept = torch.ones(result.shape[-1], device=x.device, dtype=result.dtype)
            result = result * F.dropout(kept, self.rank_dropout)
        return result
