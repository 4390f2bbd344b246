"""Noise schedules, solvers of the flow ODE, and guidance: pure functions of tensors, float32.

Notation (docs/formats.md#solvers): sigma is the noise level (1 = noise, 0 = image), a sample is
x = (1 - sigma) * image + sigma * noise, the network returns the velocity v = noise - image, alpha = 1 - sigma,
lambda = ln(alpha / sigma), and x - sigma * v predicts the image. "Step i" goes from sigmas[i] to sigmas[i + 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils.errors import ConfigError, suggest
from wan.nets.spec import TRAINING_TIMESTEPS

# UniPC starts just below pure noise, at the first noise level of the training grid, which is kept in float32
# (official Wan2.1, utils/fm_solvers_unipc.py: sigma_max).
_UNIPC_START = float(np.float32(0.999))


@dataclass(frozen=True)
class Schedule:
    """Noise levels that a run visits, and the timestep that the network gets at each of them."""

    sigmas: Tensor  # [steps + 1] float32, falling to exactly 0
    timesteps: Tensor  # [steps] float32 in 0..1000; whole numbers for unipc and dpm++, as in the official code


Levels = TypeVar("Levels", float, "np.ndarray[Any, np.dtype[np.floating[Any]]]", Tensor)


def shifted(sigmas: Levels, shift: float) -> Levels:
    """S(sigma, shift) = shift * sigma / (1 + (shift - 1) * sigma), for floats, arrays and tensors.

    Above 1 it moves noise levels up (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23).
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def schedule(solver: str, steps: int, shift: float) -> Schedule:
    """Noise levels and network timesteps of a run. ConfigError for an unknown solver, steps < 1 or shift <= 0."""
    if solver not in SOLVERS:
        hint = suggest(solver, SOLVERS) or f"; use one of {', '.join(SOLVERS)}"
        raise ConfigError(f"--sample_solver {solver}: unknown solver{hint}")
    if steps < 1:
        raise ConfigError(f"--infer_steps {steps}: at least one step is needed; use 20")
    if not 0 < shift < math.inf:
        raise ConfigError(f"--flow_shift {shift}: must be above 0; 1 leaves the steps evenly spaced")
    if solver == "vanilla":
        sigmas = shifted(torch.linspace(1, 0, steps + 1), shift)
        timesteps = sigmas[:-1] * TRAINING_TIMESTEPS
    else:
        # float64 up to the truncation: which side of a whole number 1000 * sigma falls on depends on the rounding.
        start = _UNIPC_START if solver == "unipc" else 1.0
        levels = torch.from_numpy(shifted(np.linspace(start, 0, steps + 1), shift))
        sigmas, timesteps = levels.float(), (levels[:-1] * TRAINING_TIMESTEPS).trunc().float()
    if not (sigmas.diff() < 0).all():
        raise ConfigError(f"--flow_shift {shift}: too large to keep {steps} noise levels apart; try 5")
    return Schedule(sigmas, timesteps)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def sample(
    solver: str,
    velocity: Callable[[Tensor, Tensor, int], Tensor],
    noise: Tensor,
    schedule: Schedule,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Follow the flow from `noise` to an image; any shape, result float32 on the device of `noise`.

    velocity(x, timestep, step) is the guided network: x as `noise`, timestep a float32 scalar tensor on the CPU
    (0..1000), step counted from 0; it returns v in the shape of x. progress() is called after each step.
    """
    step = _SOLVERS[solver](schedule.sigmas.tolist())
    x = noise.float()
    for i, timestep in enumerate(schedule.timesteps):
        x = step(i, x, velocity(x, timestep, i).float())
        if progress is not None:
            progress()
    return x


def _log_snr(sigma: float) -> float:
    """lambda = ln(alpha / sigma), infinite at both ends."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)


class _Euler:
    """x' = x + (sigma' - sigma) * v: exact where the path is straight."""

    def __init__(self, sigmas: list[float]) -> None:
        self.sigmas = sigmas

    def __call__(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * velocity


class _Multistep:
    """Base of the two exponential integrators: log-SNRs, and the images predicted so far."""

    def __init__(self, sigmas: list[float]) -> None:
        self.sigmas = sigmas
        self.lambdas = [_log_snr(sigma) for sigma in sigmas]
        self.images: list[Tensor] = []  # predictions of this step and the one or two before it, oldest first

    def remember(self, i: int, x: Tensor, velocity: Tensor) -> None:
        self.images = [*self.images[-2:], x - self.sigmas[i] * velocity]

    def first_order(self, i: int, x: Tensor, image: Tensor) -> Tensor:
        """sigma'/sigma * x - alpha' * expm1(-h) * image, exact if the predicted image stays the same during step i."""
        sigma, after = self.sigmas[i], self.sigmas[i + 1]
        return after / sigma * x - self.gain(i) * image

    def gain(self, i: int) -> float:
        """alpha' * expm1(-h), with h = lambda' - lambda of step i."""
        return (1 - self.sigmas[i + 1]) * math.expm1(self.lambdas[i] - self.lambdas[i + 1])

    def slope(self, i: int, now: Tensor, before: Tensor) -> tuple[float, Tensor]:
        """r = (lambda_{i-1} - lambda_i) / h < 0, and D = (before - now) / r, the change extrapolated over step i."""
        r = (self.lambdas[i - 1] - self.lambdas[i]) / (self.lambdas[i + 1] - self.lambdas[i])
        return r, (before - now) / r


class _DPMSolver2M(_Multistep):
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2; the first and the last step are of order 1."""

    def __call__(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        self.remember(i, x, velocity)
        result = self.first_order(i, x, self.images[-1])
        if 0 < i < len(self.sigmas) - 2:
            _, change = self.slope(i, self.images[-1], self.images[-2])
            result = result - 0.5 * self.gain(i) * change
        return result


class _UniPC(_Multistep):
    """UniPC-2, Zhao et al. 2023 (arXiv 2302.04867), B(h) = expm1(-h) ("bh2"), predicting images.

    A step first corrects the sample it arrives at, using the velocity just computed there, then predicts the next.
    """

    previous: Tensor  # the corrected sample the last prediction started from; set in the first step

    def order(self, i: int) -> int:
        """Order of the prediction in step i, and of the correction that follows it: 1 at both ends, else 2."""
        return min(2, len(self.sigmas) - 1 - i, i + 1)

    def __call__(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        self.remember(i, x, velocity)
        if i > 0:
            x = self.corrected(i - 1)
        self.previous = x
        result = self.first_order(i, x, self.images[-1])
        if self.order(i) == 2:
            _, change = self.slope(i, self.images[-1], self.images[-2])
            result = result - 0.5 * self.gain(i) * change
        return result

    def corrected(self, i: int) -> Tensor:
        """The sample at the end of step i, solved again now that the image predicted there is known."""
        *before, start, end = self.images
        result = self.first_order(i, self.previous, start)
        if self.order(i) == 1:
            return result - 0.5 * self.gain(i) * (end - start)
        # Weights of the two differences: [[1, 1], [r, 1]] @ (rho1, rho2) = (b1, b2), eq. 9 of the paper.
        r, change = self.slope(i, start, before[-1])
        q = self.lambdas[i] - self.lambdas[i + 1]
        phi = math.expm1(q)
        b1 = (phi / q - 1) / phi
        b2 = 2 * ((phi / q - 1) / q - 0.5) / phi
        rho1 = (b1 - b2) / (1 - r)
        return result - self.gain(i) * (rho1 * change + (b1 - rho1) * (end - start))


_SOLVERS: dict[str, Callable[[list[float]], Callable[[int, Tensor, Tensor], Tensor]]] = {
    "unipc": _UniPC,
    "dpm++": _DPMSolver2M,
    "vanilla": _Euler,
}
"""Noise levels -> a step: (its number, the sample, the velocity) -> the next sample."""

SOLVERS = tuple(_SOLVERS)
