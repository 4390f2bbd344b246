"""States that no run has written: each is resumed from, or refused in one line before weights load."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.amp import GradScaler

import wan.files.load
import wan_train_network
from tests.fuzz_files import damaged, json_bytes, values
from tests.project import model_flags
from utils.cli import Stopped
from utils.errors import ConfigError
from wan.training.state import load_state, newest_state
from wan.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("workspace")


def train(*flags: str) -> None:
    wan_train_network.main(
        [
            *(*model_flags("i2v"), "--dit_dtype", "float32", "--device", "cpu", "--dataset_config", "pairs.toml"),
            *("--network_dim", "2", "--seed", "5", "--max_data_loader_n_workers", "0", "--output_name", "run", *flags),
        ]
    )


@pytest.fixture(scope="module")
def sound(project, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        train("--output_dir", str(folder), "--save_state", "--max_train_steps", "2")
    return folder / "run-state"


def resumed(state: Path, *flags: str) -> None:
    train("--output_dir", str(state.parent), "--resume", str(state), "--max_train_steps", "3", *flags)


def changed(content, path, value):
    """A copy of a nest of dicts and lists with another value at a path."""
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def write_optimizer(state: Path, path, value) -> None:
    content = torch.load(state / "optimizer.bin", weights_only=True)
    torch.save(changed(content, path, value), state / "optimizer.bin")


def write_progress(state: Path, path, value) -> None:
    content = json.loads((state / "progress.json").read_text())
    (state / "progress.json").write_bytes(json_bytes(changed(content, path, value)))


DEEP: list = []
for _ in range(150):
    DEEP = [DEEP]
HUGE = torch.zeros(1).expand(1 << 20, 1 << 20)
PROGRESS = [
    *((("progress", "step"), value) for value in (-1, 1.5, math.nan, math.inf, "2", None, True, 10**400, [], 1 << 60)),
    *((("progress", "items"), value) for value in (-1, 1e300, {})),
    *((("progress", "losses"), value) for value in (3, ["a"], [math.nan], [0.1] * 1000, [[0.1]], "ab")),
    *((("progress", "started"), value) for value in ("now", None, math.inf)),
    *((("facts", "seed"), value) for value in (-1, 1.5, "x", 1 << 70, None)),
    *((("progress",), value) for value in ([], None, 3)),
    *((("facts",), value) for value in ([], {}, 3, "ab")),
]
GROUP, KEPT = ("optimizer", "param_groups", 0), ("optimizer", "state", 0)
OPTIMIZER = [
    *(((), value) for value in ([], None, {}, {"optimizer": {}})),
    *((("optimizer",), value) for value in ([], None, {"state": {}}, {"param_groups": [], "state": {}})),
    *(((*GROUP, "lr"), value) for value in ("fast", math.nan, -1.0, [], DEEP)),
    *(((*GROUP, "betas"), value) for value in ((0.9,), (2.0, 3.0), "ab", (0.9, "x"), HUGE)),
    *(((*GROUP, "params"), value) for value in ([], [0] * 40, "x", ["a"] * 40, DEEP)),
    *(((*GROUP, "foreach"), value) for value in ("yes", DEEP)),
    *((KEPT, value) for value in ([], {"step": torch.tensor(2.0)}, DEEP, 3)),
    *(((*KEPT, "exp_avg"), value) for value in (torch.zeros(3), torch.zeros(2, 256, 2), HUGE, "x", DEEP)),
    *(((*KEPT, "step"), value) for value in (torch.tensor(-1.0), torch.tensor(math.nan), torch.zeros(5), "x", -1)),
    *((("optimizer", "state"), value) for value in ([], {"a": {}}, {10**9: {}}, DEEP)),
    *((("scheduler",), value) for value in ([], None, {}, DEEP)),
    *((("scheduler", "last_epoch"), value) for value in (-3, 0.5, "x", 10**400)),
    *((("scheduler", "base_lrs"), value) for value in ([], [1.0] * 9, ["x"], 3)),
    *((("scaler",), value) for value in ([1], 3, {"scale": "x"}, {"scale": HUGE}, {"scale": 1.0})),
]


def name_of(value) -> str:
    return str(value)[:40] if value is not DEEP else "deep"


@pytest.fixture
def copied(sound, tmp_path, monkeypatch) -> Path:
    for name in ("load_dit", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(wan.files.load, name, lambda *_args, **_more: pytest.fail("weights were loaded"))
    return shutil.copytree(sound, tmp_path / "run-state")


def assert_refused(state: Path, *flags: str) -> str:
    with pytest.raises(ConfigError, match=r"^--resume ") as caught:
        resumed(state, *flags)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(("path", "value"), PROGRESS, ids=name_of)
def test_progress_that_no_run_has_made_is_refused(path, value, copied):
    write_progress(copied, path, value)
    assert "is damaged" in assert_refused(copied)
    with pytest.raises(ConfigError, match="--resume auto: no state of run"):
        newest_state(copied.parent, "run")


@pytest.mark.parametrize(("path", "value"), OPTIMIZER, ids=name_of)
def test_an_optimizer_that_can_not_go_on_is_refused(path, value, copied):
    write_optimizer(copied, path, value)
    assert_refused(copied)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value, copied):
    weights = load_file(copied / "model.safetensors")
    save_file({key: tensor * value for key, tensor in weights.items()}, copied / "model.safetensors")
    assert "holds NaN" in assert_refused(copied)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, copied):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    assert_refused(copied)


def test_code_and_huge_numbers_in_pickles_are_refused(copied):
    for content in (pickle.dumps(print), pickle.dumps({"a": 1}), b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b"."):
        (copied / "optimizer.bin").write_bytes(content)
        assert_refused(copied)


def paths_of(content, path=()):
    """All places in a nest of dicts and lists."""
    yield path
    for key, part in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(part, (dict, list)):
            yield from paths_of(part, (*path, key))
        else:
            yield (*path, key)


TENSORS = st.sampled_from([torch.zeros(2), torch.zeros(2, 256), torch.tensor(-5), HUGE, torch.zeros(0), torch.ones(1)])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_state_holds_the_run_goes_on_or_ends_in_one_line(data, sound, tmp_path_factory):
    state = shutil.copytree(sound, tmp_path_factory.mktemp("fuzz") / "run-state")
    kind = data.draw(st.sampled_from(["progress", "optimizer", "bytes"]))
    if kind == "progress":
        content = json.loads((state / "progress.json").read_text())
        write_progress(state, data.draw(st.sampled_from(list(paths_of(content)))), data.draw(values))
    elif kind == "optimizer":
        content = torch.load(state / "optimizer.bin", weights_only=True)
        places = [path for path in paths_of(content) if len(path) < 3 or path[2] in (0, 1, "lr")]
        write_optimizer(state, data.draw(st.sampled_from(places)), data.draw(values | TENSORS))
    else:
        file = state / data.draw(st.sampled_from(["model.safetensors", "optimizer.bin", "progress.json"]))
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    try:
        resumed(state)
    except (ConfigError, Stopped) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--optimizer_type", "Adafactor"),
            "is a state of AdamW, which Adafactor can't go on from; give --optimizer_type AdamW",
        ),
        (("--optimizer_type", "SGD"), "is a state of AdamW, which SGD can't go on from"),
        (("--network_args", "loraplus_lr_ratio=4"), "another loraplus_lr_ratio"),
        (("--network_dim", "3"), "--network_dim 2"),
        (("--network_alpha", "2"), "--network_alpha 1"),
    ],
)
def test_settings_that_a_state_can_not_serve_are_told_before_weights_load(flags, words, copied):
    assert words in assert_refused(copied, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--learning_rate", "1e-3"), "learning_rate = 0.001; the state was made with 2e-06"),
        (("--lr_scheduler", "cosine"), "lr_scheduler = cosine; the state was made with constant"),
        (("--lr_scheduler", "rex"), "lr_scheduler = rex; the state was made with constant"),
        (("--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=9"), "lr_scheduler_type = Cosine"),
        (
            ("--optimizer_args", "weight_decay=0.5"),
            "optimizer_args = ['weight_decay=0.5']; the state was made with None",
        ),
        (("--network_dropout", "0.5"), "network_dropout = 0.5; the state was made with None"),
        (("--timestep_sampling", "uniform"), "timestep_sampling = uniform"),
        (("--one_frame_loss", "target"), "one_frame_loss = target"),
        (("--max_grad_norm", "0"), "max_grad_norm = 0.0; the state was made with 1.0"),
    ],
)
def test_settings_that_change_the_meaning_of_a_run_are_said_and_it_goes_on(flags, words, sound, tmp_path, caplog):
    state = shutil.copytree(sound, tmp_path / "run-state")
    resumed(state, *flags)
    assert words in caplog.text and (tmp_path / "run.safetensors").exists()


def test_a_run_in_float16_goes_on_from_a_state_that_has_no_gradient_scaler(sound, tmp_path):
    state = shutil.copytree(sound, tmp_path / "run-state")
    scaler = GradScaler("cpu", enabled=True)
    step = SimpleNamespace(
        scaler=scaler, optimizer=None, scheduler=SimpleNamespace(state_dict=dict, load_state_dict=id)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan.training.step.load_optimizer_state", lambda *_: None)
        TrainingStep.load_state_dict(step, load_state(state).optimizer, "--resume")
    assert scaler.state_dict() == GradScaler("cpu", enabled=True).state_dict()


def test_a_run_whose_settings_are_the_same_says_nothing_of_differences(sound, tmp_path, caplog):
    resumed(shutil.copytree(sound, tmp_path / "run-state"))
    assert [line for line in caplog.messages if "resuming with" in line] == [
        "resuming with total_steps = 3; the state was made with 2"
    ]


def test_only_states_of_this_run_are_resumed(sound, tmp_path):
    state = shutil.copytree(sound, tmp_path / "run-000001-state")
    write_progress(state, ("facts", "output_name"), "run-000001")
    assert newest_state(tmp_path, "run") is None
    assert newest_state(tmp_path, "run-000001").path == state
    content = json.loads((state / "progress.json").read_text())
    del content["facts"]["output_name"]  # as earlier versions wrote it
    (state / "progress.json").write_text(json.dumps(content))
    assert newest_state(tmp_path, "run").path == state
