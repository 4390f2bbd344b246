"""Validation: the loss on items held back from training, with the same noise each time, and that of the base model."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.loader import BatchItems, TrainingBatch, ValidationSet, load_batch
from utils.errors import ConfigError
from utils.options import Section, option
from utils.randomness import seeded
from wan.models.device import ALONE, Processes
from wan.training.cadence import Every

log = logging.getLogger(__name__)

LossFunction = Callable[[TrainingBatch, Tensor, Tensor], Tensor]
"""(batch, noise [B, 16, F, H, W], noise levels t [B]) -> loss of each item [B]."""

_MOST_LEVELS = 100  # so that three digits name a level


@dataclass(frozen=True)
class ValidationConfig(Section):
    """validation"""

    validation_split: float = option(
        0.0,
        finite=False,
        help="share (at most 0.5) or number of the items to validate with instead of training on them",
    )
    validate_every_n_steps: int | None = option(None, minimum=1, help="validate at the start and after every n steps")
    validate_every_n_epochs: int | None = option(None, minimum=1, help="validate at the start and after every n epochs")
    validation_levels: int = option(
        5,
        minimum=1,
        maximum=_MOST_LEVELS,
        rule=f"use 1 to {_MOST_LEVELS}",
        help="noise levels, evenly spread, that each item is tried at",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        split = self.validation_split
        if not (0 <= split <= 0.5 or (split >= 1 and split.is_integer())):
            raise ConfigError(f"--validation_split {split:g}: must be a share up to 0.5 or a number of items; try 0.1")
        if split and not self.wanted:
            raise ConfigError("--validation_split needs --validate_every_n_steps N or --validate_every_n_epochs N")

    @property
    def wanted(self) -> bool:
        """True when the run validates at all; it then does so before its first step, too."""
        return self.validate_every_n_steps is not None or self.validate_every_n_epochs is not None

    @property
    def levels(self) -> tuple[float, ...]:
        """The centres of equal parts of 0..1: 0.1, 0.3, 0.5, 0.7, 0.9."""
        return tuple((2 * i + 1) / (2 * self.validation_levels) for i in range(self.validation_levels))

    @property
    def every(self) -> Every:
        """Period of the validation."""
        return Every(self.validate_every_n_steps, self.validate_every_n_epochs)

    def check(self, validation_set: ValidationSet) -> None:
        """Raise ConfigError when there is nothing to validate with; warn when items are held back for nothing."""
        if self.wanted and not validation_set.items:
            flag = "validate_every_n_steps" if self.validate_every_n_steps is not None else "validate_every_n_epochs"
            raise ConfigError(
                f"--{flag} {getattr(self, flag)}: there are no items to validate with; add --validation_split 0.1 or "
                "a dataset with validation = true"
            )
        if validation_set.items and not self.wanted:
            log.warning(
                "%d items with validation = true are never used; add --validate_every_n_steps N",
                len(validation_set.items),
            )


@torch.no_grad()
def validate(
    loss: LossFunction,
    validation_set: ValidationSet,
    levels: Sequence[float],
    seed: int,
    device: torch.device,
    processes: Processes = ALONE,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[float, float]:
    """Mean loss over the items at each noise level.

    An item's noise depends on (seed, item, level) alone. Items go through the model one by one, so neither does its
    loss depend on others. loss: gets tensors on `device`, apart from the batch. processes: each of
    them calls `loss` equally often, as distributed models demand. reduce: adds up a tensor over the processes.
    Raises ConfigError, in all processes, when one of them can't read an item.
    """
    items, count = validation_set.items, processes.count
    sums = torch.zeros(len(levels) + 1, dtype=torch.float64, device=device)  # of losses by level, and of items
    for turn in range(processes.index, -(-len(items) // count) * count, count):
        item, batch, failure = items[turn % len(items)], None, None
        try:
            batch = load_batch(BatchItems((item,)))
        except (ConfigError, OSError) as error:
            failure = error
        processes.raise_anywhere(failure)
        assert batch is not None
        losses = [
            loss(
                batch,
                torch.randn(batch.latents.shape, generator=seeded(seed, "validation", item.key, level)).to(device),
                torch.tensor([level], device=device),
            )
            for level in levels
        ]
        if turn < len(items):  # beyond, it only keeps this process in step with the others
            sums += torch.cat([*losses, torch.ones(1, device=device)])
    *totals, measured = reduce(sums).tolist()
    return {level: total / measured for level, total in zip(levels, totals, strict=True)}


class Validator:
    """Measures the losses of one run, with and without its LoRA.

    model: put into eval mode meanwhile. without_lora: a context in which the model is its base; the base is measured
    once, at the first call. measure: `validate` with all its arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        without_lora: Callable[[], AbstractContextManager[None]],
        measure: Callable[[], dict[float, float]],
    ) -> None:
        self._model, self._without_lora, self._measure = model, without_lora, measure
        self._base: dict[str, float] | None = None

    def scalars(self) -> dict[str, float]:
        """Scalars by name: `validation/loss`, its parts `validation/loss_t0.1`, ..., the same for the base model."""
        was_training = self._model.training
        self._model.eval()
        try:
            if self._base is None:
                with self._without_lora():
                    self._base = _named("validation/base_loss", self._measure())
            return _named("validation/loss", self._measure()) | self._base
        finally:
            self._model.train(was_training)


def _named(name: str, losses: dict[float, float]) -> dict[str, float]:
    return {name: sum(losses.values()) / len(losses)} | {f"{name}_t{t:.3g}": loss for t, loss in losses.items()}
