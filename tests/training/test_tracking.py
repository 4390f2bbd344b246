"""The file of metrics, and what TensorBoard and wandb are told; stand-ins for the two packages record the calls."""

import json
import logging
import re
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from utils.errors import ConfigError
from wan.training.tracking import Tracker, TrackingConfig, public_settings

PACKAGES = {
    "tensorboard": "",
    "wandb": """
calls = []
def login(**keywords): calls.append(("login", keywords))
class Image:
    def __init__(self, path): self.path = path
class Run:
    def log(self, values, step): calls.append(("log", step, values))
    def finish(self): calls.append(("finish",))
def init(**keywords):
    if keywords.get("fail"): raise RuntimeError("no\\nnetwork")
    calls.append(("init", keywords))
    return Run()
""",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Both packages importable, as far as they are used."""
    for name, code in PACKAGES.items():
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    module = types.ModuleType("torch.utils.tensorboard")
    module.writers = []

    class SummaryWriter:
        def __init__(self, log_dir, **arguments):
            self.calls = [("open", Path(log_dir), arguments)]
            module.writers.append(self)

        def __getattr__(self, name):
            return lambda *arguments, **keywords: self.calls.append((name, *arguments, keywords))

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    yield module
    sys.modules.pop("wandb", None)


def opened(tmp_path, config=None, resume_step=0, settings=None, **keywords):
    return Tracker.open(config or TrackingConfig(), tmp_path / "out", "cat", settings or {}, resume_step, **keywords)


def metrics(tmp_path):
    return tmp_path / "out" / "cat-metrics.jsonl"


def log_steps(tracker, steps):
    for step in steps:
        tracker.scalars(step, {"loss/current": 1 / step, "lr/unet": 1e-4})
        if step % 2 == 0:
            tracker.scalars(step, {"validation/loss": 0.1 * step})


def test_every_call_is_a_line_of_json_that_is_on_disk_at_once(tmp_path):
    tracker = opened(tmp_path)
    tracker.scalars(1, {"loss/current": 0.25, "lr/unet": 1e-4})
    assert metrics(tmp_path).read_bytes() == b'{"step": 1, "loss/current": 0.25, "lr/unet": 0.0001}\n'
    tracker.scalars(2, {"loss/current": float("nan"), "loss/average": float("inf")})
    assert json.loads(metrics(tmp_path).read_text().splitlines()[1]) == {
        "step": 2,
        "loss/current": None,
        "loss/average": None,
    }
    tracker.close()


@pytest.mark.parametrize("crash", ["", '{"step": 7, "loss/cur', "\x00\x00\x00", '{"loss": 1}\n', "7\n", '{"step": 4}'])
def test_a_resumed_run_leaves_the_same_file_as_an_uninterrupted_one(tmp_path, crash):
    with opened(tmp_path) as tracker:
        log_steps(tracker, range(1, 11))
    whole = metrics(tmp_path).read_bytes()
    assert whole.count(b"\n") == 15
    with opened(tmp_path) as tracker:
        log_steps(tracker, range(1, 7))
    with metrics(tmp_path).open("a", encoding="utf-8") as file:
        file.write(crash)
    with opened(tmp_path, resume_step=4) as tracker:
        log_steps(tracker, range(5, 11))
    assert metrics(tmp_path).read_bytes() == whole
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat-metrics.jsonl"]


def test_a_fresh_run_replaces_an_older_file_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        for expected in (0, 1):
            with opened(tmp_path) as tracker:
                log_steps(tracker, [1])
            assert sum("of an earlier run" in record.message for record in caplog.records) == expected
    assert metrics(tmp_path).read_text().count("\n") == 1


def test_resuming_without_the_file_is_warned_about(tmp_path, caplog):
    with opened(tmp_path, resume_step=3) as tracker:
        log_steps(tracker, [4])
    assert "the metrics up to step 3 are missing" in caplog.text
    assert metrics(tmp_path).read_text().count("\n") == 2


def test_other_processes_write_nothing(tmp_path, packages):
    config = TrackingConfig(logging_dir=tmp_path / "logs", log_with="all")
    with opened(tmp_path, config, main=False) as tracker:
        log_steps(tracker, [1])
        tracker.image(1, "sample/0", tmp_path / "missing.png")
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists() and not packages.writers


def test_keys_tokens_and_folders_stay_private():
    settings = {
        "wandb_api_key": "a",
        "huggingface_token": "b",
        "db_password": "c",
        "dit": Path("home") / "me" / "dit.safetensors",
        "resume": str(Path("home") / "me" / "x-000002-state"),
        "base_weights": (Path("home") / "x.safetensors",),
        "betas": (0.9, 0.99),
        "seed": 7,
        "t5_tokenizer": Path("models") / "tokenizer",
        "vae": None,
        "sdpa": True,
        "dtype": complex(1),
    }
    assert public_settings(settings) == {
        "dit": "dit.safetensors",
        "resume": "x-000002-state",
        "base_weights": ["x.safetensors"],
        "betas": [0.9, 0.99],
        "seed": 7,
        "t5_tokenizer": "tokenizer",
        "vae": None,
        "sdpa": True,
        "dtype": "(1+0j)",
    }


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_resume_that_names_no_folder_is_told_as_it_is(resume):
    assert public_settings({"resume": resume}) == {"resume": resume}


def test_tensorboard_gets_scalars_pictures_and_settings_in_a_folder_of_the_run(tmp_path, packages):
    Image.new("L", (4, 2), 200).save(tmp_path / "a.png")
    (tmp_path / "more.toml").write_text("[tensorboard]\nflush_secs = 5\n", encoding="utf-8")
    config = TrackingConfig(
        logging_dir=tmp_path / "logs",
        log_prefix="cat-",
        log_tracker_name="first",
        log_tracker_config=tmp_path / "more.toml",
        log_config=True,
    )
    with opened(tmp_path, config, settings={"seed": 7, "wandb_api_key": "secret"}) as tracker:
        tracker.scalars(3, {"loss/current": 0.5, "lr/unet": 0.25})
        tracker.image(3, "sample/0", tmp_path / "a.png")
    (writer,) = packages.writers
    (_, folder, arguments), text, first, second, image, last = writer.calls
    assert re.fullmatch(r"cat-\d{14}/first", folder.relative_to(tmp_path / "logs").as_posix())
    assert arguments == {"flush_secs": 5}
    assert text == ("add_text", "settings", "| setting | value |\n|---|---|\n| seed | 7 |", {})
    assert [first, second] == [("add_scalar", "loss/current", 0.5, 3, {}), ("add_scalar", "lr/unet", 0.25, 3, {})]
    assert image[0:2] == ("add_image", "sample/0") and image[2].shape == (2, 4, 3) and (image[2] == 200).all()
    assert image[3:] == (3, {"dataformats": "HWC"}) and last == ("close", {})


def test_wandb_gets_scalars_pictures_and_settings(tmp_path, packages):
    (tmp_path / "more.toml").write_text('[wandb]\ngroup = "cats"\nname = "other"\n', encoding="utf-8")
    config = TrackingConfig(
        log_with="wandb",
        log_tracker_config=tmp_path / "more.toml",
        wandb_run_name="first",
        wandb_api_key="secret",
        log_config=True,
    )
    with opened(tmp_path, config, settings={"seed": 7, "wandb_api_key": "secret"}) as tracker:
        tracker.scalars(3, {"loss/current": 0.5})
        tracker.image(3, "sample/0", tmp_path / "a.png")
    login, init, scalars, image, finish = sys.modules["wandb"].calls
    assert login == ("login", {"key": "secret"}) and finish == ("finish",)
    run = {"project": "network_train", "dir": str(tmp_path / "out"), "config": {"seed": 7}}
    assert init == ("init", {**run, "group": "cats", "name": "first"})
    assert scalars == ("log", 3, {"loss/current": 0.5})
    assert image[:2] == ("log", 3) and image[2]["sample/0"].path == str(tmp_path / "a.png")


def test_settings_are_sent_only_when_asked_for(tmp_path, packages):
    config = TrackingConfig(logging_dir=tmp_path / "logs", log_with="all")
    opened(tmp_path, config, settings={"seed": 7}).close()
    assert [call[0] for call in packages.writers[0].calls] == ["open", "close"]
    ((_, init), _) = sys.modules["wandb"].calls
    assert init["config"] is None and init["dir"] == str(tmp_path / "logs")


def test_a_log_that_fails_is_reported_and_left_out_while_the_others_go_on(tmp_path, packages, caplog):
    config = TrackingConfig(logging_dir=tmp_path / "logs", log_with="all")
    with opened(tmp_path, config) as tracker:
        tracker.image(1, "sample/0", tmp_path / "missing.png")  # TensorBoard opens it, the stand-in for wandb does not
        tracker.scalars(2, {"loss/current": 0.5})
    assert caplog.text.count("TensorBoard failed and is left out from now on") == 1
    assert [call[0] for call in packages.writers[0].calls] == ["open"]
    assert [call[0] for call in sys.modules["wandb"].calls] == ["init", "log", "log", "finish"]
    assert metrics(tmp_path).read_text() == '{"step": 2, "loss/current": 0.5}\n'


@pytest.mark.parametrize(
    ("options", "trackers"),
    [
        ({}, ()),
        ({"logging_dir": Path("logs")}, ("tensorboard",)),
        ({"log_with": "wandb"}, ("wandb",)),
        ({"logging_dir": Path("logs"), "log_with": "wandb"}, ("wandb",)),
        ({"logging_dir": Path("logs"), "log_with": "all"}, ("tensorboard", "wandb")),
    ],
)
def test_a_logging_folder_alone_means_tensorboard(options, trackers):
    assert TrackingConfig(**options).trackers == trackers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
        ({"log_with": "all"}, "--log_with all needs --logging_dir"),
        ({"log_prefix": "a/b"}, "--log_prefix a/b: must be a name"),
        ({"log_tracker_name": "../x"}, "--log_tracker_name ../x: must be a name"),
    ],
)
def test_contradicting_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        TrackingConfig(**options)


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize(
    ("package", "options", "cause"),
    [
        ("tensorboard", {"logging_dir": Path("logs")}, "--logging_dir"),
        ("wandb", {"log_with": "wandb"}, "--log_with wandb"),
    ],
)
def test_a_missing_package_is_named_before_anything_happens(tmp_path, monkeypatch, package, options, cause, leftover):
    """The folder `wandb`, which offline runs leave behind, can be imported, but is no package."""
    monkeypatch.chdir(tmp_path)
    if leftover:
        (tmp_path / package / "run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(
        ConfigError, match="^" + re.escape(f'{cause} needs the package {package}; run: pip install ".[')
    ):
        TrackingConfig(**options).check()
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[wandb]\nname =", "correct the TOML there"),
        ("[comet]\nx = 1", "comet: is not a table of a tracker; write [tensorboard] or [wandb]"),
        ("wandb = 1", "wandb: is not a table of a tracker"),
    ],
)
def test_mistakes_in_the_tracker_file_are_named_in_one_line(tmp_path, text, words):
    path = tmp_path / "more.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        TrackingConfig(log_tracker_config=path).check()
    assert str(caught.value).startswith(f"--log_tracker_config {path}: ") and words in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--log_tracker_config .*: does not exist"):
        TrackingConfig(log_tracker_config=tmp_path / "none.toml").check()


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ("[wandb]\nfail = true", {"log_with": "wandb"}, "--log_with wandb: wandb does not start (no network)"),
        ("", {"logging_dir": Path("file")}, "--logging_dir file: cannot write there"),
    ],
)
def test_a_log_that_does_not_start_ends_the_run_before_training(tmp_path, monkeypatch, packages, table, options, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("more.toml").write_text(table, encoding="utf-8")
    metrics(tmp_path).parent.mkdir()
    metrics(tmp_path).write_text("of an earlier run")
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, TrackingConfig(log_tracker_config=Path("more.toml"), **options))
    assert str(caught.value).startswith(words)
    assert metrics(tmp_path).read_text() == "of an earlier run"


def test_the_real_tensorboard_reads_what_was_logged(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (4, 2), (1, 2, 3)).save(tmp_path / "a.png")
    with opened(
        tmp_path, TrackingConfig(logging_dir=tmp_path / "logs", log_config=True), settings={"seed": 7}
    ) as tracker:
        tracker.scalars(3, {"loss/current": 0.5})
        tracker.image(3, "sample/0", tmp_path / "a.png")
    ((folder,),) = [list(run.iterdir()) for run in (tmp_path / "logs").iterdir()]
    found = events.EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss/current")] == [(3, 0.5)]
    assert [(event.step, event.width, event.height) for event in found.Images("sample/0")] == [(3, 4, 2)]
    assert found.Tags()["tensors"] == ["settings/text_summary"]
