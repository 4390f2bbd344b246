"""A script as a process of its system: signals that end it, and messages that nobody reads any more."""

import codecs
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows has no SIGHUP, and it alone has SIGBREAK


class Ended(BaseException):
    """A signal has asked the script to end. Like KeyboardInterrupt, it passes every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        """SIGTERM, SIGHUP ..."""
        return signal.Signals(self.number).name


def stop_signals() -> list[int]:
    """The signals that ask a program to end, but those that whoever started it has had ignored, as nohup does."""
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In the block, signals other than Ctrl-C raise Ended, so that half-written files are removed.

    Not in one of several processes of a run: a process that waits for the others would no longer end.
    """
    alone = "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1"
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [number for number in stop_signals() if number != signal.SIGINT] if alone and in_main_thread else []
    previous = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise Ended(number)


def leave_ascii() -> None:
    """Start the script again in Python's UTF-8 mode where the locale is ASCII and Python was told to obey it.

    Prompts and names of files have other letters too.
    """
    ascii_names = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_names and os.name == "posix" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def keep_messages_harmless() -> None:
    """Let no message end the script because nobody can read it: a closed stderr, a full disk, a pipe without a reader.

    Streams that were closed are opened anew to nowhere, lest the next file takes their number and with it messages of
    libraries.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    while nowhere <= 2:
        nowhere = os.dup(nowhere)
    os.close(nowhere)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 as long as the process lives
    if not isinstance(sys.stderr, _Tolerant):
        sys.stderr = _Tolerant(sys.stderr)


class _Tolerant:
    """A text stream that takes what can't be written and drops it."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 likewise

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it was closed
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
