"""--sweep: one prompt with several values of some settings, each combination a picture, all of them in one grid."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from PIL import Image

from utils import cli
from utils.errors import ConfigError, suggest
from utils.options import option
from wan.frames import layout
from wan.generation.grid import draw_grid
from wan.generation.prompt_lines import Prompt, parse_value
from wan.generation.request import Request, SamplingConfig
from wan.lora.trained_for import TrainedFor
from wan.models.options import LoRAConfig
from wan.models.tasks import TaskSpec

# What may vary: names on the command line -> where the value goes.
_OF_PROMPTS = {
    **{"seed": "seed", "width": "width", "height": "height"},
    **{"infer_steps": "sample_steps", "guidance_scale": "cfg_scale", "flow_shift": "discrete_flow_shift"},
    **{"steps": "sample_steps", "guidance": "cfg_scale", "shift": "discrete_flow_shift"},
}
_OF_SAMPLING = {"sample_solver": "sample_solver", "solver": "sample_solver"}
_NUMBERS_OF_SAMPLING = ("reasoning_frames", "reasoning_steps")
_MULTIPLIER = "lora_multiplier"
_KEYS = (*layout.KEYS, *_OF_PROMPTS, *_OF_SAMPLING, *_NUMBERS_OF_SAMPLING, _MULTIPLIER)


@dataclass(frozen=True)
class Axis:
    """A setting that varies, and its values as they were given."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """`key=value,value`. ConfigError for other texts and unknown keys."""
        key, equals, values = (part.strip() for part in text.partition("="))
        if key not in _KEYS:
            hint = suggest(key, _KEYS) or f"; use one of {', '.join(_KEYS)}"
            raise ConfigError(f"--sweep {text}: unknown key '{key}'{hint}")
        axis = cls(key, tuple(value.strip() for value in values.split(",")))
        if not equals or not all(axis.values):
            raise ConfigError(f"--sweep {text}: a value is missing; write e.g. {key}=1,2")
        if len(set(axis.values)) < len(axis.values):
            raise ConfigError(f"--sweep {text}: holds a value twice; give each once")
        return axis

    @property
    def target(self) -> str:
        """What the key sets: two names of one setting have the same."""
        return {**_OF_PROMPTS, **_OF_SAMPLING}.get(self.key, self.key)


@dataclass(frozen=True)
class SweepImage:
    """One picture to make."""

    request: Request
    multipliers: tuple[float, ...]  # of the LoRA files, as in --lora_multiplier
    labels: tuple[str, ...] = ()  # `key=value` for each axis

    @property
    def options(self) -> dict[str, Any]:
        """The flags of wan_generate_video.py that ask for this picture and vary between cells."""
        multipliers = {_MULTIPLIER: list(self.multipliers)} if self.multipliers else {}
        return self.request.options | multipliers

    @property
    def suffix(self) -> str:
        """What file names say of it: `_key-value` for each axis."""
        return "".join(f"_{label.replace('=', '-').replace(';', '+')}" for label in self.labels)


@dataclass(frozen=True)
class SweepConfig:
    """comparing settings"""

    sweep: tuple[str, ...] = option(
        (),
        help="KEY=VALUE,VALUE,...: a picture for each value, with several --sweep for each combination, and a grid of "
        f"them; keys: {', '.join(_KEYS)}",
        metavar="KEY=VALUES",
        action=cli.Collected,
    )

    def __post_init__(self) -> None:
        targets = [axis.target for axis in self.axes]
        for axis in self.axes:
            if targets.count(axis.target) > 1:
                raise ConfigError(f"--sweep {axis.key}: varies twice; give all values at once")

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The first goes across, the others down."""
        return tuple(Axis.parse(text) for text in self.sweep)

    @property
    def size(self) -> int:
        """Number of pictures per prompt; 1 without axes."""
        return math.prod(len(axis.values) for axis in self.axes)

    def cells(
        self, prompt: Prompt, task: TaskSpec, sampling: SamplingConfig, trained: TrainedFor, lora: LoRAConfig
    ) -> list[SweepImage]:
        """The pictures of a prompt, row by row: only the prompt itself without axes. A seed that is drawn is shared.

        Raises ConfigError, which names the values, where one of them can't be made.
        """
        if not self.axes:
            return [SweepImage(Request.resolve(prompt, task, sampling, trained), lora.lora_multiplier)]
        if prompt.seed is None:
            prompt = replace(prompt, seed=random.SystemRandom().randrange(1 << 32))
        if trained.layout is not None and (prompt.one_frame or "").strip() == "auto":
            width, height = trained.size or (None, None)
            prompt = replace(prompt, one_frame=str(trained.layout)).over(Prompt(width=width, height=height))
        first, *others = ([(axis, value) for value in axis.values] for axis in self.axes)
        cells = []
        for row in itertools.product(*others):
            for across in first:
                cells.append(_cell((across, *row), prompt, task, sampling, trained, lora))
        return cells

    def draw(self, images: Sequence[Image.Image | None]) -> Image.Image:
        """The grid of the pictures of one prompt, given in the order of `cells`; one that failed is None."""
        across, *others = ([f"{axis.key}={value}" for value in axis.values] for axis in self.axes)
        rows = [images[start : start + len(across)] for start in range(0, len(images), len(across))]
        return draw_grid(rows, across, ["\n".join(labels) for labels in itertools.product(*others)])


def _cell(
    chosen: Sequence[tuple[Axis, str]],
    prompt: Prompt,
    task: TaskSpec,
    sampling: SamplingConfig,
    trained: TrainedFor,
    lora: LoRAConfig,
) -> SweepImage:
    labels = tuple(f"{axis.key}={value}" for axis, value in chosen)
    place = f"{prompt.place}: --sweep {' '.join(labels)}"
    prompt, multipliers = replace(prompt, place=place), lora.lora_multiplier
    indices = {axis.key: value for axis, value in chosen if axis.key in layout.KEYS}
    if indices:
        prompt = replace(prompt, one_frame=layout.with_values(prompt.one_frame or "", indices))
    for axis, value in chosen:
        if axis.key in _OF_PROMPTS:
            prompt = parse_value(axis.target, value, place).over(prompt)
        elif axis.key in _OF_SAMPLING:
            sampling = replace(sampling, **{axis.target: value})
        elif axis.key in _NUMBERS_OF_SAMPLING:
            sampling = _with_number(sampling, axis.key, value, place)
        elif axis.key == _MULTIPLIER:
            multipliers = _multipliers(value, lora, place)
    return SweepImage(Request.resolve(prompt, task, sampling, trained), multipliers, labels)


def _with_number(sampling: SamplingConfig, key: str, text: str, place: str) -> SamplingConfig:
    try:
        return replace(sampling, **{key: int(text)})
    except ValueError:
        raise ConfigError(f"{place}: is no whole number") from None
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _multipliers(text: str, lora: LoRAConfig, place: str) -> tuple[float, ...]:
    """`0.6;1` -> one number per LoRA file; those that are left out stay as --lora_multiplier has them."""
    try:
        given = tuple(float(part) for part in text.split(";"))
        if not all(map(math.isfinite, given)):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{place}: is no number; write e.g. {_MULTIPLIER}=0.6,1") from None
    if len(given) > len(lora.lora_weight):
        files = len(lora.lora_weight)
        raise ConfigError(f"{place}: {len(given)} numbers for {files} LoRA files; give each a --lora_weight")
    usual = (*lora.lora_multiplier, *[1.0] * len(lora.lora_weight))[: len(lora.lora_weight)]
    return (*given, *usual[len(given) :])
