"""Speed and memory of LoRA training on random weights of the real size, on any number of processes.

    python benchmarks/training_speed.py --batches 2
    accelerate launch --num_processes 2 benchmarks/training_speed.py

Runs the real loader and trainer on made-up caches. --size tiny runs on a CPU in seconds.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wan_train_network
from benchmarks.random_model import SPECS, latent_size, random_checkpoint
from dataset.cache import LatentCache, latent_cache_path, write_latent_cache
from dataset.config import read_config
from dataset.loader import TrainingSet
from dataset.text_cache import text_cache_path, write_text_cache
from utils import cli
from wan.files.load import load_dit
from wan.frames.condition import stack_condition
from wan.frames.layout import OneFrameLayout
from wan.lora.network import inject_lora_
from wan.models.device import DeviceConfig
from wan.models.estimate import expected_memory
from wan.models.memory_options import apply_memory_options_
from wan.models.tasks import TASKS
from wan.nets.conditioning import Conditioning
from wan.nets.spec import CLIP_TOKENS, LATENT_CHANNELS, DiTSpec
from wan.training.job import TrainingJob
from wan.training.loop import Trainer
from wan.training.options import TrainingModels, TrainingOptions
from wan.training.start import build_accelerator

LAYOUT = OneFrameLayout((0,), 1)
WARM_UP = 3


def write_caches(folder: Path, spec: DiTSpec, width: int, height: int, items: int) -> None:
    """Cached items of random numbers, and a dataset file for them."""
    shape = (3, LATENT_CHANNELS, *latent_size(width, height, frames=1))
    for i in range(items):
        control, target, blank = torch.randn(shape, dtype=torch.bfloat16)
        cache = LatentCache(
            latents=LAYOUT.clip.stack([control, target]),
            conditioning=Conditioning(
                stack_condition(LAYOUT.clip, [control], blank),
                torch.randn(1, CLIP_TOKENS, spec.image_dim, dtype=torch.float16),
            ),
            layout=LAYOUT,
        )
        write_latent_cache(latent_cache_path(folder, f"item{i}", (width, height)), cache)
        write_text_cache(text_cache_path(folder, f"item{i}"), torch.randn(60, spec.text_dim, dtype=torch.bfloat16), "x")
    (folder / "data.toml").write_text(
        f'[[datasets]]\nimage_directory = "."\ncache_directory = "{folder.as_posix()}"\n'
        f'resolution = [{width}, {height}]\ncaption_extension = ".txt"\n'
    )


class Clock:
    """In place of the tracker: notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if "loss/current" in values:
            self.times.append(time.perf_counter())

    def image(self, *_args) -> None:
        """There are no samples."""

    def close(self) -> None:
        """There is nothing to close."""


def build_trainer(folder: Path, arguments: argparse.Namespace, clock: Clock) -> Trainer:
    flags = ["--dataset_config", str(folder / "data.toml"), "--output_dir", str(folder), "--output_name", "x"]
    flags += ["--network_dim", str(arguments.rank), "--learning_rate", "1e-4", "--seed", "1"]
    flags += ["--max_train_steps", str(arguments.steps + WARM_UP), "--max_data_loader_n_workers", "2"]
    flags += ["--gradient_accumulation_steps", str(arguments.batches)]
    flags += ["--gradient_checkpointing"] if arguments.checkpointing else []
    parsed = wan_train_network.build_parser().parse_args(flags)
    models, options = cli.build_group(TrainingModels, parsed), cli.build_group(TrainingOptions, parsed)
    accelerator = build_accelerator(DeviceConfig("cpu" if arguments.size == "tiny" else None))
    datasets = read_config(options.run.dataset_config)
    dtype = torch.float32 if arguments.size == "tiny" else torch.bfloat16
    with random_checkpoint(SPECS[arguments.size], accelerator.device):
        dit = load_dit("dit.safetensors", dtype, accelerator.device)
    network = inject_lora_(dit, options.network)
    apply_memory_options_(dit, options.memory, accelerator.device)
    training_set, task = TrainingSet(datasets, 1), TASKS["i2v-14B"]
    job = TrainingJob(0, task, models, options, datasets, training_set, dit, network, None, clock)
    return Trainer(accelerator, job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SPECS, default="14B")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batches", type=int, default=1, help="batches of one item per step and process")
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder, clock = Path(name), Clock()
        write_caches(folder, SPECS[arguments.size], arguments.width, arguments.height, items=64)
        trainer = build_trainer(folder, arguments, clock)
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.run()
        if not trainer.accelerator.is_main_process:
            return
        seconds = (clock.times[-1] - clock.times[WARM_UP - 1]) / (len(clock.times) - WARM_UP)
        processes = trainer.accelerator.num_processes
        job = trainer.job
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        expected = expected_memory(job.dit, job.network, job.dit.spec, job.training_set.buckets, job.options.memory)
        print(
            f"{arguments.size} {arguments.width}x{arguments.height} rank {arguments.rank}, {processes} processes x "
            f"{arguments.batches} items per step, {'all' if arguments.checkpointing else 'nothing'} recomputed: "
            f"{seconds:.3f} s per step, {processes * arguments.batches / seconds:.3f} images per second, "
            f"peak {peak:.1f} GB (expected {expected})",
            flush=True,
        )


if __name__ == "__main__":
    main()
