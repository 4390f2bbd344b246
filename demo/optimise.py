"""The training loop of the miniature family. Its networks are so small that a GPU would mostly wait for Python."""

import math
import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from demo.muon import Muon

Batch = tuple[Tensor, ...]
_DECAY = 0.01
_WARM_UP = 3  # of a recording: what libraries allocate on first use must not be part of it


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """`warmup` rising steps, then half a cosine down to 0 at the last of `steps`."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Recorded:
    """A function of tensors that launches work on the GPU, recorded once per key as a CUDA graph and replayed.

    The function must not wait for the GPU, and tensors of one key must keep their shapes. The result is overwritten by
    the next call.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, *inputs: Tensor) -> Tensor:
        if key not in self.graphs:
            self.graphs[key] = self._record(key, tuple(tensor.clone() for tensor in inputs))
        graph, own_inputs, result = self.graphs[key]
        for own, given in zip(own_inputs, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return result

    def _record(self, key: Hashable, inputs: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.function(key, *inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.function(key, *inputs)
        return graph, inputs, result


def optimise(
    parameters: list[nn.Parameter],
    steps: int,
    peak: float,
    batch_of: Callable[[int], tuple[Hashable, Batch]],
    loss_of: Callable[..., Tensor],
    label: str,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """AdamW, or Muon for `matrices`, with gradient clipping for `steps` steps; prints the mean loss now and then.

    parameters: all of them. batch_of: step -> (key, tensors), where a key stands for one kind of step with fixed
    shapes; loss_of: (key, *tensors) -> loss.
    """
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    options = {"fused": True, "capturable": True} if on_gpu else {}
    chosen = set(matrices)
    others = [parameter for parameter in parameters if parameter not in chosen]
    optimizer = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=_DECAY, **options)
    muon = Muon(list(matrices), rate, _DECAY)

    def update(key: Hashable, *inputs: Tensor) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of(key, *inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        muon.step()
        return loss.detach()

    run = Recorded(update) if on_gpu else update
    shown = time.monotonic()
    total, counted = torch.zeros((), device=device), 0
    for step in range(steps):
        rate.fill_(learning_rate(step, steps, peak))
        key, inputs = batch_of(step)
        total += run(key, *inputs)
        counted += 1
        if time.monotonic() - shown > 15 or step == steps - 1:
            mean, rate_shown = float(total) / counted, counted / (time.monotonic() - shown)
            print(f"{label}: step {step + 1} loss {mean:.4f}, {rate_shown:.1f} steps/s", flush=True)
            shown, counted = time.monotonic(), 0
            total.zero_()
