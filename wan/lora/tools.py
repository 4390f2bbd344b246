"""What wan_lora.py does with LoRA files: convert, inspect, merge, extract, resize. Worked examples: docs/interop.md"""

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
from utils.files import require_writable_dir, written_whole
from utils.text import one_line
from wan.files import names as layouts
from wan.files.dit_names import dotted_name, lora_name
from wan.files.formats import Checkpoint, open_checkpoint
from wan.lora.files import ADAPTER, read_lora, write_lora
from wan.lora.keys import CONFIG_KEY, write_keys
from wan.lora.module import DIFFERENCES, LOHA, LOKR, LORA, LoRAModule
from wan.lora.trained_for import layout_from_metadata

log = logging.getLogger(__name__)


def convert(source: Path, out: Path, dialect: str) -> None:
    """Write the LoRA `source` in another dialect; for PEFT `out` is a folder. Tells what could not be carried over."""
    _check_out(out, dialect)
    lora = read_lora(source, "SOURCE")
    _write(out, lora.modules, _with_ranks(lora.metadata, lora.modules), dialect)


def merge(sources: Sequence[Path], multipliers: Sequence[float], out: Path) -> None:
    """One LoRA that does what several do at once: their ranks side by side, float32. Missing multipliers are 1.

    ConfigError for LoHa and LoKr and for files that don't fit each other.
    """
    if len(multipliers) > len(sources):
        raise ConfigError(f"--multiplier: {len(multipliers)} numbers for {len(sources)} files; give one per file")
    _check_out(out)
    multipliers = (*multipliers, *[1.0] * (len(sources) - len(multipliers)))
    if not all(map(math.isfinite, multipliers)):
        raise ConfigError(f"--multiplier {' '.join(map(str, multipliers))}: must be numbers; try 1")
    loras = [read_lora(path, "LORA") for path in sources]
    found: dict[str, list[tuple[LoRAModule, float]]] = {}
    for lora, multiplier in zip(loras, multipliers, strict=True):
        for name, module in lora.modules.items():
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
    _write(out, modules, _with_ranks(kept, modules) | {"ss_merged_from": names})


def _sum(pairs: Iterable[tuple[LoRAModule, float]]) -> LoRAModule:
    """One module that adds what several add, each times its multiplier."""
    downs, ups, parts, shape = [], [], {}, None
    for module, multiplier in pairs:
        shape = shape or module.shape
        if LORA[0] in module.parts:
            down, up = (module.parts[part].float() for part in LORA)
            downs.append(down)
            ups.append(up * (multiplier * module.scale))
        for part in DIFFERENCES.values() & module.parts.keys():
            parts[part] = parts.get(part, 0) + multiplier * module.parts[part].float()
    if downs and "diff" in parts:  # a difference swallows the products: no rank is left to speak of
        low = torch.cat(ups, 1).flatten(1) @ torch.cat(downs).flatten(1)
        parts["diff"], downs = parts["diff"] + low.reshape(shape), []
    return _module(parts, shape, torch.cat(downs), torch.cat(ups, 1)) if downs else _module(parts, shape)


def resize(source: Path, out: Path, rank: int, device: torch.device | str = "cpu") -> None:
    """The best approximation of another rank, module by module; LoHa and LoKr become LoRA. float32.

    A rank that is no smaller than that of a module leaves the module as it is. Differences are kept.
    """
    _check_rank(rank)
    _check_out(out)
    lora, modules, kept = read_lora(source, "SOURCE"), {}, {}
    for name, module in tqdm(lora.modules.items(), desc="resizing", disable=None):
        differences = {part: tensor for part, tensor in module.parts.items() if part in DIFFERENCES.values()}
        if not module.low_rank or (LORA[0] in module.parts and module.rank <= rank):
            modules[name] = module
            continue
        down, up, kept[name] = _low_rank(module, rank, device)
        modules[name] = _module(differences, module.shape, down, up)
    if kept:
        worst = min(kept, key=kept.get)
        mean = sum(kept.values()) / len(kept)
        log.info(
            "of each change remain %.1f %% on average, at least %.1f %% (%s)", 100 * mean, 100 * kept[worst], worst
        )
    metadata = {key: value for key, value in lora.metadata.items() if key != "ss_network_args"}  # those of LoHa, LoKr
    _write(out, modules, _with_ranks(metadata, modules))


