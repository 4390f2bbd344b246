"""Locks between processes, files that replace nothing, and what killed processes leave."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import held, remove_leftovers, require_writable_dir, temporary_prefix, written_whole

ROOT = Path(__file__).parents[2]
HOLD = """
from pathlib import Path
from utils.files import held
with held(Path("x.lock")):
    print("held", flush=True)
    input()
"""


def test_a_lock_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for ends in ("by itself", "killed"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), held(Path("x.lock")):
            pass
        if ends == "killed":
            process.kill()
        process.communicate("\n")
        assert Path("x.lock").exists() == (ends == "killed")
        with held(Path("x.lock")):
            assert Path("x.lock").exists()
        assert not Path("x.lock").exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_replaces_nothing_is_written_once(links, tmp_path, monkeypatch):
    if not links:
        refused = OSError(errno.EPERM, "Operation not permitted")
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(refused))
    for content in ("first", "second"):
        try:
            with written_whole(tmp_path / "a.txt", replaces=False) as temporary:
                temporary.write_text(content)
        except FileExistsError:
            assert content == "second"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_files_of_ended_processes_are_removed_and_those_of_others_after_a_day(tmp_path, monkeypatch):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: int(ended.stdout))
        names = {"ended": temporary_prefix(Path("a.png")) + "abcd_123.png"}
    names["at work"] = temporary_prefix(Path("a.png")) + "abcd_124.png"
    names["elsewhere"] = ".tmp-a.png-" + "0123" + "00000001" + "abcd_125.png"
    names["of an older version"] = ".tmp-a.png-abcd_126.png"
    names["of something else"] = ".tmp-mine"
    for name in names.values():
        (tmp_path / name).write_text("half")
    require_writable_dir(tmp_path, "--x")
    assert {path.name for path in tmp_path.iterdir()} == {*names.values()} - {names["ended"]}
    for name in (tmp_path / name for name in names.values() if name != names["ended"]):
        os.utime(name, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["at work"], names["of something else"]}
