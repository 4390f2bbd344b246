"""--sweep: one prompt with several values of some settings, each combination a picture, all of them in one grid."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from PIL import Image

from utils import cli
from utils.errors import ConfigError, suggest
from utils.options import Section, option
from utils.text import counted
from wan.frames import layout
from wan.generation.grid import draw_grid
from wan.generation.prompt import OPTIONS, Prompt
from wan.generation.prompt_lines import parse_value
from wan.generation.request import Request, SamplingConfig
from wan.lora.trained_for import TrainedFor
from wan.models.options import LoRAConfig
from wan.models.tasks import TaskSpec

_OF_PROMPTS = {
    **{option.flag or option.key: option for option in OPTIONS.values() if option.sweep},
    **{option.sweep: option for option in OPTIONS.values() if option.sweep},
}
"""Name in --sweep -> option of the prompt."""

_OF_SAMPLING = {
    **{"sample_solver": "sample_solver", "solver": "sample_solver"},
    **{"reasoning_frames": "reasoning_frames", "reasoning_steps": "reasoning_steps"},
}
"""Name in --sweep -> field of `SamplingConfig`."""

_MULTIPLIER = "lora_multiplier"
_KEYS = (*layout.KEYS, *_OF_PROMPTS, *_OF_SAMPLING, _MULTIPLIER)


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
        """Setting that the key stands for, the same for two names of one setting."""
        option = _OF_PROMPTS.get(self.key)
        return option.key if option else _OF_SAMPLING.get(self.key, self.key)


@dataclass(frozen=True)
class SweepImage:
    """One picture to make."""

    request: Request
    multipliers: tuple[float, ...]  # of the LoRA files, as in --lora_multiplier
    labels: tuple[str, ...] = ()  # `key=value` for each axis
    name: str | None = None  # of the prompt

    @property
    def options(self) -> dict[str, Any]:
        """The flags of wan_generate_video.py that ask for this picture and vary between cells."""
        multipliers = {_MULTIPLIER: list(self.multipliers)} if self.multipliers else {}
        return self.request.options | multipliers

    @property
    def suffix(self) -> str:
        """End of the file names: the name, and `_key-value` for each axis."""
        return (f"_{self.name}" if self.name else "") + "".join(
            f"_{label.replace('=', '-').replace(';', '+')}" for label in self.labels
        )


@dataclass(frozen=True)
class SweepConfig(Section):
    """comparing settings"""

    sweep: tuple[str, ...] = option(
        (),
        help="KEY=VALUE,VALUE,...: a picture for each value, with several --sweep for each combination, and a grid of "
        f"them; keys: {', '.join(_KEYS)}",
        metavar="KEY=VALUES",
        action=cli.Collected,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
            request = Request.resolve(prompt, task, sampling, trained)
            return [SweepImage(request, lora.lora_multiplier, name=prompt.name)]
        if prompt.seed is None:
            prompt = replace(prompt, seed=random.SystemRandom().randrange(1 << 32))
        if trained.layout is not None and prompt.wants_trained_layout:
            width, height = trained.size or (None, None)
            prompt = replace(prompt, one_frame=str(trained.layout)).over(Prompt(width=width, height=height))
        first, *others = ([(axis, value) for value in axis.values] for axis in self.axes)
        cells = []
        for row in itertools.product(*others):
            for across in first:
                labels = tuple(f"{axis.key}={value}" for axis, value in (across, *row))
                place = f"{prompt.place}: --sweep {' '.join(labels)}"
                settings = _Settings(replace(prompt, place=place), sampling, lora)
                for axis, value in (across, *row):
                    settings = settings.with_value(axis, value, place)
                request = Request.resolve(settings.prompt, task, settings.sampling, trained)
                cells.append(SweepImage(request, settings.lora.lora_multiplier, labels, prompt.name))
        return cells

    def draw(self, images: Sequence[Image.Image | None]) -> Image.Image:
        """The grid of the pictures of one prompt, given in the order of `cells`; one that failed is None."""
        across, *others = ([f"{axis.key}={value}" for value in axis.values] for axis in self.axes)
        rows = [images[start : start + len(across)] for start in range(0, len(images), len(across))]
        return draw_grid(rows, across, ["\n".join(labels) for labels in itertools.product(*others)])


class _Settings(NamedTuple):
    """Everything that a sweep may vary."""

    prompt: Prompt
    sampling: SamplingConfig
    lora: LoRAConfig  # its multipliers

    def with_value(self, axis: Axis, text: str, place: str) -> "_Settings":
        """One value set. Raises ConfigError, which starts with `place`, for a value that the setting can't have."""
        if axis.key in layout.KEYS:
            one_frame = layout.with_values(self.prompt.one_frame or "", {axis.key: text})
            return self._replace(prompt=replace(self.prompt, one_frame=one_frame))
        if axis.key in _OF_PROMPTS:
            return self._replace(prompt=parse_value(_OF_PROMPTS[axis.key], text, place).over(self.prompt))
        if axis.key in _OF_SAMPLING:
            return self._replace(sampling=_with_value(self.sampling, axis.target, text, place))
        return self._replace(lora=replace(self.lora, lora_multiplier=_multipliers(text, self.lora, place)))


def _with_value(sampling: SamplingConfig, name: str, text: str, place: str) -> SamplingConfig:
    kind, _ = cli.value_type(get_type_hints(SamplingConfig)[name])
    try:
        changed: dict[str, Any] = {name: kind(text)}
        return replace(sampling, **changed)
    except ValueError:
        raise ConfigError(f"{place}: is not a whole number") from None
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _multipliers(text: str, lora: LoRAConfig, place: str) -> tuple[float, ...]:
    """`0.6;1` -> one number per LoRA file; those that are left out stay as --lora_multiplier has them."""
    try:
        given = tuple(float(part) for part in text.split(";"))
        if not all(map(math.isfinite, given)):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{place}: is not a number; write e.g. {_MULTIPLIER}=0.6,1") from None
    if len(given) > len(lora.lora_weight):
        files = len(lora.lora_weight)
        raise ConfigError(
            f"{place}: {counted(len(given), 'number')} for {counted(files, 'LoRA file')}; give each a --lora_weight"
        )
    usual = (*lora.lora_multiplier, *[1.0] * len(lora.lora_weight))[: len(lora.lora_weight)]
    return (*given, *usual[len(given) :])
