"""Typed lines: at a terminal with a history, from a pipe without."""

import io
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from utils import terminal
from utils.terminal import history_file, typed_lines

CODE = """
import sys
sys.modules["prompt_toolkit"] = None
from pathlib import Path
from utils import terminal
from utils.terminal import typed_lines
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
        os.chdir(Path(__file__).parents[2])
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


@pytest.mark.usefixtures("heeded_signals")
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
    assert [path.name for path in history.parent.iterdir()] == ["history"] and history.stat().st_mode & 0o077 == 0


def test_a_history_that_others_could_read_becomes_private(tmp_path, monkeypatch):
    pytest.importorskip("pty")
    for name in ("history", "history.prompt_toolkit"):
        (tmp_path / name).touch(mode=0o644)
        (tmp_path / name).chmod(0o644)
    at_a_terminal(tmp_path / "history", ("a\n", "got 'a'\r\n> "), (CTRL_D, "end"))
    typed_with_prompt_toolkit(f"a\r{CTRL_D}", tmp_path / "history", monkeypatch)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600, 0o600]


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


def typed_with_prompt_toolkit(keys: str, history: Path, monkeypatch) -> list[str]:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr("sys.stdin", Terminal())
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        return list(typed_lines("> ", history))


def test_prompt_toolkit_keeps_lines_in_a_file_of_its_own(tmp_path, monkeypatch):
    history = tmp_path / "state" / "history"
    assert typed_with_prompt_toolkit(f"a cat 猫\rb{CTRL_C}c\r{CTRL_D}", history, monkeypatch) == ["a cat 猫", "c"]
    (file,) = history.parent.iterdir()
    assert file.name == "history.prompt_toolkit" and file.stat().st_mode & 0o077 == 0
    file.write_bytes(file.read_bytes() + b"\n+\xff\x00 damage\n\n# a comment\n+d\n")
    session = terminal._asker(history).__self__
    assert list(session.history.load_history_strings()) == ["d", "\ufffd\x00 damage", "c", "a cat 猫"]


def test_prompt_toolkit_goes_on_without_a_history_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    keys = f"a\rb\r{CTRL_D}"
    assert typed_with_prompt_toolkit(keys, tmp_path / "file" / "history", monkeypatch) == ["a", "b"]


def test_the_history_has_an_end_and_survives_damage(tmp_path):
    pytest.importorskip("readline")
    history = tmp_path / "history"
    history.write_bytes(b"\xff\x00\n" + b"x\n" * 5000)
    at_a_terminal(history, ("new\n", "got 'new'\r\n> "), (CTRL_D, "end"))
    assert history.read_text(encoding="utf-8").splitlines() == ["x"] * 999 + ["new"]


@pytest.mark.skipif(os.name == "nt", reason="folders of Linux and macOS")
def test_the_history_lies_where_the_user_keeps_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file("x") == tmp_path / "x/history"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file("x") == Path.home() / ".local/state/x/history"


def test_a_closed_standard_input_has_no_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert list(typed_lines("> ", tmp_path / "history")) == []
