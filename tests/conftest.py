"""Fixtures of several test files, and one thread per process.

Small tensors gain nothing from more threads, and busy machines lose a factor of ten by them.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from demo.photos import write_pairs
from demo.tiny_models import FILES, write_models
from tests.project import cache, dataset_toml
from tests.tiny_checkpoints import draws_as_recorded, write_tiny_checkpoints

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
torch.set_num_threads(1)


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Ctrl-C and SIGHUP end this process and those that it starts, also where nohup or a shell has them ignored."""
    ways = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): way for name, way in ways.items() if hasattr(signal, name)}
    previous = {number: signal.signal(number, way) for number, way in numbers.items()}
    yield
    for number, way in previous.items():
        signal.signal(number, way)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """The checkpoints of the recordings, in one folder, by the kind of model in FILES; tests only read them."""
    if not draws_as_recorded():
        pytest.skip("the recordings need a CPU with AVX2")
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoints(folder)
    return {kind: folder / name for kind, name in FILES.items()}


@pytest.fixture(scope="session")
def new_project(tmp_path_factory) -> Callable[..., AbstractContextManager[Path]]:
    """new_project("cat", "coffee") makes a folder, current in its block, with models/ and data/ of these PHOTOS."""
    models = tmp_path_factory.mktemp("models")
    write_models(models)

    @contextmanager
    def make(*photos: str) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("project")
        shutil.copytree(models, folder / "models")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            write_pairs(Path("data"), photos)
            yield folder

    return make


@pytest.fixture(scope="session")
def _cached_project(new_project) -> Path:
    with new_project("astronaut", "brick", "cat", "coffee") as folder:
        cache(dataset_toml("pairs", keys="fp_1f_clean_indices = [0]\nfp_1f_target_index = 1"))
        cache(dataset_toml("middle", "middle", "ends", "fp_1f_clean_indices = [0, 2]\nfp_1f_target_index = 1"))
    return folder


@pytest.fixture(scope="module")
def project(_cached_project, tmp_path_factory) -> Path:
    """The folder that the tests of a file share, with caches of pairs.toml and middle.toml; a file may have its own."""
    return shutil.copytree(_cached_project, tmp_path_factory.mktemp("project"), dirs_exist_ok=True)


@pytest.fixture
def workspace(project, monkeypatch) -> Path:
    """The current folder is `project`."""
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def copied_workspace(project, tmp_path, monkeypatch) -> Path:
    """The current folder is a copy of `project`, for one test."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
