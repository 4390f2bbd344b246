"""From a request to an image: encode what it names, denoise, decode. Generation and training samples share it."""

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.errors import ConfigError
from utils.files import fingerprint
from utils.images import from_pixels, open_image, to_levels
from utils.randomness import address_seed
from utils.stopwatch import Stopwatch
from utils.text import one_line
from wan.frames.clip import Clip, Role
from wan.frames.condition import pin_controls
from wan.frames.encode import encode_clip, encode_images, frame_levels, frame_pixels, latent_mask
from wan.frames.encoding import Blanks, Pictures
from wan.frames.sizes import pad_to
from wan.generation import sampling
from wan.generation.experts import Experts
from wan.generation.guidance import GuidanceConfig
from wan.generation.on_demand import AfterUse, OnDemand
from wan.generation.preview import LatentPreview, synthetic_images
from wan.generation.request import Request
from wan.generation.sampling import Schedule
from wan.models.checkpoints import CLIPCheckpoint, T5Checkpoint, VAECheckpoint
from wan.nets.conditioning import Conditioning
from wan.nets.context import StepCache, pad_text
from wan.nets.spec import LATENT_CHANNELS, TEXT_LENGTH, VAE_STRIDE
from wan.nets.t5 import encode_text, token_counts
from wan.nets.tokens import FrameSizes
from wan.nets.vae import WanVAE

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

log = logging.getLogger(__name__)
FileVersion = tuple[str, int, int]  # see `_version`
_Files = Mapping[Path, FileVersion]

_TRIES = 5  # to read images that are being edited
_PREVIEW_CONTROLS = 4  # control images that a preview is fitted on; more would change next to nothing


@dataclass(frozen=True)
class Encoded:
    """A request with its texts and images encoded; tensors are float32 on the CPU."""

    request: Request
    text: Tensor  # [L, D]
    negative: Tensor | None  # [L, D]; None when guidance is 1
    conditioning: Conditioning  # of all frames of the request's clip
    files: Mapping[Path, str] = field(default_factory=dict)  # fingerprints of the images as they were read


