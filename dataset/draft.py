"""`wan_dataset.py init`: from two folders of pictures to a dataset file, captions and prompts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from dataset.config import read_config
from dataset.sources import Item, find_all_items, list_images, match_controls
from utils.errors import ConfigError
from utils.files import written_whole
from utils.images import check_image, floor16
from utils.options import Section, option
from utils.text import counted, some

_LARGEST_AREA = 1024 * 1024  # pixels: what the models draw well, and what fits the memory of most
_PROMPTS = 2  # sample prompts that are written


@dataclass(frozen=True)
class DraftConfig(Section):
    """what is written"""

    output: Path = option(Path("dataset.toml"), help="the dataset file to write; prompts go beside it, as prompts.txt")
    caption: str | None = option(
        None,
        help='text for targets without a caption file, e.g. "{name} in the evening light", with the name of the file',
    )
    trigger: str = option("", help="a word that every caption written here begins with")
    resolution: tuple[int, ...] = option(
        (),
        help="width and height; default: by the size of the targets",
        nargs=2,
        minimum=16,
    )


@dataclass(frozen=True)
class Pairs:
    """Targets with their control images, and what found no partner."""

    controls: dict[Path, tuple[Path, ...]]  # of each target
    alone: tuple[Path, ...]  # targets without a control image
    unused: tuple[Path, ...]  # control images of no target

    @property
    def count(self) -> int:
        """How many control images a target has."""
        return Counter(map(len, self.controls.values())).most_common(1)[0][0]


def find_pairs(controls: Path, targets: Path) -> Pairs:
    """Match the pictures of two folders by name. Raises ConfigError when a folder is missing or nothing matches."""
    for folder in (controls, targets):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: is not a folder; check the path")
    found = list_images(targets)
    candidates = list_images(controls)
    matched, _ = match_controls({path.stem for path in found}, candidates)
    pairs = {path: matched[path.stem] for path in found if path.stem in matched}
    if not pairs:
        raise ConfigError(
            f"{controls}: no picture is named like one in {targets}; name them alike, e.g. cat.png in both"
        )
    used = {control for own in pairs.values() for control in own}
    return Pairs(
        pairs,
        alone=tuple(path for path in found if path not in pairs),
        unused=tuple(path for path in candidates if path not in used),
    )


def draft(controls: Path, targets: Path, config: DraftConfig) -> list[str]:
    """Write a dataset file, prompts and missing captions for the pictures of two folders; returns the lines to show.

    Raises ConfigError, with nothing written, where a file is in the way or nothing matches.
    """
    prompts = config.output.with_name("prompts.txt")
    for path in (config.output, prompts):
        if path.exists():
            raise ConfigError(f"{path}: exists; move it away, or give another name with --output")
    pairs = find_pairs(controls, targets)
    lines = [f"{counted(len(pairs.controls), 'pair')} of {controls} and {targets}"]
    for paths, what in ((pairs.alone, "without a control image"), (pairs.unused, "without a target")):
        if paths:
            lines.append(f"{len(paths)} {what}, left out: {some(path.name for path in paths)}")
    lines += _write_captions(config, [*pairs.controls])
    config.output.parent.mkdir(parents=True, exist_ok=True)
    _write(config.output, tomli_w.dumps(_settings(controls, targets, config, pairs)))
    items = find_all_items(read_config(config.output))
    _write(prompts, "".join(f"{_prompt(item)}\n" for item in items[:_PROMPTS]))
    lines += [f"wrote {config.output} and {prompts}", "", "next:", *_commands(config.output, prompts)]
    return lines


def _write_captions(config: DraftConfig, targets: Sequence[Path]) -> list[str]:
    missing = [path for path in targets if not path.with_suffix(".txt").is_file()]
    if not missing:
        return []
    if config.caption is None and not config.trigger:
        raise ConfigError(
            f"{counted(len(missing), 'target')} without a caption file ({some(path.name for path in missing)}); write "
            "cat.txt beside cat.png, or give --caption or --trigger"
        )
    for path in missing:
        text = (config.caption or "{name}").replace("{name}", path.stem.replace("_", " "))
        if config.trigger and not text.startswith(config.trigger):
            text = f"{config.trigger}, {text}"
        _write(path.with_suffix(".txt"), text + "\n")
    return [f"wrote {counted(len(missing), 'caption')}; edit them to say what each picture shows"]


def _write(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _settings(controls: Path, targets: Path, config: DraftConfig, pairs: Pairs) -> dict[str, object]:
    """The contents of a dataset file: control images at 0, 2, 4 ..., the target at 1."""
    return {
        "general": {
            "resolution": list(config.resolution) or _resolution([*pairs.controls]),
            "caption_extension": ".txt",
            "batch_size": 1,
            "enable_bucket": True,
            "bucket_no_upscale": True,
        },
        "datasets": [
            {
                "image_directory": targets.as_posix(),
                "control_directory": controls.as_posix(),
                "cache_directory": (targets.parent / "cache").as_posix(),
                "fp_1f_clean_indices": [2 * number for number in range(pairs.count)],
                "fp_1f_target_index": 1,
            }
        ],
    }


def _resolution(targets: Sequence[Path]) -> list[int]:
    """The size of all targets if they have one, else a square of their median area; at most `_LARGEST_AREA`."""
    sizes = [check_image(path, "target") for path in targets]
    areas = sorted(width * height for width, height in sizes)
    area = min(areas[len(areas) // 2], _LARGEST_AREA)
    width, height = sizes[0] if len(set(sizes)) == 1 else (1, 1)
    scale = math.sqrt(area / (width * height))
    return [max(16, floor16(round(side * scale))) for side in (width, height)]


def _prompt(item: Item) -> str:
    caption = " ".join(item.caption.split())
    controls = " ".join(f"--ci {path.as_posix()}" for path in item.controls)
    width, height = item.bucket
    return f"{caption} {controls} --of {item.layout} --w {width} --h {height} --s 20 --d 1"


def _commands(dataset: Path, prompts: Path) -> list[str]:
    """The commands of the README for these files."""
    data = f"--dataset_config {dataset.as_posix()}"
    return [
        f"python wan_dataset.py check {data}",
        f"python wan_cache_latents.py {data} --one_frame --ckpt_dir models",
        f"python wan_cache_text_encoder_outputs.py {data} --batch_size 16 --ckpt_dir models",
        f"accelerate launch --mixed_precision bf16 wan_train_network.py --one_frame {data} --ckpt_dir models "
        f"--network_dim 32 --learning_rate 2e-4 --timestep_sampling shift --discrete_flow_shift 3.0 "
        f"--max_train_steps 2000 --sample_prompts {prompts.as_posix()} --sample_every_n_steps 200 "
        f"--save_every_n_steps 200 --output_dir output --output_name my-lora",
    ]
