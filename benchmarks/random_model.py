"""A DiT of any size with random weights that come through the real loader, so that nothing has to lie on the disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from wan import checkpoint
from wan.checkpoint import Checkpoint, TensorInfo
from wan.config import DiTSpec
from wan.dit import WanDiT

SPECS = {
    "14B": DiTSpec("i2v", dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, text_dim=4096, image_dim=1280),
    "tiny": DiTSpec("i2v", dim=256, ffn_dim=512, num_layers=3, in_dim=36, text_dim=64, image_dim=160),
}


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

    original, checkpoint.open_checkpoint = checkpoint.open_checkpoint, opened
    try:
        yield
    finally:
        checkpoint.open_checkpoint = original