class Pipeline:
    """The encoders and the decoder of a run. The DiTs are handed to `denoise` by their owner.

    after_use: what becomes of T5 and CLIP; runs that do not know all prompts beforehand keep them. The VAE is kept.
    Results are kept by what they were made from, so equal prompts and images are encoded once.
    """

    def __init__(
        self,
        vae: VAECheckpoint,
        t5: T5Checkpoint,
        clip: CLIPCheckpoint,
        device: torch.device,
        after_use: AfterUse = AfterUse.DROP,
    ) -> None:
        self.device, self.stopwatch = device, Stopwatch()
        self._vae = OnDemand("VAE", vae.load, device, self.stopwatch, AfterUse.KEEP)
        self._t5 = OnDemand("T5", self._load_t5, device, self.stopwatch, after_use)
        self._clip = OnDemand("CLIP", clip.load, device, self.stopwatch, after_use)
        self._t5_file = t5
        self._tokenizer: PreTrainedTokenizerBase  # comes with T5
        self._texts: dict[str, Tensor] = {}
        self._features: dict[FileVersion, Tensor] = {}
        self._conditions: dict[Hashable, tuple[Clip, Conditioning]] = {}
        self._blanks: Blanks = {}

    def _load_t5(self, device: torch.device) -> "UMT5EncoderModel":
        model: UMT5EncoderModel
        model, self._tokenizer = self._t5_file.load(device)
        return model

    def encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """Run T5, then CLIP, then the VAE over all requests, each model alone on the device.

        Images may be edited meanwhile or later: what is made, and `Encoded.files`, are of one version of each. Raises
        ConfigError for one that is never the same from the beginning to the end, or that has another size by now.
        """
        with self.stopwatch.stage("texts"):
            self._encode_texts({text for request in requests for text in _texts(request)})
        for _ in range(_TRIES):
            files = {path: _version(path) for request in requests for path in request.images}
            with self.stopwatch.stage("image features"):
                self._encode_features({path for request in requests for path in request.clip_images}, files)
            with self.stopwatch.stage("control images"):
                self._encode_conditions(requests, files)
            fingerprints = {path: fingerprint(path) for path in files}
            changed = [path for path, version in files.items() if _version(path) != version]
            if not changed:
                return [self._assemble(request, files, fingerprints) for request in requests]
        raise ConfigError(f"{changed[0]}: changes whenever it is read; copy it to a file that does not")

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Image.Image:
        """Normalised latents [16, n, H, W] -> the last picture of that video; see `Encoding.target`."""
        with self.stopwatch.stage("decoding"), self._vae.on_device() as vae:
            return decode_latents(vae, latents, self.device)

    @torch.inference_mode()
    def fit_preview(self, requests: Sequence[Request]) -> LatentPreview:
        """A `LatentPreview`, fitted on synthetic pictures and on control images of the requests."""
        sizes = {path: _size(request) for request in requests for path in request.controls}
        pixels = synthetic_images()
        for path, size in [*sizes.items()][:_PREVIEW_CONTROLS]:
            pixels.append(frame_pixels(open_image(path, "control image"), size))
        with self._vae.on_device() as vae:
            latents = [encode_images(vae, image[None])[0] for image in pixels]
        return LatentPreview.fit(pixels, latents)

    @torch.inference_mode()
    def _encode_texts(self, texts: set[str]) -> None:
        missing = sorted(texts - self._texts.keys())
        if missing:
            with self._t5.on_device() as t5:
                for text, count in zip(missing, token_counts(self._tokenizer, missing), strict=True):
                    if count > TEXT_LENGTH:
                        words = one_line(text, 60)
                        log.warning("'%s' has %d tokens; the model reads the first %d", words, count, TEXT_LENGTH)
                for text in tqdm(missing, desc="encoding texts", unit="text", disable=len(missing) < 2):
                    self._texts[text] = encode_text(t5, self._tokenizer, [text], self.device)[0].float().cpu()

    @torch.inference_mode()
    def _encode_features(self, paths: set[Path], files: _Files) -> None:
        missing = {files[path]: path for path in paths}
        missing = {key: path for key, path in missing.items() if key not in self._features}
        if missing:
            with self._clip.on_device() as clip:
                for key, path in missing.items():
                    levels = to_levels(open_image(path, "start or end image"))
                    self._features[key] = encode_clip(clip, [levels])[0].float().cpu()

    @torch.inference_mode()
    def _encode_conditions(self, requests: Sequence[Request], files: _Files) -> None:
        missing = {_condition_key(request, files): request for request in requests}
        missing = {key: request for key, request in missing.items() if key not in self._conditions}
        if missing:
            with self._vae.on_device() as vae:
                for key, request in missing.items():
                    self._conditions[key] = request.clip, _condition(vae, request, self._blanks)

    def _assemble(self, request: Request, files: _Files, fingerprints: Mapping[Path, str]) -> Encoded:
        clip, conditioning = self._conditions[_condition_key(request, files)]
        features = torch.stack([self._features[files[path]] for path in request.clip_images])
        return Encoded(
            request=request,
            text=self._texts[request.prompt],
            negative=None if request.guidance == 1 else self._texts[request.negative_prompt],
            conditioning=conditioning.select(request.clip.slots_in(clip))._replace(clip=features),
            files={path: fingerprints[path] for path in request.images},
        )


@torch.inference_mode()
def decode_latents(vae: WanVAE, latents: Tensor, device: torch.device) -> Image.Image:
    """Normalised latents [16, n, H, W] -> the last picture of that video; see `Encoding.target`."""
    return from_pixels(vae.decode(latents[None].to(device))[0, :, -1].float().cpu())


