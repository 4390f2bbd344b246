"""From a request to an image: encode what it names, denoise, decode. Generation and training samples share it."""

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.images import from_pixels, open_image, open_masked, to_levels
from utils.randomness import address_seed
from utils.stopwatch import Stopwatch
from wan.frames import condition as condition_module
from wan.frames.encode import (
    encode_blank,
    encode_clip,
    encode_images,
    encode_video,
    frame_levels,
    frame_pixels,
    latent_mask,
)
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import pad_to
from wan.generation import sampling
from wan.generation.experts import Experts
from wan.generation.guidance import GuidanceConfig
from wan.generation.on_demand import AfterUse, OnDemand
from wan.generation.preview import LatentPreview, synthetic_images
from wan.generation.request import Request
from wan.models.checkpoints import CLIPCheckpoint, T5Checkpoint, VAECheckpoint
from wan.nets.conditioning import Conditioning
from wan.nets.context import StepCache, pad_text
from wan.nets.spec import LATENT_CHANNELS, MASK_CHANNELS, VAE_STRIDE
from wan.nets.t5 import encode_text
from wan.nets.vae import WanVAE

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

log = logging.getLogger(__name__)
FileVersion = tuple[str, int, int]  # see `_version`

_PREVIEW_CONTROLS = 4  # control images that a preview is fitted on; more would change next to nothing


@dataclass(frozen=True)
class Encoded:
    """A request with its texts and images encoded; tensors are float32 on the CPU."""

    request: Request
    text: Tensor  # [L, D]
    negative: Tensor | None  # [L, D]; None when guidance is 1
    image: Tensor  # [257 or 514, D]: CLIP features
    condition: Tensor  # [20, F, H, W]: mask and latents of the controls, in time order; reasoning frames included


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
        self._conditions: dict[Hashable, tuple[OneFrameLayout, Tensor, Tensor]] = {}
        self._blanks: dict[tuple[int, int], Tensor] = {}

    def _load_t5(self, device: torch.device) -> "UMT5EncoderModel":
        model: UMT5EncoderModel
        model, self._tokenizer = self._t5_file.load(device)
        return model

    def encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """Run T5, then CLIP, then the VAE over all requests, each model alone on the device."""
        with self.stopwatch.stage("texts"):
            self._encode_texts({text for request in requests for text in _texts(request)})
        with self.stopwatch.stage("image features"):
            self._encode_features({path for request in requests for path in request.clip_images})
        with self.stopwatch.stage("control images"):
            self._encode_conditions(requests)
        return [self._assemble(request) for request in requests]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Image.Image:
        """Normalised latents [16, n, H, W] -> the last picture of that video; n = 1 unless the layout is causal."""
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
                for text in tqdm(missing, desc="encoding texts", unit="text", disable=len(missing) < 2):
                    self._texts[text] = encode_text(t5, self._tokenizer, [text], self.device)[0].float().cpu()

    @torch.inference_mode()
    def _encode_features(self, paths: set[Path]) -> None:
        missing = {_version(path): path for path in paths}
        missing = {key: path for key, path in missing.items() if key not in self._features}
        if missing:
            with self._clip.on_device() as clip:
                for key, path in missing.items():
                    levels = to_levels(open_image(path, "start or end image"))
                    self._features[key] = encode_clip(clip, [levels])[0].float().cpu()

    @torch.inference_mode()
    def _encode_conditions(self, requests: Sequence[Request]) -> None:
        missing = {_condition_key(request): request for request in requests}
        missing = {key: request for key, request in missing.items() if key not in self._conditions}
        if missing:
            with self._vae.on_device() as vae:
                for key, request in missing.items():
                    self._conditions[key] = request.layout, *_condition(vae, request, self._blanks)

    def _assemble(self, request: Request) -> Encoded:
        layout, condition, added = self._conditions[_condition_key(request)]
        return Encoded(
            request=request,
            text=self._texts[request.prompt],
            negative=None if request.guidance == 1 else self._texts[request.negative_prompt],
            image=torch.cat([self._features[_version(path)] for path in request.clip_images]),
            condition=request.reasoning.insert(condition_module.relayout(condition, layout, request.layout), added),
        )


