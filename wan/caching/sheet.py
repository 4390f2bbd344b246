"""A contact sheet of a dataset, as HTML and PNG: the frames of each item as the model will see them."""

import base64
import io
import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dataset.cache import LatentCache, latent_cache_path, read_latent_cache
from dataset.config import read_config
from dataset.sources import Item, find_all_items
from utils.errors import ConfigError
from utils.files import require_writable_dir, written_whole
from utils.images import from_pixels, open_masked, resize_to_fill
from utils.options import option
from utils.pages import render
from wan.frames.encode import latent_mask
from wan.frames.layout import LayoutConfig, OneFrameLayout
from wan.models.device import DeviceConfig
from wan.models.options import VAEConfig
from wan.nets.vae import WanVAE

log = logging.getLogger(__name__)

_TILE = 224  # longest side of a picture, pixels
_TEXT = 260  # width of the column of text
_MARGIN, _LINE, _FONT = 12, 16, 13
_LETTERS = 40  # a line of the text column in the PNG
_CAPTION_LINES = 6

_TEMPLATE = Path(__file__).with_name("sheet.html.jinja")


@dataclass(frozen=True, kw_only=True)
class SheetConfig(LayoutConfig):
    """contact sheet"""

    dataset_config: Path = option(help="dataset TOML")
    output: Path = option(help="HTML file to write; a PNG of that name is put beside it")
    limit: int = option(50, help="items to show, spread over the dataset", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"--output {self.output}: must end in .html")


@dataclass(frozen=True)
class Tile:
    """A small picture with two lines of text."""

    title: str
    name: str
    image: Image.Image | None  # None: there is none to show


@dataclass(frozen=True)
class Row:
    """One item: its facts and caption, and its pictures, those of the cache in a line of their own."""

    facts: tuple[str, ...]
    caption: str
    lines: tuple[tuple[Tile, ...], ...]


