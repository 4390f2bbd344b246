"""Typed lines: at a terminal with a history, from a pipe without."""

import io
import os
import select
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from wan.generation import terminal
from wan.generation.terminal import history_file, typed_lines

CODE = """
import sys
sys.modules["prompt_toolkit"] = None
from pathlib import Path
from wan.generation.terminal import typed_lines
for line in typed_lines("> ", Path({path!r})):
    print("got", repr(line), flush=True)
print("end", flush=True)
"""


def at_a_terminal(history: Path, *steps: tuple[str, str]) -> str:
    """What a terminal shows; each step is keys to type and what to wait for afterwards.

    Keys are lost between two prompts, so a line ends with the next one; a Ctrl-C is, too, when it comes just before
    Python begins to wait for a key, so it is pressed again.
    """
    pty = pytest.importorskip("pty")
    code = CODE.format(path=str(history))
    child, terminal_ = pty.fork()
    if child == 0:
        os.environ["TERM"] = "dumb"
        os.chdir(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-c", code])
    seen, deadline = "", time.monotonic() + 60
    try:
        for keys, awaited in (("", "> "), *steps):
            start = len(seen)
            os.write(terminal_, keys.encode())
            while awaited not in seen[start:]:
                assert time.monotonic() < deadline, seen
                if not select.select([terminal_], [], [], 2)[0]:
                    os.write(terminal_, CTRL_C.encode() if keys == CTRL_C else b"")
                    continue
                seen += os.read(terminal_, 1000).decode(errors="replace")
    finally:
        os.close(terminal_)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return seen


UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


def test_lines_are_kept_for_the_next_run_and_ctrl_c_drops_one_and_ctrl_d_ends(tmp_path):
    pytest.importorskip("readline")
    history = tmp_path / "state" / "history"
    steps = [
        ("a cat 猫\n", "got 'a cat 猫'\r\n> "),
        ("a do", "a do"),
        (CTRL_C, "> "),
        ("b\n", "got 'b'\r\n> "),
        ("b\n", "got 'b'\r\n> "),
    ]
    at_a_terminal(history, *steps, (CTRL_D, "end"))
    assert history.read_text(encoding="utf-8") == "a cat 猫\nb\n"
    at_a_terminal(history, (UP + UP + " looks up\n", "got 'a cat 猫 looks up'\r\n> "), (CTRL_D, "end"))
    assert history.read_text(encoding="utf-8") == "a cat 猫\nb\na cat 猫 looks up\n"
    assert [path.name for path in history.parent.iterdir()] == ["history"]


def test_a_history_that_cannot_be_written_is_none(tmp_path):
    pytest.importorskip("readline")
    (tmp_path / "file").write_text("")
    at_a_terminal(tmp_path / "file" / "history", ("a\n", "got 'a'\r\n> "), (CTRL_D, "end"))


def test_lines_of_a_pipe_leave_no_history_and_may_be_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\n\nb \xff\nlast"), encoding="utf-8"))
    assert list(typed_lines("> ", tmp_path / "history")) == ["a", "", "b \udcff", "last"]
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_prompt_toolkit_is_used_where_it_is_installed(tmp_path, monkeypatch):
    history, given = tmp_path / "history", []
    history.write_text("old\n")

    class PromptSession:
        def __init__(self, history):
            given.extend(history)
            self._keys = iter(["x", KeyboardInterrupt, "y", EOFError])

        def prompt(self, text):
            key = next(self._keys)
            if isinstance(key, str):
                return key
            raise key

    for name, content in {"": {"PromptSession": PromptSession}, ".history": {"InMemoryHistory": list}}.items():
        module = types.ModuleType(f"prompt_toolkit{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert list(typed_lines("> ", history)) == ["x", "y"]
    assert given == ["old"] and history.read_text() == "old\nx\ny\n"


def test_the_history_has_an_end_and_survives_damage(tmp_path, monkeypatch):
    history = tmp_path / "history"
    history.write_bytes(b"\xff\x00\n" + b"x\n" * 5000)
    lines = iter(["new"])

    def ask(_prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(terminal, "_asker", lambda found: ask)
    assert list(typed_lines("> ", history)) == ["new"]
    assert history.read_text(encoding="utf-8").splitlines() == ["x"] * 999 + ["new"]


@pytest.mark.skipif(os.name == "nt", reason="folders of Linux and macOS")
def test_the_history_lies_where_the_user_keeps_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file("x") == tmp_path / "x/history"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file("x") == Path.home() / ".local/state/x/history"
