"""Sample images during training: the pipeline of generation, fed with the model in training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.files import make_folder, written_whole
from utils.options import Section, option
from wan.generation.experts import Experts
from wan.generation.pipeline import Encoded, Pipeline, denoise
from wan.generation.prompt import Prompt
from wan.generation.prompt_lines import TRAINING, read_file
from wan.generation.request import Request, SamplingConfig
from wan.models.device import ALONE, Processes
from wan.models.tasks import TaskSpec
from wan.nets.dit import WanDiT
from wan.training.cadence import Every

log = logging.getLogger(__name__)

# What a prompt line leaves open (docs/one_frame.md#prompt-lines).
_DEFAULTS = Prompt(width=256, height=256, sample_steps=20)


@dataclass(frozen=True)
class SampleConfig(Section):
    """sample images"""

    sample_prompts: Path | None = option(None, help="prompts to sample, .txt, .toml or .json")
    sample_at_first: bool = option(False, needs="--sample_prompts FILE", help="sample before training")
    sample_every_n_epochs: int | None = option(
        None, minimum=1, needs="--sample_prompts FILE", help="sample after every n epochs"
    )
    sample_every_n_steps: int | None = option(
        None, minimum=1, needs="--sample_prompts FILE", help="sample after every n steps"
    )

    def requests(self, task: TaskSpec, sampling: SamplingConfig) -> list[Request]:
        """All prompts of the file, checked; none without a file. Seeds are drawn once and stay for the run."""
        if self.sample_prompts is None:
            return []
        prompts = read_file(self.sample_prompts, "--sample_prompts", TRAINING)
        return [Request.resolve(prompt.over(_DEFAULTS), task, sampling) for prompt in prompts]

    @property
    def every(self) -> Every:
        """Period of the samples."""
        return Every(self.sample_every_n_steps, self.sample_every_n_epochs)


class Sampler:
    """Prompts encoded once, before the DiT needs the memory, and drawn whenever training asks.

    The prompts are shared out between the processes. A failing sample is reported and never raises.
    """

    def __init__(
        self,
        requests: list[Request],
        pipeline: Pipeline,
        folder: Path,
        name: str,
        processes: Processes = ALONE,
        preview: int | None = None,
    ) -> None:
        self._pipeline, self._folder, self._name, self._preview = pipeline, folder, name, preview
        self._writes = True
        numbers = processes.rank_slice(range(len(requests)))
        mine = [requests[number] for number in numbers]
        encoded = pipeline.encode(mine) if mine else []
        self._view = pipeline.fit_preview(mine) if mine and preview else None
        self._encoded: list[tuple[int, Encoded]] = list(zip(numbers, encoded, strict=True))

    def draw_together(self, gather: Callable[[list[Any]], list[Any]], writes: bool) -> None:
        """Have all processes draw every prompt from now on, in step, as a DiT that FSDP2 has sharded demands.

        All have to call it. gather: a list -> those of all processes in a row; writes: whether this one writes files.
        """
        self._encoded = sorted(gather(self._encoded), key=lambda pair: pair[0])
        self._writes = writes

    def draw(self, dit: WanDiT, suffix: str) -> list[Path]:
        """Write one PNG per prompt of this process, in eval mode; no random state is touched."""
        was_training, paths = dit.training, list[Path]()
        dit.eval()
        for number, encoded in self._encoded:
            try:
                paths += self._draw_one(dit, number, encoded, suffix)
            except OSError as error:
                log.error("sample %d could not be written (%s); training goes on", number, error.strerror)
            except Exception:
                log.exception("sample %d could not be made; training goes on", number)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        dit.train(was_training)
        return paths

    def _draw_one(self, dit: WanDiT, number: int, encoded: Encoded, suffix: str) -> list[Path]:
        if self._writes:
            make_folder(self._folder)
        time = datetime.now().strftime("%Y%m%d%H%M%S")
        stem = f"{self._name}_{suffix}_{number:02d}_{time}_{encoded.request.seed}"
        rough, path = (self._folder / f"{stem}_{end}.png" for end in ("preview", "000"))
        watch = None
        if self._writes and self._view is not None and self._preview is not None:
            watch = partial(self._view.save_each, self._preview, rough)
        experts = Experts.one(dit, encoded.request.guidance)
        latents = denoise(experts, encoded, self._pipeline.device, f"sample {number}", watch=watch)
        if not self._writes:
            return []
        image = self._pipeline.decode(latents)
        with written_whole(path) as temporary:
            image.save(temporary)
        rough.unlink(missing_ok=True)
        return [path]
