"""The Wan2.1 VAE: images and short videos to latents and back. Module names are those of the official checkpoint.

Frames are processed all at once instead of in the official chunks of four with cached borders; the result is the same,
because every convolution over time sees only the past, with zeros before the first frame. The first frame is its own
group: it passes the temporal down- and upsampling unchanged, which the frames after it share four to a latent.

A single frame goes through as [B, C, H, W], by convolutions in two dimensions: of the kernel of a convolution over
time only the last slice meets it.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from utils.errors import ConfigError
from wan.nets.spec import LATENT_CHANNELS, TIME_STRIDE, VAE_STRIDE

# Per-channel statistics of the latents (official wan/modules/vae.py).
# fmt: off
VAE_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
VAE_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


def vae_base_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The `base_dim` of a checkpoint, from the shapes of its official keys. ConfigError when it is no Wan2.1 VAE."""
    latent = tuple(shapes.get("conv2.weight", ()))
    if len(shapes.get("encoder.conv1.weight", ())) != 5 or latent != (LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1):
        raise ConfigError("not a Wan2.1 VAE in the original layout; use Wan2.1_VAE.pth")
    return shapes["encoder.conv1.weight"][0]


class CausalConv3d(nn.Conv3d):
    """Convolution that sees the present and past frames; time starts with zeros, space is padded to keep its size."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W], or both without T"""
        if x.ndim == 4:
            return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self.padding[1:])
        return super().forward(F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """L2 normalisation of [B, C, ...] over the channels, times sqrt(C) and a gain of C numbers."""
    return F.normalize(x, dim=1) * gamma.shape[0] ** 0.5 * gamma.view(-1, *[1] * (x.ndim - 2))


class ChannelNorm(nn.Module):
    """`channel_norm` with a trained gain. `axes`: how many follow the channel axis.

    operation: computes it; another may take the place of the plain one, which is `channel_norm`.
    """

    operation: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
        self.operation = channel_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.gamma)


class SiLU(nn.SiLU):
    """SiLU. operation: computes it; another may take the place of the plain one, which is `F.silu`."""

    operation: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.operation = F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


def _per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2-D layer to each frame of [B, C, T, H, W], or to the single one of [B, C, H, W]."""
    if x.ndim == 4:
        return layer(x)
    frames = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_dim),
            SiLU(),
            CausalConv3d(in_dim, out_dim),
            ChannelNorm(out_dim),
            SiLU(),
            nn.Identity(),  # the place of the official dropout of 0, which the numbering of the keys counts
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else CausalConv3d(in_dim, out_dim, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


def attend(qkv: Tensor) -> Tensor:
    """Single-head self-attention: q, k and v, [N, L, 3 C] side by side -> [N, L, C]."""
    q, k, v = qkv[:, None].chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v)[:, 0]


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame, with a residual.

    operation: computes it; another may take the place of the plain one, which is `attend`.
    """

    operation: Callable[[Tensor], Tensor]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.operation = attend
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + _per_frame(self._attend, x)

    def _attend(self, frames: Tensor) -> Tensor:
        """[B * T, C, H, W] -> the same"""
        out = self.operation(rearrange(self.to_qkv(self.norm(frames)), "b c h w -> b (h w) c"))
        return self.proj(rearrange(out, "b (h w) c -> b c h w", h=frames.shape[2]))


class Downsample(nn.Module):
    """Halves height and width and, when `temporal`, the number of frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        x = _per_frame(self.resample, x)
        if self.time_conv is None or x.ndim == 4 or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, when `temporal`, doubles the frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        double = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
        self.resample = nn.Sequential(double, nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.ndim == 5 and x.shape[2] > 1:
            pairs = rearrange(self.time_conv(x[:, :, 1:]), "b (pair c) t h w -> b c (t pair) h w", pair=2)
            x = torch.cat([x[:, :, :1], pairs], dim=2)
        return _per_frame(self.resample, x)


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(dim), SiLU(), CausalConv3d(dim, out_dim))


def _encoder(dim: int) -> nn.Sequential:
    levels: list[nn.Module] = []
    for level, (width_in, width) in enumerate(pairwise((dim, dim, 2 * dim, 4 * dim, 4 * dim))):
        levels += [ResidualBlock(width_in, width), ResidualBlock(width, width)]
        if level < 3:
            levels.append(Downsample(width, temporal=level > 0))
    stages = {"conv1": CausalConv3d(3, dim), "downsamples": nn.Sequential(*levels)}
    stages |= {"middle": _middle(4 * dim), "head": _head(4 * dim, 2 * LATENT_CHANNELS)}
    return nn.Sequential(OrderedDict(stages))


def _decoder(dim: int) -> nn.Sequential:
    levels: list[nn.Module] = []
    for level, (width_in, width) in enumerate([(4 * dim, 4 * dim), (2 * dim, 4 * dim), (2 * dim, 2 * dim), (dim, dim)]):
        levels += [ResidualBlock(width_in, width), ResidualBlock(width, width), ResidualBlock(width, width)]
        if level < 3:
            levels.append(Upsample(width, temporal=level < 2))
    stages = {"conv1": CausalConv3d(LATENT_CHANNELS, 4 * dim), "middle": _middle(4 * dim)}
    stages |= {"upsamples": nn.Sequential(*levels), "head": _head(dim, 3)}
    return nn.Sequential(OrderedDict(stages))


class WanVAE(nn.Module):
    """Deterministic encoder (the mean of the posterior) and decoder. `base_dim`: channels at full resolution."""

    def __init__(self, base_dim: int = 96) -> None:
        super().__init__()
        self.encoder = _encoder(base_dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = _decoder(base_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, T, 8 H, 8 W] in [-1, 1], T = 1 + 4 n. Returns normalised latents [B, 16, 1 + n, H, W] float32.

        Computed in the dtype of the weights. ValueError for other sizes.
        """
        frames, height, width = pixels.shape[2:]
        if frames % TIME_STRIDE != 1:
            raise ValueError(f"{frames} frames; the VAE takes 1 or 1 + a multiple of {TIME_STRIDE}")
        if height % VAE_STRIDE or width % VAE_STRIDE:
            raise ValueError(f"frames of {height} x {width} pixels; both sides must be multiples of {VAE_STRIDE}")
        pixels = pixels.to(self.dtype)
        moments = self.conv1(self.encoder(pixels if frames > 1 else pixels[:, :, 0])).float()
        mean, _log_variance = (moments if frames > 1 else moments[:, :, None]).chunk(2, dim=1)
        return (mean - _per_channel(VAE_MEAN, mean)) / _per_channel(VAE_STD, mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 16, 1 + n, H, W] -> pixels [B, 3, 1 + 4 n, 8 H, 8 W] float32, clamped to [-1, 1]."""
        latents = latents.float()
        latents = latents * _per_channel(VAE_STD, latents) + _per_channel(VAE_MEAN, latents)
        latents, frames = latents.to(self.dtype), latents.shape[2]
        pixels = self.decoder(self.conv2(latents if frames > 1 else latents[:, :, 0])).float().clamp(-1, 1)
        return pixels if frames > 1 else pixels[:, :, None]


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    """16 numbers -> [16, 1, 1, 1] on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)
