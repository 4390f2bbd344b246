"""Prompts, flags and the task's defaults become checked requests, one per image."""

import logging
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import ConfigError
from utils.images import Resize, check_image, check_mask_size, floor16, size_for_area
from utils.options import option
from utils.text import counted
from wan.frames import condition
from wan.frames.clip import Clip
from wan.frames.encoding import encoding_named
from wan.frames.layout import LayoutConfig, OneFrameLayout, parse
from wan.frames.sizes import ControlSizes, Size, parse_resolution
from wan.generation.prompt import FLAGS, Prompt
from wan.generation.sampling import SOLVERS, schedule
from wan.lora.trained_for import UNTRAINED, TrainedFor
from wan.models.tasks import TaskSpec
from wan.nets.tokens import FrameSizes

log = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class SamplingConfig(LayoutConfig):
    """sampling"""

    sample_solver: str = option("unipc", choices=SOLVERS, help="solver; vanilla is Euler")
    cpu_noise: bool = option(False, help="draw the initial noise on the CPU (the same on every device)")
    control_resolution: str | None = option(
        None,
        help="size of the control images (only the area counts) where the prompt gives none: 512 or 512x768 "
        "(width, height); default: that of the picture, in training what the datasets say",
    )
    no_resize_control: bool = option(
        False, help="control images keep their size, unless it exceeds --control_resolution"
    )
    reasoning_frames: int = option(
        0,
        help="frames between control and target that are denoised with it in the first steps and then dropped",
        minimum=0,
    )
    reasoning_steps: int | None = option(
        None, help="the steps that they take part in; default: a fifth of all", minimum=1
    )
    pin_controls: bool = option(
        False,
        help="in each step the control frames are their own images with the step's noise, not the model's prediction",
    )
    exact_size: bool = option(
        False, help="crop to the given width and height instead of keeping the start image's aspect ratio at that area"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.control_sizes  # refuses a text that is no resolution

    @property
    def control_sizes(self) -> ControlSizes:
        """Sizes that control images get where the prompt doesn't say."""
        resolution = parse_resolution(self.control_resolution) if self.control_resolution else None
        return ControlSizes(resolution, self.no_resize_control)

    def like(self, layout: str | None, sizes: ControlSizes, alpha: str) -> "SamplingConfig":
        """Settings of training samples: layout, sizes and alpha of the training data, unless flags give the latter."""
        alpha = self.alpha or alpha
        resolution = "{}x{}".format(*sizes.resolution) if sizes.resolution else None
        like = replace(self, one_frame_layout=layout, alpha=alpha)
        if self.control_sizes:
            return like
        return replace(like, control_resolution=resolution, no_resize_control=sizes.no_resize)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to generate; everything is decided and every file has been looked at."""

    prompt: str
    negative_prompt: str
    asked: tuple[int, int]  # width and height that were asked for: their product counts, see `resolve`
    width: int  # pixels, a multiple of 16
    height: int
    steps: int
    shift: float
    guidance: float  # 1 needs no unconditional pass
    seed: int
    layout: OneFrameLayout
    controls: tuple[Path, ...]  # in the order of layout.control_indices
    control_masks: tuple[Path | None, ...]  # one each; None: the alpha channel of the control, if it has one
    clip_images: tuple[Path, ...]  # one for i2v, two for flf2v
    control_fits: tuple[Resize, ...] = ()  # what is done to each control; empty: it gets the size of the picture
    solver: str = "unipc"
    cpu_noise: bool = False
    pin_controls: bool = False
    alpha: bool = True  # alpha channels of controls without a mask file are masks
    reasoning_frames: int = 0
    reasoning_steps: int = 0  # the steps that these take part in

    @property
    def clip(self) -> Clip:
        """The frames of the layout and the reasoning frames. ConfigError when there is no room for these."""
        return self.layout.clip.with_scratch(self.reasoning_frames)

    @property
    def frame_sizes(self) -> FrameSizes | None:
        """Sizes of the frames of `clip`; None when all are the same."""
        return self.clip.frame_sizes(self.sizes)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of the frames: the controls as given, and the target."""
        size = (self.width, self.height)
        return *(tuple(fit.bucket for fit in self.control_fits) or (size,) * len(self.controls)), size

    @classmethod
    def resolve(
        cls, prompt: Prompt, task: TaskSpec, sampling: SamplingConfig, trained: TrainedFor = UNTRAINED
    ) -> "Request":
        """Fill in the task's defaults and check everything that can be checked before models load.

        The requested width and height give the area and the start image the aspect ratio; with `exact_size` they are
        taken as they are, rounded down to multiples of 16. Without a seed one is drawn.
        trained: what the LoRA was trained for: the indices that `one_frame = auto` stands for, and the size where auto
        is given without one.
        Raises ConfigError naming where the prompt stands.
        """
        try:
            return cls._resolved(prompt, task, sampling, trained)
        except ConfigError as error:
            raise ConfigError(f"{prompt.place}: {error}") from None

    @classmethod
    def _resolved(cls, prompt: Prompt, task: TaskSpec, sampling: SamplingConfig, trained: TrainedFor) -> "Request":
        layout, controls = _controls(prompt, sampling, trained.layout)
        if sampling.pin_controls and not layout.encoding.knows_latents:
            name = layout.encoding.name
            raise ConfigError(
                f"--pin_controls: the {name} layout does not know the latents of its frames; leave it out"
            )
        control_masks = _masks(prompt, layout, controls)
        clip_images = _clip_images(prompt, layout, controls, task.clip_images)
        usual = trained.size if trained.size and prompt.wants_trained_layout else (256, 256)
        asked = (prompt.width or usual[0], prompt.height or usual[1])
        if sampling.exact_size:
            width, height = map(floor16, asked)
        else:
            width, height = size_for_area(*asked, *check_image(clip_images[0], "start image"))
        fits = tuple(_fit(path, layout, (width, height)) for path in controls)

        steps = _given(prompt.sample_steps, task.steps)
        shift = _given(prompt.discrete_flow_shift, task.default_shift(*asked))
        guidance = float(_given(prompt.cfg_scale, task.guidance_scale))
        seed = _given(prompt.seed, random.SystemRandom().randrange(1 << 32))
        texts = prompt.prompt or "", _given(prompt.negative_prompt, task.negative_prompt)
        _check_values(guidance, seed, texts)
        schedule(sampling.sample_solver, steps, shift)  # refuses what it can't be made of
        layout.clip.with_scratch(sampling.reasoning_frames)  # so does this
        return cls(
            prompt=texts[0],
            negative_prompt=texts[1],
            asked=asked,
            width=width,
            height=height,
            steps=steps,
            shift=float(shift),
            guidance=guidance,
            seed=seed,
            layout=layout,
            controls=controls,
            control_masks=control_masks,
            clip_images=clip_images,
            control_fits=fits,
            solver=sampling.sample_solver,
            cpu_noise=sampling.cpu_noise,
            pin_controls=sampling.pin_controls,
            alpha=sampling.alpha != "ignore",
            reasoning_frames=sampling.reasoning_frames,
            reasoning_steps=_given(sampling.reasoning_steps, max(1, steps // 5)) if sampling.reasoning_frames else 0,
        )

    @property
    def images(self) -> tuple[Path, ...]:
        """All image files, some perhaps twice."""
        return *self.controls, *filter(None, self.control_masks), *self.clip_images

    @property
    def options(self) -> dict[str, Any]:
        """The flags of wan_generate_video.py that ask for this image, beside the other ones of `SamplingConfig`.

        A start or end image that is taken from the controls anyway is left out.
        """
        width, height = self.asked
        options = {flag: _as_flag(getattr(self, option.request)) for flag, option in FLAGS.items() if option.request}
        options |= {
            "one_frame_layout": self.layout.encoding.name,
            "video_size": [height, width],
            "sample_solver": self.solver,
        }
        if self.reasoning_frames:
            options |= {"reasoning_frames": self.reasoning_frames, "reasoning_steps": self.reasoning_steps}
        if any(self.control_masks):
            options["control_image_mask_path"] = [str(path) for path in self.control_masks]
        usual = condition.clip_controls(self.layout.clip, len(self.clip_images)) if self.controls else []
        for i, (name, path) in enumerate(zip(("image_path", "end_image_path"), self.clip_images, strict=False)):
            if not usual or path != self.controls[usual[i]]:
                options[name] = str(path)
        return options


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _as_flag(value: Any) -> Any:
    """A value as JSON and the command line can have it."""
    if isinstance(value, tuple):
        return [str(part) for part in value]
    return str(value) if isinstance(value, OneFrameLayout) else value


def _check_values(guidance: float, seed: int, texts: tuple[str, str]) -> None:
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance scale {guidance}: must be a number, e.g. 5")
    if not -(1 << 63) <= seed < 1 << 64:  # what torch takes
        raise ConfigError(f"seed {seed}: has too many digits; use at most 19")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"character {error.start} of the prompt is not Unicode text; write it as UTF-8") from None


def _controls(
    prompt: Prompt, sampling: SamplingConfig, trained: OneFrameLayout | None
) -> tuple[OneFrameLayout, tuple[Path, ...]]:
    if not prompt.one_frame:
        raise ConfigError(
            "one_frame is missing; give --one_frame_inference control_index=0,target_index=1, in a prompt line --of ..."
        )
    try:
        name, sizes = sampling.one_frame_layout, sampling.control_sizes
        if prompt.wants_trained_layout:
            if trained is None:
                raise ConfigError(
                    "no LoRA file names the indices that it was trained at; give e.g. control_index=0,target_index=1"
                )
            encoding = encoding_named(name) if name else trained.encoding
            layout = replace(trained, encoding=encoding, control_sizes=sizes or trained.control_sizes)
        elif "=" not in prompt.one_frame:
            raise ConfigError("names no time indices, which Wan needs; try control_index=0,target_index=1")
        else:
            layout = parse(prompt.one_frame, name, sizes)
        if trained not in (None, layout):
            log.warning("%s: one_frame %s, but the LoRA was trained at %s", prompt.place, layout, trained)
        controls = tuple(Path(path) for path in prompt.control_image_path or ())
        layout.check_controls(len(controls))
    except ConfigError as error:
        raise ConfigError(f"one_frame '{prompt.one_frame}': {error}") from None
    for path in controls:
        check_image(path, "control image")
    return layout, controls


def _fit(control: Path, layout: OneFrameLayout, size: Size) -> Resize:
    try:
        return layout.control_sizes.fit(check_image(control, "control image"), size)
    except ConfigError as error:
        raise ConfigError(f"control image {control}: {error}") from None


def _masks(prompt: Prompt, layout: OneFrameLayout, controls: tuple[Path, ...]) -> tuple[Path | None, ...]:
    if not prompt.control_image_mask_path:
        return (None,) * len(controls)
    masks = tuple(Path(path) for path in prompt.control_image_mask_path)
    if len(masks) != len(controls):
        given, images = counted(len(masks), "mask"), counted(len(controls), "control image")
        raise ConfigError(f"{given} (--cim) for {images}; give one per image")
    if not layout.encoding.takes_masks:
        name = layout.encoding.name
        raise ConfigError(f"the {name} layout takes no masks of control images; leave out --cim or layout={name}")
    for mask, control in zip(masks, controls, strict=True):
        sizes = check_image(mask, "mask of control image"), check_image(control, "control image")
        check_mask_size(mask, sizes[0], control, sizes[1])
    return masks


def _clip_images(prompt: Prompt, layout: OneFrameLayout, controls: tuple[Path, ...], count: int) -> tuple[Path, ...]:
    """Start image, and for two the end image; a missing one is taken from the earliest or latest control."""
    given = [prompt.image_path, prompt.end_image_path][:count]
    if count == 1 and prompt.end_image_path:
        log.warning("%s: the end image has no effect on i2v models, which take one image", prompt.place)
    if None in given and not controls:
        raise ConfigError("the start image (--i) is missing, and there is no control image to take instead")
    fallback = condition.clip_controls(layout.clip, count) if controls else []
    images = []
    for i, (name, asked) in enumerate(zip(("start image", "end image"), given, strict=False)):
        path = controls[fallback[i]] if asked is None else Path(asked)
        if asked is None:
            log.info("%s: no %s given; CLIP sees the control image %s", prompt.place, name, path)
        check_image(path, name)
        images.append(path)
    return tuple(images)
