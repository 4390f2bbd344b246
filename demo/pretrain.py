"""Train the miniature family from nothing, on one GPU:

    python -m demo.pretrain --out demo/miniature

--steps: of the VAE on stills and on clips, of i2v (with T5) and of flf2v. A model with 0 steps is read from --out. The
seeds are fixed: the same kind of GPU with the same versions gives the same weights up to the order of its sums.
"""

import argparse
import math
import time
from collections.abc import Callable, Hashable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from demo import miniature
from demo.optimise import optimise
from demo.recordings import Recordings, as_video, given_frames, record, video_mask
from wan.checkpoint import load_clip, load_dit, load_t5, load_vae
from wan.clip import encode_image
from wan.dit import WanDiT
from wan.timesteps import add_noise, network_timestep, shifted, velocity_target
from wan.vae import (
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

HELD_OUT_SEED, HELD_OUT_CLIPS, SEED = 900_000_000, 60, 200_000_000
TEXT_LENGTH_IN_TRAINING = 48  # the longest caption has fewer words
LATENT_NOISE = 0.08  # share of the latents' spread that the decoder must bear: what a DiT leaves behind
STEPS = (12_000, 4_000, 20_000, 8_000)  # VAE on stills, on clips, i2v, flf2v
VAE_RATE, DIT_RATE = 2.5e-3, 1.5e-3
TEXT_DROPOUT = 0.1
NOISE_SHIFT = 2.0


# --- VAE -------------------------------------------------------------------------------------------------------------


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


def train_vae(vae: WanVAE, sets: list[Recordings], still_steps: int, clip_steps: int, batch: int) -> None:
    """First stills only, then stills and clips in turn; at last the latents get the official statistics. L1 and L2 on
    pixels, noise on latents, so that the decoder bears what a DiT leaves behind.

    Each latent frame after the first must also decode alone, to the last of its four frames: one-frame inference
    decodes single latent frames, and the published VAE can do it. Colours are swapped and dimmed at random, so that
    clothes in colours that the world does not have come back as well.
    """
    device = next(vae.parameters()).device
    hasten_(vae, kernels=device.type == "cuda")
    chooser = torch.Generator().manual_seed(1)

    def batch_of(step: int) -> tuple[Hashable, tuple[Tensor, ...]]:
        part = step % len(sets)
        is_clip = step >= still_steps and step // len(sets) % 2 == 1
        frames, count = sets[part].frames, batch // 4 if is_clip else batch
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
            loss = _pixel_loss(decode(vae, noisy), video)
            if kind[1]:
                loss = loss + 0.5 * _pixel_loss(decode(vae, noisy[:, :, 1:]), video[:, :, -1:])
        return loss + 1e-4 * latents.square().mean()

    vae.train().requires_grad_(True)
    optimise(list(vae.parameters()), still_steps + clip_steps, VAE_RATE, batch_of, loss_of, "vae")
    vae.eval().requires_grad_(False)
    sample = [latents_of(vae, part.frames[:200, :5]).transpose(0, 1).flatten(1) for part in sets]
    normalise_latents_(vae, torch.cat(sample, dim=1))


def hasten_(vae: WanVAE, kernels: bool) -> None:
    """Convolutions in 2-D; with `kernels` normalisation and activation as one Triton kernel. For training only."""
    if kernels:
        from demo.kernels import normalised_silu
    for layer in vae.modules():
        if isinstance(layer, CausalConv3d):
            layer.forward = partial(convolve_in_2d, layer)
        if kernels and isinstance(layer, nn.Sequential):
            for norm, activation in pairwise(layer):
                if isinstance(norm, ChannelNorm) and isinstance(activation, nn.SiLU):
                    norm.forward = partial(normalise_and_activate, normalised_silu, norm)
                    activation.forward = _unchanged


def normalise_and_activate(compute: Callable[[Tensor, Tensor], Tensor], norm: ChannelNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) of [B, C, T, H, W], by `compute` on rows of C numbers"""
    rows = x.movedim(1, -1)
    return compute(rows.reshape(-1, rows.shape[-1]), norm.gamma.flatten()).view(rows.shape).movedim(-1, 1)


def _unchanged(x: Tensor) -> Tensor:
    return x


def convolve_in_2d(layer: CausalConv3d, x: Tensor) -> Tensor:
    """What `layer` computes, with the frames that its kernel sees as more channels: cuDNN is much faster in 2-D."""
    taps, frames = layer.kernel_size[0], x.shape[2]
    if frames == 1:
        return CausalConv3d.forward(layer, x)
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


def _pixel_loss(output: Tensor, video: Tensor) -> Tensor:
    return F.l1_loss(output, video) + 2 * F.mse_loss(output, video)


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


# --- DiT -------------------------------------------------------------------------------------------------------------


class Lessons:
    """What a video model learns from, encoded once: latents, conditions, CLIP features and tokens of the clips."""

    def __init__(self, vae: WanVAE, clip: CLIPVisionModel, part: Recordings, last_frames: tuple[int, ...]) -> None:
        tokenizer = miniature.build_tokenizer()
        tokenizer.enable_padding(length=TEXT_LENGTH_IN_TRAINING)
        tokens = tokenizer.encode_batch(part.captions)
        device = part.frames.device
        self.tokens = torch.tensor([one.ids for one in tokens], device=device)
        self.mask = torch.tensor([one.attention_mask for one in tokens], device=device)
        latents, conditions, features = [], {last: [] for last in last_frames or (0,)}, []
        with torch.no_grad():
            for frames in part.frames.split(64):
                video = as_video(frames)
                latents.append(vae.encode(video).bfloat16())
                for last, made in conditions.items():
                    seen = video[:, :, : last + 1] if last else video
                    given = vae.encode(given_frames(seen, with_last=bool(last)))
                    made.append(torch.cat([video_mask(given, bool(last)), given], dim=1).bfloat16())
                pictures = [video[:, :, moment] for moment in (0, *last_frames)]
                features.append(torch.stack([encode_image(clip, one).bfloat16() for one in pictures], dim=1))
        self.latents = torch.cat(latents)  # [N, 16, 3, H, W]
        self.conditions = {last: torch.cat(made) for last, made in conditions.items()}  # [N, 20, F, H, W]
        self.features = torch.cat(features)  # [N, images, 257, D]
        self.last_frames = last_frames

    def batch(self, rows: Tensor, latent_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, condition and CLIP features of clips with 2 or 3 latent frames."""
        latents = self.latents[rows, :, :latent_frames]
        if not self.last_frames:
            return latents, self.conditions[0][rows, :, :latent_frames], self.features[rows, 0]
        last = 4 * (latent_frames - 1)
        ends = self.features[rows][:, [0, 1 + self.last_frames.index(last)]]
        return latents, self.conditions[last][rows], ends.flatten(1, 2)


def embed_text(t5: UMT5EncoderModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, L] -> [B, 512, D], zeros after the end, as `pad_text`"""
    scores = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min  # as T5 would make it, but in one go
    hidden = t5(input_ids=tokens, attention_mask=scores).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, 512 - hidden.shape[1]))


def train_dit(
    dit: WanDiT, t5: UMT5EncoderModel, lessons: list[Lessons], steps: int, peak: float, batch: int, text: bool
) -> None:
    """Flow matching on clips of 5 and of 9 frames. `text`: train T5 as well."""
    device = lessons[0].latents.device
    chooser = torch.Generator().manual_seed(2)
    dit.requires_grad_(True)
    t5.requires_grad_(text)
    sizes = torch.tensor([float(len(part.latents)) for part in lessons])

    def batch_of(step: int) -> tuple[Hashable, tuple[Tensor, ...]]:
        number, frames = int(torch.multinomial(sizes, 1, generator=chooser)), 2 if step % 2 else 3
        part = lessons[number]
        rows = torch.randint(len(part.latents), (batch,), generator=chooser).to(device)
        tokens, mask = part.tokens[rows], part.mask[rows]
        empty = (torch.rand(batch, generator=chooser) < TEXT_DROPOUT).to(device)
        tokens[empty], mask[empty] = 0, 0
        tokens[empty, 0], mask[empty, 0] = 1, 1  # </s> alone
        t = shifted(torch.sigmoid(1.2 * torch.randn(batch, generator=chooser)), NOISE_SHIFT).to(device)
        return (number, frames), (*part.batch(rows, frames), tokens, mask, t)

    def loss_of(
        _kind: Hashable, latents: Tensor, condition: Tensor, features: Tensor, tokens: Tensor, mask: Tensor, t: Tensor
    ) -> Tensor:
        noise = torch.randn(latents.shape, device=device)
        indices = torch.arange(latents.shape[2], device=device).expand(len(latents), -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            context = embed_text(t5, tokens, mask)
            noisy = add_noise(latents, noise, t)
            velocity = dit(noisy, condition.float(), network_timestep(t), context, features.float(), indices)
        return F.mse_loss(velocity.float(), velocity_target(latents, noise))

    parameters = [*dit.parameters(), *(t5.parameters() if text else ())]
    optimise(parameters, steps, peak, batch_of, loss_of, dit.spec.model_type)
    dit.requires_grad_(False)


def new_dit(kind: str, generator: torch.Generator) -> WanDiT:
    """Random weights; what opens and closes the residual stream starts at zero."""
    dit = WanDiT(miniature.dit_spec(kind))
    with torch.no_grad():
        for name, tensor in dit.named_parameters():
            if name.endswith("bias") or name.startswith("head.head") or "emb_pos" in name:
                tensor.zero_()
            elif name.endswith("modulation"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
            elif tensor.ndim > 1:
                spread = 0.02 if "time" in name else 1 / math.sqrt(math.prod(tensor.shape[1:]))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
            else:
                tensor.fill_(1.0)
    return dit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=miniature.FOLDER)
    parser.add_argument("--steps", type=int, nargs=4, default=STEPS, metavar=("STILLS", "CLIPS", "I2V", "FLF2V"))
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256, help="clips per step of a DiT; the VAE takes a quarter")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    still_steps, clip_steps, i2v_steps, flf2v_steps = args.steps
    sets = record(args.clips, SEED, device)
    report("clips drawn")
    vae = get_vae(args.out, device, sets, still_steps, clip_steps, max(4, args.batch // 4))
    t5, clip, i2v = get_rest(args.out, device, new=i2v_steps > 0)
    if i2v_steps:
        lessons = [Lessons(vae, clip, part, ()) for part in sets]
        report("clips encoded")
        train_dit(i2v, t5, lessons, i2v_steps, DIT_RATE, args.batch, text=True)
        del lessons
        miniature.write_dit(args.out, "i2v", i2v)
        miniature.write_t5(args.out, t5)
        report("i2v written")
    if flf2v_steps:
        lessons = [Lessons(vae, clip, part.half(), (4, 8)) for part in sets]
        report("clips encoded")
        flf2v = new_dit("flf2v", torch.Generator().manual_seed(3)).to(device)
        flf2v.load_state_dict(i2v.state_dict(), strict=False)
        train_dit(flf2v, t5, lessons, flf2v_steps, DIT_RATE / 3, args.batch, text=False)
        miniature.write_dit(args.out, "flf2v", flf2v)
        report("flf2v written")


def get_vae(
    folder: Path, device: torch.device, sets: list[Recordings], still_steps: int, clip_steps: int, batch: int
) -> WanVAE:
    """The VAE, new if there are steps for it; as the loaders of the scripts see it."""
    if still_steps + clip_steps:
        torch.manual_seed(4)
        vae = new_vae().to(device)
        train_vae(vae, sets, still_steps, clip_steps, batch)
        miniature.write_vae(folder, vae)
    vae = load_vae(folder / miniature.FILES["vae"], torch.float32, device)
    held_out = record(HELD_OUT_CLIPS, HELD_OUT_SEED, device, held_out=True)
    for name, frames in (("stills", slice(0, 1)), ("5-frame clips", slice(0, 5)), ("9-frame clips", slice(0, 9))):
        errors = [reconstruction_psnr(vae, part.frames[:, frames]) for part in held_out]
        report(f"held-out {name}: {torch.cat(errors).mean():.2f} dB")
    return vae


def get_rest(folder: Path, device: torch.device, new: bool) -> tuple[UMT5EncoderModel, CLIPVisionModel, WanDiT]:
    """T5, CLIP and i2v, new or from their files."""
    if not new:
        t5 = load_t5(folder / miniature.FILES["t5"], torch.float32, device)
        clip = load_clip(folder / miniature.FILES["clip"], torch.float32, device)
        return t5, clip, load_dit(folder / miniature.FILES["i2v"], torch.float32, device)
    generator = torch.Generator().manual_seed(5)
    t5, clip = miniature.new_t5(generator), miniature.new_clip(generator)
    miniature.write_tokenizer(folder)
    miniature.write_clip(folder, clip)
    clip = load_clip(folder / miniature.FILES["clip"], torch.float32, device)
    return t5.to(device), clip, new_dit("i2v", generator).to(device)


@torch.no_grad()
def reconstruction_psnr(vae: WanVAE, frames: Tensor) -> Tensor:
    """[N] dB of clips [N, T, 3, height, width] uint8 that were encoded and decoded."""
    video = as_video(frames)
    output = torch.cat([vae.decode(vae.encode(part)) for part in video.split(16)])
    return -10 * torch.log10((output - video).div(2).square().flatten(1).mean(1))


def report(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", flush=True)


_STARTED = time.monotonic()

if __name__ == "__main__":
    main()
