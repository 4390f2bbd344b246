"""Metadata of LoRA files: how they were made, and what loading needs (docs/formats.md#lora-metadata)."""

import json
import time
from pathlib import Path
from typing import Any

from dataset.config import DatasetsConfig
from wan.training.job import RunLength, TrainingJob
from wan.training.options import TrainingOptions
from wan.training.state import Progress


def lora_metadata(job: TrainingJob, length: RunLength, progress: Progress) -> dict[str, str]:
    """Metadata of a LoRA file; with `no_metadata` only the part that loading and sampling need.

    `ss_` values are `str()` of the Python value, as the reference writes them.
    """
    options = job.options
    settings = _for_loading(job)
    if not options.metadata.no_metadata:
        settings |= _counters(job, length, progress) | _of_the_run(job) | _settings(options)
    noise = options.noise
    limits = None if noise.min_timestep is None and noise.max_timestep is None else noise.limits
    modelspec = options.metadata.modelspec(options.save.output_name, limits)
    return {f"ss_{key}": str(value) for key, value in settings.items()} | modelspec


def _for_loading(job: TrainingJob) -> dict[str, Any]:
    """Settings for loading and sampling. `one_frame` reads as the flag does; it is the most frequent layout."""
    run, network, layouts = job.options.run, job.options.network, job.training_set.layouts
    needed = {
        "base_model_version": "wan",
        "network_module": network.network_module,
        **job.network.summary().metadata,
        "one_frame": layouts[0],
        "one_frame_layouts": json.dumps([str(layout) for layout in layouts]),
        "one_frame_task": job.task.name,
        "one_frame_size": "{}x{}".format(*job.datasets.datasets[0].resolution),
        "one_frame_legacy_indices": run.one_frame_legacy_indices,
        "one_frame_loss": run.one_frame_loss,
        "one_frame_target_range": run.one_frame_target_range,
    }
    if network.network_args:
        needed["network_args"] = json.dumps(network.arguments)
    return needed


def _counters(job: TrainingJob, length: RunLength, progress: Progress) -> dict[str, Any]:
    """Counters and Unix times at the moment of saving."""
    return {
        "training_started_at": progress.started,
        "training_finished_at": time.time(),
        "num_train_items": len(job.training_set.items),
        "num_batches_per_epoch": len(job.training_set.epoch_batches(1)),
        "num_epochs": length.epochs,
        "epoch": progress.epoch + (progress.items > 0),
        "steps": progress.step,
        "max_train_steps": length.total_steps,
        "seed": job.training_set.seed,
    }


def _of_the_run(job: TrainingJob) -> dict[str, Any]:
    """Name, session and files of the run."""
    return {
        "session_id": job.session_id,
        "output_name": job.options.save.output_name,
        "datasets": dataset_metadata(job.datasets),
        "sd_model_name": _basename(job.models.dit.dit),
        "vae_name": _basename(job.models.vae.vae),
    }


def _settings(options: TrainingOptions) -> dict[str, Any]:
    run, optimizer, noise, memory = options.run, options.optimizer, options.noise, options.memory
    return {
        "learning_rate": optimizer.learning_rate,
        "gradient_checkpointing": memory.gradient_checkpointing != "none",
        "gradient_checkpointing_cpu_offload": memory.gradient_checkpointing_cpu_offload,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "lr_warmup_steps": optimizer.lr_warmup_steps,
        "lr_scheduler": optimizer.schedule,
        "network_dropout": options.network.network_dropout,
        "mixed_precision": run.precision,
        "training_comment": options.metadata.training_comment,
        "optimizer": f"{optimizer.optimizer_type}({','.join(optimizer.optimizer_args)})",
        "max_grad_norm": optimizer.max_grad_norm,
        "fp8_base": memory.fp8_base,
        "full_fp16": False,
        "full_bf16": False,
        "weighting_scheme": noise.weighting_scheme,
        "logit_mean": noise.logit_mean,
        "logit_std": noise.logit_std,
        "mode_scale": noise.mode_scale,
        "guidance_scale": 1.0,
        "timestep_sampling": noise.timestep_sampling,
        "sigmoid_scale": noise.sigmoid_scale,
        "discrete_flow_shift": noise.discrete_flow_shift,
    }


def dataset_metadata(config: DatasetsConfig) -> str:
    """JSON list with the settings of each dataset; of its folders the names alone."""
    return json.dumps(
        [
            {
                "resolution": list(dataset.resolution),
                "caption_extension": dataset.caption_extension,
                "batch_size_per_device": dataset.batch_size,
                "num_repeats": dataset.num_repeats,
                "enable_bucket": dataset.enable_bucket,
                "bucket_no_upscale": dataset.bucket_no_upscale,
                "image_directory": _basename(dataset.image_directory),
                "image_jsonl_file": _basename(dataset.image_jsonl_file),
                "control_directory": _basename(dataset.control_directory),
                "target_mask_directory": _basename(dataset.target_mask_directory),
                "has_control": True,
                "validation": dataset.validation,
                "fp_1f_clean_indices": dataset.clean_indices and list(dataset.clean_indices),
                "fp_1f_target_index": dataset.target_index,
                "fp_1f_layout": dataset.layout_name,
                "alpha": dataset.alpha,
                "control_resolution": dataset.control_resolution and list(dataset.control_resolution),
                "no_resize_control": dataset.no_resize_control,
            }
            for dataset in config.datasets
        ]
    )


def _basename(path: Path | None) -> str | None:
    return None if path is None else Path(path).name
