"""Lines typed at a terminal, with editing and a history that lasts from one run to the next."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.files import written_whole

log = logging.getLogger(__name__)

_KEPT = 1000  # lines of history


def history_file(name: str) -> Path:
    """Path of an application's history: in the XDG state folder, on Windows in the local application data."""
    if os.name == "nt":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return folder / name / "history"


def typed_lines(prompt: str, history: Path) -> Iterator[str]:
    """Lines from standard input until its end (Ctrl-D, on Windows Ctrl-Z and Enter); Ctrl-C drops the current one.

    At a terminal they can be edited and those of earlier runs be fetched, by prompt_toolkit where it is installed, else
    by readline, which Python has on Linux and macOS. `history` is rewritten after each line; when that fails, there is
    none. Bytes that are no text come as lone surrogates.
    """
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    lines = _read(history)
    ask = _asker(lines)
    while True:
        try:
            line = ask(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() and lines[-1:] != [line]:
            lines.append(line)
            _write(history, lines[-_KEPT:])
        yield line


def _asker(lines: list[str]) -> Callable[[str], str]:
    """A function like `input`, with as much help as there is."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory

        return PromptSession(history=InMemoryHistory(lines)).prompt
    except ImportError:
        pass
    try:
        import readline  # from now on `input` uses it, and notes each line itself
    except ImportError:
        return input
    for line in lines:
        readline.add_history(line)
    return input


def _read(history: Path) -> list[str]:
    try:
        return history.read_text(encoding="utf-8", errors="replace").splitlines()[-_KEPT:]
    except OSError:
        return []


def _write(history: Path, lines: list[str]) -> None:
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(history) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
            temporary.chmod(0o600)
    except OSError as error:
        log.debug("no history: %s", error)
