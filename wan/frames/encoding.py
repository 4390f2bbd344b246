"""The ways to make latent frames of images: by name in dataset files and prompts (`layout=...`).

`independent`, the reference's: each image is encoded on its own. `causal`, an experiment: together they are one video,
as in the training of the base models (wan/image2video.py and wan/first_last_frame2video.py of Wan2.1). A latent frame
after the first stands for four video frames, so

* the latents are those of the video (first image, second image x 4, third image x 4, ...), each image standing still;
* the condition is that of the video (first control, then 4 frames for each further image: grey, or for a control three
  of grey and the image), grey being zeros in [-1, 1]. Its mask channels, one per video frame, are 1 where an image is;
* the target is the last of its four video frames after decoding everything up to it.

A further way is a subclass of `Encoding` in ENCODINGS; nothing else asks which one it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from PIL import Image
from torch import Tensor

from utils.errors import ConfigError, suggest
from utils.images import as_pixels, open_image, open_masked
from wan.frames.clip import Clip, Role
from wan.frames.condition import causal_condition, causal_condition_video, causal_video, stack_condition
from wan.frames.encode import encode_blank, encode_frames, encode_images, encode_video
from wan.frames.sizes import Size, frame_of
from wan.nets.conditioning import Conditioning
from wan.nets.spec import MASK_CHANNELS, TIME_STRIDE
from wan.nets.tokens import FrameSizes
from wan.nets.vae import WanVAE

Blanks = dict[Size, Tensor]
"""Latents [16, 1, H, W] of blank frames by size in pixels: filled when needed, kept by whoever encodes with one VAE."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a clip, brought to the sizes of their frames."""

    clip: Clip
    images: Sequence[Tensor]  # [3, 8 h, 8 w] uint8 per source; for generation those of the given frames alone
    masks: Sequence[Tensor | None]  # [h, w] in 0..1 per given frame, where it is to be used; None: all of it
    size: Size  # width and height in pixels of what is generated


class Encoding(ABC):
    """One way to make latent frames and conditions of the images of a clip."""

    name: ClassVar[str]
    takes_masks: ClassVar[bool]  # of control images
    takes_sizes: ClassVar[bool]  # control images may have sizes of their own
    knows_latents: ClassVar[bool]  # the condition holds the very latents of a given frame
    decodes_video: ClassVar[bool]  # the target is the last picture of a decoded video

    def open_control(self, path: Path, mask: Path | None, alpha: bool) -> tuple[Image.Image, Image.Image | None]:
        """A control image, and where it counts by the file `mask` or, with `alpha`, its alpha channel."""
        what = "control image"
        return open_masked(path, what, mask, alpha) if self.takes_masks else (open_image(path, what), None)

    @abstractmethod
    def check(self, clip: Clip) -> None:
        """Raise ConfigError for a clip whose frames stand where they can't."""

    @abstractmethod
    def cache_key(self, clip: Clip) -> tuple[int, ...] | None:
        """The order of sources that latents are made for; None: they can be put into any order later."""

    @abstractmethod
    def condition(self, vae: WanVAE, pictures: Pictures, blanks: Blanks) -> Conditioning:
        """`channels` [20, F, H, W] in the VAE's dtype, and `given` [F, H, W], of images to generate from."""

    @abstractmethod
    def examples(self, vae: WanVAE, batch: Sequence[Pictures], blanks: Blanks) -> Iterator[tuple[Tensor, Conditioning]]:
        """Latents [16, F, H, W] and condition of each item to train on; the items have the same sizes."""

    @abstractmethod
    def target(self, clip: Clip, latents: Tensor, sizes: FrameSizes | None = None) -> Tensor:
        """Latents [C, F, H, W] -> [C, n, h, w], without padding, of the video whose last picture is the target."""

    @abstractmethod
    def decode(self, vae: WanVAE, latents: Tensor, sizes: FrameSizes | None) -> list[Tensor]:
        """Latents [C, F, H, W] on the device of the VAE -> pixels [3, 8 h, 8 w] of each slot."""

    def given(self, channels: Tensor) -> Tensor:
        """Channels [..., 4 + C, F, H, W] of a condition -> [..., F, H, W] float32, where pixels are known."""
        return channels.narrow(-4, 0, MASK_CHANNELS).float().amax(dim=-4)

    def _conditioning(self, channels: Tensor) -> Conditioning:
        return Conditioning(channels, given=self.given(channels))