@torch.inference_mode()
def decode_latents(vae: WanVAE, latents: Tensor, device: torch.device) -> Image.Image:
    """Normalised latents [16, n, H, W] -> the last picture of that video; n = 1 unless the layout is causal."""
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
    """The latents to decode the picture from (`pick_target`), float32 on the CPU. Draws only the seeded noise.

    watch: is called in each step with its number, from 0, and what these latents will be as far as it can tell then.
    """
    request, guidance = encoded.request, guidance or GuidanceConfig()
    reasoning, condition = request.reasoning, encoded.condition[None].to(device)
    given = {"prompt": encoded.text} | ({} if encoded.negative is None else {"negative": encoded.negative})
    rows = pad_text([*given.values()]).to(device)
    texts = {name: rows[number, None] for number, name in enumerate(given)}
    image = encoded.image[None].to(device)
    frame_indices = torch.tensor([reasoning.frame_indices], device=device)
    own = torch.tensor(reasoning.own_slots, device=device)
    own_condition, own_indices = condition[:, :, own], frame_indices[:, own]
    own_sizes = request.frame_sizes
    sizes = reasoning.insert_sizes(own_sizes)
    noise = _noise(request, device)
    guided_steps = guidance.guided_steps(request.steps)
    schedule = sampling.schedule(request.solver, request.steps, request.shift)
    timesteps = schedule.timesteps.to(device)  # at once: a copy per step would wait for the step before
    sigmas = schedule.sigmas.tolist()
    expert = experts.at(float(schedule.timesteps[0]))
    experts.use(expert)  # loads before the progress bar starts
    caches: dict[tuple[tuple[str, ...], bool], StepCache] = defaultdict(StepCache)

    def velocity(x: Tensor, timestep: Tensor, step: int) -> Tensor:
        nonlocal expert
        whole = reasoning.count == 0 or step < request.reasoning_steps
        if (due := experts.at(float(timestep))) is not expert:
            expert = due
            caches.clear()
        dit = experts.use(expert)

        def run(*names: str, skip_blocks: frozenset[int] = frozenset()) -> Tensor:
            """Velocities of the texts called `names`, [len(names), 16, F, H, W], by one pass."""
            frames = (x, condition, frame_indices) if whole else (x[:, own], own_condition, own_indices)
            single = frames[0][None], frames[1], timesteps[step, None], image, frames[2]
            latents, conditions, times, images, indices = (
                tensor.expand(len(names), *tensor.shape[1:]) for tensor in single
            )
            text = torch.cat([texts[name] for name in names])
            inputs = latents, Conditioning(conditions, images), times, text, indices, skip_blocks
            found: Tensor = dit(*inputs, cache=caches[names, whole], frame_sizes=sizes if whole else own_sizes)
            return found

        scale = expert.guidance if guided_steps[step] else 1.0
        result = _guided(run, scale, step, request.steps, guidance)
        if not whole:  # frames that were dropped stay as they are: what a solver does, it does to each number alone
            result = torch.zeros_like(x).index_copy(1, own, result.to(x.dtype))
        if request.pin_controls:
            result = condition_module.pin_controls(result, condition[0], noise)
        if watch is not None:
            watch(step, condition_module.pick_target(request.layout, (x - sigmas[step] * result)[:, own], own_sizes))
        return result

    with tqdm(total=request.steps, desc=label, unit="step") as bar:
        latents = sampling.sample(request.solver, velocity, noise, schedule, bar.update)
    return condition_module.pick_target(request.layout, latents[:, own], own_sizes).cpu()


def _guided(run: Callable[..., Tensor], scale: float, step: int, steps: int, guidance: GuidanceConfig) -> Tensor:
    """The velocity [16, F, H, W] of a step, of one to three that `run` gives by the names of their texts."""
    if scale == 1:
        return run("prompt")[0]
    skips_layers = guidance.skips_layers(step, steps)
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


def _noise(request: Request, device: torch.device) -> Tensor:
    """[16, F, H, W] of all frames, reasoning frames included. That of the target depends on no other frame."""
    layout, reasoning, sizes = request.layout, request.reasoning, request.frame_sizes
    frames, height, width = len(layout.order), request.height // VAE_STRIDE, request.width // VAE_STRIDE
    noise = initial_noise(
        (LATENT_CHANNELS, frames, height, width), request.seed, device, request.cpu_noise, reasoning.count
    )
    if sizes is not None:
        shape = LATENT_CHANNELS, frames, *(max(sides) for sides in zip(*sizes, strict=True))
        of_controls = initial_noise(shape, address_seed(request.seed, "controls"), device, request.cpu_noise)
        controls = [slot for slot in range(frames) if slot != layout.target_slot]
        noise = pad_to(noise, *shape[2:])
        noise[:, controls] = of_controls[:, controls]
    return reasoning.insert(noise[:, :frames], noise[:, frames:])


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


def _condition(vae: WanVAE, request: Request, blanks: dict[tuple[int, int], Tensor]) -> tuple[Tensor, Tensor]:
    """[20, F, H, W], of the same bits as caching makes, and [20, n, H, W] of the reasoning frames: float32 on the CPU.

    In the causal layout these are grey frames of the same video, and change what comes after them. `blanks` keeps the
    blank of each size.
    """
    layout, size, reasoning = request.layout, _size(request), request.reasoning
    if layout.causal:
        images = [open_image(path, "control image") for path in request.controls]
        video = condition_module.causal_condition_video(layout, [frame_pixels(image, size) for image in images])
        latents = encode_video(vae, reasoning.lengthen(video)).float().cpu()
        own, added = latents[:, reasoning.own_slots], latents[:, reasoning.added_slots]
        return condition_module.causal_condition(layout, own), torch.cat(
            [torch.zeros_like(added[:MASK_CHANNELS]), added]
        )
    controls, masks = [], []
    for path, mask, fit in zip(request.controls, request.control_masks, request.control_fits, strict=True):
        image, coverage = open_masked(path, "control image", mask)
        controls.append(encode_images(vae, frame_levels(image, fit.bucket, fit.crop_only)[None])[0])
        masks.append(None if coverage is None else latent_mask(coverage, fit.bucket, fit.crop_only))
    if size not in blanks:
        blanks[size] = encode_blank(vae, *size)
    condition = condition_module.stack_condition(layout, controls, blanks[size], masks).float().cpu()
    return condition, condition[:, [layout.target_slot] * reasoning.count]


def _condition_key(request: Request) -> Hashable:
    """What the condition depends on, apart from time indices: see `relayout`."""
    controls = tuple(map(_version, request.controls))
    masks = tuple(mask and _version(mask) for mask in request.control_masks)
    layout, fits = request.layout, request.control_fits
    return layout.causal_order, layout.control_sizes, request.reasoning_frames, controls, masks, fits, _size(request)


def _size(request: Request) -> tuple[int, int]:
    return request.width, request.height


def _version(path: Path) -> FileVersion:
    """Identity of a file's content within a run: resolved path, time of change in ns, size in bytes."""
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size
