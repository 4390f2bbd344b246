"""Options that make a DiT fit into less memory or run faster. Each wraps the finished model from outside.

`apply_memory_options_` applies them, and shows the order; only fp8 comes earlier, because weights are quantised while
they load.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch

from utils.errors import ConfigError, suggest
from utils.options import Section, option
from wan.fused.dit import can_fuse, fuse_
from wan.fused.graphs import graph_passes_
from wan.memory.block_swap import swap_blocks_
from wan.memory.fp8 import FP8Kind
from wan.memory.recompute import recompute_blocks_
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

log = logging.getLogger(__name__)

_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# CUDA graphs write each block's output into the same memory, which the next block and the backward pass still need
_WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_DYNAMIC = {"true": True, "false": False, "auto": None, None: None}
_FP8_PRODUCTS = (8, 9)  # the compute capability from which GPUs multiply float8_e4m3fn
_FP8_IN_TRITON = (8, 9)  # the compute capability from which Triton, which inductor compiles to, knows float8_e4m3fn


@dataclass(frozen=True)
class MemoryConfig(Section):
    """memory and speed"""

    memory: str | None = option(
        None,
        help="auto: choose fp8, swapped and recomputed blocks by the free memory, and again when it runs out; default: "
        "auto unless one of these options is given, or manual",
        choices=("manual", "auto"),
    )
    fp8_scaled: bool = option(False, help="keep the weights of the blocks in fp8 with a scale per 64 columns")
    blocks_to_swap: int = option(
        0, help="DiT blocks whose weights wait in host memory until they are needed", minimum=0
    )
    use_pinned_memory_for_block_swap: bool = option(
        False, help="page-locked host memory for swapped blocks: faster copies"
    )
    compile: bool = option(False, help="torch.compile each block")
    compile_backend: str = option("inductor", help="compiler of --compile")
    compile_mode: str = option("default", help="what inductor optimises for", choices=_COMPILE_MODES)
    compile_dynamic: str | None = option(None, help="one program for all sizes", choices=("true", "false", "auto"))
    compile_fullgraph: bool = option(False, help="raise an error where a block does not compile as a whole")
    compile_cache_size_limit: int = option(
        32, help="programs kept: training and samples need some for each size", minimum=1
    )
    dit_backend: str = option(
        "auto",
        help="fused: few passes over memory, by Triton on CUDA; auto: fused where it runs, but plain with --compile",
        choices=("auto", "plain", "fused"),
    )
    cuda_allow_tf32: bool = option(False, help="multiply float32 matrices in TF32 on CUDA: faster, 10 bits of mantissa")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN try its convolutions and keep the fastest")

    chosen_by_plan: ClassVar[tuple[str, ...]] = ("fp8_scaled", "blocks_to_swap", "use_pinned_memory_for_block_swap")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory == "auto" and self._by_hand:
            raise ConfigError(f"--{self._by_hand[0]}: --memory auto chooses it; leave one of them out")
        if self.compile_mode != "default" and self.compile_backend != "inductor":
            raise ConfigError(
                f"--compile_mode {self.compile_mode}: only inductor has modes; leave out --compile_backend"
            )
        if self.compile and self.dit_backend == "fused":
            raise ConfigError("--compile: compiles plain operations only; leave it or --dit_backend fused out")

    @property
    def is_planned(self) -> bool:
        """Whether the options of `chosen_by_plan` are chosen by the memory that is free."""
        return self.memory == "auto" or (self.memory is None and not self._by_hand)

    @property
    def _by_hand(self) -> list[str]:
        return [name for name in self.chosen_by_plan if getattr(self, name) != getattr(type(self), name)]

    @property
    def fp8_kind(self) -> FP8Kind | None:
        """How the weights of the blocks are kept in fp8, if at all."""
        return "scaled" if self.fp8_scaled else None

    @property
    def recomputed(self) -> str:
        """Blocks whose activations are recomputed in backward: "all", "none", or with "auto" as many as do not fit."""
        return "none"

    @property
    def offloads_activations(self) -> bool:
        """Whether the inputs of recomputed blocks wait in host memory."""
        return False

    def fuses(self, device: torch.device) -> bool:
        """Whether a DiT on `device` computes with fused operations."""
        return self.dit_backend == "fused" or (self.dit_backend == "auto" and not self.compile and can_fuse(device))

    def records(self, device: torch.device) -> bool:
        """Whether CUDA graphs replay the kernels. Copies of swapped blocks or offloaded tensors can't be captured."""
        moves = self.blocks_to_swap or self.offloads_activations
        return device.type == "cuda" and self.fuses(device) and not moves

    def check(self, spec: DiTSpec, stored: torch.dtype, device: torch.device) -> None:
        """Raise ConfigError when the DiT file, stored in this dtype, or the device does not allow an option."""
        if self.blocks_to_swap >= spec.num_layers:
            raise ConfigError(
                f"--blocks_to_swap {self.blocks_to_swap}: the DiT has {spec.num_layers} blocks; "
                f"use at most {spec.num_layers - 1}"
            )
        if self.fp8_scaled and stored.itemsize == 1:
            raise ConfigError("--fp8_scaled: the file of --dit is already in fp8; leave it out or use a bf16 file")
        if self.fuses(device) and not can_fuse(device):
            raise ConfigError(
                "--dit_backend fused needs a CUDA GPU of 2020 or later and the package triton "
                "(triton-windows on Windows); use auto"
            )
        if self.compile:
            self._check_compiler(device)

    def _check_compiler(self, device: torch.device) -> None:
        from torch._dynamo import list_backends  # importing it takes seconds

        backends = list_backends(exclude_tags=())
        if self.compile_backend not in backends:
            hint = suggest(self.compile_backend, backends) or "; use inductor"
            raise ConfigError(f"--compile_backend {self.compile_backend}: unknown{hint}")
        if self.compile_backend == "inductor" and device.type == "cuda":
            if find_spec("triton") is None:
                raise ConfigError("--compile needs the package triton (triton-windows on Windows); install it")
            if self.fp8_kind and torch.cuda.get_device_capability(device) < _FP8_IN_TRITON:
                raise ConfigError("--compile: this GPU's compiler does not know fp8; leave out --compile or fp8")


