"""Runs of the scripts that are killed, or refused by the disk, at a chosen operation on the file system.

An operation is what changes something in the current folder: opening a file for writing, writing, syncing, renaming,
deleting, making a folder, changing rights. `Forks` starts a process that has imported everything; each run is a fork of
it, so that it takes as long as its work. Linux only, for /proc and audit hooks that see folders by their descriptors.
"""

import builtins
import errno
import importlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS = ("wan_cache_latents", "wan_cache_text_encoder_outputs", "wan_train_network", "wan_generate_video")
TOOLS = ("wan_lora", "wan_dataset")
_LATE = (  # what the scripts import only when they run
    *("wan.training.run", "wan.generation.start", "wan.caching.run", "wan.generation.run", "dataset.cache"),
    *("transformers.models.umt5.modeling_umt5", "transformers.models.clip.modeling_clip", "transformers.optimization"),
)
KILLED = 137
_APART = 3  # operations between two signals
_SECONDS = 100  # a run takes under one, but machines may be busy
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Job:
    """A run of a script in `folder`, and the operation at which something happens to it (from 1; 0: nothing)."""

    folder: str
    script: str
    arguments: tuple[str, ...]
    at: int = 0
    error: str = ""  # the name in `errno` that the operation fails with; "": the process ends there
    signals: tuple[str, ...] = ()  # instead: names of signals that come before it and, one by one, before later ones
    name: str = "run"

    @property
    def beside(self) -> Path:
        """Where output and operations of the run are kept: files that begin so."""
        return Path(f"{self.folder}.{self.name}")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. operations: those that it came to, each as (kind, path in the folder, other facts)."""

    code: int
    output: str
    operations: list[tuple[Any, ...]]

    @property
    def errors(self) -> list[str]:
        """The lines that begin like the last one of a script that gives up."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


