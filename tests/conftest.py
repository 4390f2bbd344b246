"""Fixtures of several test files, and one thread per process.

Small tensors gain nothing from more threads, and busy machines lose a factor of ten by them.
"""

import os
from pathlib import Path

import pytest
import torch

from demo.tiny_models import FILES
from tests.tiny_checkpoints import draws_as_recorded, write_tiny_checkpoints

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """The checkpoints of the recordings, in one folder, by the kind of model in FILES; tests only read them."""
    if not draws_as_recorded():
        pytest.skip("the recordings need a CPU with AVX2")
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoints(folder)
    return {kind: folder / name for kind, name in FILES.items()}
