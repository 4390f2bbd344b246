"""A resumed run repeats the uninterrupted one, bit for bit; also after Ctrl-C, SIGTERM and kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_train_network
from tests.fused.test_graphs import Rerun
from tests.project import cache, dataset_toml, model_flags
from utils.cli import Stopped
from utils.errors import ConfigError
from wan.fused import graphs
from wan.models.memory_options import TrainingMemoryConfig
from wan.training.cadence import Cadence
from wan.training.state import load_state
from wan.training.step import TrainingStep

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("workspace", "heeded_signals")


@pytest.fixture(scope="module")
def project(new_project):
    """5 photographs, 15 items, 8 batches."""
    with new_project("astronaut", "brick", "cat", "coffee", "coins") as folder:
        cache(dataset_toml("data", keys="num_repeats = 3", cache="cache", size=(32, 32)))
    return folder


def arguments(output: str, *flags: str, steps: int = 40) -> list[str]:
    return [
        *(*model_flags("i2v"), "--dit_dtype", "float32", "--device", "cpu"),
        *("--dataset_config", "data.toml", "--network_dim", "2", "--network_dropout", "0.1", "--learning_rate", "1e-3"),
        *("--lr_scheduler", "cosine", "--timestep_sampling", "sigmoid", "--num_timestep_buckets", "4"),
        *("--seed", "5", "--max_train_steps", str(steps), "--max_data_loader_n_workers", "0"),
        *("--output_dir", output, "--output_name", "run", *flags),
    ]


def train(output: str, *flags: str, **more) -> Path:
    wan_train_network.main(arguments(output, *flags, **more))
    return Path(output)


def weights(folder: Path, name: str = "run.safetensors") -> bytes:
    tensors = load_file(folder / name)
    return b"".join(key.encode() + tensors[key].numpy().tobytes() for key in sorted(tensors))


def metrics(folder: Path) -> list[str]:
    return (folder / "run-metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        ((), 20),  # in the middle of the third epoch
        ((), 16),  # at the end of the second
        (("--max_data_loader_n_workers", "2", "--persistent_data_loader_workers"), 20),
        (("--gradient_accumulation_steps", "3"), 20),
        (("--optimizer_type", "Adafactor"), 20),
        (("--one_frame_target_range", "1-9", "--one_frame_loss", "target"), 20),
    ],
    ids=["middle", "epoch end", "workers", "accumulation", "adafactor", "random targets"],
)
def test_a_run_resumed_from_a_state_equals_the_uninterrupted_one(flags, step, tmp_path):
    straight = train(str(tmp_path / "straight"), *flags, "--save_state", "--save_every_n_steps", str(step))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    lines = metrics(straight)
    (resumed / "run-metrics.jsonl").write_text("\n".join(lines[: step + 3]) + "\n")  # also of steps that were lost
    state = straight / f"run-step{step:08d}-state"
    train(str(resumed), *flags, "--resume", str(state))
    assert weights(resumed) == weights(straight)
    assert metrics(resumed) == lines and len([line for line in lines if "loss/current" in line]) == 40


def test_a_resumed_run_keeps_counting_and_draws_no_first_sample_again(tmp_path):
    train(str(tmp_path), "--save_state", "--save_every_n_epochs", "1", steps=12)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"run-000001.safetensors", "run-000001-state", "run-state"} <= names and "run-000002-state" not in names
    train(str(tmp_path), "--save_state", "--save_every_n_epochs", "1", "--resume", "auto", steps=20)
    assert load_state(tmp_path / "run-state").progress.step == 20
    assert {"run-000002.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    steps = [json.loads(line)["step"] for line in metrics(tmp_path) if "loss/current" in line]
    assert steps == list(range(1, 21))


def test_resuming_a_finished_run_trains_nothing_more(tmp_path):
    train(str(tmp_path), "--save_state", steps=4)
    before = weights(tmp_path)
    train(str(tmp_path), "--resume", "auto", steps=4)
    assert weights(tmp_path) == before


def test_resume_auto_starts_anew_where_there_is_no_state(tmp_path, caplog):
    caplog.set_level("INFO")
    train(str(tmp_path), "--resume", "auto", steps=1)
    assert "starting anew" in caplog.text


def test_what_differs_from_the_state_is_said(tmp_path, caplog):
    train(str(tmp_path), "--save_state", steps=3)
    train(str(tmp_path), "--resume", "auto", "--gradient_accumulation_steps", "2", steps=5)
    assert "gradient_accumulation_steps = 2; the state was made with 1" in caplog.text
    assert load_state(tmp_path / "run-state").progress.step == 3  # no state asked for in the second run
    with pytest.raises(ConfigError, match=r"--resume .*--network_dim|instead of"):
        train(str(tmp_path), "--resume", "auto", "--network_dim", "3", steps=9)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_a_state_and_says_how_to_go_on(tmp_path, monkeypatch, number):
    straight = train(str(tmp_path / "straight"), steps=9)
    original = Cadence.after_step

    def interrupted(self, step):
        original(self, step)
        if step == 3:
            signal.raise_signal(number)  # arrives while step 4 is under way

    with monkeypatch.context() as patch:
        patch.setattr(Cadence, "after_step", interrupted)
        with pytest.raises(Stopped, match=r"stopped after step 4 .*--resume") as caught:
            train(str(tmp_path / "stopped"), steps=9)
    assert caught.value.exit_code == 128 + number
    resumed = train(str(tmp_path / "stopped"), "--resume", "auto", steps=9)
    assert weights(resumed) == weights(straight) and metrics(resumed) == metrics(straight)


@pytest.mark.parametrize("flags", [(), ("--gradient_accumulation_steps", "3")], ids=["one batch", "accumulation"])
def test_a_run_with_cuda_graphs_equals_one_without(flags, tmp_path, monkeypatch):
    flags = (*flags, "--network_dropout", "0", "--validation_split", "0.2", "--validate_every_n_steps", "4")
    plain, record = train(str(tmp_path / "plain"), *flags, steps=12), Rerun()
    monkeypatch.setattr(TrainingMemoryConfig, "records", lambda *_: True)
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: record)
    replayed = train(str(tmp_path / "replayed"), *flags, steps=12)
    assert weights(replayed) == weights(plain) and metrics(replayed) == metrics(plain)
    assert record.replayed > record.recorded > 1  # anew after each validation


def test_steps_without_a_finite_loss_change_nothing_are_counted_and_end_the_run(tmp_path, monkeypatch, caplog):
    original = TrainingStep.batch_loss

    def poisoned(bad_steps):
        calls = []

        def loss(self, *args, **more):
            calls.append(1)
            result = original(self, *args, **more)
            return result * float("nan") if len(calls) in bad_steps else result

        return loss

    monkeypatch.setattr(TrainingStep, "batch_loss", poisoned({3, 5}))
    train(str(tmp_path / "some"), "--save_state", "--stop_after_skipped_steps", "2", steps=6)
    state = load_state(tmp_path / "some/run-state")
    assert (state.progress.step, state.progress.skipped_steps) == (6, 2) and caplog.text.count(
        "nothing was updated"
    ) == 2
    assert all(torch.isfinite(tensor).all() for tensor in state.weights.values())

    monkeypatch.setattr(TrainingStep, "batch_loss", poisoned({4, 5, 6}))
    with pytest.raises(Stopped, match="3 steps in a row") as caught:
        train(str(tmp_path / "all"), "--stop_after_skipped_steps", "3", "--save_every_n_steps", "3", steps=9)
    assert caught.value.exit_code == 1
    stopped = load_state(tmp_path / "all/run-step00000006-state")
    good = load_file(tmp_path / "all/run-step00000003.safetensors")
    assert all(torch.equal(stopped.weights[key], good[key]) for key in good)


KILLED_STEPS = 120  # ten kills, each after one to four steps and a moment, don't reach the end


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_was(tmp_path):
    flags = ("--save_state", "--save_every_n_steps", "2", "--save_last_n_steps_state", "4", "--resume", "auto")
    start = time.perf_counter()
    straight = train(str(tmp_path / "straight"), *flags, steps=KILLED_STEPS)
    step = (time.perf_counter() - start) / KILLED_STEPS
    folder, rng = tmp_path / "killed", random.Random(0)
    killed = 0
    for _attempt in range(30):
        command = [
            sys.executable,
            str(ROOT / "wan_train_network.py"),
            *arguments(str(folder), *flags, steps=KILLED_STEPS),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        done = len(metrics(folder)) if (folder / "run-metrics.jsonl").exists() else 0
        target = done + rng.randint(1, 4)
        if killed < 10:
            while process.poll() is None and not (
                (folder / "run-metrics.jsonl").exists() and len(metrics(folder)) >= target
            ):
                time.sleep(0.002)
            time.sleep(rng.random() * 2 * step)
        if killed < 10 and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        _, errors = process.communicate()
        for path in folder.rglob("*.safetensors"):
            if ".tmp-" not in str(path):
                load_file(path)
        for path in folder.glob("run*-state"):
            load_state(path)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert killed == 10
    assert weights(folder) == weights(straight) and metrics(folder) == metrics(straight)
    assert not list(folder.glob(".tmp-*"))


def test_weights_that_an_update_has_made_infinite_are_never_saved(tmp_path, monkeypatch):
    original = TrainingStep.run

    def run(self, batches, items, epoch, step, stop):
        if step == 6:
            self.optimizer.param_groups[0]["lr"] = float("inf")
        return original(self, batches, items, epoch, step, stop)

    monkeypatch.setattr(TrainingStep, "run", run)
    flags = ("--save_state", "--save_every_n_steps", "3")
    with pytest.raises(Stopped, match=r"step 6 made weights NaN .*latest file before it is .*run-step00000003") as end:
        train(str(tmp_path), *flags, steps=9)
    assert end.value.exit_code == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"run-step00000003.safetensors", "run-step00000003-state"}
    assert not names & {"run.safetensors", "run-state", "run-step00000006.safetensors", "run-step00000006-state"}


def test_weights_that_float16_can_not_hold_are_saved_as_float32(tmp_path, monkeypatch, caplog):
    original = TrainingStep.run

    def run(self, *arguments):
        result = original(self, *arguments)
        with torch.no_grad():
            next(iter(self.network.parameters())).fill_(1e6)
        return result

    monkeypatch.setattr(TrainingStep, "run", run)
    tensors = load_file(train(str(tmp_path), "--save_precision", "fp16", steps=1) / "run.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert "--save_precision float16: has no room for these weights" in caplog.text
