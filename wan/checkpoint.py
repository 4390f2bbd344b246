"""Model files -> modules: the only place that reads checkpoints.

`inspect_*` reads headers only and checks every name and shape, so that mistakes show before any weights load;
`load_*` does the same and then reads tensor by tensor. All loaded modules are frozen and in eval mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import ConfigError
from utils.files import require_file
from wan import clip, t5
from wan.attention import Attention, sdpa
from wan.config import DiTSpec
from wan.dit import WanDiT
from wan.fp8 import FP8Kind, fp8_entries, is_dit_weight, use_fp8_
from wan.vae import WanVAE, vae_base_dim

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

Shapes = Mapping[str, tuple[int, ...]]

_DIT_PREFIX = "model.diffusion_model."  # in repackaged DiT files
_DIT_DTYPE_PROBE = "blocks.0.cross_attn.k.weight"  # its dtype stands for the file (spec formats.md 1)
_FP8_SCALES = re.compile(r"(scale_weight|scale_input|weight_scale|input_scale|scaled_fp8)$")
_PART = re.compile(r"(?P<prefix>.*)(?P<part>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_ZIP_MAGIC = b"PK\x03\x04"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, of which only the headers have been read."""

    flag: str
    path: Path
    tensors: dict[str, TensorInfo]
    readers: dict[str, Callable[[], Tensor]]  # name -> the tensor, mapped from the file where possible

    @property
    def label(self) -> str:
        """The start of every message about this file."""
        return f"{self.flag} {self.path}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One tensor in the dtype of the file, on `device`."""
        return self.readers[name]().to(device)


def open_checkpoint(path: str | Path, flag: str, rename: Callable[[str], str] = str) -> Checkpoint:
    """Read the headers of a model file; `rename` turns the names in the file into official ones.

    `.safetensors` (of a model split into `<prefix>NNNNN-of-NNNNN.safetensors` any part: all are read) or a torch pickle
    (`.pth .pt .bin .ckpt`) that holds tensors only. Raises ConfigError naming `flag`, the file, the reason and the fix.
    """
    path = require_file(path, flag)
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    for part in _parts(path, flag):
        label = f"{flag} {part}"
        for stored, (info, reader) in _read_headers(part, label).items():
            name = rename(stored)
            if name in tensors:
                raise ConfigError(f"{label}: tensor '{_one_line(name)}' appears twice; use the original files")
            tensors[name], readers[name] = info, reader
    return Checkpoint(flag, path, tensors, readers)


