"""Recordings of the reference and of published files (`recordings/README.md`), and what tests compare with."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from wan.nets.vae import WanVAE

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


def official_video_condition(vae: WanVAE, video: torch.Tensor, with_last: bool) -> torch.Tensor:
    """Condition [20, F, H, W] of a video [3, T, height, width] in [-1, 1], made step by step as Wan2.1 does.

    Its image2video.py shows the model the first frame, first_last_frame2video.py the last one too.
    """
    given = torch.zeros(video.shape[1], 1, 1)
    given[[0, -1] if with_last else [0]] = 1
    latents = vae.encode((video * given)[None])[0]
    mask = given.expand(-1, *latents.shape[-2:])
    mask = torch.cat([mask[:1].expand(4, -1, -1), mask[1:]])  # the first frame stands for four
    return torch.cat([mask.unflatten(0, (-1, 4)).transpose(0, 1), latents])
