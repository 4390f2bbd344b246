"""LoRA key names of other tools <-> ours, in both directions (docs/formats.md#lora-dialects).

Ours are musubi-tuner's: `lora_unet_<module with underscores>.<part>`. Modules have their official names
(`blocks.0.self_attn.q`) or diffusers' (`blocks.0.attn1.to_q`, see its scripts/convert_wan_to_diffusers.py).
"""

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.text import one_line
from wan.files.dit_names import PREFIX, diffusers_name, dotted_name, lora_name
from wan.lora.module import LOHA, LOKR, LORA, UP_BIAS

if TYPE_CHECKING:
    from wan.lora.module import LoRAModule

DIALECTS = ("musubi", "comfyui", "diffusers", "peft")


LARGEST = 1e9  # numbers beyond are those of a damaged file; the products of four below are finite

# What a key may end with, as a pattern -> our name of the part. PEFT may put the adapter's name in: lora_A.default.
_ENDINGS = {
    r"lora_(?:A|down)(?:\.[^.]+)?\.weight|lora\.down\.weight": LORA[0],
    r"lora_(?:B|up)(?:\.[^.]+)?\.weight|lora\.up\.weight": LORA[1],
    r"lora_B(?:\.[^.]+)?\.bias": UP_BIAS,
    r"diff|w_norm": "diff",  # *_norm: LyCORIS
    r"diff_b|b_norm": "diff_b",
    **{name: name for name in ("diff_m", "alpha", *LOHA, *LOKR)},
}
_KEYS = [(re.compile(rf"(.+)\.(?:{ending})"), part) for ending, part in _ENDINGS.items()]
_DORA = ("dora_scale", "lora_magnitude_vector")

# What a module path may begin with -> the tools that write it so. Without any it is DiffSynth-Studio's.
_PREFIXES = {
    PREFIX: "musubi",
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
}


CONFIG_KEY = "lora_adapter_metadata"  # diffusers' key for the LoraConfig of a file, JSON


def read_keys(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], adapter_config: Mapping[str, Any] | None, source: str
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The tensors of a file in any dialect -> which one it is, and tensors by `lora_unet_...` and part.

    adapter_config: of PEFT, from the file beside the weights; diffusers has it in the metadata. Both may hold the
    alphas, which then are parts, too. ConfigErrors start with `source`.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    dialects, config = set(), _adapter_config(metadata, source) if adapter_config is None else adapter_config
    for key, tensor in tensors.items():
        if any(mark in key for mark in _DORA):
            raise ConfigError(f"{source}: '{one_line(key)}': DoRA is not supported; use a LoRA, LoHa or LoKr")
        path, part = next(((m[1], part) for pattern, part in _KEYS if (m := pattern.fullmatch(key))), (key, None))
        dialect, module = _without_prefix(path)
        known = dotted_name(module.replace(".", "_"))
        if part is None or (dialect is None and known is None):
            raise ConfigError(f"{source}: '{one_line(key)}' is not a key of a Wan LoRA; use a LoRA trained on Wan2.1")
        dialects.add(dialect or "unprefixed")
        parts = modules.setdefault(lora_name(known or module), {})
        if part in parts:
            raise ConfigError(f"{source}: '{one_line(key)}' is there twice, under two names; use the original file")
        parts[part] = tensor
        if part == LORA[0] and config is not None and tensor.ndim:
            alphas[lora_name(known or module)] = _configured_alpha(config, module, len(tensor), source)
    for name, alpha in alphas.items():
        modules[name].setdefault("alpha", torch.tensor(alpha))
    if not modules:
        raise ConfigError(f"{source}: holds no tensors; use a LoRA file")
    return " and ".join(sorted(dialects)), modules


def _without_prefix(path: str) -> tuple[str | None, str]:
    """`base_model.model.transformer.x` -> (`peft`, `x`): the outermost prefix names the dialect."""
    dialect = None
    while prefix := next((prefix for prefix in _PREFIXES if path.startswith(prefix)), None):
        dialect, path = dialect or _PREFIXES[prefix], path.removeprefix(prefix)
    return dialect, path


def _adapter_config(metadata: Mapping[str, str], source: str) -> dict[str, Any] | None:
    """diffusers' LoraConfig, whose keys begin with the model's name: `transformer.r`."""
    if CONFIG_KEY not in metadata:
        return None
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(metadata[CONFIG_KEY]).items()}
    except (ValueError, AttributeError, RecursionError):
        raise ConfigError(f"{source}: its metadata '{CONFIG_KEY}' is not a JSON object; save the file again") from None


