"""How much memory of a GPU a run is expected to need, in parts. Measured figures: docs/performance.md."""

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import nn

from dataset.loader import BucketCount
from wan.lora.files import LoRAFile
from wan.lora.network import LoRANetwork, inject_lora_
from wan.lora.options import NetworkConfig
from wan.memory.block_swap import SLOTS
from wan.memory.fp8 import quantize
from wan.memory.margins import TRAINED_BYTES
from wan.memory.sharding import local_shard
from wan.models.checkpoints import DiTCheckpoint
from wan.models.memory_options import MemoryConfig, TrainingMemoryConfig
from wan.nets.dit import WanDiT
from wan.nets.spec import CLIP_IMAGES, CLIP_TOKENS, TEXT_LENGTH, DiTSpec

Parts = dict[str, float]  # what -> bytes

_ACTIVATION_BYTES = 64  # per token and channel of a block whose activations are kept
_CHECKPOINT_BYTES = 4  # per token and channel of a recomputed block: its float32 input
_PROMPTS = 2  # that a guided step keeps keys and values of, in all blocks
_KEPT_BYTES = 4  # of a key and a value in 16 bits
_PASS_BYTES = 32  # per token and channel while a block computes without gradients; half of what training keeps


@overload
def meta_dit(checkpoint: DiTCheckpoint, dtype: torch.dtype, memory: MemoryConfig) -> tuple[WanDiT, None]: ...


@overload
def meta_dit(
    checkpoint: DiTCheckpoint,
    dtype: torch.dtype,
    memory: MemoryConfig,
    network: NetworkConfig,
    weights: LoRAFile | None = None,
) -> tuple[WanDiT, LoRANetwork]: ...


def meta_dit(
    checkpoint: DiTCheckpoint,
    dtype: torch.dtype,
    memory: MemoryConfig,
    network: NetworkConfig | None = None,
    weights: LoRAFile | None = None,
) -> tuple[WanDiT, LoRANetwork | None]:
    """On the meta device, what the options keep on the real one: of blocks in host memory the two that are in use.

    Of a network all layers are trained, those of left-out blocks too.
    """
    with torch.device("meta"):
        dit = WanDiT(checkpoint.spec).to(dtype).requires_grad_(False)
        made = inject_lora_(dit, network, weights=weights) if network else None
    if memory.fp8_kind:
        for module in dit.blocks.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                quantized, scale = quantize(module.weight, memory.fp8_kind)
                module.weight = nn.Parameter(quantized, requires_grad=False)
                if scale is not None:
                    module.scale_weight = nn.Parameter(scale, requires_grad=False)
    dit.blocks = dit.blocks[: len(dit.blocks) - max(0, memory.blocks_to_swap - SLOTS)]
    return dit, made


def frozen_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that are not trained, as far as they are in this process."""
    frozen = [tensor for tensor in module.parameters() if not tensor.requires_grad]
    return sum(local_shard(tensor).numel() * tensor.itemsize for tensor in frozen)


def largest_batch(buckets: Iterable[BucketCount]) -> int:
    """Tokens of the largest batch."""
    return max(min(bucket.batch_size, bucket.items) * bucket.tokens for bucket in buckets)


def training_parts(
    frozen: int, network: LoRANetwork, spec: DiTSpec, tokens: int, memory: TrainingMemoryConfig
) -> Parts:
    """The peak of a training step in this process. frozen: bytes; tokens: of the largest batch."""
    block = tokens * spec.dim
    if memory.gradient_checkpointing != "none":
        kept = 0 if memory.gradient_checkpointing_cpu_offload else spec.num_layers * _CHECKPOINT_BYTES
        activations = block * (kept + _ACTIVATION_BYTES)
    else:
        activations = block * spec.num_layers * _ACTIVATION_BYTES
    trained = sum(local_shard(parameter).numel() for parameter in network.parameters()) * TRAINED_BYTES
    return {"frozen weights": frozen, "LoRA and optimizer": trained, "activations": activations}


def generation_parts(frozen: int, spec: DiTSpec, tokens: int) -> Parts:
    """The peak of denoising. tokens: of one forward pass."""
    images = CLIP_IMAGES[spec.model_type]
    rows = _PROMPTS * (TEXT_LENGTH + images * CLIP_TOKENS)
    return {
        "DiT": frozen,
        "keys and values": rows * spec.dim * spec.num_layers * _KEPT_BYTES,
        "activations": tokens * spec.dim * _PASS_BYTES,
    }


def offloaded_bytes(spec: DiTSpec, tokens: int) -> int:
    """Bytes that --gradient_checkpointing_cpu_offload keeps in host memory."""
    return tokens * spec.dim * spec.num_layers * _CHECKPOINT_BYTES


def describe_parts(parts: Parts) -> str:
    """`about 42 GB: frozen weights 32.8 GB, ...`"""
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"about {format_bytes(sum(parts.values()))}: {listed}"


def expected_memory(
    dit: nn.Module,
    network: LoRANetwork,
    spec: DiTSpec,
    buckets: Sequence[BucketCount],
    memory: TrainingMemoryConfig,
) -> str:
    """`told` of a training step of a loaded DiT; of swapped blocks it holds the two buffers."""
    return describe_parts(training_parts(frozen_bytes(dit), network, spec, largest_batch(buckets), memory))


def format_bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


_H100_FLOPS = 2.8e14  # a second: the forward pass of docs/performance.md, 8192 tokens in 0.89 s


def pass_flops(spec: DiTSpec, tokens: int, context: int = 0) -> tuple[float, float]:
    """Floating point operations of the matrix products and of the attention in a forward pass of one item.

    2 per weight and token; 4 per channel and pair of tokens, self attention and cross attention to `context` tokens of
    text and image. Projecting text and image is left out: it is done once for all steps.
    """
    per_block = 6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim  # q, k, v, o; q and o of the text; both layers of the ffn
    products, attention = 2.0 * tokens * per_block, 4.0 * tokens * (tokens + context) * spec.dim
    return spec.num_layers * products, spec.num_layers * attention


def forward_flops(spec: DiTSpec, tokens: int) -> float:
    """`pass_flops` in all, without text and image."""
    return sum(pass_flops(spec, tokens))


def time_text(flops: float) -> str:
    """On the one GPU that was measured; others differ."""
    seconds = flops / _H100_FLOPS
    shown = f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{flops / 1e12:.3g} TFLOP, about {shown} on an H100 without fp8 and compiling"
