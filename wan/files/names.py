"""Foreign layouts -> that of the official Wan2.1 files: names, split and scaled tensors, folders.

The official names are in docs/formats.md#model-files. Read are the files of diffusers and transformers, what ComfyUI
repackages, and scaled fp8 as ComfyUI and musubi-tuner write it. A name that is in no table stays as it is, and so shows
up in the report of what does not fit.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.text import one_line
from wan.files.dit_names import dotted_name
from wan.files.formats import Checkpoint, TensorInfo, blocks_of_scale
from wan.nets import clip, t5

_DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # in repackaged DiT files

# What a folder of models holds, relative to it: the official file (docs/formats.md#tasks), then diffusers'.
_RELEASE = {
    "dit": ("diffusion_pytorch_model*.safetensors", "transformer/diffusion_pytorch_model*.safetensors"),
    "vae": ("Wan2.1_VAE.pth", "vae/diffusion_pytorch_model*.safetensors"),
    "t5": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/model*.safetensors"),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder/model*.safetensors"),
    "t5_tokenizer": ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json"),
}
# Single files as ComfyUI repackages them, in its folders or in one; several DiTs may lie together.
_REPACKAGED = {
    "dit": ("wan2.1_*.safetensors", "diffusion_models/wan2.1_*.safetensors"),
    "vae": ("wan_2.1_vae.safetensors", "vae/wan_2.1_vae.safetensors"),
    "t5": ("umt5[-_]xxl*.safetensors", "text_encoders/umt5[-_]xxl*.safetensors"),
    "clip": ("clip_vision_h.safetensors", "clip_vision/clip_vision_h.safetensors"),
}

MODELS = tuple(name for name in _RELEASE if name != "t5_tokenizer")


def release_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    """{option: paths to choose from} of the models in a folder: an official or diffusers release, or single files.

    Of a split model it is the first part; of single files all that there are.
    """
    first = {name: _first(folder, patterns) for name, patterns in _RELEASE.items()}
    found: dict[str, tuple[Path, ...]] = {name: (path,) for name, path in first.items() if path}
    for name, patterns in _REPACKAGED.items():
        single = tuple(path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
        if single and name not in found:
            found[name] = single
    if "t5_tokenizer" in found:
        found["t5_tokenizer"] = (found["t5_tokenizer"][0].parent,)
    return found


def model_in(folder: Path, name: str) -> Path | None:
    """The file of the model `dit`, `vae`, `t5` or `clip` in a release of diffusers or in its folder there, if any.

    Of a split model it is the first part.
    """
    in_release = _RELEASE[name][1]
    return _first(folder, (in_release, in_release.rpartition("/")[2]))


def _first(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    paths = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
    return next(paths, None)


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    return name.removeprefix(next(filter(name.startswith, prefixes), ""))


# DiT


def dit_name(stored: str) -> str | None:
    """An official name from itself, with ComfyUI's prefixes, or from diffusers' WanTransformer3DModel."""
    name = _without(stored, _DIT_PREFIXES)
    module, _, leaf = name.rpartition(".")
    if module.endswith(".norm_added_q"):  # in diffusers' I2V files, used by no one
        return None
    if leaf == "scale_shift_table":
        return f"{module or 'head'}.modulation"
    if name == "condition_embedder.image_embedder.pos_embed":
        return "img_emb.emb_pos"
    official = dotted_name(module.replace(".", "_"))
    return f"{official}.{leaf}" if official else name


def dit_layout(checkpoint: Checkpoint) -> Checkpoint:
    """Scales joined with their weights; leading axes of 1, which ggml's tools drop, put back."""
    dropped = {name: 3 for name in checkpoint.tensors if name.endswith(("modulation", "img_emb.emb_pos"))}
    return _with_leading_ones(with_scales(checkpoint), dropped)


# VAE

