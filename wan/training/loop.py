"""The loop of LoRA training."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from utils.cli import Stopped
from utils.dtypes import dtype_name
from utils.errors import ConfigError
from utils.text import one_line
from wan.lora.files import write_lora
from wan.memory.sharding import mapped
from wan.models.device import Launcher, Processes, write_on_main
from wan.training import start
from wan.training.cadence import Action, Cadence, StopRequest
from wan.training.job import RunLength, StepBatches, StepLoader, TrainingJob
from wan.training.saving import Saver
from wan.training.state import Progress, State, changed_facts, save_state
from wan.training.step import StepResult
from wan.training.summary import RunSummary

log = logging.getLogger(__name__)


class MemoryRanOut(Exception):  # noqa: N818 it says what happened
    """The GPU's memory was not enough for a step. `state`: from where to go on, in host memory; None before a step."""

    def __init__(self, cause: torch.OutOfMemoryError, state: State) -> None:
        super().__init__()
        self.cause = cause
        on_host = [mapped(part, Tensor.cpu) for part in (state.weights, state.optimizer)]
        self.state = State(state.path, state.progress, state.facts, *on_host) if state.progress.step else None


class Trainer:
    """One run: `run` trains from the first step, or from a state, to the last and writes files as the options ask."""

    def __init__(self, accelerator: Accelerator, job: TrainingJob, state: State | None = None) -> None:
        self.accelerator, self.job = accelerator, job
        options, processes = job.options, accelerator.num_processes
        self.progress = state.progress if state is not None else Progress(started=time.time())
        self._first_step, self._processes = self.progress.step, Processes(accelerator.process_index, processes)
        self.length = RunLength.of(options.run, job.training_set, processes, self.progress)
        self.summary = RunSummary(job, self.length, processes)
        self.loader = StepLoader(job.training_set, options.run, accelerator.process_index, processes)
        self.progress.items = self.loader.place(self.progress.epoch + 1, self.progress.items)
        self.training_step = start.build_step(accelerator, job, self.length.total_steps)
        self.stop = StopRequest(Launcher.find())
        self.validator = start.build_validator(accelerator, job, self.training_step)
        self.saver = Saver(options.save, self._write_lora, self._write_state, deletes=accelerator.is_main_process)
        self.cadence = Cadence(
            [
                self.saver.lora_action,
                Action(
                    options.samples.every,
                    at_step=lambda step: self._sample(f"{step:06d}"),
                    at_epoch=lambda epoch: self._sample(f"e{epoch:06d}"),
                ),
                Action(options.validation.every, at_step=self._validate, at_epoch=self._validate),
                self.saver.state_action,  # last, so that a resumed run repeats nothing of the above
            ]
        )
        if job.sampler is not None and accelerator.is_fsdp2:
            job.sampler.draw_together(gather_object, accelerator.is_main_process)
        if state is not None:
            self._restore(state)
            self.saver.catch_up(self.progress.step, self.progress.epoch)

    def run(self) -> Path:
        """Train to the end and return the path of the final LoRA file.

        Raises Stopped, with a state saved, on Ctrl-C, SIGTERM, SIGHUP, or too many steps in a row without a finite
        loss; Stopped, and nothing saved, after an update to NaN; and MemoryRanOut.
        """
        log.info("%s", self.summary.table())
        self.job.dit.train()
        if self.progress.step == 0:
            if self.job.options.samples.sample_at_first:
                self._sample("e000000")
            self._validate(0)
        with self._progress_bar() as bar, self.stop:
            skipped_in_a_row = 0
            while not self._finished:
                for data in self._data():
                    result = self._train(data)
                    self._report(result, bar)
                    if result.spoilt:
                        self._give_up()
                    with self._stopping_without_data():
                        self.cadence.after_step(self.progress.step)
                    skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
                    if result.stop:
                        self._stop(self.stop.reason, self.stop.exit_code)
                    if skipped_in_a_row == self.job.options.run.stop_after_skipped_steps:
                        self._stop(f"{skipped_in_a_row} steps in a row without a finite loss or gradient", 1)
                    if self._finished:
                        break
                epoch = self.progress.epoch + 1
                self.progress.end_epoch(self.loader.items(epoch))
                with self._stopping_without_data():
                    self.cadence.after_epoch(epoch, self.progress.step, last=self._finished)
            self.stop.ending = True
            self.accelerator.wait_for_everyone()
            path = self._save_final()
        self.job.tracker.close()
        return path

    def _save_final(self) -> Path:
        try:
            return self.saver.save_final()
        except OSError:
            self.saver.save_interrupted(self.progress.step)  # from which a run goes on to the final file alone
            raise

    @property
    def _finished(self) -> bool:
        """Whether all steps are taken, and what follows the epoch if the last one ended it, also before a resume."""
        if self.progress.step < self.length.total_steps:
            return False
        return self.progress.items != self.loader.items(self.progress.epoch + 1)

    def _data(self) -> Iterator[StepBatches]:
        """The data of the steps left in the epoch. Where a process can't read its own, the run stops with a state."""
        steps = self.loader.remaining(self.progress.epoch + 1, self.progress.items)
        data: StepBatches | None = None
        while True:
            with self._stopping_without_data():
                failure = None
                try:
                    data = next(steps, None)
                except (ConfigError, OSError) as error:
                    failure = error
                self._processes.raise_anywhere(failure)
            if data is None:
                return
            yield data

    def _train(self, data: StepBatches) -> StepResult:
        epoch, step = self.progress.epoch + 1, self.progress.step + 1
        start = time.perf_counter()
        try:
            result = self.training_step.run(data.batches, data.items, epoch, step, self.stop.is_made)
        except torch.OutOfMemoryError as error:
            if self.stop.is_made and self.progress.step:
                self._stop(self.stop.reason, self.stop.exit_code)
            raise MemoryRanOut(error, self._state()) from error
        self.stop.step_seconds = time.perf_counter() - start
        self.progress.add_step(data.new_items, None if result.skipped else result.loss)
        if result.skipped:
            log.warning("step %d: no finite loss or gradient; nothing was updated", step)
        return result

    @contextmanager
    def _stopping_without_data(self) -> Iterator[None]:
        """Caches that are gone, or a loader process that was killed, stop the run with a state of the steps so far."""
        try:
            yield
        except (ConfigError, OSError) as error:
            if self.progress.step == self._first_step:
                raise
            self._stop(str(error), 1)

    # --- what is seen of the run

    def _progress_bar(self) -> "tqdm[NoReturn]":
        hidden = not self.accelerator.is_main_process
        done, total = self.progress.step, self.length.total_steps
        bar: tqdm[NoReturn] = tqdm(total=total, initial=done, desc="training", unit="step", disable=hidden)
        return bar

    def _report(self, result: StepResult, bar: "tqdm[NoReturn]") -> None:
        average, rates = self.progress.average_loss, self.training_step.learning_rates()
        bar.set_postfix(loss=f"{average:.4f}", lr=f"{next(iter(rates.values())):.2e}", refresh=False)
        bar.update()
        scalars = {"loss/current": result.loss, "loss/average": average, "gradient_norm": result.gradient_norm}
        scalars |= {f"lr/{name}": rate for name, rate in rates.items()}
        scalars |= {f"lr/d*lr/{name}": rate for name, rate in self.training_step.adapted_rates().items()}
        if result.max_norm is not None:
            scalars |= dict(zip(("max_norm/scaled", "max_norm/average", "max_norm/max"), result.max_norm, strict=True))
        self.job.tracker.scalars(self.progress.step, scalars)

    def _sample(self, suffix: str) -> None:
        if self.job.sampler is not None:
            self.training_step.release_memory()
            with self.training_step.as_saved():
                paths = self.job.sampler.draw(self.job.dit, suffix)
            for path in sorted(gather_object(paths)):
                if path.is_file():  # not when another machine has drawn it into a folder of its own
                    self.job.tracker.image(self.progress.step, path.stem, path)

    def _validate(self, _: int) -> None:
        if self.validator is not None:
            self.training_step.release_memory()
            with self.training_step.as_saved():
                scalars = self.validator.scalars()
            self.job.tracker.scalars(self.progress.step, scalars)

    # --- files

    def _write_lora(self, path: Path, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.job.options.save.dtype
        with self.training_step.as_saved(dtype), self.stop.writing():
            tensors = self.job.network.state_dict(dtype)  # those of the network, not copies
            if fits := all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                write_on_main(lambda: write_lora(path, tensors, self.summary.metadata(self.progress)))
        if not fits:
            log.warning("--save_precision %s: has no room for these weights; saved as float32", dtype_name(dtype))
            self._write_lora(path, torch.float32)

    def _state(self, path: Path = Path("the last step")) -> State:
        """All that the run needs to go on from here. path: where the state will be."""
        weights = self.job.network.state_dict(torch.float32)
        return State(path, self.progress, self.summary.facts(), weights, self.training_step.state_dict())

    def _write_state(self, path: Path) -> None:
        state = self._state(path)
        with self.stop.writing():
            write_on_main(lambda: save_state(state))

    def _restore(self, state: State) -> None:
        self.job.network.load_state_dict(state.weights, f"--resume {state.path}")
        self.training_step.load_state_dict(state.optimizer, f"--resume {state.path}")
        for name, now, then in changed_facts(self.summary.facts(), state.facts):
            log.warning("resuming with %s = %s; the state was made with %s", name, now, one_line(then))
        log.info("resuming from %s: step %d of %d", state.path, self.progress.step, self.length.total_steps)

    def _give_up(self) -> NoReturn:
        self.job.tracker.close()
        self.accelerator.wait_for_everyone()
        latest = (
            f"the latest file before it is {self.saver.latest}" if self.saver.latest else "no file was saved before"
        )
        raise Stopped(
            f"stopped: the update of step {self.progress.step} made weights NaN or infinite, and nothing of it is saved"
            f"; {latest}; use a lower --learning_rate",
            1,
        )

    def _stop(self, reason: str, exit_code: int) -> NoReturn:
        self.stop.ending = True
        path = self.saver.save_interrupted(self.progress.step)
        self.job.tracker.close()
        self.accelerator.wait_for_everyone()  # as soon as one has ended, the launcher kills the others
        how = f"go on with --resume {path}" if path else "no state could be saved; resume from the newest one"
        raise Stopped(f"stopped after step {self.progress.step} ({reason}): {how}", exit_code)
