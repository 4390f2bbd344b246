"""A generation run from its settings to its files: checks first, then the models, then picture by picture."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from utils.errors import ConfigError
from utils.files import require_name, require_writable_dir
from wan.generation.experts import DiTFiles, ModelOnDemand
from wan.generation.explain import explain_generation, forward_tokens
from wan.generation.guidance import GuidanceConfig
from wan.generation.on_demand import AfterUse
from wan.generation.options import PromptConfig
from wan.generation.outputs import OutputConfig, read_latent, result_stem, save_image
from wan.generation.pipeline import Pipeline, decode_latents
from wan.generation.preview import PreviewConfig
from wan.generation.recipe import Recipe
from wan.generation.request import SamplingConfig
from wan.generation.run import Generation
from wan.generation.sweep import SweepConfig, SweepImage
from wan.lora.trained_for import TrainedFor
from wan.models.checkpoints import CLIPCheckpoint, DiTCheckpoint, T5Checkpoint, VAECheckpoint
from wan.models.device import DeviceConfig
from wan.models.memory_options import GenerationMemoryConfig
from wan.models.options import AttentionConfig, CLIPConfig, DiTConfig, LoRAConfig, T5Config, VAEConfig
from wan.models.plan import Plan, Room, chosen_plan, plan_generation, plan_t5

log = logging.getLogger(__name__)

_TYPED = 2 * 3 * 4096  # tokens of both prompts with three frames of 1024 x 1024: what a typed line may ask for


@dataclass(frozen=True)
class GenerationOptions:
    """The sections of a run that are not about its model files."""

    prompts: PromptConfig
    sampling: SamplingConfig
    guidance: GuidanceConfig
    output: OutputConfig
    sweep: SweepConfig
    preview: PreviewConfig

    def __post_init__(self) -> None:
        prompts = self.prompts
        if self.sweep.axes and (prompts.interactive or prompts.latent_path or not self.output.wants_image):
            raise ConfigError("--sweep needs --prompt or --from_file, and images as --output_type")


@dataclass(frozen=True)
class GenerationModels:
    """The model files of a run, and how and where they run."""

    dit: DiTConfig
    vae: VAEConfig
    t5: T5Config
    clip: CLIPConfig
    device: DeviceConfig
    attention: AttentionConfig
    lora: LoRAConfig
    memory: GenerationMemoryConfig


@dataclass(frozen=True)
class _Job:
    """The pictures that are known beforehand, and the files that they are made with; all of it checked."""

    device: torch.device
    dit: DiTCheckpoint
    vae: VAECheckpoint
    t5: T5Checkpoint
    clip: CLIPCheckpoint
    merged: DiTFiles
    trained: TrainedFor
    pictures: list[SweepImage]
    plan: Plan[GenerationMemoryConfig]


def run(models: GenerationModels, options: GenerationOptions) -> None:
    """Make all pictures. Whatever can be wrong raises ConfigError before weights load."""
    job = _check(models, options)
    require_writable_dir(options.output.save_path, "--save_path")
    _check_names(job.pictures, options.output)
    generation = _generation(job, models, options)
    if options.prompts.interactive:
        _make_typed(generation, job, models, options)
    else:
        generation.make(job.pictures)


def _check_names(pictures: Sequence[SweepImage], output: OutputConfig) -> None:
    """Raise ConfigError unless the longest name of a picture's files can be written."""
    ending = "_latent.safetensors" if output.wants_latent else "_preview.png"
    longest = max(pictures, key=lambda picture: len(os.fsencode(picture.suffix)), default=None)
    if longest is not None:
        name = f"{result_stem(longest.request.seed)}{longest.suffix}{ending}"
        flag = "--image_folder" if longest.name else "--sweep" if longest.labels else "--save_path"
        require_name(output.save_path / name, f"{flag}: {name}")


def explain(models: GenerationModels, options: GenerationOptions) -> None:
    """Print what `run` would do with these options, after the checks that it makes too. Writes nothing."""
    job = _check(models, options)
    requests = [picture.request for picture in job.pictures]
    print(*explain_generation(requests, job.dit, job.plan.memory, options.guidance), sep="\n")


def decode_files(models: GenerationModels, options: GenerationOptions) -> None:
    """Decode the latent files of `--latent_path` to PNG files."""
    output, paths = options.output, options.prompts.latent_path
    output.log_substitute()
    device, vae = models.device.resolve(), models.vae.resolve()
    require_writable_dir(output.save_path, "--save_path")
    if output.wants_latent:
        raise ConfigError(f"--output_type {output.output_type}: --latent_path only makes images; use images")
    latents = [read_latent(path) for path in paths]
    common, model = Recipe.of(device, models.vae), vae.load(device)
    for path, (latent, seed) in zip(paths, latents, strict=True):
        recipe = None if output.no_metadata else common.adding({"latent_path": [path.as_posix()]})
        save_image(output.save_path, f"{result_stem(seed)}_{path.stem}", decode_latents(model, latent, device), recipe)


def _check(models: GenerationModels, options: GenerationOptions) -> _Job:
    """The job of these settings, after a look at everything that can be wrong with them; no weights are read."""
    options.output.log_substitute()
    device, lora, memory = models.device.resolve(), models.lora, models.memory
    vae, dit = models.vae.resolve(), models.dit.resolve()
    trained = lora.trained_for
    pictures = [
        picture
        for prompt in options.prompts.prompts()
        for picture in options.sweep.cells(prompt, dit.task, options.sampling, trained, lora)
    ]
    t5, clip = models.t5.resolve(dit.spec), models.clip.resolve(dit.spec)
    choices = [picture.multipliers for picture in pictures] or [lora.lora_multiplier]
    merged = DiTFiles.checked(dit, lora, models.attention.function, dict.fromkeys(choices))
    memory.check(dit.spec, dit.stored_dtype, device)
    options.guidance.check(dit.spec.num_layers)
    tokens = [forward_tokens(picture.request, options.guidance) for picture in pictures]
    room = Room.on(device)
    longest = max(tokens, default=_TYPED)
    plan = chosen_plan(memory, room, lambda room: plan_generation(dit, dit.dtype, memory, longest, room))
    if memory.is_planned:
        t5 = plan_t5(t5, device, room)
    return _Job(device, dit, vae, t5, clip, merged, trained, pictures, plan)


def _generation(job: _Job, models: GenerationModels, options: GenerationOptions) -> Generation:
    after_use = AfterUse.KEEP if options.prompts.interactive else AfterUse.DROP
    pipeline = Pipeline(job.vae, job.t5, job.clip, job.device, after_use)
    planned = replace(models, t5=replace(models.t5, fp8_t5=job.t5.fp8), memory=job.plan.memory)
    return Generation(
        pipeline=pipeline,
        models=(ModelOnDemand(job.merged, job.plan, job.device, pipeline.stopwatch, after_use),),
        plan=job.plan,
        task=job.dit.task.name,
        loras=models.lora.names,
        recipe=Recipe.of(job.device, planned, options.sampling, options.guidance),
        guidance=options.guidance,
        output=options.output,
        sweep=options.sweep,
        preview=options.preview,
    )


def _make_typed(generation: Generation, job: _Job, models: GenerationModels, options: GenerationOptions) -> None:
    """A picture per line typed at the terminal; Ctrl-C and a mistake end no more than the picture."""
    for pictures in options.prompts.typed(job.dit.task, options.sampling, job.trained, models.lora):
        try:
            generation.make(pictures)
        except KeyboardInterrupt:
            log.error("stopped; Ctrl-D ends the program")
        except ConfigError as error:
            log.error("%s", error)
