"""From a request to an image: encode what it names, denoise, decode. Generation and training samples share it."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from utils.images import from_pixels, open_image, open_masked, to_pixels
from wan import one_frame, sampling
from wan.dit import StepCache, WanDiT, pad_text
from wan.encoding import encode_blank, encode_causal_condition, encode_clip, encode_images, frame_pixels, latent_mask
from wan.guidance import GuidanceConfig
from wan.models import CLIPConfig, T5Config, VAEConfig
from wan.one_frame import OneFrameLayout
from wan.request import Request
from wan.t5 import encode_text
from wan.vae import WanVAE

log = logging.getLogger(__name__)


_ROOM_FOR_THE_NEXT = 24 << 30  # bytes: umT5-XXL (11 GB) and the activations of any stage


@dataclass(frozen=True)
class Encoded:
    """A request and what the networks make of its texts and images; tensors are float32 on the CPU."""

    request: Request
    text: Tensor  # [L, D]
    negative: Tensor | None  # [L, D]; None when guidance is 1
    image: Tensor  # [257 or 514, D]: CLIP features
    condition: Tensor  # [20, F, H, W]: mask and latents of the controls, in time order


class Resident:
    """A model that is loaded on first use and sits on the device only while it is used.

    Afterwards it is dropped, or, when it is `wanted_again`, parked in host memory unless the device has plenty left.
    """

    def __init__(self, load: Callable[[torch.device], nn.Module], device: torch.device, wanted_again: bool) -> None:
        self._load, self._device, self._wanted_again = load, device, wanted_again
        self._module: nn.Module | None = None

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module on the device, for the length of the block."""
        module = self._load(self._device) if self._module is None else self._module.to(self._device)
        try:
            yield module
        finally:
            self._module = module if self._wanted_again else None
            del module
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
                if self._module is not None and torch.cuda.mem_get_info(self._device)[0] < _ROOM_FOR_THE_NEXT:
                    self._module.to("cpu")
                    torch.cuda.empty_cache()


class Pipeline:
    """The encoders and the decoder of a run; each is loaded once. The DiT is handed to `denoise` by its owner.

    `wanted_again` keeps T5 and CLIP in host memory after encoding, for runs that do not know all prompts beforehand.
    Results are kept by what they were made from, so equal prompts and images are encoded once.
    """

    def __init__(
        self, vae: VAEConfig, t5: T5Config, clip: CLIPConfig, device: torch.device, wanted_again: bool = False
    ) -> None:
        self.device = device
        self._vae = Resident(vae.load, device, wanted_again=True)
        self._t5 = Resident(self._load_t5, device, wanted_again)
        self._clip = Resident(clip.load, device, wanted_again)
        self._t5_config, self._tokenizer = t5, None
        self._texts: dict[str, Tensor] = {}
        self._features: dict[tuple, Tensor] = {}
        self._conditions: dict[tuple, tuple[OneFrameLayout, Tensor]] = {}
        self._blanks: dict[tuple[int, int], Tensor] = {}

    def _load_t5(self, device: torch.device) -> nn.Module:
        model, self._tokenizer = self._t5_config.load(device)
        return model

    def encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """Run T5, then CLIP, then the VAE over all requests, each model alone on the device."""
        self._encode_texts({text for request in requests for text in _texts(request)})
        self._encode_features({path for request in requests for path in request.clip_images})
        self._encode_conditions(requests)
        return [self._assemble(request) for request in requests]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Image.Image:
        """Normalised latents [16, n, H, W] -> the last picture of that video; n = 1 unless the layout is causal."""
        with self._vae.on_device() as vae:
            pixels = vae.decode(latents[None].to(self.device))
        return from_pixels(pixels[0, :, -1].float().cpu())

    @torch.inference_mode()
    def _encode_texts(self, texts: set[str]) -> None:
        texts = sorted(texts - self._texts.keys())
        if texts:
            with self._t5.on_device() as t5:
                for text in tqdm(texts, desc="encoding texts", unit="text", disable=len(texts) < 2):
                    self._texts[text] = encode_text(t5, self._tokenizer, [text], self.device)[0].float().cpu()

    @torch.inference_mode()
    def _encode_features(self, paths: set[Path]) -> None:
        missing = {_version(path): path for path in paths}
        missing = {key: path for key, path in missing.items() if key not in self._features}
        if missing:
            with self._clip.on_device() as clip:
                for key, path in missing.items():
                    pixels = to_pixels(open_image(path, "start or end image"))
                    self._features[key] = encode_clip(clip, pixels).float().cpu()

    @torch.inference_mode()
    def _encode_conditions(self, requests: Sequence[Request]) -> None:
        missing = {_condition_key(request): request for request in requests}
        missing = {key: request for key, request in missing.items() if key not in self._conditions}
        if missing:
            with self._vae.on_device() as vae:
                for key, request in missing.items():
                    self._conditions[key] = request.layout, _condition(vae, request, self._blanks)

    def _assemble(self, request: Request) -> Encoded:
        layout, condition = self._conditions[_condition_key(request)]
        return Encoded(
            request=request,
            text=self._texts[request.prompt],
            negative=None if request.guidance == 1 else self._texts[request.negative_prompt],
            image=torch.cat([self._features[_version(path)] for path in request.clip_images]),
            condition=one_frame.relayout(condition, layout, request.layout),
        )


