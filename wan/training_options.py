"""The settings of a training run, one section per subject; each field is a flag of the training script."""

import ast
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli import option
from utils.dtypes import parse_dtype
from utils.errors import ConfigError
from utils.files import require_file
from wan.metadata import MetadataConfig
from wan.optimizers import OptimizerConfig
from wan.request import SamplingConfig
from wan.samples import SampleConfig
from wan.timesteps import NoiseConfig

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
_LORA_MODULES = ("networks.lora_wan", "wan.lora")


def _at_least(low: int, section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name} {value}: must be at least {low}")


@dataclass(frozen=True)
class RunConfig:
    """training"""

    dataset_config: Path = option(help="dataset TOML")
    max_train_steps: int = option(1600, help="optimizer steps")
    max_train_epochs: int | None = option(None, help="epochs; overrides --max_train_steps")
    seed: int | None = option(None, help="seed of everything random; default: a random one")
    mixed_precision: str | None = option(
        None, help="compute dtype of the DiT; default: what accelerate was given, else no", choices=[*_COMPUTE_DTYPES]
    )
    gradient_checkpointing: bool = option(False, help="recompute block activations to save memory")
    gradient_accumulation_steps: int = option(1, help="batches per optimizer step")
    max_data_loader_n_workers: int = option(8, help="loader processes, at most one per core; 0: none")
    persistent_data_loader_workers: bool = option(False, help="keep the loader processes between epochs")
    one_frame: bool = option(False, help="sample in one-frame mode; the only mode there is, so it may be left out")
    one_frame_legacy_indices: bool = option(
        False, help="train at time indices 0 ... F-1 whatever the dataset says, as musubi-tuner does"
    )

    def __post_init__(self) -> None:
        _at_least(1, self, "max_train_steps", "max_train_epochs", "gradient_accumulation_steps")
        _at_least(0, self, "max_data_loader_n_workers", "seed")
        if self.persistent_data_loader_workers and self.max_data_loader_n_workers == 0:
            raise ConfigError("--persistent_data_loader_workers needs --max_data_loader_n_workers 1 or more")

    @property
    def precision(self) -> str:
        """`bf16`, `fp16` or `no`: the flag, else what `accelerate launch` was given."""
        chosen = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if chosen not in _COMPUTE_DTYPES:
            raise ConfigError(f"mixed precision '{chosen}' of accelerate is not supported; use --mixed_precision bf16")
        return chosen

    def compute_dtype(self, dit_dtype: str | None) -> torch.dtype | None:
        """The dtype of the DiT's weights, which is what it computes in; None is the checkpoint's own."""
        dtype = _COMPUTE_DTYPES[self.precision]
        if dit_dtype is not None and dtype not in (None, parse_dtype(dit_dtype)):
            raise ConfigError(
                f"--dit_dtype {dit_dtype} contradicts --mixed_precision {self.precision}: the DiT computes "
                "in the dtype of its weights; give one of the two"
            )
        return dtype


@dataclass(frozen=True)
class SaveConfig:
    """output"""

    output_dir: Path = option(help="folder for LoRA files and samples")
    output_name: str = option(help="stem of the LoRA files")
    save_every_n_epochs: int | None = option(None, help="save after every n epochs")
    save_every_n_steps: int | None = option(None, help="save after every n steps")
    save_precision: str | None = option(None, help="dtype of the saved LoRA; default float32")

    def __post_init__(self) -> None:
        _at_least(1, self, "save_every_n_epochs", "save_every_n_steps")
        if not self.output_name or Path(self.output_name).name != self.output_name:
            raise ConfigError(f"--output_name {self.output_name}: must be a file stem without folders")
        if not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise ConfigError(f"--save_precision {self.save_precision}: use float32, bf16 or fp16")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of saved LoRA tensors."""
        try:
            return parse_dtype(self.save_precision or "float32")
        except ConfigError as error:
            raise ConfigError(f"--save_precision: {error}") from None


@dataclass(frozen=True)
class NetworkConfig:
    """LoRA"""

    network_module: str = option(_LORA_MODULES[0], help="networks.lora_wan, the only one so far")
    network_dim: int | None = option(None, help="rank; default 4")
    network_alpha: float = option(1.0, help="scale = alpha / rank")
    network_dropout: float | None = option(None, help="dropout between the two LoRA matrices")
    network_args: tuple[str, ...] = option((), help="key=value: loraplus_lr_ratio=16")
    network_weights: Path | None = option(None, help="LoRA file to start from, of the same rank")
    base_weights: tuple[Path, ...] = option((), help="LoRA files to merge into the DiT before training")
    base_weights_multiplier: tuple[float, ...] = option((), help="one per --base_weights file; default 1")

    def __post_init__(self) -> None:
        if self.network_module not in _LORA_MODULES:
            raise ConfigError(f"--network_module {self.network_module}: not supported; use networks.lora_wan")
        _at_least(1, self, "network_dim")
        if self.network_alpha < 0:
            raise ConfigError(f"--network_alpha {self.network_alpha}: must be 0 (same as the rank) or above")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise ConfigError(f"--network_dropout {self.network_dropout}: must be at least 0 and below 1")
        for path in (self.network_weights, *self.base_weights):
            if path is not None:
                require_file(path, "--network_weights" if path == self.network_weights else "--base_weights")
        self.arguments  # noqa: B018 checks them

    @property
    def rank(self) -> int:
        """`network_dim`, 4 when unset."""
        return self.network_dim or 4

    @property
    def alpha(self) -> float:
        """`network_alpha`; 0 stands for the rank."""
        return self.network_alpha or float(self.rank)

    @property
    def arguments(self) -> dict[str, str]:
        """`network_args` by key, each split at its first `=`."""
        pairs = dict(argument.partition("=")[::2] for argument in self.network_args)
        for key in pairs.keys() - {"loraplus_lr_ratio"}:
            raise ConfigError(f"--network_args {key}: not supported; known: loraplus_lr_ratio")
        return pairs

    @property
    def loraplus_lr_ratio(self) -> float:
        """Learning-rate factor of the up weights (LoRA+, Hayou et al. 2024)."""
        text = self.arguments.get("loraplus_lr_ratio", "1")
        try:
            return float(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError):
            raise ConfigError(f"--network_args loraplus_lr_ratio={text}: is no number; try 16") from None


@dataclass(frozen=True)
class TrainingOptions:
    """All sections of a run, and the model files that its metadata names."""

    run: RunConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    noise: NoiseConfig
    save: SaveConfig
    samples: SampleConfig
    sampling: SamplingConfig
    metadata: MetadataConfig
    dit: Path | None = None
    vae: Path | None = None