def _configured_alpha(config: Mapping[str, Any], module: str, rank: int, source: str) -> float:
    """The alpha of a module of this rank according to a LoraConfig, whose patterns are ends of module names."""
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        ends = {key.removeprefix("^").replace("\\", ""): value for key, value in patterns}
        fitting = [value for end, value in ends.items() if f".{module}".endswith(f".{end}")]
        alpha = float(fitting[0] if fitting else config["lora_alpha"])
        if not abs(alpha) < LARGEST:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise ConfigError(f"{source}: its LoraConfig has no usable lora_alpha; save the adapter again") from None
    return alpha * rank**0.5 if config.get("use_rslora") else alpha  # arXiv 2312.03732: the scale is alpha / sqrt(rank)


def write_keys(
    modules: Mapping[str, "LoRAModule"], dialect: str
) -> tuple[dict[str, Tensor], dict[str, object] | None, list[str]]:
    """Modules by `lora_unet_...` -> tensors of a file in `dialect`, its LoraConfig if it needs one, and what is lost.

    Lossless but for what PEFT cannot express, as the list names it: deltas of norms and modulations. Values are
    changed by nothing else than powers of two. ConfigError for modules that the dialect has no name for.
    """
    if dialect == "musubi":
        tensors = {
            f"{name}.{part}": tensor for name, module in modules.items() for part, tensor in module.parts.items()
        }
        alphas = {f"{name}.alpha": torch.tensor(module.alpha) for name, module in modules.items() if module.low_rank}
        return tensors | alphas, None, []
    named = {_named(name): module for name, module in modules.items()}
    if dialect == "comfyui":
        parts = dict(zip(LORA, ("lora_A.weight", "lora_B.weight"), strict=True))
        tensors = {
            f"diffusion_model.{name}.{parts.get(part, part)}": tensor
            for name, module in named.items()
            for part, tensor in module.parts.items()
        }
        scaled = {name: module.alpha for name, module in named.items() if module.low_rank and module.scale != 1}
        return tensors | {f"diffusion_model.{name}.alpha": torch.tensor(scaled[name]) for name in scaled}, None, []
    return _write_peft(named, "transformer." if dialect == "diffusers" else "base_model.model.")


def _named(name: str) -> str:
    dotted = dotted_name(name)
    if dotted is None:
        raise ConfigError(
            f"{one_line(name)}: is not a module of Wan2.1, so only the form 'musubi' can name it; use --to musubi"
        )
    return dotted


def _write_peft(
    modules: Mapping[str, "LoRAModule"], prefix: str
) -> tuple[dict[str, Tensor], dict[str, object] | None, list[str]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    lost: list[str] = []
    for dotted, module in modules.items():
        pair, scale, left = _pair(dotted, module)
        lost += [f"{dotted}.{part}" for part in left]
        if pair is None:
            continue
        name, bias = str(diffusers_name(dotted)), module.parts.get("diff_b")
        ranks[name] = len(pair[0])
        alphas[name] = ranks[name] if scale == 1 else module.alpha
        tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"] = pair
        if bias is not None:
            tensors[f"{prefix}{name}.lora_B.bias"] = bias if scale == 1 else bias.float() / scale
    config = {
        "peft_type": "LORA",
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(alphas.values(), default=1),
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != max(ranks.values())},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items() if alpha != max(alphas.values())},
        "target_modules": sorted(ranks),
        "lora_bias": any(key.endswith(".bias") for key in tensors),
    }
    return tensors, config if prefix != "transformer." or ranks != alphas else None, lost


def _pair(dotted: str, module: "LoRAModule") -> tuple[tuple[Tensor, Tensor] | None, float, list[str]]:
    """(down, up) of one module, what their product is to be scaled by (1 where possible), and the parts left out.

    A full difference of a weight becomes a product with the identity.
    """
    parts = module.parts
    if parts.keys() & {*LOHA, *LOKR}:
        raise ConfigError(f"{dotted}: this form has no LoHa and LoKr; make it a LoRA by 'wan_lora.py resize' first")
    pair, scale = None, 1.0
    if module.pair is not None:
        (down, up), scale = module.pair, module.scale
        folded = up * scale
        if math.frexp(scale)[0] == 0.5 and torch.equal(folded / scale, up):  # a power of two: nothing is rounded
            up, scale = folded, 1.0
        pair = down, up
    elif "diff" in parts and parts["diff"].ndim > 1:
        weight = parts["diff"]
        out, inputs, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
        if kernel or out <= inputs:
            pair = weight, torch.eye(out, dtype=weight.dtype).reshape(out, out, *[1] * len(kernel))
        else:
            pair = torch.eye(inputs, dtype=weight.dtype), weight
    carried = {*LORA, "diff_b", "diff"} if pair else set()
    return pair, scale, [part for part, tensor in parts.items() if part not in carried and tensor.any()]
