"""The settings of a training run, one section per subject; each field is a flag of the training script."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from utils.dtypes import dtype_name, parse_dtype
from utils.errors import ConfigError
from utils.options import Section, option
from wan.frames.layout import LAST_INDEX
from wan.generation.preview import PreviewConfig
from wan.generation.request import SamplingConfig
from wan.lora.options import NetworkConfig
from wan.models.checkpoints import DiTCheckpoint
from wan.models.device import DeviceConfig
from wan.models.memory_options import TrainingMemoryConfig
from wan.models.options import AttentionSwitches, CLIPConfig, DiTConfig, T5Config, VAEConfig
from wan.training.cadence import Every
from wan.training.optimizers import OptimizerConfig
from wan.training.samples import SampleConfig
from wan.training.timesteps import NoiseConfig
from wan.training.tracking import TrackingConfig
from wan.training.validation import ValidationConfig

_WIDEST_RANGE = 10_000  # indices; all are looked at for each item
_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}


@dataclass(frozen=True)
class RunConfig(Section):
    """training"""

    dataset_config: Path = option(help="dataset TOML")
    use_stale_caches: bool = option(False, help="train even if images or captions have changed since they were cached")
    max_train_steps: int = option(1600, minimum=1, help="optimizer steps")
    max_train_epochs: int | None = option(None, minimum=1, help="epochs; overrides --max_train_steps")
    seed: int | None = option(None, minimum=0, help="seed of everything random; default: a random one")
    mixed_precision: str | None = option(
        None, help="compute dtype of the DiT; default: what accelerate was given, else no", choices=[*_COMPUTE_DTYPES]
    )
    gradient_accumulation_steps: int = option(1, minimum=1, help="batches per optimizer step")
    max_data_loader_n_workers: int = option(8, minimum=0, help="loader processes, at most one per core; 0: none")
    persistent_data_loader_workers: bool = option(
        False, needs="--max_data_loader_n_workers 1 or more", help="keep the loader processes between epochs"
    )
    one_frame: bool = option(False, help="sample in one-frame mode; the only mode there is, so it may be left out")
    one_frame_legacy_indices: bool = option(
        False, help="train at time indices 0 ... F-1 whatever the dataset says, as musubi-tuner does"
    )
    one_frame_loss: str = option(
        "all", help="frames that the loss counts: all, or only the target (experiment)", choices=["all", "target"]
    )
    one_frame_target_range: str | None = option(
        None, help="a-b: draw each item's target index from this range, anew in every epoch (experiment)"
    )
    stop_after_skipped_steps: int = option(
        10, minimum=1, help="stop after this many steps in a row without a finite loss or gradient"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_range is not None and self.one_frame_legacy_indices:
            raise ConfigError("--one_frame_target_range and --one_frame_legacy_indices exclude each other; give one")

    @property
    def target_range(self) -> range | None:
        """The indices that `one_frame_target_range` draws from."""
        if self.one_frame_target_range is None:
            return None
        low, _, high = self.one_frame_target_range.partition("-")
        try:
            first, last = int(low), int(high)
        except ValueError:  # also for more digits than Python reads
            first, last = 0, -1
        if not 0 <= first <= last <= LAST_INDEX:
            raise ConfigError(
                f"--one_frame_target_range {self.one_frame_target_range}: must be a-b, at most {LAST_INDEX}; try 1-8"
            )
        if last - first >= _WIDEST_RANGE:
            raise ConfigError(
                f"--one_frame_target_range {self.one_frame_target_range}: has over {_WIDEST_RANGE} indices; try 1-8"
            )
        return range(first, last + 1)

    def batches_per_step(self, num_processes: int) -> int:
        """Batches of one optimizer step, over all processes."""
        return self.gradient_accumulation_steps * num_processes

    @property
    def precision(self) -> str:
        """`bf16`, `fp16` or `no`: the flag, else what `accelerate launch` was given."""
        chosen = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if chosen not in _COMPUTE_DTYPES:
            raise ConfigError(f"mixed precision '{chosen}' of accelerate is not supported; use --mixed_precision bf16")
        return chosen

    def compute_dtype(self, dit: DiTCheckpoint) -> torch.dtype:
        """The dtype of the DiT's weights, which is what it computes in: that of the flags, else that of the file."""
        dtype = _COMPUTE_DTYPES[self.precision]
        if dit.chosen_dtype is not None and dtype not in (None, dit.chosen_dtype):
            raise ConfigError(
                f"--dit_dtype {dtype_name(dit.chosen_dtype)} contradicts --mixed_precision {self.precision}: "
                "the DiT computes in the dtype of its weights; give one of the two"
            )
        return dtype or dit.dtype


