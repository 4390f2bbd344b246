"""Lines typed at a terminal, with editing and a history that lasts from one run to the next."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_KEPT = 1000  # lines of readline's history


def history_file(name: str) -> Path:
    """Path of an application's history: in the XDG state folder, on Windows in the local application data."""
    if os.name == "nt":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return folder / name / "history"


def typed_lines(prompt: str, history: Path) -> Iterator[str]:
    """Lines from standard input until its end (Ctrl-D, on Windows Ctrl-Z and Enter); Ctrl-C drops the current one.

    At a terminal they can be edited and those of earlier runs be fetched: by prompt_toolkit where it is installed, from
    its file `<history>.prompt_toolkit`, else by readline, which Python has on Linux and macOS, from its file `history`.
    A file that can't be read or written is none. Bytes that are no text come as lone surrogates.
    """
    if sys.stdin is None:  # closed by `<&-`
        return
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    ask = _asker(history)
    while True:
        try:
            yield ask(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _asker(history: Path) -> Callable[[str], str]:
    """A function like `input`, with as much help as there is."""
    with suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ImportError:
        return _readline_asker(history)
    path = history.with_name(f"{history.name}.prompt_toolkit")

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):
                _make_private(path)
                super().store_string(string)

    return PromptSession(history=History(str(path))).prompt


def _make_private(path: Path) -> None:
    """Have the file, from an earlier run or new, be readable by its owner alone."""
    path.touch(mode=0o600)
    path.chmod(0o600)


def _readline_asker(history: Path) -> Callable[[str], str]:
    try:
        import readline  # from now on `input` uses it, and notes each line itself
    except ImportError:
        return input
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_KEPT)

    def ask(prompt: str) -> str:
        line = input(prompt)
        with suppress(OSError):
            _make_private(history)
            readline.write_history_file(history)
        return line

    return ask
