"""Training of the miniature i2v and flf2v models, as video models, the way Wan2.1 was trained."""

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel

from demo import miniature
from demo.optimise import optimise
from demo.recordings import Recordings, as_video, video_conditions
from wan.fused.plain import cross_attention
from wan.nets.clip import encode_image
from wan.nets.conditioning import Conditioning
from wan.nets.context import KeysValues
from wan.nets.dit import WanDiT
from wan.nets.spec import TEXT_LENGTH, TIME_STRIDE
from wan.nets.vae import WanVAE
from wan.training.timesteps import add_noise, network_timestep, shifted, velocity_target

TEXT_LENGTH_IN_TRAINING = 56  # the longest caption has fewer words
TEXT_DROPOUT = 0.1
NOISE_SHIFT = 4.0


class Lessons:
    """Training data of a video model, encoded once: latents, conditions, CLIP features and tokens of the clips."""

    def __init__(self, vae: WanVAE, clip: CLIPVisionModel, part: Recordings, last_frames: tuple[int, ...]) -> None:
        tokenizer = miniature.build_tokenizer()
        tokenizer.enable_padding(length=TEXT_LENGTH_IN_TRAINING)
        tokens = tokenizer.encode_batch(part.captions)
        device = part.frames.device
        self.tokens = torch.tensor([one.ids for one in tokens], device=device)
        self.mask = torch.tensor([one.attention_mask for one in tokens], device=device)
        latents, conditions, features = [], {last: [] for last in last_frames or (0,)}, []
        with torch.no_grad():
            for frames in part.frames.split(64):
                video = as_video(frames)
                latents.append(vae.encode(video).bfloat16())
                for last, made in conditions.items():
                    seen = video[:, :, : last + 1] if last else video
                    made.append(video_conditions(vae, seen, with_last=bool(last)).bfloat16())
                pictures = [video[:, :, moment] for moment in (0, *last_frames)]
                features.append(torch.stack([encode_image(clip, one).bfloat16() for one in pictures], dim=1))
        self.latents = torch.cat(latents)  # [N, 16, 3, H, W]
        self.conditions = {last: torch.cat(made) for last, made in conditions.items()}  # [N, 20, F, H, W]
        self.features = torch.cat(features)  # [N, images, 257, D]
        self.last_frames = last_frames

    def batch(self, rows: Tensor, latent_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, condition and CLIP features of clips with 2 or 3 latent frames."""
        latents = self.latents[rows, :, :latent_frames]
        if not self.last_frames:
            return latents, self.conditions[0][rows, :, :latent_frames], self.features[rows, 0]
        last = TIME_STRIDE * (latent_frames - 1)
        ends = self.features[rows][:, [0, 1 + self.last_frames.index(last)]]
        return latents, self.conditions[last][rows], ends.flatten(1, 2)


def embed_text(t5: UMT5EncoderModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, L] -> [B, L + 1, D]; the last row, zeros, stands for all padding, as in `pad_text`."""
    scores = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min  # as T5 would make it, but in one go
    hidden = t5(input_ids=tokens, attention_mask=scores).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, 1))


def count_padding_(dit: WanDiT) -> None:
    """Let the cross attention see the padding of the text, 512 rows with it, as one row that counts for many.

    The same function with other rounding, for training only: most of the attention is to padding otherwise.
    """
    for block in dit.blocks:
        block.cross_attn.attend = _attend_counting_padding


def _attend_counting_padding(q: Tensor, seen: KeysValues) -> Tensor:
    """`CrossAttention.attend` in which the last row of the text counts as often as it stands for others."""
    return cross_attention(q, *seen, repeats=TEXT_LENGTH - seen.text_rows + 1)


def train_dit(
    dit: WanDiT, t5: UMT5EncoderModel, lessons: list[Lessons], steps: int, peak: float, batch: int, text: bool
) -> None:
    """Flow matching on clips of 5 and of 9 frames. `text`: train T5 as well."""
    device = lessons[0].latents.device
    chooser = torch.Generator().manual_seed(2)
    torch.manual_seed(2)
    dit.requires_grad_(True)
    count_padding_(dit)
    t5.requires_grad_(text)
    sizes = torch.tensor([float(len(part.latents)) for part in lessons])

    def batch_of(step: int) -> tuple[Hashable, tuple[Tensor, ...]]:
        number, frames = int(torch.multinomial(sizes, 1, generator=chooser)), 2 if step % 2 else 3
        part = lessons[number]
        rows = torch.randint(len(part.latents), (batch,), generator=chooser).to(device)
        tokens, mask = part.tokens[rows], part.mask[rows]
        empty = (torch.rand(batch, generator=chooser) < TEXT_DROPOUT).to(device)
        tokens[empty], mask[empty] = 0, 0
        tokens[empty, 0], mask[empty, 0] = 1, 1  # </s> alone
        t = shifted(torch.sigmoid(1.2 * torch.randn(batch, generator=chooser)), NOISE_SHIFT).to(device)
        return (number, frames), (*part.batch(rows, frames), tokens, mask, t)

    def loss_of(
        _kind: Hashable, latents: Tensor, condition: Tensor, features: Tensor, tokens: Tensor, mask: Tensor, t: Tensor
    ) -> Tensor:
        noise = torch.randn(latents.shape, device=device)
        indices = torch.arange(latents.shape[2], device=device).expand(len(latents), -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            context = embed_text(t5, tokens, mask)
            noisy = add_noise(latents, noise, t)
            conditioning = Conditioning(condition.float(), features.float())
            velocity = dit(noisy, conditioning, network_timestep(t), context, indices)
        return F.mse_loss(velocity.float(), velocity_target(latents, noise))

    parameters = [*dit.parameters(), *(t5.parameters() if text else ())]
    matrices = [matrix for matrix in dit.blocks.parameters() if matrix.ndim == 2]
    optimise(parameters, steps, peak, batch_of, loss_of, dit.spec.model_type, matrices)
    dit.requires_grad_(False)
    for block in dit.blocks:
        del block.cross_attn.attend


def new_dit(kind: str, generator: torch.Generator) -> WanDiT:
    """Random weights; what opens and closes the residual stream starts at zero."""
    dit = WanDiT(miniature.dit_spec(kind))
    with torch.no_grad():
        for name, tensor in dit.named_parameters():
            if name.endswith("bias") or name.startswith("head.head") or "emb_pos" in name:
                tensor.zero_()
            elif name.endswith("modulation"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
            elif tensor.ndim > 1:
                spread = 0.02 if "time" in name else 1 / math.sqrt(math.prod(tensor.shape[1:]))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
            else:
                tensor.fill_(1.0)
    return dit
