"""Texts about a run: the table in the log, the facts in its states, metadata of LoRA files, and `--explain`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dataset.cache import read_header, read_latent_cache
from dataset.loader import BucketCount, TrainingItem, TrainingSet
from utils import cli
from utils.dtypes import dtype_name
from utils.errors import ConfigError
from utils.text import table
from wan.frames.sizes import frame_of
from wan.frames.table import SHOWN, TableFrame, frame_table, left_out, tokens_line
from wan.lora.files import LoRAFile
from wan.models.checkpoints import DiTCheckpoint
from wan.models.estimate import expected_memory, forward_flops, meta_dit, time_text
from wan.models.tasks import TaskSpec
from wan.nets.spec import VAE_STRIDE, DiTSpec
from wan.training.job import RunLength, TrainingJob
from wan.training.metadata import lora_metadata
from wan.training.options import TrainingOptions
from wan.training.state import Facts, Progress

_BESIDE_TRAINING = frozenset(
    {
        *("dataset_config", "one_frame", "max_data_loader_n_workers", "persistent_data_loader_workers"),
        *("stop_after_skipped_steps", "validate_every_n_steps", "validate_every_n_epochs", "validation_levels"),
        *("network_weights", "dim_from_weights"),  # what is resumed has weights of its own
        *("seed", "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "mixed_precision"),  # facts
        *("optimizer_type", "learning_rate", "lr_scheduler"),
    }
)
"""Settings that a run may be resumed with at other values without a word, or that are facts by themselves."""


@dataclass(frozen=True)
class RunSummary:
    """The texts of one run, in any of its processes."""

    job: TrainingJob
    length: RunLength
    processes: int

    def table(self) -> str:
        """The lines that are logged at the start, one per name and value."""
        job, options, length = self.job, self.job.options, self.length
        dit_dtype, saved_dtype = dtype_name(job.dit.dtype), dtype_name(options.save.dtype)
        memory = expected_memory(job.dit, job.network, job.dit.spec, job.training_set.buckets, options.memory)
        rows = [
            task_row(job.task, job.dit.spec),
            *dataset_rows(job.training_set),
            ("network", str(job.network.summary())),
            ("precision", f"DiT {dit_dtype}, LoRA float32, saved as {saved_dtype}"),
            ("steps", f"{length.total_steps} in {length.epochs} epochs of {length.steps_per_epoch}"),
            ("batches per step", f"{options.run.gradient_accumulation_steps} in {self.processes} processes"),
            ("seed", str(job.training_set.seed)),
            ("expected memory", memory),
        ]
        return "\n".join(table(rows))

    def facts(self) -> Facts:
        """Name of the run, and settings that a resumed run should share with the run that wrote the state."""
        run, optimizer = self.job.options.run, self.job.options.optimizer
        return {
            "output_name": self.job.options.save.output_name,
            "seed": self.job.training_set.seed,
            "processes": self.processes,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "items": len(self.job.training_set.items),
            "steps_per_epoch": self.length.steps_per_epoch,
            "total_steps": self.length.total_steps,
            "precision": run.precision,
            "optimizer_type": optimizer.optimizer_type,
            "learning_rate": optimizer.learning_rate,  # that of the state goes on
            "lr_scheduler": optimizer.schedule,
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """Every other setting that changes what is trained or how, by the name of its flag; unset ones are left out."""
        options, dit = self.job.options, self.job.models.dit
        found = cli.settings(options.run, options.network, options.optimizer, options.noise, options.validation)
        found |= {"fp8_base": options.memory.fp8_base, "fp8_scaled": options.memory.fp8_scaled}
        found |= {"dit": dit.dit and dit.dit.name, "dit_dtype": dit.dit_dtype}
        return {name: value for name, value in found.items() if name not in _BESIDE_TRAINING and value is not None}

    def rehearse(self) -> None:
        """Make what goes into LoRA files and states besides tensors. Raises ConfigError when it can't be written."""
        metadata = self.metadata(Progress())
        json.dumps(self.facts())
        for key, text in metadata.items():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"the metadata '{key}' of LoRA files can't be written: character {error.start + 1} of its text is "
                    "not UTF-8; give another text, or rename the file"
                ) from None

    def metadata(self, progress: Progress) -> dict[str, str]:
        """The metadata of a LoRA file that is written now."""
        return lora_metadata(self.job, self.length, progress)


