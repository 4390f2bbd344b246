"""One optimizer step over the batches of all processes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dataset.loader import TrainingBatch, clip_for
from utils.errors import ConfigError
from utils.randomness import address_seed, seeded
from wan.frames import condition
from wan.fused.graphs import GraphedGradients
from wan.lora.network import LoRANetwork
from wan.memory.sharding import full_tensor, load_optimizer_state, optimizer_state
from wan.models.tasks import TaskSpec
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.training.loss import flow_matching_loss
from wan.training.optimizers import is_schedule_free
from wan.training.options import TrainingOptions
from wan.training.state import places_in_schedule
from wan.training.timesteps import sample_noise_levels


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, the same in all processes."""

    loss: float  # mean over all items, before the update
    gradient_norm: float  # before clipping
    max_norm: tuple[int, float, float] | None  # LoRANetwork.apply_max_norm, if asked for
    skipped: bool  # nothing was updated, because loss or gradient was no finite number
    stop: bool  # some process was asked to stop
    spoilt: bool  # the update has made weights NaN or infinite


class TrainingStep:
    """Updates the LoRA of `model`, the DiT as accelerate has wrapped it.

    Noise levels, noise and dropout depend on (seed, epoch, item) and (seed, step, process) alone, so that a resumed run
    repeats an uninterrupted one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        network: LoRANetwork,
        optimizer: AcceleratedOptimizer,
        scheduler: LRScheduler,
        task: TaskSpec,
        options: TrainingOptions,
        seed: int,
    ) -> None:
        self.accelerator, self.model, self.network = accelerator, model, network
        self.optimizer, self.scheduler = optimizer, scheduler
        self.task, self.options, self.seed = task, options, seed
        # Not accelerate's mixed precision: the DiT computes in the dtype of its weights, so there is nothing to cast.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=options.run.precision == "fp16")
        self.graphs: GraphedGradients | None = None
        alone = accelerator.distributed_type == DistributedType.NO and not self.scaler.is_enabled()
        if alone and options.memory.records(accelerator.device) and not network.is_stochastic:
            loss = partial(flow_matching_loss, model, weighting_scheme=options.noise.weighting_scheme)
            self.graphs = GraphedGradients(loss, list(network.parameters()))
        optimizer.train()  # no effect on any but schedule-free optimizers

    def run(self, batches: list[TrainingBatch], items: int, epoch: int, step: int, stop: bool) -> StepResult:
        """Forward and backward over this process's batches, then one update, as over one batch of all `items`.

        items: those of all processes. epoch and step count from 1. stop: this process was asked to stop.
        """
        accelerator, scaler = self.accelerator, self.scaler
        torch.manual_seed(address_seed(self.seed, "dropout", step, accelerator.process_index))
        total = torch.zeros((), device=accelerator.device)
        for batch in batches:
            noisy = self._noisy(batch, epoch)
            # Gradients are averaged over processes, while the mean that is wanted is over all items.
            factor = accelerator.num_processes / items
            if self.graphs is not None:
                losses = self._replayed(self.graphs, noisy, factor, keep=len(batches) > 1)
            else:
                with nullcontext() if batch is batches[-1] else accelerator.no_sync(self.model):
                    losses = self.batch_loss(*noisy, self.options.noise.weighting_scheme)
                    accelerator.backward(scaler.scale(losses.sum() * factor))
            total += losses.detach().sum()
        everywhere = accelerator.reduce(torch.stack([total, torch.tensor(float(stop), device=total.device)]))
        loss, stops = everywhere.tolist()
        norm = self._clipped_norm()
        # A scaled gradient may overflow now and then; the scaler skips that step and lowers its scale.
        skipped = not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled())
        limit, max_norm, spoilt = self.options.network.scale_weight_norms, None, False
        if not skipped:
            scaler.step(self.optimizer.optimizer)
            max_norm = self.network.apply_max_norm(limit) if limit else None
            largest = torch.nn.utils.get_total_norm(self.network.parameters(), math.inf)
            spoilt = not math.isfinite(float(full_tensor(largest)))
        scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss / items, norm, max_norm, skipped, stops > 0, spoilt)

    def learning_rates(self) -> dict[str, float]:
        """Name of each group of parameters -> its current rate."""
        rates = self.scheduler.get_last_lr()
        return {group["name"]: float(rate) for group, rate in zip(self.optimizer.param_groups, rates, strict=True)}

    def adapted_rates(self) -> dict[str, float]:
        """Name of each group -> the rate that Prodigy and D-Adaptation use: their estimate `d` times the given one."""
        groups = [group for group in self.optimizer.param_groups if "d" in group]
        return {group["name"]: float(group["d"]) * float(group["lr"]) for group in groups}

    @contextmanager
    def as_saved(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Context in which the LoRA is what a file saved now would be; afterwards it is as before, to the bit.

        In it are the weights that a schedule-free optimizer wants to be used, rounded to the dtype of the file, which
        is that of the options unless it is given.
        """
        dtype = dtype or self.options.save.dtype
        if dtype == torch.float32 and not is_schedule_free(self.optimizer.optimizer):
            yield
            return
        with self.network.restored():
            self.optimizer.eval()
            self.network.round_(dtype)
            try:
                yield
            finally:
                self.optimizer.train()

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, schedule and gradient scaler. With sharded weights all processes have to call it."""
        return {
            "optimizer": optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], place: str) -> None:
        """Go on from a `state_dict`. Raises ConfigError, beginning with `place`, when the optimizer is another one.

        A schedule of another kind, and a gradient scaler where there was none, go on from the same step.
        """
        try:
            load_optimizer_state(self.optimizer, state["optimizer"])
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{place}: its optimizer does not fit ({error}); use the same settings") from None
        own, found = self.scheduler.state_dict(), state["scheduler"]
        self.scheduler.load_state_dict(own | {name: found[name] for name in places_in_schedule(own) if name in found})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def release_memory(self) -> None:
        """Free the memory that is kept between steps, for work of another kind."""
        if self.graphs is not None:
            self.graphs.release()

    def batch_loss(self, batch: TrainingBatch, noise: Tensor, t: Tensor, weighting_scheme: str = "none") -> Tensor:
        """Loss of each item, [B], at given noise [B, 16, F, H, W] and noise levels t [B]; inputs on any device."""
        return flow_matching_loss(self.model, **self._inputs(batch, noise, t), weighting_scheme=weighting_scheme)

    def _inputs(self, batch: TrainingBatch, noise: Tensor, t: Tensor) -> dict[str, Any]:
        """Arguments of `flow_matching_loss`, tensors on the device."""
        run, frame_indices = self.options.run, batch.frame_indices
        if run.one_frame_legacy_indices:
            frame_indices = condition.natural_indices(frame_indices)
        clips, target_only = [layout.clip for layout in batch.layouts], run.one_frame_loss == "target"
        given = batch.conditioning.known(batch.latents)
        weights = condition.loss_weights(clips, given, batch.target_masks, target_only)
        tensors = {
            "latents": batch.latents,
            "text": pad_text(batch.text),
            "frame_indices": frame_indices,
            "noise": noise,
            "t": t,
            "weights": weights,
        }
        device = self.accelerator.device
        tensors = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        conditioning = Conditioning(batch.conditioning.channels, clip_for(batch, self.task.clip_images))
        return tensors | {
            "conditioning": conditioning.map(lambda tensor: tensor.to(device)),
            "frame_sizes": batch.frame_sizes,
        }

    def _noisy(self, batch: TrainingBatch, epoch: int) -> tuple[TrainingBatch, Tensor, Tensor]:
        """Batch (targets drawn, if they are), noise [B, 16, F, H, W] and noise levels [B] of this epoch."""
        noise_config, target_range = self.options.noise, self.options.run.target_range
        if target_range is not None:
            batch = with_random_targets(batch, target_range, self.seed, epoch)
        generators = [seeded(self.seed, epoch, key) for key in batch.item_keys]
        t = sample_noise_levels(noise_config, batch.target_size, batch.uniform, generators)
        noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=generator) for generator in generators])
        return batch, noise, t

    def _replayed(
        self, graphs: GraphedGradients, noisy: tuple[TrainingBatch, Tensor, Tensor], factor: float, keep: bool
    ) -> Tensor:
        """Losses [B] by the recorded graphs; gradients times `factor` are added up. keep: more batches follow."""
        losses, gradients = graphs(self._inputs(*noisy), torch.tensor(factor, device=self.accelerator.device))
        for parameter, gradient in zip(graphs.parameters, gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
            elif gradient is not None:
                parameter.grad = gradient.clone() if keep else gradient
        return losses

    def _clipped_norm(self) -> float:
        self.scaler.unscale_(self.optimizer.optimizer)
        limit = self.options.optimizer.max_grad_norm or math.inf
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)))


def with_random_targets(batch: TrainingBatch, indices: range, seed: int, epoch: int) -> TrainingBatch:
    """The batch with the target of each item at a time index drawn from `indices`, except those of its controls."""
    layouts = tuple(
        layout.with_random_target(indices, seeded(seed, "target", epoch, key))
        for layout, key in zip(batch.layouts, batch.item_keys, strict=True)
    )
    slots = [new.slots_of(old) for old, new in zip(batch.layouts, layouts, strict=True)]
    items = [batch.conditioning.item(number) for number in range(len(slots))]
    return replace(
        batch,
        latents=torch.stack([frames[:, places] for frames, places in zip(batch.latents, slots, strict=True)]),
        conditioning=Conditioning.stack([item.select(places) for item, places in zip(items, slots, strict=True)]),
        layouts=layouts,
        frame_indices=torch.tensor([layout.clip.time_indices for layout in layouts]),
    )
