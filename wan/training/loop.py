"""LoRA training: the loop, and going on from a state."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset.config import DatasetsConfig
from dataset.loader import BatchItems, BatchLoader, TrainingBatch, TrainingSet, rank_slice
from utils.cli import Stopped
from utils.dtypes import dtype_name
from utils.errors import ConfigError
from utils.text import table
from wan.lora.files import write_lora
from wan.lora.network import LoRANetwork
from wan.memory.sharding import load_optimizer_state, mapped, optimizer_state
from wan.models.device import write_on_main
from wan.models.estimate import expected_memory
from wan.models.tasks import TaskSpec
from wan.nets.dit import WanDiT
from wan.training.checkpoints import Checkpoints
from wan.training.metadata import lora_metadata
from wan.training.optimizers import build_optimizer, build_scheduler
from wan.training.options import TrainingOptions
from wan.training.samples import Sampler
from wan.training.signals import StopRequest
from wan.training.state import Progress, State, save_state
from wan.training.step import StepResult, TrainingStep
from wan.training.summary import dataset_rows
from wan.training.tracking import Tracker
from wan.training.validation import Validator, validate

log = logging.getLogger(__name__)

_LOSS_WINDOW = 100  # steps that the shown loss is averaged over


@dataclass(frozen=True)
class TrainingJob:
    """What is trained on what: checked and loaded. Without sample prompts `sampler` is None."""

    task: TaskSpec
    options: TrainingOptions
    datasets: DatasetsConfig
    training_set: TrainingSet
    dit: WanDiT  # carries the layers of `network` and is otherwise frozen
    network: LoRANetwork
    sampler: Sampler | None
    tracker: Tracker


class MemoryRanOut(Exception):  # noqa: N818 it says what happened
    """The GPU's memory was not enough for a step. `state`: from where to go on, in host memory; None before a step."""

    def __init__(self, state: State) -> None:
        super().__init__()
        on_host = [mapped(part, Tensor.cpu) for part in (state.weights, state.optimizer)]
        self.state = State(state.path, state.progress, state.facts, *on_host) if state.progress.step else None


