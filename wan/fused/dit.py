"""A DiT with its elementwise operations fused into few passes over memory. Same weights, same results.

wan/nets/dit.py is the reference. Only rounding differs: a normalisation and the operations after it are rounded once
instead of after each step, so that the error against float64 is no larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.lora.layers import LoRALinear
from wan.lora.product import cast_low_rank, lora_products
from wan.memory.fp8 import Fp8Linear, Fp8Rows, product_of_rows
from wan.memory.runner import Recipe, Saving, SavingRunner
from wan.nets.attention import cudnn, sdpa
from wan.nets.context import Context, KeysValues, Prepared
from wan.nets.dit import (
    Block,
    BlockRunner,
    CrossAttention,
    Head,
    Linear32,
    RMSNorm,
    SelfAttention,
    Shared,
    WanDiT,
    split_heads,
    timestep_features,
)
from wan.nets.spec import PATCH, TEXT_LENGTH
from wan.nets.tokens import FrameSizes, inner_tokens, token_grid, with_padding

if TYPE_CHECKING:
    from typing_extensions import Unpack

_AMPERE = (8, 0)  # the compute capability from which GPUs compute in bfloat16
_HOPPER = (9, 0)  # the compute capability from which cuDNN's attention is the fastest of torch's


class Residual(NamedTuple):
    """The residual stream between two blocks, stream + addend * gate; the next normalisation computes the sum."""

    stream: Tensor  # [B, L, dim] float32
    addend: Tensor  # [B, L, dim]
    gate: Tensor  # [B, dim] float32


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels run on the device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE


def fuse_(dit: WanDiT, device: torch.device, swapped: int = 0, operations: ModuleType | None = None) -> None:
    """Let `dit` compute with fused operations, those of wan/fused/kernels.py unless given.

    swapped: of that many blocks, the last ones, the weights will move, so that q, k and v can't be one matrix. The
    blocks keep the attention function they were handed, but torch's own becomes cuDNN's on the GPUs it is made for.
    """
    if operations is None:
        from wan.fused import kernels

        operations = kernels
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER:
        for module in dit.modules():
            if isinstance(module, SelfAttention | CrossAttention) and module.attention is sdpa:
                module.attention = cudnn
    dit.runner = FusedBlocks(dit, dit.runner, operations, swapped)
    dit.pass_runner = partial(_predict, operations)


def _predict(
    operations: ModuleType,
    dit: WanDiT,
    latents: Tensor,
    channels: Tensor | None,
    timesteps: Tensor,
    prepared: Prepared,
    skip_blocks: frozenset[int],
    frame_sizes: FrameSizes | None,
) -> Tensor:
    """`WanDiT.predict`, whose blocks hand each other a Residual where no gradients are asked for."""
    x = latents if channels is None else torch.cat([latents, channels], dim=1)
    x, grid = _patches(dit.patch_embedding, x.to(dit.dtype)), token_grid(latents.shape[2:])
    x = inner_tokens(rearrange(x, "b d f h w -> b (f h w) d"), grid, frame_sizes).float()
    time = _in_float32(operations, dit.time_embedding, timestep_features(timesteps, dit.spec.freq_dim))
    modulation = _in_float32(operations, dit.time_projection, time).unflatten(1, (6, -1))
    for number, block in enumerate(dit.blocks):
        if number not in skip_blocks:
            x = block(x, modulation, prepared.contexts[number], prepared.cos, prepared.sin, runner=dit.runner)
    return dit.unpatchify(with_padding(_head(dit.head, operations, x, time), grid, frame_sizes), grid)


def _patches(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, as one matrix product: [B, C, F, H, W] -> [B, dim, f, h, w]."""
    p, q, r = PATCH
    patches = rearrange(x, "b c (f p) (h q) (w r) -> b f h w (c p q r)", p=p, q=q, r=r)
    return rearrange(F.linear(patches, layer.weight.flatten(1), layer.bias), "b f h w d -> b d f h w")


def _in_float32(operations: ModuleType, layers: nn.Sequential, x: Tensor) -> Tensor:
    """layers(x), [B, in] -> [B, out] float32."""
    for layer in layers:
        x = operations.linear32(x.float(), layer.weight, layer.bias) if isinstance(layer, Linear32) else layer(x)
    return x


def _head(head: Head, operations: ModuleType, x: Tensor | Residual, time: Tensor) -> Tensor:
    """`Head.forward`, of a Residual too."""
    shift, scale = (head.modulation + time[:, None]).unbind(1)
    settings = {"eps": head.norm.eps, "modulated": True, "dtype": torch.float32}
    if isinstance(x, Residual):
        return head.head(operations.residual_norm_(*x, scale, shift, **settings))
    return head.head(operations.residual_norm(x, None, None, scale, shift, **settings)[1])


