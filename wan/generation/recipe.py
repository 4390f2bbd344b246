"""Recipes in PNG and latent files: the options that make a picture again, and fingerprints of the files they name."""

import argparse
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import safe_open

from utils import cli
from utils.errors import ConfigError, suggest
from utils.files import fingerprint, require_file
from utils.images import png_text
from utils.options import declared_options, flag_name
from utils.text import one_line
from wan import __version__
from wan.generation.guidance import GuidanceConfig
from wan.generation.options import WAYS
from wan.generation.prompt import FLAGS
from wan.generation.request import SamplingConfig
from wan.models.device import DeviceConfig
from wan.models.memory_options import GenerationMemoryConfig
from wan.models.options import AttentionConfig, CLIPConfig, DiTConfig, LoRAConfig, T5Config, VAEConfig

log = logging.getLogger(__name__)

KEY = "recipe"
"""Keyword of the PNG text chunk, and key in the metadata of a latent file."""

_MODEL_SECTIONS = (DiTConfig, VAEConfig, T5Config, CLIPConfig)
_SECTIONS = (
    *(*_MODEL_SECTIONS, AttentionConfig, LoRAConfig),
    *(GenerationMemoryConfig, SamplingConfig, GuidanceConfig),
)


def _flags(section: type) -> dict[str, type]:
    """Flag -> type of its value, or of each of several."""
    hints = get_type_hints(section)
    return {flag_name(field): cli.value_type(hints[field.name])[0] for field, _ in declared_options(section)}


# A file from anywhere may set these and nothing else; above all no option that writes.
_OPTIONS = frozenset(
    [*(flag for section in _SECTIONS for flag in _flags(section)), *FLAGS, "video_size", "latent_path"]
)
_MODELS = tuple(flag for section in _MODEL_SECTIONS for flag, kind in _flags(section).items() if kind is Path)
_IMAGES = tuple(flag for flag, option in FLAGS.items() if option.is_image)
_FILES = (*_MODELS, "lora_weight", *_IMAGES, "latent_path")


@dataclass(frozen=True)
class Recipe:
    """Options of wan_generate_video.py. It holds no time and no place of the result: the same picture has the same."""

    options: Mapping[str, Any]  # by name, as JSON has them
    files: Mapping[str, str]  # fingerprint of each file that they name
    made_by: Mapping[str, str]  # versions and the kind of device, other ones of which may round differently

    @classmethod
    def of(cls, device: torch.device, *sections: Any) -> "Recipe":
        """The part of a recipe that all pictures of a run share."""
        options = {name: value for name, value in cli.settings(*sections).items() if name in _OPTIONS}
        return cls({}, {}, _made_by(device)).adding(options)

    def adding(self, options: Mapping[str, Any], read: Mapping[Path, str] | None = None) -> "Recipe":
        """This recipe with more options, such as `Request.options`, and fingerprints of the files that they name.

        read: fingerprints of files as they were read, which may have been edited since.
        """
        paths = {Path(path) for name in _FILES for path in _listed(options.get(name))}
        found = {_key(path): (read or {}).get(path) or _fingerprint(path) for path in paths}
        return replace(self, options={**self.options, **options}, files={**self.files, **found})

    def __str__(self) -> str:
        """JSON in ASCII, which any PNG reader takes."""
        return json.dumps(asdict(self), sort_keys=True)


def parse_args(parser: cli.Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command line, and below them the options of the recipe that `--recipe` names, if any.

    Raises ConfigError when a file that the recipe names is not what it was, unless the command line names one itself;
    model files that are gone are left to be given.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    path = cli.file_named("--recipe", argv)
    if path is None:
        return parser.parse_args(argv)
    place, recipe = f"--recipe {path}", read(path)
    known = vars(parser.typed(recipe.options, place))
    args = parser.parse_args(argv, argparse.Namespace(**known))
    ways = [name for name in WAYS if getattr(args, name) not in (None, (), False)]
    for name in WAYS:
        if len(ways) > 1 and name in known and getattr(args, name) == known[name]:
            setattr(args, name, parser.get_default(name))  # the command line says what to do with the settings
            known.pop(name)
    for name in _IMAGES if args.image_folder is not None else ():
        if name in known and getattr(args, name) == known.pop(name):
            setattr(args, name, parser.get_default(name))  # the images of the folder take their place
    for name in _FILES:
        if name in known and getattr(args, name) == known[name]:
            _check_files(args, name, recipe, place)
    for name, now in _made_by(cli.build(DeviceConfig, args).resolve()).items():
        then = recipe.made_by.get(name)
        if now != then:
            log.warning(
                "%s: made with %s %s, this is %s; the picture may differ a little", place, name, one_line(then), now
            )
    return args


def read(path: Path) -> Recipe:
    """The recipe in a PNG or latent file. Raises ConfigError when it has none, or one that we did not write."""
    place = f"--recipe {require_file(path, '--recipe')}"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(KEY)
        else:
            text = png_text(path, KEY)
    except Exception:  # as for all damaged files, of nearly any type
        raise ConfigError(f"{place}: cannot be read; give a PNG or latent file of wan_generate_video.py") from None
    if not isinstance(text, str):
        raise ConfigError(f"{place}: holds no recipe; give a file that was made without --no_metadata")
    try:
        recipe = Recipe(**json.loads(text))
        if not all(isinstance(part, dict) and all(map(_plain, part.values())) for part in vars(recipe).values()):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(f"{place}: its recipe is damaged; give the original file") from None
    for name in recipe.options:
        if name not in _OPTIONS:
            raise ConfigError(f"{place}: its recipe sets '{name[:100]}', which no recipe may{suggest(name, _OPTIONS)}")
    return recipe


def _check_files(args: argparse.Namespace, name: str, recipe: Recipe, place: str) -> None:
    for path in _listed(getattr(args, name)):
        if name in _MODELS and not Path(path).exists():
            log.warning("%s: --%s %s is not there any more", place, name, path)
            setattr(args, name, None)
            return
        if not Path(path).is_dir():
            require_file(path, f"{place}: its --{name}")
        if _fingerprint(Path(path)) != recipe.files.get(_key(path)):
            raise ConfigError(
                f"{place}: its --{name} {path} is not the file that it was; give --{name} to use it nevertheless"
            )


def _made_by(device: torch.device) -> dict[str, str]:
    return {"wan-one-frame": __version__, "torch": torch.__version__, "device": device.type}


def _listed(value: Any) -> Sequence[str | Path]:
    """The paths of an option that may name none, one or several."""
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _plain(value: Any) -> bool:
    scalar = (str, int, float)
    return isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(part, scalar) for part in value))


def _key(path: str | Path) -> str:
    return Path(path).as_posix()


def _fingerprint(path: Path) -> str:
    """Hash of a file, or of all files in a folder (a tokenizer, a LoRA of PEFT's), as 16 hex digits."""
    if path.is_dir():
        parts = [f"{file.name} {_fingerprint(file)}\n" for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]
    status = path.stat()
    return _fingerprint_of(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1000)
def _fingerprint_of(path: Path, *_state: int) -> str:
    return fingerprint(path)