def _low_rank(module: LoRAModule, rank: int, device: torch.device | str) -> tuple[Tensor, Tensor, float]:
    """(down [rank, in ...], up [out, rank ...]) nearest to the change of a weight, and how much of its norm they keep.

    The singular values of up @ down are those of a rank x rank matrix, so that no [out, in] is formed (QR of both).
    """
    if LORA[0] not in module.parts:
        change = module.delta(device=device)
        down, up = truncated(change, rank)
        return down.cpu(), up.cpu(), _product_norm(down) / max(float(change.norm()), 1e-30)
    down, up = (module.parts[part].to(device).float().flatten(1) for part in LORA)
    left, left_small = torch.linalg.qr(up * module.scale)
    right, right_small = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
    root = s[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]) @ right.T, left @ (u[:, :rank] * root)
    kept = float(s[:rank].norm() / s.norm().clamp(min=1e-30))
    ones = [1] * len(module.shape[2:])
    return down.reshape(-1, *module.shape[1:]).cpu(), up.reshape(*up.shape, *ones).cpu(), kept


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
    _check_out(out)
    first, second = _open(base, "BASE"), _open(tuned, "TUNED")
    if first.shapes != second.shapes:
        name = min(first.shapes.items() ^ second.shapes.items())[0]
        raise ConfigError(
            f"TUNED {tuned}: is another kind of model than BASE, e.g. in {one_line(name)}; use a tuned BASE"
        )
    modules, kept, left = {}, [0.0, 0.0], []
    for name in tqdm(first.shapes, desc="extracting", disable=None):
        change = second.read(name, device).float() - first.read(name, device).float()
        dotted, _, leaf = name.rpartition(".")
        if not change.isfinite().all():
            raise ConfigError(f"TUNED {tuned}: {one_line(name)} differs by NaN or infinity; use intact checkpoints")
        if not change.any():
            continue
        if leaf not in DIFFERENCES:
            left.append(name)
            continue
        pair, differences = (), {}
        if leaf == "weight" and change.ndim == 2:
            pair = truncated(change, rank)
            kept = [kept[0] + _product_norm(pair[0]) ** 2, kept[1] + float(change.norm()) ** 2]
        else:
            differences = {DIFFERENCES[leaf]: change.cpu()}
        shape = first.shapes[name] if leaf == "weight" else None
        modules.setdefault(lora_name(dotted), []).append(
            (_module(differences, shape, *(tensor.cpu() for tensor in pair)), 1.0)
        )
    if not modules:
        raise ConfigError(f"TUNED {tuned}: equals BASE in all that a LoRA can carry; use a checkpoint trained further")
    if kept[1]:
        log.info("rank %d keeps %.1f %% of the difference of the matrices", rank, 100 * (kept[0] / kept[1]) ** 0.5)
    if left:
        log.warning("no LoRA can carry %s, which differs as well; it is left out", ", ".join(left))
    modules = {name: _sum(found) for name, found in modules.items()}
    metadata = {"ss_base_model_version": "wan", "ss_extracted_from": json.dumps([base.name, tuned.name])}
    _write(out, modules, _with_ranks(metadata, modules))


def inspect(path: Path) -> list[str]:
    """Lines that tell what a file holds: form, kinds, ranks, names matched, size of the changes, how it was trained."""
    lora = read_lora(path, "FILE")
    modules, names = lora.modules, {name: dotted_name(name) for name in lora.modules}
    kinds = Counter(kind for module in modules.values() for kind in _kinds(module))
    known = [dotted for dotted in names.values() if dotted]
    blocks = {dotted.split(".")[1] for dotted in known if dotted.startswith("blocks.")}
    lines = [
        f"{lora.path}: form {lora.dialect}, {len(modules)} modules",
        "holds " + ", ".join(f"{kind} x {count}" for kind, count in kinds.items()),
        f"rank {_values(module.rank for module in modules.values() if module.rank)}, "
        f"alpha {_values(module.alpha for module in modules.values() if module.rank)}",
        f"{len(known)} of {len(modules)} modules are in Wan2.1 i2v, in {len(blocks)} blocks",
    ]
    if len(known) < len(modules):
        lines[-1] += f"; not in it: {one_line(next(name for name, dotted in names.items() if not dotted))}"
    groups: dict[str, list[float]] = {}
    for name, module in modules.items():
        if module.shape:
            groups.setdefault(re.sub(r"^blocks\.\d+\.", "", names[name] or "other modules"), []).append(module.norm())
    lines += ["||dW|| per module: mean, largest"]
    lines += [
        f"  {group:22} {sum(norms) / len(norms):10.4g} {max(norms):10.4g}" for group, norms in sorted(groups.items())
    ]
    layout = layout_from_metadata(lora.metadata)
    lines += [f"time indices: {layout or 'not stored'}"]
    settings = {key: value for key, value in sorted(lora.metadata.items()) if key.startswith(("ss_", "modelspec."))}
    return lines + [f"{one_line(key)}: {one_line(value)}" for key, value in settings.items() if value != "None"]