class FusedBlocks(SavingRunner):
    """Runs blocks with fused operations. Without gradients the last addition is left to the next block or the head."""

    saves_less = True

    def __init__(self, dit: WanDiT, runner: BlockRunner, operations: ModuleType, swapped: int) -> None:
        """runner: for blocks with trained parameters that the operations have no gradient for."""
        self._plain, last = runner, len(dit.blocks) - swapped
        self.blocks = {
            block: _FusedBlock(block, operations, one_matrix=number < last)
            for number, block in enumerate(dit.blocks)
            if isinstance(block, Block)
        }

    def run(self, saving: Saving, block: Block, x: Tensor, *shared: Unpack[Shared]) -> Tensor:
        fused = self.blocks[block]
        if not torch.is_grad_enabled():
            return cast(Tensor, fused.infer(x, *shared))  # read by `infer` or `_head` alone
        trained = any(parameter.requires_grad for norm in fused.norms for parameter in norm.parameters(recurse=False))
        modulation, *_ = shared
        if trained or modulation.requires_grad:  # the kernels have gradients for neither
            return self._plain(block, x, *shared)
        return fused.train(saving, x, *shared)


class _FusedBlock:
    """`Block.compute` of one block by fused operations."""

    def __init__(self, block: Block, operations: ModuleType, one_matrix: bool) -> None:
        self.block, self.operations, self.one_matrix = block, operations, one_matrix
        attention, cross = block.self_attn, block.cross_attn
        self.norms = [block.norm3, attention.norm_q, attention.norm_k, cross.norm_q, block]

    def train(
        self, saving: Saving, x: Tensor, modulation: Tensor, context: Context, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """With gradients. To save less, normalisations, rotations and GELU are recomputed in backward."""
        block, run, dtype, eps = self.block, self.operations, context.tokens.dtype, self.block.norm1.eps
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).unbind(1)
        layers = self.layers_with_lora(dtype)

        def norm(
            x: Tensor, addend: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, modulated: bool
        ) -> tuple[Tensor, Recipe]:
            settings = scale, shift, eps, modulated, dtype
            x, h = run.residual_norm(x, addend, gate, *settings)
            return x, (h, lambda: run.residual_norm(x, None, None, *settings)[1])

        def rotate(y: Tensor, norm: RMSNorm, cos: Tensor | None, sin: Tensor | None) -> Recipe:
            work = partial(run.rms_rope, y, norm.weight, cos, sin, norm.eps)
            return work(), work

        def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rotated_q, rotated_k = rotate(q, own.norm_q, cos, sin), rotate(k, own.norm_k, cos, sin)
            with saving.recipes(rotated_q, rotated_k):
                return own.attention(split_heads(rotated_q[0]), split_heads(rotated_k[0]), split_heads(v)).flatten(2)

        def cross_attention(q: Tensor) -> Tensor:
            normed, seen = rotate(q, cross.norm_q, None, None), self.keys_values(context, layers)
            with saving.recipes(normed):
                return self.attend(split_heads(normed[0]), seen).flatten(2)

        own, cross, weights = block.self_attn, block.cross_attn, block.norm3
        x, normed = norm(x.contiguous(), None, None, scale, shift, True)
        with saving.recipes(normed):
            q, k, v = layers(normed[0], own.q, own.k, own.v)
        (h,) = layers(self_attention(q, k, v), own.o)

        x, normed = norm(x, h, gate, weights.weight[None], weights.bias[None], False)
        with saving.recipes(normed):
            (q,) = layers(normed[0], cross.q)
        (h,) = layers(cross_attention(q), cross.o)

        x, normed = norm(x, h, None, ffn_scale, ffn_shift, True)
        first, gelu, last = block.ffn
        with saving.recipes(normed):
            (h,) = layers(normed[0], first)
        hidden = gelu(h), partial(gelu, h)
        with saving.recipes(hidden):
            (h,) = layers(hidden[0], last, read=not saving.repeated)
        return run.residual_add(x, h, ffn_gate)

    def keys_values(self, context: Context, layers: Callable[..., Sequence[Tensor]]) -> KeysValues:
        """`CrossAttention.keys_values` with the projections of one input made by `layers`."""
        if context.kept is not None:
            return context.kept
        cross = self.block.cross_attn
        keys, values = layers(context.text, cross.k, cross.v)
        keys = cross.norm_k(keys)
        if cross.has_image:
            image_keys, image_values = layers(context.image, cross.k_img, cross.v_img)
            keys = torch.cat([keys, cross.norm_k_img(image_keys)], dim=1)
            values = torch.cat([values, image_values], dim=1)
        made = KeysValues(split_heads(keys), split_heads(values), context.text_rows)
        if context.keep:
            context.kept = made
        return made

    def layers_with_lora(self, dtype: torch.dtype) -> Callable[..., Sequence[Tensor]]:
        """A function (x, *layers) -> their outputs: layers that share an input and all carry LoRA are one operation.

        To be called in each pass, before any of them: the LoRA matrices of the block are cast to `dtype` together.
        """
        own, cross, (first, _, last) = self.block.self_attn, self.block.cross_attn, self.block.ffn
        groups = [(own.q, own.k, own.v), (own.o,), (cross.q,), (cross.k, cross.v), (cross.o,), (first,), (last,)]
        if cross.has_image:
            groups.append((cross.k_img, cross.v_img))
        adapted = [
            [one for one in group if isinstance(one, LoRALinear) and one.uses_product_kernel] for group in groups
        ]
        whole = {group: loras for group, loras in zip(groups, adapted, strict=True) if len(loras) == len(group)}
        cast = dict(zip(whole, cast_low_rank(list(whole.values()), dtype), strict=True)) if whole else {}

        def run(x: Tensor, *layers: nn.Module, read: bool = True) -> Sequence[Tensor]:
            if layers not in cast:
                return [layer(x) for layer in layers]
            return lora_products(x, whole[layers], cast[layers], read)

        return run

    def infer(self, x: Tensor | Residual, modulation: Tensor, context: Context, cos: Tensor, sin: Tensor) -> Residual:
        """Without gradients. Writes over x."""
        block, run, dtype, eps = self.block, self.operations, context.tokens.dtype, self.block.norm1.eps
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).unbind(1)
        x, addend, addend_gate = x if isinstance(x, Residual) else (x.contiguous(), None, None)

        def norm_(
            addend: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, modulated: bool, layer: nn.Module
        ) -> Tensor | Fp8Rows:
            return run.residual_norm_(x, addend, gate, scale, shift, eps, modulated, dtype, _takes_rows(layer))

        own = block.self_attn
        q, k, v = self.project(norm_(addend, addend_gate, scale, shift, True, own.q))
        run.rms_rope_(q, own.norm_q.weight, cos, sin, own.norm_q.eps)
        run.rms_rope_(k, own.norm_k.weight, cos, sin, own.norm_k.eps)
        h: Tensor | Fp8Rows
        h = self.apply(own.o, own.attention(split_heads(q), split_heads(k), split_heads(v)).flatten(2))

        norm, cross = block.norm3, block.cross_attn
        h = norm_(h, gate, norm.weight[None], norm.bias[None], False, cross.q)
        q = run.rms_rope_(self.apply(cross.q, h), cross.norm_q.weight, None, None, cross.norm_q.eps)
        h = self.apply(cross.o, self.attend(split_heads(q), cross.keys_values(context)).flatten(2))
        h = norm_(h, None, ffn_scale, ffn_shift, True, block.ffn[0])
        return Residual(x, self.feed_forward(h), ffn_gate)

    def attend(self, q: Tensor, seen: KeysValues) -> Tensor:
        """`CrossAttention.attend`, by one operation for text and image unless an attention package was chosen."""
        cross = self.block.cross_attn
        if cross.attention in (sdpa, cudnn):
            repeats = TEXT_LENGTH - seen.text_rows + 1  # how many rows the last one of the text stands for
            return self.operations.cross_attention(q, seen.keys, seen.values, seen.text_rows, repeats)
        return cross.attend(q, seen)

    def project(self, h: Tensor | Fp8Rows) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, L, dim], in one product where their weights can lie in one matrix."""
        own = self.block.self_attn
        layers = own.q, own.k, own.v
        if not self.one_matrix or any(type(layer) not in (nn.Linear, Fp8Linear) for layer in layers):
            q, k, v = (self.apply(layer, h) for layer in layers)
        elif isinstance(h, Fp8Rows):
            assert isinstance(own.q, Fp8Linear)
            names = ("quantized", "scale_weight", "bias")
            weight, scale, bias = (_joined([getattr(layer, name) for layer in layers]) for name in names)
            q, k, v = product_of_rows(h, Fp8Rows(weight, scale), bias, own.q.compute_dtype).chunk(3, dim=-1)
        elif isinstance(own.q, Fp8Linear):
            q, k, v = (layer(h) for layer in layers)
        else:
            weight, bias = (_joined([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
            q, k, v = F.linear(h, weight, bias).chunk(3, dim=-1)
        return q, k, v

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
            return product_of_rows(rows, layer.rows, layer.bias, layer.compute_dtype)
        return layer(h)


def _takes_rows(layer: nn.Module) -> TypeGuard[Fp8Linear]:
    """Whether the layer multiplies inputs that are quantised row by row."""
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
