"""A prompt as far as it was specified. Each of its options is declared once, as a field of `Prompt`.

From the declaration follow the key in TOML and JSON files, the option of prompt lines, the flag of the command line,
the name under which --sweep varies it, and what recipes and latent files say about the picture that was made.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils import cli
from utils.errors import ConfigError
from utils.images import LONGEST_SIDE, STEP
from utils.options import option
from wan.nets.spec import TRAINING_TIMESTEPS

COMMAND_LINE = "command line"
"""`Prompt.place` of the flags."""

_DECLARATION = "prompt option"  # key in the metadata of a field


@dataclass(frozen=True)
class PromptOption:
    """An option of prompts, and its names outside of prompt files."""

    key: str  # field of `Prompt`, and key in TOML and JSON files
    kind: type  # str, int or float: of the value, or of each of several
    is_list: bool  # takes several values
    letters: str | None = None  # in prompt lines, after two hyphens; None: the text in front of the options
    flag: str | None = None  # of the command line, without hyphens
    bounds: tuple[int, int] | None = None  # the smallest and the largest value
    sweep: str | None = None  # short name in --sweep, beside the flag or key; None: can't vary
    request: str | None = None  # attribute of `Request` that has the value which was used
    latent: str | None = None  # key in the metadata of latent files, which musubi-tuner chose
    is_image: bool = False  # names image files

    def check(self, value: Any, place: str) -> None:
        """Raise ConfigError, which starts with `place`, for a value out of bounds. None is no value."""
        if value is not None and self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            raise ConfigError(f"{place}: must be {self.bounds[0]} to {self.bounds[1]}")


def _option(
    letters: str | None = None,
    *,
    flag: str | None = None,
    help: str | None = None,
    bounds: tuple[int, int] | None = None,
    sweep: str | None = None,
    request: str | None = None,
    latent: str | None = None,
    is_image: bool = False,
) -> Any:
    """A field of `Prompt`, see `PromptOption`. help: of the flag."""
    names = {"letters": letters, "flag": flag, "bounds": bounds, "sweep": sweep, "request": request, "latent": latent}
    field: dataclasses.Field[Any] = dataclasses.field()
    if flag is not None and help is not None:
        minimum, maximum = bounds or (None, None)
        field = option(None, help=help, flag=flag, minimum=minimum, maximum=maximum, finite=False, any_bytes=is_image)
    declaration = {_DECLARATION: names | {"is_image": is_image}}
    return dataclasses.field(default=None, metadata={**field.metadata, **declaration})


_SIDES = (STEP, LONGEST_SIDE)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One image to make, as far as it was specified: None leaves the value to the command line or the task."""

    prompt: str | None = _option(flag="prompt", help="prompt", request="prompt", latent="prompt")
    width: int | None = _option("w", bounds=_SIDES, sweep="width")  # pixels
    height: int | None = _option("h", bounds=_SIDES, sweep="height")
    frame_count: int | None = _option("f")  # no effect: one-frame use makes one image
    seed: int | None = _option(
        "d", flag="seed", help="default: a random one per image", sweep="seed", request="seed", latent="seeds"
    )
    sample_steps: int | None = _option(
        "s",
        flag="infer_steps",
        help="default: that of the task",
        bounds=(1, TRAINING_TIMESTEPS),
        sweep="steps",
        request="steps",
        latent="infer_steps",
    )
    cfg_scale: float | None = _option(
        "l",
        flag="guidance_scale",
        help="1 skips the second forward pass; default: that of the task",
        sweep="guidance",
        request="guidance",
        latent="guidance_scale",
    )
    guidance_scale: float | None = _option("g")  # embedded guidance, which Wan does not have
    discrete_flow_shift: float | None = _option(
        "fs", flag="flow_shift", help="default: that of the task", sweep="shift", request="shift", latent="flow_shift"
    )
    negative_prompt: str | None = _option(
        "n",
        flag="negative_prompt",
        help="default: that of the task",
        request="negative_prompt",
        latent="negative_prompt",
    )
    image_path: str | None = _option(
        "i",
        flag="image_path",
        help="start image: aspect ratio and CLIP feature; default: earliest control",
        is_image=True,
    )
    end_image_path: str | None = _option(
        "ei",
        flag="end_image_path",
        help="end image of flf2v: CLIP feature; default: the latest control",
        is_image=True,
    )
    control_image_path: tuple[str, ...] | None = _option(
        "ci",
        flag="control_image_path",
        help="control images, in the order of control_index",
        request="controls",
        is_image=True,
    )
    control_image_mask_path: tuple[str, ...] | None = _option(
        "cim",
        flag="control_image_mask_path",
        help="a mask per control image, white where it is to be used; default: its alpha channel",
        is_image=True,
    )
    one_frame: str | None = _option(
        "of",
        flag="one_frame_inference",
        help='time indices: "control_index=0,target_index=1"; auto: those of the LoRA',
        request="layout",
        latent="one_frame_inference",
    )
    place: str = "prompt"  # where it stands, for messages
    name: str | None = None  # in the names of its files

    @property
    def wants_trained_layout(self) -> bool:
        """True when the time indices are to be those that the LoRA was trained at (`auto`)."""
        return (self.one_frame or "").strip() == "auto"

    def over(self, base: "Prompt") -> "Prompt":
        """Prompt with these values, and those of `base` wherever this one leaves a value open."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return replace(base, **{name: value for name, value in values.items() if value is not None})


def _declared() -> dict[str, PromptOption]:
    hints, options = typing.get_type_hints(Prompt), {}
    for field in dataclasses.fields(Prompt):
        if _DECLARATION in field.metadata:
            kind, is_list = cli.value_type(hints[field.name])
            options[field.name] = PromptOption(field.name, kind, is_list, **field.metadata[_DECLARATION])
    return options


OPTIONS: Mapping[str, PromptOption] = _declared()
"""All options, by key."""

LETTERS: Mapping[str, PromptOption] = {option.letters: option for option in OPTIONS.values() if option.letters}
"""The options of prompt lines, by their letters."""

FLAGS: Mapping[str, PromptOption] = {option.flag: option for option in OPTIONS.values() if option.flag}
"""The options that the command line has too, by flag."""

PROMPT_LINE_HINTS: Mapping[str, str] = {
    f"--{letters}": f"is an option of prompt lines; on the command line it is --{option.flag or 'video_size'}"
    for letters, option in LETTERS.items()
    if option.flag or option.key in ("width", "height")
}
"""What to say of the options of prompt lines where they are no flags."""

_FIRST_INDEX = re.compile(r"(.*,)?\s*control_index\s*=\s*[0-9]+\s*")


def hint_where_cut(words: Sequence[str]) -> str:
    """A hint for any complaint about a command line that ends as if a shell had cut it at a `;`; else empty.

    Of `--one_frame_inference control_index=0;2,target_index=1 --save_path out` a shell leaves
    `--one_frame_inference control_index=0`, and all flags behind are missing too.
    """
    flag, _, value = (words[-1] if words else "").partition("=")
    if len(words) > 1 and words[-2] == "--one_frame_inference":
        flag, value = words[-2:]
    if flag != "--one_frame_inference" or not _FIRST_INDEX.fullmatch(value):
        return ""
    return (
        ". A shell ends the command at ';': put quotes around it, as in --one_frame_inference "
        '"control_index=0;2,target_index=1"'
    )
