"""`--explain` of the two caching scripts."""

from collections.abc import Sequence
from pathlib import Path

from dataset.config import DatasetsConfig, read_config
from dataset.sources import Item, find_all_items, find_all_targets
from utils.text import table
from wan.files.tokenizer import load_tokenizer
from wan.frames.layout import LayoutConfig
from wan.frames.sizes import Size
from wan.frames.table import SHOWN, TableFrame, control_frames, file_frame, frame_table, left_out
from wan.models.estimate import format_bytes
from wan.nets.spec import TEXT_LENGTH
from wan.nets.t5 import token_counts


def explain_latents(
    dataset_config: Path, flags: LayoutConfig, batch_size: int | None, weights: Sequence[Path]
) -> list[str]:
    """Latent caching: the first item of each dataset, size and layout. weights: the model files, for their sizes."""
    config = read_config(dataset_config, batch_size, flags.one_frame_layout, flags.alpha)
    items = find_all_items(config)
    groups: dict[tuple[int, Size, str, tuple[Size, ...]], list[Item]] = {}
    for item in items:
        groups.setdefault((item.dataset, item.bucket, str(item.layout), item.sizes), []).append(item)
    lines = []
    for (index, size, *_), group in list(groups.items())[:SHOWN]:
        item = group[0]
        wide = "{}x{}".format(*size)
        lines += [f"dataset {index}, {wide}, {item.layout}: {len(group)} items, the first is {item.stem}"]
        lines += [*frame_table(item.layout, _item_frames(item)), ""]
    lines += left_out(len(groups))
    images = sum(1 + len(item.controls) for item in items)
    largest = max(items, key=lambda item: item.bucket[0] * item.bucket[1])
    rows = [
        ("runs", f"the VAE over {images} images, CLIP over {images - len(items)} control images, each uncropped"),
        ("writes", f"{len(items)} caches to {_folders(config)}"),
        ("batches", ", ".join(f"dataset {i}: {one.batch_size}" for i, one in enumerate(config.datasets)) + " at most"),
        ("largest image", "{}x{}".format(*largest.bucket)),
        ("weights", _file_sizes(weights)),
    ]
    return [*lines, *table(rows)]


def _item_frames(item: Item) -> list[TableFrame]:
    target = file_frame("target", item.target, item.target_mask, item.target_fit, masked=True, alpha=item.alpha)
    return [*control_frames(item), target]


def explain_texts(dataset_config: Path, batch_size: int | None, tokenizer: Path | None, weights: Path) -> list[str]:
    """Text caching: how long the captions are."""
    config = read_config(dataset_config, batch_size)
    items = find_all_targets(config)
    captions = [*{item.caption: None for item in items}]
    lengths = dict(zip(captions, token_counts(load_tokenizer(tokenizer), captions), strict=True))
    counts = [lengths[item.caption] for item in items]
    longest = max(items, key=lambda item: lengths[item.caption])
    rows = [
        ("runs", f"T5 over {len(items)} captions, {len(lengths)} of them different"),
        ("tokens", f"{min(counts)} to {max(counts)}, {sum(counts) / len(counts):.0f} in the mean"),
        ("longest caption", str(longest.target)),
        ("cut", f"{sum(count > TEXT_LENGTH for count in counts)} captions at {TEXT_LENGTH} tokens"),
        ("writes", f"{len(items)} caches to {_folders(config)}"),
        ("weights", _file_sizes([weights])),
    ]
    return [*table(rows)]


def _folders(config: DatasetsConfig) -> str:
    return ", ".join(str(dataset.cache_directory) for dataset in config.datasets)


def _file_sizes(paths: Sequence[Path]) -> str:
    return ", ".join(f"{path.name} {format_bytes(path.stat().st_size)}" for path in paths)
