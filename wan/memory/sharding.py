"""Tensors that FSDP2 has sharded between processes (DTensors), and the full ones.

Files hold full tensors, so that a state or a LoRA does not depend on how many processes wrote it.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:  # importing it takes time, which runs in one process need not spend
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether each process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. Collective if it is sharded: every process has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of one that is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_like(example: Tensor, tensor: Tensor) -> Tensor:
    """Shards a full tensor, the same in all processes, like `example`, in its dtype and on its device."""
    if not is_sharded(example):
        return tensor.to(example)
    from torch.distributed.tensor import distribute_tensor

    local = local_shard(example)
    return distribute_tensor(tensor.to(local.device, local.dtype), example.device_mesh, example.placements)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with full tensors. Collective if they are sharded: every process has to call it."""
    return {name: mapped(value, full_tensor) for name, value in optimizer.state_dict().items()}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of `optimizer_state`. Raises ValueError or KeyError when the state is of other parameters."""
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if is_sharded(parameter) and torch.is_tensor(value) and value.shape == parameter.shape:
                values[name] = shard_like(parameter, value)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to each tensor in a nest of dicts and lists."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    return [mapped(part, change) for part in value] if isinstance(value, list) else value