@dataclass(frozen=True)
class TrainingMemoryConfig(MemoryConfig):
    """memory and speed"""

    chosen_by_plan: ClassVar[tuple[str, ...]] = (
        "fp8_base",
        *MemoryConfig.chosen_by_plan,
        "gradient_checkpointing",
        "gradient_checkpointing_cpu_offload",
    )

    gradient_checkpointing: str = option(
        "none",
        help="save memory by computing activations again in the backward pass: in all blocks (all, or the flag without "
        "a value), or only in as many as the free memory makes necessary (auto)",
        choices=("auto", "all", "none"),
        nargs="?",
        const="all",
    )
    gradient_checkpointing_cpu_offload: bool = option(
        False, help="keep the inputs of recomputed blocks in host memory", needs="--gradient_checkpointing; give both"
    )
    fp8_base: bool = option(False, help="keep the weights of the blocks in fp8: a plain cast without --fp8_scaled")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8_scaled and not self.fp8_base:
            raise ConfigError("--fp8_scaled needs --fp8_base; give both")
        if self.blocks_to_swap and self.gradient_checkpointing == "auto":
            raise ConfigError("--gradient_checkpointing auto: can't be combined with --blocks_to_swap; use all")

    @property
    def recomputed(self) -> str:
        return self.gradient_checkpointing

    @property
    def offloads_activations(self) -> bool:
        return self.gradient_checkpointing_cpu_offload

    @property
    def fp8_kind(self) -> FP8Kind | None:
        return super().fp8_kind or ("cast" if self.fp8_base else None)


@dataclass(frozen=True)
class GenerationMemoryConfig(MemoryConfig):
    """memory and speed"""

    chosen_by_plan: ClassVar[tuple[str, ...]] = ("fp8", *MemoryConfig.chosen_by_plan, "fp8_fast")

    fp8: bool = option(False, help="keep the weights of the blocks in fp8: a plain cast without --fp8_scaled")
    fp8_fast: bool = option(
        False, help="multiply in fp8, weights and inputs with a scale per row, in all blocks but the first and the last"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8_fast and self.blocks_to_swap:
            raise ConfigError(
                "--fp8_fast: can't be combined with --blocks_to_swap, whose blocks have to be alike; leave one"
            )

    @property
    def fp8_kind(self) -> FP8Kind | None:
        return "rows" if self.fp8_fast else super().fp8_kind or ("cast" if self.fp8 else None)

    def check(self, spec: DiTSpec, stored: torch.dtype, device: torch.device) -> None:
        super().check(spec, stored, device)
        if self.fp8_fast and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_PRODUCTS:
            raise ConfigError("--fp8_fast: this GPU does not multiply in fp8 (Ada, Hopper and later do); leave it out")


def apply_memory_options_(dit: WanDiT, config: MemoryConfig, device: torch.device) -> None:
    """Apply the options to a loaded DiT, which carries its LoRA layers when it is to be trained.

    From the inside out: a block is fused or compiled; its weights are fetched around that; all of that is recomputed in
    the backward pass. Each step wraps the runner that it finds: `dit.runner`, of fused operations and graphs also
    `dit.pass_runner`.
    """
    if config.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if config.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if config.fuses(device):
        fuse_(dit, device, swapped=config.blocks_to_swap)
    if config.records(device):
        graph_passes_(dit)
    if config.compile:
        compile_blocks_(dit, config)
    if config.blocks_to_swap:
        pinned, recomputed = config.use_pinned_memory_for_block_swap, config.recomputed != "none"
        swap_blocks_(dit, config.blocks_to_swap, device, pinned, recomputed)
    if config.recomputed != "none":
        recompute_blocks_(dit, config.offloads_activations, config.recomputed == "auto")


def compile_blocks_(dit: WanDiT, config: MemoryConfig) -> None:
    """Compile the runner of the blocks, on its first call and anew for each kind of input.

    The blocks are alike, so that all of them run the program of the first.
    """
    mode = _WITHOUT_CUDA_GRAPHS.get(config.compile_mode, config.compile_mode)
    if mode != config.compile_mode:
        log.warning("--compile_mode %s: used as %s, blocks can't have CUDA graphs", config.compile_mode, mode)
    torch._dynamo.config.cache_size_limit = config.compile_cache_size_limit
    dit.runner = torch.compile(
        dit.runner,
        backend=config.compile_backend,
        mode=mode,
        dynamic=_DYNAMIC[config.compile_dynamic],
        fullgraph=config.compile_fullgraph,
    )