class Trainer:
    """One run: `run` trains from the first step, or from a state, to the last and writes files as the options ask."""

    def __init__(self, accelerator: Accelerator, job: TrainingJob, state: State | None = None) -> None:
        self.accelerator, self.job, self.options = accelerator, job, job.options
        run = self.options.run
        self.seed = job.training_set.seed
        self.batches_per_step = run.gradient_accumulation_steps * accelerator.num_processes
        self.steps_per_epoch = len(self._epoch(1))
        epochs = run.max_train_epochs
        self.total_steps = epochs * self.steps_per_epoch if epochs else run.max_train_steps
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        groups = job.network.param_groups(self.options.optimizer.learning_rate, self.options.network.loraplus_lr_ratio)
        optimizer = build_optimizer(self.options.optimizer, groups)
        scheduler = build_scheduler(self.options.optimizer, optimizer, self.total_steps)
        # All processes read the same file: only what is trained is worth sending around at the start.
        frozen = [name for name, parameter in job.dit.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(job.dit, frozen)
        model, optimizer = accelerator.prepare(job.dit, optimizer)
        self.step = TrainingStep(
            accelerator, model, job.network, optimizer, scheduler, job.task, self.options, self.seed
        )
        self.loader = BatchLoader(run.max_data_loader_n_workers, run.persistent_data_loader_workers)
        self.checkpoints = Checkpoints(self.options.save, self._write_lora, self._write_state, deletes=self._is_main)
        self.progress = Progress(started=time.time())
        self.validator = self._validator() if self.options.validation.wanted else None
        if job.sampler is not None and accelerator.is_fsdp2:
            job.sampler.draw_together(gather_object, self._is_main)
        if state is not None:
            self._restore(state)

    def run(self) -> Path:
        """Train to the end and return the path of the final LoRA file.

        Raises Stopped, with a state saved, on Ctrl-C, SIGTERM, or too many steps in a row without a finite loss, and
        MemoryRanOut.
        """
        log.info("%s", self._table())
        self.job.dit.train()
        if self.progress.step == 0:
            if self.options.samples.sample_at_first:
                self._sample("e000000")
            self._validate()
        with self._bar(self.progress.step) as bar, StopRequest() as stop:
            skipped_in_a_row = 0
            while self.progress.step < self.total_steps:
                for plans, batches in self._remaining_of_epoch():
                    try:
                        result = self._train(plans, batches, stop)
                    except torch.OutOfMemoryError as error:
                        raise MemoryRanOut(self._state()) from error
                    skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
                    self._report(result, bar)
                    self._after_step()
                    if result.stop:
                        self._stop(signal.Signals(stop.signal or signal.SIGTERM).name, 128 + (stop.signal or 15))
                    if skipped_in_a_row == self.options.run.stop_after_skipped_steps:
                        self._stop(f"{skipped_in_a_row} steps in a row without a finite loss or gradient", 1)
                    if self.progress.step == self.total_steps:
                        break
                self._after_epoch()
        self.accelerator.wait_for_everyone()
        path = self.checkpoints.save_final()
        self.job.tracker.close()
        return path

    def _table(self) -> str:
        job, run, options = self.job, self.options.run, self.options
        summary, spec = job.network.summary(), job.dit.spec
        memory = expected_memory(job.dit, job.network, spec, job.training_set.buckets, options.memory)
        rows = [
            ("task", f"{job.task.name}, {spec.num_layers} blocks of width {spec.dim}"),
            *dataset_rows(job.training_set),
            ("network", str(summary)),
            (
                "precision",
                f"DiT {dtype_name(job.dit.dtype)}, LoRA float32, saved as {dtype_name(options.save.dtype)}",
            ),
            ("steps", f"{self.total_steps} in {self.epochs} epochs of {self.steps_per_epoch}"),
            (
                "batches per step",
                f"{run.gradient_accumulation_steps} in {self.accelerator.num_processes} processes",
            ),
            ("seed", str(self.seed)),
            ("expected memory", memory),
        ]
        return "\n".join(table(rows))

    # --- the data of an epoch

    def _epoch(self, epoch: int) -> list[list[BatchItems]]:
        """The batches of each step of an epoch (counted from 1), over all processes."""
        return self.job.training_set.epoch_steps(epoch, self.batches_per_step)

    def _remaining_of_epoch(self) -> Iterator[tuple[list[BatchItems], list[TrainingBatch]]]:
        """For each step to come: the batches of all processes as plans, and those of this process, loaded."""
        steps, seen = self._epoch(self.progress.epoch + 1), 0
        while steps and seen < self.progress.items:
            seen += _items(steps.pop(0))
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        own = [rank_slice(plans, process, processes) for plans in steps]
        loaded = self.loader.load([plan for plans in own for plan in plans])
        for plans, mine in zip(steps, own, strict=True):
            yield plans, list(islice(loaded, len(mine)))

    # --- a step

    def _train(self, plans: list[BatchItems], batches: list[TrainingBatch], stop: StopRequest) -> StepResult:
        processes = self.accelerator.num_processes
        items = sum(_items(rank_slice(plans, process, processes)) for process in range(processes))
        progress = self.progress
        result = self.step.run(batches, items, progress.epoch + 1, progress.step + 1, stop.signal is not None)
        progress.step += 1
        progress.items += _items(plans)
        if result.skipped:
            progress.skipped_steps += 1
            log.warning("step %d: no finite loss or gradient; nothing was updated", progress.step)
        else:
            progress.losses = (*progress.losses[1 - _LOSS_WINDOW :], result.loss)
        return result

    def _report(self, result: StepResult, bar: tqdm) -> None:
        losses, rates = self.progress.losses, list(map(float, self.step.scheduler.get_last_lr()))
        average = sum(losses) / len(losses) if losses else math.nan
        bar.set_postfix(loss=f"{average:.4f}", lr=f"{rates[0]:.2e}", refresh=False)
        bar.update()
        scalars = {"loss/current": result.loss, "loss/average": average, "gradient_norm": result.gradient_norm}
        names = (group["name"] for group in self.step.optimizer.param_groups)
        scalars |= {f"lr/{name}": rate for name, rate in zip(names, rates, strict=True)}
        if result.max_norm is not None:
            scalars |= dict(zip(("max_norm/scaled", "max_norm/average", "max_norm/max"), result.max_norm, strict=True))
        self.job.tracker.scalars(self.progress.step, scalars)

    def _after_step(self) -> None:
        step = self.progress.step
        due = self.checkpoints.step_due(step)
        if due:
            self.checkpoints.save_step(step)
        if self.options.samples.due_after_step(step):
            self._sample(f"{step:06d}")
        if self.options.validation.due_after_step(step):
            self._validate()
        if due:
            self.checkpoints.save_step_state(step)

    def _after_epoch(self) -> None:
        progress = self.progress
        epoch, last = progress.epoch + 1, progress.step == self.total_steps
        if progress.items == sum(map(_items, self._epoch(epoch))):
            progress.epoch, progress.items = epoch, 0
        due = self.checkpoints.epoch_due(epoch, last)
        if due:
            self.checkpoints.save_epoch(epoch)
        if self.options.samples.due_after_epoch(epoch) and not self.options.samples.due_after_step(progress.step):
            self._sample(f"e{epoch:06d}")
        if self.options.validation.due_after_epoch(epoch) and not self.options.validation.due_after_step(progress.step):
            self._validate()
        if due:
            self.checkpoints.save_epoch_state(epoch)

    def _sample(self, suffix: str) -> None:
        if self.job.sampler is not None:
            self.step.release_memory()
            for path in sorted(gather_object(self.job.sampler.draw(self.job.dit, suffix))):
                if path.is_file():  # not when another machine has drawn it into a folder of its own
                    self.job.tracker.image(self.progress.step, path.stem, path)

    def _validator(self) -> Validator:
        accelerator, job = self.accelerator, self.job
        measure = partial(
            validate,
            self.step.batch_loss,
            job.training_set.validation,
            self.options.validation.levels,
            self.seed,
            accelerator.device,
            (accelerator.process_index, accelerator.num_processes),
            accelerator.reduce,
        )
        return Validator(job.dit, job.network.disabled, measure)

    def _validate(self) -> None:
        if self.validator is not None:
            self.step.release_memory()
            self.job.tracker.scalars(self.progress.step, self.validator.scalars())

    def _stop(self, reason: str, exit_code: int) -> None:
        path = self.checkpoints.save_interrupted(self.progress.step)
        self.job.tracker.close()
        self.accelerator.wait_for_everyone()  # as soon as one has ended, the launcher kills the others
        how = f"go on with --resume {path}" if path else "no state could be saved; resume from the newest one"
        raise Stopped(f"stopped after step {self.progress.step} ({reason}): {how}", exit_code)

    # --- files

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _bar(self, done: int) -> tqdm:
        return tqdm(total=self.total_steps, initial=done, desc="training", unit="step", disable=not self._is_main)

    def _write_lora(self, path: Path) -> None:
        tensors = self.job.network.state_dict(self.options.save.dtype)
        write_on_main(lambda: write_lora(path, tensors, self._metadata()))

    def _state(self, path: Path = Path("the last step")) -> State:
        """What the run needs to go on from here. path: where it will be."""
        step = self.step
        optimizer = {
            "optimizer": optimizer_state(step.optimizer),
            "scheduler": step.scheduler.state_dict(),
            "scaler": step.scaler.state_dict(),
        }
        return State(path, self.progress, self._facts(), self.job.network.state_dict(torch.float32), optimizer)

    def _write_state(self, path: Path) -> None:
        state = self._state(path)
        write_on_main(lambda: save_state(state))

    def _restore(self, state: State) -> None:
        self.progress = state.progress
        self.job.network.load_state_dict(state.weights, f"--resume {state.path}")
        try:
            load_optimizer_state(self.step.optimizer, state.optimizer["optimizer"])
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"--resume {state.path}: its optimizer does not fit ({error}); use the same settings"
            ) from None
        self.step.scheduler.load_state_dict(state.optimizer["scheduler"])
        self.step.scaler.load_state_dict(state.optimizer["scaler"])
        for name, value in self._facts().items():
            if state.facts.get(name) != value:
                log.warning("resuming with %s = %s; the state was made with %s", name, value, state.facts.get(name))
        log.info("going on from %s: step %d of %d", state.path, self.progress.step, self.total_steps)

    def _facts(self) -> dict[str, Any]:
        """What a resumed run should have in common with the one that wrote the state."""
        run = self.options.run
        return {
            "seed": self.seed,
            "processes": self.accelerator.num_processes,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "items": len(self.job.training_set.items),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "precision": run.precision,
            "optimizer_type": self.options.optimizer.optimizer_type,
            "learning_rate": self.options.optimizer.learning_rate,  # that of the state goes on
            "lr_scheduler": self.options.optimizer.lr_scheduler,
        }

    def _metadata(self) -> dict[str, str]:
        job, progress = self.job, self.progress
        counters = {
            "training_started_at": progress.started,
            "training_finished_at": time.time(),
            "num_train_items": len(job.training_set.items),
            "num_batches_per_epoch": len(job.training_set.epoch_batches(1)),
            "num_epochs": self.epochs,
            "epoch": progress.epoch + (progress.items > 0),
            "steps": progress.step,
            "max_train_steps": self.total_steps,
            "seed": self.seed,
        }
        ranks = job.network.summary().metadata
        return lora_metadata(self.options, job.task, job.training_set.layouts, job.datasets, ranks, counters)


def _items(plans: list[BatchItems]) -> int:
    return sum(len(plan.items) for plan in plans)
