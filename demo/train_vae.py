"""Training of the miniature VAE on the clips of the world."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo import miniature
from demo.optimise import optimise
from demo.recordings import Recordings, as_video
from wan.fused.vae import norms_before_silu
from wan.nets.vae import (
    VAE_MEAN,
    VAE_STD,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    FrameAttention,
    ResidualBlock,
    Upsample,
    WanVAE,
)

LATENT_NOISE = 0.08  # share of the latents' spread that the decoder must bear: what a DiT leaves behind


def new_vae() -> WanVAE:
    """Weights drawn so that the signal passes: residual branches start at zero, convolutions see one frame only.

    With torch's own initialisation a narrow VAE stands still for a long time (measured: 16.2 dB against 21.8 dB after
    150 seconds of training on a CPU).
    """
    vae = WanVAE(miniature.VAE_DIM)
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv3d | nn.Conv2d):
            nn.init.zeros_(layer.bias)
            if isinstance(layer, nn.Conv3d) and "time_conv" not in name:
                spatial = layer.weight.data[:, :, -1]  # the present frame
                layer.weight.data[:, :, :-1] = 0
                nn.init.orthogonal_(spatial) if spatial.shape[-1] == 1 else nn.init.kaiming_normal_(spatial)
        if isinstance(layer, ResidualBlock):
            nn.init.zeros_(layer.residual[6].weight)
        elif isinstance(layer, FrameAttention):
            nn.init.zeros_(layer.proj.weight)
        elif isinstance(layer, Downsample | Upsample):
            nn.init.kaiming_normal_(layer.resample[1].weight, nonlinearity="linear")
    for layer in (vae.encoder.conv1, vae.encoder.head[2], vae.decoder.conv1, vae.decoder.head[2]):
        nn.init.kaiming_normal_(layer.weight.data[:, :, -1], nonlinearity="linear")
    return vae


@dataclass(frozen=True)
class VAEStage:
    """Steps on stills only, then steps on stills and clips in turn."""

    still_steps: int
    clip_steps: int
    peak: float  # learning rate
    square: float  # weight of the squared error beside the absolute one
    batch: int  # stills; of clips a quarter


def train_vae(vae: WanVAE, sets: list[Recordings], stage: VAEStage) -> None:
    """Train on pixels, and at last give the latents the official statistics. Noise on the latents, so that the decoder
    bears what a DiT leaves behind.

    Each latent frame after the first must also decode alone, to the last of its four frames: one-frame inference
    decodes single latent frames, and the published VAE can do it. Colours are swapped and dimmed at random, so that
    clothes in colours that the world does not have come back as well.
    """
    device = next(vae.parameters()).device
    hasten_(vae, kernels=device.type == "cuda")
    chooser = torch.Generator().manual_seed(1)

    def batch_of(step: int) -> tuple[Hashable, tuple[Tensor, ...]]:
        part = step % len(sets)
        is_clip = step >= stage.still_steps and step // len(sets) % 2 == 1
        frames, count = sets[part].frames, stage.batch // 4 if is_clip else stage.batch
        rows = torch.randint(len(frames), (count,), generator=chooser).to(device)
        if is_clip:
            shown = frames[rows, :: 1 + step // len(sets) // 2 % 2][:, :5]
        else:
            shown = frames[rows, torch.randint(frames.shape[1], (count,), generator=chooser).to(device)][:, None]
        return (part, is_clip), (recoloured(as_video(shown), chooser),)

    def loss_of(kind: tuple[int, bool], video: Tensor) -> Tensor:
        video = video.contiguous(memory_format=torch.channels_last_3d)  # convolutions are faster in it
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = vae.conv1(vae.encoder(video)).chunk(2, dim=1)[0].float()  # not normalised: the loss bears any
            spread = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
            noisy = latents + LATENT_NOISE * spread * torch.randn_like(latents)
            loss = pixel_loss(decode(vae, noisy), video)
            if kind[1]:
                loss = loss + 0.5 * pixel_loss(decode(vae, noisy[:, :, 1:]), video[:, :, -1:])
        return loss + 1e-4 * latents.square().mean()

    def pixel_loss(output: Tensor, video: Tensor) -> Tensor:
        return F.l1_loss(output, video) + stage.square * F.mse_loss(output, video)

    vae.train().requires_grad_(True)
    optimise(list(vae.parameters()), stage.still_steps + stage.clip_steps, stage.peak, batch_of, loss_of, "vae")
    vae.eval().requires_grad_(False)
    sample = [latents_of(vae, part.frames[:200, :5]).transpose(0, 1).flatten(1) for part in sets]
    normalise_latents_(vae, torch.cat(sample, dim=1))


def hasten_(vae: WanVAE, kernels: bool) -> None:
    """Convolutions in 2-D; with `kernels` normalisation and activation as one Triton kernel. For training only."""
    for layer in vae.modules():
        if isinstance(layer, CausalConv3d):
            layer.forward = partial(convolve_in_2d, layer)
    if kernels:
        from demo.kernels import normalised_silu

        for norm, activation in norms_before_silu(vae):
            norm.forward = partial(normalise_and_activate, normalised_silu, norm)
            activation.forward = _unchanged


def normalise_and_activate(compute: Callable[[Tensor, Tensor], Tensor], norm: ChannelNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) of [B, C, T, H, W], by `compute` on rows of C numbers"""
    rows = x.movedim(1, -1)
    return compute(rows.reshape(-1, rows.shape[-1]), norm.gamma.flatten()).view(rows.shape).movedim(-1, 1)


