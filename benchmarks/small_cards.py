"""`--memory auto` on smaller GPUs: a DiT of random weights with as much memory as a card of that size has.

    python benchmarks/small_cards.py                the 14B model at 1024x1024, on a larger GPU with a capped allocator
    python benchmarks/small_cards.py --size tiny    a smoke test on a CPU, in seconds

One control image, LoRA of rank 32. A step of training is forward, backward, clipping and AdamW; one of generation is
both passes of guidance as one batch.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from benchmarks.measure import Bench, last_line
from benchmarks.one_frame_speed import NETWORK, forward, gradients_of, optimizer_of, training_step
from benchmarks.random_model import SPECS, dit_inputs, latent_size, loss_inputs, random_checkpoint
from dataset.loader import BucketCount
from wan.files.load import load_dit
from wan.lora.network import inject_lora_
from wan.memory.margins import PLAN_MARGIN
from wan.models.device import DeviceConfig
from wan.models.memory_options import GenerationMemoryConfig, MemoryConfig, TrainingMemoryConfig, apply_memory_options_
from wan.models.plan import Plan, Room, plan_generation, plan_training
from wan.nets.context import StepCache
from wan.nets.tokens import token_count

CARDS = (  # what for, GB of the GPU and of the host
    *(("training", 24, 64), ("training", 24, 12), ("training", 16, 48), ("training", 12, 64)),
    *(("generation", 24, 64), ("generation", 16, 64), ("generation", 12, 64)),
)


def plan_for(bench: Bench, kind: str, card: float, host: float, side: int) -> Plan:
    """Choice of the planner for a card of that size, in GB, that nothing else uses, and so much host memory."""
    room = Room(card * 1e9 * (1 - PLAN_MARGIN), host * 1e9)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    latents = latent_size(side, side, frames=2)
    dit = SimpleNamespace(spec=bench.spec, stored_dtype=torch.bfloat16, dtype=dtype)
    if kind == "training":
        bucket = BucketCount(0, *latents, items=1, batch_size=1)
        return plan_training(dit, dtype, TrainingMemoryConfig(memory="auto"), NETWORK, None, [bucket], room)
    return plan_generation(dit, dtype, GenerationMemoryConfig(memory="auto"), 2 * token_count(latents, None), room)


def work_of(bench: Bench, kind: str, memory: MemoryConfig, side: int) -> Callable[[], object]:
    """A step with the DiT as the plan wants it."""
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    swapped = memory.blocks_to_swap
    dit = load_dit("dit.safetensors", dtype, bench.device, fp8=memory.fp8_kind, blocks_on_host=swapped)
    if kind == "generation":
        apply_memory_options_(dit, memory, bench.device)
        return partial(forward, dit, dit_inputs(bench.spec, bench.device, (side, side, 2), batch=2), StepCache())
    network = inject_lora_(dit, NETWORK, device=bench.device)
    apply_memory_options_(dit, memory, bench.device)
    gradients = gradients_of(dit.train(), network, recorded=memory.records(bench.device))
    inputs = loss_inputs(bench.spec, bench.device, (side, side, 2))
    return partial(training_step, network, gradients, optimizer_of(network), inputs)


def measure(bench: Bench, name: str, kind: str, card: float, host: float, side: int) -> str:
    """One row."""
    plan = plan_for(bench, kind, card, host, side)
    try:
        if not bench.tiny:
            torch.cuda.set_per_process_memory_fraction(card * 1e9 / torch.cuda.mem_get_info()[1])
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = bench.seconds(work_of(bench, kind, plan.memory, side))
        peak = 0.0 if bench.tiny else torch.cuda.max_memory_reserved() / 1e9
        return f"| {name} | {plan} | {peak:.1f} | {seconds:.2f} |"
    except torch.OutOfMemoryError as error:
        return f"| {name} | {plan} | {last_line(error)} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SPECS, default="14B")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names contain one of these words")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    device = DeviceConfig("cpu" if arguments.size == "tiny" else "cuda").resolve()
    side = 32 if arguments.size == "tiny" else arguments.side
    bench = Bench(device, SPECS[arguments.size], arguments.repeat, arguments.only, None)
    print("| card | options, and what they were expected to need | peak, GB | step, s |\n|---|---|---|---|")
    with random_checkpoint(bench.spec, device):
        for case in CARDS:
            name = "{}, {} GB, host {} GB".format(*case)
            if bench.wants(name):
                print(measure(bench, name, *case, side), flush=True)
                bench.free()


if __name__ == "__main__":
    main()
