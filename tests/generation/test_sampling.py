"""Schedules and solvers: recorded values of the reference, diffusers' solvers, and paths with a known end."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch.testing import assert_close

from tests.helpers import golden, rel_l2
from utils.errors import ConfigError
from wan.generation.sampling import SOLVERS, Schedule, guided, sample, schedule, shifted

RECORDED = ("unipc", "dpm++", "vanilla")  # solvers of the reference


def curved(x, timestep, step):
    """The velocity field of the recorded trajectories."""
    s = timestep / 1000
    return torch.sin(1.3 * x + 2 * s) + 0.25 * x - 0.4 * torch.cos(3 * s)


@pytest.mark.parametrize("solver", RECORDED)
def test_schedules_equal_the_recorded_ones_bit_for_bit(solver):
    recorded = golden("samplers")
    for steps in (4, 10, 20, 50):
        for shift in (1, 3, 5, 7):
            ours, name = schedule(solver, steps, float(shift)), f"{solver}_n{steps}_shift{shift}"
            assert torch.equal(ours.sigmas, recorded[f"{name}_sigmas"]), name
            assert torch.equal(ours.timesteps, recorded[f"{name}_timesteps"].float()), name


@pytest.mark.parametrize("solver", RECORDED)
@pytest.mark.parametrize(("steps", "shift"), [(4, 3), (10, 5), (20, 5), (20, 7)])
def test_solvers_follow_the_recorded_trajectories(solver, steps, shift):
    recorded, name, path = golden("samplers"), f"{solver}_n{steps}_shift{shift}", []

    def velocity(x, timestep, step):
        path.append(x)
        return curved(x, timestep, step)

    final = sample(solver, velocity, recorded["x0"], schedule(solver, steps, shift))
    assert rel_l2(final, recorded[f"{name}_final"]) < 1e-6
    if f"{name}_trajectory" in recorded:
        assert rel_l2(torch.stack([*path[1:], final]), recorded[f"{name}_trajectory"]) < 1e-6


UNIPC_10_7 = [999, 984, 965, 942, 912, 874, 823, 749, 636, 437]
DPM_10_7 = [1000, 984, 965, 942, 913, 875, 823, 749, 636, 437]


@pytest.mark.parametrize(
    ("solver", "steps", "shift", "timesteps", "final"),
    [
        ("unipc", 4, 5, [999, 937, 833, 624], [-2.38299, -0.19771, -0.32560, -0.55738]),
        ("unipc", 10, 7, UNIPC_10_7, [-2.32621, -0.14447, -0.16219, -0.22885]),
        ("dpm++", 4, 5, [1000, 937, 833, 625], [-2.35767, -0.19807, -0.30955, -0.54822]),
        ("dpm++", 10, 7, DPM_10_7, [-2.32515, -0.14448, -0.16203, -0.22805]),
    ],
)
def test_check_values_of_the_specification_are_reached(solver, steps, shift, timesteps, final):
    """docs/formats.md#solvers: timesteps, and the end of the field v = sin(3x) + t / 1000."""
    plan = schedule(solver, steps, shift)
    assert plan.timesteps.tolist() == timesteps
    end = sample(solver, lambda x, t, i: torch.sin(3 * x) + 0.001 * t, torch.tensor([-1, -1 / 3, 1 / 3, 1]), plan)
    assert_close(end, torch.tensor(final), atol=6e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize(
    ("solver", "scheduler_class"), [("unipc", UniPCMultistepScheduler), ("dpm++", DPMSolverMultistepScheduler)]
)
def test_multistep_solvers_agree_with_diffusers_on_the_same_noise_levels(solver, scheduler_class, steps):
    plan, noise = schedule(solver, steps, 5.0), torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    theirs = scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(steps)
    theirs.sigmas, theirs.timesteps = plan.sigmas, torch.arange(steps, 0, -1)  # only used there to find the step number
    x = noise
    for i, timestep in enumerate(plan.timesteps):
        x = theirs.step(curved(x, timestep, i), theirs.timesteps[i], x).prev_sample
    assert rel_l2(sample(solver, curved, noise, plan), x) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_every_solver_recovers_the_image_of_a_straight_path(solver, steps):
    """On x = (1 - sigma) * image + sigma * noise the velocity is constant and the predicted image never changes."""
    noise, image = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    plan = schedule(solver, steps, 7.0)
    start = (1 - plan.sigmas[0]) * image + plan.sigmas[0] * noise
    assert_close(sample(solver, lambda x, t, i: noise - image, start, plan), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("vanilla", 1), ("dpm++", 2), ("unipc", 2)])
def test_halving_the_steps_shows_the_order_of_the_solver(solver, order):
    """Errors against a fine Euler solution fall by 2^order; from sigma 0.9 to 0.1, where coefficients are finite."""
    noise = torch.linspace(-2, 2, 9)

    def end(name, steps):
        sigmas = torch.linspace(0.9, 0.1, steps + 1)
        return sample(name, curved, noise, Schedule(sigmas, 1000 * sigmas[:-1]))

    # Richardson extrapolation of two Euler solutions removes their own first-order error.
    exact = 2 * end("vanilla", 4000) - end("vanilla", 2000)
    errors = [(end(solver, steps) - exact).norm() for steps in (20, 40)]
    assert errors[0] / errors[1] > 0.8 * 2**order


def test_progress_and_velocity_are_called_once_per_step_in_order():
    seen = []

    def velocity(x, timestep, step):
        seen.append((step, float(timestep)))
        return x

    plan = schedule("unipc", 3, 5.0)
    sample("unipc", velocity, torch.ones(2), plan, progress=lambda: seen.append("done"))
    first, second, third = enumerate(plan.timesteps.tolist())
    assert seen == [first, "done", second, "done", third, "done"]


def test_samples_stay_float32_when_noise_and_network_are_bfloat16():
    noise = torch.ones(4, dtype=torch.bfloat16)
    for solver in SOLVERS:
        assert sample(solver, lambda x, t, i: x.bfloat16(), noise, schedule(solver, 3, 5.0)).dtype == torch.float32


def test_guidance_extrapolates_from_the_unconditional_prediction():
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided(conditional, unconditional, 5.0).item() == 11
    assert torch.equal(guided(conditional, unconditional, 1.0), conditional)


def test_shift_moves_levels_up_and_keeps_the_ends():
    assert shifted(0.5, 3.0) == 0.75
    assert shifted(torch.tensor([0.0, 1.0]), 7.0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unipcc", 10, 5.0), "--sample_solver unipcc: .*did you mean 'unipc'"),
        (("unipc", 0, 5.0), "--infer_steps 0"),
        (("unipc", 10, 0.0), "--flow_shift 0.0"),
        (("unipc", 10, float("nan")), "--flow_shift nan"),
        (("dpm++", 10, 1e9), "--flow_shift 1000000000.0: too large"),
    ],
)
def test_impossible_schedules_are_refused_with_the_flag_to_change(arguments, message):
    with pytest.raises(ConfigError, match=message):
        schedule(*arguments)