@dataclass(frozen=True)
class Independent(Encoding):
    """Each image is encoded on its own."""

    name = "independent"
    takes_masks = takes_sizes = knows_latents = True
    decodes_video = False

    def check(self, clip: Clip) -> None:
        pass

    def cache_key(self, clip: Clip) -> None:
        return None

    def condition(self, vae: WanVAE, pictures: Pictures, blanks: Blanks) -> Conditioning:
        controls = [encode_images(vae, image[None])[0] for image in pictures.images]
        return self._stacked(vae, pictures, controls, blanks)

    def examples(self, vae: WanVAE, batch: Sequence[Pictures], blanks: Blanks) -> Iterator[tuple[Tensor, Conditioning]]:
        encoded = iter(encode_frames(vae, [image for pictures in batch for image in pictures.images]))
        for pictures in batch:
            frames = list(islice(encoded, len(pictures.images)))
            controls = frames[: len(pictures.clip.given)]
            yield pictures.clip.stack(frames), self._stacked(vae, pictures, controls, blanks)

    def target(self, clip: Clip, latents: Tensor, sizes: FrameSizes | None = None) -> Tensor:
        return frame_of(latents, clip.target_slot, sizes)

    def decode(self, vae: WanVAE, latents: Tensor, sizes: FrameSizes | None) -> list[Tensor]:
        frames = (frame_of(latents, number, sizes) for number in range(latents.shape[1]))
        return [vae.decode(frame[None])[0, :, 0] for frame in frames]

    def _stacked(self, vae: WanVAE, pictures: Pictures, controls: Sequence[Tensor], blanks: Blanks) -> Conditioning:
        if pictures.size not in blanks:
            blanks[pictures.size] = encode_blank(vae, *pictures.size)
        return self._conditioning(stack_condition(pictures.clip, controls, blanks[pictures.size], pictures.masks))


@dataclass(frozen=True)
class Causal(Encoding):
    """The images are encoded as one video, whose first frame is a control image."""

    name = "causal"
    takes_masks = takes_sizes = knows_latents = False
    decodes_video = True

    def check(self, clip: Clip) -> None:
        first = clip.slots[0]
        if first.role is not Role.GIVEN:
            raise ConfigError(
                f"target_index={first.time_index} comes before every control image; the causal layout begins with one"
            )

    def cache_key(self, clip: Clip) -> tuple[int, ...]:
        return clip.order

    def condition(self, vae: WanVAE, pictures: Pictures, blanks: Blanks) -> Conditioning:
        controls = [as_pixels(image) for image in pictures.images[: len(pictures.clip.given)]]
        video = causal_condition_video(pictures.clip, controls)
        return self._conditioning(causal_condition(pictures.clip, encode_video(vae, video)))

    def examples(self, vae: WanVAE, batch: Sequence[Pictures], blanks: Blanks) -> Iterator[tuple[Tensor, Conditioning]]:
        for pictures in batch:
            video = causal_video(pictures.clip, [as_pixels(image) for image in pictures.images])
            yield encode_video(vae, video), self.condition(vae, pictures, blanks)

    def target(self, clip: Clip, latents: Tensor, sizes: FrameSizes | None = None) -> Tensor:
        return latents[:, : clip.target_slot + 1]

    def decode(self, vae: WanVAE, latents: Tensor, sizes: FrameSizes | None) -> list[Tensor]:
        return list(vae.decode(latents[None])[0, :, ::TIME_STRIDE].unbind(1))


INDEPENDENT, CAUSAL = Independent(), Causal()
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in (INDEPENDENT, CAUSAL)}


def encoding_named(name: str | None) -> Encoding:
    """The encoding of this name, INDEPENDENT for None. ConfigError for other names."""
    if name is not None and name not in ENCODINGS:
        known = " or ".join(ENCODINGS)
        raise ConfigError(f"layout={name} is unknown{suggest(name, ENCODINGS) or f'; use {known}'}")
    return INDEPENDENT if name is None else ENCODINGS[name]
