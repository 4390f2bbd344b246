"""Where the reference data lies (beside the checkout, when it is there at all), and how close two tensors are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, TINY, MANIFESTS = SHARED / "golden", SHARED / "tiny", SHARED / "manifests"

needs_shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference data is not beside this checkout")


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of one file of reference outputs."""
    return load_file(GOLDEN / f"{name}.safetensors")


def rel_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, computed in float64. Raises when the shapes differ."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
