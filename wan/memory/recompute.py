"""Activation checkpointing: blocks drop their activations and recompute them in backward, all or as many as necessary.

Three levels per block: save all; save all but cheap elementwise results (`Saving.less`); save the inputs only.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from wan.memory.margins import RECOMPUTE_MARGIN, TRAINED_BYTES, WEIGHT_BYTES
from wan.memory.runner import Saver, Saving, SavingRunner, saved_as_recipes
from wan.nets.dit import Block, BlockRunner, Shared, WanDiT

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

_ATTENTION = [  # operations whose result a recomputed block may save
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class StochasticLayer(nn.Module):
    """A layer that may draw random numbers, which a recomputation has to draw again."""

    is_stochastic: bool = False


def recompute_blocks_(dit: WanDiT, cpu_offload: bool = False, only_needed: bool = False) -> None:
    """Recompute the activations of each block in the backward pass instead of keeping them.

    Gradients are the same; a training step takes about a third more time and keeps one tensor per block, the residual
    stream [B, L, dim]. cpu_offload: it waits in host memory. only_needed: the last blocks keep theirs, as many as fit,
    which is found out for each size of batch, see `ActivationBudget`; the others keep the result of the self attention
    too.
    """
    recomputed = RecomputedBlocks(dit, dit.runner, cpu_offload, keep_attention=only_needed)
    dit.runner = ActivationBudget(dit, dit.runner, recomputed) if only_needed else recomputed


class RecomputedBlocks(SavingRunner):
    """Runs blocks so that autograd saves their inputs only."""

    saves_less = False

    def __init__(
        self, dit: WanDiT, runner: BlockRunner, cpu_offload: bool = False, keep_attention: bool = False
    ) -> None:
        """runner: computes a block, now and in the backward pass. keep_attention: its result is saved too."""
        self._inner, self._cpu_offload, self._keep_attention = Saver(runner), cpu_offload, keep_attention
        self._stochastic = {block for block in dit.blocks if any(map(_is_stochastic, block.modules()))}

    def run(self, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        if not torch.is_grad_enabled():
            return self._inner.run(saving, block, x, *shared)
        if not self._cpu_offload:
            return self._checkpointed(block, x, *shared)
        host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)
        with saved_as_recipes((x, partial(host.to, x.device, non_blocking=True))):
            return self._checkpointed(block, x, *shared)

    def _checkpointed(self, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        first, again = nullcontext(), nullcontext()
        if self._keep_attention:
            first, again = create_selective_checkpoint_contexts(_ATTENTION)
        repetition = _Repetition(again)

        def run(x: Tensor, *shared: Unpack[Shared]) -> Tensor:
            return self._inner.run(Saving(repeated=repetition.begun), block, x, *shared)

        return checkpoint(
            run,
            x,
            *shared,
            use_reentrant=False,
            preserve_rng_state=block in self._stochastic,
            context_fn=lambda: (first, repetition),
        )


def _is_stochastic(module: nn.Module) -> bool:
    return isinstance(module, StochasticLayer) and module.is_stochastic


class _Repetition(AbstractContextManager[None]):
    """The context of a recomputation, which remembers that there was one."""

    def __init__(self, inner: AbstractContextManager[object]) -> None:
        self.begun, self._inner = False, inner

    def __enter__(self) -> None:
        self.begun = True
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._inner.__exit__(kind, error, traceback)


@dataclass(frozen=True)
class RecomputeChoice:
    """How the blocks run for one size of batch."""

    kept: int  # blocks that save their activations: the last ones, whose backward frees them before others recompute
    save_less: bool  # these blocks leave out results of cheap operations, see `Saving.less`


class ActivationBudget(SavingRunner):
    """Runs as many blocks as memory allows so that autograd saves their activations: the last ones.

    How many is decided for each size of batch. In the first batch of a size the first block saves its activations and
    is measured, and the second block where it can save less.
    """

    saves_less = False

    def __init__(self, dit: WanDiT, keep: BlockRunner, recompute: BlockRunner) -> None:
        """keep, recompute: run a block so that autograd saves its activations, or does not."""
        self._dit, self._keep, self._recompute = dit, Saver(keep), recompute
        self._numbers = {block: number for number, block in enumerate(dit.blocks)}
        self._choices: dict[torch.Size, RecomputeChoice] = {}  # by shape of the residual stream
        self._measured: dict[torch.Size, tuple[int, int]] = {}  # bytes of the first block, and those that are free

    def run(self, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        if not torch.is_grad_enabled():
            return self._keep.run(saving, block, x, *shared)
        number, count = self._numbers[block], len(self._numbers)
        if x.shape in self._choices:
            choice = self._choices[x.shape]
            if number < count - choice.kept:
                return self._recompute(block, x, *shared)
            return self._keep.run(Saving(less=choice.save_less), block, x, *shared)
        if x.shape not in self._measured:
            free = _free_memory(self._dit, x.device)
            out, size = measured(self._keep, Saving(), block, x, *shared)
            self._measured[x.shape] = size, free
            kept = self._fitting(x, size)
            if kept == count or not self._keep.saves_less or number + 1 == count:
                self._decide(x, RecomputeChoice(kept, save_less=False), size)
            return out
        out, size = measured(self._keep, Saving(less=True), block, x, *shared)
        self._decide(x, RecomputeChoice(self._fitting(x, size), save_less=True), size)
        return out

    def _fitting(self, x: Tensor, activations: int) -> int:
        """Number of blocks that can save their activations, of so many bytes each."""
        whole, free = self._measured[x.shape]
        checkpointed = x.nbytes + x.nbytes // 2  # the stream, and what attention returns in 16 bits
        # One block's worth is left for gradients. Blocks are recomputed after the backward of those that save theirs
        return kept_blocks(len(self._numbers), activations, checkpointed, free - whole)

    def _decide(self, x: Tensor, choice: RecomputeChoice, size: int) -> None:
        self._choices[x.shape] = choice
        log.info(
            "%d tokens: %.2f GB of activations per block, %.1f GB free, %d of %d blocks are recomputed",
            *(x.shape[0] * x.shape[1], size / 1e9, self._measured[x.shape][1] / 1e9),
            *(len(self._numbers) - choice.kept, len(self._numbers)),
        )


def kept_blocks(blocks: int, activations: int, checkpoint_size: int, free: int) -> int:
    """How many blocks can keep their activations.

    activations, checkpoint_size: bytes that a block needs which keeps them, and one which does not.
    """
    gain = max(activations - checkpoint_size, 1)
    return min(max(int((free - blocks * checkpoint_size) // gain), 0), blocks)


def measured(
    runner: SavingRunner, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]
) -> tuple[Tensor, int]:
    """Output of a block, and the bytes that autograd saves for it beside the block's parameters."""
    sizes: dict[int, int] = {}
    saving = replace(saving, sizes=sizes)
    with torch.autograd.graph.saved_tensors_hooks(saving.note, lambda tensor: tensor):
        out = runner.run(saving, block, x, *shared)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    return out, sum(size for address, size in sizes.items() if address not in parameters)


def _free_memory(dit: WanDiT, device: torch.device) -> int:
    """Bytes on a GPU that activations may take; elsewhere 0, so that everything is recomputed."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Gradients and moments, which the first step has yet to make; the weights are there
    later = sum(tensor.numel() for tensor in dit.parameters() if tensor.requires_grad) * (TRAINED_BYTES - WEIGHT_BYTES)
    return int(free + cached - later - RECOMPUTE_MARGIN * total)
