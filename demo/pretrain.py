"""Train the miniature family from nothing, on one GPU:

    python -m demo.pretrain --out demo/miniature

--steps: of the VAE on stills and on clips, of i2v (with T5) and of flf2v. A model with 0 steps is read from --out. The
seeds are fixed: the same kind of GPU with the same versions gives the same weights up to the order of its sums.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel

from demo import miniature
from demo.recordings import as_video, record
from demo.train_dit import Lessons, new_dit, train_dit
from demo.train_vae import VAEStage, new_vae, train_vae
from wan.files.load import load_clip, load_dit, load_t5, load_vae
from wan.nets.dit import WanDiT
from wan.nets.vae import WanVAE

HELD_OUT_SEED, SEED, BLAZER_SEED = 900_000_000, 200_000_000, 250_000_000
HELD_OUT_CLIPS, VAE_CLIPS, BLAZER_CLIPS = 60, 12_000, 4_000
STEPS = (7_500, 4_000, 2_500, 25_000, 6_500)  # of the VAE: stills, clips, blazers; of i2v, of flf2v
DIT_RATE = 1.2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=miniature.FOLDER)
    parser.add_argument(
        "--steps", type=int, nargs=5, default=STEPS, metavar=("STILLS", "CLIPS", "BLAZERS", "I2V", "FLF2V")
    )
    parser.add_argument("--clips", type=int, default=40_000)
    parser.add_argument(
        "--batch", type=int, default=128, help="clips per step of a DiT; the VAE takes half as many stills"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    *vae_steps, i2v_steps, flf2v_steps = args.steps
    vae = get_vae(args.out, device, vae_steps, max(4, args.batch // 2))
    if not i2v_steps + flf2v_steps:
        return
    sets = record(args.clips, SEED, device, changes=True)
    report("clips drawn")
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


def get_vae(folder: Path, device: torch.device, steps: list[int], batch: int) -> WanVAE:
    """The VAE, trained in two stages where there are steps for them; as the loaders of the scripts see it.

    The second stage shows blazers as well, and weighs large errors more.
    """
    still_steps, clip_steps, blazer_steps = steps
    file = folder / miniature.FILES["vae"]
    if still_steps + clip_steps:
        torch.manual_seed(4)
        vae = new_vae().to(device)
        train_vae(
            vae, record(VAE_CLIPS, SEED, device), VAEStage(still_steps, clip_steps, peak=2.5e-3, square=2, batch=batch)
        )
        miniature.write_vae(folder, vae)
    if blazer_steps:
        torch.manual_seed(0)
        vae = load_vae(file, torch.float32, device)
        train_vae(
            vae,
            record(BLAZER_CLIPS, BLAZER_SEED, device, blazers=True),
            VAEStage(0, blazer_steps, peak=8e-4, square=20, batch=batch),
        )
        miniature.write_vae(folder, vae)
    vae = load_vae(file, torch.float32, device)
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
