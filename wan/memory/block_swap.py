"""Blocks whose frozen weights wait in host memory and are copied to the device just before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wan.memory.runner import Saver, Saving, SavingRunner
from wan.nets.dit import Block, BlockRunner, Shared, WanDiT

if TYPE_CHECKING:
    from typing_extensions import Unpack

SLOTS = 2  # places on the device that swapped blocks take turns in: one block computes, the next is copied
_ALIGNMENT = 64  # bytes between the starts of tensors that share a buffer; any dtype can be viewed there


def swap_blocks_(dit: WanDiT, count: int, device: torch.device, pinned: bool = False, recomputed: bool = False) -> None:
    """Keep the frozen parameters of the last `count` blocks in host memory; everything else goes to `device`.

    Two blocks' worth of memory on the device serves all of them in turn, so the device holds the weights of
    `blocks - count + 2` blocks. On CUDA the next block is copied on a stream of its own while one computes.
    pinned: page-locked host memory, which is copied faster and without holding up the program; CUDA only.

    In the state dict the weights of these blocks are those in host memory; what is written there counts.
    Outputs and gradients stay the same. recomputed: `recompute_blocks_` is applied after this. Otherwise autograd saves
    the places of weights in place of weights, which are fetched again in backward.
    Weights that have moved stay where they are: another runner would have to fetch them too.
    """
    blocks = list(dit.blocks)[-count:]
    swapper = _Swapper([_frozen(block) for block in blocks[:SLOTS]], device, pinned)
    for block in blocks:
        swapper.take_over(block)
    dit.runner = SwappedBlocks(dit.runner, swapper, blocks, recomputed)
    dit.to(device)
    dit.register_forward_pre_hook(lambda *_: swapper.prefetch(0, after=swapper.now()))

    def show_host_memory(_dit: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: dict[str, Any]) -> None:
        for number, (block, weights) in enumerate(zip(blocks, swapper.weights(), strict=True), len(dit.blocks) - count):
            names = [name for name, parameter in block.named_parameters() if not parameter.requires_grad]
            state.update(zip([f"{prefix}blocks.{number}.{name}" for name in names], weights, strict=True))

    dit.register_state_dict_post_hook(show_host_memory)  # type: ignore[no-untyped-call]  # torch does not annotate it


class SwappedBlocks(SavingRunner):
    """Fetches the weights of a block before `runner` computes it."""

    def __init__(self, runner: BlockRunner, swapper: _Swapper, blocks: list[nn.Module], recomputed: bool) -> None:
        """blocks: those that `swapper` has taken over, in order."""
        self._inner, self._swapper, self._recomputed = Saver(runner), swapper, recomputed
        self._numbers = {block: number for number, block in enumerate(blocks)}
        self.saves_less = self._inner.saves_less

    def run(self, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        if block not in self._numbers:
            return self._inner.run(saving, block, x, *shared)
        number = self._numbers[block]
        fetched_again = nullcontext() if self._recomputed else self._swapper.saved_as_places(number)
        with self._swapper.on_device(number), fetched_again:
            return self._inner.run(saving, block, x, *shared)


def _places(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name) of each frozen parameter of a block."""
    return [
        (module, name)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad
    ]


def _frozen(block: nn.Module) -> list[nn.Parameter]:
    return [module.get_parameter(name) for module, name in _places(block)]


@dataclass
class _Slot:
    """Device memory for one block at a time: parameters that several blocks share."""

    parameters: list[nn.Parameter]
    content: int | None = None  # number of the block whose weights are in it
    ready: torch.cuda.Event | None = None  # when its last copy is done


