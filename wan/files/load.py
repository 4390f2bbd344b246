"""Model files -> modules: the only place that reads checkpoints.

`inspect_*` reads headers only and checks every name and shape, so that mistakes show before any weights load;
`load_*` does the same and then reads tensor by tensor. All loaded modules are frozen and in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import ConfigError
from utils.files import written_whole
from wan.files import names as layouts
from wan.files.formats import Checkpoint, Shapes, blocks_of_scale, check_tensors, open_checkpoint
from wan.memory.fp8 import FP8, FP8Kind, Fp8Linear, fp8_entries, is_dit_weight, is_inner_dit_weight, use_fp8_
from wan.nets import clip, t5
from wan.nets.attention import Attention, sdpa
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.nets.vae import WanVAE, vae_base_dim

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import CLIPVisionModel, UMT5EncoderModel

Network = TypeVar("Network", bound=nn.Module)

_DIT_DTYPE_PROBE = "blocks.0.cross_attn.k.weight"  # its dtype stands for the file (docs/formats.md#dit-keys)


def _check(checkpoint: Checkpoint, expected: Shapes, ignored: AbstractSet[str] = frozenset()) -> None:
    found = {name: shape for name, shape in checkpoint.shapes.items() if name not in ignored}
    check_tensors(expected, found, checkpoint.label)
    for name in expected:
        if not (dtype := checkpoint.tensors[name].dtype).is_floating_point:
            raise ConfigError(f"{checkpoint.label}: {name} is {dtype}, so quantised; use a bf16, fp16 or fp32 file")


def _shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _on_meta(checkpoint: Checkpoint, build: Callable[[Shapes], Network]) -> Network:
    """`build(shapes)` without memory for the weights; a ConfigError of it gets the name of the file in front.

    `build` must not be the first to import a model of transformers: torch 2.8 fails to do so on the meta device.
    """
    try:
        with torch.device("meta"):
            return build(checkpoint.shapes)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.label}: {error}") from None


def _load(
    module: Network,
    checkpoint: Checkpoint,
    names: Shapes,
    to_entries: Callable[[str, Tensor], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    keep: Callable[[str, str, Tensor], dict[str, Tensor]] = lambda name, key, tensor: {key: tensor},
) -> Network:
    """Fill `module`, built on the meta device, with the tensors `names` of the checkpoint, and return it.

    to_entries: (name, tensor as stored) -> entries of the state dict. keep: (name, key, entry in `dtype` on `device`)
    -> entries in the form and place in which they stay. Tensors pass one by one, so that only one of them exists in
    another form at a time.
    """
    module.eval().requires_grad_(False)
    state: dict[str, Tensor] = {}
    for name, stored in _read(checkpoint, names, device):
        for key, tensor in to_entries(name, stored).items():
            state |= keep(name, key, tensor.to(dtype))
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):  # those that are in no file
            setattr(part, name, buffer.to(device))
    return module


def _read(checkpoint: Checkpoint, names: Iterable[str], device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) one after the other, with a progress bar."""
    total = sum(checkpoint.tensors[name].nbytes for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {checkpoint.path.name}", disable=None) as progress:
        for name, stored in checkpoint.read_all(names, device):
            yield name, stored
            progress.update(checkpoint.tensors[name].nbytes)


def open_dit(path: str | Path, flag: str = "--dit") -> Checkpoint:
    """The header of a DiT file under official names. ConfigErrors start with `flag`; names are not compared yet."""
    return layouts.dit_layout(open_checkpoint(path, flag, rename=layouts.dit_name))


def _open_dit(path: str | Path, attention: Attention = sdpa) -> tuple[Checkpoint, WanDiT]:
    checkpoint = open_dit(path)
    model = _on_meta(checkpoint, lambda shapes: WanDiT(DiTSpec.from_shapes(shapes), attention))
    _check(checkpoint, _shapes_of(model))
    return checkpoint, model


def inspect_dit(path: str | Path) -> DiTSpec:
    """Check the header of a DiT file and return its spec; ConfigError for anything else than a Wan2.1 DiT."""
    return _open_dit(path)[1].spec


def dit_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a DiT file is stored in; bfloat16 when it is quantised (scaled fp8, GGUF)."""
    return _open_dit(path)[0].tensors[_DIT_DTYPE_PROBE].dtype


def usual_dit_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype that a DiT stored in this one is loaded in: the same, but bfloat16 for fp8, which can't compute."""
    return torch.bfloat16 if stored.itemsize == 1 else stored


def load_dit(
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    merge: Callable[[str, Tensor], Tensor] | None = None,
    attention: Attention = sdpa,
    fp8: FP8Kind | None = None,
    blocks_on_host: int = 0,
) -> WanDiT:
    """The DiT with all weights in `dtype`; None means that of the file, and bfloat16 for an fp8 or quantised file.

    `merge(official name, weight)` may replace each weight (LoRA), or returns what it got: it gets it on `device` in the
    dtype of the model, as training does, so that an image made in training and one made from the saved LoRA are equal.
    fp8: the linear layers of the blocks keep their merged weights as an Fp8Linear does; see `_fp8_layers`.
    blocks_on_host: of that many blocks, the last ones, the weights stay in host memory (for `swap_blocks_`).
    """
    checkpoint, model = _open_dit(path, attention)
    names = _shapes_of(model)
    if dtype is None:
        dtype = usual_dit_dtype(checkpoint.tensors[_DIT_DTYPE_PROBE].dtype)
    count = len(model.blocks)
    wanted = partial(is_inner_dit_weight, blocks=count) if fp8 == "rows" else is_dit_weight
    layers = _fp8_layers(checkpoint, model, dtype, fp8, wanted)
    on_host = tuple(f"blocks.{i}." for i in range(count - blocks_on_host, count))
    changed = set()

    def to_entries(name: str, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.to(dtype)
        merged = merge(name, weight) if merge else weight
        if merged is not weight:
            changed.add(name)
        return {name: merged}

    def keep(name: str, key: str, weight: Tensor) -> dict[str, Tensor]:
        home = "cpu" if name.startswith(on_host) else device
        entries = _fp8_entries(layers, None if name in changed else checkpoint, name, key, weight)
        return {key: tensor.to(home) for key, tensor in entries.items()}

    return _load(model, checkpoint, names, to_entries, dtype, device, keep)


@torch.no_grad()
def merge_again_(
    dit: WanDiT,
    path: str | Path,
    device: torch.device | str,
    merge: Callable[[str, Tensor], Tensor],
    names: Iterable[str],
) -> None:
    """`dit`, which `load_dit` read from `path`, becomes what it gives with this `merge`, bit for bit and in place.

    names: the weights that any merging changes. Subtracting what was merged would leave rounding errors, so they are
    read again. Keeping them would take as much host memory as the DiT, with the usual LoRA; the page cache keeps files
    anyway while nothing else needs that memory. fp8 weights are quantised anew, those of swapped blocks written where
    they wait.
    """
    checkpoint = open_dit(path)
    layers = {f"{name}.weight": layer for name, layer in dit.named_modules() if isinstance(layer, Fp8Linear)}
    places = dit.state_dict()
    for name, stored in _read(checkpoint, names, device):
        for key, tensor in fp8_entries(layers, name, merge(name, stored.to(dit.dtype))).items():
            places[key].copy_(tensor)


def save_dit(path: str | Path, dit: WanDiT, metadata: Mapping[str, str]) -> None:
    """Write a DiT, merged weights and all, as safetensors under the official names: the whole file or nothing.

    Weights of an Fp8Linear are written as float8 and, where it has them, `scale_weight` beside
    (docs/formats.md#fp8-weights).
    Raises ValueError when `dit` has other tensors than a DiT (LoRA layers), OSError when the disk refuses.
    """
    state = {
        f"{name.removesuffix('quantized')}weight" if name.endswith(".quantized") else name: tensor.detach()
        for name, tensor in dit.state_dict().items()
    }
    with torch.device("meta"):
        official = WanDiT(dit.spec).state_dict().keys()
    if others := {name for name in state if not name.endswith(".scale_weight")} ^ official:
        raise ValueError(f"not the tensors of a plain DiT: {sorted(others)[:3]}")
    with written_whole(path) as temporary:
        # ComfyUI and diffusers look for this key
        everything = {"format": "pt", **metadata}
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary, everything)


def _fp8_layers(
    checkpoint: Checkpoint,
    model: nn.Module,
    dtype: torch.dtype,
    kind: FP8Kind | None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Fp8Linear]:
    """`use_fp8_` if a kind is asked for; a file with scales keeps scales, because a cast would lose small weights."""
    if kind is None:
        return {}
    return use_fp8_(model, dtype, "scaled" if kind == "cast" and checkpoint.scales else kind, wanted)


def _fp8_entries(
    layers: Mapping[str, Fp8Linear], checkpoint: Checkpoint | None, name: str, key: str, weight: Tensor
) -> dict[str, Tensor]:
    """`fp8_entries` of a weight, without rounding it again where `checkpoint` holds it as scaled fp8.

    name: of the tensor in `checkpoint`; checkpoint: None when LoRA has changed the weight.
    """
    template = layers[key].scale_weight if key in layers and layers[key].kind == "scaled" else None
    if template is not None and checkpoint is not None and name in checkpoint.scales:
        stored = checkpoint.readers[name]()
        blocks = blocks_of_scale(checkpoint.read_scale(name, weight.device), stored.shape).to(weight.dtype)
        rows, columns = template.shape[:2] if template.ndim == 3 else (len(template), 1)
        normal = blocks.abs() >= torch.finfo(weight.dtype).tiny  # in float16 small scales are too coarse, or 0
        if stored.dtype == FP8 and columns % blocks.shape[1] == 0 and normal.all():
            scale = blocks.repeat_interleave(columns // blocks.shape[1], dim=1).expand(rows, -1, -1)
            stem = key.removesuffix("weight")
            return {
                f"{stem}quantized": stored.to(weight.device),
                f"{stem}scale_weight": scale.reshape(template.shape).contiguous(),
            }
    return fp8_entries(layers, key, weight)


def _open_vae(path: str | Path) -> tuple[Checkpoint, WanVAE]:
    checkpoint = open_checkpoint(path, "--vae", rename=layouts.vae_name)
    model = _on_meta(checkpoint, lambda shapes: WanVAE(vae_base_dim(shapes)))
    _check(checkpoint, _shapes_of(model))
    return checkpoint, model


def inspect_vae(path: str | Path) -> int:
    """Check the header of a VAE file and return its base width (96 in the published one)."""
    return vae_base_dim(_open_vae(path)[0].shapes)


def load_vae(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """The VAE in `dtype` on `device`."""
    checkpoint, model = _open_vae(path)
    return _load(model, checkpoint, _shapes_of(model), lambda name, tensor: {name: tensor}, dtype, device)


def _open_t5(path: str | Path) -> tuple[Checkpoint, UMT5EncoderModel]:
    checkpoint = layouts.with_scales(open_checkpoint(path, "--t5", rename=layouts.t5_name))
    from transformers import UMT5EncoderModel  # noqa: F401  `_on_meta` says why

    model = _on_meta(checkpoint, t5.build_t5)
    _check(checkpoint, t5.t5_shapes(model))
    return checkpoint, model


def inspect_t5(path: str | Path) -> int:
    """Check the header of a T5 file and return the width of its embeddings (4096 in umT5-XXL)."""
    return _open_t5(path)[1].config.d_model


def count_t5(path: str | Path) -> int:
    """Number of weights in a T5 file (5.68 billion in umT5-XXL). Reads the header only."""
    return sum(math.prod(shape) for shape in t5.t5_shapes(_open_t5(path)[1]).values())


def load_t5(
    path: str | Path, dtype: torch.dtype, device: torch.device | str, fp8: FP8Kind | None = None
) -> UMT5EncoderModel:
    """The T5 encoder in `dtype` on `device`; with `fp8` its linear layers keep their weights as an Fp8Linear does."""
    checkpoint, model = _open_t5(path)
    names = t5.t5_shapes(model)
    layers = _fp8_layers(checkpoint, model, dtype, fp8)
    return _load(model, checkpoint, names, t5.t5_tensors, dtype, device, partial(_fp8_entries, layers, checkpoint))


def _open_clip(path: str | Path) -> tuple[Checkpoint, CLIPVisionModel]:
    checkpoint = layouts.clip_layout(open_checkpoint(path, "--clip", rename=layouts.clip_name))
    from transformers import CLIPVisionModel  # noqa: F401  `_on_meta` says why

    model = _on_meta(checkpoint, clip.build_clip)
    _check(checkpoint, clip.clip_shapes(model), ignored=clip.unused_names(checkpoint.shapes))
    return checkpoint, model


def inspect_clip(path: str | Path) -> int:
    """Check the header of a CLIP file and return the width of its image features (1280 in ViT-H)."""
    return _open_clip(path)[1].config.hidden_size


def load_clip(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> CLIPVisionModel:
    """The image encoder, without its last block, in `dtype` on `device`."""
    checkpoint, model = _open_clip(path)
    return _load(model, checkpoint, clip.clip_shapes(model), clip.clip_tensors, dtype, device)
