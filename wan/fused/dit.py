"""The blocks of a DiT with their elementwise work fused into few passes over memory. Same weights, same results.

wan/nets/dit.py is the reference. What differs is rounding: a normalisation and what follows it are rounded once
instead of after each step, so that the error against float64 is no larger.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.lora.layers import LoRALinear
from wan.lora.product import cast_low_rank, lora_products
from wan.memory.fp8 import Fp8Linear, Fp8Rows, product_of_rows
from wan.memory.recompute import is_recomputing, recomputed
from wan.nets.attention import cudnn, sdpa
from wan.nets.dit import (
    Block,
    Context,
    CrossAttention,
    Head,
    KeysValues,
    Linear32,
    SelfAttention,
    WanDiT,
    run_layers,
    split_heads,
)
from wan.nets.spec import PATCH

_AMPERE = (8, 0)  # the compute capability from which GPUs compute in bfloat16
_HOPPER = (9, 0)  # the compute capability from which cuDNN's attention is the fastest of torch's


class Residual(NamedTuple):
    """The residual stream between two blocks: stream + addend * gate, which the next normalisation adds up."""

    stream: Tensor  # [B, L, dim] float32
    addend: Tensor  # [B, L, dim]
    gate: Tensor  # [B, dim] float32


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels run there."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE


def fuse_(dit: WanDiT, device: torch.device, swapped: int = 0, operations: ModuleType | None = None) -> None:
    """Let the blocks and the head of `dit` compute with fused operations, those of wan/fused/kernels.py unless given.

    swapped: of that many blocks, the last ones, the weights will move, so that q, k and v can't be one matrix. The
    blocks keep the attention function they were handed, but torch's own becomes cuDNN's on the GPUs it is made for.
    """
    if operations is None:
        from wan.fused import kernels as operations

    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER:
        for module in dit.modules():
            if isinstance(module, SelfAttention | CrossAttention) and module.attention is sdpa:
                module.attention = cudnn
    for layer in (*dit.time_embedding, *dit.time_projection):
        if isinstance(layer, Linear32):
            layer.forward = partial(_linear32, layer, operations)
    dit.patch_embedding.forward = partial(_patches, dit.patch_embedding)
    for number, block in enumerate(dit.blocks):
        block.forward = _FusedBlock(block, operations, one_matrix=number < len(dit.blocks) - swapped)
    dit.head.forward = partial(_head, dit.head, operations)


def _patches(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, as one matrix product: [B, C, F, H, W] -> [B, dim, f, h, w]."""
    p, q, r = PATCH
    patches = rearrange(x, "b c (f p) (h q) (w r) -> b f h w (c p q r)", p=p, q=q, r=r)
    return rearrange(F.linear(patches, layer.weight.flatten(1), layer.bias), "b f h w d -> b d f h w")


def _linear32(layer: Linear32, operations: ModuleType, x: Tensor) -> Tensor:
    return operations.linear32(x.float(), layer.weight, layer.bias)


def _head(head: Head, operations: ModuleType, x: Tensor | Residual, time: Tensor) -> Tensor:
    shift, scale = (head.modulation + time[:, None]).unbind(1)
    eps = head.norm.eps
    if isinstance(x, Residual):
        return head.head(operations.residual_norm_(*x, scale, shift, eps, True, torch.float32))
    return head.head(operations.residual_norm(x, None, None, scale, shift, eps, True, torch.float32)[1])


