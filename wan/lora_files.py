"""LoRA, LoHa and LoKr files: reading, merging into weights, and the musubi-tuner format (spec formats.md section 4)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.errors import ConfigError
from utils.files import require_file, written_whole

_PREFIX = "lora_unet_"
_LORA = ("lora_down.weight", "lora_up.weight")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_PARTS = {*_LORA, *_LOHA, *_LOKR, "alpha"}
# Marks of other file formats in their keys, most telling first.
_OTHER_DIALECTS = (
    ("dora_scale", "DoRA"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "diffusers"),
    (".lora_A.", "PEFT"),
)


def lora_name(dotted: str) -> str:
    """`blocks.0.self_attn.q` -> `lora_unet_blocks_0_self_attn_q`."""
    return _PREFIX + dotted.replace(".", "_")


def weight_change(parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """What the tensors of one module add to its weight: [out, in] float32; differentiable.

    LoRA (arXiv 2106.09685): scale * up @ down. LoHa (arXiv 2108.06098): scale * (w1_a @ w1_b) * (w2_a @ w2_b).
    LoKr (arXiv 2309.14859): scale * kron(w1, w2), either of which may be a product, too.
    """
    parts = {name: tensor.float() for name, tensor in parts.items()}
    if _LORA[0] in parts:
        return scale * (parts["lora_up.weight"] @ parts["lora_down.weight"])
    if _LOHA[0] in parts:
        return scale * ((parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]))
    return scale * torch.kron(*(_kronecker_factor(parts, name) for name in ("lokr_w1", "lokr_w2")))


def _kronecker_factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def add_change(weight: Tensor, change: Tensor) -> Tensor:
    """weight + change, computed in float32, in the dtype of `weight`."""
    return (weight.float() + change).to(weight.dtype)


@dataclass(frozen=True)
class LoRAModule:
    """What a file holds for one linear layer."""

    parts: dict[str, Tensor]  # by the rest of the key, e.g. `lora_down.weight`, without alpha
    shape: tuple[int, int]  # of the weight: out, in
    rank: int | None  # None for a LoKr of two full matrices
    alpha: float

    @property
    def scale(self) -> float:
        """Factor of the product; 1 for a LoKr of two full matrices, as LyCORIS has it."""
        return 1.0 if self.rank is None else self.alpha / self.rank


@dataclass(frozen=True)
class LoRAFile:
    """The content of a file."""

    path: Path
    modules: dict[str, LoRAModule]  # by `lora_unet_...`
    metadata: dict[str, str]


def read_lora(path: str | Path, flag: str = "--lora_weight") -> LoRAFile:
    """Read a file of musubi-tuner's, kohya's or LyCORIS' dialect; ConfigError for others, and for damaged files."""
    path = require_file(path, flag)
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{flag} {path}: is no readable safetensors file ({error}); check or fetch it again"
        ) from None
    return LoRAFile(path, parse_lora(tensors, f"{flag} {path}"), metadata)


