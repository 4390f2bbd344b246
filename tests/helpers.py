"""What is recorded of the reference and of the published files (`recordings/README.md`); how close tensors are."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

RECORDINGS = Path(__file__).resolve().parent / "recordings"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of one file of reference outputs."""
    return load_file(golden_path(f"{name}.safetensors"))


def golden_path(name: str) -> Path:
    """One file of reference outputs."""
    return RECORDINGS / "outputs" / name


def manifest(name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a published checkpoint, in the order of the file."""
    listed = json.loads((RECORDINGS / "manifests" / f"{name}.json").read_text(encoding="utf-8"))
    return {key: (tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in listed.items()}


def manifest_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a published checkpoint."""
    return {key: shape for key, (shape, _) in manifest(name).items()}


def rel_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, computed in float64. Raises when the shapes differ."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