class _FusedBlock:
    """In place of `Block.forward`."""

    def __init__(self, block: Block, operations: ModuleType, one_matrix: bool) -> None:
        self.block, self.operations, self.one_matrix = block, operations, one_matrix
        self.plain = block.forward
        attention, cross = block.self_attn, block.cross_attn
        self.norms = [block.norm3, attention.norm_q, attention.norm_k, cross.norm_q, block]

    def __call__(
        self,
        x: Tensor | Residual,
        modulation: Tensor,
        context: Context,
        cos: Tensor,
        sin: Tensor,
        save_less: bool = False,
    ) -> Tensor | Residual:
        """As `Block.forward`; without gradients the last addition is left to who reads the result.

        save_less: of what backward needs, normalisations, rotations and GELU are made again.
        """
        if not torch.is_grad_enabled():
            return self.infer(x, modulation, context, cos, sin)
        trained = any(parameter.requires_grad for norm in self.norms for parameter in norm.parameters(recurse=False))
        if trained or modulation.requires_grad:  # the kernels have gradients for neither
            return self.plain(x, modulation, context, cos, sin)
        return self.train(x, modulation, context, cos, sin, recomputed if save_less else _kept)

    def save_less(self, *inputs: Tensor | Context) -> Tensor:
        """The forward pass that keeps less for backward; see wan/memory/recompute.py."""
        return self(*inputs, save_less=True)

    def train(
        self,
        x: Tensor,
        modulation: Tensor,
        context: Context,
        cos: Tensor,
        sin: Tensor,
        again: Callable[..., AbstractContextManager[None]],
    ) -> Tensor:
        """Every operation has a gradient. again: `recomputed`, or what takes its place where tensors are kept."""
        block, run, dtype, eps = self.block, self.operations, context.tokens.dtype, self.block.norm1.eps
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).unbind(1)
        layers = self.layers_with_lora(dtype)

        def norm(x, addend, gate, *settings):
            x, h = run.residual_norm(x, addend, gate, *settings, dtype)
            return x, (h, lambda: run.residual_norm(x, None, None, *settings, dtype)[1])

        def rotate(y, norm, *angles):
            work = partial(run.rms_rope, y, norm.weight, *angles, norm.eps)
            return work(), work

        own = block.self_attn
        x, normed = norm(x.contiguous(), None, None, scale, shift, eps, True)
        with again(normed):
            q, k, v = layers(normed[0], own.q, own.k, own.v)
        q, k = rotate(q, own.norm_q, cos, sin), rotate(k, own.norm_k, cos, sin)
        with again(q, k):
            h = own.attention(split_heads(q[0]), split_heads(k[0]), split_heads(v)).flatten(2)
        (h,) = layers(h, own.o)

        weights, cross = block.norm3, block.cross_attn
        x, normed = norm(x, h, gate, weights.weight[None], weights.bias[None], eps, False)
        with again(normed):
            (q,) = layers(normed[0], cross.q)
        q, seen = rotate(q, cross.norm_q, None, None), cross.keys_values(context, layers)
        with again(q):
            h = self.attend(split_heads(q[0]), seen).flatten(2)
        (h,) = layers(h, cross.o)

        x, normed = norm(x, h, None, ffn_scale, ffn_shift, eps, True)
        first, gelu, last = block.ffn
        with again(normed):
            (h,) = layers(normed[0], first)
        hidden = gelu(h), partial(gelu, h)
        with again(hidden):
            (h,) = layers(hidden[0], last, read=not is_recomputing())
        return run.residual_add(x, h, ffn_gate)

    def layers_with_lora(self, dtype: torch.dtype) -> Callable[..., Sequence[Tensor]]:
        """What takes the place of `run_layers`: layers of one input, all with LoRA, are one operation in `dtype`.

        Called in each pass, before any of them: the LoRA matrices of the block are cast together.
        """
        own, cross, (first, _, last) = self.block.self_attn, self.block.cross_attn, self.block.ffn
        groups = [(own.q, own.k, own.v), (own.o,), (cross.q,), (cross.k, cross.v), (cross.o,), (first,), (last,)]
        if cross.has_image:
            groups.append((cross.k_img, cross.v_img))
        groups = [
            group for group in groups if all(isinstance(one, LoRALinear) and one.uses_product_kernel for one in group)
        ]
        cast = dict(zip(groups, cast_low_rank(groups, dtype), strict=True)) if groups else {}

        def run(x: Tensor, *layers: nn.Module, read: bool = True) -> Sequence[Tensor]:
            return lora_products(x, layers, cast[layers], read) if layers in cast else run_layers(x, *layers)

        return run

    def infer(self, x: Tensor | Residual, modulation: Tensor, context: Context, cos: Tensor, sin: Tensor) -> Residual:
        """Writes over x."""
        block, run, dtype, eps = self.block, self.operations, context.tokens.dtype, self.block.norm1.eps
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).unbind(1)
        x, addend, addend_gate = x if isinstance(x, Residual) else (x.contiguous(), None, None)

        def norm_(addend, gate, scale, shift, modulated, layer):
            return run.residual_norm_(x, addend, gate, scale, shift, eps, modulated, dtype, _takes_rows(layer))

        own = block.self_attn
        q, k, v = self.project(norm_(addend, addend_gate, scale, shift, True, own.q))
        run.rms_rope_(q, own.norm_q.weight, cos, sin, own.norm_q.eps)
        run.rms_rope_(k, own.norm_k.weight, cos, sin, own.norm_k.eps)
        h = self.apply(own.o, own.attention(split_heads(q), split_heads(k), split_heads(v)).flatten(2))

        norm, cross = block.norm3, block.cross_attn
        h = norm_(h, gate, norm.weight[None], norm.bias[None], False, cross.q)
        q = run.rms_rope_(self.apply(cross.q, h), cross.norm_q.weight, None, None, cross.norm_q.eps)
        h = self.apply(cross.o, self.attend(split_heads(q), cross.keys_values(context)).flatten(2))
        h = norm_(h, None, ffn_scale, ffn_shift, True, block.ffn[0])
        return Residual(x, self.feed_forward(h), ffn_gate)

    def attend(self, q: Tensor, seen: KeysValues) -> Tensor:
        """As `CrossAttention.attend`; what the user chose for attention serves here too."""
        cross = self.block.cross_attn
        if cross.attention in (sdpa, cudnn):
            return self.operations.cross_attention(q, seen.keys, seen.values, seen.text_rows, seen.repeats)
        return cross.attend(q, seen)

    def project(self, h: Tensor | Fp8Rows) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, L, dim], in one product where their weights can lie in one matrix."""
        layers = self.block.self_attn.q, self.block.self_attn.k, self.block.self_attn.v
        if not self.one_matrix or any(type(layer) not in (nn.Linear, Fp8Linear) for layer in layers):
            return tuple(self.apply(layer, h) for layer in layers)
        if isinstance(h, Fp8Rows):
            names = ("quantized", "scale_weight", "bias")
            weight, scale, bias = (_joined([getattr(layer, name) for layer in layers]) for name in names)
            return product_of_rows(h, Fp8Rows(weight, scale), bias, layers[0].compute_dtype).chunk(3, dim=-1)
        if isinstance(layers[0], Fp8Linear):
            return tuple(layer(h) for layer in layers)
        weight, bias = (_joined([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.linear(h, weight, bias).chunk(3, dim=-1)

    def feed_forward(self, h: Tensor | Fp8Rows) -> Tensor:
        """[B, L, dim] -> [B, L, dim]"""
        first, gelu, last = self.block.ffn
        if _takes_rows(last):
            return self.apply(last, self.operations.quantized(self.apply(first, h), gelu=True))
        if type(first) is nn.Linear and first.weight.dtype != torch.float32:
            return last(self.operations.linear_gelu(h, first.weight, first.bias))
        return last(gelu(self.apply(first, h)))

    def apply(self, layer: nn.Module, h: Tensor | Fp8Rows) -> Tensor:
        if _takes_rows(layer):
            rows = h if isinstance(h, Fp8Rows) else self.operations.quantized(h)
            return product_of_rows(rows, Fp8Rows(layer.quantized, layer.scale_weight), layer.bias, layer.compute_dtype)
        return layer(h)


def _kept(*made: tuple[Tensor, Callable[[], Tensor]]) -> AbstractContextManager[None]:
    """In place of `recomputed`: autograd keeps the tensors themselves."""
    return nullcontext()


def _takes_rows(layer: nn.Module) -> bool:
    return isinstance(layer, Fp8Linear) and layer.kind == "rows"


@torch.inference_mode(False)  # else training could not use the parameters any more
@torch.no_grad()
def _joined(parts: list[nn.Parameter]) -> Tensor:
    """Parameters of one shape, stacked along their first axis: they become views of the result.

    When they have moved to another device since, they no longer are, and are joined anew.
    """
    first = parts[0]
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    storage = first.untyped_storage()
    step = first.numel() * first.itemsize
    together = storage.nbytes() >= len(parts) * step and all(
        part.data_ptr() == first.data_ptr() + i * step for i, part in enumerate(parts)
    )
    if not together:
        joined = torch.cat([part.data.view(torch.uint8) if part.itemsize == 1 else part.data for part in parts])
        for part, view in zip(parts, joined.view(first.dtype).split(first.shape[0]), strict=True):
            part.data = view
    return first.data.as_strided(shape, first.stride())
