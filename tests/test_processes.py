"""Two processes on the CPU, with DDP and with FSDP2, do what one does. They talk through gloo."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import wan_train_network
from tests.helpers import rel_l2
from tests.project import ENCODERS, LATENT_MODELS, TEXT_MODELS, cache_latents, cache_texts, dataset_toml, model_flags
from tests.two_processes import ROOT, SECONDS, finish, run_jobs, start
from utils.errors import ConfigError
from wan.models import device
from wan.models.device import DeviceConfig
from wan.training import start as training_start
from wan.training.state import load_state

pytestmark = pytest.mark.usefixtures("workspace")
PHOTOS = ["astronaut", "brick", "cat", "coffee"]
SAMPLES = [*ENCODERS, "--sample_prompts", "prompts.txt", "--sample_at_first"]
# Steps of four items and all that needs several processes to agree.
EVERYTHING = [
    *("--gradient_accumulation_steps", "2", "--scale_weight_norms", "0.01", "--save_state", "--save_every_n_steps"),
    *("2", "--save_last_n_steps", "0", "--save_last_n_steps_state", "9", "--validation_split", "1"),
    *("--validate_every_n_steps", "3", "--sample_every_n_steps", "4", *SAMPLES),
]


def dataset(name: str, batch_size: int, cache: str = "cache") -> None:
    """12 items after repetition."""
    dataset_toml(name, keys="num_repeats = 3", cache=cache, size=(32, 32), batch_size=batch_size)


def caching(name: str, *flags: str) -> list[tuple[str, list[str]]]:
    common = ["--dataset_config", f"{name}.toml", "--device", "cpu", *flags]
    return [
        ("wan_cache_latents", [*common, *LATENT_MODELS, "--one_frame"]),
        ("wan_cache_text_encoder_outputs", [*common, *TEXT_MODELS]),
    ]


def arguments(output: str, *flags: str, steps: int, data: str = "one") -> list[str]:
    return [
        *(*model_flags("i2v"), "--dit_dtype", "float32", "--device", "cpu"),
        *("--dataset_config", f"{data}.toml", "--network_dim", "2", "--learning_rate", "1e-3"),
        *("--lr_scheduler", "cosine", "--timestep_sampling", "sigmoid", "--num_timestep_buckets", "4"),
        *("--seed", "5", "--max_train_steps", str(steps), "--max_data_loader_n_workers", "0"),
        *("--output_dir", output, "--output_name", "run", *flags),
    ]


def training_job(output: str, *flags: str, **more) -> tuple[str, list[str]]:
    return "wan_train_network", arguments(output, *flags, **more)


def launch_settings(name: str):
    """What `accelerate launch` makes of a file in docs/: its arguments and the environment of the processes."""
    given = launch_command_parser().parse_args(["--config_file", str(ROOT / "docs" / name), "script.py"])
    settings = _validate_launch_command(given)[0]
    return settings, prepare_multi_gpu_env(settings)


def metrics(output: str, *, every_step: bool = True) -> list[dict[str, float]]:
    """The lines of the training steps, or those of validation."""
    lines = map(json.loads, (Path(output) / "run-metrics.jsonl").read_text().splitlines())
    return [line for line in lines if ("loss/current" in line) == every_step]


def assert_same_run(output: str, expected: str, last: int | None = None) -> None:
    """Both trained alike, in the last so many steps or in all."""
    for every_step in (True, False):
        found, wanted = (metrics(folder, every_step=every_step) for folder in (output, expected))
        assert found or not every_step
        for one, other in zip(found, wanted[len(wanted) - len(found) :], strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert len(metrics(output)) == (last or len(metrics(expected)))
    one, other = (load_file(Path(folder) / "run.safetensors") for folder in (output, expected))
    assert one.keys() == other.keys()
    assert max(rel_l2(one[key], other[key]) for key in one) < 1e-4


def contents(folder: str) -> dict[str, tuple]:
    """Of each file in a cache folder what it says and holds, to the bit."""
    found = {}
    for path in Path(folder).iterdir():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in load_file(path).items()}
        found[path.name] = metadata, tensors
    return found


def pictures(output: str, when: str) -> list[np.ndarray]:
    files = sorted(Path(output, "sample").glob(f"run_{when}_*.png"))
    assert [path.name.split("_")[2] for path in files] == ["00", "01", "02"]  # every prompt once
    return [np.asarray(Image.open(path), dtype=int) for path in files]


@pytest.fixture(scope="module")
def project(new_project):
    with new_project(*PHOTOS) as folder:
        size = "--w 32 --h 32 --s 2 --d 7 --of control_index=0,target_index=1"
        Path("prompts.txt").write_text("\n".join(f"a picture --ci data/start/{name}.png {size}" for name in PHOTOS[:3]))
        dataset("one", 1)
        dataset("two", 2)
        cache_latents("two.toml")
        cache_texts("two.toml")
    return folder


@pytest.fixture(scope="module")
def ddp(project):
    """The folder after all that two processes do with a copy of the model in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        dataset("shared", 2, cache="shared")
        Path("shared").mkdir()
        dataset("repaired", 2, cache="repaired")
        shutil.copytree("cache", "repaired")
        for suffix in ("wan", "wan_te"):
            next(Path("repaired").glob(f"cat_*{suffix}.safetensors")).unlink()
            for folder in ("shared", "repaired"):
                some = next(Path("cache").glob(f"cat_*{suffix}.safetensors"))
                shutil.copy(some, Path(folder, some.name.replace("cat", "orphan")))
        Path("ddp_all/run-step00000004.safetensors/obstacle").mkdir(parents=True)  # can't be replaced by a file
        run_jobs(
            [
                *caching("shared"),
                *caching("repaired", "--skip_existing"),
                training_job("ddp", steps=10),
                training_job("ddp_fp8", "--fp8_base", "--fp8_scaled", steps=2),
                training_job("ddp_all", *EVERYTHING, steps=5),
                training_job("ddp_resumed", *EVERYTHING, "--resume", "ddp_all/run-step00000002-state", steps=5),
            ]
        )
    return project


