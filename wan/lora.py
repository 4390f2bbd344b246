"""LoRA: layers to train, merging into weights, and the musubi-tuner file format (spec formats.md section 4).

Effective weight: W + multiplier * (alpha / rank) * up @ down (Hu et al. 2021, arXiv 2106.09685). down is [rank, in],
up is [out, rank].
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from utils.errors import ConfigError
from utils.files import require_file, written_whole

_PREFIX = "lora_unet_"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
# Never trained, wherever in a block they appear (the reference's default exclude pattern; a full match).
_EXCLUDED = re.compile(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*")
Modules = dict[str, tuple[Tensor, Tensor, float]]  # `lora_unet_...` -> down [rank, in], up [out, rank], alpha
# Marks of other file formats in their keys, most telling first.
_OTHER_DIALECTS = (
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("dora_scale", "DoRA"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "diffusers"),
    (".lora_A.", "PEFT"),
)


def lora_name(dotted: str) -> str:
    """`blocks.0.self_attn.q` -> `lora_unet_blocks_0_self_attn_q`."""
    return _PREFIX + dotted.replace(".", "_")


def merge_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """weight + scale * up @ down, computed in float32, in the dtype of `weight`; weight [out, in]."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer and the product that training adds to it.

    In train mode the product is computed beside the layer; in eval mode it is merged into the weight for each call, so
    that an image made during training is bit for bit the one that the saved file makes.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator | None):
        super().__init__()
        device, inputs = base.weight.device, base.in_features
        self.base = base
        self.lora_down = nn.utils.skip_init(nn.Linear, inputs, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_up = nn.utils.skip_init(
            nn.Linear, rank, base.out_features, bias=False, device=device, dtype=torch.float32
        )
        # Kaiming uniform with a = sqrt(5) is this bound; drawn on the CPU, so that a seed means the same on any device.
        bound = 1 / math.sqrt(inputs)
        initial = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_down.weight.copy_(initial)
            self.lora_up.weight.zero_()
        self.register_buffer("alpha", torch.tensor(float(alpha), device=device))
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype the frozen layer returns."""
        down, up = self.lora_down.weight, self.lora_up.weight
        if not self.training:
            return F.linear(x, merge_weight(self.base.weight, down, up, self.scale), self.base.bias)
        result = self.base(x)
        low = F.dropout(F.linear(x, down.to(x.dtype)), self.dropout)
        return result + (F.linear(low, up.to(x.dtype)) * self.scale).to(result.dtype)


class LoRANetwork:
    """The LoRA layers of a model under their file names; what is trained and saved."""

    def __init__(self, layers: Mapping[str, LoRALinear]):
        self.layers = dict(layers)  # by dotted name, e.g. `blocks.0.self_attn.q`

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield from (layer.lora_down.weight, layer.lora_up.weight)

    def param_groups(self, lr: float, loraplus_lr_ratio: float = 1.0) -> list[dict]:
        """Optimizer groups; the up weights learn `loraplus_lr_ratio` times faster (LoRA+, arXiv 2402.12354)."""
        if loraplus_lr_ratio == 1:
            return [{"params": list(self.parameters()), "lr": lr}]
        layers = self.layers.values()
        return [
            {"params": [layer.lora_down.weight for layer in layers], "lr": lr},
            {"params": [layer.lora_up.weight for layer in layers], "lr": lr * loraplus_lr_ratio},
        ]

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Detached tensors as in a file; float32 unless `dtype` is given."""
        state = {}
        for dotted, layer in self.layers.items():
            for part, tensor in zip(_PARTS, (layer.lora_down.weight, layer.lora_up.weight, layer.alpha), strict=True):
                state[f"{lora_name(dotted)}.{part}"] = tensor.detach().to(dtype or torch.float32)
        return state

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: str = "LoRA weights") -> None:
        """Take over tensors named as `state_dict` names them; ConfigError as in `load_file`."""
        self._load(_parse(tensors, source), source)

    def load_file(self, lora: "LoRAFile") -> None:
        """Take over the weights of a file. ConfigError, before any changes, unless modules, shapes and alpha agree."""
        self._load(lora.modules, str(lora.path))

    def _load(self, found: Modules, source: str) -> None:
        wanted = {lora_name(dotted): layer for dotted, layer in self.layers.items()}
        missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
        if missing or extra:
            raise ConfigError(
                f"{source}: {len(missing)} of {len(wanted)} modules are missing and {len(extra)} are unknown, "
                f"e.g. {min(missing or extra)}; use a file trained on this model and these modules"
            )
        for name, layer in wanted.items():
            _check_fits(layer, found[name], f"{source}: {name}")
        with torch.no_grad():
            for name, layer in wanted.items():
                layer.lora_down.weight.copy_(found[name][0])
                layer.lora_up.weight.copy_(found[name][1])