class _Swapper:
    """Host copies of the swapped blocks, numbered from 0, and the two slots on the device that they take turns in."""

    def __init__(self, templates: list[list[nn.Parameter]], device: torch.device, pinned: bool) -> None:
        """templates: parameters of the shapes and dtypes that the slots have to hold."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned = pinned and self._stream is not None
        self._slots = [
            _Slot([nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False) for weight in weights])
            for weights in templates
        ]
        self._host: list[list[Tensor]] = []
        self._previous = self._backward = -1  # numbers of the blocks that were run, or went through backward, last

    def take_over(self, block: nn.Module) -> None:
        """Move the frozen parameters of the next block to the host and put the slot's parameters in their place."""
        weights = [parameter.detach().cpu() for parameter in _frozen(block)]
        slot = self._slot(len(self._host))
        self._host.append(_page_locked(weights) if self._pinned else weights)
        for (module, name), parameter in zip(_places(block), slot.parameters, strict=True):
            setattr(module, name, parameter)

    def weights(self) -> list[list[Tensor]]:
        """Host copies of each block, to be read and written: no copy is under way, and all are fetched anew."""
        if self._stream is not None:
            self._stream.synchronize()
        for slot in self._slots:
            slot.content = None
        return self._host

    @contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        """Context in which the weights of a block are on the device; then the next block's are sent for."""
        free = self.now()  # from here on nothing reads the other slot
        self.prefetch(number, after=free)
        if self._stream is not None:
            _wait(torch.cuda.current_stream(self._stream.device), self._slot(number).ready)
        self._backward = -1
        step = -1 if number == self._previous - 1 else 1  # backward recomputes the blocks from the last to the first
        self._previous = number
        try:
            yield
        finally:  # a recomputed pass ends with an exception as soon as it has what backward needs
            self.prefetch(number + step, after=free)

    def saved_as_places(self, number: int) -> AbstractContextManager[None]:
        """Context in which autograd saves a weight of this block, or a view of it, as its place in the slot."""
        addresses = {weight.untyped_storage().data_ptr(): i for i, weight in enumerate(self._slot(number).parameters)}

        def pack(tensor: Tensor) -> Tensor | tuple[int, tuple[Any, ...]]:
            i = addresses.get(tensor.untyped_storage().data_ptr())
            return tensor if i is None else (i, (tensor.shape, tensor.stride(), tensor.storage_offset()))

        def unpack(packed: Tensor | tuple[int, tuple[Any, ...]]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            self._fetch_for_backward(number)
            i, view = packed
            return self._slot(number).parameters[i].detach().as_strided(*view)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _fetch_for_backward(self, number: int) -> None:
        """Have the weights of a block on the device, and send for those of the one before it."""
        if self._backward == number and self._slot(number).content == number:
            return
        free = self.now()  # backward goes from block to block, so that nothing reads the other slot any more
        self.prefetch(number, after=free)
        if self._stream is not None:
            _wait(torch.cuda.current_stream(self._stream.device), self._slot(number).ready)
        self.prefetch(number - 1, after=free)
        self._backward = number

    def now(self) -> torch.cuda.Event | None:
        """Event after all work that the device has been given so far; None on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def prefetch(self, number: int, after: torch.cuda.Event | None) -> None:
        """Copy a block into its slot unless it is there. `after`: when nothing reads the former content any more."""
        if not 0 <= number < len(self._host) or self._slot(number).content == number:
            return
        slot = self._slot(number)
        slot.content = None  # in case copying fails
        if self._stream is None:
            self._copy(number)
        else:
            _wait(self._stream, after)
            with torch.cuda.stream(self._stream):
                self._copy(number)
                slot.ready = self._stream.record_event()
        slot.content = number

    def _slot(self, number: int) -> _Slot:
        return self._slots[number % len(self._slots)]

    @torch.no_grad()
    def _copy(self, number: int) -> None:
        for parameter, weight in zip(self._slot(number).parameters, self._host[number], strict=True):
            parameter.copy_(weight, non_blocking=True)
            if self._stream is not None:
                parameter.record_stream(self._stream)  # if the model is dropped meanwhile, its memory waits for this


def _wait(stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> None:
    if event is not None:
        stream.wait_event(event)


def _page_locked(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in one page-locked buffer, because torch rounds each such allocation up to a power of two."""
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    copies = [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return copies
