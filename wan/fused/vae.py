"""The VAE in 16 bits on CUDA: channels-last, normalisation and SiLU in one pass, attention by matrix products.

wan/nets/vae.py is the reference; weights and results are the same but for rounding.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from wan.nets.vae import CausalConv3d, ChannelNorm, FrameAttention, SiLU, WanVAE

Norm = Callable[[Tensor, Tensor, bool], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_SCORES = 1 << 26  # attention scores that are in memory at a time: 256 MB in float32


def fuse_vae_(vae: WanVAE, normalize: Norm | None = None, attend: Attend | None = None) -> None:
    """Lay the weights out for channels-last convolutions and fuse the operations between them; without gradients.

    normalize, attend: `channel_norm` of wan/fused/vae_kernels.py and `attention` below unless given.
    """
    if normalize is None:
        from wan.fused.vae_kernels import channel_norm

        normalize = channel_norm
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        elif isinstance(module, CausalConv3d):
            module.weight.data = _last_channels(module.weight.data)
        elif isinstance(module, ChannelNorm):
            module.operation = partial(_norm, normalize, False)
        elif isinstance(module, FrameAttention):
            module.operation = partial(_attend, attend or attention)
    for norm, silu in norms_before_silu(vae):
        norm.operation, silu.operation = partial(_norm, normalize, True), lambda x: x


def norms_before_silu(vae: WanVAE) -> Iterator[tuple[ChannelNorm, SiLU]]:
    """Pairs of layers that one kernel can compute."""
    for sequence in vae.modules():
        for first, second in pairwise(sequence) if isinstance(sequence, nn.Sequential) else ():
            if isinstance(first, ChannelNorm) and isinstance(second, SiLU):
                yield first, second


def _last_channels(weight: Tensor) -> Tensor:
    """[out, in, time, height, width], laid out as time, out, height, width, in: each tap is channels-last."""
    return weight.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)


def _norm(normalize: Norm, silu: bool, x: Tensor, gamma: Tensor) -> Tensor:
    """[B, C, T, H, W] or [B, C, H, W] -> the same"""
    if x.ndim == 4:
        return normalize(x, gamma, silu)
    frames = normalize(rearrange(x, "b c t h w -> (b t) c h w"), gamma, silu)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


def _attend(attend: Attend, qkv: Tensor) -> Tensor:
    """[N, L, 3 C] -> [N, L, C]"""
    return torch.stack([attend(*frame.chunk(3, dim=-1)) for frame in qkv])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [L, D] in 16 bits on CUDA. Scores are float32, probabilities 16 bits.

    D is 384 here, for which the attention kernels of torch are slow or missing.
    """
    from wan.fused.vae_kernels import softmax

    scale, together = q.shape[1] ** -0.5, max(_SCORES // len(k), 1)
    parts = (softmax(torch.mm(rows, k.t(), out_dtype=torch.float32), scale, q.dtype) for rows in q.split(together))
    return torch.cat([part @ v for part in parts])
