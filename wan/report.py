"""What a run tells about itself before it starts."""

import math
from collections.abc import Sequence

from torch import nn

from dataset.loader import BucketCount, TrainingSet
from wan.config import VAE_STRIDE, DiTSpec
from wan.lora import LoRANetwork
from wan.memory import TrainingMemoryConfig
from wan.sharding import held_here

_TRAINED_BYTES = 16  # per number: weight, gradient and the two moments of AdamW, float32
_ACTIVATION_BYTES = 64  # per token and channel of a block whose activations are kept (docs/performance.md)
_CHECKPOINT_BYTES = 4  # per token and channel of a recomputed block: its float32 input


def start_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, a line each."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def dataset_rows(training_set: TrainingSet) -> list[tuple[str, str]]:
    """One row per dataset and size."""
    rows = [
        (
            f"dataset {bucket.dataset}",
            f"{bucket.items} items of {bucket.width * VAE_STRIDE}x{bucket.height * VAE_STRIDE} in {bucket.batches} "
            f"batches, {bucket.frames} frames",
        )
        for bucket in training_set.buckets
    ]
    held_back = len(training_set.validation.items)
    return [*rows, ("validation", f"{held_back} items")] if held_back else rows


def expected_memory(
    dit: nn.Module, network: LoRANetwork, spec: DiTSpec, buckets: Sequence[BucketCount], memory: TrainingMemoryConfig
) -> str:
    """An estimate of the peak of a training step in this process: weights, what is trained, activations of the largest
    batch."""
    frozen = [tensor for tensor in dit.parameters() if not tensor.requires_grad]  # of swapped blocks: the two buffers
    weights = sum(held_here(tensor).numel() * tensor.itemsize for tensor in frozen)
    trained = sum(held_here(parameter).numel() for parameter in network.parameters()) * _TRAINED_BYTES
    tokens = max(
        min(bucket.batch_size, bucket.items) * bucket.frames * bucket.height * bucket.width // 4 for bucket in buckets
    )
    block = tokens * spec.dim
    if memory.gradient_checkpointing != "none":
        kept = 0 if memory.gradient_checkpointing_cpu_offload else spec.num_layers * _CHECKPOINT_BYTES
        activations = block * (kept + _ACTIVATION_BYTES)
    else:
        activations = block * spec.num_layers * _ACTIVATION_BYTES
    parts = [("frozen weights", weights), ("LoRA and optimizer", trained), ("activations", activations)]
    total = math.ceil(sum(size for _, size in parts) / 1e9)
    return f"about {total} GB: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts)
