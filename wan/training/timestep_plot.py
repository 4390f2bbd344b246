"""`--show_timesteps`: which noise levels training would draw, and how much their losses count."""

import dataclasses
import logging
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.errors import ConfigError
from utils.files import written_whole
from utils.options import Section, option
from utils.randomness import stratified_uniform
from wan.training.timesteps import NoiseConfig, loss_weight, sample_noise_levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_DRAWS = 100_000
_TEXT_ROWS, _BARS = 20, 100
_BAR_LETTERS = 50

_SIZE, _DPI = (10, 7.6), 100  # of the picture, inches and dots per inch
_TITLE_LETTERS = 120  # a line; all settings together take three


@dataclass(frozen=True)
class TimestepPlotConfig(Section):
    """noise level plot"""

    show_timesteps: str | None = option(
        None, help="show the distribution of noise levels as a PNG or as text, then exit", choices=("image", "console")
    )


@dataclass(frozen=True, eq=False)
class Histogram:
    """Noise levels in equal intervals of 0..1; each holds its upper end, as the levels of sigma are k / 1000, k > 0."""

    shares: Tensor  # [intervals], sum 1
    weights: Tensor  # [intervals] mean loss weight of the levels there, NaN without any


def show(config: NoiseConfig, latent_size: tuple[int, int], mode: str, output: Path) -> None:
    """Draw 100,000 noise levels and print a histogram (mode `console`) or write one (`image`) as a PNG to `output`.

    latent_size: (H, W) of the items, for the methods whose shift depends on it. Raises ConfigError like `picture`.
    """
    levels = draw_levels(config, latent_size)
    height, width = latent_size
    title = f"{_describe(config)}; {_DRAWS:,} draws for latents of {width}x{height}"
    if mode == "console":
        print("\n".join([title, *text_lines(count(levels, config.weighting_scheme, _TEXT_ROWS))]))
        return
    figure = picture(count(levels, config.weighting_scheme, _BARS), config.weighting_scheme, title)
    with written_whole(output) as path:
        figure.savefig(path)
    log.info("wrote %s", output)


def draw_levels(config: NoiseConfig, latent_size: tuple[int, int], draws: int = _DRAWS) -> Tensor:
    """[draws] noise levels, drawn as in training, stratified if the settings ask for it; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    if config.num_timestep_buckets:
        uniform = stratified_uniform(draws, config.num_timestep_buckets, generator)
    else:
        uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    return sample_noise_levels(config, latent_size, uniform, [generator] * draws)


def count(levels: Tensor, weighting_scheme: str, intervals: int) -> Histogram:
    """levels [draws] in 0..1 -> how many lie in each interval, and their mean loss weight."""
    # The small number keeps float32 levels at an interval's upper end from counting for the next one.
    places = (levels.double() * intervals - 1e-5).ceil().long().clamp(1, intervals) - 1
    numbers = torch.bincount(places, minlength=intervals)
    weights = torch.bincount(places, loss_weight(weighting_scheme, levels).double(), minlength=intervals)
    return Histogram(numbers / len(levels), weights / numbers)


def text_lines(histogram: Histogram) -> list[str]:
    """One line per interval, from high noise to low; the longest bar has 50 letters."""
    intervals, most = len(histogram.shares), float(histogram.shares.max())
    lines = ["noise level     share   loss weight"]
    for i in reversed(range(intervals)):
        share, weight = float(histogram.shares[i]), float(histogram.weights[i])
        shown = "-" if math.isnan(weight) else f"{weight:.4g}"
        bar = "#" * round(_BAR_LETTERS * share / most)
        lines.append(f"{i / intervals:.2f} - {(i + 1) / intervals:.2f}  {share:7.2%}  {shown:>12}  {bar}".rstrip())
    return lines


def picture(histogram: Histogram, weighting_scheme: str, title: str) -> "Figure":
    """Two diagrams over the noise level: the share of each interval, and the loss weight.

    Raises ConfigError when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            '--show_timesteps image needs the package matplotlib; run: pip install ".[plots]", or use console'
        ) from None
    figure = Figure(_SIZE, _DPI, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, _TITLE_LETTERS)), fontsize="medium")
    levels, weights = figure.subplots(2, sharex=True, height_ratios=(2, 1))

    bars = len(histogram.shares)
    lefts = [i / bars for i in range(bars)]
    levels.bar(lefts, (100 * histogram.shares).tolist(), 0.9 / bars, align="edge")
    levels.set(title=f"% of the items per {1 / bars:g}")

    t = torch.arange(1, 1001) / 1000
    weights.plot(t.tolist(), loss_weight(weighting_scheme, t).tolist(), color="tab:orange")
    weights.set(title=f"loss weight (--weighting_scheme {weighting_scheme})")
    if max(weights.lines[0].get_ydata()) > 100:  # sigma_sqrt reaches 10^6
        weights.set_yscale("log")
    else:
        weights.set_ylim(bottom=0)
    weights.set(xlabel="noise level: 0 = the image, 1 = noise", xlim=(0, 1), xticks=[i / 10 for i in range(11)])
    for axes in (levels, weights):
        axes.grid()
        axes.set_axisbelow(True)
    return figure


def _describe(config: NoiseConfig) -> str:
    """The method and every setting that is not at its default."""
    changed = [
        f"{field.name} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name == "timestep_sampling" or getattr(config, field.name) != field.default
    ]
    return ", ".join(changed)
