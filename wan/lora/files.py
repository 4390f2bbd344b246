"""LoRA, LoHa and LoKr files: reading and writing (docs/formats.md#lora-files)."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.errors import ConfigError
from utils.files import ends_in_zeros, not_downloaded, require_file, written_whole
from utils.text import counted, one_line
from wan.lora.keys import LARGEST, is_foreign, read_keys
from wan.lora.module import DORA, LOHA, LOKR, LORA, REPLACEMENTS, UP_BIAS, LoRAModule

log = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors", "adapter_config.json"  # PEFT's folder
_BESIDE_WEIGHT = ("alpha", UP_BIAS, DORA, "diff_b", "diff_m", *REPLACEMENTS.values())


@dataclass(frozen=True)
class LoRAFile:
    """LoRA, LoHa or LoKr modules as a file holds them, under official names."""

    path: Path
    modules: dict[str, LoRAModule]  # by `lora_unet_...`
    metadata: dict[str, str]
    dialect: str = "musubi"  # of its keys, see wan/lora/keys.py


def require_lora(path: str | Path, flag: str) -> Path:
    """The file of a LoRA or of a folder of PEFT's. Raises ConfigError naming `flag` when there is none."""
    weights = Path(path) / ADAPTER[0]
    return require_file(weights if weights.is_file() else path, flag)


def read_lora(path: str | Path, flag: str = "--lora_weight") -> LoRAFile:
    """Read a file of any dialect (wan/lora/keys.py), or a folder of PEFT's; ConfigError for others."""
    path = require_lora(path, flag)
    source = f"{flag} {path}"
    if other := not_downloaded(path):
        raise ConfigError(f"{source}: {other}")
    if ends_in_zeros(path):
        log.warning("%s: ends in zeros, as a download that broke off; compare its size or checksum", source)
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        config = path.with_name(ADAPTER[1])
        beside = json.loads(config.read_bytes()) if path.name == ADAPTER[0] and config.is_file() else None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{source}: is not a readable safetensors file ({one_line(error)}); check or fetch it again"
        ) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{source}: {ADAPTER[1]} beside it is not JSON; save the adapter again") from None
    own = {key: tensor for key, tensor in tensors.items() if not is_foreign(key)}
    if foreign := sorted(tensors.keys() - own.keys() if own else ()):
        what = f"{counted(len(foreign), 'tensor')} of something else than the DiT, e.g. '{one_line(foreign[0])}'"
        log.warning("%s: %s: left out", source, what)
        tensors = own
    for key, tensor in tensors.items():
        if not (tensor.is_floating_point() and (tensor.float().abs() < LARGEST).all()):
            raise ConfigError(f"{source}: '{one_line(key)}' holds NaN, infinity or whole numbers; use an intact file")
    dialect, parts = read_keys(tensors, metadata, beside, source)
    return LoRAFile(path, _modules(parts, source), metadata, dialect)


def parse_lora(tensors: Mapping[str, Tensor], source: str) -> dict[str, LoRAModule]:
    """Keys -> modules, each complete and of matching shapes. ConfigErrors start with `source`."""
    return _modules(read_keys(tensors, {}, None, source)[1], source)


def _modules(parts: Mapping[str, Mapping[str, Tensor]], source: str) -> dict[str, LoRAModule]:
    counting = {name: _counting(found) for name, found in parts.items()}
    if twice := [name for name, found in counting.items() if len(found) < len(parts[name])]:
        log.warning(
            "%s: holds two kinds of changes for %s, e.g. %s; as in ComfyUI, new weights go before differences, "
            "and these before LoRA, LoHa and LoKr, which are left out",
            source,
            counted(len(twice), "module"),
            one_line(twice[0]),
        )
    return {name: _module(found, f"{source}: {one_line(name)}") for name, found in counting.items()}


def _counting(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a module without those that ComfyUI overwrites: one change per parameter (its comfy/lora.py)."""
    overwritten: set[str] = set()
    if {"diff", REPLACEMENTS["weight"]} & found.keys():
        overwritten = {*LORA, *LOHA, *LOKR, DORA, "alpha"}
    if REPLACEMENTS["weight"] in found:
        overwritten.add("diff")
    return {part: tensor for part, tensor in found.items() if part not in overwritten}


def _module(found: Mapping[str, Tensor], place: str) -> LoRAModule:
    sizes = {part: tuple(tensor.shape) for part, tensor in found.items()}
    try:
        if sizes.get("alpha", ()) not in ((), (1,)):
            raise ValueError
        factors = {part: size for part, size in sizes.items() if part not in _BESIDE_WEIGHT}
        shape, rank = _weight_shape(factors)
        low_rank = not factors.keys() <= {"diff"}
        shape = sizes.get(REPLACEMENTS["weight"], shape)
        if shape is None and not sizes.keys() & {"diff_b", "diff_m", *REPLACEMENTS.values()}:
            raise ValueError
        if DORA in sizes and (not low_rank or not _fits_dora(sizes[DORA], shape)):
            raise ValueError
        if UP_BIAS in sizes and (not rank or "diff_b" in sizes):
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(
            f"{place} is not a LoRA, LoHa, LoKr or difference of a layer but {one_line(sizes)}; use another file"
        ) from None
    alpha = float(found["alpha"]) if "alpha" in found else 0.0
    alpha = alpha or float(rank or 1)  # missing or 0 means scale 1
    parts = {part: tensor for part, tensor in found.items() if part not in ("alpha", UP_BIAS)}
    if rank and UP_BIAS in found:
        bias = found[UP_BIAS]
        parts["diff_b"] = bias if alpha == rank else bias.float() * (alpha / rank)
    return LoRAModule(parts, shape, rank, alpha)


def _fits_dora(norms: tuple[int, ...], weight: tuple[int, ...] | None) -> bool:
    """Whether these are the norms of the rows or of the columns of a weight."""
    if weight is None or not norms:
        return False
    rows, columns = (weight[0],), (1, *weight[1:2])
    return (norms[:1] == rows and set(norms[1:]) <= {1}) or (norms[:2] == columns and set(norms[2:]) <= {1})


def _weight_shape(factors: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...] | None, int | None]:
    """Shape of the weight whose delta these parts make, and their rank. KeyError, ValueError when they make none."""
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
    (out1, in1, rank1), (out2, in2, rank2) = (_kronecker_shape(factors, name) for name in ("lokr_w1", "lokr_w2"))
    if set(factors) - set(LOKR) or (rank1 and rank2 and rank1 != rank2):
        raise ValueError
    return (out1 * out2, in1 * in2), rank1 or rank2


def _product(shapes: Mapping[str, tuple[int, ...]], left: str, right: str) -> tuple[tuple[int, int], int]:
    """Shape and rank of the product of two matrices. KeyError, ValueError when they make none."""
    (out, rank), (other, inputs) = shapes[left], shapes[right]
    if not rank == other > 0:
        raise ValueError
    return (out, inputs), rank


def _kronecker_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int, int | None]:
    """(out, in, rank if it is itself a product) of a Kronecker factor. KeyError, ValueError when there is none."""
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


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, whole or not at all, with `metadata` and the two hashes that WebUIs look files up by.

    Raises OSError when it can't be written, e.g. on a full disk.
    """
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    content = save(tensors, dict(metadata) | _hashes(tensors, metadata))
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Hashes of the file with its `ss_` metadata alone: editing a title keeps them (docs/formats.md#lora-metadata)."""
    content = memoryview(save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}))
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
