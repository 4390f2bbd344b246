"""The checkpoints whose outputs are recorded: random weights, drawn again from the rule by which they were made.

Names, order and shapes are those of the published files with fewer blocks and smaller sizes; each tensor is drawn
alone, from a seed that its name gives. `demo/tiny_models.py` makes models of the same layout for tests that compare
nothing with a recording.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.tiny_models import FILES
from tests.helpers import RECORDINGS, manifest_shapes

_SEED = 20250601


@dataclass(frozen=True)
class TinyCheckpoint:
    """A published file, shrunk."""

    name: str  # part of every tensor's seed
    manifest: str
    dtype: torch.dtype
    sizes: dict[int, int]  # size of a dimension in the published file -> here; sizes that are not listed stay
    sha256: str  # of all tensors, see `digest`
    blocks: int = 0  # how many are kept of the blocks whose name begins with `blocks.` or `visual.transformer.`
    textual_blocks: int = 0  # of those whose name begins with `textual.blocks.`
    attention_width: int = 0  # T5: heads x 64, which in the published file equals the width of the model

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, in the order of the published file."""
        shapes = {}
        for name, published in manifest_shapes(self.manifest).items():
            number = re.match(r"(textual\.)?(?:blocks|visual\.transformer)\.(\d+)\.", name)
            if number and int(number[2]) >= (self.textual_blocks if number[1] else self.blocks):
                continue
            shape = [self.sizes.get(size, size) for size in published]
            if self.attention_width and (linear := re.search(r"\.attn\.([qkvo])\.weight$", name)):
                shape[1 if linear[1] == "o" else 0] = self.attention_width
            shapes[name] = tuple(shape)
        return shapes

    def tensors(self) -> dict[str, Tensor]:
        """All weights, the same on every call."""
        return {name: self._draw(name, shape).to(self.dtype) for name, shape in self.shapes().items()}

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        seed = hashlib.sha256(f"{_SEED}:{self.name}/{name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        return _scaled(name, torch.randn(shape, generator=generator))


def _scaled(name: str, normal: Tensor) -> Tensor:
    """Weights from normal numbers: scales near 1, matrices by their number of inputs, the rest small."""
    leaf, matrix = name.rpartition(".")[2], normal.dim() == 2
    is_norm = leaf == "gamma" or (leaf == "weight" and re.search(r"norm|\.proj\.[04]\.", name) and not matrix)
    fan_in = math.prod(normal.shape[1:] or normal.shape)
    if leaf == "log_scale":
        weight = 2.6593 + 0.01 * normal
    elif is_norm:
        weight = 1 + 0.15 * normal
    elif leaf == "bias":
        weight = 0.08 * normal
    elif leaf == "modulation":
        weight = 0.35 * normal
    elif leaf in ("emb_pos", "cls_embedding", "pos_embedding"):
        weight = 0.5 * normal
    elif matrix and "embedding.weight" in name:
        weight = normal
    else:
        weight = normal * (1.1 / math.sqrt(fan_in))
    if leaf == "weight" and re.search(r"\.norm_(q|k|k_img)\.weight$", name):  # sharper attention
        weight = weight * (2 if "self_attn" in name else 1.5)
    if re.search(r"(self|cross)_attn\.o\.weight$", name):
        weight = weight * 2
    return weight


_DIT = {5120: 256, 30720: 1536, 4096: 64, 1280: 160}
_CLIP = {1280: 160, 3840: 480, 5120: 640, 1024: 64, 4096: 256, 250002: 300, 514: 34}

CHECKPOINTS = {  # by the kind of model in FILES
    "i2v": TinyCheckpoint(
        "dit_i2v",
        manifest="dit_i2v-14B",
        dtype=torch.bfloat16,
        sizes=_DIT | {13824: 512},
        blocks=3,
        sha256="d7177cc3d9001435be1fb0625b15550710bd16b8b91060e94f8c96a067247cbc",
    ),
    "flf2v": TinyCheckpoint(
        "dit_flf2v",
        manifest="dit_flf2v-14B",
        dtype=torch.bfloat16,
        sizes=_DIT | {13824: 384},
        blocks=2,
        sha256="c4d047d63e322fe5f6bf6bc852a6ca94838cd86032dd9b5f7ba466c577370a8e",
    ),
    "vae": TinyCheckpoint(
        "vae",
        manifest="vae",
        dtype=torch.float32,
        sizes={size: size // 12 for size in (96, 192, 384, 768, 1152)},
        sha256="21c3226a42545f65612e90bc6c2e2cb6770963c2bf8633a43bfa6bc9ea04f375",
    ),
    "t5": TinyCheckpoint(
        "t5",
        manifest="t5_umt5-xxl-enc",
        dtype=torch.bfloat16,
        sizes={256384: 320, 4096: 64, 10240: 160, 64: 2},
        blocks=2,
        attention_width=128,
        sha256="503002929ed55244cfd005423e7476e0e9256b3c0e2a5634a1e210a216ec3ea2",
    ),
    "clip": TinyCheckpoint(
        "clip",
        manifest="clip_xlm-roberta-vit-h-14",
        dtype=torch.float16,
        sizes=_CLIP,
        blocks=3,
        textual_blocks=2,
        sha256="f6927482cf06c26da0bafb9100c2603d1854556fd98d439e262ce8cec3761791",
    ),
}


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, dtypes, shapes and values, in the order given."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def draws_as_recorded() -> bool:
    """Whether torch rounds normal numbers here as it did for the recordings: on CPUs with AVX2.

    Elsewhere they are up to 2e-6 off, so that one in 10,000 weights becomes another number in bfloat16. The outputs are
    then about 1e-4 away from the recorded ones, ten times what the tests allow.
    """
    normal = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    return digest([("", normal)]) == "142a2e5f157c3560e46a66fb344139431b546fd98762c030a0006b6d7cda021b"


def write_tiny_checkpoints(folder: Path) -> None:
    """Write all of CHECKPOINTS and the tokenizer under the names of FILES into `folder`, which is created."""
    shutil.copytree(RECORDINGS / "tokenizer", folder / FILES["tokenizer"])
    for kind, checkpoint in CHECKPOINTS.items():
        path = folder / FILES[kind]
        if path.suffix == ".pth":
            torch.save(checkpoint.tensors(), path)
        else:
            save_file(checkpoint.tensors(), path, {"format": "pt"})
