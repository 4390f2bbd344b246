"""CUDA graphs: the kernels for inputs of one size, captured once and then launched by one call.

With few tokens a GPU finishes its kernels faster than Python launches them one by one. A graph reads and writes the
memory that it was captured with: inputs are copied there, and a result lasts until the next call.
"""

import gc
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from wan.nets.context import Prepared
from wan.nets.dit import PassRunner, WanDiT
from wan.nets.tokens import FrameSizes, token_count

log = logging.getLogger(__name__)

_MOST_TOKENS = 4096  # of a batch: with more, an H100 takes longer than Python
T = TypeVar("T")


class Recorder(Protocol):
    """Runs work that returns tensors, and makes a function that repeats it."""

    def __call__(self, work: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """(function that does the work again and writes over its result, the result)."""


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, work: Callable[[], T]) -> tuple[Callable[[], object], T]:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # cycles that compiling left may hold autograd's nodes, which belong to another stream
        pool = next((other.pool() for other in self._graphs), None)  # with the last of its graphs it is gone
        # Threads that load data may go on meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
        self._graphs.add(graph)
        return graph.replay, result


class Recorded(Generic[T]):
    """`work` captured as a CUDA graph for these constants and shapes."""

    def __init__(self, record: Recorder, work: Callable[..., T], *inputs: object) -> None:
        self._inputs = [tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in inputs]
        self._replay, self._result = record(partial(work, *self._inputs))

    def __call__(self, *inputs: object) -> T:
        """Result for other tensors of these shapes; the next call writes over it."""
        for own, tensor in zip(self._inputs, inputs, strict=True):
            if isinstance(own, Tensor) and isinstance(tensor, Tensor):
                own.copy_(tensor, non_blocking=True)
        self._replay()
        return self._result


def graph_passes_(dit: WanDiT, record: Recorder | None = None) -> None:
    """Replay passes of `dit`, from the second call with the same StepCache on. record: default CUDA's."""
    dit.pass_runner = _GraphedPass(dit.pass_runner, record or CudaRecorder())


class _GraphedPass:
    """A PassRunner that captures and replays the kernels of another."""

    def __init__(self, runner: PassRunner, record: Recorder) -> None:
        self._runner, self._record = runner, record
        self._used: WeakSet[Prepared] = WeakSet()  # the first pass makes keys and values, which no graph may own
        self._recorded: WeakKeyDictionary[Prepared, dict[tuple[Hashable, ...], Recorded[Tensor]]] = WeakKeyDictionary()
        self._fits = True

    def __call__(
        self,
        dit: WanDiT,
        latents: Tensor,
        channels: Tensor | None,
        timesteps: Tensor,
        prepared: Prepared,
        skip_blocks: frozenset[int],
        frame_sizes: FrameSizes | None,
    ) -> Tensor:
        def work(latents: Tensor, channels: Tensor | None, timesteps: Tensor) -> Tensor:
            return self._runner(dit, latents, channels, timesteps, prepared, skip_blocks, frame_sizes)

        inputs = latents, channels, timesteps
        first = prepared not in self._used
        self._used.add(prepared)
        if first or torch.is_grad_enabled() or not self._fits or _tokens(latents, frame_sizes) > _MOST_TOKENS:
            return work(*inputs)
        found, size = self._recorded.setdefault(prepared, {}), (latents.shape, skip_blocks, frame_sizes)
        if size not in found:
            try:
                found[size] = Recorded(self._record, work, *inputs)
            except torch.OutOfMemoryError:
                self._fits = False
                return work(*inputs)
        return found[size](*inputs).clone()


Gradients = tuple[Tensor, Sequence[Tensor | None]]
"""Losses [B], and a gradient per parameter."""


class GraphedGradients:
    """A loss and its gradients, replayed from the second time on that inputs of a size occur."""

    def __init__(
        self, loss: Callable[..., Tensor], parameters: Sequence[nn.Parameter], record: Recorder | None = None
    ) -> None:
        """loss: of named tensors, returns [B]. parameters: to take gradients by. record: default CUDA's."""
        self._loss, self.parameters, self._record = loss, parameters, record or CudaRecorder()
        self._known: set[tuple[Hashable, ...]] = set()  # sizes that kernels have been chosen for
        self._recorded: dict[tuple[Hashable, ...], Recorded[Gradients]] = {}
        self._fits = True

    def __call__(self, inputs: dict[str, Any], factor: Tensor) -> Gradients:
        """The losses [B], and the gradients of their sum times `factor`, a scalar. The next call may write over both.

        inputs: of `loss`, tensors, tuples of them and constants; among them `latents` [B, 16, F, H, W].
        """
        leaves, structure = tree_flatten(inputs)
        work, tensors = partial(self._work, structure), [factor, *leaves]
        size = tuple(tensor.shape if isinstance(tensor, Tensor) else tensor for tensor in tensors)
        tokens = _tokens(inputs["latents"], inputs.get("frame_sizes"))
        wanted = self._fits and size in self._known and tokens <= _MOST_TOKENS
        if wanted and size not in self._recorded:
            try:
                self._recorded[size] = Recorded(self._record, work, *tensors)
            except torch.OutOfMemoryError:
                log.info("no memory is left for a CUDA graph; the steps run without one")
                self._fits = False
        self._known.add(size)
        if size in self._recorded:
            return self._recorded[size](*tensors)
        try:
            return work(*tensors)
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
        self.release()  # memory that graphs reserve serves nobody else
        return work(*tensors)

    def release(self) -> None:
        """Give back the memory of all graphs; they are recorded anew when they are needed."""
        self._recorded.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _work(self, structure: TreeSpec, factor: Tensor, *leaves: object) -> Gradients:
        losses = self._loss(**tree_unflatten(leaves, structure))
        gradients = torch.autograd.grad(losses.sum() * factor, self.parameters, allow_unused=True)
        return losses.detach(), gradients


def _tokens(latents: Tensor, sizes: FrameSizes | None) -> int:
    """Tokens of a batch of latents [B, C, F, H, W]."""
    return len(latents) * token_count(latents.shape[2:], sizes)
