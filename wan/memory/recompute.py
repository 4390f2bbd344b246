"""Activations that are made again in the backward pass instead of kept: of all blocks, or of as many as memory demands.

A block keeps everything, or all but what few passes over memory make again (it is lean), or nothing but its input.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

log = logging.getLogger(__name__)

_SPARE = 0.05  # of the device's memory: what no plan may use, for workspaces and fragments
_LATER_BYTES = 12  # per trained number: gradient and the two moments of AdamW, which the first step has yet to make

_ATTENTION = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
_recomputing = False  # whether a block is being made again
_kept: list[dict[int, int]] = []  # of each `measured` that runs: storages that autograd keeps, and their bytes


def is_recomputing() -> bool:
    """Whether a forward pass is run again for what backward needs of it, so that nothing reads its result."""
    return _recomputing


@contextmanager
def _recompute(kept: AbstractContextManager) -> Iterator[None]:
    """Within it a block is made again, but for what `kept` returns of the first time."""
    global _recomputing
    _recomputing = True
    try:
        with kept:
            yield
    finally:
        _recomputing = False


def recompute_blocks_(dit: nn.Module, cpu_offload: bool = False, only_needed: bool = False) -> None:
    """Recompute the activations of each of `dit.blocks` in the backward pass instead of keeping them.

    Gradients are the same; a training step takes about a third more time and keeps one tensor per block, the residual
    stream [B, L, dim]. cpu_offload: it waits in host memory. only_needed: the last blocks keep theirs, as many as fit,
    which is found out for each size of batch, see `Planner`; the others keep the result of the self attention too.
    """
    planner = ActivationBudget(dit.blocks, partial(_free_memory, dit)) if only_needed else None
    for number, block in enumerate(dit.blocks):
        keep = block.forward
        draws = any(getattr(module, "is_stochastic", False) for module in block.modules())  # LoRA layers with dropout
        contexts = partial(_contexts, keep_attention=only_needed)
        recompute = partial(checkpoint, keep, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)
        recompute = partial(_offloaded, recompute) if cpu_offload else recompute
        block.forward = partial(planner.run, number, keep, recompute) if planner else recompute


def _contexts(keep_attention: bool) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Those of the forward pass and of its repetition."""
    first, again = (
        create_selective_checkpoint_contexts(_ATTENTION) if keep_attention else (nullcontext(), nullcontext())
    )
    return first, _recompute(again)


@contextmanager
def recomputed(*made: tuple[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
    """Within it autograd keeps, in place of each tensor or a view of it, what makes an equal one when it is needed."""
    makers = {tensor.data_ptr(): make for tensor, make in made}

    def pack(tensor: Tensor) -> object:
        make = makers.get(tensor.data_ptr())
        return _note(tensor) if make is None else (make, tensor.shape, tensor.stride())

    def unpack(packed: object) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, shape, stride = packed
        return make().as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@dataclass(frozen=True)
class RecomputeChoice:
    """How the blocks run for one size of batch."""

    kept: int  # blocks that keep their activations: the last ones, backward frees theirs before it recomputes others
    save_less: bool  # they keep only what takes long to make


class ActivationBudget:
    """Decides for each size of batch how many blocks keep their activations.

    In the first batch of a size the first block keeps them and is measured, and the second block where it can be lean.
    """

    def __init__(self, blocks: nn.ModuleList, free_memory: Callable[[torch.device], int]) -> None:
        """free_memory: bytes that activations may take on a device."""
        self._blocks, self._free_memory = blocks, free_memory
        self._plans: dict[tuple[int, ...], RecomputeChoice] = {}  # by shape of the residual stream
        self._measured: dict[tuple[int, ...], tuple[int, int]] = {}  # bytes of the first block, and those that are free

    def run(
        self, number: int, keep: Callable[..., Tensor], recompute: Callable[..., Tensor], x: Tensor, *shared
    ) -> Tensor:
        """The forward pass of a block. keep, recompute: two ways to do it; where `keep.save_less` is, it is a third."""
        if not torch.is_grad_enabled():
            return keep(x, *shared)
        save_less = getattr(keep, "save_less", None)
        if x.shape in self._plans:
            plan = self._plans[x.shape]
            kept = save_less if plan.save_less else keep
            return (kept if number >= len(self._blocks) - plan.kept else recompute)(x, *shared)
        if x.shape not in self._measured:
            free = self._free_memory(x.device)
            out, size = measured(keep, self._blocks[number], x, *shared)
            self._measured[x.shape] = size, free
            kept = self._fitting(x, size)
            if kept == len(self._blocks) or save_less is None or number + 1 == len(self._blocks):
                self._decide(x, RecomputeChoice(kept, save_less=False), size)
            return out
        out, size = measured(save_less, self._blocks[number], x, *shared)
        self._decide(x, RecomputeChoice(self._fitting(x, size), save_less=True), size)
        return out

    def _fitting(self, x: Tensor, activations: int) -> int:
        whole, free = self._measured[x.shape]
        checkpointed = x.nbytes + x.nbytes // 2  # the stream, and what attention returns in 16 bits
        # As much as a whole block for what backward makes; blocks are recomputed when those that keep theirs are done
        return kept_blocks(len(self._blocks), activations, checkpointed, free - whole)

    def _decide(self, x: Tensor, plan: RecomputeChoice, size: int) -> None:
        self._plans[x.shape] = plan
        log.info(
            "%d tokens: %.2f GB of activations per block, %.1f GB free, %d of %d blocks are recomputed",
            *(x.shape[0] * x.shape[1], size / 1e9, self._measured[x.shape][1] / 1e9),
            *(len(self._blocks) - plan.kept, len(self._blocks)),
        )


def kept_blocks(blocks: int, activations: int, checkpoint_size: int, free: int) -> int:
    """How many blocks can keep their activations.

    activations, checkpoint_size: bytes that a block needs which keeps them, and one which does not.
    """
    gain = max(activations - checkpoint_size, 1)
    return min(max(int((free - blocks * checkpoint_size) // gain), 0), blocks)


def measured(forward: Callable[..., Tensor], block: nn.Module, x: Tensor, *shared) -> tuple[Tensor, int]:
    """forward(x, *shared), that of `block`, and the bytes that autograd keeps for it beside the block's parameters."""
    sizes: dict[int, int] = {}
    _kept.append(sizes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_note, lambda tensor: tensor):
            out = forward(x, *shared)
    finally:
        _kept.remove(sizes)
    there = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    return out, sum(size for address, size in sizes.items() if address not in there)


def _note(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    for sizes in _kept:
        sizes[storage.data_ptr()] = storage.nbytes()
    return tensor


def _free_memory(dit: nn.Module, device: torch.device) -> int:
    """Bytes on a GPU that activations may take; elsewhere 0, so that everything is recomputed."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    later = sum(tensor.numel() for tensor in dit.parameters() if tensor.requires_grad) * _LATER_BYTES
    return int(free + cached - later - _SPARE * total)


def _offloaded(forward: Callable[..., Tensor], x: Tensor, *shared) -> Tensor:
    """`forward` of a checkpointed block, with x kept in host memory; the other inputs are the same for all blocks."""
    if not torch.is_grad_enabled():
        return forward(x, *shared)
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x.detach(), non_blocking=True)
    with recomputed((x, partial(host.to, x.device, non_blocking=True))):
        return forward(x, *shared)
