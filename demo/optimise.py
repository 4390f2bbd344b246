"""The training loop of the miniature family. Its networks are so small that a GPU would mostly wait for Python."""

import math
import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from demo.muon import Muon
from wan.fused.graphs import CudaRecorder, Recorded

Batch = tuple[Tensor, ...]
_DECAY = 0.01
_WARM_UP = 3  # runs before a recording: what libraries allocate on first use must not be part of it


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """`warmup` rising steps, then half a cosine down to 0 at the last of `steps`."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


class RecordedByKey:
    """A function of a key and tensors that launches work on the GPU: one CUDA graph per key, which is replayed.

    The function must not wait for the GPU, and tensors of one key must keep their shapes. The result is overwritten by
    the next call.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function, self._record = function, CudaRecorder()
        self._recorded: dict[Hashable, Recorded] = {}

    def __call__(self, key: Hashable, *inputs: Tensor) -> Tensor:
        if key not in self._recorded:
            self._warm_up(key, *inputs)
            self._recorded[key] = Recorded(self._record, self._function, key, *inputs)
        return self._recorded[key](key, *inputs)

    def _warm_up(self, key: Hashable, *inputs: Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(key, *inputs)
        torch.cuda.current_stream().wait_stream(stream)


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

    run = RecordedByKey(update) if on_gpu else update
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
