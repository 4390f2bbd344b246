"""Time and memory of each memory option of training: a DiT with random weights, LoRA rank 32, one item.

python benchmarks/memory_options.py                 the 14B model at 1024x1024, on a GPU
python benchmarks/memory_options.py --size tiny     a smoke test on a CPU, in seconds
"""

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from benchmarks.random_model import SPECS, loss_inputs, random_checkpoint
from wan.files.load import load_dit
from wan.lora.network import inject_lora_
from wan.lora.options import NetworkConfig
from wan.models.device import DeviceConfig
from wan.models.memory_options import TrainingMemoryConfig, apply_memory_options_
from wan.nets.spec import DiTSpec
from wan.training.loss import flow_matching_loss

FULL = {"gradient_checkpointing": "all"}
SWAP = FULL | {"use_pinned_memory_for_block_swap": True}
CASES = {
    "nothing recomputed": {},
    "gradient_checkpointing": FULL,
    "and cpu_offload": FULL | {"gradient_checkpointing_cpu_offload": True},
    "and fp8_base": FULL | {"fp8_base": True},
    "and fp8_base, fp8_scaled": FULL | {"fp8_base": True, "fp8_scaled": True},
    "and half of the blocks swapped": SWAP | {"blocks_to_swap": 0.5},
    "and nine tenths swapped, cpu_offload": SWAP | {"blocks_to_swap": 0.9, "gradient_checkpointing_cpu_offload": True},
    "and compile": FULL | {"compile": True},
}


def best_of(times: int, device: torch.device, work: Callable[[], None]) -> float:
    """Seconds of the quickest of several runs after one that is not counted."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def measure(spec: DiTSpec, settings: dict, side: int, repeat: int, device: torch.device) -> str:
    """One row for side x side pixels: peak memory of a step in GiB, seconds of a step and of a forward pass."""
    settings = settings | {"blocks_to_swap": int(settings.get("blocks_to_swap", 0) * spec.num_layers)}
    memory = TrainingMemoryConfig(**settings)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dit = load_dit("dit.safetensors", None, device, fp8=memory.fp8_kind, blocks_on_host=memory.blocks_to_swap)
    network = inject_lora_(dit, NetworkConfig(network_dim=32, network_alpha=32), device=device)
    apply_memory_options_(dit, memory, device)
    tensors = loss_inputs(spec, device, (side, side, 2))

    def step() -> None:
        for parameter in network.parameters():
            parameter.grad = None
        flow_matching_loss(dit, **tensors).mean().backward()

    def forward() -> None:
        with torch.no_grad():
            flow_matching_loss(dit, **tensors)

    dit.train()
    step_seconds = best_of(repeat, device, step)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    dit.eval()
    return f"{peak:.1f} | {step_seconds:.2f} | {best_of(repeat, device, forward):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SPECS, default="14B")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    device = DeviceConfig("cpu" if arguments.size == "tiny" else "cuda").resolve()
    side = 64 if arguments.size == "tiny" else arguments.side
    print("| options | peak of a step, GiB | step, s | forward, s |\n|---|---|---|---|")
    with random_checkpoint(SPECS[arguments.size], device):
        for name, settings in CASES.items():
            if settings.get("compile") and device.type == "cpu":
                continue
            try:
                row = measure(SPECS[arguments.size], settings, side, arguments.repeat, device)
            except torch.OutOfMemoryError:
                row = "does not fit | |"
            print(f"| {name} | {row} |", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
