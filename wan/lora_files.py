"""LoRA, LoHa and LoKr files: reading, merging into weights, writing (docs/formats.md#lora-files)."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.errors import ConfigError
from utils.files import require_file, written_whole
from wan.lora_dialects import DIFFERENCES, LARGEST, LOHA, LOKR, LORA, UP_BIAS, lora_name, read_keys, shown
from wan.one_frame import OneFrameLayout
from wan.one_frame import parse as parse_layout

ADAPTER = "adapter_model.safetensors", "adapter_config.json"  # PEFT's folder
_BESIDE_WEIGHT = ("alpha", UP_BIAS, "diff_b", "diff_m")


def weight_change(parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """What the tensors of one module add to its weight: [out, in] float32; differentiable.

    Of a convolution `in` stands for input channels times kernel.
    LoRA (arXiv 2106.09685): scale * up @ down. LoHa (arXiv 2108.06098): scale * (w1_a @ w1_b) * (w2_a @ w2_b).
    LoKr (arXiv 2309.14859): scale * kron(w1, w2), either of which may be a product, too.
    """
    parts = {name: tensor.float() for name, tensor in parts.items()}
    if LORA[0] in parts:
        return scale * (parts[LORA[1]].flatten(1) @ parts[LORA[0]].flatten(1))
    if LOHA[0] in parts:
        return scale * ((parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]))
    return scale * torch.kron(*(_kronecker_factor(parts, name) for name in ("lokr_w1", "lokr_w2")))


def _kronecker_factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def add_change(weight: Tensor, change: Tensor) -> Tensor:
    """weight + change, computed in float32, in the dtype of `weight`."""
    return (weight.float() + change).to(weight.dtype)


@dataclass(frozen=True)
class LoRAModule:
    """What a file holds for one module: of its weight, and in distilled LoRAs of its bias and modulation, too."""

    parts: dict[str, Tensor]  # by the rest of the key, e.g. `lora_down.weight` or `diff_b`, without alpha
    shape: tuple[int, ...] | None  # of the weight; None when only others are changed
    rank: int | None  # None for a LoKr of two full matrices, and for a plain difference
    alpha: float

    @property
    def scale(self) -> float:
        """Factor of the product; 1 for a LoKr of two full matrices, as LyCORIS has it."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def low_rank(self) -> bool:
        """Whether alpha means something."""
        return not self.parts.keys() <= {*DIFFERENCES.values()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that changes: `weight`, `bias`, `modulation`."""
        shapes = {leaf: tuple(self.parts[part].shape) for leaf, part in DIFFERENCES.items() if part in self.parts}
        return shapes | ({"weight": self.shape} if self.shape else {})

    def norm(self) -> float:
        """Frobenius norm of the change of the weight."""
        if LORA[0] not in self.parts:
            return float(self.change().norm()) if self.shape else 0.0
        # |up @ down|^2 is the sum of the products of two rank x rank matrices, so that no [out, in] is formed.
        down, up = (self.parts[part].double().flatten(1) for part in LORA)
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def change(self, leaf: str = "weight", multiplier: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """What is added to one of the parameters in `shapes`: float32, on `device`."""
        if DIFFERENCES[leaf] in self.parts:
            return multiplier * self.parts[DIFFERENCES[leaf]].to(device).float()
        parts = {part: tensor.to(device) for part, tensor in self.parts.items() if part not in DIFFERENCES.values()}
        return weight_change(parts, multiplier * self.scale).reshape(self.shape)


@dataclass(frozen=True)
class LoRAFile:
    """The content of a file."""

    path: Path
    modules: dict[str, LoRAModule]  # by `lora_unet_...`
    metadata: dict[str, str]
    dialect: str = "musubi"  # what its keys are like


def read_lora(path: str | Path, flag: str = "--lora_weight") -> LoRAFile:
    """Read a file of any dialect (wan/lora_dialects.py), or a folder of PEFT's; ConfigError for others."""
    path = Path(path)
    path = require_file(path / ADAPTER[0] if (path / ADAPTER[0]).is_file() else path, flag)
    source = f"{flag} {path}"
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        config = path.with_name(ADAPTER[1])
        beside = json.loads(config.read_bytes()) if path.name == ADAPTER[0] and config.is_file() else None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{source}: is no readable safetensors file ({shown(error)}); check or fetch it again"
        ) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{source}: {ADAPTER[1]} beside it is no JSON; save the adapter again") from None
    for key, tensor in tensors.items():
        if not (tensor.is_floating_point() and (tensor.float().abs() < LARGEST).all()):
            raise ConfigError(f"{source}: '{shown(key)}' holds NaN, infinity or whole numbers; use an intact file")
    dialect, parts = read_keys(tensors, metadata, beside, source)
    return LoRAFile(path, _modules(parts, source), metadata, dialect)