def _unchanged(x: Tensor) -> Tensor:
    return x


def convolve_in_2d(layer: CausalConv3d, x: Tensor) -> Tensor:
    """Output of `layer`, with the frames that its kernel sees as more channels: cuDNN is much faster in 2-D."""
    if x.ndim == 4:
        return CausalConv3d.forward(layer, x)
    taps, frames = layer.kernel_size[0], x.shape[2]
    if frames == 1:
        return CausalConv3d.forward(layer, x[:, :, 0])[:, :, None]
    padded = F.pad(x, (0, 0, 0, 0, taps - 1, 0))
    seen = torch.cat([padded[:, :, i : i + frames] for i in range(taps)], dim=1).transpose(1, 2)
    weight = layer.weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(seen.flatten(0, 1), weight, layer.bias, padding=layer.padding[1:])
    return out.unflatten(0, seen.shape[:2]).transpose(1, 2)


def recoloured(video: Tensor, chooser: torch.Generator) -> Tensor:
    """Half of the clips with their colour channels in another order, each channel between 60 % and 100 % as bright."""
    count = len(video)
    orders = torch.rand(count, 3, generator=chooser).argsort(dim=1)
    orders[torch.rand(count, generator=chooser) < 0.5] = torch.arange(3)
    gains = 1 - 0.4 * torch.rand(count, 3, generator=chooser) * (torch.rand(count, 1, generator=chooser) < 0.5)
    index = orders.to(video.device).view(count, 3, 1, 1, 1).expand_as(video)
    return (video.gather(1, index) + 1) * gains.to(video.device).view(count, 3, 1, 1, 1) - 1


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Latents as the VAE's last encoding layer gives them -> pixels, not clamped: that has no gradient outside."""
    return vae.decoder(vae.conv2(latents)).float()


@torch.no_grad()
def latents_of(vae: WanVAE, frames: Tensor) -> Tensor:
    """[N, T, 3, height, width] uint8 -> [N, 16, F, H, W] float32, in portions"""
    return torch.cat([vae.encode(as_video(part)) for part in frames.split(32)])


@torch.no_grad()
def normalise_latents_(vae: WanVAE, latents: Tensor) -> None:
    """Make each channel of the normalised latents have mean 0 and spread 1, by changing conv1 and, inversely, conv2.

    latents: [16, L], of the VAE as it is.
    """
    mean, std = latents.mean(dim=1), latents.std(dim=1)
    official_mean, official_std = (torch.tensor(values, device=mean.device) for values in (VAE_MEAN, VAE_STD))
    # raw = official_std * z + official_mean, wanted: official_std * (z - mean) / std + official_mean
    factor, offset = 1 / std, official_mean - (official_std * mean + official_mean) / std
    channels = len(factor)
    vae.conv1.weight[:channels] *= factor.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:channels] = vae.conv1.bias[:channels] * factor + offset
    vae.conv2.bias -= vae.conv2.weight[:, :, 0, 0, 0] @ (offset * std)
    vae.conv2.weight *= std.view(1, -1, 1, 1, 1)
