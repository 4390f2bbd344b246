"""Between two optimizer steps: saving, sampling and validating every so often, and stopping when asked.

Steps and epochs count from 1.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from utils.process import stop_signals
from wan.models.device import Launcher

log = logging.getLogger(__name__)

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
    """While active, Ctrl-C, SIGTERM and SIGHUP only ask for a stop, and so does the end of the launcher.

    A third Ctrl-C interrupts at once, or after the file that is being written; not at all while `ending` is set. A
    signal that whoever started the run has had ignored, as nohup does, stays so, and the log says what to do instead.
    step_seconds, save_seconds: how long the latest ones took, for the message to the user; None before the first.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.signal: int | None = None
        self.ending = False
        self.step_seconds: float | None = None
        self.save_seconds: float | None = None
        self._launcher, self._process = launcher, os.getpid()
        self._interrupts, self._writing = 0, 0
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> "StopRequest":
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        if signal.SIGINT not in self._previous:
            log.info(
                "Ctrl-C is ignored here (started in the background?); `kill %d` saves a state and stops", os.getpid()
            )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_made(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None or self._is_orphan

    @property
    def reason(self) -> str:
        """The cause of the stop in words; SIGTERM when it reached another process."""
        if self.signal is None and self._is_orphan:
            return "its launcher has ended"
        return signal.Signals(self.signal or signal.SIGTERM).name

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, which is how shells count."""
        return 128 + (self.signal or signal.SIGTERM)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A file is written in the block: a third Ctrl-C waits for its end."""
        self._writing += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self._writing -= 1
            self.save_seconds = time.perf_counter() - start
        self._interrupt_if_insisted()

    @property
    def _is_orphan(self) -> bool:
        return self._launcher is not None and self._launcher.has_ended

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and self._process == os.getpid():  # not in a loader that was forked just now
            with suppress(OSError):  # past sys.stderr, which may be in the middle of a write
                os.write(2, f"\n{signal.Signals(number).name}: {self._what_happens()}\n".encode())
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        self._interrupt_if_insisted()

    def _interrupt_if_insisted(self) -> None:
        if self._interrupts > 2 and not self._writing and not self.ending:
            raise KeyboardInterrupt

    def _what_happens(self) -> str:
        save = f" (the last save took {self.save_seconds:.1f} s)" if self.save_seconds is not None else ""
        if self.ending:
            return f"the last files are being written{save}, then it ends"
        step = f" (a step takes {self.step_seconds:.1f} s)" if self.step_seconds is not None else ""
        return (
            f"finishes the step under way{step} and what is due after it, saves a state{save} and stops; "
            "a third Ctrl-C loses that step"
        )
