"""Many clips of the world, rendered on the device that trains, and what the video models are shown of them."""

import multiprocessing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.drawing import rasterise, stack_shapes
from demo.figures import shapes
from demo.world import CHANGES, FRAMES, SIZES, in_blazer, sample_scene


@dataclass
class Recordings:
    """Clips of one size."""

    frames: Tensor  # [N, FRAMES, 3, height, width] uint8
    captions: list[str]

    def half(self) -> "Recordings":
        """The first half of them."""
        count = (len(self.captions) + 1) // 2
        return Recordings(self.frames[:count], self.captions[:count])


def record(
    count: int,
    first_seed: int,
    device: torch.device,
    held_out: bool = False,
    blazers: bool = False,
    changes: bool = False,
) -> list[Recordings]:
    """Clips of the seeds first_seed, first_seed + 1, ...; one set per size in SIZES.

    blazers: in every second clip somebody wears one. changes: in every second clip clothes or place change at once.
    """
    tasks = [
        (seed, held_out, *(seed % 2 == 1 and wanted for wanted in (blazers, changes)))
        for seed in range(first_seed, first_seed + count)
    ]
    if count < 64:
        made = [_shapes_of(task) for task in tasks]
    else:
        with multiprocessing.get_context("fork").Pool() as pool:
            made = pool.map(_shapes_of, tasks, chunksize=64)
    sets = []
    for size in SIZES:
        mine = [(rows, caption) for rows, caption, its_size in made if its_size == size]
        parts = []
        for start in range(0, len(mine), 200):
            moments = [torch.from_numpy(row) for rows, _ in mine[start : start + 200] for row in rows]
            pictures = rasterise(stack_shapes(moments).to(device), size)
            parts.append(pictures.unflatten(0, (-1, FRAMES)))
        sets.append(Recordings(torch.cat(parts), [caption for _, caption in mine]))
    return sets


def _shapes_of(task: tuple[int, bool, bool, bool]) -> tuple[list[np.ndarray], str, tuple[int, int]]:
    torch.set_num_threads(1)
    seed, held_out, blazer, change = task
    scene = sample_scene(seed, held_out, CHANGES[seed // 2 % 2] if change else None)
    scene = in_blazer(scene, seed) if blazer else scene
    return [shapes(scene, frame).numpy() for frame in range(FRAMES)], scene.caption, scene.size


def as_video(frames: Tensor) -> Tensor:
    """[B, T, 3, height, width] uint8 -> [B, 3, T, height, width] in [-1, 1], float32"""
    return frames.transpose(1, 2).float() / 127.5 - 1


def given_frames(video: Tensor, with_last: bool) -> Tensor:
    """The first frame, with grey (zeros) for the others; `with_last`: and the last frame. [B, 3, T, height, width]."""
    given = torch.zeros_like(video)
    given[:, :, 0] = video[:, :, 0]
    if with_last:
        given[:, :, -1] = video[:, :, -1]
    return given


def video_mask(latents: Tensor, with_last: bool) -> Tensor:
    """Mask channels [B, 4, F, H, W] of a video, one per video frame of a latent frame; the first frame fills all four.

    As in image2video.py and first_last_frame2video.py of Wan2.1.
    """
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    if with_last:
        mask[:, 3, -1] = 1
    return mask
