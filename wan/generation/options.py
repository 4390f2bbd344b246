"""Options of generation beside those of models and sampling."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.sources import list_images
from utils.errors import ConfigError
from utils.files import require_writable_dir
from utils.images import LONGEST_SIDE, STEP
from utils.options import Section, option
from utils.terminal import history_file, typed_lines
from wan.files.load import save_dit
from wan.generation.prompt import COMMAND_LINE, OPTIONS, Prompt
from wan.generation.prompt_lines import GENERATION, parse_line, read_file
from wan.generation.request import SamplingConfig
from wan.generation.sweep import SweepConfig, SweepImage
from wan.lora.trained_for import TrainedFor
from wan.models.checkpoints import DiTCheckpoint
from wan.models.options import LoRAConfig
from wan.models.tasks import TaskSpec

log = logging.getLogger(__name__)

WAYS = ("prompt", "from_file", "interactive", "latent_path")
"""Flags that say what to generate; one of them is needed."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Section, Prompt):
    """what to generate"""

    recipe: Path | None = option(
        None, help="make the picture of this PNG or latent file again; other options override those in the file"
    )
    from_file: Path | None = option(
        None, help="file with a prompt and its options per line, or .toml, .json", any_bytes=True
    )
    interactive: bool = option(False, help="read prompt lines from the terminal")
    image_folder: Path | None = option(
        None, help="make the prompt's picture of every image in this folder: each is the control image of one"
    )
    latent_path: tuple[Path, ...] = option((), help="decode latent files instead of generating")
    video_size: tuple[int, ...] | None = option(
        None,
        help="height and width, see --exact_size; default 256 256, or with auto that of the LoRA",
        minimum=STEP,
        maximum=LONGEST_SIDE,
        rule=f"each side must have {STEP} to {LONGEST_SIDE} pixels",
        nargs=2,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [f"--{name}" for name in WAYS if getattr(self, name) not in (None, False, ())]
        if not chosen:
            raise ConfigError(
                "nothing to generate; give --prompt, --from_file, --interactive, --latent_path or --recipe"
            )
        if len(chosen) > 1 and chosen != ["--prompt", "--from_file"]:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one")
        if self.image_folder is not None:
            for flag in ("from_file", "interactive", "latent_path", "control_image_path"):
                if getattr(self, flag) not in (None, False, ()):
                    raise ConfigError(f"--image_folder and --{flag} exclude each other; give one")

    @property
    def base(self) -> Prompt:
        """The flags as a prompt, which prompt lines override."""
        height, width = self.video_size or (None, None)
        values = {key: getattr(self, key) for key in OPTIONS} | {"width": width, "height": height}
        return Prompt(**values, place=COMMAND_LINE)

    def prompts(self) -> list[Prompt]:
        """All prompts that are known beforehand. Raises ConfigError for files that can't be read."""
        if self.image_folder is not None:
            return [replace(self.base, control_image_path=(str(path),), name=path.stem) for path in self._images()]
        if self.from_file is None:
            return [] if self.interactive else [self.base]
        return [prompt.over(self.base) for prompt in read_file(self.from_file, "--from_file", GENERATION)]

    def _images(self) -> list[Path]:
        folder = self.image_folder
        images = list_images(folder) if folder is not None and folder.is_dir() else []
        if not images:
            raise ConfigError(f"--image_folder {folder}: is no folder with images; check the path")
        return images

    def typed(
        self, task: TaskSpec, sampling: SamplingConfig, trained: TrainedFor, lora: LoRAConfig
    ) -> Iterator[list[SweepImage]]:
        """One picture per line typed at the terminal, until the end of input. A wrong line is reported and skipped."""
        for line in typed_lines("> ", history_file("wan-one-frame")):
            if line.strip() and not line.strip().startswith("#"):
                try:
                    prompt = parse_line(line, "line", GENERATION).over(self.base)
                    yield SweepConfig().cells(prompt, task, sampling, trained, lora)
                except ConfigError as error:
                    log.error("%s", error)


@dataclass(frozen=True)
class MergedModelConfig(Section):
    """merging"""

    save_merged_model: Path | None = option(
        None, help="write the DiT with the LoRA files merged to this safetensors file, and do nothing else"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        path = self.save_merged_model
        if path is not None and path.suffix != ".safetensors":
            raise ConfigError(f"--save_merged_model {path}: must end in .safetensors")


def write_merged_model(path: Path, dit: DiTCheckpoint, lora: LoRAConfig) -> None:
    """Merge in the dtype of the DiT, on the CPU. Names are the official ones; the metadata name the LoRA files."""
    require_writable_dir(path.parent, "--save_merged_model")
    merger = lora.merger(dit)
    save_dit(path, dit.load(torch.device("cpu"), merger=merger), {"merged_loras": ", ".join(lora.names)})
    log.info("saved %s", path)
