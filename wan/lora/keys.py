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
from wan.lora.module import DIFFERENCES, DORA, LOHA, LOKR, LORA, REPLACEMENTS, UP_BIAS

if TYPE_CHECKING:
    from wan.lora.module import LoRAModule

DIALECTS = ("musubi", "comfyui", "diffusers", "peft")


LARGEST = 1e9  # numbers beyond are those of a damaged file; the products of four below are finite

# What a key may end with, as a pattern -> our name of the part. PEFT may put the adapter's name in: lora_A.default.
_MAGNITUDE = "lora_magnitude_vector"  # PEFT's DoRA
_ENDINGS = {
    r"lora_(?:A|down)(?:\.[^.]+)?\.weight|lora\.down\.weight": LORA[0],
    r"lora_(?:B|up)(?:\.[^.]+)?\.weight|lora\.up\.weight": LORA[1],
    r"lora_B(?:\.[^.]+)?\.bias": UP_BIAS,
    rf"{_MAGNITUDE}(?:\.[^.]+)?(?:\.weight)?": DORA,
    r"diff|w_norm": "diff",  # *_norm: LyCORIS
    r"diff_b|b_norm": "diff_b",
    **{name: name for name in ("diff_m", "alpha", DORA, *REPLACEMENTS.values(), *LOHA, *LOKR)},
}
_KEYS = [(re.compile(rf"(.+)\.(?:{ending})"), part) for ending, part in _ENDINGS.items()]
# ComfyUI's names of parameters that are not weights, e.g. `blocks.0.modulation.diff`
_OF_PARAMETER = re.compile(r"(.+)\.(bias|modulation)\.(diff|set_weight)")
_PARAMETER_PARTS = {"diff": DIFFERENCES, "set_weight": REPLACEMENTS}
# PEFT's `modules_to_save` and `bias`: new values of a whole module
_SAVED = re.compile(r"(base_model\.model\..+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.(weight|bias)")

# What a module path may begin with -> the tools that write it so. Without any it is DiffSynth-Studio's, too.
_PREFIXES = {
    f"{PREFIX}_": "videox-fun",
    PREFIX: "musubi",
    "lycoris_": "lycoris",
    "pipe.dit.": "diffsynth",
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
}


# Parts that ComfyUI knows by a parameter's name only, and no other tool at all -> what it calls them
_COMFYUI_ONLY = {
    DIFFERENCES["modulation"]: "modulation.diff",
    REPLACEMENTS["bias"]: "bias.set_weight",
    REPLACEMENTS["modulation"]: "modulation.set_weight",
}
_COMFYUI_PARTS = _COMFYUI_ONLY | dict(zip(LORA, ("lora_A.weight", "lora_B.weight"), strict=True))

CONFIG_KEY = "lora_adapter_metadata"  # diffusers' key for the LoraConfig of a file, JSON


# Keys beside those of a DiT: of text encoders, of embeddings in one file with a LoRA, and ComfyUI's note of a size
_FOREIGN = re.compile(r"(lora_te\d*_|text_encoders?(_\d)?\.|bundle_emb\.).+|.+\.reshape_weight")


def is_foreign(key: str) -> bool:
    """Whether a key says nothing about the DiT, so that the rest of the file is whole without it."""
    return _FOREIGN.fullmatch(key) is not None


def read_keys(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], adapter_config: Mapping[str, Any] | None, source: str
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The tensors of a file in any dialect -> which one it is, and tensors by `lora_unet_...` and part.

    adapter_config: of PEFT, from the file beside the weights; diffusers has it in the metadata. Both may hold the
    alphas, which then are parts, too. ConfigErrors start with `source`.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}  # in the file
    dialects, config = set(), _adapter_config(metadata, source) if adapter_config is None else adapter_config
    for key, tensor in tensors.items():
        path, part = _split(key)
        dialect, module = _without_prefix(path)
        known = dotted_name(module.replace(".", "_"))
        if part is None or (dialect is None and known is None):
            raise ConfigError(f"{source}: '{one_line(key)}' is not a key of a Wan LoRA; use a LoRA trained on Wan2.1")
        if part not in _COMFYUI_ONLY:  # in files of musubi-tuner's form, too
            dialects.add(dialect or "unprefixed")
        name = lora_name(known or module)
        names[name], parts = module, modules.setdefault(name, {})
        if part in parts:
            raise ConfigError(f"{source}: '{one_line(key)}' is there twice, under two names; use the original file")
        parts[part] = tensor.reshape(-1, 1) if _MAGNITUDE in key else tensor
    if config is not None:
        _check_config(config, source)
        for name, parts in modules.items():
            _add_configured_alpha(config, names[name], parts, source)
    if not modules:
        raise ConfigError(f"{source}: holds no tensors; use a LoRA file")
    return " and ".join(sorted(dialects)) or "comfyui", modules


