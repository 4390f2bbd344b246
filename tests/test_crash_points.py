"""A run that is killed, or refused by the disk, at any operation on a file loses nothing that was there before.

Every CRASH_POINTS_EVERY-th operation is tried, with `CRASH_POINTS_EVERY=1` all of them.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests import power_cuts
from tests.crash_points import KILLED, Forks, Job, Outcome
from tests.option_runs import metadata
from tests.power_cuts import Disk
from tests.project import LATENT_MODELS, TEXT_MODELS, cache, dataset_toml, model_flags, run_flags
from wan.training.state import load_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="operations are watched by ways of Linux")
EVERY = int(os.environ.get("CRASH_POINTS_EVERY", "7"))
ERRORS = ("ENOSPC", "EACCES", "EIO")
AT_ONCE = 2  # runs
SHOWN = int(os.environ.get("CRASH_POINTS_SHOWN", "5"))

_TRAINING = (
    *(*model_flags("i2v"), "--dataset_config", "data.toml", *run_flags(), "--network_dim", "2", "--seed", "5"),
    *("--learning_rate", "1e-2", "--max_data_loader_n_workers", "0", "--output_dir", "output", "--output_name", "run"),
    *("--save_state", "--save_every_n_steps", "1", "--save_last_n_steps", "1"),
    *("--sample_prompts", "a.txt", "--sample_every_n_steps", "2"),
)
_GENERATION = (*model_flags("i2v"), *run_flags(), "--save_path", "results", "--preview", "1")
_CACHING = ("--dataset_config", "data.toml", "--device", "cpu", "--num_workers", "1", "--skip_existing")


@dataclass(frozen=True)
class Scenario:
    """A run; `after`: the scenario whose folder it starts in; `again`: what is added when it is started once more."""

    script: str
    arguments: tuple[str, ...]
    after: str = ""
    again: tuple[str, ...] = ()


SCENARIOS = {
    "training": Scenario("wan_train_network", (*_TRAINING, "--max_train_steps", "3"), again=("--resume", "auto")),
    "resuming": Scenario(
        "wan_train_network", (*_TRAINING, "--max_train_steps", "4", "--resume", "auto"), after="training"
    ),
    "latents": Scenario("wan_cache_latents", (*_CACHING, *LATENT_MODELS, "--one_frame"), after="other caches"),
    "texts": Scenario("wan_cache_text_encoder_outputs", (*_CACHING, *TEXT_MODELS), after="other caches"),
    "pictures": Scenario(
        "wan_generate_video", (*_GENERATION, "--from_file", "a.txt", "--output_type", "latent_images")
    ),
    "merged model": Scenario(
        "wan_generate_video",
        (*_GENERATION, "--lora_weight", "output/run.safetensors", "--save_merged_model", "merged.safetensors"),
        after="training",
    ),
    "peft": Scenario("wan_lora", ("convert", "output/run.safetensors", "peft", "--to", "peft"), after="training"),
    "merge": Scenario("wan_lora", ("merge", *["output/run.safetensors"] * 2, "sum.safetensors"), after="training"),
    "extract": Scenario(
        "wan_lora",
        ("extract", model_flags("i2v")[1], "merged.safetensors", "new.safetensors", "--rank", "2", "--device", "cpu"),
        after="merged model",
    ),
    "sheet": Scenario(
        "wan_dataset",
        ("sheet", "--dataset_config", "data.toml", *model_flags("vae"), "--device", "cpu", "--output", "sheet.html"),
    ),
    "check": Scenario("wan_dataset", ("check", "--dataset_config", "data.toml", "--json", "check.json")),
}


class Places:
    """Folders in which scenarios start, and what they lead to when nothing happens."""

    def __init__(self, forks: Forks, ground: Path, folder: Path) -> None:
        self.forks, self._ground, self._folder = forks, ground, folder
        self._ends: dict[str, tuple[Path, Outcome]] = {}

    def start(self, name: str) -> Path:
        """A fresh folder in which the scenario may be run; large files that no run writes are links."""
        made = Path(tempfile.mkdtemp(dir=self._folder)) / "project"
        after = SCENARIOS[name].after
        source = self.end(after)[0] if after in SCENARIOS else self._ground
        shutil.copytree(source, made, symlinks=True)
        if after == "other caches":  # of an item that is gone, and of older files of one that is there
            for path in [*(made / "cache").glob("coffee*")]:
                shutil.copy(path, path.with_name(path.name.replace("coffee", "gone")))
            (made / "data/target/cat.txt").write_text("another caption")
            shutil.copy(made / "data/target/coffee.png", made / "data/target/cat.png")
        return made

    def end(self, name: str) -> tuple[Path, Outcome]:
        """The folder after an undisturbed run, and that run."""
        if name not in self._ends:
            folder = self.start(name)
            outcome = self.run(folder, name)
            assert outcome.code == 0, outcome.output
            self._ends[name] = folder, outcome
        return self._ends[name]

    def run(
        self, folder: Path, name: str, *more: str, at: int = 0, error: str = "", signals: tuple[str, ...] = ()
    ) -> Outcome:
        """The outcome of the scenario in a folder."""
        scenario = SCENARIOS[name]
        return self.forks.run(Job(str(folder), scenario.script, (*scenario.arguments, *more), at, error, signals))


@pytest.fixture(scope="module")
def places(new_project, tmp_path_factory):
    with new_project("cat", "coffee") as ground:
        models = tmp_path_factory.mktemp("models") / "models"
        shutil.move("models", models)
        Path("models").symlink_to(models)
        dataset_toml("data", cache="cache", size=(32, 32), batch_size=1)
        line = "a cat --ci data/start/cat.png --of control_index=0,target_index=1 --w 32 --h 32 --s 1 --d 7"
        Path("a.txt").write_text(line)
        cache("data.toml")
        with Forks() as forks:
            yield Places(forks, ground, tmp_path_factory.mktemp("places"))


# --- what is in a folder


def results(folder: Path) -> dict[str, set[str]]:
    """All that a user has there, by name without times; what says when it was made is left out."""
    found: dict[str, set[str]] = {}
    for path in filter(Path.is_file, [folder, *folder.rglob("*")]):  # which does not follow the link to the models
        name = re.sub(r"\d{8}-\d{6}-\d{3}|\d{14}", "TIME", path.relative_to(folder).as_posix())
        if ".tmp-" not in name and not name.endswith(
            ("-settings.toml", "_preview.png")
        ):  # of which runs that go on write others
            found.setdefault(name, set()).add(content(path))
    return found


def content(path: Path) -> str:
    """What is in a file; raises what its readers do when it is damaged."""
    if path.suffix == ".safetensors":
        own = sorted(metadata(path).items())
        tensors = [(name, tensor.dtype, digest(tensor.numpy().tobytes())) for name, tensor in load_file(path).items()]
        return repr([own, sorted(tensors, key=str)])
    if path.suffix == ".png":
        with Image.open(path) as image:
            return digest(image.tobytes())
    if path.name == "progress.json":
        progress = json.loads(path.read_text())["progress"]
        items = progress.pop("epoch") * 2 + progress.pop("items")  # two are an epoch
        return repr({**progress, "items": items, "started": 0})
    return digest(path.read_bytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".tmp-*")]


def assert_kept(folder: Path, outcome: Outcome, end: Outcome) -> None:
    """Every file is whole, but for those with temporary names, and all that was said to be saved is there."""
    results(folder)
    for path in folder.glob("output/*-state"):
        load_state(path)
    assert_promises_kept(folder, outcome, end)


def promised(outcome: Outcome) -> set[str]:
    """The files that a run has said to have saved, and has not said to have deleted."""
    there: set[str] = set()
    for kind, message, *_ in outcome.operations:
        if kind == "said" and message.startswith("saved "):
            there |= set(message.removeprefix("saved ").split(":")[0].split(" and "))
        elif kind == "said" and message.startswith("deleted "):
            there.discard(message.removeprefix("deleted "))
    return there


def assert_promises_kept(folder: Path, outcome: Outcome, end: Outcome) -> None:
    """All that was said to be saved is whole, but for what a run that goes on would delete next."""
    for path in promised(outcome) & promised(end):
        assert (folder / path).exists(), path
        load_state(folder / path) if path.endswith("-state") else results(folder / path)


def points(name: str, places: Places) -> range:
    """The operations of a scenario to try, from 1."""
    count = sum(kind != "said" for kind, *_ in places.end(name)[1].operations)
    assert count > 3
    return range(1, count + 1, EVERY)


def each(points: Iterable[int], work: Callable[[int], None]) -> None:
    """work(point) for all, and one error that lists what was wrong."""

    def tried(point: int) -> str | None:
        try:
            work(point)
        except Exception as error:
            return f"{point}: {type(error).__name__}: {str(error)[-1500:]}"
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [line for line in pool.map(tried, points) if line]
    if wrong:
        pytest.fail("\n".join([f"{len(wrong)} points", *wrong[:SHOWN]]), pytrace=False)


def assert_goes_on(folder: Path, name: str, first: Outcome, places: Places, unlike: tuple[str, ...] = ()) -> None:
    """Started again, the scenario ends as if nothing had happened, and nothing is left lying.

    unlike: files that may be others.
    """
    wanted = results(places.end(name)[0])
    done = SCENARIOS[name].script == "wan_lora" and results(folder) == wanted
    outcome = places.run(folder, name, *SCENARIOS[name].again)
    if outcome.code:
        assert done and "exists already" in outcome.errors[-1], outcome.output
    steps = [int(step) for step in re.findall(r"run-step(\d+)-state", " ".join(promised(first)))]
    if steps:
        resumed = re.search(r"resuming from .*: step (\d+) of", outcome.output)
        assert resumed and int(resumed[1]) >= max(steps), outcome.output
    assert not leftovers(folder), leftovers(folder)
    found = results(folder)
    if not re.search("could not be|can't be", first.output):  # what the first run gave up may be missing
        assert set(found) == set(wanted), (set(found) ^ set(wanted), outcome.output)
    wanted = {key: wanted[key] for key in wanted if key in found}
    if differing := [key for key in wanted if found[key] != wanted[key] and not (unlike and key.endswith(unlike))]:
        raise AssertionError(f"{differing}\n{outcome.output}")


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_killed_at_any_operation_loses_nothing_and_can_be_started_again(name, places):
    def kill(at: int) -> None:
        folder = places.start(name)
        outcome = places.run(folder, name, at=at)
        assert outcome.code == KILLED, outcome.output
        assert_kept(folder, outcome, places.end(name)[1])
        assert_goes_on(folder, name, outcome, places)
        shutil.rmtree(folder.parent)

    each(points(name, places), kill)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_operation_that_fails_costs_at_most_its_file_and_ends_in_one_line(name, places):
    def fail(at: int) -> None:
        folder, error = places.start(name), ERRORS[at % len(ERRORS)]
        outcome = places.run(folder, name, at=at, error=error)
        struck = [operation for operation in outcome.operations if operation[0] != "said"][at - 1]
        assert "Traceback" not in outcome.output, (error, struck, outcome.output)
        assert (outcome.code, len(outcome.errors)) in ((0, 0), (1, 1)), (error, struck, outcome.output)
        assert_kept(folder, outcome, places.end(name)[1])
        if struck[0] not in ("remove", "rmdir"):
            assert not leftovers(folder), (error, struck, leftovers(folder))
        assert_goes_on(folder, name, outcome, places)
        shutil.rmtree(folder.parent)

    each(points(name, places), fail)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_leaves_what_was_saved_and_a_run_that_can_be_started_again(name, places):
    end, outcome = places.end(name)
    disk, start = Disk(places.start(name)), places.start(name)
    cuts: dict[str, tuple[dict[str, bytes | None], Outcome]] = {}
    for number, operation in enumerate(outcome.operations, start=1):
        disk.apply(*operation, copy=lambda copy: Path(f"{end}.run.copy{copy}").read_bytes())
        for names_are_written in (False, True):
            found = disk.after_cut(names_are_written)
            before = Outcome(outcome.code, "", outcome.operations[:number])
            cuts[repr(sorted(found.items()))] = found, before  # the latest has promised most
    assert len(cuts) > 3
    cuts_in_order = list(cuts.values())

    def cut(number: int) -> None:
        found, before = cuts_in_order[number]
        folder = Path(tempfile.mkdtemp(dir=end.parent)) / "project"
        shutil.copytree(start, folder, symlinks=True, ignore=lambda *_: [name for name in found if "/" not in name])
        power_cuts.write(found, folder)
        assert_promises_kept(folder, before, outcome)
        assert_goes_on(folder, name, before, places, unlike=("run-metrics.jsonl",))
        shutil.rmtree(folder.parent)

    each(range(0, len(cuts), EVERY), cut)


@pytest.mark.parametrize("name", ["training", "resuming"])
def test_any_two_signals_at_any_moment_cost_no_step_that_was_done(name, places):
    pairs = list(product(("SIGINT", "SIGTERM", "SIGHUP"), repeat=2))

    def stop(at: int) -> None:
        folder, signals = places.start(name), pairs[at % len(pairs)]
        outcome = places.run(folder, name, at=at, signals=signals)
        assert "Traceback" not in outcome.output, (signals, outcome.output)
        assert outcome.code in (0, *(128 + getattr(signal, name) for name in signals)), (signals, outcome)
        assert_kept(folder, outcome, places.end(name)[1])
        assert not leftovers(folder), (signals, leftovers(folder))
        metrics = folder / "output/run-metrics.jsonl"
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
        states = [load_state(path).progress.step for path in folder.glob("output/*-state")]
        assert not steps or max(states, default=0) >= max(steps), (signals, steps, states, outcome.output)
        assert_goes_on(folder, name, outcome, places)
        shutil.rmtree(folder.parent)

    each(points(name, places), stop)
