"""Models of the real sizes with random weights: a DiT through the real loader without a file, files, and inputs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from demo import tiny_models
from demo.tiny_models import FILES, Shapes
from wan.files import load
from wan.files.formats import Checkpoint, TensorInfo
from wan.files.load import load_dit, save_dit
from wan.nets.clip import build_clip, clip_shapes
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.nets.dit import WanDiT
from wan.nets.spec import CLIP_TOKENS, LATENT_CHANNELS, MASK_CHANNELS, VAE_STRIDE, DiTSpec
from wan.nets.t5 import build_t5, t5_shapes
from wan.nets.vae import WanVAE

SPECS = {
    "14B": DiTSpec("i2v", dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, text_dim=4096, image_dim=1280),
    "tiny": DiTSpec("i2v", dim=256, ffn_dim=512, num_layers=3, in_dim=36, text_dim=64, image_dim=160),
}

_CLIP_BLOCKS = 32


@contextmanager
def random_checkpoint(spec: DiTSpec, device: torch.device) -> Iterator[None]:
    """Within it every DiT file is one of `spec` in bfloat16, whose tensors are made on `device` when they are read."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanDiT(spec).state_dict().items()}

    def make(number: int, name: str) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(number)
        values = torch.randn(shapes[name], generator=generator, device=device, dtype=torch.bfloat16) * 0.02
        return values + 1 if "norm" in name and name.endswith("weight") else values

    def opened(path: Path, flag: str, rename: object = None) -> Checkpoint:
        readers = {name: lambda number=i, name=name: make(number, name) for i, name in enumerate(shapes)}
        tensors = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
        return Checkpoint(flag, Path(path), tensors, readers)

    original, load.open_checkpoint = load.open_checkpoint, opened
    try:
        yield
    finally:
        load.open_checkpoint = original


def latent_size(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """F, H and W of the latents of this many pixels."""
    return frames, height // VAE_STRIDE, width // VAE_STRIDE


def dit_inputs(spec: DiTSpec, device: torch.device, size: tuple[int, int, int], batch: int = 1) -> dict[str, Any]:
    """Random arguments of an i2v DiT but for the timesteps. size: width and height in pixels, latent frames."""
    generator = torch.Generator(device).manual_seed(0)
    latents, frames = latent_size(*size), size[2]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device)

    return {
        "latents": draw(LATENT_CHANNELS, *latents),
        "conditioning": Conditioning(
            draw(MASK_CHANNELS + LATENT_CHANNELS, *latents), draw(1, CLIP_TOKENS, spec.image_dim)
        ),
        "text": pad_text(list(draw(60, spec.text_dim))),
        "frame_indices": torch.arange(frames, device=device).expand(batch, -1),
    }


def loss_inputs(spec: DiTSpec, device: torch.device, size: tuple[int, int, int]) -> dict[str, Any]:
    """Random arguments of the training loss but for the DiT. size: as in `dit_inputs`."""
    tensors = dit_inputs(spec, device, size)
    return tensors | {"noise": torch.randn_like(tensors["latents"]), "t": torch.tensor([0.7], device=device)}


def write_release(folder: Path, size: str, kinds: Sequence[str] = ("i2v", "t5", "clip", "vae", "tokenizer")) -> None:
    """Files of a release with random weights of that size, under their official names; the tokenizer is a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    if size == "tiny":
        tiny_models.write_models(folder)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "i2v" in kinds:
        with random_checkpoint(SPECS[size], device):
            save_dit(folder / FILES["i2v"], load_dit("dit.safetensors", None, "cpu"), {})
    for kind, (shapes, dtype) in _encoders().items():
        if kind in kinds:
            made = {name: torch.randn(shape, device=device, dtype=dtype) * 0.02 for name, shape in shapes.items()}
            torch.save({name: tensor.cpu() for name, tensor in made.items()}, folder / FILES[kind])
    if "tokenizer" in kinds:
        tiny_models.write_tokenizer(folder / FILES["tokenizer"])


def _encoders() -> dict[str, tuple[Shapes, torch.dtype]]:
    """The tensors of each file, and their dtype."""
    with torch.device("meta"):
        t5, clip = t5_shapes(build_t5(dict(_t5_sizes()))), clip_shapes(build_clip(dict(_clip_sizes())))
        vae = {name: tuple(tensor.shape) for name, tensor in WanVAE(96).state_dict().items()}
    first, last = "visual.transformer.0.", f"visual.transformer.{_CLIP_BLOCKS - 1}."  # the last is never used
    clip |= {name.replace(first, last): shape for name, shape in clip.items() if name.startswith(first)}
    return {"t5": (t5, torch.bfloat16), "clip": (clip, torch.float16), "vae": (vae, torch.float32)}


def _t5_sizes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of umT5-XXL that tell its dimensions."""
    yield "token_embedding.weight", (256384, 4096)
    for block in range(24):
        yield f"blocks.{block}.pos_embedding.embedding.weight", (32, 64)
        yield f"blocks.{block}.attn.q.weight", (4096, 4096)
        yield f"blocks.{block}.ffn.fc1.weight", (10240, 4096)


def _clip_sizes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of ViT-H/14 that tell its dimensions."""
    yield "visual.patch_embedding.weight", (1280, 3, 14, 14)
    yield from ((f"visual.transformer.{block}.mlp.0.weight", (5120, 1280)) for block in range(_CLIP_BLOCKS))
