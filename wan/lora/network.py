"""LoRA, LoHa and LoKr: the layers that are trained beside frozen linear layers. Files: wan/lora/files.py."""

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import ConfigError
from wan.files.dit_names import lora_name
from wan.lora.files import LoRAFile, parse_lora, write_lora
from wan.lora.layers import AdaptedLinear, LoRALinear, LycorisLinear
from wan.lora.module import LoRAModule, rank_metadata
from wan.lora.options import NetworkConfig
from wan.memory.sharding import full_tensor, local_shard, shard_like

log = logging.getLogger(__name__)

# Never trained, wherever in a block they appear (the reference's default exclude pattern).
_EXCLUDED = re.compile(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*")


@dataclass(frozen=True)
class NetworkSummary:
    """Kind, number and sizes of the trained layers."""

    kind: str  # of the layers: lora, loha or lokr
    modules: int  # linear layers of the blocks that are trained
    excluded: int  # those that are not
    parameters: int  # trained numbers
    ranks: tuple[int, ...]  # those that occur
    alphas: tuple[float, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """`network_dim` and `network_alpha` of the file."""
        return rank_metadata(self.ranks, self.alphas)

    def __str__(self) -> str:
        ranks = " to ".join(str(rank) for rank in sorted({self.ranks[0], self.ranks[-1]}))
        return (
            f"{self.kind} of rank {ranks} on {self.modules} linear layers of the blocks, {self.excluded} left out, "
            f"{self.parameters:,} parameters"
        )


class LoRANetwork:
    """The trained layers of a model under their file names."""

    def __init__(self, layers: Mapping[str, AdaptedLinear], kind: str = "lora", excluded: tuple[str, ...] = ()):
        self.layers = dict(layers)  # by dotted name, e.g. `blocks.0.self_attn.q`
        self.kind, self.excluded = kind, excluded

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield from layer.trained.values()

    def param_groups(self, lr: float, loraplus_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
        """Optimizer groups, named for the log; up weights learn `loraplus_lr_ratio` times faster (arXiv 2402.12354)."""
        groups: dict[str, list[nn.Parameter]] = {"unet": [], "unet plus": []}
        for layer in self.layers.values():
            for name, parameter in layer.trained.items():
                plus = loraplus_lr_ratio != 1 and name == "lora_up.weight"
                groups["unet plus" if plus else "unet"].append(parameter)
        rates = {"unet": lr, "unet plus": lr * loraplus_lr_ratio}
        return [{"params": group, "lr": rates[name], "name": name} for name, group in groups.items() if group]

    @property
    def is_stochastic(self) -> bool:
        """True when outputs depend on random numbers in train mode, as with dropout."""
        return any(layer.is_stochastic for layer in self.layers.values())

    def summary(self) -> NetworkSummary:
        """Kind, number and sizes of the trained layers."""
        layers = self.layers.values()
        return NetworkSummary(
            kind=self.kind,
            modules=len(self.layers),
            excluded=len(self.excluded),
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            ranks=tuple(sorted({layer.rank for layer in layers})),
            alphas=tuple(sorted({layer.alpha for layer in layers})),
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the model computes what its base does."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context after which the trained numbers and alphas are what they were before, to the bit.

        In between they are in host memory, so that this takes none of a GPU.
        """
        own = [local_shard(parameter.detach()) for parameter in self.parameters()]
        before = [(numbers, numbers.to("cpu", copy=True)) for numbers in own]
        alphas = [layer.alpha for layer in self.layers.values()]
        try:
            yield
        finally:
            for numbers, values in before:
                numbers.copy_(values)
            for layer, alpha in zip(self.layers.values(), alphas, strict=True):
                layer.alpha = alpha

    @torch.no_grad()
    def round_(self, dtype: torch.dtype) -> None:
        """Make the trained numbers and alphas what a file in `dtype` holds; they stay float32."""
        for layer in self.layers.values():
            for parameter in layer.trained.values():
                parameter.copy_(parameter.to(dtype))
            layer.alpha = torch.tensor(layer.alpha, dtype=dtype).item()

    @torch.no_grad()
    def apply_max_norm(self, limit: float) -> tuple[int, float, float]:
        """Scale every delta of a weight whose norm is above `limit` down to it; to be called after each step.

        Returns how many were scaled, and the mean and the largest norm afterwards.
        """
        norms = torch.stack([layer.delta_norm() for layer in self.layers.values()])
        ratios = (limit / norms).clamp(max=1)
        for layer, ratio in zip(self.layers.values(), ratios, strict=True):
            matrices = layer.trained.values()
            for matrix in matrices:
                matrix.mul_(ratio ** (1 / len(matrices)))
        norms = norms * ratios
        return int((ratios < 1).sum()), norms.mean().item(), norms.max().item()

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Detached tensors as in a file, float32 unless `dtype` is given.

        With sharded weights all processes have to call it.
        """
        dtype, state = dtype or torch.float32, {}
        for dotted, layer in self.layers.items():
            for part, tensor in layer.trained.items():
                state[f"{lora_name(dotted)}.{part}"] = full_tensor(tensor.detach()).to(dtype)
            state[f"{lora_name(dotted)}.alpha"] = torch.tensor(layer.alpha, dtype=dtype)
        return state

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: str = "LoRA weights") -> None:
        """Take over tensors named as `state_dict` names them; ConfigError as in `load_file`."""
        self._load(parse_lora(tensors, source), source)

    def load_file(self, lora: LoRAFile) -> None:
        """Take over the weights of a file. ConfigError, before any changes, unless modules, shapes and alpha agree."""
        self._load(lora.modules, str(lora.path))

    def _load(self, found: Mapping[str, LoRAModule], source: str) -> None:
        wanted = {lora_name(dotted): layer for dotted, layer in self.layers.items()}
        missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
        if missing or extra:
            raise ConfigError(
                f"{source}: {len(missing)} of {len(wanted)} modules are missing and {len(extra)} are unknown, "
                f"e.g. {min(missing or extra)}; use a file trained on this model and these modules, "
                "or --dim_from_weights to train those of the file"
            )
        for name, layer in wanted.items():
            _check_fits(layer, found[name], f"{source}: {name}")
        with torch.no_grad():
            for name, layer in wanted.items():
                for part, parameter in layer.trained.items():
                    parameter.copy_(shard_like(parameter, found[name].parts[part]))


def _check_fits(layer: AdaptedLinear, module: LoRAModule, place: str) -> None:
    ours = {part: list(tensor.shape) for part, tensor in layer.trained.items()}
    theirs = {part: list(tensor.shape) for part, tensor in module.parts.items()}
    if theirs != ours:
        rank = f"use --network_dim {module.rank}, or " if module.rank != layer.rank else "use "
        raise ConfigError(
            f"{place} is {theirs} instead of {ours}; {rank}a file trained on this model, kind and settings"
        )
    if not math.isclose(module.alpha, layer.alpha, rel_tol=2**-8):  # a file in bfloat16 has rounded its alpha
        raise ConfigError(
            f"{place}.alpha is {module.alpha:g} instead of {layer.alpha:g}; use --network_alpha {module.alpha:g}"
        )


def choose_layers(
    config: NetworkConfig, names: list[str], weights: LoRAFile | None = None
) -> tuple[dict[str, tuple[int, float]], tuple[str, ...]]:
    """Rank and alpha of each layer to train, and the names of the others. names: the linear layers of the blocks.

    ConfigError when nothing is left to train, or when patterns or files name layers that are not there.
    """
    extra = config.extra
    refused = {name for name in names if _matches((_EXCLUDED, *extra.exclude_patterns), name)}
    rescued = {name for name in refused if _matches(extra.include_patterns, name)}
    chosen = [name for name in names if name not in refused or name in rescued]
    _warn_of_idle("exclude_patterns", extra.exclude_patterns, names, "layer")
    _warn_of_idle("include_patterns", extra.include_patterns, refused, "excluded layer")
    for key, by_pattern in (("module_ranks", extra.module_ranks), ("module_alphas", extra.module_alphas)):
        for pattern in _idle([pattern for pattern, _ in by_pattern], chosen):
            raise ConfigError(f"--network_args {key}: '{pattern.pattern}' matches no trained layer, e.g. {names[0]}")
    if config.dim_from_weights and weights is not None:
        layers = _layers_of_file(chosen, weights)
    else:
        layers = {name: config.rank_and_alpha(name) for name in chosen}
    if not layers:
        raise ConfigError(f"--network_args exclude_patterns: leave none of {len(names)} layers to train; exclude fewer")
    return layers, tuple(name for name in names if name not in layers)


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _idle(patterns: Iterable[re.Pattern[str]], names: Collection[str]) -> list[re.Pattern[str]]:
    """The patterns that match none of the names."""
    return [pattern for pattern in patterns if not any(map(pattern.fullmatch, names))]


def _warn_of_idle(key: str, patterns: Iterable[re.Pattern[str]], names: Collection[str], what: str) -> None:
    for pattern in _idle(patterns, names):
        log.warning("--network_args %s: %r matches no %s of the blocks", key, pattern.pattern, what)


def _layers_of_file(chosen: list[str], weights: LoRAFile) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each chosen layer that the file has; ConfigError when it has others."""
    by_key = {lora_name(name): name for name in chosen}
    unknown = weights.modules.keys() - by_key.keys()
    if unknown:
        raise ConfigError(
            f"--dim_from_weights {weights.path}: {len(unknown)} of its {len(weights.modules)} modules are not among "
            f"the layers to train, e.g. {min(unknown)}; use a LoRA of this model, and exclude fewer layers"
        )
    found = {name: weights.modules[key] for key, name in by_key.items() if key in weights.modules}
    left = len(chosen) - len(found)
    log.info("--dim_from_weights: %d layers are in the file, %d are not and stay as they are", len(found), left)
    return {name: (module.rank or 1, module.alpha) for name, module in found.items()}


def inject_lora_(
    model: nn.Module,
    config: NetworkConfig,
    *,
    weights: LoRAFile | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> LoRANetwork:
    """Freeze `model` and put a trained layer in place of each linear layer of `model.blocks` that `config` asks for.

    By default all but norms and heads: 12 per block in i2v and flf2v, 10 in t2v. weights: the file to start from,
    which has to fit exactly. device: of the trained matrices; default that of the weights beside them. generator: CPU
    generator of the initial values. ConfigError for settings or files that do not fit the model; a model on the meta
    device, which costs nothing, is enough to find out.
    """
    linear = {
        name: module
        for name, module in model.get_submodule("blocks").named_modules(prefix="blocks")
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    chosen, excluded = choose_layers(config, list(linear), weights)
    if config.extra.conv_dim or config.extra.conv_alpha is not None:
        log.info("--network_args conv_dim, conv_alpha: have no effect, the blocks hold no convolutions")
    model.requires_grad_(False)
    kind, layers = LoRALinear if config.kind == "lora" else LycorisLinear, {}
    for name, (rank, alpha) in chosen.items():
        base = linear[name]
        layer = kind(base, rank, alpha, config, device or base.weight.device, generator).train(base.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers[name] = layer
        if config.extra.verbose:
            log.info("%s: rank %d, alpha %g", name, rank, layer.alpha)
    network = LoRANetwork(layers, config.kind, excluded)
    if weights is not None:
        network.load_file(weights)
    return network


def save_lora(
    path: str | Path,
    network: LoRANetwork,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    write: bool = True,
) -> None:
    """Write the network, whole or not at all. Raises OSError when it can't be written.

    With sharded weights all processes call it, and only that with `write` writes.
    """
    tensors = network.state_dict(dtype)
    if write:
        write_lora(path, tensors, metadata)
