"""Runners that wrap the runner of a DiT (`WanDiT.runner`), and how they tell each other what autograd is to save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.nets.dit import Block, BlockRunner, Shared

if TYPE_CHECKING:
    from typing_extensions import Unpack

Recipe = tuple[Tensor, Callable[[], Tensor]]
"""A tensor, and a function that computes an equal one."""


@dataclass(frozen=True)
class Saving:
    """Tells a runner which tensors autograd is to save in one pass through a block.

    less: of cheap operations, recipes in place of results. repeated: the pass is a recomputation for backward, so that
    nothing reads its result. sizes: bytes of each saved storage by address, to be filled in; None if not wanted.
    """

    less: bool = False
    repeated: bool = False
    sizes: dict[int, int] | None = None

    def recipes(self, *recipes: Recipe) -> AbstractContextManager[None]:
        """Context in which autograd saves recipes instead of their tensors, if it is to save less."""
        return saved_as_recipes(*recipes, note=self.note) if self.less else nullcontext()

    def note(self, tensor: Tensor) -> Tensor:
        """Returns the tensor after noting its size: a hook for each tensor that autograd saves."""
        if self.sizes is not None:
            storage = tensor.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextmanager
def saved_as_recipes(*recipes: Recipe, note: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[None]:
    """Context in which autograd saves the recipe of each of these tensors, and of views of them, instead of the tensor.

    note: is handed every other tensor that is saved.
    """
    makers = {tensor.data_ptr(): make for tensor, make in recipes}

    def pack(tensor: Tensor) -> object:
        make = makers.get(tensor.data_ptr())
        return note(tensor) if make is None else (make, tensor.shape, tensor.stride())

    def unpack(packed: Tensor | tuple[Callable[[], Tensor], torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, shape, stride = packed
        return make().as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class SavingRunner(ABC):
    """A `BlockRunner` that knows `Saving`, or hands it on to the runner that it wraps."""

    saves_less: bool
    """Whether `Saving.less` makes a difference."""

    def __call__(self, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        return self.run(Saving(), block, x, *shared)

    @abstractmethod
    def run(self, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        """Output of `block`, see `Block.compute`; autograd saves as much as `saving` says."""


class Saver(SavingRunner):
    """Adapter of any runner to a SavingRunner; one that knows no `Saving` makes autograd save everything."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self.saves_less = isinstance(runner, SavingRunner) and runner.saves_less

    def run(self, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        if isinstance(self._runner, SavingRunner):
            return self._runner.run(saving, block, x, *shared)
        return self._runner(block, x, *shared)
