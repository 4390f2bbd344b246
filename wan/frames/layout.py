"""One-frame use of Wan2.1: which frame sits at which time index, and what the network is told about each.

A clip of control images and one image to generate (the target). The frames are stored in time order; their RoPE time
indices are chosen freely. Caching, training, training samples and generation all use this module, and nothing else
knows these rules. They are in docs/formats.md#conditioning.

There are two ways to make latent frames of the images. `independent`, the reference's: each image is encoded on its
own. `causal`, an experiment: together they are one video, as in the training of the base models (wan/image2video.py and
wan/first_last_frame2video.py of Wan2.1). A latent frame after the first stands for four video frames, so

* the latents are those of the video (first image, second image x 4, third image x 4, ...), each image standing still;
* the condition is that of the video (first control, then 4 frames for each further image: grey, or for a control three
  of grey and the image), grey being zeros in [-1, 1]. Its mask channels, one per video frame, are 1 where an image is;
* the target is the last of its four video frames after decoding everything up to it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils.errors import ConfigError, suggest
from utils.options import Section, option
from wan.frames.sizes import AS_TARGET, SIZE_KEYS, ControlSizes, Size, parse_resolution
from wan.nets.spec import VAE_STRIDE
from wan.nets.tokens import FrameSizes

log = logging.getLogger(__name__)

LAYOUTS = ("independent", "causal")
KEYS = ("control_index", "target_index", "layout", *SIZE_KEYS)
INDEX_KEYS = ("fp_1f_clean_indices", "fp_1f_target_index")  # of datasets
_FRAMEPACK_WORDS = ("default", "no_2x", "no_4x", "no_post")


@dataclass(frozen=True)
class LayoutConfig(Section):
    """one-frame layout"""

    one_frame_layout: str | None = option(
        None,
        help="how images become latent frames, where dataset or prompt don't say: independent, each on its own, or "
        "causal, as frames of one video (experiment); default: independent",
        choices=LAYOUTS,
    )


@dataclass(frozen=True)
class OneFrameLayout:
    """Where each frame of a one-frame run sits on the RoPE time axis. `str()` prints what `parse` reads."""

    control_indices: tuple[int, ...]  # time index of each control image, in the order the images are given
    target_index: int  # time index of the frame to generate
    causal: bool = False  # the images are encoded as one video, whose first frame is a control
    control_sizes: ControlSizes = AS_TARGET

    def __post_init__(self) -> None:
        for name, indices in (("control_index", self.control_indices), ("target_index", (self.target_index,))):
            for index in indices:
                if index < 0:
                    raise ConfigError(f"{name}={index} is negative; time indices start at 0")
        if self.target_index in self.control_indices:
            free = max(self.control_indices) + 1
            raise ConfigError(
                f"target_index={self.target_index} is also a control index; give the target its own, e.g. {free}"
            )
        if len(set(self.control_indices)) < len(self.control_indices):
            listed = ";".join(map(str, self.control_indices))
            raise ConfigError(f"control_index={listed} holds an index twice; give each control image its own")
        if self.causal and self.target_slot == 0:
            raise ConfigError(
                f"target_index={self.target_index} comes before every control image; the causal layout begins with one"
            )
        if self.causal and self.control_sizes:
            raise ConfigError(
                f"{self.control_sizes}: the causal layout has frames of one size; take the independent one"
            )

    def __str__(self) -> str:
        controls = f"control_index={';'.join(map(str, self.control_indices))}," if self.control_indices else ""
        sizes = f",{self.control_sizes}" if self.control_sizes else ""
        return f"{controls}target_index={self.target_index}{',layout=causal' * self.causal}{sizes}"

    @property
    def order(self) -> list[int]:
        """Slot -> input, where the inputs are the controls as given and then the target."""
        times = (*self.control_indices, self.target_index)
        return sorted(range(len(times)), key=times.__getitem__)

    @property
    def frame_indices(self) -> tuple[int, ...]:
        """RoPE time index of each slot, ascending."""
        return tuple(sorted((*self.control_indices, self.target_index)))

    @property
    def target_slot(self) -> int:
        """The slot that holds the generated frame."""
        return self.order.index(len(self.control_indices))

    @property
    def causal_order(self) -> tuple[int, ...] | None:
        """What latents were made for: in the causal layout the order of the frames, else any (None)."""
        return tuple(self.order) if self.causal else None

    def check_latents(self, made_for: "OneFrameLayout") -> None:
        """Raise ConfigError unless latents that were made for one layout serve this one."""
        if self.causal_order != made_for.causal_order:
            raise ConfigError(
                f"latents made for {made_for} do not serve {self}; give the same indices and layout (fp_1f_layout or "
                "--one_frame_layout), or run wan_cache_latents.py again"
            )
        if self.control_sizes != made_for.control_sizes:
            raise ConfigError(
                f"latents made for {made_for} do not serve {self}; give the same {' and '.join(SIZE_KEYS)}, or "
                "run wan_cache_latents.py again"
            )

    def frame_sizes(self, sizes: Sequence[Size]) -> FrameSizes | None:
        """Those of the slots; None when all are one. sizes: in pixels, of the controls as given and of the target."""
        if len(set(sizes)) < 2:
            return None
        return tuple((sizes[i][1] // VAE_STRIDE, sizes[i][0] // VAE_STRIDE) for i in self.order)

    def check_controls(self, count: int) -> None:
        """Raise ConfigError unless there is one control image per control index."""
        if count != len(self.control_indices):
            listed = ";".join(map(str, self.control_indices)) or "(none)"
            raise ConfigError(f"{count} control images for control_index={listed}; give one index per image")


def parse(text: str, default_layout: str | None = None, default_sizes: ControlSizes = AS_TARGET) -> OneFrameLayout:
    """`control_index=0;2,target_index=1` -> layout; blanks around `=`, `,` and `;` are allowed.

    As in the reference a missing target_index is 0 and a missing control_index is none. `layout=causal` asks for that
    layout; without the key it is `default_layout`, independent for None. `control_resolution=512x768` and
    `no_resize_control=true` likewise go over `default_sizes`. FramePack's words are ignored with a warning.
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
        is_causal(values.get("layout", default_layout)),
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


def is_causal(name: str | None) -> bool:
    """Whether the name of a layout, independent for None, is `causal`. ConfigError for names that are none."""
    if name not in (None, *LAYOUTS):
        raise ConfigError(f"layout={name} is unknown{suggest(name, LAYOUTS) or '; use independent or causal'}")
    return name == "causal"


def layout_from_toml(
    clean_indices: Sequence[int] | None,
    target_index: int | None,
    controls: int | None = None,
    causal: bool = False,
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
        layout = OneFrameLayout(tuple(clean_indices), target_index, causal, sizes)
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
        raise ConfigError(f"{key}={text} is no whole number; give a time index such as 1") from None
