"""`--show_timesteps`: which noise levels training would draw, and how much their losses count."""

import dataclasses
import logging
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import written_whole
from utils.options import Section, option
from utils.randomness import stratified_uniform
from wan.training.timesteps import NoiseConfig, loss_weight, sample_noise_levels

log = logging.getLogger(__name__)

_DRAWS = 100_000
_TEXT_ROWS, _BARS = 20, 100
_BAR_LETTERS = 50

# The picture, in pixels; it is drawn twice as large and then shrunk, which smooths its lines.
_SIZE, _SCALE = (1000, 760), 2
_LEFT, _RIGHT = 80, 970
_TITLE_LETTERS = 115  # a line; all settings together take three
_LEVELS_BOX, _WEIGHTS_BOX = (110, 450), (535, 690)  # top and bottom of the two diagrams
_WHITE, _BLACK, _GREY, _BLUE, _ORANGE = "#ffffff", "#222222", "#dddddd", "#3b75af", "#e08214"


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


def show(config: NoiseConfig, latent_size: tuple[int, int], mode: str, output: Path | None = None) -> None:
    """Draw 100,000 noise levels and print a histogram (mode `console`) or write one (`image`) as a PNG to `output`.

    latent_size: (H, W) of the items, for the methods whose shift depends on it.
    """
    levels = draw_levels(config, latent_size)
    height, width = latent_size
    title = f"{_describe(config)}; {_DRAWS:,} draws for latents of {width}x{height}"
    if mode == "console":
        print("\n".join([title, *text_lines(count(levels, config.weighting_scheme, _TEXT_ROWS))]))
        return
    with written_whole(output) as path:
        picture(count(levels, config.weighting_scheme, _BARS), config.weighting_scheme, title).save(path)
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


def picture(histogram: Histogram, weighting_scheme: str, title: str) -> Image.Image:
    """Two diagrams over the noise level: the share of each interval, and the loss weight."""
    canvas = _Canvas()
    for row, line in enumerate(textwrap.wrap(title, _TITLE_LETTERS)):
        canvas.text(line, (_LEFT, 20 + 20 * row))
    bars = len(histogram.shares)
    percents = (100 * histogram.shares).tolist()
    steps = _round_steps(max(percents))
    canvas.frame(_LEVELS_BOX, f"% of the items per {1 / bars:g}", [(f"{y:g}", y / steps[-1]) for y in steps])
    for i, percent in enumerate(percents):
        canvas.bar(_LEVELS_BOX, i / bars, (i + 1) / bars, percent / steps[-1])

    t = torch.arange(1, 1001) / 1000
    weights = loss_weight(weighting_scheme, t)
    if weights.max() > 100:  # sigma_sqrt reaches 10^6
        powers = range(math.ceil(math.log10(float(weights.max()))) + 1)
        ticks, heights = [(f"{10**p:,}", p / powers[-1]) for p in powers], weights.log10() / powers[-1]
    else:
        steps = _round_steps(float(weights.max()))
        ticks, heights = [(f"{y:g}", y / steps[-1]) for y in steps], weights / steps[-1]
    canvas.frame(_WEIGHTS_BOX, f"loss weight (--weighting_scheme {weighting_scheme})", ticks)
    canvas.line(_WEIGHTS_BOX, list(zip(t.tolist(), heights.tolist(), strict=True)))
    canvas.text("noise level: 0 = the image, 1 = noise", ((_LEFT + _RIGHT) / 2, _SIZE[1] - 25), anchor="mm")
    return canvas.finished()


class _Canvas:
    """Pillow with points as shares of a diagram: x and y in 0..1, y upwards. A box is (top, bottom) in pixels."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", tuple(_SCALE * side for side in _SIZE), _WHITE)
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        return self._image.resize(_SIZE, Image.Resampling.LANCZOS)

    def text(self, text: str, place: tuple[float, float], size: int = 14, anchor: str = "lm") -> None:
        font = ImageFont.load_default(_SCALE * size)
        self._draw.text([_SCALE * part for part in place], text, _BLACK, font, anchor)

    def frame(self, box: tuple[int, int], label: str, ticks: list[tuple[str, float]]) -> None:
        top, bottom = box
        self.text(label, (_LEFT, top - 20))
        for name, y in ticks:
            self._draw.line([self._at(box, 0, y), self._at(box, 1, y)], _GREY, _SCALE)
            self.text(name, (_LEFT - 8, bottom - y * (bottom - top)), anchor="rm")
        for tenth in range(11):
            self._draw.line([self._at(box, tenth / 10, 0), self._at(box, tenth / 10, 1)], _GREY, _SCALE)
            self.text(f"{tenth / 10:g}", (_LEFT + tenth / 10 * (_RIGHT - _LEFT), bottom + 15), anchor="mm")

    def bar(self, box: tuple[int, int], left: float, right: float, height: float) -> None:
        if height > 0:
            (x, y), (x_end, y_end) = self._at(box, left, height), self._at(box, right, 0)
            self._draw.rectangle([x, y, x_end - _SCALE, y_end], _BLUE)

    def line(self, box: tuple[int, int], points: list[tuple[float, float]]) -> None:
        self._draw.line([self._at(box, *point) for point in points], _ORANGE, 3 * _SCALE)

    @staticmethod
    def _at(box: tuple[int, int], x: float, y: float) -> tuple[float, float]:
        top, bottom = box
        return _SCALE * (_LEFT + x * (_RIGHT - _LEFT)), _SCALE * (bottom - y * (bottom - top))


def _round_steps(highest: float) -> list[float]:
    """Marks for an axis from 0 to at least `highest`: multiples of 1, 2 or 5 times a power of ten, 4 to 7 of them."""
    power = 10.0 ** math.floor(math.log10(highest / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if math.ceil(highest / (factor * power)) <= 6)
    return [i * step for i in range(math.ceil(highest / step) + 1)]


def _describe(config: NoiseConfig) -> str:
    """The method and every setting that is not at its default."""
    changed = [
        f"{field.name} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name == "timestep_sampling" or getattr(config, field.name) != field.default
    ]
    return ", ".join(changed)
