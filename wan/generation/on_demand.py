"""Models that are loaded on first use and sit on the device only while they are used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Generic, TypeVar

import torch
from torch import nn

from utils.stopwatch import Stopwatch

_ROOM_FOR_THE_NEXT = 24 << 30  # bytes: umT5-XXL (11 GB) and the activations of any stage

Model = TypeVar("Model", bound=nn.Module)


class AfterUse(Enum):
    """Fate of a model after each use."""

    DROP = "freed; the next use loads it anew"
    KEEP = "kept in host memory, or on the device if that has plenty of room"


class OnDemand(Generic[Model]):
    """A model that `load` makes on first use. The stopwatch gets the time of loading and of copies to the device."""

    def __init__(
        self,
        name: str,
        load: Callable[[torch.device], Model],
        device: torch.device,
        stopwatch: Stopwatch,
        after_use: AfterUse,
    ) -> None:
        self._stage, self._stopwatch = f"loading {name}", stopwatch
        self._load, self._device, self._after_use = load, device, after_use
        self._model: Model | None = None
        self._in_use = False

    @property
    def is_loaded(self) -> bool:
        """True when the model is in memory: on the device, or waiting for its next use."""
        return self._model is not None

    def use(self) -> Model:
        """The model, which is on the device from now until `release` or `forget`."""
        if self._model is None or not self._in_use:
            with self._stopwatch.stage(self._stage):
                self._model = self._load(self._device) if self._model is None else self._model.to(self._device)
            self._in_use = True
        return self._model

    def release(self) -> None:
        """End the use, if it is in use: drop the model or keep it, see `AfterUse`."""
        if not self._in_use:
            return
        self._in_use = False
        if self._after_use is AfterUse.DROP:
            self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            if self._model is not None and torch.cuda.mem_get_info(self._device)[0] < _ROOM_FOR_THE_NEXT:
                self._model.to("cpu")
                torch.cuda.empty_cache()

    def forget(self) -> None:
        """Drop the model, in use or not: the next use loads it anew."""
        self._model, self._in_use = None, False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def on_device(self) -> Iterator[Model]:
        """The model on the device, for the length of the block."""
        model = self.use()
        try:
            yield model
        finally:
            del model
            self.release()