_VAE_PLACES = {
    r"conv_in": "conv1",
    r"norm_out": "head.0",
    r"conv_out": "head.2",
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.attentions\.0": "middle.1",
    r"mid_block\.resnets\.1": "middle.2",
    r"down_blocks\.(\d\d?)": "downsamples.{0}",
    # a level of the decoder is three residual blocks and an upsampler, which the official file numbers through
    r"up_blocks\.(\d)\.resnets\.(\d)": "upsamples.{}",
    r"up_blocks\.(\d)\.upsamplers\.0": "upsamples.{}",
}
_VAE_IN_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_VAE_OUTSIDE = {"quant_conv": "conv1", "post_quant_conv": "conv2"}


def vae_name(stored: str) -> str:
    """An official name from itself, with `model.` in front as the official class has it, or of AutoencoderKLWan."""
    stored = stored.removeprefix("model.")
    module, _, leaf = stored.rpartition(".")
    if module in _VAE_OUTSIDE:
        return f"{_VAE_OUTSIDE[module]}.{leaf}"
    for pattern, place in _VAE_PLACES.items():
        if match := re.fullmatch(rf"(encoder|decoder)\.{pattern}(?:\.(.+))?", module):
            coder, *numbers, inner = match.groups()
            if place.endswith("{}"):
                numbers = [4 * int(numbers[0]) + int((*numbers, 3)[1])]
            parts = (coder, place.format(*numbers), _VAE_IN_BLOCK.get(inner, inner), leaf)
            return ".".join(part for part in parts if part)
    return stored


# T5

