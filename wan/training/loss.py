"""The training objective: flow matching, as a loss per item."""

from collections.abc import Callable

from torch import Tensor

from wan.nets.conditioning import Conditioning
from wan.nets.tokens import FrameSizes
from wan.training.timesteps import add_noise, loss_weight, network_timestep, velocity_target


def flow_matching_loss(
    dit: Callable[..., Tensor],
    *,
    latents: Tensor,
    conditioning: Conditioning,
    text: Tensor,
    frame_indices: Tensor,
    noise: Tensor,
    t: Tensor,
    weighting_scheme: str = "none",
    weights: Tensor | None = None,
    frame_sizes: FrameSizes | None = None,
) -> Tensor:
    """Loss of each item, [B] float32: the weighted mean squared error of the velocity.

    latents, noise [B, 16, F, H, W]; conditioning: of B items; text [B, 512, D]; frame_indices [B, F];
    t [B] noise levels in 0..1. Formulas: docs/formats.md#loss.
    weights: [B, F] or [B, F, H, W], how much each frame or place counts in the mean; None: all the same.
    frame_sizes: where frames do not fill H and W; the weights of the rest are 0.
    """
    noisy = add_noise(latents, noise, t)
    velocity = dit(noisy, conditioning, network_timestep(t), text, frame_indices, frame_sizes=frame_sizes)
    error = (velocity.float() - velocity_target(latents, noise)).square()
    error = error.mean(dim=1 if weights is not None and weights.ndim == 4 else (1, 3, 4))
    if weights is None:
        error = error.mean(dim=1)
    else:
        error = (error * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)
    return error * loss_weight(weighting_scheme, t)
