"""The attention function the DiT is handed. Plain PyTorch is the reference; others would be added here, by name."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from utils.errors import ConfigError, suggest

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask. q: [B, L, N, D]; k, v: [B, L', N, D]. Returns [B, L, N, D]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


_BACKENDS: dict[str, Attention] = {"sdpa": sdpa, "torch": sdpa}
_NOT_SUPPORTED = ("flash", "flash2", "flash3", "sageattn", "xformers")


def select_attention(name: str) -> Attention:
    """The backend called `name` on the command line; ConfigError for one that is missing or unknown."""
    if name in _NOT_SUPPORTED:
        raise ConfigError(f"--attn_mode {name}: not supported yet; use --attn_mode sdpa")
    if name not in _BACKENDS:
        raise ConfigError(f"--attn_mode {name}: unknown{suggest(name, _BACKENDS) or '; use --attn_mode sdpa'}")
    return _BACKENDS[name]
