"""The demo's result as one picture and as a page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from utils.pages import render

_CELL, _GROW, _HEADER = 240, 2, 22
_TITLES = {"i2v": ["start", "base model", "LoRA", "truth"], "flf2v": ["start", "end", "base model", "LoRA", "truth"]}

_OF_README = (1, 5, 12, 15)  # tests of i2v

Table = list[tuple[str, float, float, bool]]  # name, value, limit, reached


@dataclass(frozen=True)
class Row:
    """Pictures [3, height, width] uint8 in the order of the titles, and what is to say about them."""

    pictures: list[Tensor]
    note: str


def write_page(
    folder: Path, sections: Mapping[str, tuple[list[Row], Table]], lessons: list[Any], seconds: float
) -> None:
    """`sheet.png` with the rows of all sections two by two, and `index.html` with a sheet and a table of each.

    And `results.jpg`, the picture of the README, which a short demo leaves out.
    """
    sheets = {name: sheet(rows, _TITLES[name]) for name, (rows, _) in sections.items()}
    for name, image in sheets.items():
        image.save(folder / f"{name}.png")
    parts = [(lesson, *sections[lesson.name], _TITLES[lesson.name]) for lesson in lessons]
    page = render(Path(__file__).with_name("page.html.jinja"), minutes=seconds / 60, parts=parts)
    (folder / "index.html").write_text(page, encoding="utf-8")
    stacked = Image.new("RGB", (max(s.width for s in sheets.values()), sum(s.height for s in sheets.values())), "white")
    top = 0
    for one in sheets.values():
        stacked.paste(one, (0, top))
        top += one.height
    stacked.save(folder / "sheet.png")
    if len(rows := sections["i2v"][0]) > max(_OF_README):
        image = sheet([rows[number] for number in _OF_README], _TITLES["i2v"])
        image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS).save(
            folder / "results.jpg", quality=90
        )


def sheet(rows: list[Row], titles: list[str], across: int = 2) -> Image.Image:
    """Rows of enlarged pictures, `across` of them side by side, under their titles."""
    width = len(titles) * _CELL + 20
    lines = -(-len(rows) // across)
    canvas = Image.new("RGB", (min(across, len(rows)) * width, _HEADER + lines * _CELL), "white")
    draw = ImageDraw.Draw(canvas)
    for place, row in enumerate(rows):
        left, top = place % across * width, _HEADER + place // across * _CELL
        for column, (title, picture) in enumerate(zip(titles, row.pictures, strict=True)):
            image = Image.fromarray(np.ascontiguousarray(picture.movedim(0, -1).numpy()))
            image = image.resize((image.width * _GROW, image.height * _GROW), Image.Resampling.LANCZOS)
            x = left + column * _CELL
            if place < across:
                draw.text((x + 4, 5), title, fill="black")
            canvas.paste(image, (x, top))
    return canvas
