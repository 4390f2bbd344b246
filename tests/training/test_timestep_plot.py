"""The plot of noise levels: exact counts, and what the text and the picture show."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from utils.errors import ConfigError
from wan.training import timestep_plot
from wan.training.timestep_plot import Histogram, count, draw_levels, picture, show, text_lines
from wan.training.timesteps import TIMESTEP_SAMPLING, WEIGHTING_SCHEMES, NoiseConfig, loss_weight

SIZE = (68, 120)


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(timestep_plot, "_DRAWS", 2000)


@pytest.mark.parametrize("method", TIMESTEP_SAMPLING)
def test_every_method_can_be_shown_as_text(method, few_draws, capsys):
    show(NoiseConfig(timestep_sampling=method), SIZE, "console", Path("unused.png"))
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
    levels, _ = picture(Histogram(shares, torch.ones(100)), "none", "title").axes
    bars = {round(bar.get_x(), 6): (bar.get_height(), bar.get_width()) for bar in levels.patches if bar.get_height()}
    assert bars == {0.1: pytest.approx((25, 0.009)), 0.89: pytest.approx((75, 0.009))} and len(levels.patches) == 100
    assert levels.get_xlim() == (0, 1) and levels.get_ylim()[0] == 0 and levels.get_ylim()[1] > 75


@pytest.mark.parametrize(("scheme", "scale"), [("none", "linear"), ("mode", "linear"), ("sigma_sqrt", "log")])
def test_weights_of_the_picture_are_those_of_the_loss(scheme, scale):
    _, weights = picture(Histogram(torch.full((100,), 0.01), torch.ones(100)), scheme, "title").axes
    (line,) = weights.lines
    t = torch.arange(1, 1001) / 1000
    assert line.get_xydata().tolist() == torch.stack([t, loss_weight(scheme, t)], 1).tolist()
    assert weights.get_yscale() == scale and (scale == "log" or weights.get_ylim()[0] == 0)


def test_without_matplotlib_the_extra_is_named_and_the_text_still_shown(few_draws, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'^--show_timesteps image needs the package matplotlib; .*"\.\[plots\]"'):
        show(NoiseConfig(), SIZE, "image", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    show(NoiseConfig(), SIZE, "console", Path("unused.png"))
    assert capsys.readouterr().out.startswith("timestep_sampling ")


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
    title = f"{timestep_plot._describe(config)}; 100,000 draws for latents of 120x68"
    assert title.startswith("timestep_sampling qinglong_flux, discrete_flow_shift 3.25, ") and len(title) > 280
    figure = picture(Histogram(torch.full((100,), 0.01), torch.ones(100)), "none", title)
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert box.x0 > 0 and box.x1 < 1000 and box.y1 <= 760
    assert box.y0 > figure.axes[0].title.get_window_extent().y1 and " ".join(figure.get_suptitle().split()) == title
