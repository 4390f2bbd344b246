"""Signals to a training, in all its phases, and the deaths of its launcher and of its loader processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

import wan.training.loop
import wan_train_network
from tests.project import model_flags
from utils import cli
from utils.cli import Stopped
from utils.errors import ConfigError
from wan.training import start
from wan.training.cadence import Cadence, StopRequest
from wan.training.state import load_state, save_state

ROOT = Path(__file__).parents[2]
SECONDS = 60
pytestmark = [
    pytest.mark.usefixtures("workspace", "heeded_signals"),
    pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups that take signals"),
]


def flags(output: Path, *more: str, steps: int = 5000) -> list[str]:
    return [
        *(*model_flags("i2v"), "--dit_dtype", "float32", "--device", "cpu", "--dataset_config", "pairs.toml"),
        *("--network_dim", "2", "--max_train_steps", str(steps), "--output_dir", str(output), "--output_name", "run"),
        *more,
    ]


def started(output: Path, launcher: tuple[str, ...] = (sys.executable,), ignored: tuple[int, ...] = ()):
    """A run of many steps, with loader processes, that has done some of them."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    workers = ("--max_data_loader_n_workers", "2", "--persistent_data_loader_workers")
    process = subprocess.Popen(
        [*launcher, str(ROOT / "wan_train_network.py"), *flags(output, *workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=ignore,
    )
    log, end = output / "run-metrics.jsonl", time.monotonic() + SECONDS
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return process


def only_state(output: Path):
    (state,) = output.glob("run-*-state")
    assert load_state(state).progress.step
    return state


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_process_group_saves_a_state_and_leaves_no_process(number, tmp_path):
    number, process = getattr(signal, number), started(tmp_path)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number, errors
    assert re.search(rf"{number.name}: finishes the step under way \(a step takes \d+\.\d s\) and", errors)
    assert f"go on with --resume {only_state(tmp_path)}" in errors
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]


def test_a_run_in_the_background_says_how_it_is_stopped(tmp_path):
    process = started(tmp_path, ignored=(signal.SIGINT, signal.SIGHUP))
    for number in (signal.SIGINT, signal.SIGHUP):
        os.killpg(process.pid, number)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM and f"`kill {process.pid}` saves a state" in errors
    only_state(tmp_path)


def test_a_run_whose_launcher_is_killed_saves_a_state_and_stops(tmp_path):
    process = started(tmp_path, (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"))
    trainer, *_ = psutil.Process(process.pid).children()
    process.kill()
    assert psutil.wait_procs([trainer], timeout=SECONDS)[0]
    assert "its launcher has ended): go on with --resume" in process.communicate(timeout=SECONDS)[1]
    only_state(tmp_path)


def test_a_loader_process_that_is_killed_costs_no_step_that_was_done(tmp_path):
    process = started(tmp_path)
    worker, *_ = psutil.Process(process.pid).children()
    worker.kill()
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and "Traceback" not in errors
    assert re.search(r"stopped after step \d+ \(a loader process was killed.*: go on with --resume", errors)
    only_state(tmp_path)


def test_a_second_run_of_the_same_name_is_refused_while_the_first_one_lives(tmp_path, capsys):
    process = started(tmp_path)
    with pytest.raises(ConfigError, match="--output_name run: another training writes its files to"):
        wan_train_network.main(flags(tmp_path, "--max_data_loader_n_workers", "0", steps=1))
    process.kill()
    process.communicate()
    wan_train_network.main(flags(tmp_path, "--max_data_loader_n_workers", "0", steps=1))
    assert load_file(tmp_path / "run.safetensors") and not list(tmp_path.glob("*.lock"))


def at_step(monkeypatch, step: int, what) -> None:
    """Have `what` done after the actions of this step."""
    original = Cadence.after_step

    def after(self, done):
        original(self, done)
        if done == step:
            what()

    monkeypatch.setattr(Cadence, "after_step", after)


@pytest.mark.parametrize("validates", [False, True])
def test_a_cache_that_vanishes_costs_no_step_that_was_done(validates, copied_workspace, tmp_path, monkeypatch):
    more = ("--validation_split", "1", "--validate_every_n_steps", "1") if validates else ()
    at_step(monkeypatch, 3, lambda: [path.unlink() for path in copied_workspace.glob("cache/pairs/*_wan.safetensors")])
    with pytest.raises(Stopped, match=r"stopped after step 4|stopped after step 3 \(.*_wan.safetensors.*\): go") as end:
        wan_train_network.main(flags(tmp_path / "out", *more, "--max_data_loader_n_workers", "0"))
    assert end.value.exit_code == 1 and only_state(tmp_path / "out")


def raise_signals(*names: str) -> None:
    for name in names:
        signal.raise_signal(getattr(signal, name))


SIGNALS = [("SIGINT",), ("SIGTERM", "SIGINT"), ("SIGINT",) * 3, ("SIGHUP", *("SIGINT",) * 5)]


@pytest.mark.parametrize("names", SIGNALS, ids="-".join)
@pytest.mark.parametrize("writer", ["write_lora", "save_state"])
def test_no_signals_keep_the_last_files_from_being_written(names, writer, tmp_path, monkeypatch, capfd):
    original = getattr(wan.training.loop, writer)

    def interrupted(*arguments):
        raise_signals(*names)
        original(*arguments)

    monkeypatch.setattr(wan.training.loop, writer, interrupted)
    wan_train_network.main(flags(tmp_path, "--max_data_loader_n_workers", "0", "--save_state_on_train_end", steps=2))
    assert load_file(tmp_path / "run.safetensors") and load_state(tmp_path / "run-state").progress.step == 2
    assert f"{names[0]}: the last files are being written" in capfd.readouterr().err


@pytest.mark.parametrize("writer", ["write_lora", "save_state"])
def test_a_third_ctrl_c_waits_for_the_file_that_is_being_written(writer, tmp_path, monkeypatch):
    original = {"write_lora": wan.training.loop.write_lora, "save_state": save_state}[writer]

    def interrupted(*arguments):
        raise_signals("SIGINT", "SIGINT", "SIGINT")
        original(*arguments)

    monkeypatch.setattr(wan.training.loop, writer, interrupted)
    more = ("--save_every_n_steps", "2", "--save_state", "--max_data_loader_n_workers", "0")
    with pytest.raises(KeyboardInterrupt):
        wan_train_network.main(flags(tmp_path, *more))
    assert load_file(tmp_path / "run-step00000002.safetensors")
    assert (tmp_path / "run-step00000002-state").exists() == (writer == "save_state")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("when", ["load_trainable", "find_state", "after the end"])
def test_a_signal_before_or_after_the_steps_ends_the_run_in_one_line(number, when, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise_signals(number)

    if when == "after the end":
        monkeypatch.setattr("wan.training.tracking.Tracker.close", interrupt)
    else:
        monkeypatch.setattr(start, when, interrupt)
    monkeypatch.setattr("sys.argv", ["x", *flags(tmp_path, "--max_data_loader_n_workers", "0", steps=1)])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: wan_train_network.main(None))
    assert end.value.code == 128 + getattr(signal, number)
    *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"stopped( by SIG\w+)?; everything finished so far is kept", last)
    assert not list(tmp_path.glob(".tmp-*")) and (tmp_path / "run.safetensors").exists() == (when == "after the end")


def test_only_a_third_ctrl_c_interrupts_and_never_while_the_run_ends(capfd):
    with StopRequest() as stop:
        stop.step_seconds, stop.save_seconds = 1.23, 0.5
        raise_signals("SIGTERM", "SIGINT", "SIGHUP", "SIGINT")
        stop.ending = True
        raise_signals("SIGINT")
        stop.ending = False
        with pytest.raises(KeyboardInterrupt):
            raise_signals("SIGINT")
        assert (stop.reason, stop.exit_code) == ("SIGTERM", 128 + signal.SIGTERM)
    words = (
        "SIGTERM: finishes the step under way (a step takes 1.2 s) and what is due after it, saves a state (the last "
        "save took 0.5 s) and stops; a third Ctrl-C loses that step"
    )
    assert [line for line in capfd.readouterr().err.splitlines() if line] == [words]
