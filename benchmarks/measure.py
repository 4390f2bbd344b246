"""Timing, rows of a table, and the device's ceilings: the parts that all benchmarks use."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from wan.memory.fp8 import product_of_rows, quantize_rows
from wan.nets.attention import cudnn
from wan.nets.spec import DiTSpec

HEADER = "| work | ms | TFLOP/s | floor, ms | share of it | peak GB | warm-up, s | |\n|---|---|---|---|---|---|---|---|"


def last_line(error: Exception) -> str:
    """Last line of an error, for a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[-1][:300]}"


@dataclass
class Bench:
    """Where and how rows are measured."""

    device: torch.device
    spec: DiTSpec
    repeat: int
    only: list[str]  # words: rows whose names contain none of them are left out
    profiled: str | None  # name of the row whose kernels are printed
    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s and B/s

    @property
    def tiny(self) -> bool:
        return self.device.type == "cpu"

    def wants(self, name: str) -> bool:
        return self.profiled == name or not self.only or any(word in name for word in self.only)

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeat: int | None = None) -> tuple[float, float]:
        """Median of the runs, and the first one, which does not count."""
        found = []
        for _ in range((repeat or self.repeat) + 1):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:]), found[0]

    def row(
        self,
        name: str,
        prepare: Callable[[], tuple[Callable[[], object], str]],
        flops: tuple[float, float] | None = None,
        kind: str = "bf16",
        load: Callable[[], object] = bool,
    ) -> None:
        """Measure and print one row. prepare: makes the work and a note, which counts as warm-up. flops: of the matrix
        products, which `kind` names the ceiling of, and of attention. load: what comes before and does not count.
        """
        if not self.wants(name):
            return
        try:
            load()
            start = time.perf_counter()
            work, note = prepare()
            self.synchronize()
            prepared = time.perf_counter() - start
            if not self.tiny:
                torch.cuda.reset_peak_memory_stats()
            median, first = self.seconds(work)
            peak = 0.0 if self.tiny else torch.cuda.max_memory_allocated() / 1e9
            speed = " | |"
            if flops:
                floor = flops[0] / self.ceilings[kind] + flops[1] / self.ceilings["attention"]
                speed = f"{sum(flops) / median / 1e12:.0f} | {1e3 * floor:.1f} | {floor / median:.0%}"
            print(
                f"| {name} | {1e3 * median:.2f} | {speed} | {peak:.1f} | {prepared + first:.2f} | {note} |", flush=True
            )
            if self.profiled == name:
                self.profile(work)
        except Exception as error:
            print(f"| {name} | {last_line(error)} | | | | | | |", flush=True)
        work = None
        self.free()

    def free(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    def profile(self, work: Callable[[], object]) -> None:
        """Print what takes the longest in one run."""
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CPU if self.tiny else kind.CUDA]) as profiler:
            work()
            self.synchronize()
        key = "self_cpu_time_total" if self.tiny else "self_cuda_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90), flush=True)


def measure_ceilings(bench: Bench) -> None:
    """Print and keep what the device reaches at one thing alone."""
    size, length, heads = (64, 32, 2) if bench.tiny else (8192, 8192, 40)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    q = torch.randn(1, length, heads, 128, device=bench.device, dtype=dtype)
    source = torch.empty(1 << (16 if bench.tiny else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    cases = {
        "bf16": (2 * size**3, "FLOP", lambda: a @ b),
        "attention": (4 * length**2 * heads * 128, "FLOP", lambda: cudnn(q, q, q)),
        "copy": (2 * source.numel(), "B", lambda: target.copy_(source)),
    }
    if bench.tiny or torch.cuda.get_device_capability() >= (8, 9):
        rows = quantize_rows(a), quantize_rows(b)
        cases["fp8"] = 2 * size**3, "FLOP", lambda: product_of_rows(*rows, None, dtype)
    if not bench.tiny:
        pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        cases["host to device"] = pinned.numel(), "B", lambda: target.copy_(pinned, non_blocking=True)
    for name, (amount, unit, work) in cases.items():
        try:
            bench.ceilings[name] = amount / bench.seconds(work, 10)[0]
            print(f"ceiling, {name}: {bench.ceilings[name] / 1e12:.3f} T{unit}/s", flush=True)
        except Exception as error:
            bench.ceilings[name] = float("nan")
            print(f"ceiling, {name}: {last_line(error)}", flush=True)
