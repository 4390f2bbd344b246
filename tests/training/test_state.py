"""State folders: whole or not at all, and refused when damaged."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from utils.errors import ConfigError
from utils.files import written_whole
from wan.training import state
from wan.training.state import (
    Progress,
    State,
    load_state,
    newest_state,
    remove_leftovers_of,
    restore_replaced,
    save_state,
)

WEIGHTS = {"lora_unet_a.lora_down.weight": torch.randn(2, 3)}
OPTIMIZER = {"optimizer": {"state": {0: {"exp_avg": torch.randn(2, 3), "step": torch.tensor(4.0)}}}}


def write(folder, name="run-step00000004-state", step=4, **more):
    path = folder / name
    progress = Progress(step=step, epoch=1, items=3, losses=(0.5, 0.25))
    save_state(State(path, progress, {"seed": 7}, WEIGHTS, OPTIMIZER), **more)
    return path


def test_a_state_is_read_as_it_was_written(tmp_path):
    loaded = load_state(write(tmp_path))
    assert loaded.progress == Progress(step=4, epoch=1, items=3, losses=(0.5, 0.25)) and loaded.facts == {"seed": 7}
    assert_close(loaded.weights, WEIGHTS, rtol=0, atol=0)
    assert_close(loaded.optimizer, OPTIMIZER, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["run-step00000004-state"]


@pytest.mark.parametrize("failing", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_write_that_fails_leaves_the_state_that_was_there(tmp_path, monkeypatch, failing):
    path = write(tmp_path, step=4)

    def full(self, *_args, _writer, **_more):
        if self.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return _writer(self, *_args, **_more)

    for name in ("write_bytes", "write_text"):
        writer = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda self, *args, _writer=writer, **more: full(self, *args, _writer=_writer, **more)
        )
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, step=8)
    assert load_state(path).progress.step == 4 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "progress.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "nonsense"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, file, damage):
    path = write(tmp_path)
    content = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"nonsense")
    with pytest.raises(ConfigError, match=r"^--resume .*-state: ") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_code_in_a_state_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("code was run",)

    path = write(tmp_path)
    torch.save({"optimizer": Trap()}, path / "optimizer.bin")
    with pytest.raises(ConfigError, match="damaged"):
        load_state(path)


def test_the_newest_state_is_the_one_that_has_come_furthest(tmp_path):
    assert newest_state(tmp_path / "none", "run") is None and newest_state(tmp_path, "run") is None
    write(tmp_path, "run-step00000008-state", step=8)
    write(tmp_path, "run-step00000012-state", step=12)
    write(tmp_path, "run-000001-state", step=10)
    write(tmp_path, "run-other-state", step=99)
    write(tmp_path, "other-step00000099-state", step=99)
    (tmp_path / "run-step00000099-state").mkdir()
    assert newest_state(tmp_path, "run").path.name == "run-step00000012-state"
    write(tmp_path, "run-state", step=16)
    assert newest_state(tmp_path, "run").path.name == "run-state"
    (tmp_path / "run-state" / "progress.json").write_text("{")
    assert newest_state(tmp_path, "run").path.name == "run-step00000012-state"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_the_newest_state_that_is_whole_is_taken_and_when_none_is_that_is_an_error(tmp_path, file, caplog):
    write(tmp_path, "run-step00000008-state", step=8)
    (write(tmp_path, "run-step00000012-state", step=12) / file).write_bytes(b"")  # as a power cut leaves it
    assert newest_state(tmp_path, "run").progress.step == 8
    assert len(caplog.messages) == (file != "progress.json") and all("step00000012" in line for line in caplog.messages)
    (tmp_path / "run-step00000008-state" / file).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--resume auto: no state .*run-step.*; delete them to start anew"):
        newest_state(tmp_path, "run")


class Disk:
    """What a power cut would leave: only what was synced, under the names of folders that were synced."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple[str, str]] = []
        fsync, replace, rmtree = os.fsync, Path.replace, state.shutil.rmtree
        self._add(
            monkeypatch, os, "fsync", lambda handle: ("sync", str(Path(f"/proc/self/fd/{handle}").readlink())), fsync
        )
        self._add(monkeypatch, Path, "replace", lambda old, new: ("rename", f"{old} {new}"), replace)
        self._add(monkeypatch, state.shutil, "rmtree", lambda path, **_: ("delete", str(path)), rmtree)

    def _add(self, monkeypatch, owner, name, event, original) -> None:
        def call(*positional, **keywords):
            self.events.append(event(*positional, **keywords))
            return original(*positional, **keywords)

        monkeypatch.setattr(owner, name, call)

    def first(self, kind: str, end: str) -> int:
        return next(i for i, (found, text) in enumerate(self.events) if found == kind and text.endswith(end))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")
def test_a_state_is_on_disk_before_it_gets_its_name_and_its_name_before_the_old_one_is_deleted(tmp_path, monkeypatch):
    path = write(tmp_path, step=4)
    disk = Disk(monkeypatch)
    write(tmp_path, step=8)
    named = disk.first("rename", f" {path}")
    files = {Path(text).name for kind, text in disk.events[:named] if kind == "sync"}
    assert files >= {"model.safetensors", "optimizer.bin", "progress.json"}
    assert named < disk.first("sync", str(tmp_path)) < disk.first("delete", "-old")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")
def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    disk, path = Disk(monkeypatch), tmp_path / "a.txt"
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert disk.first("sync", ".txt") < disk.first("rename", f" {path}") < disk.first("sync", str(tmp_path))


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # a kill runs no clean-up
        patch.setattr(state.shutil, "rmtree", lambda *_args, **_more: None)
        patch.setattr("pathlib.Path.replace", lambda *_args: (_ for _ in ()).throw(OSError("killed")))
        patch.setattr("pathlib.Path.unlink", lambda *_args, **_more: None)
        for name in ("run-state", "run-step00000004-state", "run-more-state"):
            with pytest.raises(OSError, match="killed"):
                write(tmp_path, name)
        for name in ("run.safetensors", "run-000003.safetensors", "v1.0.safetensors"):
            with pytest.raises(OSError, match="killed"), written_whole(tmp_path / name) as path:
                path.write_text("half")
    (tmp_path / "run.safetensors").write_text("whole")
    assert len(list(tmp_path.iterdir())) == 7
    remove_leftovers_of(tmp_path, "run")
    left = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir())
    assert left == [".tmp-run-more-state", ".tmp-v1.0.safetensors", "run.safetensors"]
    remove_leftovers_of(tmp_path, "v1.0")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("survivor", ["new", "old"])
def test_a_kill_between_the_two_renames_costs_no_state(survivor, tmp_path, monkeypatch):
    path, replace = write(tmp_path, step=4), Path.replace

    def killed(old, new):
        if Path(new) == path:
            raise KeyboardInterrupt
        return replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(state.shutil, "rmtree", lambda *_args, **_more: None)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, step=8)
    assert not path.exists() and len(list(tmp_path.iterdir())) == 2
    if survivor == "old":
        shutil.rmtree(next(found for found in tmp_path.iterdir() if not found.name.endswith("-old")))
    restore_replaced(tmp_path, "other")
    assert not path.exists()
    restore_replaced(tmp_path, "run")
    remove_leftovers_of(tmp_path, "run")
    assert load_state(path).progress.step == {"new": 8, "old": 4}[survivor] and list(tmp_path.iterdir()) == [path]
