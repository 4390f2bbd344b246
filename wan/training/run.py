"""A training run from its settings to its files: checks first, then encoders, DiT and LoRA, then the loop."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from dataset.config import DatasetsConfig, read_config
from dataset.freshness import require_fresh
from dataset.loader import TrainingSet
from utils import cli
from utils.errors import ConfigError
from utils.files import remove_leftovers, require_name, require_writable_dir, written_whole
from utils.logs import quiet_unless
from utils.randomness import seeded
from wan.generation.pipeline import Pipeline
from wan.generation.request import Request
from wan.lora.files import LoRAFile
from wan.models.checkpoints import CLIPCheckpoint, DiTCheckpoint, T5Checkpoint, VAECheckpoint
from wan.models.device import Processes
from wan.models.memory_options import TrainingMemoryConfig
from wan.models.plan import UNLIMITED, Plan, Room, chosen_plan, plan_t5, plan_training
from wan.nets.spec import VAE_STRIDE
from wan.training import loop, start
from wan.training.job import RunLength, TrainingJob
from wan.training.options import TrainingModels, TrainingOptions
from wan.training.samples import Sampler
from wan.training.state import State, remove_leftovers_of
from wan.training.summary import RunSummary, explain_training
from wan.training.timestep_plot import show
from wan.training.tracking import Tracker

log = logging.getLogger(__name__)

_LONGEST_ENDING = "_000100_00_20260101000000_4294967295_000.png"  # of the names of a run, that of a sample


@dataclass(frozen=True)
class _Samples:
    """The pictures to make while training, and the models that they take beside the DiT."""

    requests: list[Request]
    vae: VAECheckpoint
    t5: T5Checkpoint
    clip: CLIPCheckpoint


def run(models: TrainingModels, options: TrainingOptions) -> None:
    """Train. Whatever can be wrong raises ConfigError before weights load."""
    save = options.save
    datasets = read_config(
        options.run.dataset_config, layout=options.sampling.one_frame_layout, alpha=options.sampling.alpha
    )
    require_writable_dir(save.output_dir, "--output_dir")
    require_name(save.output_dir / f"{save.output_name}{_LONGEST_ENDING}", f"--output_name {save.output_name}")
    dit_file, samples = _check(models, options, datasets)
    accelerator = start.build_accelerator(models.device)
    quiet_unless(accelerator.is_main_process)
    options.memory.check(dit_file.spec, dit_file.stored_dtype, accelerator.device)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    with start.sole_run(save, processes):
        _run(models, options, datasets, dit_file, samples, accelerator)


def _run(
    models: TrainingModels,
    options: TrainingOptions,
    datasets: DatasetsConfig,
    dit_file: DiTCheckpoint,
    samples: _Samples | None,
    accelerator: Accelerator,
) -> None:
    save = options.save
    state = start.find_state(save, options.optimizer)
    start.require_new(save, state)
    seed = start.shared_seed(options.run.seed, state)
    training_set = _training_set(datasets, options, seed, dit_file)
    length = RunLength.of(options.run, training_set, accelerator.num_processes, state.progress if state else None)
    options.optimizer.check_schedule(length.total_steps)
    merger = start.base_merger(dit_file, options.network)
    weights, dit, network = start.network_start(dit_file, options, state, length.total_steps)
    session_id = random.SystemRandom().getrandbits(32)
    job = TrainingJob(
        session_id, dit_file.task, models, options, datasets, training_set, dit, network, None, Tracker(None, [])
    )
    RunSummary(job, length, accelerator.num_processes).rehearse()
    if accelerator.is_main_process:
        remove_leftovers_of(save.output_dir, save.output_name)
        _write_settings(models, options)
    step = state.progress.step if state else 0
    settings = cli.values(models, options)
    plan = _plan(dit_file, options, training_set, weights, accelerator)
    with Tracker.open(
        options.tracking, save.output_dir, save.output_name, settings, step, main=accelerator.is_main_process
    ) as tracker:
        sampler = _sampler(samples, options, accelerator) if samples else None

        def train(options: TrainingOptions, state: State | None) -> None:
            dit, network = start.load_trainable(
                dit_file, options, accelerator.device, seed, merger, weights, models.attention.function
            )
            loaded = replace(job, options=options, dit=dit, network=network, sampler=sampler, tracker=tracker)
            loop.Trainer(accelerator, loaded, state).run()

        _train_within(plan, train, options, state, accelerator)


def _train_within(
    plan: Plan[TrainingMemoryConfig],
    train: Callable[[TrainingOptions, State | None], None],
    options: TrainingOptions,
    state: State | None,
    accelerator: Accelerator,
) -> None:
    """`train`, and when memory runs out go on from the last step with the plan's next choice."""
    done = False
    while not done:
        try:
            train(replace(options, memory=plan.memory), state)
            done = True
        except loop.MemoryRanOut as error:
            if accelerator.num_processes > 1 or not plan.step_down():
                raise error.cause from None
            state = error.state or state
        accelerator.free_memory()