@torch.no_grad()  # no inference mode: FSDP2 keeps the buffers of its first call, and training can't use such tensors
def denoise(
    dit: WanDiT,
    encoded: Encoded,
    device: torch.device,
    label: str = "denoising",
    guidance: GuidanceConfig | None = None,
) -> Tensor:
    """The latents to decode the picture from (`pick_target`), float32 on the CPU. Draws only the seeded noise."""
    request, guidance = encoded.request, guidance or GuidanceConfig()
    condition = encoded.condition[None].to(device)
    texts = {"prompt": encoded.text} | ({} if encoded.negative is None else {"negative": encoded.negative})
    texts = {name: pad_text([text]).to(device) for name, text in texts.items()}
    image = encoded.image[None].to(device)
    frame_indices = torch.tensor([request.layout.frame_indices], device=device)
    frames, height, width = condition.shape[2:]
    noise = initial_noise((16, frames, height, width), request.seed, device, request.cpu_noise)
    guided_steps = guidance.guided_steps(request.steps)
    schedule = sampling.schedule(request.solver, request.steps, request.shift)
    timesteps = schedule.timesteps.to(device)  # at once: a copy per step would wait for the step before
    caches = defaultdict(StepCache)

    def velocity(x: Tensor, _timestep: Tensor, step: int) -> Tensor:
        def run(*names: str, skip_blocks: frozenset[int] = frozenset()) -> Tensor:
            """Velocities of the texts called `names`, [len(names), 16, F, H, W], by one pass."""
            inputs = x[None], condition, timesteps[step, None]
            latents, conditions, times, images, indices = (
                tensor.expand(len(names), *tensor.shape[1:]) for tensor in (*inputs, image, frame_indices)
            )
            text = torch.cat([texts[name] for name in names])
            return dit(latents, conditions, times, text, images, indices, skip_blocks, cache=caches[names])

        if "negative" not in texts or not guided_steps[step]:
            return run("prompt")[0]
        skips_layers = guidance.skips_layers(step, request.steps)
        if skips_layers:
            skipped = run("negative", skip_blocks=guidance.skipped_blocks)[0]
        if skips_layers and guidance.slg_mode == "uncond":
            return sampling.guided(run("prompt")[0], skipped, request.guidance)
        if guidance.separate_passes:
            conditional, unconditional = run("prompt")[0], run("negative")[0]
        else:
            conditional, unconditional = run("prompt", "negative")
        guided = sampling.guided(conditional, unconditional, request.guidance)
        return guided + guidance.slg_scale * (conditional - skipped) if skips_layers else guided

    with tqdm(total=request.steps, desc=label, unit="step") as bar:
        latents = sampling.sample(request.solver, velocity, noise, schedule, bar.update)
    return one_frame.pick_target(request.layout, latents).cpu()


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device, cpu_noise: bool) -> Tensor:
    """Standard normal float32 `shape` on `device`: the first draw of a generator there, or of a CPU one."""
    source = torch.device("cpu") if cpu_noise else device
    generator = torch.Generator(source).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float32).to(device)


def _texts(request: Request) -> tuple[str, ...]:
    return (request.prompt,) if request.guidance == 1 else (request.prompt, request.negative_prompt)


def _condition(vae: WanVAE, request: Request, blanks: dict[tuple[int, int], Tensor]) -> Tensor:
    """[20, F, H, W] float32 on the CPU, of the same bits as caching makes. `blanks` keeps the blank of each size."""
    layout, size = request.layout, _size(request)
    if layout.causal:
        images = [open_image(path, "control image") for path in request.controls]
        return encode_causal_condition(vae, layout, [frame_pixels(image, size) for image in images]).float().cpu()
    pairs = zip(request.controls, request.control_masks, strict=True)
    opened = [open_masked(path, "control image", mask) for path, mask in pairs]
    controls = [encode_images(vae, frame_pixels(image, size)[None])[0] for image, _ in opened]
    masks = [mask and latent_mask(mask, size) for _, mask in opened]
    if size not in blanks:
        blanks[size] = encode_blank(vae, *size)
    return one_frame.stack_condition(layout, controls, blanks[size], masks).float().cpu()


def _condition_key(request: Request) -> tuple:
    """What the condition depends on, apart from time indices: see `relayout`."""
    controls = tuple(map(_version, request.controls))
    masks = tuple(mask and _version(mask) for mask in request.control_masks)
    return request.layout.causal_order, controls, masks, _size(request)


def _size(request: Request) -> tuple[int, int]:
    return request.width, request.height


def _version(path: Path) -> tuple[str, int, int]:
    """What tells one state of a file from another within a run."""
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size
