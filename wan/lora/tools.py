"""The commands of wan_lora.py: convert, inspect, merge, extract, resize. Worked examples: docs/interop.md"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import ConfigError
from utils.files import require_writable_dir, unusable_name, written_whole
from utils.text import counted, one_line
from wan.files.dit_names import dotted_name, lora_name
from wan.files.formats import Checkpoint
from wan.files.load import open_dit
from wan.lora.files import ADAPTER, read_lora, write_lora
from wan.lora.keys import CONFIG_KEY, write_keys
from wan.lora.module import DIFFERENCES, DORA, LOHA, LOKR, LORA, REPLACEMENTS, LoRAModule, rank_metadata
from wan.lora.trained_for import layout_from_metadata

log = logging.getLogger(__name__)


def convert(source: Path, out: Path, dialect: str) -> None:
    """Write the LoRA `source` in another dialect; for PEFT `out` is a folder. Tells what could not be carried over."""
    check_out(out, dialect)
    lora = read_lora(source, "SOURCE")
    save_modules(out, lora.modules, _with_ranks(lora.metadata, lora.modules), dialect)


def merge(sources: Sequence[Path], multipliers: Sequence[float], out: Path) -> None:
    """One LoRA that adds the deltas of several: their ranks side by side, float32. Missing multipliers are 1.

    ConfigError for LoHa and LoKr and for files that don't fit each other.
    """
    if len(multipliers) > len(sources):
        raise ConfigError(
            f"--multiplier: {counted(len(multipliers), 'number')} for {counted(len(sources), 'file')}; give one each"
        )
    check_out(out)
    multipliers = (*multipliers, *[1.0] * (len(sources) - len(multipliers)))
    if not all(map(math.isfinite, multipliers)):
        raise ConfigError(f"--multiplier {' '.join(map(str, multipliers))}: must be numbers; try 1")
    loras = [read_lora(path, "LORA") for path in sources]
    found: dict[str, list[tuple[LoRAModule, float]]] = {}
    for lora, multiplier in zip(loras, multipliers, strict=True):
        for name, module in lora.modules.items():
            _check_alone(module, f"{lora.path}: {name}")
            if not module.parts.keys() <= {*LORA, *DIFFERENCES.values()}:
                raise ConfigError(
                    f"{lora.path}: {name} is a LoHa or LoKr; make it a LoRA by 'wan_lora.py resize' first"
                )
            before = [other.shapes for other, _ in found.get(name, ())]
            if any(size != other.get(leaf, size) for other in before for leaf, size in module.shapes.items()):
                raise ConfigError(
                    f"{lora.path}: {name} is of another size than in the files before; use one base model"
                )
            found.setdefault(name, []).append((module, multiplier))
    modules = {name: _sum(pairs) for name, pairs in found.items()}
    kept = dict(set.intersection(*(set(lora.metadata.items()) for lora in loras)))
    indices = {lora.metadata.get("ss_one_frame") for lora in loras}
    if len(indices) > 1:
        log.warning(
            "the files were trained at different indices (%s); none are stored", " and ".join(map(str, indices))
        )
    names = json.dumps([[lora.path.name, multiplier] for lora, multiplier in zip(loras, multipliers, strict=True)])
    save_modules(out, modules, _with_ranks(kept, modules) | {"ss_merged_from": names})


def _sum(pairs: Iterable[tuple[LoRAModule, float]]) -> LoRAModule:
    """One module that adds the deltas of several, each times its multiplier."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    differences: dict[str, Tensor] = {}
    shape: tuple[int, ...] | None = None
    for module, multiplier in pairs:
        shape = shape or module.shape
        if module.pair is not None:
            down, up = module.pair
            downs.append(down.float())
            ups.append(up.float() * (multiplier * module.scale))
        for part in DIFFERENCES.values() & module.parts.keys():
            before = differences.get(part, torch.zeros(()))
            differences[part] = before + multiplier * module.parts[part].float()
    if not downs:
        return _module(differences, shape)
    if "diff" not in differences:
        return _module(differences, shape, (torch.cat(downs), torch.cat(ups, 1)))
    # A difference swallows the products: no rank is left to speak of.
    low = torch.cat(ups, 1).flatten(1) @ torch.cat(downs).flatten(1)
    return _module(differences | {"diff": differences["diff"] + low.reshape(differences["diff"].shape)}, shape)