def _check_fits(layer: LoRALinear, module: tuple[Tensor, Tensor, float], place: str) -> None:
    down, up, alpha = module
    for found, ours in ((down, layer.lora_down.weight), (up, layer.lora_up.weight)):
        if found.shape != ours.shape:
            raise ConfigError(
                f"{place} is {list(found.shape)} instead of {list(ours.shape)}; "
                f"use --network_dim {len(down)}, or a file trained on this model"
            )
    own = float(layer.alpha)
    if not math.isclose(alpha, own, rel_tol=2**-8):  # a file in bfloat16 has rounded its alpha
        raise ConfigError(f"{place}.alpha is {alpha:g} instead of {own:g}; use --network_alpha {alpha:g}")


def inject_lora_(
    model: nn.Module, rank: int, alpha: float, *, dropout: float = 0.0, generator: torch.Generator | None = None
) -> LoRANetwork:
    """Freeze `model` and put a LoRALinear in place of every linear layer of `model.blocks` but norms and heads.

    12 layers per block in i2v and flf2v, 10 in t2v. dropout: share of the low-rank values set to 0 in train mode.
    generator: CPU generator of the initial down weights. ConfigError for impossible settings.
    """
    if rank < 1:
        raise ConfigError(f"--network_dim {rank}: must be at least 1; try 16")
    if not 0 < alpha < math.inf:
        raise ConfigError(f"--network_alpha {alpha}: must be above 0; try {rank}, which gives scale 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"--network_dropout {dropout}: must be at least 0 and below 1; try 0.1")
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, nn.Linear) and not _EXCLUDED.fullmatch(name):
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(module, rank, alpha, dropout, generator).train(module.training)
            setattr(model.get_submodule(parent), child, layers[name])
    return LoRANetwork(layers)


@dataclass(frozen=True)
class LoRAFile:
    """The content of a LoRA file."""

    path: Path
    modules: Modules
    metadata: dict[str, str]


def read_lora(path: str | Path, flag: str = "--lora_weight") -> LoRAFile:
    """Read a file of musubi-tuner's or kohya's dialect; ConfigError for every other, and for damaged files."""
    path = require_file(path, flag)
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{flag} {path}: is no readable safetensors file ({error}); check or fetch it again"
        ) from None
    return LoRAFile(path, _parse(tensors, f"{flag} {path}"), metadata)


def _parse(tensors: Mapping[str, Tensor], source: str) -> Modules:
    """Keys -> modules, each complete and of matching shapes."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for mark, dialect in _OTHER_DIALECTS:
            if mark in key:
                raise ConfigError(f"{source}: dialect {dialect} is not supported yet; convert it to {_PREFIX}...")
        name, _, part = key.partition(".")
        if not name.startswith(_PREFIX) or part not in _PARTS:
            raise ConfigError(f"{source}: '{key}' is no key of a Wan LoRA; convert it to {_PREFIX}<module>.{_PARTS[0]}")
        parts.setdefault(name, {})[part] = tensor
    if not parts:
        raise ConfigError(f"{source}: holds no tensors; use a LoRA file")
    return {name: _module(found, f"{source}: {name}") for name, found in parts.items()}


def _module(found: Mapping[str, Tensor], place: str) -> tuple[Tensor, Tensor, float]:
    shapes = {part: tuple(tensor.shape) for part, tensor in found.items()}
    match [shapes.get(part, ()) for part in _PARTS]:
        case [(rank, _), (_, width), () | (1,)] if rank == width > 0:
            alpha = float(found["alpha"]) if "alpha" in found else 0.0
            return found[_PARTS[0]], found[_PARTS[1]], alpha or float(rank)  # missing or 0 means scale 1
    raise ConfigError(f"{place} is no pair [rank, in], [out, rank] but {shapes}; use another file")


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
        down, up, _ = lora.modules[name]
        if list(shapes[weight]) != [up.shape[0], down.shape[1]]:
            raise ConfigError(
                f"{lora.path}: {name} is for a weight {[up.shape[0], down.shape[1]]}, the model has "
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
                down, up, alpha = lora.modules[match.weights[weight_name]]
                scale = multiplier * alpha / len(down)
                merged = merge_weight(merged.float(), down.to(weight.device), up.to(weight.device), scale)
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


def save_lora(
    path: str | Path, network: LoRANetwork, metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write the network, whole or not at all, with `metadata` and the two hashes that WebUIs look files up by."""
    tensors = {key: tensor.cpu().contiguous() for key, tensor in network.state_dict(dtype).items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, dict(metadata) | _hashes(tensors, metadata))


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Of the file with its `ss_` metadata alone, so that editing a title keeps them (spec formats.md section 4.3)."""
    content = memoryview(save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}))
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
