"""The CLIP image encoder (ViT-H/14): pixels -> 257 features per image, taken before the last block.

The network is that of transformers; its names and those of the official Wan2.1 file meet here.

Rules: docs/formats.md#clip-keys and docs/formats.md#clip-input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils.errors import ConfigError
from wan.nets.spec import CLIP_TOKENS

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import CLIPVisionConfig, CLIPVisionModel

IMAGE_SIZE, PATCH_SIZE, HEAD_WIDTH = 224, 14, 80
# Normalisation of OpenAI's CLIP, for RGB in [0, 1]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_BLOCKS = "visual.transformer."
OUTSIDE = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding.weight": "embeddings.patch_embedding.weight",
    "visual.pre_norm.weight": "pre_layrnorm.weight",
    "visual.pre_norm.bias": "pre_layrnorm.bias",
}
IN_BLOCK = {  # official module after `visual.transformer.<i>.` -> transformers' modules, which split its rows evenly
    "norm1": ("layer_norm1",),
    "attn.to_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.0": ("mlp.fc1",),
    "mlp.2": ("mlp.fc2",),
}
_LEADING_ONES = {"visual.cls_embedding": (1, 1), "visual.pos_embedding": (1,)}  # axes that transformers leaves out


def clip_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """Dimensions from official names and shapes, with one block less than the file. ViT-H: width 1280, 31 of 32 blocks.

    Raises ConfigError when the tensors that tell the dimensions are missing or impossible.
    """
    from transformers import CLIPVisionConfig

    width = next(iter(shapes.get("visual.patch_embedding.weight", ())), 0)
    mlp_width = next(iter(shapes.get(f"{_BLOCKS}0.mlp.0.weight", ())), 0)
    blocks = _count_blocks(shapes)
    if not width or width % HEAD_WIDTH or not mlp_width or blocks < 2:
        raise ConfigError(
            "is not a CLIP image encoder with the official Wan2.1 names; "
            "use models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=blocks - 1,
        num_attention_heads=width // HEAD_WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def build_clip(shapes: Mapping[str, tuple[int, ...]]) -> CLIPVisionModel:
    """The encoder for a file with these official names and shapes. Under torch.device("meta") it costs nothing."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel(clip_config(shapes))
    # The norm serves the pooled output only, which Wan does not use. Positions are in no file, so never on meta.
    model.post_layernorm = nn.Identity()  # type: ignore[assignment]  # any module will do
    model.embeddings.position_ids = torch.arange(CLIP_TOKENS, device="cpu")[None]  # type: ignore[assignment]  # a buffer
    return model


def clip_keys(official: str) -> tuple[str, ...]:
    """`visual.transformer.3.mlp.0.bias` -> (`encoder.layers.3.mlp.fc1.bias`,); q, k and v for the fused projection."""
    if official in OUTSIDE:
        return (OUTSIDE[official],)
    index, rest = official.removeprefix(_BLOCKS).split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return tuple(f"encoder.layers.{index}.{module}.{kind}" for module in IN_BLOCK[part])


def clip_shapes(model: CLIPVisionModel) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of every tensor that `model` needs."""
    state = model.state_dict()
    layers = range(model.config.num_hidden_layers)
    blocks = [f"{_BLOCKS}{i}.{part}.{kind}" for i in layers for part in IN_BLOCK for kind in ("weight", "bias")]
    shapes = {}
    for name in (*OUTSIDE, *blocks):
        keys = clip_keys(name)
        rows, *rest = state[keys[0]].shape
        shapes[name] = (*_LEADING_ONES.get(name, ()), rows * len(keys), *rest)
    return shapes


def clip_tensors(official: str, tensor: Tensor) -> dict[str, Tensor]:
    """The entries of the model's state dict that one official tensor fills."""
    tensor = tensor.reshape(tensor.shape[len(_LEADING_ONES.get(official, ())) :])
    keys = clip_keys(official)
    return dict(zip(keys, tensor.chunk(len(keys)), strict=True))


def unused_names(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Official names that the image features do not need: the text tower, the last block and what follows it."""
    last_block = f"{_BLOCKS}{_count_blocks(shapes) - 1}."
    prefixes = ("textual.", "log_scale", "visual.post_norm.", "visual.head", last_block)
    return {name for name in shapes if name.startswith(prefixes)}


def preprocess(pixels: Tensor) -> Tensor:
    """[B, 3, height, width] in [-1, 1] -> [B, 3, 224, 224] float32 for the network; the aspect ratio is not kept.

    As in wan/modules/clip.py of Wan2.1: bicubic without antialiasing, overshoot not clamped.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels * 0.5 + 0.5 - mean) / std


def encode_image(model: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """[B, 3, height, width] in [-1, 1] -> [B, 257, width], see `encode_inputs`."""
    return encode_inputs(model, preprocess(pixels))


@torch.no_grad()
def encode_inputs(model: CLIPVisionModel, inputs: Tensor) -> Tensor:
    """Preprocessed images [B, 3, 224, 224] -> [B, 257, width] in the model's dtype; class token first, not normed."""
    return model(pixel_values=inputs.to(model.dtype)).last_hidden_state


def _count_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len({name.removeprefix(_BLOCKS).split(".")[0] for name in shapes if name.startswith(_BLOCKS)})
