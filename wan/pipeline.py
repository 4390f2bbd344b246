"""From a request to an image: encode what it names, denoise, decode. Generation and training samples share it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from utils.images import from_pixels, open_image, to_pixels
from wan import one_frame, sampling
from wan.dit import WanDiT, pad_text
from wan.encoding import encode_blank, encode_clip, encode_images, frame_pixels
from wan.guidance import GuidanceConfig
from wan.models import CLIPConfig, T5Config, VAEConfig
from wan.request import Request
from wan.t5 import encode_text

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
        self._latents: dict[tuple, Tensor] = {}

    def _load_t5(self, device: torch.device) -> nn.Module:
        model, self._tokenizer = self._t5_config.load(device)
        return model

    def encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """Run T5, then CLIP, then the VAE over all requests, each model alone on the device."""
        self._encode_texts({text for request in requests for text in _texts(request)})
        self._encode_features({path for request in requests for path in request.clip_images})
        self._encode_latents(requests)
        return [self._assemble(request) for request in requests]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Image.Image:
        """Normalised latents [16, 1, H, W] -> picture."""
        with self._vae.on_device() as vae:
            pixels = vae.decode(latents[None].to(self.device))
        return from_pixels(pixels[0, :, 0].float().cpu())

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
    def _encode_latents(self, requests: Sequence[Request]) -> None:
        wanted = {(_version(path), _size(request)): path for request in requests for path in request.controls}
        wanted = {key: path for key, path in wanted.items() if key not in self._latents}
        blanks = {_size(request) for request in requests} - self._latents.keys()
        if wanted or blanks:
            with self._vae.on_device() as vae:
                for size in blanks:
                    self._latents[size] = encode_blank(vae, *size).float().cpu()
                for (version, size), path in wanted.items():
                    pixels = frame_pixels(open_image(path, "control image"), size)
                    self._latents[version, size] = encode_images(vae, pixels[None])[0].float().cpu()

    def _assemble(self, request: Request) -> Encoded:
        size = _size(request)
        controls = [self._latents[_version(path), size] for path in request.controls]
        return Encoded(
            request=request,
            text=self._texts[request.prompt],
            negative=None if request.guidance == 1 else self._texts[request.negative_prompt],
            image=torch.cat([self._features[_version(path)] for path in request.clip_images]),
            condition=one_frame.stack_condition(request.layout, controls, self._latents[size]),
        )


@torch.no_grad()  # no inference mode: FSDP2 keeps the buffers of its first call, and training can't use such tensors
def denoise(
    dit: WanDiT,
    encoded: Encoded,
    device: torch.device,
    label: str = "denoising",
    guidance: GuidanceConfig | None = None,
) -> Tensor:
    """The latents of the generated frame, [16, 1, H, W] float32 on the CPU. Draws nothing but the seeded noise."""
    request, guidance = encoded.request, guidance or GuidanceConfig()
    condition = encoded.condition[None].to(device)
    text = pad_text([encoded.text]).to(device)
    negative = None if encoded.negative is None else pad_text([encoded.negative]).to(device)
    image = encoded.image[None].to(device)
    frame_indices = torch.tensor([request.layout.frame_indices], device=device)
    frames, height, width = condition.shape[2:]
    noise = initial_noise((16, frames, height, width), request.seed, device, request.cpu_noise)
    guided_steps = guidance.guided_steps(request.steps)

    def velocity(x: Tensor, timestep: Tensor, step: int) -> Tensor:
        def run(context: Tensor, skip_blocks: frozenset[int] = frozenset()) -> Tensor:
            timesteps = timestep.reshape(1).to(device)
            return dit(x[None], condition, timesteps, context, image, frame_indices, skip_blocks)[0]

        conditional = run(text)
        if negative is None or not guided_steps[step]:
            return conditional
        if not guidance.skips_layers(step, request.steps):
            return sampling.guided(conditional, run(negative), request.guidance)
        skipped = run(negative, guidance.skipped_blocks)
        if guidance.slg_mode == "uncond":
            return sampling.guided(conditional, skipped, request.guidance)
        guided = sampling.guided(conditional, run(negative), request.guidance)
        return guided + guidance.slg_scale * (conditional - skipped)

    schedule = sampling.schedule(request.solver, request.steps, request.shift)
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


def _size(request: Request) -> tuple[int, int]:
    return request.width, request.height


def _version(path: Path) -> tuple[str, int, int]:
    """What tells one state of a file from another within a run."""
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size
