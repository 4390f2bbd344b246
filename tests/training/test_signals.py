"""Signals to a training in a process group of its own, with loader processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.project import model_flags
from wan.training.cadence import StopRequest
from wan.training.state import load_state

ROOT = Path(__file__).parents[2]
SECONDS = 60
pytestmark = [
    pytest.mark.usefixtures("workspace"),
    pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups that take signals"),
]


def heed_signals() -> None:
    """Signals end the process again, also where whoever started the tests ignores them, as nohup does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(output: Path) -> subprocess.Popen:
    """A run of many steps that has done some of them."""
    flags = [
        *(*model_flags("i2v"), "--dit_dtype", "float32", "--device", "cpu", "--dataset_config", "pairs.toml"),
        *("--network_dim", "2", "--max_train_steps", "5000", "--max_data_loader_n_workers", "2"),
        *("--persistent_data_loader_workers", "--output_dir", str(output), "--output_name", "run"),
    ]
    command = [sys.executable, str(ROOT / "wan_train_network.py"), *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    log, end = output / "run-metrics.jsonl", time.monotonic() + SECONDS
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_process_group_saves_a_state_and_leaves_no_process(number, tmp_path):
    number, process = getattr(signal, number), started(tmp_path)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number, errors
    assert f"{number.name}: stops when the step" in errors
    (state,) = tmp_path.glob("run-*-state")
    assert load_state(state).progress.step and f"go on with --resume {state}" in errors
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]


def test_only_a_third_ctrl_c_interrupts_and_never_while_saving(capfd):
    with StopRequest() as stop:
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGINT"):
            signal.raise_signal(getattr(signal, name))
        stop.saving = True
        signal.raise_signal(signal.SIGINT)
        stop.saving = False
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
    assert capfd.readouterr().err.count("SIGTERM: stops when the step") == 1