def parse_lora(tensors: Mapping[str, Tensor], source: str) -> dict[str, LoRAModule]:
    """Keys -> modules, each complete and of matching shapes. ConfigErrors start with `source`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for mark, dialect in _OTHER_DIALECTS:
            if mark in key:
                raise ConfigError(f"{source}: dialect {dialect} is not supported yet; convert it to {_PREFIX}...")
        name, _, part = key.partition(".")
        if not name.startswith(_PREFIX) or part not in _PARTS:
            raise ConfigError(f"{source}: '{key}' is no key of a Wan LoRA; convert it to {_PREFIX}<module>.{_LORA[0]}")
        parts.setdefault(name, {})[part] = tensor
    if not parts:
        raise ConfigError(f"{source}: holds no tensors; use a LoRA file")
    return {name: _module(found, f"{source}: {name}") for name, found in parts.items()}


def _module(found: Mapping[str, Tensor], place: str) -> LoRAModule:
    shapes = {part: tuple(tensor.shape) for part, tensor in found.items()}
    factors = {part: shape for part, shape in shapes.items() if part != "alpha"}
    try:
        if shapes.get("alpha", ()) not in ((), (1,)):
            raise ValueError
        if not set(factors) - set(_LORA):
            shape, rank = _product(factors, *reversed(_LORA))
        elif not set(factors) - set(_LOHA):
            shape, rank = _product(factors, *_LOHA[:2])
            if _product(factors, *_LOHA[2:]) != (shape, rank):
                raise ValueError
        else:
            (*first, rank1), (*second, rank2) = (_kronecker_shape(factors, name) for name in ("lokr_w1", "lokr_w2"))
            if set(factors) - set(_LOKR) or (rank1 and rank2 and rank1 != rank2):
                raise ValueError
            shape, rank = (first[0] * second[0], first[1] * second[1]), rank1 or rank2
    except (ValueError, KeyError):
        raise ConfigError(
            f"{place} is no LoRA, LoHa or LoKr of a linear layer but {shapes}; use another file"
        ) from None
    alpha = float(found["alpha"]) if "alpha" in found else 0.0
    parts = {part: tensor for part, tensor in found.items() if part != "alpha"}
    return LoRAModule(parts, shape, rank, alpha or float(rank or 1))  # missing or 0 means scale 1


def _product(shapes: Mapping[str, tuple[int, ...]], left: str, right: str) -> tuple[tuple[int, int], int]:
    """Shape and rank of the product of two matrices. KeyError, ValueError."""
    (out, rank), (other, inputs) = shapes[left], shapes[right]
    if not rank == other > 0:
        raise ValueError
    return (out, inputs), rank


def _kronecker_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int, int | None]:
    """out, in, and rank when the factor is itself a product. KeyError, ValueError."""
    pair = [f"{name}_a", f"{name}_b"]
    if name not in shapes:
        (out, inputs), rank = _product(shapes, *pair)
        return out, inputs, rank
    if shapes.keys() & set(pair):
        raise ValueError
    out, inputs = shapes[name]
    return out, inputs, None


@dataclass(frozen=True)
class LoRAMatch:
    """Which modules of a LoRA file belong to which weights of a model."""

    weights: dict[str, str]  # `blocks.0.self_attn.q.weight` -> `lora_unet_blocks_0_self_attn_q`
    unmatched: tuple[str, ...]  # modules of the file that the model lacks


def check_lora(lora: LoRAFile, shapes: Mapping[str, Sequence[int]]) -> LoRAMatch:
    """Match a file with the tensors of a DiT (official names -> shapes), of which a header is enough.

    ConfigError when nothing matches or a shape differs; modules without a counterpart are only reported.
    """
    weights = {
        weight: name
        for weight in shapes
        if weight.endswith(".weight") and (name := lora_name(weight.removesuffix(".weight"))) in lora.modules
    }
    if not weights:
        raise ConfigError(
            f"{lora.path}: none of its {len(lora.modules)} modules is in the model, e.g. {min(lora.modules)}; "
            "use a LoRA trained on this kind of model"
        )
    for weight, name in weights.items():
        if tuple(shapes[weight]) != lora.modules[name].shape:
            raise ConfigError(
                f"{lora.path}: {name} is for a weight {list(lora.modules[name].shape)}, the model has "
                f"{list(shapes[weight])}; use a LoRA trained on a model of this size"
            )
    return LoRAMatch(weights, tuple(sorted(lora.modules.keys() - set(weights.values()))))


class Merger:
    """Merges LoRA files into weights as they are loaded: `merger(name, weight) -> weight`.

    Checked against the tensors of the model at once, before any weights load. Files are added in their order, in
    float32; the sum is rounded once.
    """

    def __init__(self, loras: Sequence[tuple[LoRAFile, float]], shapes: Mapping[str, Sequence[int]]):
        self._loras = [(lora, multiplier, check_lora(lora, shapes)) for lora, multiplier in loras]
        self._merged: set[str] = set()

    def __call__(self, weight_name: str, weight: Tensor) -> Tensor:
        """weight: [out, in] under its official name; returned on its device in its dtype."""
        merged = weight
        for lora, multiplier, match in self._loras:
            if weight_name in match.weights:
                module = lora.modules[match.weights[weight_name]]
                parts = {part: tensor.to(weight.device) for part, tensor in module.parts.items()}
                merged = add_change(merged.float(), weight_change(parts, multiplier * module.scale))
                self._merged.add(weight_name)
        return merged.to(weight.dtype)

    def report(self) -> list[str]:
        """One line per file: how many of its modules were merged so far, and how many the model lacks."""
        lines = []
        for lora, multiplier, match in self._loras:
            done = len(self._merged & match.weights.keys())
            line = f"{lora.path.name} x {multiplier:g}: merged {done} of {len(lora.modules)} modules"
            if match.unmatched:
                line += f"; not in this model: {len(match.unmatched)}, e.g. {match.unmatched[0]}"
            lines.append(line)
        return lines


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, whole or not at all, with `metadata` and the two hashes that WebUIs look files up by.

    Raises OSError when it can't be written, e.g. on a full disk.
    """
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    content = save(tensors, dict(metadata) | _hashes(tensors, metadata))
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Of the file with its `ss_` metadata alone, so that editing a title keeps them (spec formats.md section 4.3)."""
    content = memoryview(save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}))
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