@dataclass(frozen=True)
class SaveConfig(Section):
    """output"""

    output_dir: Path = option(help="folder for LoRA files and samples")
    output_name: str = option(help="stem of the LoRA files")
    overwrite: bool = option(False, help="replace a finished LoRA of this name")
    save_every_n_epochs: int | None = option(None, minimum=1, help="save after every n epochs")
    save_every_n_steps: int | None = option(None, minimum=1, help="save after every n steps")
    save_precision: str | None = option(None, help="dtype of the saved LoRA; default float32")
    save_last_n_epochs: int | None = option(None, minimum=0, help="keep the files of the last n epochs only")
    save_last_n_steps: int | None = option(None, minimum=0, help="keep the files of the last n steps only")
    save_state: bool = option(False, help="save a state to resume from with every file, and at the end")
    save_state_on_train_end: bool = option(False, help="save a state at the end")
    save_last_n_epochs_state: int | None = option(None, minimum=0, help="like --save_last_n_epochs, for states")
    save_last_n_steps_state: int | None = option(None, minimum=0, help="like --save_last_n_steps, for states")
    resume: str | None = option(None, help="state folder to resume from; auto: the newest of this run, if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_name or Path(self.output_name).name != self.output_name:
            raise ConfigError(f"--output_name {self.output_name}: must be a file stem without folders")
        if not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise ConfigError(f"--save_precision {self.save_precision}: use float32, bf16 or fp16")

    @property
    def every(self) -> Every:
        """When LoRA files are saved, and states with them."""
        return Every(self.save_every_n_steps, self.save_every_n_epochs)

    @property
    def keep_steps_of_states(self) -> int | None:
        """For how many steps states stay; None: for ever."""
        last = self.save_last_n_steps_state
        return self.save_last_n_steps if last is None else last

    @property
    def keep_epochs_of_states(self) -> int | None:
        """For how many savings after an epoch states stay; None: for ever."""
        last = self.save_last_n_epochs_state
        return self.save_last_n_epochs if last is None else last

    @property
    def dtype(self) -> torch.dtype:
        """dtype of saved LoRA tensors."""
        try:
            return parse_dtype(self.save_precision or "float32")
        except ConfigError as error:
            raise ConfigError(f"--save_precision: {error}") from None


@dataclass(frozen=True)
class MetadataConfig(Section):
    """metadata"""

    training_comment: str | None = option(None, help="stored in the file")
    no_metadata: bool = option(False, help="store only what loading needs")
    metadata_title: str | None = option(None, help="title; default: the output name")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="license")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    metadata_reso: str | None = option(None, help="resolution, W,H or one number; default 1280x720")
    metadata_arch: str | None = option(None, help="architecture name; default wan2.1")

    @property
    def resolution(self) -> str:
        """`metadata_reso` as modelspec wants it."""
        if self.metadata_reso is None:
            return "1280x720"
        parts = [part.strip() for part in self.metadata_reso.split(",")]
        if len(parts) > 2 or not all(part.isdigit() for part in parts):
            raise ConfigError(f"--metadata_reso {self.metadata_reso}: must be W,H or one number, e.g. 1024,1024")
        return f"{parts[0]}x{parts[-1]}"

    def modelspec(self, output_name: str, noise_range: tuple[int, int] | None) -> dict[str, str]:
        """The modelspec keys, which every file carries."""
        fields = {
            "sai_model_spec": "1.0.0",
            "architecture": f"{self.metadata_arch or 'wan2.1'}/lora",
            "implementation": "https://github.com/Wan-Video/Wan2.1",
            "title": self.metadata_title or output_name,
            "resolution": self.resolution,
            "date": datetime.now().isoformat(timespec="seconds"),
            "author": self.metadata_author,
            "description": self.metadata_description,
            "license": self.metadata_license,
            "tags": self.metadata_tags,
            "timestep_range": noise_range and "{},{}".format(*noise_range),
        }
        return {f"modelspec.{key}": value for key, value in fields.items() if value is not None}


@dataclass(frozen=True)
class TrainingModels:
    """The model files of a run, and where they run."""

    dit: DiTConfig
    vae: VAEConfig
    t5: T5Config
    clip: CLIPConfig
    device: DeviceConfig
    attention: AttentionSwitches


@dataclass(frozen=True)
class TrainingOptions:
    """The sections of a run that are not about its model files."""

    run: RunConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    noise: NoiseConfig
    memory: TrainingMemoryConfig
    save: SaveConfig
    samples: SampleConfig
    sampling: SamplingConfig
    preview: PreviewConfig
    validation: ValidationConfig
    tracking: TrackingConfig
    metadata: MetadataConfig
