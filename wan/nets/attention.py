"""The attention function the DiT is handed. Plain PyTorch is the reference; faster packages are chosen by name.

Each function takes q [B, L, N, D] and k, v [B, L', N, D] and returns softmax(q k^T / sqrt(D)) v as [B, L, N, D].
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.errors import ConfigError, suggest

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, in the dtype of the inputs."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, by cuDNN where it can: the fastest of torch's on Hopper GPUs."""
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return sdpa(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*_halves(q, k, v)).to(q.dtype)


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3 (arXiv 2407.08608), for Hopper GPUs. Older versions also return the softmax normaliser."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*_halves(q, k, v))
    return (out[0] if isinstance(out, tuple) else out).to(q.dtype)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' memory-efficient attention."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def sageattn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention (arXiv 2410.02367): 8-bit scores, no backward pass. NHD is its name for [B, L, N, D]."""
    from sageattention import sageattn as attend

    return attend(*_halves(q, k, v), tensor_layout="NHD").to(q.dtype)


def _halves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float32 becomes bfloat16, as in the official flash_attention: the packages take 16-bit numbers only."""
    return tuple(tensor.bfloat16() if tensor.dtype == torch.float32 else tensor for tensor in tensors)


# name -> (function, module it imports, what to install)
_BACKENDS: dict[str, tuple[Attention, str, str]] = {
    "torch": (sdpa, "torch", "torch"),
    "sdpa": (sdpa, "torch", "torch"),
    "cudnn": (cudnn, "torch", "torch"),
    "flash": (flash2, "flash_attn", "flash-attn"),
    "flash2": (flash2, "flash_attn", "flash-attn"),
    "flash3": (flash3, "flash_attn_interface", "flash-attn-3 (the folder hopper of flash-attention)"),
    "xformers": (xformers, "xformers", "xformers"),
    "sageattn": (sageattn, "sageattention", "sageattention"),
}


def select_attention(name: str, flag: str | None = None) -> Attention:
    """The backend called `name`; ConfigError when there is none or its package is missing.

    flag: the words of the user that ask for it, for the message; default `--attn_mode <name>`.
    """
    flag = flag or f"--attn_mode {name}"
    if name not in _BACKENDS:
        raise ConfigError(f"{flag}: unknown{suggest(name, _BACKENDS) or '; use --attn_mode sdpa'}")
    function, module, package = _BACKENDS[name]
    if find_spec(module) is None:
        substitute = "--attn_mode sdpa" if flag.startswith("--attn_mode") else "--sdpa"
        raise ConfigError(f"{flag} needs the package {package}; install it or use {substitute}")
    return function
