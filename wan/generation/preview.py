"""A rough picture of latents at once: the linear map from their 16 numbers to RGB that fits the VAE at hand best."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.files import written_whole
from utils.images import from_pixels
from utils.options import Section, option
from wan.nets.spec import VAE_STRIDE

log = logging.getLogger(__name__)

_SIDE = 128  # pixels of a synthetic image
_ROUNDING = 1e-4  # of the largest difference, see `LatentPreview.fit`


@dataclass(frozen=True)
class PreviewConfig(Section):
    """preview"""

    preview: int | None = option(
        None, help="while a picture is made, write a rough <name>_preview.png of it after every n steps", minimum=1
    )


@dataclass(frozen=True)
class LatentPreview:
    """RGB in [-1, 1] of a latent pixel: weight @ latent + bias, the mean colour of the pixels that it stands for."""

    weight: Tensor  # [3, 16] float32
    bias: Tensor  # [3]

    @classmethod
    def fit(cls, pixels: Sequence[Tensor], latents: Sequence[Tensor]) -> "LatentPreview":
        """Least-squares fit over all latent pixels. pixels: [3, 8 H, 8 W] in [-1, 1]; latents: [16, 1, H, W] each."""
        means = torch.cat([F.avg_pool2d(image.double().cpu(), VAE_STRIDE).flatten(1).T for image in pixels])
        values = torch.cat([latent.double().cpu().flatten(1).T for latent in latents])
        values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        # Directions in which the latents differ by nothing but rounding are left out: they would get enormous weights.
        solution = torch.linalg.lstsq(values, means, rcond=_ROUNDING, driver="gelsd").solution.T.float()
        return cls(solution[:, :-1], solution[:, -1])

    def image(self, latents: Tensor) -> Image.Image:
        """Normalised latents [16, n, H, W] -> a picture of the last frame, 8 W x 8 H pixels."""
        frame = latents[:, -1].float().cpu()
        small = torch.einsum("rc,chw->rhw", self.weight, frame) + self.bias[:, None, None]
        image = from_pixels(small)
        return image.resize((image.width * VAE_STRIDE, image.height * VAE_STRIDE), Image.Resampling.BICUBIC)

    def save(self, latents: Tensor, path: Path) -> None:
        """Write the picture as PNG in place of the one that is there, so that a viewer never sees half of it."""
        with written_whole(path, durable=False) as temporary:
            self.image(latents).save(temporary)

    def save_each(self, steps: int, path: Path, step: int, latents: Tensor) -> None:
        """Save every `steps`-th step; call it after each step (counted from 0). One that can't be written is logged."""
        if (step + 1) % steps == 0:
            try:
                self.save(latents, path)
            except OSError as error:
                log.warning("preview %s could not be written (%s)", path, error.strerror)


def synthetic_images() -> list[Tensor]:
    """[3, 128, 128] in [-1, 1] each, always the same: fields of all colours, from plain to finely patterned."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for cells in (1, 2, 4, 8, 16, 32):
        colours = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        images.append(F.interpolate(colours, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)[0])
    return images
