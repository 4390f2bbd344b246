"""Weights on their way from a file to a GPU: threads fill page-locked buffers, out of which the GPU copies.

A plain copy from a mapped file takes turns: one thread waits for the disk or the page cache, then the GPU for that
thread. Here both work at the same time, and many threads read.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
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
    """A tensor whose bytes lie in a file in one piece, in row-major order and the byte order of the machine."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        """The mapped tensor; what is written to it does not reach the file. OSError when the file ends too early.

        Each tensor is mapped alone, because Linux refuses to map a file that is larger than the memory of the machine.
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
        """Fill `view` with the bytes of the tensor from `start` on. Raises OSError when the file ends too early."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self.path}: ends too early")
                view = view[count:]


class _Buffer:
    """Page-locked memory that the GPU copies out of, in order and while Python goes on."""

    def __init__(self, size: int, on_gpu: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self.view = self.memory.numpy().data
        self._copied = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        """Return when the last copy is over, so that the memory may be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_into(self, target: Tensor) -> None:
        """Start to copy the first bytes into `target`, uint8 [bytes] on the GPU."""
        target.copy_(self.memory[: len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class _Chunk(NamedTuple):
    """The part of a tensor that fits into a buffer."""

    name: str
    tensor: Tensor  # on the device, complete with its last chunk
    bytes: Tensor  # the part of it, uint8
    fill: Callable[[memoryview, int], None]  # (view, first byte in the tensor): fills the view
    start: int  # first byte of the part in the tensor
    last: bool


class _Ready(NamedTuple):
    """A tensor that needs no buffer: it is empty, or its reader has put it on a device already."""

    name: str
    tensor: Tensor


_Upload = tuple[_Chunk, _Buffer, list[Future[None]]]


def staged(
    readers: Iterable[tuple[str, Callable[[], Tensor]]],
    device: torch.device,
    size: int = _BUFFER,
    threads: int = THREADS,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) in the order of `readers`, whose next tensors are read and copied meanwhile.

    The copies run in the current stream, so that whatever is done with a tensor there comes after them. size: bytes of
    a buffer. Raises what the readers raise.
    """
    buffers = deque(_Buffer(size, device.type == "cuda") for _ in range(_BUFFERS))
    uploads: deque[_Upload] = deque()
    with ThreadPoolExecutor(threads) as pool, closing(_chunks(readers, device, size)) as chunks:
        for chunk in chunks:
            if isinstance(chunk, _Ready):
                while uploads:
                    yield from _upload_next(uploads, buffers)
                yield chunk.name, chunk.tensor
                continue
            if not buffers:
                yield from _upload_next(uploads, buffers)
            buffer = buffers.popleft()
            buffer.wait()
            uploads.append((chunk, buffer, _fill(pool, chunk, buffer.view, threads)))
        while uploads:
            yield from _upload_next(uploads, buffers)


def _upload_next(uploads: deque[_Upload], buffers: deque[_Buffer]) -> Iterator[tuple[str, Tensor]]:
    """Send the first chunk to the device; yields its tensor when that was the last chunk of it."""
    chunk, buffer, jobs = uploads.popleft()
    for job in jobs:
        job.result()
    buffer.copy_into(chunk.bytes)
    buffers.append(buffer)
    if chunk.last:
        yield chunk.name, chunk.tensor


def _fill(pool: ThreadPoolExecutor, chunk: _Chunk, view: memoryview, threads: int) -> list[Future[None]]:
    """Let threads fill the first bytes of `view` with the chunk, in equal parts."""
    count = len(chunk.bytes)
    part = max(-(-count // threads), _PART)
    starts = range(0, count, part)
    return [pool.submit(chunk.fill, view[at : min(at + part, count)], chunk.start + at) for at in starts]


def _chunks(
    readers: Iterable[tuple[str, Callable[[], Tensor]]], device: torch.device, size: int
) -> Generator[_Chunk | _Ready, None, None]:
    for name, reader in readers:
        source = reader()
        if source.device.type != "cpu" or not source.numel():
            yield _Ready(name, source.to(device))
            continue
        fill = reader.fill if isinstance(reader, FileTensor) else _from_memory(source)
        target = torch.empty(source.shape, dtype=source.dtype, device=device)
        target_bytes = target.reshape(-1).view(torch.uint8)
        for start in range(0, len(target_bytes), size):
            part = target_bytes[start : start + size]
            yield _Chunk(name, target, part, fill, start, last=start + size >= len(target_bytes))


def _from_memory(source: Tensor) -> Callable[[memoryview, int], None]:
    """`FileTensor.fill` for a tensor in host memory; one that is mapped is read from its file on the way."""
    values = source.contiguous().reshape(-1).view(torch.uint8).numpy()

    def fill(view: memoryview, start: int) -> None:
        np.copyto(np.frombuffer(view, np.uint8), values[start : start + len(view)])

    return fill
