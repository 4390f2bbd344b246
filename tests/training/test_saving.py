"""LoRA files and states of a run: their names, and how long they stay."""

import errno
from pathlib import Path

import pytest

from utils.files import written_whole
from wan.training.cadence import Cadence
from wan.training.options import SaveConfig
from wan.training.saving import Saver
from wan.training.state import Progress, State, load_state, remove_leftovers_of, save_state


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


def test_a_deletion_before_which_a_run_was_killed_is_made_up_for(tmp_path):
    settings = {"save_every_n_steps": 10, "save_state": True}
    run_steps(keeper(tmp_path, **settings), 35)  # nothing expires
    keeper(tmp_path, **settings, save_last_n_steps=10).catch_up(35, 2)
    assert names(tmp_path) == [f"run-step000000{step}{end}" for step in (20, 30) for end in ("-state", ".safetensors")]
    (tmp_path / "run-step00000030.safetensors").unlink()
    keeper(tmp_path, **settings, save_last_n_steps=0).catch_up(35, 2)
    assert names(tmp_path) == ["run-step00000020.safetensors", "run-step00000030-state"]


def test_the_final_file_comes_with_a_state_when_asked(tmp_path):
    keeper(tmp_path, save_state_on_train_end=True).save_final()
    assert names(tmp_path) == ["run-state", "run.safetensors"]


@pytest.mark.parametrize("refused", ["rename", "unlink"])
def test_old_files_that_can_not_be_deleted_stay_and_end_nothing(refused, tmp_path, monkeypatch, caplog):
    original = {"rename": Path.replace, "unlink": Path.unlink}[refused]

    def refuse(path, *rest, **more):
        if path.name.startswith("run-step"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *rest, **more)

    settings = {"save_every_n_steps": 10, "save_last_n_steps": 0, "save_state": True}
    with monkeypatch.context() as patch:
        patch.setattr(Path, {"rename": "replace", "unlink": "unlink"}[refused], refuse)
        run_steps(keeper(tmp_path, **settings), 30)
    end = {"rename": "-state", "unlink": ".safetensors"}[refused]
    assert [name for name in names(tmp_path) if name.endswith(end)] == [
        f"run-step{step:08d}{end}" for step in (10, 20, 30)
    ]
    assert len(names(tmp_path)) == 4 and "could not be deleted (Permission denied) and stays" in caplog.text


def test_an_old_state_whose_deletion_is_cut_short_is_no_state_any_more(tmp_path, monkeypatch):
    settings = {"save_every_n_steps": 10, "save_last_n_steps": 0, "save_state": True}
    monkeypatch.setattr("utils.files.shutil.rmtree", lambda *_, **__: None)
    run_steps(keeper(tmp_path, **settings), 20)
    assert [name for name in names(tmp_path) if not name.startswith(".tmp-")] == [
        "run-step00000020-state",
        "run-step00000020.safetensors",
    ]
    monkeypatch.undo()
    remove_leftovers_of(tmp_path, "run")
    assert len(names(tmp_path)) == 2


def test_a_file_system_that_knows_no_rights_and_no_syncing_saves_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr("os.fsync", refuse)
    with written_whole(tmp_path / "a.txt") as path:
        path.write_text("all")
    save_state(State(tmp_path / "run-state", Progress(), {"seed": 1}, {}, {}))
    assert (tmp_path / "a.txt").read_text() == "all" and load_state(tmp_path / "run-state").facts == {"seed": 1}
