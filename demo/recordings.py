"""Many clips of the world, rendered on the device that trains, and the conditions that video models see of them."""

import multiprocessing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.drawing import rasterise, stack_shapes
from demo.figures import shapes
from demo.world import CHANGES, FRAMES, SIZES, in_blazer, sample_scene
from utils.images import as_pixels
from wan.frames.clip import Clip, Role, Slot
from wan.frames.condition import causal_condition, causal_condition_video
from wan.nets.spec import TIME_STRIDE
from wan.nets.vae import WanVAE


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
    """[B, T, 3, height, width] uint8 -> [B, 3, T, height, width] in [-1, 1], float32."""
    return as_pixels(frames.transpose(1, 2))


def video_clip(frames: int, with_last: bool) -> Clip:
    """A video of that many latent frames: the first one is given, `with_last` the last one too."""
    given = [0, frames - 1] if with_last else [0]
    times = [*given, *(time for time in range(frames) if time not in given)]
    roles = [Role.GIVEN] * len(given) + [Role.GENERATED] * (frames - len(given))
    slots = [Slot(time, role, source) for source, (time, role) in enumerate(zip(times, roles, strict=True))]
    return Clip(tuple(sorted(slots, key=lambda slot: slot.time_index)))


def video_conditions(vae: WanVAE, videos: Tensor, with_last: bool) -> Tensor:
    """Videos [B, 3, 1 + 4 (F - 1), height, width] in [-1, 1] -> the conditions [B, 20, F, H, W] of Wan2.1's training.

    They show the first frame, and the last one `with_last`.
    """
    clip = video_clip(1 + videos.shape[2] // TIME_STRIDE, with_last)
    shown = torch.stack([causal_condition_video(clip, [video[:, 0], video[:, -1]]) for video in videos])
    return torch.stack([causal_condition(clip, latents) for latents in vae.encode(shown)])
