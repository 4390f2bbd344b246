"""Tensors that FSDP2 has shared out between processes (DTensors), and what they are as a whole.

Files hold whole tensors, so that a state or a LoRA does not depend on how many processes wrote it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; of a shared one every process has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of one that is not shared out, all."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_like(example: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, whole and the same in all processes, in the dtype of `example` and shared out like it."""
    if not is_sharded(example):
        return tensor.to(example)
    from torch.distributed.tensor import distribute_tensor

    local = local_shard(example)
    return distribute_tensor(tensor.to(local.device, local.dtype), example.device_mesh, example.placements)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` of whole tensors; with shared ones every process has to ask."""
    return mapped(optimizer.state_dict(), full_tensor)


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of `optimizer_state`. Raises ValueError or KeyError when it is of other parameters."""
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if is_sharded(parameter) and torch.is_tensor(value) and value.shape == parameter.shape:
                values[name] = shard_like(parameter, value)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nest of dicts and lists with `change` of each tensor in it."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    return [mapped(part, change) for part in value] if isinstance(value, list) else value