def parse_lora(tensors: Mapping[str, Tensor], source: str) -> dict[str, LoRAModule]:
    """Keys -> modules, each complete and of matching shapes. ConfigErrors start with `source`."""
    return _modules(read_keys(tensors, {}, None, source)[1], source)


def _modules(parts: Mapping[str, Mapping[str, Tensor]], source: str) -> dict[str, LoRAModule]:
    return {name: _module(found, f"{source}: {shown(name)}") for name, found in parts.items()}


def _module(found: Mapping[str, Tensor], place: str) -> LoRAModule:
    sizes = {part: tuple(tensor.shape) for part, tensor in found.items()}
    try:
        if sizes.get("alpha", ()) not in ((), (1,)):
            raise ValueError
        shape, rank = _weight_shape({part: size for part, size in sizes.items() if part not in _BESIDE_WEIGHT})
        if shape is None and not sizes.keys() & {"diff_b", "diff_m"}:
            raise ValueError
        if UP_BIAS in sizes and (rank is None or "diff_b" in sizes):
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(
            f"{place} is no LoRA, LoHa, LoKr or difference of a layer but {shown(sizes)}; use another file"
        ) from None
    alpha = float(found["alpha"]) if "alpha" in found else 0.0
    alpha = alpha or float(rank or 1)  # missing or 0 means scale 1
    parts = {part: tensor for part, tensor in found.items() if part not in ("alpha", UP_BIAS)}
    if UP_BIAS in found:
        bias = found[UP_BIAS]
        parts["diff_b"] = bias if alpha == rank else bias.float() * (alpha / rank)
    return LoRAModule(parts, shape, rank, alpha)


def _weight_shape(factors: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...] | None, int | None]:
    """Shape of the weight that these parts change, and their rank. KeyError, ValueError."""
    if factors.keys() <= {"diff"}:
        return factors.get("diff"), None
    if factors.keys() <= {*LORA}:
        (rank, *inputs), (out, *ones) = factors[LORA[0]], factors[LORA[1]]  # of a convolution with its kernel behind
        if ones != [rank, *[1] * (len(inputs) - 1)] or not inputs or not rank:
            raise ValueError
        return (out, *inputs), rank
    if factors.keys() <= {*LOHA}:
        first, second = _product(factors, *LOHA[:2]), _product(factors, *LOHA[2:])
        if first != second:
            raise ValueError
        return first
    (*first, rank1), (*second, rank2) = (_kronecker_shape(factors, name) for name in ("lokr_w1", "lokr_w2"))
    if set(factors) - set(LOKR) or (rank1 and rank2 and rank1 != rank2):
        raise ValueError
    return (first[0] * second[0], first[1] * second[1]), rank1 or rank2


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


def choose_modules(file: LoRAFile, include: str | None, exclude: str | None) -> LoRAFile:
    """The file with the modules in whose name `include` is found and `exclude` is not (regular expressions or None).

    Names are those in the file, e.g. `lora_unet_blocks_9_cross_attn_k`. ConfigError when nothing is left.
    """
    chosen = {
        name: module
        for name, module in file.modules.items()
        if (include is None or re.search(include, name)) and not (exclude is not None and re.search(exclude, name))
    }
    if not chosen:
        raise ConfigError(
            f"{file.path}: --include_patterns {include} --exclude_patterns {exclude} leave no module of it"
        )
    return replace(file, modules=chosen)


@dataclass(frozen=True)
class LoRAMatch:
    """Which modules of a LoRA file belong to which parameters of a model."""

    weights: dict[str, str]  # `blocks.0.self_attn.q.weight` -> `lora_unet_blocks_0_self_attn_q`
    unmatched: tuple[str, ...]  # modules of the file of which the model lacks all, or `<module>.bias` and the like


def check_lora(lora: LoRAFile, shapes: Mapping[str, Sequence[int]]) -> LoRAMatch:
    """Match a file with the tensors of a DiT (official names -> shapes), of which a header is enough.

    ConfigError when nothing matches or a shape differs; modules without a counterpart are only reported. So is the
    first layer of a LoRA for T2V, whose fewer input channels don't keep the rest of it from working on I2V.
    """
    weights, missing = {}, {(name, leaf) for name, module in lora.modules.items() for leaf in module.shapes}
    for weight in shapes:
        parent, _, leaf = weight.rpartition(".")
        if (lora_name(parent), leaf) in missing and not _other_inputs(parent, leaf, shapes[weight], lora):
            weights[weight] = lora_name(parent)
            missing.remove((lora_name(parent), leaf))
    if not weights:
        raise ConfigError(
            f"{lora.path}: none of its {len(lora.modules)} modules is in the model, e.g. {shown(min(lora.modules))}; "
            "use a LoRA trained on this kind of model"
        )
    for weight, name in weights.items():
        wanted = lora.modules[name].shapes[weight.rpartition(".")[2]]
        if tuple(shapes[weight]) != wanted:
            raise ConfigError(
                f"{lora.path}: {name} is for a weight {list(wanted)}, the model has {list(shapes[weight])}; "
                "use a LoRA trained on a model of this size"
            )
    matched = set(weights.values())
    return LoRAMatch(weights, tuple(sorted({f"{name}.{leaf}" if name in matched else name for name, leaf in missing})))