def _split(key: str) -> tuple[str, str | None]:
    """`blocks.0.ffn.0.lora_A.weight` -> (`blocks.0.ffn.0`, our name of the part), which is None for other keys."""
    if match := _OF_PARAMETER.fullmatch(key):
        return match[1], _PARAMETER_PARTS[match[3]][match[2]]
    if found := next(((match[1], part) for pattern, part in _KEYS if (match := pattern.fullmatch(key))), None):
        return found
    saved = _SAVED.fullmatch(key)
    return (saved[1], REPLACEMENTS[saved[2]]) if saved else (key, None)


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


# Values of `init_lora_weights` with which PEFT takes something off the base weights, and options with which its layers
# compute something else than a LoRA (peft/tuners/lora/layer.py, variants.py)
_CHANGING_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_OTHER_LAYERS = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "arrow_config",
)


def _check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for adapters whose tensors alone do not tell what they do."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_BASE):
        raise ConfigError(
            f"{source}: init_lora_weights = '{one_line(start)}' changes the base weights as well; save the adapter "
            "as a LoRA, by save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if used := [option for option in _OTHER_LAYERS if config.get(option)]:
        raise ConfigError(f"{source}: {used[0]} makes it more than a LoRA; use an adapter without it")


def _add_configured_alpha(config: Mapping[str, Any], module: str, parts: dict[str, Tensor], source: str) -> None:
    """Add the alpha that a LoraConfig, LoHaConfig or LoKrConfig has for a module, named as in its model, to its parts.

    A LoKr of two full matrices, which PEFT scales as well, gets it into the first. An alpha among the parts stays.
    """
    ranked = next((part for part in (LORA[0], LOHA[1], "lokr_w1_b", "lokr_w2_b") if part in parts), None)
    is_full = {"lokr_w1", "lokr_w2"} <= parts.keys()
    if "alpha" in parts or not (is_full or (ranked and parts[ranked].ndim)):
        return
    try:
        rank = len(parts[ranked]) if ranked else _patterned(config, "rank_pattern", "r", module)
        alpha = _patterned(config, "alpha_pattern", "lora_alpha" if "lora_alpha" in config else "alpha", module)
        if not (abs(alpha) < LARGEST and 0 < rank < LARGEST):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error, RecursionError):
        raise ConfigError(f"{source}: its LoraConfig has no usable lora_alpha; save the adapter again") from None
    if is_full:
        parts["lokr_w1"] = parts["lokr_w1"].float() * (alpha / rank)
    else:  # rsLoRA, arXiv 2312.03732: the scale is alpha / sqrt(rank)
        parts["alpha"] = torch.tensor(alpha * rank**0.5 if config.get("use_rslora") else alpha)


def _patterned(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """The value of the first pattern, a regular expression, that fits an end of the module's name (PEFT's rule)."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default])


def write_keys(
    modules: Mapping[str, "LoRAModule"], dialect: str
) -> tuple[dict[str, Tensor], dict[str, object] | None, list[str]]:
    """Modules by `lora_unet_...` -> tensors of a file in `dialect`, its LoraConfig if it needs one, and what is lost.

    Lossless but for what PEFT cannot express, as the list names it: deltas of norms and modulations. Values are
    changed by nothing else than powers of two. ConfigError for modules that the dialect has no name for.
    """
    if dialect == "musubi":
        tensors = {
            _musubi_key(name, part): tensor for name, module in modules.items() for part, tensor in module.parts.items()
        }
        alphas = {f"{name}.alpha": torch.tensor(module.alpha) for name, module in modules.items() if module.low_rank}
        return tensors | alphas, None, []
    named = {_named(name): module for name, module in modules.items()}
    if dialect == "comfyui":
        tensors = {
            _comfyui_key(name, part): tensor for name, module in named.items() for part, tensor in module.parts.items()
        }
        scaled = {name: module.alpha for name, module in named.items() if module.low_rank and module.scale != 1}
        return tensors | {f"diffusion_model.{name}.alpha": torch.tensor(scaled[name]) for name in scaled}, None, []
    return _write_peft(named, "transformer." if dialect == "diffusers" else "base_model.model.")


def _musubi_key(name: str, part: str) -> str:
    dotted = dotted_name(name) if part in _COMFYUI_ONLY else None
    return f"{name}.{part}" if dotted is None else _comfyui_key(dotted, part)


def _comfyui_key(dotted: str, part: str) -> str:
    """The key under which ComfyUI loads a part of `blocks.0.self_attn.q` and the like."""
    return f"diffusion_model.{dotted}.{_COMFYUI_PARTS.get(part, part)}"


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
    if module.needs_weight:
        raise ConfigError(f"{dotted}: this form has no DoRA and no new weights here; use --to comfyui")
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
