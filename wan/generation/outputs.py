"""Result files of generation: PNG and latent files, their names and metadata (docs/formats.md#result-files)."""

import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import ConfigError
from utils.files import require_file, written_whole
from utils.options import Section, option
from wan.frames.layout import parse
from wan.generation.prompt import FLAGS
from wan.generation.recipe import KEY as RECIPE_KEY
from wan.generation.recipe import Recipe
from wan.generation.request import Request
from wan.nets.spec import LATENT_CHANNELS

log = logging.getLogger(__name__)

_VIDEO_TYPES = {"video": "images", "both": "latent_images"}


@dataclass(frozen=True)
class OutputConfig(Section):
    """output"""

    save_path: Path = option(help="folder for the results", any_bytes=True)
    output_type: str = option(
        "images",
        help="images, latent or latent_images; video and both give the same with a PNG in place of the video",
        choices=["images", "latent", "latent_images", *_VIDEO_TYPES],
    )
    no_metadata: bool = option(False, help="store no recipe, nor any other metadata, in the files")

    @property
    def kinds(self) -> str:
        """`output_type` with stills in place of videos."""
        return _VIDEO_TYPES.get(self.output_type, self.output_type)

    @property
    def wants_image(self) -> bool:
        return "images" in self.kinds

    @property
    def wants_latent(self) -> bool:
        return "latent" in self.kinds

    def log_substitute(self) -> None:
        """Log that stills are written where videos were asked for."""
        if self.output_type in _VIDEO_TYPES:
            log.info("--output_type %s: videos are not supported; a PNG is written", self.output_type)


def result_stem(seed: int) -> str:
    """`<time>_<seed>`: the start of the names of all files of one image."""
    return f"{datetime.now().strftime('%Y%m%d-%H%M%S-%f')[:-3]}_{seed}"


def save_image(folder: Path, stem: str, image: Image.Image, recipe: Recipe | None) -> None:
    """Write `<stem>_000.png`, with the recipe in a text chunk."""
    chunks = PngInfo()
    if recipe is not None:
        chunks.add_text(RECIPE_KEY, str(recipe))
    _write_new(folder, stem, "_000.png", lambda temporary: image.save(temporary, pnginfo=chunks))


def save_latent(folder: Path, stem: str, latents: Tensor, metadata: dict[str, str] | None) -> None:
    """Write `<stem>_latent.safetensors` with `latent` [16, n, H, W] float32, as `Encoding.target` gives it."""
    tensors = {"latent": latents.float().contiguous()}
    _write_new(folder, stem, "_latent.safetensors", lambda temporary: save_file(tensors, temporary, metadata))


def _write_new(folder: Path, stem: str, ending: str, write: Callable[[Path], None]) -> None:
    """Write `<stem><ending>`, or `<stem>-2<ending>` ... where another generation had the same name at the same time."""
    for number in itertools.count(1):
        path = folder / (f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}")
        try:
            with written_whole(path, replaces=False) as temporary:
                write(temporary)
        except FileExistsError:
            continue
        log.info("saved %s", path)  # not earlier: only now the file has its name
        return


def latent_metadata(request: Request, task: str, loras: tuple[str, ...], recipe: Recipe) -> dict[str, str]:
    """Metadata of a latent file: the recipe, and the keys that musubi-tuner writes or would write."""
    options = request.options
    return {
        **{option.latent: str(options[flag]) for flag, option in FLAGS.items() if option.latent},
        "height": str(request.height),
        "width": str(request.width),
        "video_length": "1",
        "task": task,
        "loras": ", ".join(loras).encode(errors="replace").decode(),  # names of files may be no Unicode
        RECIPE_KEY: str(recipe),
    }


def _ends_a_video(layout: str) -> bool:
    """Whether latents of this layout, as a latent file names it, are those of a video."""
    try:
        return parse(layout).encoding.decodes_video
    except ConfigError:
        return False


def read_latent(path: Path) -> tuple[Tensor, int]:
    """(`latent` [16, n, H, W] float32, seed) of a latent file, safetensors or a pickled tensor; unknown seeds are 0.

    Raises ConfigError for other tensors; n is 1 unless the file names a layout whose picture ends a video.
    """
    require_file(path, "--latent_path")
    seeds, is_video = "0", False
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                latents, metadata = file.get_tensor("latent"), file.metadata() or {}
                seeds = metadata.get("seeds", "0")
                is_video = _ends_a_video(metadata.get("one_frame_inference", ""))
        else:
            latents = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"--latent_path {path}: is not a latent file ({error}); give one that generation wrote"
        ) from None
    except Exception:  # torch.load raises many kinds for damaged files and for pickles with code
        raise ConfigError(f"--latent_path {path}: is not a latent file; give one that generation wrote") from None
    if not isinstance(latents, Tensor) or latents.ndim not in (4, 5) or latents.shape[-4] != LATENT_CHANNELS:
        raise ConfigError(
            f"--latent_path {path}: holds no latents of {LATENT_CHANNELS} channels; give a file that generation wrote"
        )
    latents = latents.reshape(latents.shape[-4:])
    if latents.shape[1] != 1 and not is_video:
        raise ConfigError(f"--latent_path {path}: holds {latents.shape[1]} frames; videos are not supported")
    return latents.float(), int(seeds) if re.fullmatch(r"-?[0-9]{1,20}", seeds) else 0
