"""Noise levels: recorded values and histograms of the reference, exact values, and what each option promises."""

import logging
import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import golden
from utils.errors import ConfigError
from utils.randomness import stratified_uniform
from wan.training.timesteps import (
    TIMESTEP_SAMPLING,
    NoiseConfig,
    add_noise,
    loss_weight,
    network_timestep,
    noise_level,
    sample_noise_levels,
    velocity_target,
)

SIZE = (4, 6)


def levels(config, *, uniform=None, count=0, seed=0):
    """Levels at given quantiles, or `count` draws from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return sample_noise_levels(config, SIZE, uniform, [generator] * (count if uniform is None else len(uniform)))


RECORDED = {
    "uniform": {"timestep_sampling": "uniform"},
    "uniform_min100_max900": {"timestep_sampling": "uniform", "min_timestep": 100, "max_timestep": 900},
    "sigmoid": {"timestep_sampling": "sigmoid"},
    "sigmoid_scale0.5": {"timestep_sampling": "sigmoid", "sigmoid_scale": 0.5},
    "shift3": {"timestep_sampling": "shift", "discrete_flow_shift": 3.0},
    "shift5_scale2": {"timestep_sampling": "shift", "discrete_flow_shift": 5.0, "sigmoid_scale": 2.0},
    "flux_shift_4x6": {"timestep_sampling": "flux_shift"},
    "qwen_shift_4x6": {"timestep_sampling": "qwen_shift"},
    "logsnr": {"timestep_sampling": "logsnr"},
    "logsnr_m1_s2": {"timestep_sampling": "logsnr", "logit_mean": 1.0, "logit_std": 2.0},
}


@pytest.mark.parametrize("case", RECORDED)
def test_levels_at_given_quantiles_equal_the_recorded_ones(case):
    """The reference tells its network 1000 * t + 1; the mixing shows its t."""
    recorded = golden("train_timesteps")
    t = levels(NoiseConfig(**RECORDED[case]), uniform=recorded["u"])
    assert_close(t, (recorded[f"{case}_timesteps"] - 1) / 1000, atol=1e-6, rtol=0)
    if f"{case}_noisy" in recorded:
        noisy = add_noise(recorded["latents"], recorded["noise"], t)
        assert_close(noisy, recorded[f"{case}_noisy"], atol=3e-6, rtol=0)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_sigma_mode_equals_the_reference_for_the_same_draws(scheme):
    """The reference draws from the global generator, for logit_normal a normal number: here its quantile."""
    torch.manual_seed(7)
    u = torch.special.ndtr(torch.randn(33).double()) if scheme == "logit_normal" else torch.rand(33)
    t = levels(NoiseConfig(weighting_scheme=scheme), uniform=u)
    assert_close(network_timestep(t), golden("train_timesteps")[f"sigma_{scheme}_timesteps"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["uniform", "sigmoid", "shift3", "logsnr"])
def test_drawn_levels_are_distributed_like_the_reference_draws(case):
    expected = golden("train_timesteps")[f"hist50_{case}"]
    drawn = torch.histc(1000 * levels(NoiseConfig(**RECORDED[case]), count=100_000) + 1, bins=21, min=0, max=1050)
    assert drawn.sum() == expected.sum()
    # Both are random with variance about their mean: six standard deviations of the difference.
    assert ((drawn - expected).abs() <= 6 * (drawn + expected + 1).sqrt()).all()


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_loss_weights_equal_the_recorded_ones(scheme):
    recorded = golden("train_timesteps")
    assert_close(loss_weight(scheme, recorded["weight_t_shift3"] / 1000), recorded[f"weight_{scheme}"])


def test_loss_weights_have_their_closed_forms_and_stay_finite():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert_close(loss_weight("sigma_sqrt", t), torch.tensor([1e6, 4.0, 1.0]))
    assert_close(loss_weight("cosmap", t)[1:], torch.tensor([4 / math.pi, 2 / math.pi]))
    for scheme in ("none", "logit_normal", "mode"):
        assert loss_weight(scheme, t).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "median"),
    [
        ({"timestep_sampling": "uniform"}, 0.5),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": 3.0}, 0.5),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 3.0}, 0.75),
        ({"timestep_sampling": "logsnr", "logit_mean": 2.0}, 1 / (1 + math.e)),
        ({"timestep_sampling": "sigma", "discrete_flow_shift": 3.0}, 0.75),
        ({"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 1.0}, 0.269),
        # 32x32 latents: 256 blocks of 2x2, where every line starts at e^0.5; 1024 latent pixels for flux2.
        ({"timestep_sampling": "flux_shift"}, 1 / (1 + math.exp(-0.5))),
        ({"timestep_sampling": "qwen_shift"}, 1 / (1 + math.exp(-0.5))),
        ({"timestep_sampling": "krea2_shift"}, 1 / (1 + math.exp(-0.5))),
        ({"timestep_sampling": "flux2_shift"}, 1 / (1 + math.exp(-0.5 - 0.65 * (1024 - 256) / (4096 - 256)))),
        ({"timestep_sampling": "ideogram4_shift"}, 0.5),  # 32 * 16 = 512 pixels: mean 0
        ({"timestep_sampling": "qinglong_flux"}, None),
        ({"timestep_sampling": "qinglong_qwen"}, None),
    ],
)
def test_the_middle_quantile_of_a_symmetric_method_is_its_centre(options, median):
    t = sample_noise_levels(NoiseConfig(**options), (32, 32), torch.tensor([0.5]), [torch.Generator()])
    if median is None:  # a mixture: quantile 0.5 lies in its first part, at 0.5 / share
        share = 0.79 if options["timestep_sampling"] == "qinglong_flux" else 0.95
        part = options["timestep_sampling"].removeprefix("qinglong_") + "_shift"
        inner = torch.tensor([0.5 / share])
        median = float(sample_noise_levels(NoiseConfig(timestep_sampling=part), (32, 32), inner, [torch.Generator()]))
    assert float(t) == pytest.approx(median, abs=1e-6)


def test_mixtures_hand_each_share_of_quantiles_to_its_part():
    """Just inside a share's start and end lie its part's extremes; the centre of the last share is logsnr 5.36."""
    config = NoiseConfig(timestep_sampling="qinglong_flux", logit_mean=1.0)
    t = noise_level(config, SIZE, torch.tensor([0.79 / 2, 0.845, 0.95], dtype=torch.float64))
    flux = noise_level(NoiseConfig(timestep_sampling="flux_shift"), SIZE, torch.tensor([0.5], dtype=torch.float64))
    assert_close(t, torch.tensor([float(flux), 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(2.68))]).double())


@pytest.mark.parametrize("method", TIMESTEP_SAMPLING)
@pytest.mark.parametrize("preserve", [False, True])
def test_every_method_stays_inside_the_requested_range(method, preserve):
    config = NoiseConfig(
        timestep_sampling=method, min_timestep=300, max_timestep=650, preserve_distribution_shape=preserve
    )
    t = levels(config, count=400)
    assert t.dtype == torch.float32
    assert 0.3 - 1e-7 <= t.min() < t.max() <= 0.65 + 1e-7
    edges = levels(config, uniform=torch.tensor([0.0, 1.0 - 2**-24, 1.0]))
    assert 0.3 - 1e-7 <= edges.min() <= edges.max() <= 0.65 + 1e-7


def test_preserving_the_shape_keeps_relative_frequencies_inside_the_range():
    shape = {"timestep_sampling": "shift", "discrete_flow_shift": 3.0}
    whole = levels(NoiseConfig(**shape), count=40_000, seed=1)
    inside = whole[(whole >= 0.4) & (whole <= 0.8)]
    kept = levels(
        NoiseConfig(**shape, min_timestep=400, max_timestep=800, preserve_distribution_shape=True), count=len(inside)
    )
    expected = torch.histc(inside, bins=8, min=0.4, max=0.8)
    assert ((torch.histc(kept, bins=8, min=0.4, max=0.8) - expected).abs() <= 6 * (2 * expected).sqrt()).all()


def test_an_unreachable_range_is_clamped_instead_of_left():
    config = NoiseConfig(
        timestep_sampling="logsnr", logit_mean=5.0, logit_std=0.01, min_timestep=900, preserve_distribution_shape=True
    )
    assert_close(levels(config, count=1), torch.tensor([0.9]))


def test_sigma_mode_visits_thousandths_only_and_treats_limits_as_noise_levels():
    t = levels(NoiseConfig(discrete_flow_shift=5.0, max_timestep=500), count=2000)
    assert_close(t * 1000, (t * 1000).round(), atol=1e-4, rtol=0)
    assert t.min() >= 1e-3
    assert t.max() <= 0.5
    assert t.median() > 0.35  # half of the shifted median 5/6: high noise is where the shift puts the levels


def test_sigma_mode_ends_exactly_at_its_limits_and_never_reaches_zero():
    for limit in (11, 26, 29, 52, 500, 999, 1000):  # at some of these float64 arithmetic ends just above the limit
        highest = levels(NoiseConfig(min_timestep=10, max_timestep=limit), uniform=torch.tensor([0.0]))
        assert network_timestep(highest).item() == pytest.approx(limit, abs=1e-4)
    assert levels(NoiseConfig(), uniform=torch.tensor([1.0])).item() == pytest.approx(0.001)
    wild = levels(NoiseConfig(weighting_scheme="mode", mode_scale=20.0), uniform=torch.linspace(0, 1, 50))
    assert (wild.min().item(), wild.max().item()) == pytest.approx((0.001, 1.0))


def test_given_quantiles_stratify_sigma_mode_too():
    u = stratified_uniform(100, 100, torch.Generator().manual_seed(1))
    t = levels(NoiseConfig(), uniform=u)
    assert sorted(((t - 1e-4) * 100).long().tolist()) == list(range(100))


def test_an_items_level_depends_on_its_own_generator_only():
    config = NoiseConfig(timestep_sampling="shift", min_timestep=200, preserve_distribution_shape=True)

    def draw(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample_noise_levels(config, SIZE, None, generators).tolist()

    assert draw(1, 2, 3) == [*draw(1), *draw(2), *draw(3)]
    assert len(set(draw(1, 2, 3))) == 3


def test_given_quantiles_are_left_unchanged_by_redraws():
    u = torch.full((8,), 0.01, dtype=torch.float64)
    config = NoiseConfig(timestep_sampling="uniform", min_timestep=500, preserve_distribution_shape=True)
    assert levels(config, uniform=u).min() >= 0.5
    assert u.tolist() == [0.01] * 8


@pytest.mark.parametrize(("count", "buckets"), [(100, 10), (7, 10), (25, 10)])
def test_stratified_quantiles_fill_every_interval_evenly_in_random_order(count, buckets):
    u = stratified_uniform(count, buckets, torch.Generator().manual_seed(0))
    filled = torch.bincount((u * buckets).long(), minlength=buckets)
    assert len(u) == count
    assert filled.max() <= math.ceil(count / buckets)
    assert count % buckets or filled.min() == count // buckets
    assert u.tolist() != u.sort().values.tolist()


def test_the_network_is_told_a_thousand_times_the_level_and_never_more_than_1000():
    assert network_timestep(torch.tensor([0.0, 0.651, 1.0, 1.0 + 1e-6])).tolist() == pytest.approx([0, 651, 1000, 1000])
    assert network_timestep(torch.tensor([1.0 + 1e-6])).item() == 1000


def test_mixing_and_velocity_belong_to_one_straight_path():
    """The velocity is the derivative of the mixed latents by t, per item and for all frames alike, in float32."""
    latents, noise = torch.randn(2, 3, 16, 2, 4, 4).bfloat16()
    t = torch.tensor([0.0, 0.25, 1.0])
    mixed, target = add_noise(latents, noise, t), velocity_target(latents, noise)
    assert mixed.dtype == target.dtype == torch.float32
    assert torch.equal(mixed[0], latents[0].float())
    assert torch.equal(mixed[2], noise[2].float())
    assert_close((add_noise(latents, noise, t + 0.5) - mixed) / 0.5, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "sigmoidal"}, "--timestep_sampling sigmoidal"),
        ({"weighting_scheme": "cosine"}, "--weighting_scheme cosine"),
        ({"discrete_flow_shift": 0.0}, "--discrete_flow_shift 0.0"),
        ({"sigmoid_scale": -1.0}, "--sigmoid_scale -1.0"),
        ({"logit_std": float("nan")}, "--logit_std nan"),
        ({"logit_mean": float("inf")}, "--logit_mean inf"),
        ({"min_timestep": 900, "max_timestep": 100}, "--min_timestep 900 --max_timestep 100"),
        ({"max_timestep": 0}, "--max_timestep 0"),
        ({"max_timestep": 1001}, "--max_timestep 1001"),
        ({"num_timestep_buckets": 1}, "--num_timestep_buckets 1"),
    ],
)
def test_impossible_settings_are_refused_by_flag_name(options, message):
    with pytest.raises(ConfigError, match=message):
        NoiseConfig(**options)


@pytest.mark.parametrize("scheme", ["mode", "logit_normal"])
def test_a_scheme_without_effect_is_warned_about(scheme, caplog):
    with caplog.at_level(logging.WARNING):
        NoiseConfig(weighting_scheme=scheme).check()
        assert not caplog.records
        NoiseConfig(weighting_scheme=scheme, timestep_sampling="uniform").check()
    assert [f"--weighting_scheme {scheme} has no effect" in record.message for record in caplog.records] == [True]
