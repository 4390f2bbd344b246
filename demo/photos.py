"""Pairs of photographs for examples and tests: before, after, and the frame half-way between.

The photographs ship inside scikit-image, so nothing is downloaded. The edit is the same for all, as a LoRA wants it: a
warm light on a grey version of the picture, darker towards the bottom.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

PHOTOS = {  # name -> (what is in it, the picture)
    "astronaut": ("an astronaut in front of a flag", data.astronaut),
    "brick": ("a brick wall", data.brick),
    "camera": ("a man behind a camera", data.camera),
    "cat": ("a cat looking up", data.cat),
    "coffee": ("a cup of coffee on a table", data.coffee),
    "coins": ("old coins in rows", data.coins),
    "grass": ("a lawn", data.grass),
    "gravel": ("gravel", data.gravel),
    "hubble": ("galaxies in the night sky", data.hubble_deep_field),
    "moon": ("a crater of the moon", data.moon),
    "retina": ("a retina", data.retina),
    "rocket": ("a rocket at its launch", data.rocket),
    "tissue": ("stained tissue under a microscope", data.immunohistochemistry),
}
LONGEST_SIDE = 320  # pixels
EDIT = "in the evening light"


def photo(name: str) -> Image.Image:
    """One of PHOTOS as RGB, reduced to LONGEST_SIDE; the aspect ratio stays."""
    image = Image.fromarray(PHOTOS[name][1]()).convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def edited(image: Image.Image) -> Image.Image:
    """The picture after the edit."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    dusk = np.linspace(1.0, 0.5, grey.shape[0], dtype=np.float32)[:, None, None]
    return Image.fromarray((grey * dusk * np.float32([1.0, 0.72, 0.42])).astype(np.uint8))


def write_pairs(folder: Path, names: Iterable[str] = tuple(PHOTOS)) -> None:
    """Write these photographs as data sets into `folder`; the lists name the files by the path of `folder` as given.

    start/NAME.png -> target/NAME.png + .txt: one control image; pairs.jsonl lists the same files.
    ends/NAME_0.png, ends/NAME_1.png -> middle/NAME.png + .txt: two control images; middle.jsonl lists the same files.
    """
    lists: dict[str, list[dict[str, str]]] = {"pairs": [], "middle": []}
    for name in names:
        before = photo(name)
        after = edited(before)
        caption = f"{PHOTOS[name][0]} {EDIT}"
        start, ends = folder / f"start/{name}.png", [folder / f"ends/{name}_{i}.png" for i in (0, 1)]
        target, middle = folder / f"target/{name}.png", folder / f"middle/{name}.png"
        pictures = {start: before, target: after, ends[0]: before, ends[1]: after}
        for path, picture in (pictures | {middle: Image.blend(before, after, 0.5)}).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        for path in (target, middle):
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        lists["pairs"].append({"image_path": target.as_posix(), "caption": caption, "control_path": start.as_posix()})
        controls = {f"control_path_{i}": path.as_posix() for i, path in enumerate(ends)}
        lists["middle"].append({"image_path": middle.as_posix(), "caption": caption, **controls})
    for name, lines in lists.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
