"""Generate one-frame images with Wan2.1. Worked examples: docs/one_frame.md"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import cli
from utils.cli import option
from utils.errors import ConfigError
from utils.files import require_writable_dir
from utils.foreign_flags import GENERATION_IGNORED, GENERATION_REFUSED
from utils.prompts import Prompt, parse_line, read_file
from utils.terminal import history_file, typed_lines
from wan import explain
from wan.checkpoint import save_dit
from wan.config import TaskSpec
from wan.dit import WanDiT
from wan.footprint import forward_tokens
from wan.generation import Generation
from wan.guidance import GuidanceConfig
from wan.lora_files import TrainedFor
from wan.memory import GenerationMemoryConfig, prepare_
from wan.memory_plan import Plan, Room, plan_generation, plan_t5
from wan.models import (
    AttentionConfig,
    CLIPConfig,
    DeviceConfig,
    DiTConfig,
    LoRAConfig,
    ReleaseConfig,
    T5Config,
    VAEConfig,
)
from wan.outputs import OutputConfig, read_latent, result_stem, save_image
from wan.pipeline import Pipeline
from wan.preview import PreviewConfig
from wan.recipe import Recipe, parse_args
from wan.request import Request, SamplingConfig
from wan.sweep import Cell, SweepConfig

log = logging.getLogger(__name__)

_TYPED = 2 * 3 * 4096  # tokens of both prompts with three frames of 1024 x 1024: what a typed line may ask for


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
    ) -> Iterator[list[Cell]]:
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


_MODELS = (
    *(DiTConfig, VAEConfig, T5Config, CLIPConfig, DeviceConfig),
    *(AttentionConfig, LoRAConfig, GenerationMemoryConfig),
)
_OPTIONS = (PromptConfig, SamplingConfig, GuidanceConfig, OutputConfig, SweepConfig, PreviewConfig)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, *_OPTIONS, MergedModelConfig, explain.ExplainConfig, ReleaseConfig, *_MODELS)
    cli.refuse(parser, GENERATION_REFUSED)
    cli.ignore(parser, GENERATION_IGNORED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    files = cli.build(ReleaseConfig, args)
    models = [files.fill(cli.build(section, args)) for section in _MODELS]
    dit, vae, t5, clip, device, attention, lora, memory = models
    device = device.torch_device
    merged = cli.build(MergedModelConfig, args)
    explaining = cli.build(explain.ExplainConfig, args).explain
    if explaining and (merged.save_merged_model or args.latent_path or args.interactive):
        raise ConfigError("--explain needs --prompt or --from_file: there are no frames to tell about otherwise")
    if merged.save_merged_model is not None:
        merged.write(dit, lora)
        return
    prompts, sampling, guidance, output, sweep, preview = (cli.build(section, args) for section in _OPTIONS)
    output.log_substitute()
    if sweep.axes and (prompts.interactive or prompts.latent_path or not output.wants_image):
        raise ConfigError("--sweep needs --prompt or --from_file, and images as --output_type")

    # Everything that can be wrong is looked at before any weights load.
    vae.check()
    if not explaining:  # it makes the folder
        require_writable_dir(output.save_path, "--save_path")
    if prompts.latent_path:
        decode_files(prompts.latent_path, Pipeline(vae, t5, clip, device), output, Recipe.of(device, vae))
        return
    task = dit.check()
    trained = lora.trained_for
    cells = [cell for prompt in prompts.prompts() for cell in sweep.cells(prompt, task, sampling, trained, lora)]
    t5.check(dit.spec)
    clip.check(dit.spec)
    used = dict.fromkeys([cell.multipliers for cell in cells] or [lora.lora_multiplier])
    mergers = {multipliers: lora.merger(dit, multipliers) for multipliers in used}
    memory.check(dit.spec, dit.stored_dtype, device)
    guidance.check(dit.spec.num_layers)
    requests = [cell.request for cell in cells]
    plan = memory_plan(dit, memory, requests, guidance, device)
    if memory.memory == "auto":
        t5 = plan_t5(t5, device, Room.on(device))
    if explaining:
        print(*explain.generation(requests, task, dit, plan.memory, guidance), sep="\n")
        return

    def load(multipliers: tuple[float, ...], memory: GenerationMemoryConfig, to: torch.device) -> WanDiT:
        network = dit.load(to, merger=mergers[multipliers], attention=attention.function, memory=memory)
        prepare_(network, memory, to)
        return network

    def merge_again(network: WanDiT, multipliers: tuple[float, ...]) -> None:
        dit.merge_again_(network, device, mergers[multipliers])

    generation = Generation(
        pipeline=Pipeline(vae, t5, clip, device, wanted_again=prompts.interactive),
        load=load,
        merge_again=merge_again,
        plan=plan,
        task=task.name,
        loras=lora.names,
        recipe=Recipe.of(device, *models[:-1], t5, plan.memory, sampling, guidance),  # T5 once more: as planned
        guidance=guidance,
        output=output,
        sweep=sweep,
        preview=preview,
    )
    if not prompts.interactive:
        generation.make(cells)
        return
    kept = generation.resident(lora.lora_multiplier, wanted_again=True)
    for group in prompts.typed(task, sampling, trained, lora):
        try:
            generation.make(group, kept)
        except KeyboardInterrupt:
            log.error("stopped; Ctrl-D ends the program")
        except ConfigError as error:
            log.error("%s", error)


def memory_plan(
    dit: DiTConfig,
    memory: GenerationMemoryConfig,
    requests: Sequence[Request],
    guidance: GuidanceConfig,
    device: torch.device,
) -> Plan:
    """The one choice that there is, or with --memory auto those that fit. Typed prompts may need what `_TYPED` does."""
    if memory.memory == "manual":
        return Plan.of(memory)
    tokens = max([forward_tokens(request, guidance) for request in requests], default=_TYPED)
    plan = plan_generation(dit, dit.dtype, memory, tokens, Room.on(device))
    log.info("memory: %s", plan)
    return plan


def decode_files(paths: tuple[Path, ...], pipeline: Pipeline, output: OutputConfig, common: Recipe) -> None:
    """Latent files -> PNG files."""
    if output.wants_latent:
        raise ConfigError(f"--output_type {output.output_type}: --latent_path only makes images; use images")
    latents = [read_latent(path) for path in paths]
    for path, (latent, seed) in zip(paths, latents, strict=True):
        recipe = None if output.no_metadata else common.adding({"latent_path": [path.as_posix()]})
        save_image(output.save_path, f"{result_stem(seed)}_{path.stem}", pipeline.decode(latent), recipe)


if __name__ == "__main__":
    cli.run(main)
