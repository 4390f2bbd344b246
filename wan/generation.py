"""From checked cells to files: each picture, its latents, and the grid of a sweep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from utils.errors import ConfigError
from wan.guidance import GuidanceConfig
from wan.outputs import OutputConfig, latent_metadata, result_stem, save_image, save_latent
from wan.pipeline import Pipeline, Resident, denoise
from wan.preview import PreviewConfig
from wan.recipe import Recipe
from wan.sweep import Cell, SweepConfig


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What all pictures of a run have in common."""

    pipeline: Pipeline
    load: Callable[[tuple[float, ...], torch.device], nn.Module]  # (LoRA multipliers, device) -> DiT
    task: str
    loras: tuple[str, ...]  # names for the metadata
    recipe: Recipe
    guidance: GuidanceConfig
    output: OutputConfig
    sweep: SweepConfig
    preview: PreviewConfig

    def resident(self, multipliers: tuple[float, ...], wanted_again: bool = False) -> Resident:
        """The DiT with its LoRA files merged at these multipliers."""
        return Resident(lambda device: self.load(multipliers, device), self.pipeline.device, wanted_again)

    def make(self, cells: Sequence[Cell], kept: Resident | None = None) -> None:
        """Write the files of all cells. The DiT is `kept`, or else loaded once for each choice of multipliers.

        Raises ConfigError, when all the others are written, if latents were no numbers.
        """
        encoded = self.pipeline.encode([cell.request for cell in cells])
        view = self.pipeline.fit_preview([cell.request for cell in cells]) if self.preview.preview else None
        images: list[Image.Image | None] = [None] * len(cells)
        done, failed = 0, 0
        for multipliers in dict.fromkeys(cell.multipliers for cell in cells):
            with (kept or self.resident(multipliers)).on_device() as dit:
                for i in [i for i, cell in enumerate(cells) if cell.multipliers == multipliers]:
                    done += 1
                    label, stem = f"image {done}/{len(cells)}", result_stem(cells[i].request.seed) + cells[i].suffix
                    rough = self.output.save_path / f"{stem}_preview.png"
                    watch = view and partial(view.save_each, self.preview.preview, rough)
                    latents = denoise(dit, encoded[i], self.pipeline.device, label, self.guidance, watch)
                    if not latents.isfinite().all():
                        failed += 1
                        continue
                    image = self._save(cells[i], stem, latents)
                    rough.unlink(missing_ok=True)
                    images[i] = image if self.sweep.axes else None  # a long run shall not pile up pictures
        self._save_grids(cells, images)
        if failed:
            raise ConfigError(
                f"{failed} of {len(cells)} images came out as no numbers (NaN) and were not saved; check the model "
                "files, and give --dit_dtype bfloat16 if it is float16"
            )

    def _save(self, cell: Cell, stem: str, latents: Tensor) -> Image.Image | None:
        output = self.output
        recipe = None if output.no_metadata else self.recipe.adding(cell.options)
        if output.wants_latent:
            metadata = recipe and latent_metadata(cell.request, self.task, self.loras, recipe)
            save_latent(output.save_path, stem, latents, metadata)
        if not output.wants_image:
            return None
        image = self.pipeline.decode(latents)
        save_image(output.save_path, stem, image, recipe)
        return image

    def _save_grids(self, cells: Sequence[Cell], images: Sequence[Image.Image | None]) -> None:
        """One per prompt. Without a recipe: a recipe makes one picture."""
        for start in range(0, len(cells), self.sweep.size) if self.sweep.axes else ():
            stem = f"{result_stem(cells[start].request.seed)}_sweep"
            save_image(self.output.save_path, stem, self.sweep.draw(images[start : start + self.sweep.size]), None)
