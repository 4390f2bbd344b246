"""Between two optimizer steps: saving, sampling and validating every so often, and stopping when asked.

Steps and epochs count from 1.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # of signal.signal


@dataclass(frozen=True)
class Every:
    """A period in optimizer steps, one in epochs, both or neither."""

    steps: int | None = None
    epochs: int | None = None

    def after_step(self, step: int) -> bool:
        """Whether something is due after this step."""
        return self.steps is not None and step % self.steps == 0

    def after_epoch(self, epoch: int) -> bool:
        """Whether something is due after this epoch."""
        return self.epochs is not None and epoch % self.epochs == 0


@dataclass(frozen=True)
class Action:
    """Part of a run that is due now and then: `at_step(step)` after a step, `at_epoch(epoch)` after an epoch.

    once: an epoch does not repeat what was due after its last step. at_end: the last epoch counts.
    """

    every: Every
    at_step: Callable[[int], object]
    at_epoch: Callable[[int], object]
    once: bool = True
    at_end: bool = True


class Cadence:
    """Takes the actions of a run, in the order given, after the steps and epochs at which they are due."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions = tuple(actions)

    def after_step(self, step: int) -> None:
        """Take what is due after this step."""
        for action in self._actions:
            if action.every.after_step(step):
                action.at_step(step)

    def after_epoch(self, epoch: int, step: int, last: bool) -> None:
        """Take what is due after this epoch, of which `step` was the last step; `last`: the run ends with it."""
        for action in self._actions:
            repeated = action.once and action.every.after_step(step)
            if action.every.after_epoch(epoch) and not repeated and (action.at_end or not last):
                action.at_epoch(epoch)


class StopRequest:
    """While active, Ctrl-C, SIGTERM and SIGHUP only set `signal`; a third Ctrl-C interrupts at once.

    Nothing interrupts while `saving` is set. A SIGHUP that nohup has ignored stays so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.saving = False
        self._interrupts = 0
        self._process = os.getpid()
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and self._process == os.getpid():  # not in a loader that was forked just now
            name = signal.Signals(number).name
            line = f"\n{name}: stops when the step under way and its files are done; a third Ctrl-C loses that step\n"
            with suppress(OSError):  # past sys.stderr, which may be in the middle of a write
                os.write(2, line.encode())
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 2 and not self.saving:
            raise KeyboardInterrupt
