"""Layouts of one-frame clips as text: `control_index=0;2,target_index=1,layout=causal`, and as keys of dataset files.

A clip of control images and one image to generate (the target), at RoPE time indices that are chosen freely. Caches,
LoRA files, recipes and prompts all name it by this text. Rules: docs/formats.md#conditioning.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from utils.errors import ConfigError, suggest
from utils.options import Section, option
from utils.text import counted
from wan.frames.clip import Clip
from wan.frames.encoding import ENCODINGS, INDEPENDENT, Encoding, encoding_named
from wan.frames.sizes import AS_TARGET, SIZE_KEYS, ControlSizes, parse_resolution

log = logging.getLogger(__name__)

KEYS = ("control_index", "target_index", "layout", *SIZE_KEYS)
INDEX_KEYS = ("fp_1f_clean_indices", "fp_1f_target_index")  # of datasets
LAST_INDEX = (1 << 31) - 1
"""The largest time index, which fits in 32 bits; Wan2.1 was trained on 0 to 20."""
_FRAMEPACK_WORDS = ("default", "no_2x", "no_4x", "no_post")


ALPHA = ("mask", "ignore")
"""What the alpha channels of images are taken for."""


@dataclass(frozen=True)
class LayoutConfig(Section):
    """one-frame layout"""

    one_frame_layout: str | None = option(
        None,
        help="how images become latent frames, where dataset or prompt don't say: independent, each on its own, or "
        "causal, as frames of one video (experiment); default: independent",
        choices=tuple(ENCODINGS),
    )
    alpha: str | None = option(
        None,
        help="transparent pixels of targets and control images, where the dataset doesn't say: mask leaves them out, "
        "ignore uses the colour stored beneath, as musubi-tuner does; default: mask",
        choices=ALPHA,
    )


@dataclass(frozen=True)
class OneFrameLayout:
    """Time indices of a one-frame clip, how its images become latent frames, and sizes of the control images.

    `str()` prints what `parse` reads. Raises ConfigError for indices, encoding and sizes that do not go together.
    """

    control_indices: tuple[int, ...]  # time index of each control image, in the order the images are given
    target_index: int  # time index of the frame to generate
    encoding: Encoding = INDEPENDENT  # how images become latent frames
    control_sizes: ControlSizes = AS_TARGET

    def __post_init__(self) -> None:
        for name, indices in (("control_index", self.control_indices), ("target_index", (self.target_index,))):
            for index in indices:
                if index < 0:
                    raise ConfigError(f"{name}={index} is negative; time indices start at 0")
                if index > LAST_INDEX:
                    raise ConfigError(f"{name}={index} is too large; time indices end at {LAST_INDEX}")
        if self.target_index in self.control_indices:
            free = max(self.control_indices) + 1
            raise ConfigError(
                f"target_index={self.target_index} is also a control index; give the target its own, e.g. {free}"
            )
        if len(set(self.control_indices)) < len(self.control_indices):
            listed = ";".join(map(str, self.control_indices))
            raise ConfigError(f"control_index={listed} holds an index twice; give each control image its own")
        self.encoding.check(self.clip)
        if self.control_sizes and not self.encoding.takes_sizes:
            raise ConfigError(
                f"{self.control_sizes}: the {self.encoding.name} layout has frames of one size; take the "
                f"{INDEPENDENT.name} one"
            )

    def __str__(self) -> str:
        controls = f"control_index={';'.join(map(str, self.control_indices))}," if self.control_indices else ""
        encoding = f",layout={self.encoding.name}" if self.encoding != INDEPENDENT else ""
        sizes = f",{self.control_sizes}" if self.control_sizes else ""
        return f"{controls}target_index={self.target_index}{encoding}{sizes}"

    @cached_property
    def clip(self) -> Clip:
        """The frames in time order."""
        return Clip.one_frame(self.control_indices, self.target_index)

    @property
    def cache_key(self) -> tuple[int, ...] | None:
        """The order of frames that latents are made for; None where they can be put into any order later."""
        return self.encoding.cache_key(self.clip)

    def check_latents(self, made_for: "OneFrameLayout") -> None:
        """Raise ConfigError unless latents that were made for one layout serve this one."""
        if (self.encoding, self.cache_key) != (made_for.encoding, made_for.cache_key):
            raise ConfigError(
                f"latents made for {made_for} do not serve {self}; give the same indices and layout (fp_1f_layout or "
                "--one_frame_layout), or run wan_cache_latents.py again"
            )
        if self.control_sizes != made_for.control_sizes:
            raise ConfigError(
                f"latents made for {made_for} do not serve {self}; give the same {' and '.join(SIZE_KEYS)}, or "
                "run wan_cache_latents.py again"
            )

    def slots_of(self, made_for: "OneFrameLayout") -> list[int]:
        """For each slot the number of that frame's slot in latents that were made for another layout.

        Raises ConfigError unless they serve this one.
        """
        self.check_latents(made_for)
        return self.clip.slots_in(made_for.clip)

    def with_random_target(self, indices: range, generator: torch.Generator) -> "OneFrameLayout":
        """The layout with its target at an index drawn evenly from those of `indices` that no control has.

        Where latents can't be put into another order, or control images have sizes of their own, it stays between the
        same controls. Raises ConfigError when no index is free.
        """
        free = [index for index in indices if index not in self.control_indices]
        if self.cache_key is not None or self.control_sizes:
            neighbours = [sum(control < index for control in self.control_indices) for index in free]
            free = [index for index, before in zip(free, neighbours, strict=True) if before == self.clip.target_slot]
        if not free:
            raise ConfigError(f"no index of {indices[0]}-{indices[-1]} is free beside {self}; give a wider range")
        drawn = torch.randint(len(free), (), generator=generator).item()
        return replace(self, target_index=free[int(drawn)])

    def check_controls(self, count: int) -> None:
        """Raise ConfigError unless there is one control image per control index."""
        if count != len(self.control_indices):
            listed = ";".join(map(str, self.control_indices)) or "(none)"
            raise ConfigError(f"{counted(count, 'control image')} for control_index={listed}; give one index per image")


def parse(text: str, default_layout: str | None = None, default_sizes: ControlSizes = AS_TARGET) -> OneFrameLayout:
    """`control_index=0;2,target_index=1` -> layout; blanks around `=`, `,` and `;` are allowed.

    As in the reference a missing target_index is 0 and a missing control_index is none. `layout=causal` asks for that
    layout; without the key it is `default_layout`, independent for None. `control_resolution=512x768` and
    `no_resize_control=true` likewise override `default_sizes`. FramePack's words are ignored with a warning.
    Raises ConfigError for anything else.
    """
    values: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in _FRAMEPACK_WORDS and not equals:
            log.warning("one-frame option '%s' belongs to FramePack and has no effect on Wan", key)
        elif key not in KEYS or not equals:
            raise ConfigError(f"unknown key '{key}'{suggest(key, KEYS) or '; use control_index=..., target_index=...'}")
        elif key in values:
            raise ConfigError(f"'{key}' is given twice; separate several control indices by ';'")
        else:
            values[key] = value
    controls = values.get("control_index", "")
    return OneFrameLayout(
        tuple(_index("control_index", part) for part in controls.split(";")) if controls else (),
        _index("target_index", values.get("target_index", "0")),
        encoding_named(values.get("layout", default_layout)),
        _sizes(values, default_sizes),
    )


def _sizes(values: Mapping[str, str], default: ControlSizes) -> ControlSizes:
    resolution, no_resize = (values.get(key) for key in SIZE_KEYS)
    if no_resize not in (None, "true"):
        raise ConfigError(f"no_resize_control={no_resize} is unknown; write true, or leave it out")
    return ControlSizes(
        parse_resolution(resolution) if resolution else default.resolution, default.no_resize or no_resize is not None
    )


def with_values(text: str, values: Mapping[str, str]) -> str:
    """The text for `parse` that has these values, by key of KEYS, in place of those in `text`."""
    kept = [item for item in text.split(",") if item.strip() and item.partition("=")[0].strip() not in values]
    return ",".join([*kept, *(f"{key}={value}" for key, value in values.items())])


def layout_from_toml(
    clean_indices: Sequence[int] | None,
    target_index: int | None,
    controls: int | None = None,
    encoding: Encoding = INDEPENDENT,
    keys: tuple[str, str] = INDEX_KEYS,
    sizes: ControlSizes = AS_TARGET,
) -> OneFrameLayout:
    """Layout of the values of a dataset's `keys`; `controls`: images per item, if known.

    Both default (to [0] and 1) when an item has one control image; with more, they must be given.
    """
    if clean_indices is None:
        if controls is not None and controls > 1:
            raise ConfigError(f"{keys[0]} is missing; give {controls} indices, one per control image")
        clean_indices = [0]
    if not clean_indices:
        raise ConfigError(f"{keys[0]} = []: training needs at least one control image; try [0]")
    if target_index is None:
        if len(clean_indices) > 1:
            raise ConfigError(f"{keys[1]} is missing; give the time index of the target, e.g. 1 between 0 and 2")
        target_index = 1
    try:
        layout = OneFrameLayout(tuple(clean_indices), target_index, encoding, sizes)
    except ConfigError as error:
        message = str(error).replace("control_index", keys[0]).replace("target_index", keys[1])
        raise ConfigError(message) from None
    if controls is not None:
        layout.check_controls(controls)
    return layout


def _index(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key}={text} is not a whole number; give a time index such as 1") from None
