"""The DiTs of a run: one, or several of which each is for its own noise levels, as in Wan2.2 A14B."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from utils.stopwatch import Stopwatch
from wan.generation.on_demand import AfterUse, OnDemand
from wan.lora.merge import Merger
from wan.models.checkpoints import DiTCheckpoint
from wan.models.memory_options import GenerationMemoryConfig, MemoryConfig, apply_memory_options_
from wan.models.options import LoRAConfig
from wan.models.plan import Plan
from wan.nets.attention import Attention
from wan.nets.dit import WanDiT
from wan.nets.spec import TRAINING_TIMESTEPS


class ExpertModel(Protocol):
    """A DiT that can be put on the device, with its LoRA files merged at any multipliers."""

    def use(self, multipliers: tuple[float, ...]) -> WanDiT:
        """The DiT on the device, at these multipliers, until `release`. Cheap when it is there already."""

    def release(self) -> None:
        """Make room for another model, if this one is in use."""


@dataclass(frozen=True)
class LoadedModel:
    """A DiT that somebody else keeps on the device, such as the one in training."""

    dit: WanDiT

    def use(self, multipliers: tuple[float, ...]) -> WanDiT:
        return self.dit

    def release(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Expert:
    """A model, the noise levels that it is for, and how one picture uses it."""

    model: ExpertModel
    guidance: float  # scale of classifier-free guidance; 1 needs no unconditional pass
    from_level: float = 0.0  # lowest noise level, timestep / 1000, at which it is used
    multipliers: tuple[float, ...] = ()  # of the LoRA files, as in --lora_multiplier


class Experts:
    """The experts of one picture. At most one of them is in use at a time."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        """Raises ValueError unless the noise levels at which they begin differ and the lowest is 0."""
        self._experts = sorted(experts, key=lambda expert: -expert.from_level)
        levels = [expert.from_level for expert in self._experts]
        if levels[-1:] != [0.0] or len(set(levels)) < len(levels):
            raise ValueError(f"experts from noise levels {levels}: all levels down to 0 need one, and only one")

    @classmethod
    def one(cls, dit: WanDiT, guidance: float) -> "Experts":
        """A single DiT on the device, for all noise levels."""
        return cls([Expert(LoadedModel(dit), guidance)])

    def at(self, timestep: float) -> Expert:
        """The expert for what the network is told, 0..1000; a level at which one begins is its own."""
        return next(expert for expert in self._experts if timestep / TRAINING_TIMESTEPS >= expert.from_level)

    def use(self, expert: Expert) -> WanDiT:
        """The DiT of one of them on the device, which the others leave."""
        for other in self._experts:
            if other is not expert:
                other.model.release()
        return expert.model.use(expert.multipliers)


@dataclass(frozen=True)
class DiTFiles:
    """A DiT file, and the LoRA files to merge into it at each choice of multipliers; all of them checked."""

    dit: DiTCheckpoint
    mergers: Mapping[tuple[float, ...], Merger | None]
    attention: Attention

    @classmethod
    def checked(
        cls, dit: DiTCheckpoint, lora: LoRAConfig, attention: Attention, choices: Iterable[tuple[float, ...]]
    ) -> "DiTFiles":
        """choices: all multipliers that will be asked for. Raises ConfigError for LoRA files that don't fit the DiT."""
        return cls(dit, {multipliers: lora.merger(dit, multipliers) for multipliers in choices}, attention)

    def load(self, multipliers: tuple[float, ...], memory: MemoryConfig, device: torch.device) -> WanDiT:
        """The DiT on `device`, merged and with the memory options applied."""
        dit = self.dit.load(device, merger=self.mergers[multipliers], attention=self.attention, memory=memory)
        apply_memory_options_(dit, memory, device)
        return dit

    def merge_again_(self, dit: WanDiT, multipliers: tuple[float, ...], device: torch.device) -> None:
        """Bring a loaded DiT to other multipliers, in place."""
        merger = self.mergers[multipliers]
        if merger is not None:
            self.dit.merge_again_(dit, device, merger)


class ModelOnDemand:
    """An `ExpertModel` that is loaded on first use, as the memory plan says at that time.

    from_level: the lowest noise level, timestep / 1000, that it is for.
    """

    def __init__(
        self,
        files: DiTFiles,
        plan: Plan[GenerationMemoryConfig],
        device: torch.device,
        stopwatch: Stopwatch,
        after_use: AfterUse,
        from_level: float = 0.0,
    ) -> None:
        self.from_level = from_level
        self._files, self._plan, self._device, self._stopwatch = files, plan, device, stopwatch
        self._model = OnDemand("the DiT", self._load, device, stopwatch, after_use)
        self._merged: tuple[float, ...] | None = None  # of the loaded DiT; None: not known, after merging failed

    def use(self, multipliers: tuple[float, ...]) -> WanDiT:
        """See `ExpertModel`. Raises torch.OutOfMemoryError when the device has no room."""
        if not self._model.is_loaded:
            self._merged = multipliers
        dit = self._model.use()
        if multipliers != self._merged:
            self._merged = None
            with self._stopwatch.stage("merging again"):
                self._files.merge_again_(dit, multipliers, self._device)
            self._merged = multipliers
        return dit

    def release(self) -> None:
        """See `ExpertModel`."""
        self._model.release()

    def forget(self) -> None:
        """Drop the DiT: the next use loads it anew."""
        self._model.forget()

    def _load(self, device: torch.device) -> WanDiT:
        return self._files.load(self._merged or (), self._plan.memory, device)
