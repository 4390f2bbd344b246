"""Weights on their way from a file to a GPU: threads fill page-locked buffers, out of which the GPU copies.

A plain copy from a mapped file takes turns: one thread waits for the disk or the page cache, then the GPU for that
thread. Here both work at the same time, and many threads read.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_BUFFER = 64 << 20  # bytes
_BUFFERS = 4
_PART = 1 << 20  # bytes that a thread reads at least
THREADS = 16  # 16 GB/s out of the page cache of a machine with 16 cores; 4 threads reach 10


@dataclass(frozen=True)
class FileTensor:
    """A tensor that lies in a file byte by byte."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        """The mapped tensor; what is written to it does not reach the file. Raises OSError when that ends before.

        Mapped alone, because Linux refuses to map a whole file that is larger than the memory of the machine.
        """
        count = prod(self.shape) * self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        try:
            values = np.memmap(self.path, np.uint8, "c", self.offset, (count,))
        except ValueError:
            raise OSError(f"{self.path}: ends too early") from None
        return torch.from_numpy(values).view(self.dtype).reshape(self.shape)

    def fill(self, view: memoryview, start: int) -> None:
        """Bytes of the tensor from `start` on -> the whole of `view`. Raises OSError when the file ends before."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self.path}: ends too early")
                view = view[count:]


class _Buffer:
    """Page-locked memory, and when the GPU has copied out of it."""

    def __init__(self, size: int, on_gpu: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self.view = memoryview(self.memory.numpy())
        self._copied = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def copy_into(self, target: Tensor) -> None:
        target.copy_(self.memory[: len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class _Piece(NamedTuple):
    """What fits into a buffer; without bytes when the tensor is where it belongs."""

    name: str
    tensor: Tensor  # on the device
    bytes: Tensor | None  # of it, uint8
    fill: Callable[[memoryview, int], None] | None  # (view, first byte in the tensor): fills the view
    start: int  # of the bytes, in the tensor
    last: bool


def staged(
    readers: Iterable[tuple[str, Callable[[], Tensor]]],
    device: torch.device,
    size: int = _BUFFER,
    threads: int = THREADS,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) in the order of `readers`; those that are read next are on their way meanwhile.

    The copies run in the current stream, so that whatever is done with a tensor there comes after them. size: bytes of
    a buffer.
    """
    buffers = deque(_Buffer(size, device.type == "cuda") for _ in range(_BUFFERS))
    on_the_way: deque[tuple[_Piece, _Buffer, list[Future]]] = deque()
    with ThreadPoolExecutor(threads) as pool, closing(_pieces(readers, device, size)) as pieces:
        for piece in pieces:
            if piece.bytes is None:
                while on_the_way:
                    yield from _arrive(on_the_way, buffers)
                yield piece.name, piece.tensor
                continue
            if not buffers:
                yield from _arrive(on_the_way, buffers)
            buffer = buffers.popleft()
            buffer.wait()
            on_the_way.append((piece, buffer, _fill(pool, piece, buffer.view, threads)))
        while on_the_way:
            yield from _arrive(on_the_way, buffers)


def _arrive(on_the_way: deque, buffers: deque[_Buffer]) -> Iterator[tuple[str, Tensor]]:
    """Send the first piece to the device; its tensor, if that was the last of it."""
    piece, buffer, jobs = on_the_way.popleft()
    for job in jobs:
        job.result()
    buffer.copy_into(piece.bytes)
    buffers.append(buffer)
    if piece.last:
        yield piece.name, piece.tensor


def _fill(pool: ThreadPoolExecutor, piece: _Piece, view: memoryview, threads: int) -> list[Future]:
    """Fill the first bytes of `view` with the piece, in equal parts."""
    count = len(piece.bytes)
    part = max(-(-count // threads), _PART)
    starts = range(0, count, part)
    return [pool.submit(piece.fill, view[at : min(at + part, count)], piece.start + at) for at in starts]


def _pieces(readers: Iterable[tuple[str, Callable[[], Tensor]]], device: torch.device, size: int) -> Iterator[_Piece]:
    for name, reader in readers:
        source = reader()
        if source.device.type != "cpu" or not source.numel():
            yield _Piece(name, source.to(device), None, None, 0, True)
            continue
        fill = reader.fill if isinstance(reader, FileTensor) else _from_memory(source)
        target = torch.empty(source.shape, dtype=source.dtype, device=device)
        target_bytes = target.reshape(-1).view(torch.uint8)
        for start in range(0, len(target_bytes), size):
            part = target_bytes[start : start + size]
            yield _Piece(name, target, part, fill, start, last=start + size >= len(target_bytes))


def _from_memory(source: Tensor) -> Callable[[memoryview, int], None]:
    """What a FileTensor's `fill` is, of a tensor in host memory; mapped ones are read from their file in passing."""
    values = source.contiguous().reshape(-1).view(torch.uint8).numpy()

    def fill(view: memoryview, start: int) -> None:
        np.copyto(np.frombuffer(view, np.uint8), values[start : start + len(view)])

    return fill
