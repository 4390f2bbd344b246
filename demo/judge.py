"""How well an edited picture matches the truth: figures in dB and shares, and a rule that reads the clothes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from demo.drawing import Colour
from demo.world import COLOURS, UNIFORM_GREY, UNIFORM_NAVY, Scene

_NOTICEABLE = 8  # levels of 255: a smaller difference between start and truth is no edit
_BORDER = 3  # pixels around the edit that belong to neither region: what the VAE blurs into
_MIN_PIXELS = 6


@dataclass(frozen=True)
class Score:
    """One output. PSNR in dB, against the truth."""

    psnr: float
    edited_psnr: float  # where the truth differs from the start
    drift: float  # mean difference from the start elsewhere, share of the full range
    attribute: bool  # the blazer looks navy and what is below it grey


def score(scene: Scene, start: Tensor, truth: Tensor, output: Tensor) -> Score:
    """scene: that of the start picture, for its light. Pictures [3, height, width] uint8."""
    edited = (truth.int() - start.int()).abs().amax(0) > _NOTICEABLE
    near = torch.nn.functional.max_pool2d(edited[None].float(), 2 * _BORDER + 1, stride=1, padding=_BORDER)[0] > 0
    drift = (output.float() - start.float()).abs()[:, ~near].mean() / 255
    return Score(
        psnr=psnr(output, truth),
        edited_psnr=psnr(output[:, edited], truth[:, edited]),
        drift=float(drift),
        attribute=wears_uniform(scene.light, edited, truth, output),
    )


def psnr(one: Tensor, other: Tensor) -> float:
    """dB, of uint8 pictures of any shape"""
    error = (one.double() - other.double()).square().mean().clamp(min=1e-3)
    return float(10 * torch.log10(255**2 / error))


def wears_uniform(light: Colour, edited: Tensor, truth: Tensor, output: Tensor) -> bool:
    """Whether the mean colour of the output, over the blazer of the truth and over what is below it, is nearest to the
    uniform's among all colours of clothes, in this light. edited: [height, width] bool.
    """
    names = [*COLOURS, "navy", "grey"]
    palette = torch.tensor([*COLOURS.values(), UNIFORM_NAVY, UNIFORM_GREY]) * torch.tensor(light) * 255

    def nearest(pixels: Tensor) -> Tensor:
        """[..., 3] -> index of the palette's nearest colour"""
        return torch.cdist(pixels.float().reshape(-1, 3), palette).argmin(1)

    truth, output = truth.movedim(0, -1), output.movedim(0, -1)
    inside = nearest(truth[edited])
    for name in ("navy", "grey"):
        region = inside == names.index(name)
        if region.sum() >= _MIN_PIXELS:
            seen = output[edited][region].float().mean(0)
            if names[int(nearest(seen))] != name:
                return False
    return True