_T5_MODULES = {theirs.removesuffix(".weight"): ours.removesuffix(".weight") for ours, theirs in t5.IN_BLOCK.items()}
_T5_OUTSIDE = {theirs.removesuffix(".weight"): ours.removesuffix(".weight") for ours, theirs in t5.OUTSIDE.items()}
_T5_OUTSIDE |= {"token_embd": "token_embedding", "enc.output_norm": "norm"}
_T5_MODULES |= {  # llama.cpp's names (gguf-py, gguf/tensor_mapping.py)
    "attn_norm": "norm1",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_o": "attn.o",
    "attn_rel_b": "pos_embedding.embedding",
    "ffn_norm": "norm2",
    "ffn_gate": "ffn.gate.0",
    "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}


def t5_name(stored: str) -> str | None:
    """An official name from itself, from transformers' UMT5EncoderModel, as ComfyUI keeps it, too, or llama.cpp's."""
    module, _, leaf = stored.rpartition(".")
    # A tokenizer that ComfyUI puts into the file, and the second name of the embedding
    if stored == "spiece_model" or module == "encoder.embed_tokens":
        return None
    if module in _T5_OUTSIDE:
        return f"{_T5_OUTSIDE[module]}.{leaf}"
    block = re.fullmatch(r"(?:encoder\.block|enc\.blk)\.(\d+)\.(.+)", module)
    if block and block[2] in _T5_MODULES:
        return f"blocks.{block[1]}.{_T5_MODULES[block[2]]}.{leaf}"
    return t5.official_name(stored)


# CLIP

_CLIP_MODULES = {  # transformers' module -> official one, and which of how many parts of it
    theirs: (ours, part, len(parts)) for ours, parts in clip.IN_BLOCK.items() for part, theirs in enumerate(parts)
}
_CLIP_OUTSIDE = {theirs: ours for ours, theirs in clip.OUTSIDE.items()}
_CLIP_UNUSED = ("post_layernorm.", "visual_projection.", "text_model.", "text_projection.", "logit_scale")
_SPLIT = re.compile(r"(?P<before>.+)\[0/(?P<count>[1-9])\](?P<after>.+)")


def clip_name(stored: str) -> str | None:
    """An official name from itself or from transformers' CLIPVisionModel; `[part/parts]` marks part of a tensor."""
    name = stored.removeprefix("vision_model.")
    if name.startswith(_CLIP_UNUSED) or name == "embeddings.position_ids":
        return None
    if name in _CLIP_OUTSIDE:
        return _CLIP_OUTSIDE[name]
    block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
    if block is None or block[2] not in _CLIP_MODULES:
        return stored
    module, part, parts = _CLIP_MODULES[block[2]]
    return f"visual.transformer.{block[1]}.{module}{f'[{part}/{parts}]' if parts > 1 else ''}.{block[3]}"


def clip_layout(checkpoint: Checkpoint) -> Checkpoint:
    """The parts that `clip_name` marks put together, and the leading axes of 1 that transformers leaves out."""
    tensors, readers = dict(checkpoint.tensors), dict(checkpoint.readers)
    for first in checkpoint.tensors:
        if (split := _SPLIT.fullmatch(first)) is None:
            continue
        count = int(split["count"])
        names = [f"{split['before']}[{i}/{count}]{split['after']}" for i in range(count)]
        info, whole = checkpoint.tensors[first], split["before"] + split["after"]
        are_equal = all(checkpoint.tensors.get(name) == info for name in names)
        if are_equal and info.shape and whole not in tensors:
            tensors[whole] = replace(info, shape=(count * info.shape[0], *info.shape[1:]))
            readers[whole] = partial(_concatenated, [readers[name] for name in names])
            for name in names:
                del tensors[name], readers[name]
    ranks = {"visual.cls_embedding": 3, "visual.pos_embedding": 3}
    return _with_leading_ones(replace(checkpoint, tensors=tensors, readers=readers), ranks)


def _concatenated(readers: list[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([read() for read in readers])


def _with_leading_ones(checkpoint: Checkpoint, ranks: Mapping[str, int]) -> Checkpoint:
    """The tensors named in `ranks` get axes of length 1 in front until they have that many."""
    tensors, readers = dict(checkpoint.tensors), dict(checkpoint.readers)
    for name, rank in ranks.items():
        info = tensors.get(name)
        if info is not None and len(info.shape) < rank:
            shape = (*[1] * (rank - len(info.shape)), *info.shape)
            tensors[name], readers[name] = replace(info, shape=shape), partial(_reshaped, readers[name], shape)
    return replace(checkpoint, tensors=tensors, readers=readers)


def _reshaped(read: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    return read().reshape(shape)


# Scaled fp8

_SCALES = ("scale_weight", "weight_scale")  # of ComfyUI and musubi-tuner, and of newer ComfyUI
_MARKERS = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")  # say how to compute, not what the weights are


def with_scales(checkpoint: Checkpoint) -> Checkpoint:
    """Each `<module>.scale_weight` becomes the scale of `<module>.weight`, which from then on is read multiplied by it.

    ComfyUI: one number, or one per row. musubi-tuner: one per row and 64 columns, [out, in / 64, 1]
    (docs/formats.md#fp8-weights). Raises ConfigError for scales of another form.
    """
    tensors, readers, scales = dict(checkpoint.tensors), dict(checkpoint.readers), {}
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        if leaf in _MARKERS:
            del tensors[name], readers[name]
        elif leaf in _SCALES and weight in tensors and weight not in scales:
            _check_scale(checkpoint, name, info, tensors[weight])
            if tensors[weight].dtype.is_floating_point:
                tensors[weight] = TensorInfo(tensors[weight].shape, torch.bfloat16, packed=True)
            scales[weight] = readers[name]
            del tensors[name], readers[name]
    return replace(checkpoint, tensors=tensors, readers=readers, scales=scales)


def _check_scale(checkpoint: Checkpoint, name: str, scale: TensorInfo, weight: TensorInfo) -> None:
    try:
        if not scale.dtype.is_floating_point:
            raise ValueError(f"{scale.dtype}")
        blocks_of_scale(torch.empty(scale.shape, device="meta"), weight.shape)
    except ValueError as error:
        raise ConfigError(
            f"{checkpoint.label}: {one_line(name)} is {error}, not a known scale; use the bf16 or fp16 file"
        ) from None
