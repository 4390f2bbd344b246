"""Noise levels for training: which t each item gets, how it is mixed in, and how its loss is weighted.

t is in 0..1 (0 = image, 1 = noise). Every method here is a function from a quantile u, uniform in [0, 1), to t; normal
numbers are the normal quantile of u. So one uniform number decides an item's noise level, be it drawn from the item's
own generator or dealt out evenly by `stratified_uniform`. Formulas: docs/formats.md#noise-levels.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.options import Section, option
from wan.generation.sampling import shifted

log = logging.getLogger(__name__)

_STEPS = 1000  # Wan's training grid: network timestep = 1000 * t
_REJECTION_ROUNDS = 1000
_TAIL = 1e-7  # quantiles are kept this far from 0 and 1, where the normal quantile is infinite

# Latent tokens per image and the log of the shift there; the log is linear in the tokens between and beyond.
_LOG_SHIFT_LINES = {
    "flux_shift": ((256, 0.5), (4096, 1.15)),
    "flux2_shift": ((256, 0.5), (4096, 1.15)),
    "qwen_shift": ((256, 0.5), (8192, 0.9)),
    "krea2_shift": ((256, 0.5), (6400, 1.15)),
}
# Share of the quantiles for each part of a mixture; "clean" is logsnr around 5.36, nearly noise-free images.
_MIXTURES = {
    "qinglong_flux": ((0.79, "flux_shift"), (0.9, "logsnr"), (1.0, "clean")),
    "qinglong_qwen": ((0.95, "qwen_shift"), (1.0, "clean")),
}
_CLEAN_LOG_SNR = 5.36
TIMESTEP_SAMPLING = (
    *("sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "ideogram4_shift", "qwen_shift"),
    *("krea2_shift", "logsnr", "qinglong_flux", "qinglong_qwen"),
)
_POSITIVE: dict[str, Any] = {"above": 0, "below": math.inf, "rule": "must be above 0; 1 is neutral"}
_FINITE: dict[str, Any] = {"above": -math.inf, "below": math.inf, "rule": "must be a finite number"}
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Section):
    """noise levels of training"""

    timestep_sampling: str = option("sigma", help="distribution of the noise levels", choices=TIMESTEP_SAMPLING)
    discrete_flow_shift: float = option(1.0, **_POSITIVE, help="for shift and sigma: above 1 trains more at high noise")
    sigmoid_scale: float = option(
        1.0, **_POSITIVE, help="for sigmoid and all shifts: above 1 spreads levels towards both ends"
    )
    weighting_scheme: str = option(
        "none", help="logit_normal, mode: distribution in sigma; others: loss weight", choices=WEIGHTING_SCHEMES
    )
    logit_mean: float = option(0.0, **_FINITE, help="for logit_normal and logsnr")
    logit_std: float = option(1.0, **_POSITIVE, help="for logit_normal and logsnr")
    mode_scale: float = option(1.29, **_FINITE, help="for mode")
    min_timestep: int | None = option(None, help="lowest noise level times 1000 (0 when unset)")
    max_timestep: int | None = option(None, help="highest noise level times 1000 (1000 when unset)")
    preserve_distribution_shape: bool = option(
        False, help="draw again outside min/max instead of squeezing the distribution into the range"
    )
    num_timestep_buckets: int | None = option(
        None,
        minimum=2,
        rule="use at least 2, or leave it out",
        help="at least 2: spread levels evenly over an epoch",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("timestep_sampling", TIMESTEP_SAMPLING), ("weighting_scheme", WEIGHTING_SCHEMES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name} {getattr(self, name)}: unknown; use one of {', '.join(choices)}")
        low, high = self.limits
        if not 0 <= low < high <= _STEPS:
            raise ConfigError(f"--min_timestep {low} --max_timestep {high}: use 0 <= min < max <= {_STEPS}")

    def check(self) -> None:
        """Log a warning about a setting without effect."""
        if self.weighting_scheme in ("logit_normal", "mode") and self.timestep_sampling != "sigma":
            log.warning(
                "--weighting_scheme %s has no effect with --timestep_sampling %s; it belongs to sigma",
                *(self.weighting_scheme, self.timestep_sampling),
            )

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest noise level times 1000."""
        return self.min_timestep or 0, _STEPS if self.max_timestep is None else self.max_timestep

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest noise level, in 0..1."""
        low, high = self.limits
        return low / _STEPS, high / _STEPS


def sample_noise_levels(
    config: NoiseConfig,
    latent_size: tuple[int, int],
    uniform: Tensor | None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Noise levels t [B] float32 on the CPU, inside `config.range`.

    latent_size: (H, W), for the methods whose shift depends on the number of tokens.
    uniform: quantiles [B] from `stratified_uniform` or None. generators: one CPU generator per item, so that an item's
    level depends on nothing but its own address; given quantiles replace the first draw of each.
    With `preserve_distribution_shape` levels outside the range are drawn again, at most 1000 times, then clamped.
    """
    low, high = config.range

    def draw(item: int) -> Tensor:
        return torch.rand((), generator=generators[item], dtype=torch.float64)

    u = torch.stack([draw(item) for item in range(len(generators))]) if uniform is None else uniform.double().clone()
    if not config.preserve_distribution_shape:
        return _on_grid(config, noise_level(config, latent_size, u) * (high - low) + low).float()
    for _ in range(_REJECTION_ROUNDS):
        t = _on_grid(config, noise_level(config, latent_size, u))
        outside = ((t < low) | (t > high)).nonzero().flatten().tolist()
        if not outside:
            break
        for item in outside:
            u[item] = draw(item)
    return t.clamp(low, high).float()


