"""The Wan2.1 diffusion transformer: maths only. Module names are those of the official checkpoints.

Precision follows the official code without autocast: time embedding, modulation, normalisation statistics, the residual
stream and the head are float32; the other layers run in the dtype of the weights (`WanDiT.dtype`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.nets.attention import Attention, sdpa
from wan.nets.conditioning import Conditioning
from wan.nets.context import Context, KeysValues, Prepared, StepCache
from wan.nets.rope import apply_rope, grid_positions, rope_angles
from wan.nets.spec import CLIP_TOKENS, HEAD_DIM, PATCH, TEXT_LENGTH, DiTSpec
from wan.nets.tokens import FrameSizes, check_sizes, inner_tokens, token_grid, with_padding


def timestep_features(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of network timesteps: [B] in 0..1000 -> [B, dim] float32, first cosines then sines.

    Frequencies 10000^(-2k / dim), in float64 as in the official sinusoidal_embedding_1d.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=timesteps.device) / (dim // 2)
    angles = torch.outer(timesteps.double(), 10_000.0**-exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class Linear32(nn.Linear):
    """A linear layer computed in float32 whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm32(nn.LayerNorm):
    """Layer normalisation computed and returned in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation over all heads at once (before they are split), computed in float32, returned in x.dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def split_heads(x: Tensor) -> Tensor:
    """[B, L, N * D] -> [B, L, N, D]"""
    return x.unflatten(-1, (-1, HEAD_DIM))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, eps: float, attention: Attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attention = attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, L, dim]; cos, sin: [B, L, D / 2]. Returns [B, L, dim]."""
        q = apply_rope(split_heads(self.norm_q(self.q(x))), cos, sin)
        k = apply_rope(split_heads(self.norm_k(self.k(x))), cos, sin)
        return self.o(self.attention(q, k, split_heads(self.v(x))).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the text plus, with separate keys and values, attention to the image."""

    def __init__(self, dim: int, eps: float, attention: Attention, has_image: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attention = attention
        self.has_image = has_image
        if has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [B, L, dim]. Returns [B, L, dim]."""
        return self.o(self.attend(split_heads(self.norm_q(self.q(x))), self.keys_values(context)).flatten(2))

    def keys_values(self, context: Context) -> KeysValues:
        """Keys and values of the context: new ones, unless it has kept some."""
        if context.kept is not None:
            return context.kept
        keys, values = self.k(context.text), self.v(context.text)
        keys = self.norm_k(keys)
        if self.has_image:
            image_keys, image_values = self.k_img(context.image), self.v_img(context.image)
            keys = torch.cat([keys, self.norm_k_img(image_keys)], dim=1)
            values = torch.cat([values, image_values], dim=1)
        made = KeysValues(split_heads(keys), split_heads(values), context.text_rows)
        if context.keep:
            context.kept = made
        return made

    def attend(self, q: Tensor, seen: KeysValues) -> Tensor:
        """Attention of q to the text plus attention to the image: [B, L, N, D] -> the same."""
        out = self.attention(q, *seen.text)
        return out + self.attention(q, *seen.image) if self.has_image else out


class Block(nn.Module):
    """Self attention, cross attention and feed-forward around a float32 residual stream."""

    def __init__(self, spec: DiTSpec, attention: Attention) -> None:
        super().__init__()
        dim, eps = spec.dim, spec.eps
        self.norm1 = LayerNorm32(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, eps, attention)
        self.norm3 = LayerNorm32(dim, eps)  # before the cross attention: the official numbering
        self.cross_attn = CrossAttention(dim, eps, attention, has_image=spec.image_dim is not None)
        self.norm2 = LayerNorm32(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, spec.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(spec.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        context: Context,
        cos: Tensor,
        sin: Tensor,
        runner: "BlockRunner | None" = None,
    ) -> Tensor:
        """Output of `runner`, by default of `compute`: inside of the module's hooks, in which FSDP gathers weights."""
        return (runner or Block.compute)(self, x, modulation, context, cos, sin)

    def compute(self, x: Tensor, modulation: Tensor, context: Context, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, L, dim] float32, the residual stream; modulation: [B, 6, dim] float32, from the timestep; context:
        its dtype is what the layers compute in; cos, sin: [B, L, D / 2] float32. Returns [B, L, dim] float32.
        """
        dtype = context.tokens.dtype
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + modulation).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + self.self_attn(h.to(dtype), cos, sin) * gate
        x = x + self.cross_attn(self.norm3(x).to(dtype), context)
        h = self.norm2(x) * (1 + ffn_scale) + ffn_shift
        return x + self.ffn(h.to(dtype)) * ffn_gate


Shared = tuple[Tensor, Context, Tensor, Tensor]
"""Inputs of a block beside the residual stream: modulation, context, cos, sin, see `Block.compute`."""
BlockRunner = Callable[[Block, Tensor, Tensor, Context, Tensor, Tensor], Tensor]
"""(block, x, modulation, context, cos, sin) -> x. `Block.compute` is the plain one; others wrap or replace it."""


class ImageEmbedding(nn.Module):
    """CLIP features to context tokens. `positions`: how many tokens have a learned position (flf2v), or 0."""

    def __init__(self, image_dim: int, dim: int, positions: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm32(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            LayerNorm32(dim),
        )
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None

    def forward(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """features: [B, tokens, image_dim]; dtype: what the linear layers compute in. Returns [B, tokens, dim]."""
        norm_in, linear_in, gelu, linear_out, norm_out = self.proj
        if self.emb_pos is not None:
            if features.shape[1] != self.emb_pos.shape[1]:
                raise ValueError(
                    f"{features.shape[1]} image tokens; flf2v needs {self.emb_pos.shape[1]}, of two images"
                )
            features = features + self.emb_pos
        hidden = gelu(linear_in(norm_in(features).to(dtype)))
        return norm_out(linear_out(hidden)).to(dtype)


class Head(nn.Module):
    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.norm = LayerNorm32(spec.dim, spec.eps, elementwise_affine=False)
        self.head = Linear32(spec.dim, PATCH[0] * PATCH[1] * PATCH[2] * spec.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, spec.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, L, dim], time: [B, dim], float32. Returns [B, L, 2 * 2 * out_dim] float32."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanDiT(nn.Module):
    """Predicts the velocity (noise minus image) of latent frames that sit anywhere on the time axis.

    runner: how each block is run. pass_runner: how a pass is run once its inputs are prepared. Faster or smaller ways
    to compute the same are put there from outside; `Block.compute` and `WanDiT.predict` bring back the plain ones.
    """

    runner: BlockRunner
    pass_runner: "PassRunner"

    def __init__(self, spec: DiTSpec, attention: Attention = sdpa) -> None:
        super().__init__()
        dim = spec.dim
        self.spec = spec
        self.patch_embedding = nn.Conv3d(spec.in_dim, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(spec.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(Linear32(spec.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(spec, attention) for _ in range(spec.num_layers))
        self.head = Head(spec)
        if spec.image_dim is not None:
            positions = 2 * CLIP_TOKENS if spec.model_type == "flf2v" else 0
            self.img_emb = ImageEmbedding(spec.image_dim, dim, positions)
        self.runner, self.pass_runner = Block.compute, WanDiT.predict

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in where it does not need float32."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        timesteps: Tensor,
        text: Tensor,
        frame_indices: Tensor,
        skip_blocks: frozenset[int] = frozenset(),
        cache: StepCache | None = None,
        frame_sizes: FrameSizes | None = None,
    ) -> Tensor:
        """Velocity of noisy latents.

        latents: [B, 16, F, H, W]. conditioning: its channels are concatenated behind the latents, its clip features
        (flf2v: of two images) behind the text; both None for t2v. `given` has no effect here.
        timesteps: [B] in 0..1000. text: [B, rows, text_dim], see `pad_text`.
        frame_indices: [B, F] integer, the time index of each latent frame.
        skip_blocks: numbers of blocks that are left out (skip-layer guidance).
        cache: see `StepCache`; without one nothing is kept.
        frame_sizes: of frames that do not fill H and W. What lies outside of them has no effect, and velocity 0.
        Returns [B, 16, F, H, W] float32. ValueError when an input is missing, not wanted or of a wrong size.
        """
        self._check(latents, conditioning, text, frame_indices, frame_sizes)
        prepared = None if cache is None else cache.prepared
        if prepared is None:
            grid = token_grid(latents.shape[2:])
            positions = inner_tokens(grid_positions(frame_indices, *grid[1:]), grid, frame_sizes)
            prepared = self._prepare(text, conditioning.clip, positions, keep=cache is not None)
        if cache is not None:
            cache.prepared = prepared
        return self.pass_runner(self, latents, conditioning.channels, timesteps, prepared, skip_blocks, frame_sizes)

    def predict(
        self,
        latents: Tensor,
        channels: Tensor | None,
        timesteps: Tensor,
        prepared: Prepared,
        skip_blocks: frozenset[int],
        frame_sizes: FrameSizes | None,
    ) -> Tensor:
        """`forward` with its other inputs prepared."""
        x = latents if channels is None else torch.cat([latents, channels], dim=1)
        x, grid = self.patch_embedding(x.to(self.dtype)), token_grid(latents.shape[2:])
        x = inner_tokens(rearrange(x, "b d f h w -> b (f h w) d"), grid, frame_sizes).float()
        time = self.time_embedding(timestep_features(timesteps, self.spec.freq_dim))
        modulation = self.time_projection(time).unflatten(1, (6, -1))
        for number, block in enumerate(self.blocks):
            if number not in skip_blocks:
                x = block(x, modulation, prepared.contexts[number], prepared.cos, prepared.sin, runner=self.runner)
        return self.unpatchify(with_padding(self.head(x, time), grid, frame_sizes), grid)

    def _prepare(self, text: Tensor, clip: Tensor | None, positions: Tensor, keep: bool) -> Prepared:
        angles = rope_angles(positions)
        tokens = self.text_embedding(text.to(self.dtype))
        if clip is not None:
            tokens = torch.cat([self.img_emb(clip.flatten(1, -2), self.dtype), tokens], dim=1)
        contexts = [Context(tokens, text.shape[1], keep) for _ in self.blocks]
        return Prepared(angles.cos().float(), angles.sin().float(), contexts)

    def _check(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        text: Tensor,
        frame_indices: Tensor,
        frame_sizes: FrameSizes | None,
    ) -> None:
        kind, needs_image = self.spec.model_type, self.spec.image_dim is not None
        if any((tensor is not None) != needs_image for tensor in (conditioning.channels, conditioning.clip)):
            raise ValueError(f"{kind} takes {'both' if needs_image else 'neither'} of channels and CLIP features")
        if latents.shape[3] % PATCH[1] or latents.shape[4] % PATCH[2]:
            raise ValueError(f"latent of {latents.shape[3]} x {latents.shape[4]}; both sides must be even")
        if text.shape[1] > TEXT_LENGTH:
            raise ValueError(f"{text.shape[1]} rows of text; at most {TEXT_LENGTH}")
        if frame_indices.shape != (latents.shape[0], latents.shape[2]):
            raise ValueError(f"frame_indices {tuple(frame_indices.shape)} for latents {tuple(latents.shape)}")
        if frame_sizes is not None:
            check_sizes(frame_sizes, latents.shape[2:])

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, f * h * w, p * q * r * C] -> [B, C, f * p, h * q, w * r], with (p, q, r) = PATCH."""
        (f, h, w), (p, q, r) = grid, PATCH
        return rearrange(tokens, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r)


PassRunner = Callable[[WanDiT, Tensor, Tensor | None, Tensor, Prepared, frozenset[int], FrameSizes | None], Tensor]
"""(dit, latents, channels, timesteps, prepared, skip_blocks, frame_sizes) -> velocity, see `WanDiT.predict`."""
