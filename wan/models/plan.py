"""`--memory auto`, the default: which options a run needs to fit into the memory that is free.

Choices that change no result come first: what is recomputed, and what waits in host memory, weights before activations
because they cost less time. Generation takes fp8 before that: its short steps would wait for the copies.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from dataset.loader import BucketCount
from wan.lora.files import LoRAFile
from wan.lora.options import NetworkConfig
from wan.memory.block_swap import SLOTS
from wan.memory.host import available_memory
from wan.memory.margins import PLAN_MARGIN
from wan.models.checkpoints import DiTCheckpoint, T5Checkpoint
from wan.models.estimate import (
    Parts,
    describe_parts,
    format_bytes,
    frozen_bytes,
    generation_parts,
    largest_batch,
    meta_dit,
    offloaded_bytes,
    training_parts,
)
from wan.models.memory_options import GenerationMemoryConfig, MemoryConfig, TrainingMemoryConfig
from wan.nets.dit import WanDiT

log = logging.getLogger(__name__)
Memory = TypeVar("Memory", bound=MemoryConfig)

_HOST_SPARE = 4e9  # bytes
_LESS = 0.9  # after memory has run out: what the next choice needs, at most, as a share of the last one's


@dataclass(frozen=True)
class Room:
    """Bytes that a run may take."""

    device: float
    host: float

    @classmethod
    def on(cls, device: torch.device) -> "Room":
        """Free memory now; infinite without a GPU."""
        if device.type != "cuda":
            return UNLIMITED
        free, total = torch.cuda.mem_get_info(device)
        return cls(free - PLAN_MARGIN * total, available_memory() - _HOST_SPARE)


UNLIMITED = Room(math.inf, math.inf)


@dataclass(frozen=True)
class Choice(Generic[Memory]):
    """Options, and what they are expected to need."""

    memory: Memory
    parts: Parts
    host: float = 0

    @property
    def size(self) -> float:
        return sum(self.parts.values())


class Plan(Generic[Memory]):
    """The choices that fit, the best first. `memory` is the one that holds."""

    def __init__(self, choices: Iterable[Choice[Memory]], room: Room) -> None:
        """choices: the best first. The smallest is taken if none fits."""
        possible = [choice for choice in choices if choice.host <= room.host]
        self._fits = [choice for choice in possible if choice.size <= room.device]
        if not self._fits:
            self._fits = [min(possible, key=lambda choice: choice.size)]
            log.warning("memory: %s are free, which may not be enough; try smaller pictures", format_bytes(room.device))

    @classmethod
    def of(cls, memory: Memory) -> "Plan[Memory]":
        """A plan of the user's own options, with no alternative."""
        return cls([Choice(memory, {})], UNLIMITED)

    @property
    def memory(self) -> Memory:
        """The options that hold."""
        return self._fits[0].memory

    def step_down(self) -> bool:
        """After memory has run out: go to the next choice that needs clearly less. False when there is none."""
        left = [choice for choice in self._fits[1:] if choice.size <= _LESS * self._fits[0].size]
        if left:
            self._fits = left
            log.warning("memory: it was not enough; continuing with %s", self)
        return bool(left)

    def __str__(self) -> str:
        choice = self._fits[0]
        host = f"; {format_bytes(choice.host)} in host memory" if choice.host else ""
        return f"{_flags(choice.memory)}; {describe_parts(choice.parts)}{host}"


def _flags(memory: MemoryConfig) -> str:
    """The options that were chosen, as one would type them."""
    words = []
    for name in memory.chosen_by_plan:
        value = getattr(memory, name)
        if value not in (False, 0, "none"):
            words.append(f"--{name}" + ("" if value is True else f" {value}"))
    return " ".join(words) or "nothing to save"


