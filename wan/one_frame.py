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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.cli import option
from utils.errors import ConfigError, suggest
from wan.config import VAE_STRIDE
from wan.frame_sizes import AS_TARGET, SIZE_KEYS, ControlSizes, FrameSizes, Size, frame_of, padded, parse_resolution

log = logging.getLogger(__name__)

LAYOUTS = ("independent", "causal")
KEYS = ("control_index", "target_index", "layout", *SIZE_KEYS)
INDEX_KEYS = ("fp_1f_clean_indices", "fp_1f_target_index")  # of datasets
_FRAMEPACK_WORDS = ("default", "no_2x", "no_4x", "no_post")
_MASK_CHANNELS = 4  # one per video frame of a latent frame


@dataclass(frozen=True)
class LayoutConfig:
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


def layout_of_cache(frame_indices: Sequence[int], condition: Tensor) -> OneFrameLayout:
    """Layout of a cached item that does not name it: the target is the frame whose mask is 0.

    frame_indices: one per slot; condition: [4 + C, F, H, W]. musubi-tuner fills the control slots in the order in which
    the images are given, so its image i has the i-th smallest index. Raises ConfigError unless exactly one frame is
    unmasked.
    """
    targets = [slot for slot in range(condition.shape[1]) if not condition[:_MASK_CHANNELS, slot].any()]
    if len(targets) != 1 or len(frame_indices) != condition.shape[1]:
        raise ConfigError(
            f"{len(targets)} target frames and {len(frame_indices)} indices for {condition.shape[1]} frames"
        )
    controls = tuple(index for slot, index in enumerate(frame_indices) if slot != targets[0])
    return OneFrameLayout(controls, frame_indices[targets[0]])


def stack_frames(layout: OneFrameLayout, controls: Sequence[Tensor], target: Tensor) -> Tensor:
    """A [C, 1, H, W] per control, as given, and one for the target -> [C, F, H, W] in time order.

    Where their sizes differ, H and W are the largest ones and the others are padded.
    """
    layout.check_controls(len(controls))
    inputs = padded([*controls, target])
    return torch.cat([inputs[i] for i in layout.order], dim=1)


def unstack_frames(layout: OneFrameLayout, frames: Tensor) -> tuple[list[Tensor], Tensor]:
    """[C, F, H, W] in time order -> controls as given and target, [C, 1, H, W] each: undoes `stack_frames`."""
    inputs = [frames[:, slot : slot + 1] for _, slot in sorted((i, slot) for slot, i in enumerate(layout.order))]
    return inputs[:-1], inputs[-1]


def stack_condition(
    layout: OneFrameLayout, controls: Sequence[Tensor], blank: Tensor, masks: Sequence[Tensor | None] | None = None
) -> Tensor:
    """A [C, 1, H, W] per control, as given, and the latent of a blank frame -> [4 + C, F, H, W].

    Four mask channels (1 = given, 0 = to generate), then the latents. masks: [H, W] per control, 1 where it is to be
    used and 0 where not, or None to use all of it; mask channels and latents are multiplied by it.
    """
    given = [torch.cat([torch.ones_like(latents[:_MASK_CHANNELS]), latents]) for latents in controls]
    for i, mask in enumerate(masks or ()):
        if mask is not None:
            given[i] *= mask.to(given[i])
    return stack_frames(layout, given, torch.cat([torch.zeros_like(blank[:_MASK_CHANNELS]), blank]))


def causal_video(layout: OneFrameLayout, controls: Sequence[Tensor], target: Tensor) -> Tensor:
    """Pixels [3, height, width] of each image -> the video [3, 1 + 4 (F - 1), height, width] whose latents they are."""
    layout.check_controls(len(controls))
    images = [*controls, target]
    first, *others = (images[i][:, None] for i in layout.order)
    return torch.cat([first, *(image.expand(-1, _MASK_CHANNELS, -1, -1) for image in others)], dim=1)


def causal_condition_video(layout: OneFrameLayout, controls: Sequence[Tensor]) -> Tensor:
    """Pixels [3, height, width] of each control -> the video [3, 1 + 4 (F - 1), height, width] of the condition."""
    layout.check_controls(len(controls))
    video = controls[0].new_zeros(3, 1 + _MASK_CHANNELS * len(controls), *controls[0].shape[1:])
    for slot, i in enumerate(layout.order):
        if slot != layout.target_slot:
            video[:, _MASK_CHANNELS * slot] = controls[i]
    return video


