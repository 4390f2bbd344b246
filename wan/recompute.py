"""Blocks whose activations are recomputed in the backward pass instead of kept: all, or as many as memory demands."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

_SPARE = 0.06  # of the device's memory: what no plan may use, for workspaces and fragments
_LATER_BYTES = 12  # per trained number: gradient and the two moments of AdamW, which the first step has yet to make


def checkpoint_blocks_(dit: nn.Module, cpu_offload: bool = False, only_needed: bool = False) -> None:
    """Recompute the activations of each of `dit.blocks` in the backward pass instead of keeping them.

    Gradients are the same; a training step takes about a third more time and keeps one tensor per block, the residual
    stream [B, L, dim]. cpu_offload: it waits in host memory. only_needed: the last blocks keep theirs, as many as fit,
    which is found out for each size of batch; see `Planner`.
    """
    planner = Planner(dit.blocks, partial(_free_memory, dit)) if only_needed else None
    for number, block in enumerate(dit.blocks):
        keep = block.forward
        draws = any(getattr(module, "draws", False) for module in block.modules())  # LoRA layers with dropout
        recompute = partial(checkpoint, keep, use_reentrant=False, preserve_rng_state=draws)
        recompute = partial(_offloaded, recompute) if cpu_offload else recompute
        block.forward = partial(planner.run, number, keep, recompute) if planner else recompute


class Planner:
    """Decides for each size of batch how many blocks keep their activations.

    The first block of the first batch of a size keeps them and is measured. The blocks that keep them otherwise are the
    last: backward frees theirs before it recomputes others.
    """

    def __init__(self, blocks: nn.ModuleList, free_memory: Callable[[torch.device], int]) -> None:
        """free_memory: bytes that activations may take on a device."""
        self._first, self._blocks, self._free_memory = blocks[0], len(blocks), free_memory
        self._kept: dict[tuple[int, ...], int] = {}  # shape of the residual stream -> blocks that keep activations

    def run(
        self, number: int, keep: Callable[..., Tensor], recompute: Callable[..., Tensor], x: Tensor, *shared
    ) -> Tensor:
        """The forward pass of a block. keep, recompute: the two ways to do it."""
        if not torch.is_grad_enabled():
            return keep(x, *shared)
        if x.shape not in self._kept:
            free = self._free_memory(x.device)
            out, size = measured(keep, self._first, x, *shared)
            self._kept[x.shape] = kept_blocks(self._blocks, size, x.nbytes, free)
            log.info(
                "%d tokens: %.2f GB of activations per block, %.1f GB free, %d of %d blocks are recomputed",
                *(x.shape[0] * x.shape[1], size / 1e9, free / 1e9),
                *(self._blocks - self._kept[x.shape], self._blocks),
            )
            return out
        return (keep if number >= self._blocks - self._kept[x.shape] else recompute)(x, *shared)


def kept_blocks(blocks: int, activations: int, checkpoint_size: int, free: int) -> int:
    """How many blocks can keep their activations.

    activations, checkpoint_size: bytes that a block needs which keeps them, and one which does not. One more block's
    worth is left for the block that is being recomputed or measured, and another for gradients in backward.
    """
    gain = max(activations - checkpoint_size, 1)
    return min(max(int((free - 2 * activations - blocks * checkpoint_size) // gain), 0), blocks)


def measured(forward: Callable[..., Tensor], block: nn.Module, x: Tensor, *shared) -> tuple[Tensor, int]:
    """forward(x, *shared), that of `block`, and the bytes that autograd keeps for it beside the block's parameters."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward(x, *shared)
    there = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    return out, sum(size for address, size in sizes.items() if address not in there)


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
    address = x.data_ptr()  # autograd keeps the hooks: with x in one of them, nothing would be freed

    def pack(tensor: Tensor) -> tuple[Tensor, torch.device] | Tensor:
        if tensor.data_ptr() != address:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True), tensor.device

    def unpack(packed: tuple[Tensor, torch.device] | Tensor) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].to(packed[1], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(x, *shared)
