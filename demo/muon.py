"""Muon: momentum whose direction is made orthogonal, for weight matrices (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). torch's own asks the GPU for numbers in every step, which no CUDA graph can record.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

_MOMENTUM, _ITERATIONS = 0.95, 5
_COEFFICIENTS = 3.4445, -4.775, 2.0315  # of the odd polynomial that moves singular values towards 1
_ADAMS_SPREAD = 0.2  # root mean square of Adam's usual updates (arXiv 2502.16982): the same learning rates serve both


class Muon:
    """Matrices of a shape are updated together. rate: a tensor without dimensions, read in each step."""

    def __init__(self, matrices: list[nn.Parameter], rate: Tensor, weight_decay: float) -> None:
        self.rate, self.weight_decay = rate, weight_decay
        groups = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self.groups = [(group, torch.zeros_like(torch.stack(list(group)))) for group in groups.values()]

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients that the matrices have."""
        for group, momentum in self.groups:
            gradients = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradients, 1 - _MOMENTUM)
            updates = orthogonal(gradients.lerp(momentum, _MOMENTUM)).float()
            updates *= _ADAMS_SPREAD * math.sqrt(max(group[0].shape))
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - self.rate * self.weight_decay).sub_(update * self.rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> bfloat16 matrices with the same singular vectors and singular values near 1."""
    x = matrices.bfloat16()
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        squared = x @ x.mT
        x = a * x + (b * squared + c * squared @ squared) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