def resize(source: Path, out: Path, rank: int, device: torch.device | str = "cpu") -> None:
    """The best approximation of another rank, module by module; LoHa and LoKr become LoRA. float32.

    A rank that is no smaller than that of a module leaves the module as it is. Differences are kept.
    """
    _check_rank(rank)
    check_out(out)
    lora, modules, kept = read_lora(source, "SOURCE"), dict[str, LoRAModule](), dict[str, float]()
    for name, module in lora.modules.items():
        if module.low_rank:
            _check_alone(module, f"{lora.path}: {name}")
    for name, module in tqdm(lora.modules.items(), desc="resizing", disable=None):
        differences = {part: tensor for part, tensor in module.parts.items() if part in DIFFERENCES.values()}
        if not module.low_rank or (module.pair is not None and len(module.pair[0]) <= rank):
            modules[name] = module
            continue
        pair, kept[name] = _low_rank(module, rank, device)
        modules[name] = _module(differences, module.shape, pair)
    if kept:
        worst = min(kept, key=lambda name: kept[name])
        mean = sum(kept.values()) / len(kept)
        log.info(
            "on average %.1f %% of each change is kept, at least %.1f %% (%s)", 100 * mean, 100 * kept[worst], worst
        )
    metadata = {key: value for key, value in lora.metadata.items() if key != "ss_network_args"}  # those of LoHa, LoKr
    save_modules(out, modules, _with_ranks(metadata, modules))


