"""The start of a training run: processes and devices, seed, state, the model with its LoRA, optimizer."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch.nn.parallel import DistributedDataParallel

from utils.errors import ConfigError
from utils.files import held
from utils.randomness import seeded
from utils.text import one_line
from wan.lora.files import LoRAFile, read_lora
from wan.lora.merge import Merger
from wan.lora.network import LoRANetwork, inject_lora_
from wan.lora.options import NetworkConfig
from wan.models.checkpoints import DiTCheckpoint
from wan.models.device import DeviceConfig, Processes, check_launcher
from wan.models.memory_options import apply_memory_options_
from wan.models.options import build_merger
from wan.nets.attention import Attention
from wan.nets.dit import WanDiT
from wan.training.job import TrainingJob
from wan.training.optimizers import OptimizerConfig, build_optimizer, build_scheduler, optimizer_class, remembered
from wan.training.options import SaveConfig, TrainingOptions
from wan.training.state import State, check_optimizer, load_state, newest_state, restore_replaced
from wan.training.step import TrainingStep
from wan.training.validation import Validator, validate

log = logging.getLogger(__name__)


def network_start(
    dit_file: DiTCheckpoint, options: TrainingOptions, state: State | None, total_steps: int
) -> tuple[LoRAFile | None, WanDiT, LoRANetwork]:
    """The file of --network_weights, and a model without weights that carries the network.

    Network, file and state are tried on that model. Raises ConfigError when they don't fit together.
    """
    settings = options.network
    weights = read_lora(settings.network_weights, "--network_weights") if settings.network_weights else None
    with torch.device("meta"):
        dit = WanDiT(dit_file.spec)
        network = inject_lora_(dit, settings, weights=weights)
        if state is not None:
            network.load_state_dict(state.weights, f"--resume {state.path}")
    if state is not None:
        _check_resumed_optimizer(state, options, network, total_steps)
    return weights, dit, network


def _check_resumed_optimizer(state: State, options: TrainingOptions, network: LoRANetwork, total_steps: int) -> None:
    config = options.optimizer
    groups = network.param_groups(config.learning_rate, options.network.loraplus_lr_ratio)
    optimizer = build_optimizer(config, groups)
    check_optimizer(state, optimizer, build_scheduler(config, optimizer, total_steps), remembered(config))


def load_trainable(
    dit_file: DiTCheckpoint,
    options: TrainingOptions,
    device: torch.device,
    seed: int,
    merger: Merger | None,
    weights: LoRAFile | None,
    attention: Attention,
) -> tuple[WanDiT, LoRANetwork]:
    """The DiT with LoRA layers, of which nothing else is trained.

    merger: LoRA files to merge beforehand; weights: the one to start from. Under FSDP2 all stays in host memory.
    """
    if AcceleratorState().is_fsdp2:
        _check_sharding(options)
        device = torch.device("cpu")  # from where each block is shared out on its own: no GPU has to hold all of them
    dit = dit_file.load(device, options.run.compute_dtype(dit_file), merger, attention, options.memory)
    network = inject_lora_(dit, options.network, weights=weights, device=device, generator=seeded(seed, "lora"))
    apply_memory_options_(dit, options.memory, device)
    return dit, network


def build_step(accelerator: Accelerator, job: TrainingJob, total_steps: int) -> TrainingStep:
    """The optimizer step over the job's DiT, which accelerate wraps for the processes that there are."""
    options = job.options
    groups = job.network.param_groups(options.optimizer.learning_rate, options.network.loraplus_lr_ratio)
    optimizer = build_optimizer(options.optimizer, groups)
    scheduler = build_scheduler(options.optimizer, optimizer, total_steps)
    # All processes read the same file: only what is trained is worth sending around at the start.
    frozen = [name for name, parameter in job.dit.named_parameters() if not parameter.requires_grad]
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(job.dit, frozen)  # type: ignore[no-untyped-call] # torch does not annotate it
    model, optimizer = accelerator.prepare(job.dit, optimizer)
    seed = job.training_set.seed
    return TrainingStep(accelerator, model, job.network, optimizer, scheduler, job.task, options, seed)


