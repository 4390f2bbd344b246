"""From checked cells to files: each picture, its latents, and the grid of a sweep."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from utils.errors import ConfigError
from wan.generation.guidance import GuidanceConfig
from wan.generation.outputs import OutputConfig, latent_metadata, result_stem, save_image, save_latent
from wan.generation.pipeline import Encoded, Pipeline, Resident, denoise
from wan.generation.preview import LatentPreview, PreviewConfig
from wan.generation.recipe import Recipe
from wan.generation.sweep import SweepConfig, SweepImage
from wan.models.memory_options import MemoryConfig
from wan.models.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What all pictures of a run have in common."""

    pipeline: Pipeline
    load: Callable[[tuple[float, ...], MemoryConfig, torch.device], nn.Module]  # (LoRA multipliers, ...) -> DiT
    merge_again: Callable[[nn.Module, tuple[float, ...]], None]  # other multipliers into a loaded DiT
    plan: Plan
    task: str
    loras: tuple[str, ...]  # names for the metadata
    recipe: Recipe
    guidance: GuidanceConfig
    output: OutputConfig
    sweep: SweepConfig
    preview: PreviewConfig

    def loaded_on_demand(self, multipliers: tuple[float, ...], wanted_again: bool = False) -> Resident:
        """The DiT with its LoRA files merged at these multipliers."""
        return self.pipeline.loaded_on_demand(
            "the DiT", lambda device: self.load(multipliers, self.plan.memory, device), wanted_again
        )

    def make(self, cells: Sequence[SweepImage], kept: Resident | None = None) -> None:
        """Write the files of all cells. The DiT, `kept` or loaded once, gets each choice of multipliers in turn.

        Raises ConfigError, when all the others are written, if latents were no numbers. When the GPU's memory runs out
        the DiT is loaded again as the plan's next choice says, or the error goes on.
        """
        encoded = self.pipeline.encode([cell.request for cell in cells])
        view = self.pipeline.fit_preview([cell.request for cell in cells]) if self.preview.preview else None
        made: dict[int, Image.Image | None] = {}
        failed: list[int] = []
        choices = list(dict.fromkeys(cell.multipliers for cell in cells))
        left = sorted(range(len(cells)), key=lambda i: choices.index(cells[i].multipliers))
        while left:
            merged = cells[left[0]].multipliers
            resident = kept or self.loaded_on_demand(merged)
            try:
                with resident.on_device() as dit:
                    while left:
                        cell, label = cells[left[0]], f"image {len(made) + 1}/{len(cells)}"
                        if cell.multipliers != merged:
                            with self.pipeline.stopwatch.stage("merging again"):
                                self.merge_again(dit, cell.multipliers)
                            merged = cell.multipliers
                        made[left[0]], good = self._make_one(dit, cell, encoded[left[0]], label, view)
                        failed += [] if good else left[:1]
                        del left[0]
            except torch.OutOfMemoryError:
                if not self.plan.step_down():
                    raise
                resident.forget()
        self._save_grids(cells, [made[i] for i in range(len(cells))])
        log.info("time: %s", self.pipeline.stopwatch)
        if failed:
            raise ConfigError(
                f"{len(failed)} of {len(cells)} images came out as no numbers (NaN) and were not saved; check the "
                "model files, and give --dit_dtype bfloat16 if it is float16"
            )

    def _make_one(
        self, dit: nn.Module, cell: SweepImage, encoded: Encoded, label: str, view: LatentPreview | None
    ) -> tuple[Image.Image | None, bool]:
        """The picture, if a grid will want it, and whether the latents were numbers."""
        stem = result_stem(cell.request.seed) + cell.suffix
        rough = self.output.save_path / f"{stem}_preview.png"
        watch = view and partial(view.save_each, self.preview.preview, rough)
        with self.pipeline.stopwatch.stage("denoising"):
            latents = denoise(dit, encoded, self.pipeline.device, label, self.guidance, watch)
        if not latents.isfinite().all():
            return None, False
        image = self._save(cell, stem, latents)
        rough.unlink(missing_ok=True)
        return image if self.sweep.axes else None, True  # a long run shall not pile up pictures

    def _save(self, cell: SweepImage, stem: str, latents: Tensor) -> Image.Image | None:
        output = self.output
        chosen = {name: getattr(self.plan.memory, name) for name in self.plan.memory.chosen_by_plan}
        recipe = None if output.no_metadata else self.recipe.adding(cell.options | chosen)
        if output.wants_latent:
            metadata = recipe and latent_metadata(cell.request, self.task, self.loras, recipe)
            save_latent(output.save_path, stem, latents, metadata)
        if not output.wants_image:
            return None
        image = self.pipeline.decode(latents)
        save_image(output.save_path, stem, image, recipe)
        return image

    def _save_grids(self, cells: Sequence[SweepImage], images: Sequence[Image.Image | None]) -> None:
        """One per prompt. Without a recipe: a recipe makes one picture."""
        for start in range(0, len(cells), self.sweep.size) if self.sweep.axes else ():
            stem = f"{result_stem(cells[start].request.seed)}_sweep"
            save_image(self.output.save_path, stem, self.sweep.draw(images[start : start + self.sweep.size]), None)