class Operations:
    """Counts the operations of this process in the current folder, notes them, and strikes at one of them.

    A note is a line of JSON: kind, path, and for a sync of a file the number of a copy of its content.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._count, self._copies, self._lock = job, 0, 0, threading.RLock()
        self._folder = os.path.realpath(job.folder) + os.sep
        self._notes = os.open(f"{job.beside}.operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._inside = threading.local()

    def start(self) -> None:
        """Watch from now on, until the process ends."""
        sys.addaudithook(self._audit)
        opened, sync = io.open, os.fsync
        from safetensors import torch as safetensors_torch  # here, as the module is patched

        serialize = safetensors_torch.serialize_file

        def open_file(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            found = opened(file, mode, buffering, *more, **named)
            path = self._inner(file) if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+") else None
            whole = buffering == 0 and bool(self._job.error)  # the system refuses a write before it begins
            strike = lambda half: self.operation("write", path, half=None if whole else half)  # noqa: E731
            return _File(found, strike) if path else found

        def fsync(handle: int) -> None:
            path = self._inner(Path(f"/proc/self/fd/{handle}").readlink())
            if path is None:
                return sync(handle)  # what the disk really does is of no interest here
            copy = 0
            if Path(path).is_file():
                with self._unseen():
                    self._copies += 1
                    copy = self._copies
                    Path(f"{self._job.beside}.copy{copy}").write_bytes(Path(path).read_bytes())
            return self.operation("sync", path, copy)

        def serialize_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            def half() -> None:
                with self._unseen():
                    Path(path).write_bytes(b"half of a file")

            try:
                self.operation("serialize", self._inner(path), half=half)
            except OSError as error:  # as the Rust code puts it
                words = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors_torch.SafetensorError(words) from None
            serialize(tensors, path, metadata)

        safetensors_torch.SafetensorError = importlib.import_module("safetensors").SafetensorError
        safetensors_torch.serialize_file = serialize_file
        builtins.open = io.open = open_file
        pathlib.Path.open = lambda path, *more, **named: open_file(path, *more, **named)
        os.fsync = fsync

    def operation(self, kind: str, path: str | None, *facts: Any, half: Callable[[], None] | None = None) -> None:
        """Note an operation that is about to happen to `path`; half: do it by half before the process is struck."""
        if path is None or getattr(self._inside, "unseen", False):
            return
        with self._lock:
            self._count += 1
            os.write(self._notes, json.dumps([kind, path.removeprefix(self._folder), *facts]).encode() + b"\n")
            if self._job.signals:
                wait = self._count - self._job.at
                if wait >= 0 and wait % _APART == 0 and wait // _APART < len(self._job.signals):
                    os.kill(os.getpid(), getattr(signal, self._job.signals[wait // _APART]))
                return
            if self._count != self._job.at:
                return
            if half is not None:
                half()
            if not self._job.error:
                os._exit(KILLED)
        number = getattr(errno, self._job.error)
        raise OSError(number, os.strerror(number), path)

    def say(self, message: str) -> None:
        """Note what the run has told its user, so that promises can be held against what is there."""
        os.write(self._notes, json.dumps(["said", message]).encode() + b"\n")

    def _audit(self, event: str, facts: tuple[Any, ...]) -> None:
        if event == "open":
            file, _, flags = facts
            if isinstance(file, (str, bytes, os.PathLike)) and flags & _WRITES:
                new = not os.path.lexists(file)
                self.operation("open", self._inner(file), new, bool(flags & os.O_TRUNC))
        elif event in ("os.remove", "os.rmdir"):
            path = self._inner(*facts)
            if path and os.path.lexists(path):
                self.operation(event.removeprefix("os."), path)
        elif event == "os.mkdir":
            path = self._inner(facts[0], facts[2])
            if path and not os.path.lexists(path):
                self.operation("mkdir", path)
        elif event in ("os.rename", "os.link"):
            path = self._inner(facts[0], facts[2])
            if path and os.path.lexists(path):
                other = self._inner(facts[1], facts[3]).removeprefix(self._folder)
                self.operation(event.removeprefix("os."), path, other)
        elif event in ("os.chmod", "os.truncate", "os.utime"):
            self.operation(event.removeprefix("os."), self._inner(facts[0]))

    def _inner(self, path: Any, folder: int = -1) -> str | None:
        """The absolute path, if it is one in the folder of the job. folder: the descriptor that it is relative to."""
        if isinstance(path, int):
            return None
        start = Path.cwd() if folder in (-1, None) else Path(f"/proc/self/fd/{folder}").readlink()
        whole = start / os.fsdecode(path)
        found = str(whole.parent.resolve() / whole.name)
        return found if found.startswith(self._folder) else self._folder if found + os.sep == self._folder else None

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """What this thread does in the block does not count."""
        self._inside.unseen = True
        try:
            yield
        finally:
            self._inside.unseen = False


class _File:
    """A file open for writing whose writes are operations; what strikes one of them leaves half of the data."""

    def __init__(self, file: Any, operation: Callable[[Callable[[], None]], None]) -> None:
        self._file, self._operation = file, operation

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._operation(half)
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


# --- processes


class Forks:
    """Runs jobs, also several at once from several threads. A context manager that ends its process."""

    def __enter__(self) -> "Forks":
        self._folder = tempfile.TemporaryDirectory()
        self._address = str(Path(self._folder.name, "socket"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "tests.crash_points", self._address]
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def run(self, job: Job) -> Outcome:
        """Do the job; a run that takes too long has the code of SIGALRM, -14."""
        with Client(self._address) as connection:
            connection.send(asdict(job))
            code = connection.recv()
        notes = Path(f"{job.beside}.operations").read_text().splitlines()
        operations = [tuple(json.loads(line)) for line in notes]
        return Outcome(code, Path(f"{job.beside}.output").read_text(errors="replace"), operations)


def _serve(address: str) -> None:
    """Fork for every job that comes in."""
    import torch

    torch.set_num_threads(1)
    modules = {name: importlib.import_module(name) for name in (*SCRIPTS, *TOOLS)}
    for name in _LATE:
        importlib.import_module(name)
    with Listener(address) as listener:
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            with listener.accept() as connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _supervise(modules, connection)
                    os._exit(0)


def _supervise(modules: dict[str, ModuleType], connection: Connection) -> None:
    """Fork once more, and tell how that process ended."""
    job = Job(**connection.recv())
    child = os.fork()
    if child == 0:
        connection.close()
        os._exit(_work(modules[job.script], job))
    connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _work(module: ModuleType, job: Job) -> int:
    """Run the script as its user would, with the output in a file. Returns the exit code."""
    from utils import cli

    signal.alarm(_SECONDS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where whoever started the tests ignores them
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(f"{job.beside}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.chdir(job.folder)
    sys.argv = [job.script, *job.arguments]
    operations = Operations(job)
    operations.start()
    _hear(operations.say)
    try:
        cli.run(module.main)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        import traceback

        with suppress(OSError):
            traceback.print_exc()
        return 70
    return 0


def _hear(say: Callable[[str], None]) -> None:
    """Have `say` called with every line of the log."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logging.getLogger("wan").addHandler(Handler())  # basicConfig wants the root without any


if __name__ == "__main__":
    _serve(sys.argv[1])