def noise_level(config: NoiseConfig, latent_size: tuple[int, int], u: Tensor) -> Tensor:
    """Noise level in 0..1 at quantile u, any shape, float64 advised; before the range and sigma's grid are applied."""
    method = config.timestep_sampling
    if method not in _MIXTURES:
        return _level(method, config, latent_size, u)
    t, start = torch.empty_like(u), 0.0
    for end, part in _MIXTURES[method]:
        inside = (u >= start) & ((u < end) | (end == 1))
        # The place within its share is again uniform, so the same number also chooses the level.
        t[inside] = _level(part, config, latent_size, (u[inside] - start) / (end - start))
        start = end
    return t


def _level(method: str, config: NoiseConfig, latent_size: tuple[int, int], u: Tensor) -> Tensor:
    if method == "uniform":
        return u
    if method == "sigma":
        return shifted(1 - _sigma_density(config, u), config.discrete_flow_shift)
    normal = _normal_quantile(u)
    if method == "ideogram4_shift":
        return _ideogram4(latent_size, normal)
    if method in ("logsnr", "clean"):
        mean, std = (_CLEAN_LOG_SNR, 1.0) if method == "clean" else (config.logit_mean, config.logit_std)
        return torch.sigmoid(-(mean + std * normal) / 2)
    t = torch.sigmoid(config.sigmoid_scale * normal)
    if method == "sigmoid":
        return t
    return shifted(t, config.discrete_flow_shift if method == "shift" else _token_shift(method, latent_size))


def _normal_quantile(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u.clamp(_TAIL, 1 - _TAIL) - 1)


def _sigma_density(config: NoiseConfig, u: Tensor) -> Tensor:
    """1 - t of `sigma` mode (Esser et al. 2024, section 3.1; the direction is the reference's)."""
    if config.weighting_scheme == "logit_normal":
        return torch.sigmoid(config.logit_mean + config.logit_std * _normal_quantile(u))
    if config.weighting_scheme == "mode":
        value = 1 - u - config.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return value.clamp(0, 1)  # a mode_scale outside -1..1.75 leaves the interval
    return u


def _on_grid(config: NoiseConfig, t: Tensor) -> Tensor:
    """`sigma` mode visits the grid k / 1000, k >= 1, rounding up; other methods are continuous."""
    if config.timestep_sampling != "sigma":
        return t
    # The small number keeps k / 1000 itself from rounding up to the next level.
    return (_STEPS * t - 1e-6).ceil().clamp(min=1) / _STEPS


def _token_shift(method: str, latent_size: tuple[int, int]) -> float:
    """e^mu, mu linear in the tokens: latent pixels for flux2, blocks of 2x2 for the others."""
    height, width = latent_size
    tokens = height * width if method == "flux2_shift" else (height // 2) * (width // 2)
    (tokens0, mu0), (tokens1, mu1) = _LOG_SHIFT_LINES[method]
    return math.exp(mu0 + (mu1 - mu0) * (tokens - tokens0) / (tokens1 - tokens0))


def _ideogram4(latent_size: tuple[int, int], normal: Tensor) -> Tensor:
    """Logit-normal, std 1.5, with a mean that grows with the pixels (16 per latent side, as in that model)."""
    height, width = latent_size
    mean = 0.5 * math.log(16 * height * 16 * width / 512**2)
    return torch.sigmoid(mean + 1.5 * normal).clamp(1 / (1 + math.exp(7.5)), 1 - 1 / (1 + math.exp(9)))


def network_timestep(t: Tensor) -> Tensor:
    """Timestep that the network gets at noise level t: 1000 * t, at most 1000, as in generation."""
    return (_STEPS * t).clamp(max=_STEPS)


def loss_weight(scheme: str, t: Tensor) -> Tensor:
    """Factor [B] of each item's squared error; t [B] is first rounded to the grid k / 1000, k >= 1.

    sigma_sqrt: t^-2; cosmap: 2 / (pi * (1 - 2t + 2t^2)) (Esser et al. 2024, section 3.1); any other scheme: 1.
    """
    t = (_STEPS * t).round().clamp(min=1) / _STEPS
    if scheme == "sigma_sqrt":
        return t**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    return torch.ones_like(t)


def add_noise(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(1 - t) * latents + t * noise in float32; latents, noise [B, ...], t [B]: an item's frames share its level."""
    t = t.to(latents.device, torch.float32).view(-1, *[1] * (latents.ndim - 1))
    return (1 - t) * latents.float() + t * noise.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """noise - latents in float32: what the network learns to return at every noise level."""
    return noise.float() - latents.float()
