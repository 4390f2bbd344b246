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
from wan.generation.explain import forward_tokens
from wan.generation.guidance import GuidanceConfig
from wan.generation.options import MergedModelConfig, PromptConfig
from wan.generation.outputs import OutputConfig, read_latent, result_stem, save_image
from wan.generation.pipeline import Pipeline
from wan.generation.preview import PreviewConfig
from wan.generation.recipe import Recipe, parse_args
from wan.generation.request import Request, SamplingConfig
from wan.generation.run import Generation
from wan.generation.sweep import SweepConfig
from wan.models.device import DeviceConfig
from wan.models.memory_options import GenerationMemoryConfig, apply_memory_options_
from wan.models.options import AttentionConfig, CLIPConfig, DiTConfig, LoRAConfig, ReleaseConfig, T5Config, VAEConfig
from wan.models.plan import Plan, Room, plan_generation, plan_t5
from wan.nets.dit import WanDiT

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
        print(*explain.explain_generation(requests, task, dit, plan.memory, guidance), sep="\n")
        return

    def load(multipliers: tuple[float, ...], memory: GenerationMemoryConfig, to: torch.device) -> WanDiT:
        network = dit.load(to, merger=mergers[multipliers], attention=attention.function, memory=memory)
        apply_memory_options_(network, memory, to)
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
    kept = generation.loaded_on_demand(lora.lora_multiplier, wanted_again=True)
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