def _parts(path: Path, flag: str) -> list[Path]:
    """All files of the model that `path` belongs to."""
    split = _PART.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split["count"])
    parts = [path.with_name(f"{split['prefix']}{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ConfigError(f"{flag} {path}: not all of its {count} parts are here ({_some(missing)}); download the rest")
    return parts if path in parts else [path]


def _read_headers(path: Path, label: str) -> dict[str, tuple[TensorInfo, Callable[[], Tensor]]]:
    """{stored name: (info, reader)} of one file."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_PICKLES):
        raise ConfigError(f"{label}: is no model file by its name; use .safetensors or one of {' '.join(_PICKLES)}")
    try:
        return _safetensors_headers(path) if suffix == ".safetensors" else _pickle_headers(path)
    except _NotAllowedError as error:
        raise ConfigError(f"{label}: {error}") from None
    except Exception as error:  # damaged files make the readers raise nearly anything
        if suffix == ".safetensors":
            reason = f"is damaged or incomplete ({_one_line(error)}); download it again"
        else:
            reason = "is damaged, incomplete or holds code, which is never run; download it again or use safetensors"
        raise ConfigError(f"{label}: {reason}") from None


class _NotAllowedError(Exception):
    """The file is sound, but not of a kind that we read."""


def _safetensors_headers(path: Path) -> dict[str, tuple[TensorInfo, Callable[[], Tensor]]]:
    file = safe_open(path, framework="pt")  # stays open for the readers, until the last of them is gone
    headers = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        part = file.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            kind = part.get_dtype()
            raise _NotAllowedError(f"tensor '{_one_line(name)}' has the dtype {kind}; use a bf16, fp16 or fp32 file")
        headers[name] = TensorInfo(tuple(part.get_shape()), dtype), partial(file.get_tensor, name)
    return headers


def _pickle_headers(path: Path) -> dict[str, tuple[TensorInfo, Callable[[], Tensor]]]:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    # Only the zip format can be mapped; the one from before torch 1.6 has to be read whole
    table = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in table.items()
    ):
        raise _NotAllowedError("holds something else than tensors by name; use the official file or safetensors")
    return {
        name: (TensorInfo(tuple(tensor.shape), tensor.dtype), partial(tensor.detach)) for name, tensor in table.items()
    }


def check_tensors(expected: Shapes, found: Shapes, what: str) -> None:
    """Raise one ConfigError, starting with `what`, for all missing, unexpected and misshapen tensors."""
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in groups.items() if names]
    if problems:
        raise ConfigError(f"{what}: of its tensors {', '.join(problems)}; use a file in the original Wan2.1 layout")


def _some(names: list[str], limit: int = 3) -> str:
    return _one_line(", ".join(names[:limit]), 300) + (", ..." if len(names) > limit else "")


def _one_line(text: object, limit: int = 150) -> str:
    """Names and reasons come from foreign files: no line breaks, no control characters, not endless."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _check(checkpoint: Checkpoint, expected: Shapes, ignored: set[str] = frozenset()) -> None:
    found = {name: shape for name, shape in checkpoint.shapes.items() if name not in ignored}
    check_tensors(expected, found, checkpoint.label)
    for name in expected:
        if not (dtype := checkpoint.tensors[name].dtype).is_floating_point:
            raise ConfigError(f"{checkpoint.label}: {name} is {dtype}, so quantised; use a bf16, fp16 or fp32 file")


def _shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _on_meta(checkpoint: Checkpoint, build: Callable[[Shapes], nn.Module]) -> nn.Module:
    """`build(shapes)` without memory for the weights; its ConfigError gets the name of the file in front."""
    try:
        with torch.device("meta"):
            return build(checkpoint.shapes)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.label}: {error}") from None


def _load(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: Shapes,
    to_entries: Callable[[str, Tensor], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    keep: Callable[[str, Tensor], dict[str, Tensor]] = lambda key, tensor: {key: tensor},
) -> nn.Module:
    """Fill `module`, built on meta, with the tensors `names`; `to_entries` maps each to entries of its state dict.

    keep: the form and place in which an entry, in `dtype` on `device`, stays. Tensor by tensor, so that only one of
    them exists in another form at a time.
    """
    module.eval().requires_grad_(False)
    state: dict[str, Tensor] = {}
    total = sum(checkpoint.tensors[name].nbytes for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {checkpoint.path.name}", disable=None) as progress:
        for name in names:
            for key, tensor in to_entries(name, checkpoint.read(name, device)).items():
                state |= keep(key, tensor.to(dtype))
            progress.update(checkpoint.tensors[name].nbytes)
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):  # those that are in no file
            setattr(part, name, buffer.to(device))
    return module


def _open_dit(path: str | Path, attention: Attention = sdpa) -> tuple[Checkpoint, WanDiT]:
    checkpoint = open_checkpoint(path, "--dit", rename=lambda name: name.removeprefix(_DIT_PREFIX))
    if any(_FP8_SCALES.search(name) for name in checkpoint.tensors):
        raise ConfigError(
            f"{checkpoint.label}: pre-scaled fp8 weights are not supported yet; use the bf16 or fp16 file"
        )
    model = _on_meta(checkpoint, lambda shapes: WanDiT(DiTSpec.from_shapes(shapes), attention))
    _check(checkpoint, _shapes_of(model))
    return checkpoint, model


def inspect_dit(path: str | Path) -> DiTSpec:
    """Check the header of a DiT file and return its spec; ConfigError for anything else than a Wan2.1 DiT."""
    return _open_dit(path)[1].spec


def dit_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a DiT file is stored in."""
    return _open_dit(path)[0].tensors[_DIT_DTYPE_PROBE].dtype


def load_dit(
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    merge: Callable[[str, Tensor], Tensor] | None = None,
    attention: Attention = sdpa,
    fp8: FP8Kind | None = None,
    blocks_on_host: int = 0,
) -> WanDiT:
    """The DiT with all weights in `dtype`; None means that of the file, and bfloat16 for an fp8 file.

    `merge(official name, weight)` may replace each weight (LoRA): it gets it on `device` in the dtype of the model, as
    training does, so that an image made in training and one made from the saved LoRA are equal.
    fp8: the linear layers of the blocks keep their merged weights as an Fp8Linear does.
    blocks_on_host: of that many blocks, the last ones, the weights stay in host memory (for `swap_blocks_`).
    """
    checkpoint, model = _open_dit(path, attention)
    names = _shapes_of(model)
    if dtype is None:
        stored = checkpoint.tensors[_DIT_DTYPE_PROBE].dtype
        dtype = torch.bfloat16 if stored.itemsize == 1 else stored
    layers = use_fp8_(model, dtype, fp8, is_dit_weight) if fp8 else {}
    count = len(model.blocks)
    on_host = tuple(f"blocks.{i}." for i in range(count - blocks_on_host, count))

    def to_entries(name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name: merge(name, weight.to(dtype)) if merge else weight}

    def keep(name: str, weight: Tensor) -> dict[str, Tensor]:
        home = "cpu" if name.startswith(on_host) else device
        return {key: tensor.to(home) for key, tensor in fp8_entries(layers, name, weight).items()}

    return _load(model, checkpoint, names, to_entries, dtype, device, keep)


def _open_vae(path: str | Path) -> tuple[Checkpoint, WanVAE]:
    checkpoint = open_checkpoint(path, "--vae")
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
    checkpoint = open_checkpoint(path, "--t5", rename=t5.official_name)
    model = _on_meta(checkpoint, t5.build_t5)
    _check(checkpoint, t5.t5_shapes(model))
    return checkpoint, model


def inspect_t5(path: str | Path) -> int:
    """Check the header of a T5 file and return the width of its embeddings (4096 in umT5-XXL)."""
    return _open_t5(path)[1].config.d_model


def load_t5(
    path: str | Path, dtype: torch.dtype, device: torch.device | str, fp8: FP8Kind | None = None
) -> UMT5EncoderModel:
    """The T5 encoder in `dtype` on `device`; with `fp8` its linear layers keep their weights as an Fp8Linear does."""
    checkpoint, model = _open_t5(path)
    names = t5.t5_shapes(model)
    layers = use_fp8_(model, dtype, fp8) if fp8 else {}
    return _load(model, checkpoint, names, t5.t5_tensors, dtype, device, partial(fp8_entries, layers))


def _open_clip(path: str | Path) -> tuple[Checkpoint, CLIPVisionModel]:
    checkpoint = open_checkpoint(path, "--clip")
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


_TOKENIZER_REPOSITORY = "google/umt5-xxl"
_TOKENIZER_FILE = "tokenizer.json"


def check_tokenizer(directory: str | Path | None) -> None:
    """Raise ConfigError when `directory` holds no tokenizer. None stands for the hub, which is not asked here."""
    if directory is not None and not (Path(directory) / _TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"--t5_tokenizer {directory}: holds no {_TOKENIZER_FILE}; give the folder of {_TOKENIZER_REPOSITORY}'s"
        )


def load_tokenizer(directory: str | Path | None) -> PreTrainedTokenizerBase:
    """The umT5 tokenizer of a local folder, or from the hub (and its cache) with None.

    tokenizer.json is used as it is: AutoTokenizer of transformers 5 rebuilds tokenizers of class T5Tokenizer and loses
    their Unicode normalisation, which changes the tokens of full-width characters, so of most Chinese prompts.
    """
    check_tokenizer(directory)
    from transformers import PreTrainedTokenizerFast

    file = _hub_tokenizer() if directory is None else Path(directory) / _TOKENIZER_FILE
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        fits = tokenizer("").input_ids == [tokenizer.eos_token_id]
    except Exception:  # the tokenizers package raises bare Exceptions
        fits = False
    if not fits:
        raise ConfigError(f"--t5_tokenizer {file}: is no umT5 tokenizer; use that of {_TOKENIZER_REPOSITORY}")
    return tokenizer


def _hub_tokenizer() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_TOKENIZER_REPOSITORY, _TOKENIZER_FILE))
    except Exception as error:  # no network, a proxy, a missing cache: each library below has its own exceptions
        raise ConfigError(
            f"--t5_tokenizer is missing and the hub cannot be reached ({_one_line(type(error).__name__)}); "
            f"download {_TOKENIZER_FILE} of {_TOKENIZER_REPOSITORY} and give its folder as --t5_tokenizer DIR"
        ) from None
