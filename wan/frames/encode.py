"""Images to what the DiT is conditioned on. Caching and generation both call these, so their results are equal bits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from utils.images import as_pixels, resize_to_fill, to_levels
from wan.nets.clip import encode_inputs, preprocess
from wan.nets.spec import VAE_STRIDE
from wan.nets.vae import WanVAE

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import CLIPVisionModel


def frame_levels(image: Image.Image, size: tuple[int, int], crop_only: bool = False) -> Tensor:
    """An RGB image resized and cropped to a frame of `size` (width, height): [3, height, width] uint8.

    A quarter of the bytes of `frame_pixels`, to be kept and sent to a GPU.
    """
    return to_levels(resize_to_fill(np.asarray(image), size, crop_only))


def frame_pixels(image: Image.Image, size: tuple[int, int], crop_only: bool = False) -> Tensor:
    """An RGB image resized and cropped to a frame of `size` (width, height): [3, height, width] float32 in [-1, 1]."""
    return as_pixels(frame_levels(image, size, crop_only))


@torch.no_grad()
def encode_images(vae: WanVAE, pixels: Tensor) -> Tensor:
    """[B, 3, 8 H, 8 W], uint8 or in [-1, 1] -> [B, 16, 1, H, W] normalised latents in the VAE's dtype, as cached."""
    frames = as_pixels(pixels.to(_device(vae)))[:, :, None]  # videos of one frame
    return _by_batch(vae.encode, frames).to(vae.dtype)


def encode_frames(vae: WanVAE, frames: Sequence[Tensor]) -> list[Tensor]:
    """Pixels [3, 8 h, 8 w] each, uint8 or in [-1, 1] -> latents [16, 1, h, w] each; equal sizes make one batch."""
    latents: dict[int, Tensor] = {}
    for shape in dict.fromkeys(frame.shape for frame in frames):
        numbers = [number for number, frame in enumerate(frames) if frame.shape == shape]
        encoded = encode_images(vae, torch.stack([frames[number] for number in numbers]))
        latents |= dict(zip(numbers, encoded, strict=True))
    return [latents[number] for number in range(len(frames))]


@torch.no_grad()
def encode_video(vae: WanVAE, pixels: Tensor) -> Tensor:
    """[3, 1 + 4 n, 8 H, 8 W] in [-1, 1] -> [16, 1 + n, H, W] normalised latents in the VAE's dtype."""
    return vae.encode(pixels[None].to(_device(vae)))[0].to(vae.dtype)


def latent_mask(mask: Image.Image, size: tuple[int, int], crop_only: bool = False) -> Tensor:
    """Grey image -> [H, W] float32 in 0..1, the means over the pixels of a latent; brought to `size` like its image."""
    levels = frame_pixels(mask.convert("RGB"), size, crop_only)[0]
    return (F.avg_pool2d(levels[None], VAE_STRIDE)[0] + 1) / 2


def encode_blank(vae: WanVAE, width: int, height: int) -> Tensor:
    """Latent [16, 1, H, W] of the constant image that stands for the frame to generate; sizes in pixels.

    Zeros in [-1, 1], mid-grey (docs/formats.md#condition).
    """
    return encode_images(vae, torch.zeros(1, 3, height, width))[0]


@torch.no_grad()
def encode_clip(clip: "CLIPVisionModel", images: Sequence[Tensor]) -> Tensor:
    """[3, height, width] each, uint8 or in [-1, 1], whole uncropped images -> CLIP features [n, 257, D] in its dtype.

    The official code shows CLIP the whole image; musubi-tuner's caches hold features of cropped ones.
    """
    device = _device(clip)
    inputs = torch.cat([preprocess(as_pixels(image[None].to(device))) for image in images])
    return _by_batch(partial(encode_inputs, clip), inputs)


def _by_batch(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """encode(inputs), on a GPU all together.

    On a CPU, where a batch is no faster, one by one: there the rounding depends on the size of the batch (1e-7 in
    float32), and a cached image shall equal the same image at generation in every bit.
    """
    batches = torch.split(inputs, 1) if inputs.device.type == "cpu" else [inputs]
    return torch.cat([encode(batch) for batch in batches])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
