"""A run resumed inside an epoch with other settings ends, after the epochs and steps that it was asked for."""

import math
from pathlib import Path

import pytest

import wan_train_network
from dataset.config import read_config
from dataset.loader import BatchLoader, TrainingSet
from tests.project import cache, dataset_toml, model_flags
from wan.training.job import RunLength, StepLoader
from wan.training.options import RunConfig
from wan.training.state import Progress, load_state

pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def project(new_project):
    """5 photographs, 15 items; "less" has each once, 5 items."""
    with new_project("astronaut", "brick", "cat", "coffee", "coins") as folder:
        for size in (1, 2, 4, 20):
            dataset_toml(f"batch{size}", keys="num_repeats = 3", cache="cache", size=(32, 32), batch_size=size)
        dataset_toml("less", keys="num_repeats = 1", cache="cache", size=(32, 32))
        cache("batch2.toml")
    return folder


def train(dataset: str, *flags: str) -> Path:
    """A run of 6 steps of 2 items, of which 8 are an epoch, or one that goes on from there."""
    wan_train_network.main(
        [
            *(*model_flags("i2v"), "--dit_dtype", "float32", "--device", "cpu", "--dataset_config", f"{dataset}.toml"),
            *("--network_dim", "2", "--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--seed", "5"),
            *("--max_data_loader_n_workers", "0", "--output_name", "run", *flags),
        ]
    )
    return Path(flags[flags.index("--output_dir") + 1])


@pytest.mark.parametrize(
    ("dataset", "accumulation", "steps_per_epoch", "left"),
    [
        ("batch2", 1, 8, {2}),  # as before
        ("batch1", 1, 15, {3, 4}),
        ("batch4", 1, 4, {1}),
        ("batch20", 1, 1, {0}),
        ("batch2", 4, 2, {0}),
        ("less", 1, 3, {0}),
    ],
)
def test_a_run_resumed_with_other_settings_ends_after_the_epochs_that_were_asked_for(
    dataset, accumulation, steps_per_epoch, left, tmp_path
):
    folder = train("batch2", "--output_dir", str(tmp_path), "--max_train_steps", "6", "--save_state")
    flags = ("--gradient_accumulation_steps", str(accumulation), "--save_every_n_epochs", "1", "--save_state")
    train(dataset, "--output_dir", str(tmp_path), "--max_train_epochs", "3", "--resume", "auto", *flags)
    progress = load_state(folder / "run-state").progress
    assert (progress.epoch, progress.items) == (3, 0)
    assert progress.step - 6 - 2 * steps_per_epoch in left  # the first 6 steps saw 11 or 12 items
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {"run-000001.safetensors", "run-000002.safetensors", "run.safetensors"}


def test_every_place_of_every_batching_leads_to_the_end_of_the_epoch_in_every_other(monkeypatch):
    monkeypatch.setattr(BatchLoader, "load", lambda _, plans: iter(plans))  # no files are read
    sets = {name: TrainingSet(read_config(Path(f"{name}.toml")), 1) for name in ("batch1", "batch2", "batch4", "less")}
    for training_set in sets.values():
        for accumulation in (1, 3):
            for processes in (1, 2):
                run = RunConfig(Path(), max_train_epochs=2, gradient_accumulation_steps=accumulation)
                loader = StepLoader(training_set, run, 0, processes)
                for seen in range(-1, 20):
                    progress = Progress(step=seen, epoch=0, items=loader.place(1, seen))
                    steps = list(loader.remaining(1, progress.items))
                    for step in steps:
                        progress.add_step(step.new_items, 0.5)
                    length = RunLength.of(run, training_set, processes, Progress(step=seen, items=seen))
                    assert length.total_steps == seen + len(steps) + length.steps_per_epoch and length.epochs == 2
                    progress.end_epoch(loader.items(1))
                    assert (progress.epoch, progress.items) == (1, 0)


def test_the_length_of_a_run_that_goes_on_unchanged_is_what_it_was():
    training_set = TrainingSet(read_config(Path("batch2.toml")), 1)
    for step in range(20):
        epoch, done = divmod(step, 8)
        seen = [plan for plans in training_set.epoch_steps(epoch + 1, 1)[:done] for plan in plans]
        progress = Progress(step=step, epoch=epoch, items=sum(len(plan.items) for plan in seen))
        by_steps = RunLength.of(RunConfig(Path(), max_train_steps=20), training_set, 1, progress)
        assert by_steps == RunLength(8, 20, math.ceil(20 / 8))
        by_epochs = RunLength.of(RunConfig(Path(), max_train_epochs=3), training_set, 1, progress)
        assert by_epochs == RunLength(8, 24, 3)
