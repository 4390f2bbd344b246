"""How well an edited picture matches the truth: figures in dB and shares, and a rule that reads the backdrop."""

from dataclasses import dataclass

import torch
from torch import Tensor

_NOTICEABLE = 8  # levels of 255: a smaller difference between start and truth is no edit
_BORDER = 3  # pixels around the edit that belong to neither region: what the VAE blurs into
_SAME_COLOUR = 0.15  # distance in RGB of 0..1; half of that between neighbours among the world's colours
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Score:
    """One output. PSNR in dB, against the truth."""

    psnr: float
    edited_psnr: float  # where the truth differs from the start
    drift: float  # mean difference from the start elsewhere, share of the full range
    attribute: bool  # the backdrop is that of a school photo


def score(start: Tensor, truth: Tensor, output: Tensor) -> Score:
    """Pictures [3, height, width] uint8."""
    edited = (truth.int() - start.int()).abs().amax(0) > _NOTICEABLE
    near = torch.nn.functional.max_pool2d(edited[None].float(), 2 * _BORDER + 1, stride=1, padding=_BORDER)[0] > 0
    drift = (output.float() - start.float()).abs()[:, ~near].mean() / 255
    return Score(
        psnr=psnr(output, truth),
        edited_psnr=psnr(output[:, edited], truth[:, edited]),
        drift=float(drift),
        attribute=has_backdrop(truth, output, edited),
    )


def psnr(one: Tensor, other: Tensor) -> float:
    """dB, of uint8 pictures of any shape"""
    error = (one.double() - other.double()).square().mean().clamp(min=1e-3)
    return float(10 * torch.log10(255**2 / error))


def has_backdrop(truth: Tensor, output: Tensor, edited: Tensor) -> bool:
    """Whether nearly all of what the edit changes has the backdrop's colour. edited: [height, width] bool."""
    distance = (output.float() - truth.float()).div(255).norm(dim=0)
    return bool((distance[edited] < _SAME_COLOUR).float().mean() >= _NEARLY_ALL)
