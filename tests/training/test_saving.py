"""LoRA files and states of a run: their names, and how long they stay."""

import errno

import pytest

from wan.training.cadence import Cadence
from wan.training.options import SaveConfig
from wan.training.saving import Saver


def keeper(folder, write=None, **settings) -> Saver:
    config = SaveConfig(output_dir=folder, output_name="run", **settings)
    return Saver(config, write or (lambda path: path.write_text("lora")), write or (lambda path: path.mkdir()))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cadence(saver: Saver) -> Cadence:
    return Cadence([saver.lora_action, saver.state_action])


def run_steps(saver: Saver, steps: int) -> None:
    for step in range(1, steps + 1):
        cadence(saver).after_step(step)


def test_every_file_is_kept_unless_told_otherwise(tmp_path):
    run_steps(keeper(tmp_path, save_every_n_steps=10), 35)
    assert names(tmp_path) == [f"run-step{step:08d}.safetensors" for step in (10, 20, 30)]


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [40]), (9, [40]), (10, [30, 40]), (20, [20, 30, 40]), (99, [10, 20, 30, 40])]
)
def test_files_of_steps_long_past_are_deleted(tmp_path, keep, left):
    run_steps(keeper(tmp_path, save_every_n_steps=10, save_last_n_steps=keep), 40)
    assert names(tmp_path) == [f"run-step{step:08d}.safetensors" for step in left]


def test_states_have_a_limit_of_their_own(tmp_path):
    settings = {"save_every_n_steps": 10, "save_last_n_steps": 20, "save_last_n_steps_state": 0, "save_state": True}
    run_steps(keeper(tmp_path, **settings), 40)
    kept = [f"run-step{step:08d}.safetensors" for step in (20, 30, 40)]
    assert names(tmp_path) == sorted([*kept, "run-step00000040-state"])


@pytest.mark.parametrize(("keep", "left"), [(None, [2, 4, 6]), (0, [6]), (1, [6]), (2, [4, 6])])
def test_files_of_epochs_long_past_are_deleted(tmp_path, keep, left):
    saver = keeper(tmp_path, save_every_n_epochs=2, save_last_n_epochs=keep, save_state=True)
    for epoch in range(1, 9):
        cadence(saver).after_epoch(epoch, step=10 * epoch, last=epoch == 8)
    assert names(tmp_path) == sorted(f"run-{epoch:06d}{end}" for epoch in left for end in (".safetensors", "-state"))


def test_a_full_disk_costs_the_new_file_and_no_older_one(tmp_path, caplog):
    run_steps(keeper(tmp_path, save_every_n_steps=10, save_last_n_steps=0, save_state=True), 10)
    before = names(tmp_path)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    broken = keeper(tmp_path, full, save_every_n_steps=10, save_last_n_steps=0, save_state=True)
    run_steps(broken, 30)
    assert names(tmp_path) == before
    assert "No space left on device" in caplog.text and "earlier files are intact" in caplog.text
    assert broken.save_interrupted(31) is None
    with pytest.raises(OSError, match="No space"):
        broken.save_final()


def test_the_final_file_comes_with_a_state_when_asked(tmp_path):
    keeper(tmp_path, save_state_on_train_end=True).save_final()
    assert names(tmp_path) == ["run-state", "run.safetensors"]
