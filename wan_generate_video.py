"""Generate one-frame images with Wan2.1. Worked examples: docs/one_frame.md"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import cli
from utils.errors import ConfigError
from utils.files import require_writable_dir
from wan.foreign_flags import GENERATION_IGNORED, GENERATION_REFUSED
from wan.frames import table
from wan.generation import explain
from wan.generation.experts import DiTFiles, ModelOnDemand
from wan.generation.explain import forward_tokens
from wan.generation.guidance import GuidanceConfig
from wan.generation.on_demand import AfterUse
from wan.generation.options import MergedModelConfig, PromptConfig, write_merged_model
from wan.generation.outputs import OutputConfig, read_latent, result_stem, save_image
from wan.generation.pipeline import Pipeline
from wan.generation.preview import PreviewConfig
from wan.generation.recipe import Recipe, parse_args
from wan.generation.request import Request, SamplingConfig
from wan.generation.run import Generation
from wan.generation.sweep import SweepConfig
from wan.models.device import DeviceConfig
from wan.models.memory_options import GenerationMemoryConfig
from wan.models.options import AttentionConfig, CLIPConfig, DiTConfig, LoRAConfig, ReleaseConfig, T5Config, VAEConfig
from wan.models.plan import Plan, Room, plan_generation, plan_t5

log = logging.getLogger(__name__)

_TYPED = 2 * 3 * 4096  # tokens of both prompts with three frames of 1024 x 1024: what a typed line may ask for


_MODELS = (
    *(DiTConfig, VAEConfig, T5Config, CLIPConfig, DeviceConfig),
    *(AttentionConfig, LoRAConfig, GenerationMemoryConfig),
)
_OPTIONS = (PromptConfig, SamplingConfig, GuidanceConfig, OutputConfig, SweepConfig, PreviewConfig)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_fields(parser, *_OPTIONS, MergedModelConfig, table.ExplainConfig, ReleaseConfig, *_MODELS)
    cli.refuse(parser, GENERATION_REFUSED)
    cli.ignore(parser, GENERATION_IGNORED)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    files = cli.build(ReleaseConfig, args)
    models = [files.fill(cli.build(section, args)) for section in _MODELS]
    dit, vae, t5, clip, device, attention, lora, memory = models
    device = device.resolve()
    merged = cli.build(MergedModelConfig, args)
    explaining = cli.build(table.ExplainConfig, args).explain
    if explaining and (merged.save_merged_model or args.latent_path or args.interactive):
        raise ConfigError("--explain needs --prompt or --from_file: there are no frames to tell about otherwise")
    if merged.save_merged_model is not None:
        write_merged_model(merged.save_merged_model, dit, lora)
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
    choices = [cell.multipliers for cell in cells] or [lora.lora_multiplier]
    files_of_dit = DiTFiles.checked(dit, lora, attention.function, dict.fromkeys(choices))
    memory.check(dit.spec, dit.stored_dtype, device)
    guidance.check(dit.spec.num_layers)
    requests = [cell.request for cell in cells]
    plan = memory_plan(dit, memory, requests, guidance, device)
    if memory.memory == "auto":
        t5 = plan_t5(t5, device, Room.on(device))
    if explaining:
        print(*explain.explain_generation(requests, task, dit, plan.memory, guidance), sep="\n")
        return

    after_use = AfterUse.KEEP if prompts.interactive else AfterUse.DROP
    pipeline = Pipeline(vae, t5, clip, device, after_use)
    generation = Generation(
        pipeline=pipeline,
        models=(ModelOnDemand(files_of_dit, plan, device, pipeline.stopwatch, after_use),),
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
    for group in prompts.typed(task, sampling, trained, lora):
        try:
            generation.make(group)
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