def explain(models: TrainingModels, options: TrainingOptions) -> None:
    """Print what `run` would do with these options, after the checks that it makes too. Writes nothing."""
    datasets = read_config(
        options.run.dataset_config, layout=options.sampling.one_frame_layout, alpha=options.sampling.alpha
    )
    dit_file, _ = _check(models, options, datasets)
    accelerator = start.build_accelerator(models.device)
    options.memory.check(dit_file.spec, dit_file.stored_dtype, accelerator.device)
    state = start.find_state(options.save, options.optimizer)
    try:
        start.require_new(options.save, state)
    except ConfigError as error:
        log.warning("a run would stop: %s", error)
    training_set = _training_set(datasets, options, options.run.seed or 0, dit_file)
    length = RunLength.of(options.run, training_set, accelerator.num_processes, state.progress if state else None)
    options.optimizer.check_schedule(length.total_steps)
    start.base_merger(dit_file, options.network)
    weights, *_ = start.network_start(dit_file, options, state, length.total_steps)
    options = replace(options, memory=_plan(dit_file, options, training_set, weights, accelerator).memory)
    if accelerator.is_main_process:
        lines = explain_training(options, dit_file, training_set, weights, accelerator.num_processes)
        print(*lines, sep="\n")


def show_timesteps(options: TrainingOptions, mode: str) -> None:
    """Draw the noise levels that a run with these options would train at."""
    options.noise.check()
    width, height = read_config(options.run.dataset_config).datasets[0].resolution
    folder = require_writable_dir(options.save.output_dir, "--output_dir")
    show(
        options.noise,
        (height // VAE_STRIDE, width // VAE_STRIDE),
        mode,
        folder / f"{options.save.output_name}-timesteps.png",
    )


def _check(
    models: TrainingModels, options: TrainingOptions, datasets: DatasetsConfig
) -> tuple[DiTCheckpoint, _Samples | None]:
    """The DiT, and the samples if there are any; headers of all files that will be needed have been looked at."""
    dit = models.dit.resolve()
    options.run.compute_dtype(dit)
    options.network.check()
    options.optimizer.check(models.device.is_cpu)
    options.noise.check()
    options.tracking.check()
    sampling = options.sampling.like(datasets.layout_name, datasets.control_sizes, datasets.alpha)
    requests = options.samples.requests(dit.task, sampling)
    if not requests:
        return dit, None
    t5, clip = models.t5.resolve(dit.spec), models.clip.resolve(dit.spec)
    return dit, _Samples(requests, models.vae.resolve(), t5, clip)


def _training_set(datasets: DatasetsConfig, options: TrainingOptions, seed: int, dit: DiTCheckpoint) -> TrainingSet:
    if not options.run.use_stale_caches:
        require_fresh(datasets)
    split = options.validation.validation_split
    training_set = TrainingSet(datasets, seed, options.noise.num_timestep_buckets, split)
    training_set.check_widths(clip=dit.spec.image_dim, text=dit.spec.text_dim)
    if options.run.target_range is not None:
        for layout in training_set.layouts:
            try:
                layout.with_random_target(options.run.target_range, seeded(seed, "trial"))
            except ConfigError as error:
                raise ConfigError(f"--one_frame_target_range {options.run.one_frame_target_range}: {error}") from None
    options.validation.check(training_set.validation)
    return training_set


def _plan(
    dit: DiTCheckpoint,
    options: TrainingOptions,
    training_set: TrainingSet,
    weights: LoRAFile | None,
    accelerator: Accelerator,
) -> Plan[TrainingMemoryConfig]:
    """The memory options; with FSDP2, which shards the blocks, none are chosen unless that is asked for."""
    memory, network, buckets = options.memory, options.network, training_set.buckets
    dtype = options.run.compute_dtype(dit)
    room = UNLIMITED if memory.memory is None and accelerator.is_fsdp2 else Room.on(torch.device(accelerator.device))
    return chosen_plan(memory, room, lambda room: plan_training(dit, dtype, memory, network, weights, buckets, room))


def _sampler(samples: _Samples, options: TrainingOptions, accelerator: Accelerator) -> Sampler:
    device, t5 = torch.device(accelerator.device), samples.t5
    if options.memory.is_planned:
        t5 = plan_t5(t5, device, Room.on(device))
    pipeline = Pipeline(samples.vae, t5, samples.clip, device)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    folder = options.save.output_dir / "sample"
    remove_leftovers(folder)
    return Sampler(samples.requests, pipeline, folder, options.save.output_name, processes, options.preview.preview)


def _write_settings(models: TrainingModels, options: TrainingOptions) -> None:
    """`<output_name>-settings.toml`, which --config_file reads: the settings of this run without its keys."""
    tracking = replace(options.tracking, wandb_api_key=None)
    text = cli.to_toml(models, replace(options, tracking=tracking))
    with written_whole(options.save.output_dir / f"{options.save.output_name}-settings.toml") as temporary:
        temporary.write_text(text, encoding="utf-8")