def run_sheet(run: SheetConfig, vae: VAEConfig, device: DeviceConfig) -> None:
    """Write the two files. With a VAE the cached latents are decoded and shown as well.

    Raises ConfigError for the first thing that is wrong with the dataset; `dataset.check` tells all.
    """
    config = read_config(run.dataset_config, layout=run.one_frame_layout, alpha=run.alpha)
    items = find_all_items(config)
    shown = [items[i * len(items) // run.limit] for i in range(run.limit)] if len(items) > run.limit else items
    decode = None
    vae_file = None if vae.vae is None else vae.resolve()
    require_writable_dir(run.output.parent, "--output")
    if vae_file is not None:
        model = vae_file.load(device.resolve())

        def decode(item: Item) -> tuple[Tile, ...]:
            folder = config.datasets[item.dataset].cache_directory
            return cached_tiles(model, latent_cache_path(folder, item.stem, item.size))

    rows = [make_row(item, decode) for item in shown]
    note = f"{len(shown)} of {len(items)} items. Time runs to the right; sizes are those of the buckets."
    with written_whole(run.output) as temporary:
        text = to_html(run.dataset_config.name, note, rows)
        temporary.write_text(text, encoding="utf-8", errors="replace")  # names of files may be no text
    with written_whole(run.output.with_suffix(".png")) as temporary:
        to_png(rows).save(temporary)
    log.info("saved %s and %s", run.output, run.output.with_suffix(".png").name)


def make_row(item: Item, decode: Callable[[Item], tuple[Tile, ...]] | None = None) -> Row:
    """An item with its files brought to its bucket, in time order, each mask after its image."""
    fits = (*item.control_fits, item.target_fit)
    facts = (
        f"dataset {item.dataset}: {item.stem}",
        "{}x{} → {}x{}".format(*item.size, *item.bucket) + f", {fits[-1].cropped:.0%} cropped",
        str(item.layout),
    )
    tiles = []
    for slot, (name, path, mask) in enumerate(_frames(item)):
        image, coverage = open_masked(path, name, mask, item.alpha)
        title, fit = _title(item.layout, slot, name), fits[item.layout.clip.order[slot]]
        title += ", {}x{}".format(*fit.bucket) if fit.bucket != item.bucket else ""
        pixels = resize_to_fill(np.asarray(image), fit.bucket, fit.crop_only)
        tiles.append(Tile(title, path.name, _small(Image.fromarray(pixels))))
        if coverage is not None and (item.layout.encoding.takes_masks or name == "target"):
            used = latent_mask(coverage, fit.bucket, fit.crop_only)
            shown = Image.fromarray((used.numpy() * 255).round().astype(np.uint8))
            shown = shown.resize(fit.bucket, Image.Resampling.NEAREST).convert("RGB")
            file = mask.name if mask is not None else "its alpha channel"
            tiles.append(Tile(f"mask, {float(used.mean()):.0%} used", file, _small(shown)))
    lines = (tuple(tiles),) if decode is None else (tuple(tiles), decode(item))
    return Row(facts, item.caption, lines)


def _frames(item: Item) -> Iterator[tuple[str, Path, Path | None]]:
    """(name, file, mask) of each slot."""
    inputs = [(f"control {i}", *pair) for i, pair in enumerate(zip(item.controls, item.control_masks, strict=True))]
    inputs.append(("target", item.target, item.target_mask))
    yield from (inputs[i] for i in item.layout.clip.order)


def _title(layout: OneFrameLayout, slot: int, name: str) -> str:
    return f"{name} at index {layout.clip.time_indices[slot]}"


def cached_tiles(vae: WanVAE, path: Path) -> tuple[Tile, ...]:
    """The frames of a latent cache, decoded; a tile that says so when there is no readable cache."""
    if not path.is_file():
        return (Tile("not cached", path.name, None),)
    try:
        cache = read_latent_cache(path)
    except ConfigError as error:
        return (Tile("cache unreadable", str(error), None),)
    controls = len(cache.layout.control_indices)
    return tuple(
        Tile(
            _title(cache.layout, slot, "target" if i == controls else f"control {i}"),
            "decoded from the cache",
            _small(image),
        )
        for slot, (i, image) in enumerate(zip(cache.layout.clip.order, decoded_frames(vae, cache), strict=True))
    )


@torch.inference_mode()
def decoded_frames(vae: WanVAE, cache: LatentCache) -> list[Image.Image]:
    """The picture of each slot."""
    latents = cache.latents.to(next(vae.parameters()).device)
    return [from_pixels(pixels) for pixels in cache.layout.encoding.decode(vae, latents, cache.frame_sizes)]


def _small(image: Image.Image) -> Image.Image:
    """At most _TILE pixels a side; small ones are enlarged by whole numbers, so that their pixels show."""
    if max(image.size) * 2 <= _TILE:
        times = _TILE // max(image.size)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return image


def to_html(title: str, note: str, rows: Sequence[Row]) -> str:
    """A page that holds its pictures, so that it can be moved."""
    return render(_TEMPLATE, title=title, note=note, rows=rows, data_url=_data_url)


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def to_png(rows: Sequence[Row]) -> Image.Image:
    """All rows below each other. Letters outside Latin-1, which Pillow's own font lacks, show as question marks."""
    texts = [_wrapped(row) for row in rows]
    heights = [
        max(len(text) * _LINE, sum(_line_height(line) for line in row.lines)) + 2 * _MARGIN
        for row, text in zip(rows, texts, strict=True)
    ]
    most = max(len(line) for row in rows for line in row.lines)
    sheet = Image.new("RGB", (_TEXT + most * (_TILE + _MARGIN) + 2 * _MARGIN, sum(heights)), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT), 0
    for row, text, height in zip(rows, texts, heights, strict=True):
        draw.line((0, top, sheet.width, top), fill="#cccccc")
        for number, words in enumerate(text):
            draw.text((_MARGIN, top + _MARGIN + number * _LINE), _latin(words), "black", font)
        y = top + _MARGIN
        for line in row.lines:
            for column, tile in enumerate(line):
                x = _TEXT + _MARGIN + column * (_TILE + _MARGIN)
                draw.text((x, y), _latin(tile.title), "black", font)
                draw.text((x, y + _LINE), _latin(_cut(tile.name)), "#666666", font)
                if tile.image is not None:
                    upper = y + 2 * _LINE + 4
                    end = x + tile.image.width, upper + tile.image.height
                    draw.rectangle((x - 1, upper - 1, *end), outline="#cccccc")
                    sheet.paste(tile.image, (x, upper))
            y += _line_height(line)
        top += height
    return sheet


def _line_height(line: Sequence[Tile]) -> int:
    return 2 * _LINE + 4 + _MARGIN + max((tile.image.height for tile in line if tile.image is not None), default=0)


def _wrapped(row: Row) -> list[str]:
    caption = textwrap.wrap(row.caption, _LETTERS, max_lines=_CAPTION_LINES, placeholder=" ...")
    return [*(line for fact in row.facts for line in textwrap.wrap(fact, _LETTERS)), "", *caption]


def _cut(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:20]}...{name[-9:]}"


def _latin(text: str) -> str:
    return text.replace("→", "->").encode("latin-1", "replace").decode("latin-1")
