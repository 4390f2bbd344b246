"""A disk that fills up costs the file that did not fit: older ones stay, none is cut short, and a line says so."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import dataset.cache_files
from tests.option_runs import SCRIPTS, words
from tests.project import cache, dataset_toml
from utils import cli
from wan.training.state import load_state
from wan.training.tracking import Tracker, TrackingConfig

ROOT = Path(__file__).parents[1]
CACHING = ("wan_cache_latents", "wan_cache_text_encoder_outputs")
FILES_OF = dict(zip(CACHING, ("*_wan.safetensors", "*_wan_te.safetensors"), strict=True))
pytestmark = pytest.mark.usefixtures("copied_workspace")
SAVES = "--save_state --save_every_n_steps 1 --max_train_steps 3"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def project(new_project):
    """The caches of three items."""
    with new_project("astronaut", "cat", "coffee") as folder:
        dataset_toml("data", cache="cache", size=(32, 32), batch_size=1)
        dataset_toml("small", cache="small", size=(32, 32), batch_size=1)
        Path("a.txt").write_text(
            "a cat --ci data/start/cat.png --of control_index=0,target_index=1 --w 32 --h 32 --s 1 --d 7"
        )
        cache("data.toml")
    return folder


def run(script: str, arguments: str, monkeypatch) -> int:
    """The exit code of a script."""
    monkeypatch.setattr("sys.argv", [script, *words(script, arguments)])
    try:
        cli.run(SCRIPTS[script].main)
    except SystemExit as end:
        return end.code
    return 0


def contents(pattern: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().glob(pattern) if path.is_file()}


def assert_whole(folder: str) -> None:
    """Nothing there is half-written."""
    assert not [path for path in Path(folder).rglob("*") if ".tmp-" in path.name]
    for path in Path(folder).rglob("*.safetensors"):
        load_file(path)
    for path in Path(folder).glob("*-state"):
        load_state(path)
    for path in Path(folder).rglob("*.png"):
        Image.open(path).load()


@pytest.mark.parametrize("script", CACHING)
def test_caching_stops_with_one_line_and_leaves_whole_files(script, monkeypatch, capsys):
    before, calls = contents(f"cache/{FILES_OF[script]}"), []
    write = dataset.cache_files.save_file

    def second_fails(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(dataset.cache_files, "save_file", second_fails)
        assert run(script, "--dataset_config data.toml", patch) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "disk" in line or "Error" in line]
    assert len(errors) == 1 and errors[0].startswith(f"error: the disk is full (cache{os.sep}")
    assert ".tmp-" not in errors[0] and "run again" in errors[0]
    failed = next(name for name in before if Path(name).name in str(calls[1]))
    assert len(calls) <= 3 and Path(failed).read_bytes() == before[failed]  # what is encoded meanwhile is written too
    assert contents(f"cache/{FILES_OF[script]}").keys() == before.keys()
    assert_whole("cache")


TRAINING_FILES = {
    "checkpoint": "run-step00000002.safetensors",
    "weights of the state": "run-step00000002-state",
    "optimizer of the state": "run-step00000002-state",
    "sample": "run_000002_00",
}


@pytest.mark.parametrize("what", TRAINING_FILES)
def test_training_goes_on_without_the_file_that_did_not_fit(what, monkeypatch, caplog):
    flags = f"{SAVES} --sample_prompts a.txt --sample_every_n_steps 1"
    assert run("wan_train_network", flags, monkeypatch) == 0
    Path("output").rename("straight")
    file = {"weights of the state": "model.safetensors", "optimizer of the state": "optimizer.bin"}.get(what, "")
    write_bytes, save = Path.write_bytes, Image.Image.save

    def write_half(path, content):
        if TRAINING_FILES[what] in str(path) and file in path.name:
            write_bytes(path, bytes(content)[: len(content) // 2])
            raise OSError(FULL.errno, FULL.strerror, str(path))
        return write_bytes(path, content)

    def save_half(image, path):
        if TRAINING_FILES[what] in str(path):
            write_bytes(Path(path), b"\x89PNG")
            raise OSError(FULL.errno, FULL.strerror, str(path))
        return save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        patch.setattr(Image.Image, "save", save_half)
        assert run("wan_train_network", flags, patch) == 0
    records = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(records) == 1 and "training goes on" in records[0].getMessage()

    def relative(folder: str) -> set[str]:
        """Its files and folders, sample names without the time."""
        names = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))
        return {name.rpartition("_2")[0] if name.endswith(".png") else name for name in names}

    missing = relative("straight") - relative("output")
    assert missing and all(TRAINING_FILES[what] in name for name in missing)
    assert relative("output") < relative("straight")
    for path in Path("output").glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(Path("straight", path.name))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert_whole("output")


def test_a_run_whose_last_file_does_not_fit_can_be_finished_later(monkeypatch, capsys):
    write_bytes = Path.write_bytes

    def full_at_the_end(path, content):
        if path.name.startswith(".tmp-run.safetensors"):
            raise OSError(FULL.errno, FULL.strerror, str(path))
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_at_the_end)
        assert run("wan_train_network", SAVES, patch) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the disk is full (output" in errors[0] and ".tmp-" not in errors[0]
    assert_whole("output")
    last = load_file("output/run-step00000003.safetensors")
    assert run("wan_train_network", f"{SAVES} --resume auto", monkeypatch) == 0
    final = load_file("output/run.safetensors")
    assert all(final[name].equal(last[name]) for name in final)


# --- a real disk: a file system in memory that only the program under test sees


def on_a_small_disk(size: str, folder: str, script: str, arguments: str) -> subprocess.CompletedProcess:
    """Run a script whose `folder` is a disk of that size; its files are copied to `seen`."""
    Path(folder).mkdir()
    code = f'mount -t tmpfs -o size={size} tmpfs {folder} || exit 99; "$@"; code=$?; cp -a {folder} seen; exit $code'
    program = [sys.executable, str(ROOT / f"{script}.py"), *words(script, arguments)]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", code, "sh", *program], capture_output=True, text=True
    )
    if not Path("seen").exists():
        pytest.skip(f"this machine lets no test mount a disk: {result.stderr}")
    return result


def test_caching_on_a_small_disk():
    result = on_a_small_disk("300k", "small", "wan_cache_latents", "--dataset_config small.toml")
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: the disk is full (small/")
    assert "Traceback" not in result.stderr
    assert len(list(Path("seen").glob("*_wan.safetensors"))) == 1
    assert_whole("seen")


def test_training_on_a_small_disk():
    """It holds the files of the first step and two LoRA files more."""
    result = on_a_small_disk("700k", "output", "wan_train_network", SAVES)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: the disk is full (output/run.safetensors)")
    assert "run-step00000002-state could not be written" in result.stderr
    names = {path.name for path in Path("seen").iterdir()}
    assert {"run-step00000001-state", *(f"run-step0000000{step}.safetensors" for step in (1, 2, 3))} < names
    assert not {"run-step00000002-state", "run.safetensors"} & names
    assert_whole("seen")


def test_metrics_wait_for_space_on_the_disk(monkeypatch, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    tracker = Tracker.open(TrackingConfig(), Path("logs"), "run", {})
    file = tracker._metrics._file
    for step in range(1, 6):
        with Path("/dev/full").open("wb", buffering=0) as full:
            tracker._metrics._file = full if step in (2, 3, 5) else file
            tracker.scalars(step, {"loss": float(step)})
    tracker._metrics._file = file
    tracker.close()
    lines = Path("logs/run-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert caplog.text.count("No space left on device") == 2


def test_a_final_file_that_is_in_use_leaves_a_state_to_go_on_from(monkeypatch, capsys):
    """As on Windows, where another program has the old one open."""
    replace = Path.replace

    def in_use(path, target):
        if Path(target).name == "run.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", in_use)
        assert run("wan_train_network", "", patch) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: output/run.safetensors: Permission denied".replace("/", os.sep))
    assert run("wan_train_network", "--resume auto", monkeypatch) == 0
    assert load_file("output/run.safetensors")
