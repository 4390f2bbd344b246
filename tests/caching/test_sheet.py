"""The contact sheet: which pictures it shows, in which order and size, with what text."""

import base64
import io
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wan_dataset
from dataset.cache import LatentCache, latent_cache_path, write_latent_cache
from dataset.config import read_config
from dataset.sources import find_all_items
from demo.tiny_models import FILES, write_models
from utils.errors import ConfigError
from utils.images import from_pixels, to_pixels
from wan.caching import sheet
from wan.files.load import load_vae
from wan.frames.condition import causal_video
from wan.frames.encode import encode_images, encode_video
from wan.frames.encoding import ENCODINGS
from wan.frames.layout import OneFrameLayout
from wan.nets.conditioning import Conditioning

TOML = """
[[datasets]]
resolution = [64, 48]
caption_extension = ".txt"
image_directory = "target"
control_directory = "start"
cache_directory = "cache"
fp_1f_clean_indices = [4, 0]
fp_1f_target_index = 2
"""
COLOURS = {"start/a_0": (200, 0, 0), "start/a_1": (0, 200, 0), "target/a": (0, 0, 200)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Items `a`, of one colour per picture, and `b`; the second control of `a` has a mask of its left half."""
    monkeypatch.chdir(tmp_path)
    for name in ("target", "start", "cache"):
        Path(name).mkdir()
    for path, colour in COLOURS.items():
        for name in (path, path.replace("/a", "/b")):
            Image.new("RGB", (160, 96), colour).save(f"{name}.png")
    half = Image.new("L", (160, 96))
    half.paste(255, (0, 0, 80, 96))
    half.save("start/a_1_mask.png")
    for stem in "ab":
        Path(f"target/{stem}.txt").write_text("a <b>bold</b> caption 日本語", encoding="utf-8")
    Path("data.toml").write_text(TOML)
    return tmp_path


def items():
    return find_all_items(read_config("data.toml"))


def colour(tile: sheet.Tile) -> tuple[int, ...]:
    return tile.image.getpixel((tile.image.width // 2, tile.image.height // 2))


def test_a_row_shows_the_frames_in_time_order_at_the_size_of_the_bucket(folder):
    row = sheet.make_row(items()[0])
    (tiles,) = row.lines
    assert [tile.title for tile in tiles] == [
        *("control 1 at index 0", "mask, 50% used", "target at index 2", "control 0 at index 4"),
    ]
    assert [colour(tiles[i]) for i in (0, 2, 3)] == [COLOURS["start/a_1"], COLOURS["target/a"], COLOURS["start/a_0"]]
    assert all(tile.image.width * 48 == tile.image.height * 64 for tile in tiles)
    assert row.facts == ("dataset 0: a", "160x96 → 64x48, 20% cropped", "control_index=4;0,target_index=2")


def test_a_mask_is_shown_as_the_latents_see_it(folder):
    (tiles,) = sheet.make_row(items()[0]).lines
    mask = np.asarray(tiles[1].image.convert("L"))
    assert mask[:, : mask.shape[1] // 2].min() == 255 and mask[:, mask.shape[1] // 2 :].max() == 0
    assert tiles[1].name == "a_1_mask.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_no_text_is_shown_with_question_marks(folder):
    for path in [*Path("target").glob("a*"), *Path("start").glob("a*")]:
        path.rename(path.with_name("\udcff" + path.name))
    wan_dataset.main(["sheet", "--dataset_config", "data.toml", "--output", "sheet.html"])
    assert "?a.png" in Path("sheet.html").read_text(encoding="utf-8") and Path("sheet.png").is_file()


class Page(HTMLParser):
    """Tags in use and pictures of a page; complains when tags don't match."""

    def __init__(self):
        super().__init__()
        self.open, self.pictures, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag == "img":
            data = dict(attrs)["src"].removeprefix("data:image/png;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_its_pictures_and_shows_captions_as_text(folder):
    wan_dataset.main(["sheet", "--dataset_config", "data.toml", "--output", "out/sheet.html"])
    text = Path("out/sheet.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and "b" not in page.seen and len(page.pictures) == 7
    assert text.count("a &lt;b&gt;bold&lt;/b&gt; caption 日本語") == 2 and "2 of 2 items" in text
    drawn = np.asarray(Image.open("out/sheet.png").convert("RGB"))
    for wanted in COLOURS.values():
        assert (np.abs(drawn.astype(int) - wanted).max(axis=2) < 3).sum() > 5000
    assert sorted(path.name for path in Path("out").iterdir()) == ["sheet.html", "sheet.png"]


def test_a_white_picture_has_an_outline_on_the_white_sheet():
    white = Image.new("RGB", (40, 30), "white")
    drawn = sheet.to_png([sheet.Row((), "", ((sheet.Tile("", "", white),),))])
    grey = np.argwhere((np.asarray(drawn) == 0xCC).all(axis=2))[drawn.width :]  # without the line between rows
    (top, left), (bottom, right) = grey.min(axis=0), grey.max(axis=0)
    assert (right - left, bottom - top) == (41, 31) and len(grey) == 2 * 41 + 2 * 31


def test_a_limit_spreads_over_the_dataset(folder):
    for name in "cd":
        for path in (*Path("target").glob("a.*"), *Path("start").glob("a_?.png")):
            shutil.copy(path, path.with_name(name + path.name[1:]))
    wan_dataset.main(["sheet", "--dataset_config", "data.toml", "--output", "sheet.html", "--limit", "2"])
    text = Path("sheet.html").read_text(encoding="utf-8")
    assert "2 of 4 items" in text and re.findall(r"dataset 0: (\w)<br>", text) == ["a", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output sheet.pdf", "--output sheet.pdf: must end in .html"),
        ("--output sheet.html --limit 0", "--limit 0: must be at least 1"),
        ("--output sheet.html --vae data.toml", "--vae"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        wan_dataset.main(["sheet", "--dataset_config", "data.toml", *arguments.split()])
    assert not list(Path().glob("sheet*"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder / FILES["vae"]


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_decoded_frames_are_those_of_the_latents_one_by_one_or_as_a_video(models, encoding):
    vae = load_vae(models, torch.float32, torch.device("cpu"))
    layout = OneFrameLayout((0, 4), 2, encoding)
    pixels = [torch.full((3, 32, 48), level) for level in (-0.5, 0.5, 0.0)]
    ordered = [pixels[i] for i in layout.clip.order]
    if encoding.decodes_video:
        latents = encode_video(vae, causal_video(layout.clip, pixels))
        whole = vae.decode(latents[None])[0]
        expected = [from_pixels(whole[:, i].detach()) for i in (0, 4, 8)]
    else:
        latents = torch.cat([encode_images(vae, one[None])[0] for one in ordered], dim=1)
        expected = [from_pixels(vae.decode(latents[None, :, i : i + 1])[0, :, 0].detach()) for i in range(3)]
    cache = LatentCache(latents, Conditioning(torch.zeros(20, 3, 4, 6)), layout)
    assert [image.tobytes() for image in sheet.decoded_frames(vae, cache)] == [image.tobytes() for image in expected]


def test_with_a_vae_the_cache_is_shown_below_and_a_missing_one_is_named(folder, models):
    first, _ = items()
    vae = load_vae(models, torch.float32, torch.device("cpu"))
    latents = encode_images(vae, to_pixels(Image.new("RGB", (64, 48)))[None])[0].expand(-1, 3, -1, -1)
    path = latent_cache_path(Path("cache"), first.stem, first.size)
    write_latent_cache(path, LatentCache(latents, Conditioning(torch.zeros(20, 3, 6, 8)), first.layout))
    arguments = ["--dataset_config", "data.toml", "--output", "sheet.html", "--vae", str(models), "--device", "cpu"]
    wan_dataset.main(["sheet", *arguments])
    text = Path("sheet.html").read_text(encoding="utf-8")
    assert text.count("decoded from the cache") == 3 and text.count("not cached") == 1
    path.write_bytes(b"1234567890")
    (tile,) = sheet.cached_tiles(vae, path)
    assert tile.title == "cache unreadable" and tile.image is None