@torch.no_grad()  # no inference mode: FSDP2 keeps the buffers of its first call, and training can't use such tensors
def denoise(
    experts: Experts,
    encoded: Encoded,
    device: torch.device,
    label: str = "denoising",
    guidance: GuidanceConfig | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The latents to decode the picture from (`Encoding.target`), float32 on the CPU. Draws only the seeded noise.

    watch: is called in each step with its number, from 0, and what these latents will be as far as it can tell then.
    """
    request = encoded.request
    schedule = sampling.schedule(request.solver, request.steps, request.shift)
    noise, sigmas = _noise(request, device), schedule.sigmas.tolist()
    conditioning = encoded.conditioning.map(lambda tensor: tensor.to(device))
    guided_velocity = _GuidedVelocity(experts, encoded, conditioning, guidance or GuidanceConfig(), schedule, device)

    def velocity(x: Tensor, timestep: Tensor, step: int) -> Tensor:
        result = guided_velocity(x, float(timestep), step)
        if request.pin_controls:
            result = pin_controls(result, conditioning, noise)
        if watch is not None:
            watch(step, _target(request, x - sigmas[step] * result))
        return result

    with tqdm(total=request.steps, desc=label, unit="step") as bar:
        latents = sampling.sample(request.solver, velocity, noise, schedule, bar.update)
    return _target(request, latents).cpu()


@dataclass(frozen=True, eq=False)
class _Frames:
    """Inputs of the DiT for some of the clip's frames, as a batch of one."""

    conditioning: Conditioning
    indices: Tensor  # [1, F]
    sizes: FrameSizes | None


class _GuidedVelocity:
    """The velocity of an encoded request in each step, by the expert for its noise level, with guidance."""

    def __init__(
        self,
        experts: Experts,
        encoded: Encoded,
        conditioning: Conditioning,
        guidance: GuidanceConfig,
        schedule: Schedule,
        device: torch.device,
    ) -> None:
        """conditioning: that of `encoded`, on the device."""
        request, clip = encoded.request, encoded.request.clip
        self._request, self._guidance, self._guided_steps = request, guidance, guidance.guided_steps(request.steps)
        given = {"prompt": encoded.text} | ({} if encoded.negative is None else {"negative": encoded.negative})
        rows = pad_text([*given.values()]).to(device)
        self._texts = {name: rows[number, None] for number, name in enumerate(given)}
        batch = conditioning.map(lambda tensor: tensor[None])
        indices = torch.tensor([clip.time_indices], device=device)
        self._kept = torch.tensor(clip.kept, device=device)
        self._all_frames = _Frames(batch, indices, request.frame_sizes)
        kept_sizes = request.layout.clip.frame_sizes(request.sizes)
        self._kept_frames = _Frames(batch.select(self._kept), indices[:, self._kept], kept_sizes)
        self._timesteps = schedule.timesteps.to(device)  # at once: a copy per step would wait for the step before
        self._experts, self._expert = experts, experts.at(float(schedule.timesteps[0]))
        self._caches: dict[tuple[_Frames, tuple[str, ...]], StepCache] = defaultdict(StepCache)  # of that expert
        experts.use(self._expert)  # loads before the progress bar starts

    def __call__(self, x: Tensor, timestep: float, step: int) -> Tensor:
        """x, and the result: [16, F, H, W] of all frames; frames that are dropped by then have velocity 0.

        A solver steps each number alone, so that those stay as they are.
        """
        expert = self._experts.at(timestep)
        if expert is not self._expert:
            self._expert = expert
            self._caches.clear()
        scale = expert.guidance if self._guided_steps[step] else 1.0
        if not self._request.reasoning_frames or step < self._request.reasoning_steps:
            return self._guided(self._all_frames, x, step, scale)
        result = self._guided(self._kept_frames, x[:, self._kept], step, scale)
        return torch.zeros_like(x).index_copy(1, self._kept, result.to(x.dtype))

    def _guided(self, frames: _Frames, x: Tensor, step: int, scale: float) -> Tensor:
        """Combine the velocities of one to three passes. scale: 1 for a step without guidance."""
        run, guidance = partial(self._run, frames, x, step), self._guidance
        if scale == 1:
            return run("prompt")[0]
        skips_layers = guidance.skips_layers(step, self._request.steps)
        if skips_layers:
            skipped = run("negative", skip_blocks=guidance.skipped_blocks)[0]
        if skips_layers and guidance.slg_mode == "uncond":
            return sampling.guided(run("prompt")[0], skipped, scale)
        if guidance.separate_passes:
            conditional, unconditional = run("prompt")[0], run("negative")[0]
        else:
            conditional, unconditional = run("prompt", "negative")
        result = sampling.guided(conditional, unconditional, scale)
        return result + guidance.slg_scale * (conditional - skipped) if skips_layers else result

    def _run(
        self, frames: _Frames, x: Tensor, step: int, *names: str, skip_blocks: frozenset[int] = frozenset()
    ) -> Tensor:
        """Velocities [len(names), 16, F, H, W] of the texts called `names`, by one pass of the DiT."""

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.expand(len(names), *tensor.shape[1:])

        latents, times, indices = map(repeated, (x[None], self._timesteps[step, None], frames.indices))
        text = torch.cat([self._texts[name] for name in names])
        inputs = latents, frames.conditioning.map(repeated), times, text, indices, skip_blocks
        dit = self._experts.use(self._expert)
        result: Tensor = dit(*inputs, cache=self._caches[frames, names], frame_sizes=frames.sizes)
        return result


def _target(request: Request, latents: Tensor) -> Tensor:
    """[16, F, H, W] of all frames -> the latents to decode the picture from."""
    clip = request.layout.clip
    return request.layout.encoding.target(clip, latents[:, request.clip.kept], clip.frame_sizes(request.sizes))


def _noise(request: Request, device: torch.device) -> Tensor:
    """[16, F, H, W] of all frames. That of the kept ones does not depend on the others, that of the target on none."""
    kept, sizes = request.layout.clip, request.layout.clip.frame_sizes(request.sizes)
    frames, height, width = len(kept.slots), request.height // VAE_STRIDE, request.width // VAE_STRIDE
    shape = LATENT_CHANNELS, frames, height, width
    noise = initial_noise(shape, request.seed, device, request.cpu_noise, request.reasoning_frames)
    if sizes is not None:
        shape = LATENT_CHANNELS, frames, *(max(sides) for sides in zip(*sizes, strict=True))
        of_controls = initial_noise(shape, address_seed(request.seed, "controls"), device, request.cpu_noise)
        controls = kept.numbers(Role.GIVEN)
        noise = pad_to(noise, *shape[2:])
        noise[:, controls] = of_controls[:, controls]
    return request.clip.interleave(noise[:, :frames], noise[:, frames:])


def initial_noise(
    shape: tuple[int, ...], seed: int, device: torch.device, cpu_noise: bool, more_frames: int = 0
) -> Tensor:
    """Standard normal float32 `shape` on `device`: the first draw of a generator there, or of a CPU one.

    more_frames: behind the others in dimension 1, of the second draw, so that the first stays what it is.
    """
    source = torch.device("cpu") if cpu_noise else device
    generator = torch.Generator(source).manual_seed(seed)
    shapes = [shape, (shape[0], more_frames, *shape[2:])][: 1 + bool(more_frames)]
    noise = [torch.randn(one, generator=generator, device=source, dtype=torch.float32) for one in shapes]
    return torch.cat(noise, dim=1).to(device)


def _texts(request: Request) -> tuple[str, ...]:
    return (request.prompt,) if request.guidance == 1 else (request.prompt, request.negative_prompt)


def _condition(vae: WanVAE, request: Request, blanks: Blanks) -> Conditioning:
    """Channels and known places of the request's clip, of the same bits as caching makes: float32 on the CPU."""
    images, masks, encoding = [], [], request.layout.encoding
    for path, mask, fit in zip(request.controls, request.control_masks, request.control_fits, strict=True):
        image, coverage = encoding.open_control(path, mask, request.alpha)
        if coverage is not None and mask is None:
            once = {"once": f"transparent {path}"}
            log.info("%s has transparent pixels, which are masked out; --alpha ignore uses them", path, extra=once)
        if image.size != fit.size:
            then, now = ("{}x{}".format(*size) for size in (fit.size, image.size))
            raise ConfigError(f"control image {path}: has {now} pixels, it had {then} at the start; run again")
        images.append(frame_levels(image, fit.bucket, fit.crop_only))
        masks.append(None if coverage is None else latent_mask(coverage, fit.bucket, fit.crop_only))
    conditioning = encoding.condition(vae, Pictures(request.clip, images, masks, _size(request)), blanks)
    return conditioning.map(lambda tensor: tensor.float().cpu())


def _condition_key(request: Request, files: _Files) -> Hashable:
    """Everything that the condition depends on; time indices count only where they decide on `Encoding.cache_key`."""
    layout, clip = request.layout, request.clip
    masks = tuple(mask and files[mask] for mask in request.control_masks)
    images = tuple(files[path] for path in request.controls), masks, request.control_fits, _size(request)
    return (
        layout.encoding,
        layout.encoding.cache_key(clip),
        layout.control_sizes,
        len(clip.slots),
        request.alpha,
        *images,
    )


def _size(request: Request) -> tuple[int, int]:
    return request.width, request.height


def _version(path: Path) -> FileVersion:
    """Identity of a file's content within a run: resolved path, time of change in ns, size in bytes."""
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size