def _other_inputs(parent: str, leaf: str, shape: Sequence[int], lora: LoRAFile) -> bool:
    found = lora.modules[lora_name(parent)].shapes[leaf]
    return f"{parent}.{leaf}" == "patch_embedding.weight" and found[:1] == shape[:1] and found[1:2] != shape[1:2]


class Merger:
    """Merges LoRA files into weights as they are loaded: `merger(name, weight) -> weight`.

    Checked against the tensors of the model at once, before any weights load. Files are added in their order, in
    float32; the sum is rounded once.
    """

    def __init__(self, loras: Sequence[tuple[LoRAFile, float]], shapes: Mapping[str, Sequence[int]]):
        self._loras = [(lora, multiplier, check_lora(lora, shapes)) for lora, multiplier in loras]
        self._merged: set[str] = set()
        self._squares = [[0.0, 0.0] for _ in loras]  # per file: of all changes, and of what they were added to

    @property
    def names(self) -> list[str]:
        """Official names of the weights that are changed, whatever the multipliers."""
        return list(dict.fromkeys(name for _, _, match in self._loras for name in match.weights))

    def __call__(self, weight_name: str, weight: Tensor) -> Tensor:
        """weight: [out, in] under its official name, or a bias etc.; returned on its device in its dtype."""
        merged, before = weight, None
        for (lora, multiplier, match), squares in zip(self._loras, self._squares, strict=True):
            if weight_name in match.weights:
                module, leaf = lora.modules[match.weights[weight_name]], weight_name.rpartition(".")[2]
                change = module.change(leaf, multiplier, weight.device)
                merged = merged.float()
                before = float(merged.norm()) if before is None else before
                squares[0] += float(change.norm()) ** 2
                squares[1] += before**2
                merged = add_change(merged, change)
                self._merged.add(weight_name)
        return merged.to(weight.dtype)

    def report(self) -> list[str]:
        """One line per file: how many of its modules were merged so far, how many the model lacks, how much it changes.

        ||dW||/||W|| is over all tensors that the file changes, and W what they were without any of the files.
        """
        lines = []
        for (lora, multiplier, match), (change, before) in zip(self._loras, self._squares, strict=True):
            done = len({match.weights[name] for name in self._merged & match.weights.keys()})
            line = f"{lora.path.name} x {multiplier:g}: merged {done} of {len(lora.modules)} modules"
            if before:
                line += f", ||dW||/||W|| = {(change / before) ** 0.5:.2g}"
            if match.unmatched:
                line += f"; not in this model: {len(match.unmatched)}, e.g. {shown(match.unmatched[0])}"
            lines.append(line)
        return lines


def layout_from_metadata(metadata: Mapping[str, str]) -> OneFrameLayout | None:
    """The time indices that a LoRA was trained at; None when its file does not tell. ConfigError for other text.

    With `--one_frame_legacy_indices` those are 0 ... F-1 in the order of the ones that were asked for.
    """
    text = metadata.get("ss_one_frame")
    if text is None:
        return None
    try:
        layout = parse_layout(text)
    except ConfigError as error:
        raise ConfigError(f"ss_one_frame = '{shown(text)}': {shown(error)}; give the indices yourself") from None
    if metadata.get("ss_one_frame_legacy_indices") != "True":
        return layout
    places = {index: place for place, index in enumerate(layout.frame_indices)}
    controls = tuple(places[index] for index in layout.control_indices)
    return replace(layout, control_indices=controls, target_index=places[layout.target_index])


def size_from_metadata(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Width and height in pixels that a LoRA was trained at; None when its file does not tell. ConfigError as above."""
    text = metadata.get("ss_one_frame_size")
    if text is None:
        return None
    size = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if size is None or min(map(int, size.groups())) < 16:
        raise ConfigError(f"ss_one_frame_size = '{shown(text)}': must be like 832x480; give --video_size yourself")
    return int(size[1]), int(size[2])


@dataclass(frozen=True)
class TrainedFor:
    """What LoRA files say that they were trained for; None where none says it or they differ."""

    layout: OneFrameLayout | None
    size: tuple[int, int] | None  # width and height in pixels


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, whole or not at all, with `metadata` and the two hashes that WebUIs look files up by.

    Raises OSError when it can't be written, e.g. on a full disk.
    """
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    content = save(tensors, dict(metadata) | _hashes(tensors, metadata))
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Of the file with its `ss_` metadata alone, so that editing a title keeps them (docs/formats.md#lora-metadata)."""
    content = memoryview(save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}))
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
