"""What a LoRA file says about how it was made (docs/formats.md#lora-metadata)."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.config import DatasetsConfig
from wan.frames.layout import OneFrameLayout
from wan.models.tasks import TaskSpec

if TYPE_CHECKING:
    from wan.training.options import TrainingOptions

_SESSION = random.getrandbits(32)  # tells the files of one run from those of others


def lora_metadata(
    options: "TrainingOptions",
    task: TaskSpec,
    layouts: Sequence[OneFrameLayout],
    datasets: DatasetsConfig,
    ranks: dict[str, str],
    progress: dict[str, Any],
) -> dict[str, str]:
    """Everything that a LoRA file carries; with `no_metadata` only what loading and sampling need.

    `ss_` values are `str()` of the Python value, as the reference writes them. `ss_one_frame` reads as the flag does,
    and is the first of `ss_one_frame_layouts`. ranks: `network_dim` and `network_alpha` as trained. progress: counters
    and times at the moment of saving.
    """
    run, network, noise = options.run, options.network, options.noise
    settings = {
        "base_model_version": "wan",
        "network_module": network.network_module,
        **ranks,
        "one_frame": layouts[0],
        "one_frame_layouts": json.dumps([str(layout) for layout in layouts]),
        "one_frame_task": task.name,
        "one_frame_size": "{}x{}".format(*datasets.datasets[0].resolution),
        "one_frame_legacy_indices": run.one_frame_legacy_indices,
        "one_frame_loss": run.one_frame_loss,
        "one_frame_target_range": run.one_frame_target_range,
    }
    if network.network_args:
        settings["network_args"] = json.dumps(network.arguments)
    if not options.metadata.no_metadata:
        optimizer = options.optimizer
        settings |= progress | {
            "session_id": _SESSION,
            "output_name": options.save.output_name,
            "learning_rate": optimizer.learning_rate,
            "gradient_checkpointing": options.memory.gradient_checkpointing != "none",
            "gradient_checkpointing_cpu_offload": options.memory.gradient_checkpointing_cpu_offload,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "lr_warmup_steps": optimizer.lr_warmup_steps,
            "lr_scheduler": optimizer.lr_scheduler,
            "network_dropout": network.network_dropout,
            "mixed_precision": run.precision,
            "training_comment": options.metadata.training_comment,
            "optimizer": f"{optimizer.optimizer_type}({','.join(optimizer.optimizer_args)})",
            "max_grad_norm": optimizer.max_grad_norm,
            "fp8_base": options.memory.fp8_base,
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
            "datasets": dataset_metadata(datasets),
            "sd_model_name": _basename(options.dit),
            "vae_name": _basename(options.vae),
        }
    limited = (noise.min_timestep, noise.max_timestep) != (None, None)
    noise_range = tuple(round(1000 * level) for level in noise.range) if limited else None
    modelspec = options.metadata.modelspec(options.save.output_name, noise_range)
    return {f"ss_{key}": str(value) for key, value in settings.items()} | modelspec


def dataset_metadata(config: DatasetsConfig) -> str:
    """JSON list of what each dataset was, without its folders' full paths."""
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
                "control_resolution": dataset.control_resolution and list(dataset.control_resolution),
                "no_resize_control": dataset.no_resize_control,
            }
            for dataset in config.datasets
        ]
    )


def _basename(path: Path | None) -> str | None:
    return None if path is None else Path(path).name