@pytest.fixture(scope="module")
def fsdp2(ddp):
    """The folder after what two processes do with the model shared out, as docs/accelerate_fsdp2.yaml says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ddp)
        environment = launch_settings("accelerate_fsdp2.yaml")[1]
        state = "ddp_all/run-step00000002-state"
        run_jobs(
            [
                training_job("fsdp2_all", *EVERYTHING, "--gradient_checkpointing", steps=5),
                training_job("fsdp2_resumed", *EVERYTHING, "--resume", state, steps=5),
                training_job("fsdp2_fp8", "--fp8_base", "--fp8_scaled", steps=2),
            ],
            {key: value for key, value in environment.items() if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))},
        )
    return ddp


@pytest.mark.parametrize("folder", ["shared", "repaired"])
def test_two_processes_write_the_caches_that_one_writes_and_clean_up(ddp, folder):
    assert contents(folder) == contents("cache")


def test_with_skip_existing_two_processes_write_only_what_is_missing(ddp):
    kept = [path for path in Path("cache").iterdir() if not path.name.startswith("cat")]
    before, after = ([Path(folder, path.name).stat().st_mtime_ns for path in kept] for folder in ("cache", "repaired"))
    assert before == after  # copytree copies the times


@pytest.mark.parametrize("flags", [{"data": "two"}, {"flags": ["--gradient_accumulation_steps", "2"]}], ids=str)
def test_ten_steps_of_two_processes_equal_those_of_one_with_twice_the_items(ddp, flags, tmp_path):
    flags = dict(flags)
    wan_train_network.main(arguments(str(tmp_path), *flags.pop("flags", ()), **flags, steps=10))
    assert len(metrics("ddp")) == 10
    assert_same_run("ddp", str(tmp_path))


def test_every_sample_prompt_is_drawn_once_by_two_processes(ddp):
    assert len(pictures("ddp_all", "000004")) == 3


def test_a_file_that_the_first_process_cannot_write_leaves_both_in_step_and_older_files_alone(ddp):
    assert [line["step"] for line in metrics("ddp_all")] == [1, 2, 3, 4, 5]
    assert Path("ddp_all/run-step00000004.safetensors").is_dir()
    assert Path("ddp_all/run-step00000002.safetensors").is_file()  # would go if that of step 4 had been saved
    assert load_state(Path("ddp_all/run-state")).progress.step == 5


def test_a_run_of_two_processes_resumed_equals_the_uninterrupted_one_in_every_bit(ddp):
    assert metrics("ddp_resumed") == metrics("ddp_all")[2:]
    one, other = (load_file(Path(folder) / "run.safetensors") for folder in ("ddp_resumed", "ddp_all"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_state_of_two_processes_goes_on_in_one_which_says_so(ddp, tmp_path, caplog):
    flags = [*EVERYTHING, "--gradient_accumulation_steps", "4", "--resume", "ddp_all/run-step00000002-state"]
    wan_train_network.main(arguments(str(tmp_path), *flags, steps=5))
    assert "processes = 1; the state was made with 2" in caplog.text
    assert_same_run(str(tmp_path), "ddp_all", last=3)


def test_fsdp2_trains_validates_and_draws_like_ddp(fsdp2):
    assert_same_run("fsdp2_all", "ddp_all")
    for when in ("e000000", "000004"):
        for one, other in zip(pictures("fsdp2_all", when), pictures("ddp_all", when), strict=True):
            assert np.abs(one - other).max() <= 1
    assert_same_run("fsdp2_fp8", "ddp_fp8")


def test_a_state_of_ddp_goes_on_under_fsdp2(fsdp2):
    assert_same_run("fsdp2_resumed", "ddp_all", last=3)


def test_a_state_of_fsdp2_goes_on_in_one_process(fsdp2, tmp_path):
    flags = [*EVERYTHING, "--gradient_accumulation_steps", "4", "--resume", "fsdp2_all/run-step00000002-state"]
    wan_train_network.main(arguments(str(tmp_path), *flags, steps=5))
    assert_same_run(str(tmp_path), "fsdp2_all", last=3)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM for other processes")
@pytest.mark.parametrize("receiver", ["launcher", "second process"])
def test_a_signal_to_any_process_stops_all_with_one_state_to_go_on_from(receiver, tmp_path, caplog):
    process = start(str(ROOT / "wan_train_network.py"), *arguments(str(tmp_path), steps=5000))
    log, end = tmp_path / "run-metrics.jsonl", time.monotonic() + SECONDS
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    if receiver == "launcher":
        os.killpg(process.pid, signal.SIGTERM)  # what a terminal or a batch system does
    else:
        next(worker for worker in workers if worker.environ().get("RANK") == "1").send_signal(signal.SIGTERM)
    output = finish(process)
    states = list(tmp_path.glob("run-*-state"))
    assert len(states) == 1, output
    step = load_state(states[0]).progress.step
    assert f"stopped after step {step} (SIGTERM): go on with --resume {states[0]}" in output
    assert not psutil.wait_procs(workers, timeout=30)[1]
    wan_train_network.main(arguments(str(tmp_path), "--resume", "auto", steps=step + 2))
    assert [line["step"] for line in metrics(str(tmp_path))] == list(range(1, step + 3))


def test_the_files_for_accelerate_say_ddp_and_fsdp2():
    for name in ("accelerate_ddp.yaml", "accelerate_fsdp2.yaml"):
        settings, environment = launch_settings(name)
        assert (settings.num_processes, environment["ACCELERATE_MIXED_PRECISION"]) == (2, "no")
        assert (settings.multi_gpu, settings.use_fsdp) == ((True, False) if "ddp" in name else (False, True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--blocks_to_swap", "1", "--gradient_checkpointing"), "--blocks_to_swap 1: can't be combined with FSDP2"),
        (("--optimizer_type", "Adafactor"), "--optimizer_type Adafactor: FSDP2 takes"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused_before_weights_load(monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(training_start.AcceleratorState, "is_fsdp2", True)
    monkeypatch.setattr(training_start.DiTCheckpoint, "load", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=words):
        wan_train_network.main(arguments(str(tmp_path), *flags, steps=1))


def test_a_single_gpu_named_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(DeviceConfig, "resolve", lambda self: torch.device(self.device))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="--device cuda:1: several processes take cpu or cuda"):
        device.init_processes(DeviceConfig("cuda:1"))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not supported; launch with .*accelerate_ddp.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM, which is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1; set fsdp_version to 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1; set fsdp_version to 2"),
    ],
)
def test_ways_of_accelerate_that_are_not_supported_are_refused_by_name(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for start_up in (training_start.build_accelerator, device.init_processes):
        with pytest.raises(ConfigError, match=words):
            start_up(DeviceConfig("cpu"))


def test_what_accelerate_was_told_about_compiling_and_accumulating_is_not_used(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = training_start.build_accelerator(DeviceConfig("cpu"))
    assert accelerator.state.dynamo_plugin.backend == "NO" and accelerator.gradient_accumulation_steps == 1
    assert "dynamo_backend INDUCTOR of accelerate is not used; --compile compiles the model" in caplog.text
