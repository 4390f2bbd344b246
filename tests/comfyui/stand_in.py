"""A stand-in for the parts of ComfyUI that the nodes call, with its shapes and conventions (ComfyUI 0.8.0).

Images are [B, height, width, 3] in [0, 1], latents are not normalised, a model is patched in clones.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import as_pixels
from wan.nets.clip import IMAGE_SIZE
from wan.nets.rope import grid_positions, rope_angles
from wan.nets.vae import VAE_MEAN, VAE_STD, WanVAE


class LatentFormat:
    """`comfy.latent_formats.Wan21`."""

    def __init__(self) -> None:
        self.mean, self.std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (VAE_MEAN, VAE_STD))

    def process_in(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std

    def process_out(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


class VAE:
    """A VAE node's value: [T, height, width, 3] -> [1, 16, F, H, W], and back to [1, T, height, width, 3]."""

    def __init__(self, vae: WanVAE) -> None:
        self.vae, self.space = vae, LatentFormat()

    def encode(self, images: Tensor) -> Tensor:
        return self.space.process_out(self.vae.encode((images * 2 - 1).movedim(-1, 0)[None]))

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(self.space.process_in(latents))
        return ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)


class Network:
    """The diffusion model, as far as frames are placed in it."""

    def __init__(self, images: int = 1) -> None:
        self.img_emb = SimpleNamespace(emb_pos=torch.zeros(1) if images == 2 else None)

    def rope_encode(
        self, t: int, h: int, w: int, t_start: int = 0, device: Any = None, dtype: Any = None, **options: Any
    ) -> Tensor:
        """Angles [1, t * h * w, 1, 64], where ComfyUI has rotations."""
        times = torch.arange(t_start, t_start + t)[None]
        return rope_angles(grid_positions(times, h, w))[:, :, None]


class Model:
    """A MODEL: clones share the network, patches belong to a clone."""

    def __init__(self, network: Network, patches: dict[str, Any] | None = None) -> None:
        self.network, self.patches = network, patches or {}

    def clone(self) -> "Model":
        return Model(self.network, dict(self.patches))

    def add_object_patch(self, name: str, value: Any) -> None:
        self.patches[name] = value

    def get_model_object(self, name: str) -> Any:
        return self.patches.get(name) or {"diffusion_model": self.network}[name]

    def rope(self, t: int, h: int, w: int) -> Tensor:
        """Angles as the forward pass asks for them."""
        encode: Callable[..., Tensor] = self.patches.get("diffusion_model.rope_encode", self.network.rope_encode)
        return encode(t, h, w, device=None, dtype=torch.float32, transformer_options={})


class ClipVision:
    """A CLIP_VISION that remembers the images it was given."""

    image_size = IMAGE_SIZE

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def encode_image(self, image: Tensor, crop: bool = True) -> SimpleNamespace:
        assert not crop
        self.seen.append(image)
        return SimpleNamespace(penultimate_hidden_states=torch.full((1, 257, 8), float(len(self.seen))))


def common_upscale(samples: Tensor, width: int, height: int, method: str, crop: str) -> Tensor:
    """Cuts the middle out in the new proportions, then resizes [B, C, H, W]."""
    old_height, old_width = samples.shape[-2:]
    across = round(max(0.0, old_width - old_height * width / height) / 2)
    down = round(max(0.0, old_height - old_width * height / width) / 2)
    samples = samples[..., down : old_height - down, across : old_width - across]
    method = {"lanczos": "bicubic"}.get(method, method)
    return F.interpolate(samples, size=(height, width), mode=method)


def conditioning_set_values(conditioning: list[Any], values: dict[str, Any]) -> list[Any]:
    return [[text, {**options, **values}] for text, options in conditioning]


def as_image(levels: Tensor) -> Tensor:
    """[3, height, width] uint8 -> IMAGE [1, height, width, 3]."""
    return ((as_pixels(levels) + 1) / 2).movedim(0, -1)[None]


@contextmanager
def installed(loras: dict[str, Any]) -> Iterator[None]:
    """The modules that the nodes import; loras: name -> path of the files in `models/loras`."""
    loaded: list[tuple[str, float]] = []

    class LoraLoaderModelOnly:
        def load_lora_model_only(self, model: Model, lora_name: str, strength_model: float) -> tuple[Model]:
            loaded.append((lora_name, strength_model))
            return (model.clone(),)

    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.clip_vision": {"Output": SimpleNamespace},
        "comfy.latent_formats": {"Wan21": LatentFormat},
        "comfy.model_management": {"intermediate_device": lambda: torch.device("cpu")},
        "comfy.utils": {"common_upscale": common_upscale},
        "folder_paths": {
            "get_filename_list": lambda kind: list(loras),
            "get_full_path_or_raise": lambda kind, name: str(loras[name]),
        },
        "node_helpers": {"conditioning_set_values": conditioning_set_values},
        "nodes": {"LoraLoaderModelOnly": LoraLoaderModelOnly, "loaded": loaded},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in contents.items():
            module = ModuleType(name)
            module.__dict__.update(values)
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        yield
        for name in [name for name in sys.modules if name.startswith("comfyui.")]:
            del sys.modules[name]
