"""LoRA training: the loss, and the loop around it."""

import hashlib
import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from dataset.config import DatasetsConfig
from dataset.loader import BatchLoader, TrainingBatch, TrainingSet, clip_for, share
from utils.errors import ConfigError
from wan.config import TaskSpec
from wan.dit import WanDiT, pad_text
from wan.lora import LoRANetwork, Merger, inject_lora_, read_lora, save_lora
from wan.memory import checkpoint_blocks_
from wan.metadata import lora_metadata
from wan.models import DiTConfig, build_merger
from wan.one_frame import natural_indices
from wan.optimizers import build_optimizer, build_scheduler
from wan.samples import Sampler
from wan.timesteps import add_noise, loss_weight, network_timestep, sample_noise_levels, velocity_target
from wan.training_options import NetworkConfig, TrainingOptions

log = logging.getLogger(__name__)

_LOSS_WINDOW = 100  # steps that the shown loss is averaged over


def seeded(*address: object) -> torch.Generator:
    """A CPU generator whose numbers depend on nothing but the address, e.g. (seed, epoch, item)."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def flow_matching_loss(
    dit: nn.Module,
    *,
    latents: Tensor,
    condition: Tensor,
    text: Tensor,
    image: Tensor,
    frame_indices: Tensor,
    noise: Tensor,
    t: Tensor,
    weighting_scheme: str = "none",
) -> Tensor:
    """Loss of each item, [B] float32: the weighted mean squared error of the velocity over all frames.

    latents, noise [B, 16, F, H, W]; condition [B, 20, F, H, W]; text [B, 512, D]; image [B, 257 n, D];
    frame_indices [B, F]; t [B] noise levels in 0..1. Spec formats.md section 7.
    """
    noisy = add_noise(latents, noise, t)
    velocity = dit(noisy, condition, network_timestep(t), text, image, frame_indices)
    error = (velocity.float() - velocity_target(latents, noise)).square().flatten(1).mean(1)
    return error * loss_weight(weighting_scheme, t)


def load_trainable(
    config: DiTConfig, options: TrainingOptions, device: torch.device, seed: int, merger: Merger | None
) -> tuple[WanDiT, LoRANetwork]:
    """The DiT with LoRA layers, of which nothing else is trained. `merger`: LoRA files to merge beforehand."""
    settings = options.network
    dit = config.load(device, options.run.compute_dtype(config.dit_dtype), merger)
    network = inject_lora_(
        dit, settings.rank, settings.alpha, dropout=settings.network_dropout or 0.0, generator=seeded(seed, "lora")
    )
    if settings.network_weights is not None:
        network.load_file(read_lora(settings.network_weights, "--network_weights"))
    if options.run.gradient_checkpointing:
        checkpoint_blocks_(dit)
    return dit, network


def base_merger(config: DiTConfig, settings: NetworkConfig) -> Merger | None:
    """The LoRA files that training starts on top of, read and checked."""
    return build_merger(
        settings.base_weights, settings.base_weights_multiplier, config, "--base_weights", "--base_weights_multiplier"
    )


class Trainer:
    """One run: `run` trains from the first step to the last and writes files as the options ask.

    `dit` carries the layers of `network` and is otherwise frozen. Without sample prompts `sampler` is None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dit: WanDiT,
        network: LoRANetwork,
        datasets: DatasetsConfig,
        training_set: TrainingSet,
        task: TaskSpec,
        options: TrainingOptions,
        sampler: Sampler | None,
    ) -> None:
        self.accelerator, self.dit, self.network, self.sampler = accelerator, dit, network, sampler
        self.datasets, self.training_set, self.task, self.options = datasets, training_set, task, options
        run = options.run
        self.loader = BatchLoader(run.max_data_loader_n_workers, run.persistent_data_loader_workers)
        self.batches_per_epoch = math.ceil(len(training_set.epoch_batches(1)) / accelerator.num_processes)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / run.gradient_accumulation_steps)
        epochs = run.max_train_epochs
        self.total_steps = epochs * self.steps_per_epoch if epochs else run.max_train_steps
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.step, self.epoch, self.started = 0, 0, time.time()
        groups = network.param_groups(options.optimizer.learning_rate, options.network.loraplus_lr_ratio)
        optimizer = build_optimizer(options.optimizer, groups)
        self.scheduler = build_scheduler(options.optimizer, optimizer, self.total_steps)
        # Not accelerate's mixed precision: the DiT computes in the dtype of its weights, so there is nothing to cast.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=run.precision == "fp16")
        self.model, self.optimizer = accelerator.prepare(dit, optimizer)

    def run(self) -> Path:
        """Train to the end and return the path of the final LoRA file."""
        save, samples = self.options.save, self.options.samples
        log.info(
            "%d items in %d batches per epoch and process, %d steps per epoch, %d epochs, %d steps; seed %d",
            *(len(self.training_set.items), self.batches_per_epoch, self.steps_per_epoch, self.epochs),
            *(self.total_steps, self.training_set.seed),
        )
        if samples.sample_at_first:
            self._sample("e000000")
        self.dit.train()
        with tqdm(total=self.total_steps, desc="training", unit="step", disable=not self._is_main) as bar:
            losses: list[float] = []
            while self.step < self.total_steps:
                self.epoch += 1
                for group in self._groups():
                    losses = [*losses[1 - _LOSS_WINDOW :], self._optimize(group)]
                    self.step += 1
                    bar.set_postfix(
                        loss=f"{sum(losses) / len(losses):.4f}", lr=f"{self._learning_rate:.2e}", refresh=False
                    )
                    bar.update()
                    if save.save_every_n_steps and self.step % save.save_every_n_steps == 0:
                        self._save(f"-step{self.step:08d}")
                    if samples.due_after_step(self.step):
                        self._sample(f"{self.step:06d}")
                    if self.step == self.total_steps:
                        break
                if save.save_every_n_epochs and self.epoch % save.save_every_n_epochs == 0 and self.epoch < self.epochs:
                    self._save(f"-{self.epoch:06d}")
                if samples.due_after_epoch(self.epoch) and not samples.due_after_step(self.step):
                    self._sample(f"e{self.epoch:06d}")
        return self._save("")

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def _learning_rate(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def _groups(self) -> Iterator[list[TrainingBatch]]:
        """The batches of each optimizer step of the epoch; the last group may be short."""
        plans = self.training_set.epoch_batches(self.epoch)
        group: list[TrainingBatch] = []
        for batch in self.loader.load(share(plans, self.accelerator.process_index, self.accelerator.num_processes)):
            group.append(batch)
            if len(group) == self.options.run.gradient_accumulation_steps:
                yield group
                group = []
        if group:
            yield group

    def _optimize(self, group: list[TrainingBatch]) -> float:
        """One optimizer step, as over one batch of all items of all processes. Returns this process's mean loss."""
        items = sum(len(batch.item_keys) for batch in group)
        everywhere = self.accelerator.reduce(torch.tensor(float(items), device=self.accelerator.device)).item()
        total = torch.zeros((), device=self.accelerator.device)
        for batch in group:
            with nullcontext() if batch is group[-1] else self.accelerator.no_sync(self.model):
                losses = self._losses(batch)
                # Gradients are averaged over processes, while the mean that is wanted is over all items.
                share_of_mean = losses.sum() * (self.accelerator.num_processes / everywhere)
                self.accelerator.backward(self.scaler.scale(share_of_mean))
            total += losses.detach().sum()
        self.scaler.unscale_(self.optimizer.optimizer)
        if self.options.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.optimizer.max_grad_norm)
        self.scaler.step(self.optimizer.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item() / items

    def _losses(self, batch: TrainingBatch) -> Tensor:
        """Loss of each item; its noise level and noise depend on seed, epoch and item only."""
        device = self.accelerator.device
        generators = [seeded(self.training_set.seed, self.epoch, key) for key in batch.item_keys]
        t = sample_noise_levels(self.options.noise, tuple(batch.latents.shape[3:]), batch.uniform, generators)
        noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=generator) for generator in generators])
        frame_indices = batch.frame_indices
        if self.options.run.one_frame_legacy_indices:
            frame_indices = natural_indices(frame_indices)
        return flow_matching_loss(
            self.model,
            latents=batch.latents.to(device),
            condition=batch.condition.to(device),
            text=pad_text(batch.text).to(device),
            image=clip_for(batch, self.task.clip_images).to(device),
            frame_indices=frame_indices.to(device),
            noise=noise.to(device),
            t=t.to(device),
            weighting_scheme=self.options.noise.weighting_scheme,
        )

    def _sample(self, suffix: str) -> None:
        if self.sampler is not None:
            self.sampler.draw(self.dit, suffix)
        self.accelerator.wait_for_everyone()

    def _save(self, suffix: str) -> Path:
        save = self.options.save
        path = save.output_dir / f"{save.output_name}{suffix}.safetensors"
        if self._is_main:
            progress = {
                "training_started_at": self.started,
                "training_finished_at": time.time(),
                "num_train_items": len(self.training_set.items),
                "num_batches_per_epoch": self.batches_per_epoch,
                "num_epochs": self.epochs,
                "epoch": self.epoch,
                "steps": self.step,
                "max_train_steps": self.total_steps,
                "seed": self.training_set.seed,
            }
            metadata = lora_metadata(self.options, self.task, self.training_set.layouts, self.datasets, progress)
            save_lora(path, self.network, metadata, save.dtype)
            log.info("saved %s", path)
        self.accelerator.wait_for_everyone()
        return path


def build_accelerator(device: str | None) -> Accelerator:
    """Processes and devices as `accelerate launch` or plain `python` set them up; `--device cpu` forces the CPU."""
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device}: training takes cpu or cuda; choose GPUs by CUDA_VISIBLE_DEVICES")
    return Accelerator(mixed_precision="no", cpu=device == "cpu")


def shared_seed(seed: int | None) -> int:
    """The run's seed; without one, a random one that all processes agree on."""
    return seed if seed is not None else broadcast_object_list([random.SystemRandom().randrange(1 << 31)])[0]
