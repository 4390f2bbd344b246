"""From checked settings to files: each picture, its latents, and the grid of a sweep."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from utils.errors import ConfigError
from wan.generation.experts import Expert, Experts, ModelOnDemand
from wan.generation.guidance import GuidanceConfig
from wan.generation.outputs import OutputConfig, latent_metadata, result_stem, save_image, save_latent
from wan.generation.pipeline import Encoded, Pipeline, denoise
from wan.generation.preview import LatentPreview, PreviewConfig
from wan.generation.recipe import Recipe
from wan.generation.sweep import SweepConfig, SweepImage
from wan.models.memory_options import GenerationMemoryConfig
from wan.models.plan import Plan

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class _NotANumberError(Exception):
    """Latents that overflowed."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Everything that the pictures of a run have in common."""

    pipeline: Pipeline
    models: tuple[ModelOnDemand, ...]  # one for all noise levels, or one for each part of them
    plan: Plan[GenerationMemoryConfig]
    task: str
    loras: tuple[str, ...]  # names for the metadata
    recipe: Recipe
    guidance: GuidanceConfig
    output: OutputConfig
    sweep: SweepConfig
    preview: PreviewConfig

    def make(self, pictures: Sequence[SweepImage]) -> None:
        """Write the files of all pictures, and the grids.

        Raises ConfigError, when all the others are written, if latents were no numbers. When the GPU's memory runs out
        the DiT is loaded again as the plan's next choice says, or the error goes on.
        """
        requests = [picture.request for picture in pictures]
        encoded = self.pipeline.encode(requests)
        view = self.pipeline.fit_preview(requests) if self.preview.preview else None
        images: list[Image.Image | None] = [None] * len(pictures)
        failed = 0
        try:
            for number, i in enumerate(_by_multipliers(pictures), start=1):
                label = f"image {number}/{len(pictures)}"
                make_one = partial(self._make_one, pictures[i], encoded[i], label, view)
                try:
                    images[i] = self._with_less_memory_if_need_be(make_one)
                except _NotANumberError:
                    failed += 1
        finally:
            for model in self.models:
                model.release()
        self._save_grids(pictures, images)
        log.info("time: %s", self.pipeline.stopwatch)
        if failed:
            raise ConfigError(
                f"{failed} of {len(pictures)} images came out as NaN and were not saved; check the "
                "model files, and give --dit_dtype bfloat16 if it is float16"
            )

    def _experts(self, picture: SweepImage) -> Experts:
        guidance, multipliers = picture.request.guidance, picture.multipliers
        return Experts([Expert(model, guidance, model.from_level, multipliers) for model in self.models])

    def _with_less_memory_if_need_be(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, tried again with the plan's next choice when the GPU's memory runs out."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if not self.plan.step_down():
                    raise
            for model in self.models:
                model.forget()  # not earlier: the error holds on to it

    def _make_one(
        self, picture: SweepImage, encoded: Encoded, label: str, view: LatentPreview | None
    ) -> Image.Image | None:
        """Write the files of a picture, and return it if a grid will want it. _NotANumberError if there is none."""
        stem = result_stem(picture.request.seed) + picture.suffix
        rough = self.output.save_path / f"{stem}_preview.png"
        watch = partial(view.save_each, self.preview.preview, rough) if view and self.preview.preview else None
        with self.pipeline.stopwatch.stage("denoising"):
            latents = denoise(self._experts(picture), encoded, self.pipeline.device, label, self.guidance, watch)
        if not latents.isfinite().all():
            raise _NotANumberError
        image = self._save(picture, encoded, stem, latents)
        rough.unlink(missing_ok=True)
        return image if self.sweep.axes else None  # a long run shall not pile up pictures

    def _save(self, picture: SweepImage, encoded: Encoded, stem: str, latents: Tensor) -> Image.Image | None:
        output = self.output
        chosen = {name: getattr(self.plan.memory, name) for name in self.plan.memory.chosen_by_plan}
        recipe = None if output.no_metadata else self.recipe.adding(picture.options | chosen, encoded.files)
        if output.wants_latent:
            metadata = None if recipe is None else latent_metadata(picture.request, self.task, self.loras, recipe)
            save_latent(output.save_path, stem, latents, metadata)
        if not output.wants_image:
            return None
        image = self.pipeline.decode(latents)
        save_image(output.save_path, stem, image, recipe)
        return image

    def _save_grids(self, pictures: Sequence[SweepImage], images: Sequence[Image.Image | None]) -> None:
        """Write one grid per prompt, if there are axes. A grid has no recipe: a recipe makes one picture."""
        for start in range(0, len(pictures), self.sweep.size) if self.sweep.axes else ():
            stem = f"{result_stem(pictures[start].request.seed)}_sweep"
            save_image(self.output.save_path, stem, self.sweep.draw(images[start : start + self.sweep.size]), None)


def _by_multipliers(pictures: Sequence[SweepImage]) -> list[int]:
    """Numbers of the pictures, in an order in which the LoRA files are merged at each choice of multipliers once."""
    choices = list(dict.fromkeys(picture.multipliers for picture in pictures))
    return sorted(range(len(pictures)), key=lambda i: choices.index(pictures[i].multipliers))