def task_row(task: TaskSpec, spec: DiTSpec) -> tuple[str, str]:
    """The row that names task and model."""
    return "task", f"{task.name}, {spec.num_layers} blocks of width {spec.dim}"


def dataset_rows(training_set: TrainingSet) -> list[tuple[str, str]]:
    """One row per dataset and size."""
    rows = [
        (
            f"dataset {bucket.dataset}",
            f"{bucket.items} items of {_sizes(bucket)} in {bucket.batches} batches, {bucket.frames} frames",
        )
        for bucket in training_set.buckets
    ]
    held_back = len(training_set.validation.items)
    return [*rows, ("validation", f"{held_back} items")] if held_back else rows


def _sizes(bucket: BucketCount) -> str:
    """`64x48`, or where frames differ in size those of all slots."""
    sizes = bucket.frame_sizes or [(bucket.height, bucket.width)]
    return ", ".join(f"{columns * VAE_STRIDE}x{rows * VAE_STRIDE}" for rows, columns in sizes)


def explain_training(
    options: TrainingOptions,
    dit: DiTCheckpoint,
    training_set: TrainingSet,
    weights: LoRAFile | None,
    processes: int,
) -> list[str]:
    """A table per dataset, size and layout, then what a step needs. weights: the LoRA that training starts from."""
    run, memory = options.run, options.memory
    groups: dict[tuple[Any, ...], TrainingItem] = {}
    for item in training_set.items:
        header = read_header(item.latents)
        groups.setdefault((item.dataset, header.bucket, str(item.layout), header.sizes), item)
    lines = []
    for (dataset, size, layout, _), item in list(groups.items())[:SHOWN]:
        lines += [f"dataset {dataset}, {'{}x{}'.format(*size)}, {layout}: for example {item.latents.name}"]
        frames = _cached_frames(item)
        lines += [*frame_table(item.layout, frames), tokens_line(item.layout, frames, dit.task.clip_images), ""]
    lines += left_out(len(groups))
    dtype = run.compute_dtype(dit)
    held, network = meta_dit(dit, dtype, memory, options.network, weights)
    length = RunLength.of(run, training_set, processes)
    steps, total = length.steps_per_epoch, length.total_steps
    epoch = sum(_training_flops(dit.spec, training_set, recomputed=memory.gradient_checkpointing != "none"))
    rows = [
        task_row(dit.task, dit.spec),
        *dataset_rows(training_set),
        ("network", str(network.summary())),
        ("precision", f"DiT {dtype_name(dtype)}, LoRA float32"),
        ("steps", f"{total}, {steps} in an epoch" + f", in {processes} processes" * (processes > 1)),
        ("expected time", time_text(epoch * total / steps)),
        ("expected memory", expected_memory(held, network, dit.spec, training_set.buckets, memory)),
    ]
    return [*lines, *table(rows)]


def _cached_frames(item: TrainingItem) -> list[TableFrame]:
    """The frames of a cached item, controls first, with the share of each that its mask uses."""
    cache = read_latent_cache(item.latents)
    controls, used = len(item.layout.control_indices), dict[int, float]()
    known = cache.conditioning.known(cache.latents)[None]
    for slot, i in enumerate(cache.layout.clip.order):
        given = frame_of(known, slot, cache.frame_sizes).float()
        if i < controls and bool((given < 1).any()):
            used[i] = float(given.mean())
    if cache.target_mask is not None:
        used[controls] = float(cache.target_mask.mean())
    sizes = cache.sizes or [read_header(item.latents).bucket] * (controls + 1)
    names = [*(f"control {i}" for i in range(controls)), "target"]
    return [TableFrame(name, "(cached)", sizes[i], None, used.get(i)) for i, name in enumerate(names)]


def _training_flops(spec: DiTSpec, training_set: TrainingSet, recomputed: bool) -> Iterator[float]:
    """FLOPs of the items of each bucket: forward, gradients of the activations, and forward again when recomputed."""
    for bucket in training_set.buckets:
        yield bucket.items * (3 if recomputed else 2) * forward_flops(spec, bucket.tokens)
