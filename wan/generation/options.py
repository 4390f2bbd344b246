"""Options of generation beside those of models and sampling."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import ConfigError
from utils.files import require_writable_dir
from utils.options import option
from wan.files.load import save_dit
from wan.generation.prompt_lines import Prompt, parse_line, read_file
from wan.generation.request import SamplingConfig
from wan.generation.sweep import SweepConfig, SweepImage
from wan.generation.terminal import history_file, typed_lines
from wan.lora.trained_for import TrainedFor
from wan.models.options import DiTConfig, LoRAConfig
from wan.models.tasks import TaskSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptConfig:
    """what to generate"""

    recipe: Path | None = option(
        None, help="make the picture of this PNG or latent file again; other options go over those in the file"
    )
    prompt: str | None = option(None, help="prompt")
    from_file: Path | None = option(None, help="file with a prompt and its options per line, or .toml, .json")
    interactive: bool = option(False, help="read prompt lines from the terminal")
    latent_path: tuple[Path, ...] = option((), help="decode latent files instead of generating")
    negative_prompt: str | None = option(None, help="default: that of the task")
    one_frame_inference: str | None = option(
        None, help='time indices: "control_index=0,target_index=1"; auto: those of the LoRA'
    )
    control_image_path: tuple[str, ...] | None = option(None, help="control images, in the order of control_index")
    control_image_mask_path: tuple[str, ...] | None = option(
        None, help="a mask per control image, white where it is to be used; default: its alpha channel"
    )
    image_path: str | None = option(None, help="start image: aspect ratio and CLIP feature; default: earliest control")
    end_image_path: str | None = option(None, help="end image of flf2v: CLIP feature; default: the latest control")
    video_size: tuple[int, ...] | None = option(
        None, help="height and width, see --exact_size; default 256 256, or with auto that of the LoRA", nargs=2
    )
    infer_steps: int | None = option(None, help="default: that of the task")
    flow_shift: float | None = option(None, help="default: that of the task")
    guidance_scale: float | None = option(None, help="1 skips the second forward pass; default: that of the task")
    seed: int | None = option(None, help="default: a random one per image")

    def __post_init__(self) -> None:
        ways = ("prompt", "from_file", "interactive", "latent_path")
        chosen = [f"--{name}" for name in ways if getattr(self, name) not in (None, False, ())]
        if not chosen:
            raise ConfigError(
                "nothing to generate; give --prompt, --from_file, --interactive, --latent_path or --recipe"
            )
        if len(chosen) > 1 and chosen != ["--prompt", "--from_file"]:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one")
        if self.infer_steps is not None and not 1 <= self.infer_steps <= 1000:
            raise ConfigError(f"--infer_steps {self.infer_steps}: must be 1 to 1000")
        if self.video_size is not None and min(self.video_size) < 16:
            raise ConfigError(f"--video_size {' '.join(map(str, self.video_size))}: each side needs 16 pixels")

    @property
    def base(self) -> Prompt:
        """The flags as a prompt; lines go over it."""
        height, width = self.video_size or (None, None)
        return Prompt(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            seed=self.seed,
            sample_steps=self.infer_steps,
            cfg_scale=self.guidance_scale,
            discrete_flow_shift=self.flow_shift,
            image_path=self.image_path,
            end_image_path=self.end_image_path,
            control_image_path=self.control_image_path,
            control_image_mask_path=self.control_image_mask_path,
            one_frame=self.one_frame_inference,
            place="command line",
        )

    def prompts(self) -> list[Prompt]:
        """All prompts that are known beforehand."""
        if self.from_file is None:
            return [] if self.interactive else [self.base]
        return [prompt.over(self.base) for prompt in read_file(self.from_file, "--from_file", training=False)]

    def typed(
        self, task: TaskSpec, sampling: SamplingConfig, trained: TrainedFor, lora: LoRAConfig
    ) -> Iterator[list[SweepImage]]:
        """One picture per line typed at the terminal, until the end of input. A wrong line is reported and skipped."""
        for line in typed_lines("> ", history_file("wan-one-frame")):
            if line.strip():
                try:
                    prompt = parse_line(line, "line", training=False).over(self.base)
                    yield SweepConfig().cells(prompt, task, sampling, trained, lora)
                except ConfigError as error:
                    log.error("%s", error)


@dataclass(frozen=True)
class MergedModelConfig:
    """merging"""

    save_merged_model: Path | None = option(
        None, help="write the DiT with the LoRA files merged to this safetensors file, and do nothing else"
    )

    def __post_init__(self) -> None:
        path = self.save_merged_model
        if path is not None and path.suffix != ".safetensors":
            raise ConfigError(f"--save_merged_model {path}: must end in .safetensors")

    def write(self, dit: DiTConfig, lora: LoRAConfig) -> None:
        """Merge in the dtype of the DiT, on the CPU. Names are the official ones; the metadata name the LoRA files."""
        path = self.save_merged_model
        require_writable_dir(path.parent, "--save_merged_model")
        dit.check()
        merger = lora.merger(dit)
        save_dit(path, dit.load(torch.device("cpu"), merger=merger), {"merged_loras": ", ".join(lora.names)})
        log.info("saved %s", path)