def causal_condition(layout: OneFrameLayout, latents: Tensor) -> Tensor:
    """The latents [C, F, H, W] of `causal_condition_video` -> [4 + C, F, H, W] with the mask channels before them."""
    mask = torch.zeros_like(latents[:_MASK_CHANNELS])
    mask[-1] = 1
    mask[:, 0] = 1  # the only latent frame of a single video frame
    mask[:, layout.target_slot] = 0
    return torch.cat([mask, latents])


def relayout(frames: Tensor, old: OneFrameLayout, new: OneFrameLayout) -> Tensor:
    """Frames [C, F, H, W] stacked for `old` -> the same frames in the order of `new`; mask channels move along.

    Raises ConfigError when a causal layout is involved and is not the same in both.
    """
    new.check_latents(old)
    return stack_frames(new, *unstack_frames(old, frames))


def pin_controls(velocity: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
    """The velocity of a step, with that of all places which are given made exact: noise minus their latents.

    A solver that starts at `noise` then keeps them at their own noised latents, as closely as its first sigma is to 1.
    velocity, noise: [C, F, H, W]; condition: [4 + C, F, H, W] of the independent layout, where all latents that are
    given are those of a control.
    """
    given = condition[:_MASK_CHANNELS].amin(dim=0, keepdim=True) == 1
    return torch.where(given, noise - condition[_MASK_CHANNELS:], velocity)


def pick_target(layout: OneFrameLayout, frames: Tensor, sizes: FrameSizes | None = None) -> Tensor:
    """[C, F, H, W] in time order -> what the target is decoded from: that frame [C, 1, h, w] without padding.

    In the causal layout [C, 1 + n, H, W], with the n frames before it; the target is the last picture of the video.
    """
    return frames[:, : layout.target_slot + 1] if layout.causal else frame_of(frames, layout.target_slot, sizes)


def natural_indices(frame_indices: Tensor) -> Tensor:
    """[B, F] time indices -> 0 ... F-1 for every item: what musubi-tuner trains at, whatever the indices are."""
    return torch.arange(frame_indices.shape[1], device=frame_indices.device).expand_as(frame_indices)


def loss_weights(
    layouts: Sequence[OneFrameLayout], condition: Tensor, target_masks: Tensor | None, target_only: bool
) -> Tensor | None:
    """How much each frame, [B, F], or each place of it, [B, F, H, W], counts in the loss; None: all the same.

    condition: [B, 4 + C, F, H, W]. The generated frame counts where its mask in target_masks [B, H, W] is 1; control
    images where their own masks are, or, with target_only, not at all. Padding has masks of 0.
    """
    is_target = torch.eye(len(layouts[0].order))[[layout.target_slot for layout in layouts]].to(condition.device)
    given = condition[:, :_MASK_CHANNELS].amax(dim=1)
    partial = target_masks is not None or bool((given[is_target == 0] < 1).any())
    if not partial:
        return is_target if target_only else None
    own = torch.ones_like(given[:, 0]) if target_masks is None else target_masks.to(given)
    is_target = is_target[..., None, None]
    return is_target * own[:, None] + (0 if target_only else (1 - is_target) * given)


def random_target(layout: OneFrameLayout, indices: range, generator: torch.Generator) -> OneFrameLayout:
    """The layout with its target at an index drawn evenly from those of `indices` that no control has.

    In the causal layout, and where control images have sizes of their own, it stays between the same controls.
    """
    free = [index for index in indices if index not in layout.control_indices]
    if layout.causal or layout.control_sizes:
        neighbours = [sum(control < index for control in layout.control_indices) for index in free]
        free = [index for index, before in zip(free, neighbours, strict=True) if before == layout.target_slot]
    if not free:
        raise ConfigError(f"no index of {indices[0]}-{indices[-1]} is free beside {layout}; give a wider range")
    drawn = torch.randint(len(free), (), generator=generator).item()
    return replace(layout, target_index=free[drawn])


def clip_controls(layout: OneFrameLayout, images: int) -> list[int]:
    """Which control images give the CLIP features of a model that takes 1 (i2v) or 2 (flf2v) of them: earliest, latest.

    Returns positions in the order the controls are given; a single control serves twice.
    """
    by_time = sorted(range(len(layout.control_indices)), key=layout.control_indices.__getitem__)
    return [by_time[0], by_time[-1]][:images]


def _index(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key}={text} is no whole number; give a time index such as 1") from None