def build_validator(accelerator: Accelerator, job: TrainingJob, step: TrainingStep) -> Validator | None:
    """The `Validator` of the items held back; None unless the options ask for one."""
    validation = job.options.validation
    if not validation.wanted:
        return None
    measure = partial(
        validate,
        step.batch_loss,
        job.training_set.validation,
        validation.levels,
        job.training_set.seed,
        accelerator.device,
        Processes(accelerator.process_index, accelerator.num_processes),
        accelerator.reduce,
    )
    return Validator(job.dit, job.network.disabled, measure)


def _check_sharding(options: TrainingOptions) -> None:
    if options.memory.blocks_to_swap:
        raise ConfigError(
            f"--blocks_to_swap {options.memory.blocks_to_swap}: can't be combined with FSDP2, which shards the blocks; "
            "leave it out, or set fsdp_offload_params: true in accelerate's file"
        )
    name = options.optimizer.optimizer_type
    if not optimizer_class(name).__module__.startswith("torch.optim"):
        raise ConfigError(f"--optimizer_type {name}: FSDP2 takes the optimizers of torch.optim; use AdamW")


def base_merger(dit_file: DiTCheckpoint, settings: NetworkConfig) -> Merger | None:
    """The LoRA files that training starts on top of, read and checked."""
    files = [read_lora(path, "--base_weights") for path in settings.base_weights]
    return build_merger(
        files, settings.base_weights_multiplier, dit_file, "--base_weights", "--base_weights_multiplier"
    )


@contextmanager
def sole_run(save: SaveConfig, processes: Processes) -> Iterator[None]:
    """The block is the only run that writes files of this name; its folder is as a run left it that was not killed.

    Raises ConfigError, in all processes, while there is another.
    """
    lock = save.output_dir / f"{save.output_name}.lock"
    with ExitStack() as stack:
        failure: Exception | None = None
        if processes.is_main:
            try:
                stack.enter_context(held(lock))
                restore_replaced(save.output_dir, save.output_name)
                if save.resume not in (None, "auto"):
                    restore_replaced(Path(save.resume).parent, Path(save.resume).name)
            except BlockingIOError:
                failure = ConfigError(
                    f"--output_name {save.output_name}: another training writes its files to {save.output_dir} "
                    "just now; wait for its end, or choose another name or folder"
                )
            except OSError as error:
                failure = error
        processes.raise_anywhere(failure)
        yield


def find_state(save: SaveConfig, optimizer: OptimizerConfig) -> State | None:
    """The state that `--resume` names; None without the flag, and for `auto` in a folder that has none yet.

    Raises ConfigError when it can't be read, for `auto` when none can, and when it is of another kind of optimizer.
    """
    if save.resume is None:
        return None
    state = load_state(Path(save.resume)) if save.resume != "auto" else newest_state(save.output_dir, save.output_name)
    if state is None:
        log.info("--resume auto: no state of %s in %s; starting anew", save.output_name, save.output_dir)
        return None
    then, now = state.facts.get("optimizer_type"), optimizer.optimizer_type
    if isinstance(then, str) and (then.rpartition(".")[2] or "AdamW").lower() != optimizer_class(now).__name__.lower():
        raise ConfigError(
            f"--resume {state.path}: is a state of {one_line(then)}, which {now} can't go on from; give "
            f"--optimizer_type {one_line(then)}, or begin from its LoRA by --network_weights without --resume"
        )
    return state


def build_accelerator(config: DeviceConfig) -> Accelerator:
    """Processes and devices as `accelerate launch` or plain `python` set them up; `--device cpu` forces the CPU."""
    config.resolve()
    device = config.device
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device}: training takes cpu or cuda; choose GPUs by CUDA_VISIBLE_DEVICES")
    check_launcher()
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        log.warning("dynamo_backend %s of accelerate is not used; --compile compiles the model", backend)
    # Both are given, because accelerate would take them from its environment
    alone = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(
        mixed_precision="no", cpu=device == "cpu", dynamo_backend="no", gradient_accumulation_plugin=alone
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        raise ConfigError(f"accelerate is set to {kind.value}, which is not supported; use docs/accelerate_ddp.yaml")
    return accelerator


def shared_seed(seed: int | None, state: State | None) -> int:
    """Seed of the run: that of the state, else the one given, else a random one that all processes agree on."""
    if state is not None:
        own = int(state.facts["seed"])
        if seed not in (None, own):
            log.warning("--seed %d: the resumed run goes on with its own seed, %d", seed, own)
        return own
    return seed if seed is not None else int(broadcast_object_list([random.SystemRandom().randrange(1 << 31)])[0])
