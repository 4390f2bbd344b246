"""A loaded run: its model and data, its length, and the batches of each step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from dataset.config import DatasetsConfig
from dataset.loader import BatchItems, BatchLoader, TrainingBatch, TrainingSet, rank_slice
from wan.lora.network import LoRANetwork
from wan.models.tasks import TaskSpec
from wan.nets.dit import WanDiT
from wan.training.options import RunConfig, TrainingModels, TrainingOptions
from wan.training.samples import Sampler
from wan.training.state import Progress
from wan.training.tracking import Tracker


@dataclass(frozen=True)
class TrainingJob:
    """The parts of a run, checked and loaded. Without sample prompts `sampler` is None."""

    session_id: int  # tells the files of this run from those of others
    task: TaskSpec
    models: TrainingModels
    options: TrainingOptions
    datasets: DatasetsConfig
    training_set: TrainingSet
    dit: WanDiT  # carries the layers of `network` and is otherwise frozen
    network: LoRANetwork
    sampler: Sampler | None
    tracker: Tracker


@dataclass(frozen=True)
class RunLength:
    """Length of a run, in optimizer steps over the batches of all processes."""

    steps_per_epoch: int
    total_steps: int
    epochs: int  # the last one possibly cut short

    @classmethod
    def of(
        cls, run: RunConfig, training_set: TrainingSet, num_processes: int, progress: Progress | None = None
    ) -> "RunLength":
        """Length of a run with these settings; `max_train_epochs` comes before `max_train_steps`.

        progress: where the run goes on from. Its epochs may have had another number of steps than those to come.
        """
        progress, batches = progress or Progress(), run.batches_per_step(num_processes)
        per_epoch = len(training_set.epoch_steps(1, batches))
        left = len(_after(training_set.epoch_steps(progress.epoch + 1, batches), progress.items))
        if run.max_train_epochs is None:
            to_come = run.max_train_steps - progress.step - left  # after the epoch that the run is in
            return cls(per_epoch, run.max_train_steps, progress.epoch + 1 + math.ceil(to_come / per_epoch))
        epochs_to_come = run.max_train_epochs - progress.epoch - 1
        steps_to_come = left + per_epoch * epochs_to_come if epochs_to_come >= 0 else 0
        return cls(per_epoch, progress.step + steps_to_come, run.max_train_epochs)


@dataclass(frozen=True)
class StepBatches:
    """The batches of one optimizer step."""

    batches: list[TrainingBatch]  # of this process
    items: int  # in the batches of all processes; where those lack a batch, one is repeated
    new_items: int  # without those repeated


class StepLoader:
    """Loads the steps of an epoch (counted from 1) in the order of `TrainingSet.epoch_steps`."""

    def __init__(self, training_set: TrainingSet, run: RunConfig, process_index: int, num_processes: int) -> None:
        self._training_set, self._process, self._processes = training_set, process_index, num_processes
        self._batches_per_step = run.batches_per_step(num_processes)
        self._loader = BatchLoader(run.max_data_loader_n_workers, run.persistent_data_loader_workers)

    def items(self, epoch: int) -> int:
        """Number of items in the epoch, over all processes."""
        return _items_of(self._plans(epoch))

    def place(self, epoch: int, seen: int) -> int:
        """Number of items in the steps of the epoch that its first `seen` items fill or begin.

        It differs from `seen` where that is inside a step, or beyond the epoch, because a run that goes on has another
        batch size, accumulation, number of processes or dataset.
        """
        steps = self._plans(epoch)
        return _items_of(steps) - _items_of(_after(steps, seen))

    def remaining(self, epoch: int, seen: int) -> Iterator[StepBatches]:
        """The steps of the epoch that come after its first `seen` items, which are a `place`."""
        steps = _after(self._plans(epoch), seen)
        slices = [[rank_slice(plans, i, self._processes) for i in range(self._processes)] for plans in steps]
        loaded = self._loader.load([plan for by_process in slices for plan in by_process[self._process]])
        for plans, by_process in zip(steps, slices, strict=True):
            batches = list(islice(loaded, len(by_process[self._process])))
            yield StepBatches(batches, sum(map(_items, by_process)), _items(plans))

    def _plans(self, epoch: int) -> list[list[BatchItems]]:
        return self._training_set.epoch_steps(epoch, self._batches_per_step)


def _after(steps: list[list[BatchItems]], seen: int) -> list[list[BatchItems]]:
    """The steps that begin at or after the first `seen` items of an epoch."""
    begins = accumulate(map(_items, steps), initial=0)
    return [plans for plans, begin in zip(steps, begins, strict=False) if begin >= seen]


def _items_of(steps: list[list[BatchItems]]) -> int:
    return sum(map(_items, steps))


def _items(plans: Sequence[BatchItems]) -> int:
    return sum(len(plan.items) for plan in plans)