def _kinds(module: LoRAModule) -> list[str]:
    names = {"LoRA": LORA, "LoHa": LOHA, "LoKr": LOKR}
    kinds = [kind for kind, parts in names.items() if module.parts.keys() & {*parts}]
    return kinds + [f"difference of a {leaf}" for leaf, part in DIFFERENCES.items() if part in module.parts]


def _values(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(set(numbers))) or "none"


def _open(path: Path, flag: str) -> Checkpoint:
    checkpoint = layouts.dit_layout(open_checkpoint(path, flag, layouts.dit_name))
    if "patch_embedding.weight" not in checkpoint.shapes:
        raise ConfigError(f"{flag} {path}: is no Wan DiT; use a DiT checkpoint")
    if any(info.packed or info.dtype.itemsize == 1 for info in checkpoint.tensors.values()):
        raise ConfigError(
            f"{flag} {path}: is in 8 bits or fewer, whose rounding would be extracted; use a bf16 or fp16 file"
        )
    return checkpoint


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ConfigError(f"--rank {rank}: must be 1 or more; try 32")


def _module(
    differences: Mapping[str, Tensor],
    shape: tuple[int, ...] | None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> LoRAModule:
    """A module of scale 1."""
    if down is None:
        return LoRAModule(dict(differences), shape, None, 1.0)
    parts = dict(zip(LORA, (down.contiguous(), up.contiguous()), strict=True))
    return LoRAModule(parts | dict(differences), shape, len(down), float(len(down)))


def _with_ranks(metadata: Mapping[str, str], modules: Mapping[str, LoRAModule]) -> dict[str, str]:
    """Metadata with the rank and alpha as they are now; kohya's word for several is Dynamic."""
    found = [module for module in modules.values() if module.rank]
    values = {"dim": {module.rank for module in found}, "alpha": {module.alpha for module in found}}
    texts = {
        f"ss_network_{key}": str(min(seen)) if len(seen) == 1 else "Dynamic" for key, seen in values.items() if seen
    }
    return dict(metadata) | texts


def _check_out(out: Path, dialect: str = "musubi") -> None:
    """Before the work: ConfigError unless this can be written without losing another file."""
    if (out / ADAPTER[0] if dialect == "peft" else out).exists():
        raise ConfigError(f"OUT {out}: exists already; delete it or choose another name")
    if dialect == "peft":
        require_writable_dir(out, "OUT")
    elif out.suffix != ".safetensors":
        raise ConfigError(f"OUT {out}: must end with .safetensors; try {out.name}.safetensors")
    else:
        require_writable_dir(out.parent, "OUT")


def _write(out: Path, modules: Mapping[str, LoRAModule], metadata: Mapping[str, str], dialect: str = "musubi") -> None:
    tensors, config, lost = write_keys(modules, dialect)
    if not tensors:
        raise ConfigError(f"--to {dialect}: can carry nothing of this file; use --to comfyui")
    if lost:
        what = f"{len(lost)} changes of norms and the like, e.g. {lost[0]}"
        log.warning("the form '%s' cannot carry %s; they are left out", dialect, what)
    metadata = {key: value for key, value in metadata.items() if key != CONFIG_KEY}
    if dialect == "peft":
        with written_whole(out / ADAPTER[1]) as temporary:  # it gets its name after the weights got theirs
            temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")
            write_lora(out / ADAPTER[0], tensors, metadata)
    else:
        if config:
            metadata[CONFIG_KEY] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        write_lora(out, tensors, metadata)
    log.info("saved %s: %d modules", out, len(modules))