def chosen_plan(memory: Memory, room: Room, make: Callable[[Room], Plan[Memory]]) -> Plan[Memory]:
    """The user's own options, or those of the plan that `make` returns for this room, which is logged.

    Without `--memory auto` nothing is planned where room is without limit.
    """
    if not memory.is_planned or (memory.memory is None and room == UNLIMITED):
        return Plan.of(memory)
    plan = make(room)
    log.info("memory: %s", plan)
    return plan


def plan_training(
    checkpoint: DiTCheckpoint,
    dtype: torch.dtype,
    memory: TrainingMemoryConfig,
    network: NetworkConfig,
    weights: LoRAFile | None,
    buckets: Sequence[BucketCount],
    room: Room,
) -> Plan[TrainingMemoryConfig]:
    """dtype: of the DiT in memory; weights: the LoRA that training starts from."""
    spec, tokens = checkpoint.spec, largest_batch(buckets)

    def choices() -> Iterator[Choice[TrainingMemoryConfig]]:
        for fp8 in _precisions(checkpoint, {"fp8_base": True, "fp8_scaled": True}):
            base = replace(memory, memory="manual", **fp8)
            dit, lora = meta_dit(checkpoint, dtype, base, network, weights)
            swaps = list(_swaps(dit, {"gradient_checkpointing": "all"}))
            offloads = [swap | {"gradient_checkpointing_cpu_offload": True} for swap in swaps]
            for options in ({}, {"gradient_checkpointing": "auto"}, *swaps, *offloads):
                chosen = replace(base, **options)
                frozen, host = _split(dit, chosen.blocks_to_swap)
                parts = training_parts(frozen, lora, spec, tokens, chosen)
                offloaded = chosen.gradient_checkpointing_cpu_offload * offloaded_bytes(spec, tokens)
                yield Choice(chosen, parts, host + offloaded)

    return Plan(choices(), room)


def plan_generation(
    checkpoint: DiTCheckpoint, dtype: torch.dtype, memory: GenerationMemoryConfig, tokens: int, room: Room
) -> Plan[GenerationMemoryConfig]:
    """dtype: of the DiT in memory; tokens: of the largest forward pass."""

    def choices() -> Iterator[Choice[GenerationMemoryConfig]]:
        for fp8 in _precisions(checkpoint, {"fp8_scaled": True}):
            base = replace(memory, memory="manual", **fp8)
            dit, _ = meta_dit(checkpoint, dtype, base)
            yield Choice(base, generation_parts(frozen_bytes(dit), checkpoint.spec, tokens))
        for swap in _swaps(dit, {}):
            frozen, host = _split(dit, swap["blocks_to_swap"])
            yield Choice(replace(base, **swap), generation_parts(frozen, checkpoint.spec, tokens), host)

    return Plan(choices(), room)


def plan_t5(t5: T5Checkpoint, device: torch.device, room: Room) -> T5Checkpoint:
    """For texts, when T5 is alone on the device: with its linear layers in fp8 if it does not fit without."""
    if t5.fp8 or (size := t5.size(device)) <= room.device:
        return t5
    log.warning("memory: T5 takes %s, more than is free; its weights become fp8", format_bytes(size))
    return replace(t5, fp8=True)


def _precisions(checkpoint: DiTCheckpoint, fp8: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of the file's own precision, and of fp8 where the file is not in fp8."""
    return [{}] if checkpoint.stored_dtype.itemsize == 1 else [{}, fp8]


def _swaps(dit: WanDiT, more: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ever more blocks in host memory; fewer than three would save nothing."""
    for count in range(SLOTS + 1, len(dit.blocks)):
        yield {"blocks_to_swap": count, "use_pinned_memory_for_block_swap": True, **more}


def _split(dit: WanDiT, swapped: int) -> tuple[int, int]:
    """Bytes of frozen weights (on the device, in host memory) with so many blocks swapped."""
    block = frozen_bytes(dit.blocks[-1])
    return frozen_bytes(dit) - max(0, swapped - SLOTS) * block, swapped * block