def _low_rank(module: LoRAModule, rank: int, device: torch.device | str) -> tuple[tuple[Tensor, Tensor], float]:
    """The pair (down [rank, in ...], up [out, rank ...]) nearest to the delta of a weight, and its share of the norm.

    The singular values of up @ down are those of a rank x rank matrix, so that no [out, in] is formed (QR of both).
    """
    if module.pair is None:
        delta = module.delta(device=device)
        down, up = truncated(delta, rank)
        return (down.cpu(), up.cpu()), _product_norm(down) / max(float(delta.norm()), 1e-30)
    shape = module.shapes["weight"]
    down, up = (matrix.to(device).float().flatten(1) for matrix in module.pair)
    left, left_small = torch.linalg.qr(up * module.scale)
    right, right_small = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
    root = s[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]) @ right.T, left @ (u[:, :rank] * root)
    kept = float(s[:rank].norm() / s.norm().clamp(min=1e-30))
    ones = [1] * len(shape[2:])
    return (down.reshape(-1, *shape[1:]).cpu(), up.reshape(*up.shape, *ones).cpu()), kept


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down [rank, in], up [out, rank]), whose product is near the best approximation of `matrix` [out, in].

    Randomised SVD (arXiv 0909.4061), the same numbers at every call: of the large matrices of a 14B model the exact one
    takes minutes each.
    """
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T, u[:, :rank] * root


def _product_norm(down: Tensor) -> float:
    """Norm of the product of a pair that `truncated` made: each row of `down` is the root of a singular value long."""
    return float(down.square().sum(1).norm())


def extract(base: Path, tuned: Path, out: Path, rank: int, device: torch.device | str = "cpu") -> None:
    """A LoRA of the difference of two DiT checkpoints, float32. Matrix by matrix: two of them are in memory at a time.

    Biases, norms and the like become differences. ConfigError unless both are the same kind of model and differ.
    """
    _check_rank(rank)
    check_out(out)
    first, second = _open(base, "BASE"), _open(tuned, "TUNED")
    if first.shapes != second.shapes:
        name = min(first.shapes.items() ^ second.shapes.items())[0]
        raise ConfigError(
            f"TUNED {tuned}: is another kind of model than BASE, e.g. in {one_line(name)}; use a tuned BASE"
        )
    found: dict[str, list[LoRAModule]] = {}
    kept, whole, left = 0.0, 0.0, list[str]()
    for name in tqdm(first.shapes, desc="extracting", disable=None):
        delta = second.read(name, device).float() - first.read(name, device).float()
        dotted, _, leaf = name.rpartition(".")
        if not delta.isfinite().all():
            raise ConfigError(f"TUNED {tuned}: {one_line(name)} differs by NaN or infinity; use intact checkpoints")
        if not delta.any():
            continue
        if leaf not in DIFFERENCES:
            left.append(name)
            continue
        shape = tuple(first.shapes[name]) if leaf == "weight" else None
        if leaf == "weight" and delta.ndim == 2:
            down, up = truncated(delta, rank)
            kept, whole = kept + _product_norm(down) ** 2, whole + float(delta.norm()) ** 2
            module = _module({}, shape, (down.cpu(), up.cpu()))
        else:
            module = _module({DIFFERENCES[leaf]: delta.cpu()}, shape)
        found.setdefault(lora_name(dotted), []).append(module)
    if not found:
        raise ConfigError(f"TUNED {tuned}: equals BASE in all that a LoRA can carry; use a checkpoint trained further")
    if whole:
        log.info("rank %d keeps %.1f %% of the difference of the matrices", rank, 100 * (kept / whole) ** 0.5)
    if left:
        log.warning("no LoRA can carry %s, which differs as well; it is left out", ", ".join(left))
    modules = {name: _sum((module, 1.0) for module in parts) for name, parts in found.items()}
    metadata = {"ss_base_model_version": "wan", "ss_extracted_from": json.dumps([base.name, tuned.name])}
    save_modules(out, modules, _with_ranks(metadata, modules))


def inspect(path: Path) -> list[str]:
    """Lines about a file: form, kinds, ranks, names matched, norms of the deltas, how it was trained."""
    lora = read_lora(path, "FILE")
    modules = lora.modules.values()
    kinds = Counter(kind for module in modules for kind in _kinds(module))
    return [
        f"{lora.path}: form {lora.dialect}, {len(modules)} modules",
        "holds " + ", ".join(f"{kind} x {count}" for kind, count in kinds.items()),
        f"rank {_values(module.rank for module in modules if module.rank)}, "
        f"alpha {_values(module.alpha for module in modules if module.rank)}",
        _matched_line(lora.modules),
        "||dW|| per module: mean, largest",
        *_norm_lines(lora.modules),
        f"time indices: {layout_from_metadata(lora.metadata) or 'not stored'}",
        *_metadata_lines(lora.metadata),
    ]


def _matched_line(modules: Iterable[str]) -> str:
    """Line that counts the modules, by their names in a file, that the model has."""
    names = {name: dotted_name(name) for name in modules}
    known = [dotted for dotted in names.values() if dotted]
    blocks = {dotted.split(".")[1] for dotted in known if dotted.startswith("blocks.")}
    line = f"{len(known)} of {len(names)} modules are in Wan2.1 i2v, in {len(blocks)} blocks"
    foreign = next((name for name, dotted in names.items() if not dotted), None)
    return line if foreign is None else f"{line}; not in it: {one_line(foreign)}"


def _norm_lines(modules: Mapping[str, LoRAModule]) -> list[str]:
    """Mean and largest norm of the modules that have the same place in their block."""
    groups: dict[str, list[float]] = {}
    for name, module in modules.items():
        if module.shape:
            place = re.sub(r"^blocks\.\d+\.", "", dotted_name(name) or "other modules")
            groups.setdefault(place, []).append(module.norm())
    means = {place: sum(norms) / len(norms) for place, norms in sorted(groups.items())}
    return [f"  {place:22} {mean:10.4g} {max(groups[place]):10.4g}" for place, mean in means.items()]


def _metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    settings = {key: value for key, value in sorted(metadata.items()) if key.startswith(("ss_", "modelspec."))}
    return [f"{one_line(key)}: {one_line(value)}" for key, value in settings.items() if value != "None"]


def _kinds(module: LoRAModule) -> list[str]:
    names = {"LoRA": LORA, "LoHa": LOHA, "LoKr": LOKR}
    kinds = [kind for kind, parts in names.items() if module.parts.keys() & {*parts}]
    kinds += ["DoRA"] if DORA in module.parts else []
    kinds += [f"difference of a {leaf}" for leaf, part in DIFFERENCES.items() if part in module.parts]
    return kinds + [f"new {leaf}" for leaf, part in REPLACEMENTS.items() if part in module.parts]


def _values(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(set(numbers))) or "none"


def _open(path: Path, flag: str) -> Checkpoint:
    checkpoint = open_dit(path, flag)
    if "patch_embedding.weight" not in checkpoint.shapes:
        raise ConfigError(f"{flag} {path}: is not a Wan DiT; use a DiT checkpoint")
    if any(info.packed or info.dtype.itemsize == 1 for info in checkpoint.tensors.values()):
        raise ConfigError(
            f"{flag} {path}: is in 8 bits or fewer, whose rounding would be extracted; use a bf16 or fp16 file"
        )
    return checkpoint


def _check_alone(module: LoRAModule, place: str) -> None:
    """Raise ConfigError for changes that are not the same for every model."""
    if module.needs_weight:
        raise ConfigError(
            f"{place} is DoRA or holds new weights, which change every model in another way; merge it into the DiT by "
            "'wan_generate_video.py --save_merged_model' and take a LoRA out of that by 'wan_lora.py extract'"
        )


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ConfigError(f"--rank {rank}: must be 1 or more; try 32")


def _module(
    differences: Mapping[str, Tensor], shape: tuple[int, ...] | None, pair: tuple[Tensor, Tensor] | None = None
) -> LoRAModule:
    """A module of scale 1. pair: (down [rank, in ...], up [out, rank ...])."""
    if pair is None:
        return LoRAModule(dict(differences), shape, None, 1.0)
    down, up = pair
    parts = dict(zip(LORA, (down.contiguous(), up.contiguous()), strict=True))
    return LoRAModule(parts | dict(differences), shape, len(down), float(len(down)))


def _with_ranks(metadata: Mapping[str, str], modules: Mapping[str, LoRAModule]) -> dict[str, str]:
    """Metadata with the rank and alpha as they are now."""
    ranks = {module.rank for module in modules.values() if module.rank}
    alphas = {module.alpha for module in modules.values() if module.rank}
    texts = rank_metadata(ranks, alphas) if ranks else {}
    return dict(metadata) | {f"ss_{key}": text for key, text in texts.items()}


def check_out(out: Path, dialect: str = "musubi") -> None:
    """Raise ConfigError, before the work, unless this can be written without losing another file."""
    if (out / ADAPTER[0] if dialect == "peft" else out).exists():
        raise ConfigError(f"OUT {out}: exists already; delete it or choose another name")
    if reason := unusable_name(out):
        raise ConfigError(f"OUT {out}: {reason}")
    if dialect == "peft":
        require_writable_dir(out, "OUT")
    elif out.suffix != ".safetensors":
        raise ConfigError(f"OUT {out}: must end with .safetensors; try {out.name}.safetensors")
    else:
        require_writable_dir(out.parent, "OUT")


def save_modules(
    out: Path, modules: Mapping[str, LoRAModule], metadata: Mapping[str, str], dialect: str = "musubi"
) -> None:
    """Write a LoRA file, or for PEFT a folder; tells what the dialect can't carry."""
    tensors, config, lost = write_keys(modules, dialect)
    if not tensors:
        raise ConfigError(f"--to {dialect}: can carry nothing of this file; use --to comfyui")
    if lost:
        what = f"{len(lost)} changes of norms and the like, e.g. {lost[0]}"
        log.warning("the form '%s' cannot carry %s; they are left out", dialect, what)
    metadata = {key: value for key, value in metadata.items() if key != CONFIG_KEY}
    if dialect == "peft":
        # The weights get their name last: without them the folder is no adapter, and the conversion can be repeated
        with written_whole(out / ADAPTER[0]) as weights:
            write_lora(weights, tensors, metadata)
            with written_whole(out / ADAPTER[1]) as temporary:
                temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")
    else:
        if config:
            metadata[CONFIG_KEY] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        write_lora(out, tensors, metadata)
    log.info("saved %s: %d modules", out, len(modules))
