"""The plot of noise levels: exact counts, and what the text and the picture show."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from wan.training import timestep_plot
from wan.training.timestep_plot import Histogram, count, draw_levels, picture, show, text_lines
from wan.training.timesteps import TIMESTEP_SAMPLING, WEIGHTING_SCHEMES, NoiseConfig

SIZE = (68, 120)


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(timestep_plot, "_DRAWS", 2000)


@pytest.mark.parametrize("method", TIMESTEP_SAMPLING)
def test_every_method_can_be_shown_as_text(method, few_draws, capsys):
    show(NoiseConfig(timestep_sampling=method), SIZE, "console")
    title, heading, *lines = capsys.readouterr().out.splitlines()
    assert title == f"timestep_sampling {method}; 2,000 draws for latents of 120x68"
    assert heading.split() == ["noise", "level", "share", "loss", "weight"] and len(lines) == 20
    assert sum(float(line.split()[3].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_every_weighting_scheme_can_be_shown_as_a_picture_the_same_one_each_time(scheme, few_draws, tmp_path):
    for name in ("a.png", "b.png"):
        show(NoiseConfig(weighting_scheme=scheme), SIZE, "image", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.format == "PNG" and image.size == (1000, 760)


def test_levels_are_drawn_as_often_as_training_draws_them():
    levels = draw_levels(NoiseConfig(timestep_sampling="shift", discrete_flow_shift=3.0), SIZE)
    assert len(levels) == 100_000
    # The shift maps quantile u of the normal numbers to 3x / (1 + 2x), x = sigmoid(u's normal); its middle is 0.75.
    below = float((levels < 0.75).float().mean())
    assert below == pytest.approx(0.5, abs=6 * 0.5 / 100_000**0.5)


def test_a_stratified_run_is_shown_stratified():
    config = NoiseConfig(timestep_sampling="uniform", num_timestep_buckets=20)
    shares = count(draw_levels(config, SIZE, 2000), "none", 20).shares
    assert shares.tolist() == pytest.approx([0.05] * 20, abs=0.0011)  # two draws; unstratified ones stray by twenty


def test_limits_of_the_noise_level_show():
    config = NoiseConfig(timestep_sampling="logsnr", min_timestep=300, max_timestep=600)
    shares = count(draw_levels(config, SIZE, 2000), "none", 10).shares
    assert (shares > 0).tolist() == [3 <= i < 6 for i in range(10)]


@pytest.mark.parametrize("intervals", [20, 100])
def test_the_thousandths_of_sigma_fill_the_intervals_evenly(intervals):
    thousandths = torch.arange(1, 1001) / 1000
    assert_close(count(thousandths, "none", intervals).shares, torch.full((intervals,), 1 / intervals))


def test_weights_are_means_over_the_levels_of_an_interval():
    histogram = count(torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0]), "sigma_sqrt", 4)
    assert histogram.shares.tolist() == pytest.approx([0.4, 0.2, 0, 0.4])
    expected = [(1e6 + 16) / 2, 4, float("nan"), (1 / 0.64 + 1) / 2]
    assert_close(histogram.weights.float(), torch.tensor(expected), equal_nan=True)


def test_text_shows_high_noise_first_with_bars_in_proportion():
    histogram = Histogram(torch.tensor([0.0, 0.2, 0.8]), torch.tensor([float("nan"), 16, 1]))
    assert text_lines(histogram)[1:] == [
        "0.67 - 1.00   80.00%             1  " + "#" * 50,
        "0.33 - 0.67   20.00%            16  " + "#" * 12,
        "0.00 - 0.33    0.00%             -",
    ]


def test_bars_of_the_picture_stand_at_their_level_in_proportion():
    shares = torch.zeros(100)
    shares[10], shares[89] = 0.25, 0.75
    image = picture(Histogram(shares, torch.ones(100)), "none", "title")
    blue = [sum(image.getpixel((x, y)) == (59, 117, 175) for y in range(110, 450)) for x in (173, 876, 529)]
    # The axis is 340 pixels high and ends at 80 %. The edge of a bar is blurred.
    assert blue == pytest.approx([340 * 25 / 80, 340 * 75 / 80, 0], abs=6)


def test_the_longest_description_stays_inside_the_picture():
    config = NoiseConfig(
        timestep_sampling="qinglong_flux",
        discrete_flow_shift=3.25,
        sigmoid_scale=1.25,
        weighting_scheme="sigma_sqrt",
        logit_mean=0.125,
        logit_std=1.125,
        mode_scale=1.375,
        min_timestep=100,
        max_timestep=900,
        preserve_distribution_shape=True,
        num_timestep_buckets=100,
    )
    title = timestep_plot._describe(config)
    assert title.startswith("timestep_sampling qinglong_flux, discrete_flow_shift 3.25, ") and len(title) > 250
    image = picture(Histogram(torch.full((100,), 0.01), torch.ones(100)), "none", title)
    plain = picture(Histogram(torch.full((100,), 0.01), torch.ones(100)), "none", "")
    assert image.crop((980, 0, 1000, 760)).getextrema() == ((255, 255),) * 3
    assert image.crop((0, 75, 1000, 760)).tobytes() == plain.crop((0, 75, 1000, 760)).tobytes()


@pytest.mark.parametrize("highest", [0.013, 0.3, 1, 1.27, 2.64, 3, 6.6, 47, 100])
def test_an_axis_has_four_to_seven_round_marks_and_reaches_the_highest_value(highest):
    marks = timestep_plot._round_steps(highest)
    assert 4 <= len(marks) <= 7 and marks[0] == 0 and marks[-2] < highest <= marks[-1] * (1 + 1e-12)
    assert f"{marks[1]:.0e}"[0] in "125" and marks[1] == pytest.approx(float(f"{marks[1]:.0e}"))
