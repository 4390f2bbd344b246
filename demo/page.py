"""The demo's result as one picture and as a page."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

_CELL, _GROW, _HEADER = 240, 2, 22
_TITLES = {"i2v": ["start", "base model", "LoRA", "truth"], "flf2v": ["start", "end", "base model", "LoRA", "truth"]}

_VERDICTS = {True: "reached", False: "missed"}

Table = list[tuple[str, float, float, bool]]  # name, value, limit, reached


@dataclass(frozen=True)
class Row:
    """Pictures [3, height, width] uint8 in the order of the titles, and what is to say about them."""

    pictures: list[Tensor]
    note: str


def write_page(
    folder: Path, sections: Mapping[str, tuple[list[Row], Table]], lessons: list[Any], seconds: float
) -> None:
    """`sheet.png` with the rows of all sections two by two, and `index.html` with a sheet and a table of each."""
    sheets = {name: sheet(rows, _TITLES[name]) for name, (rows, _) in sections.items()}
    parts = []
    for lesson in lessons:
        name = lesson.name
        rows, table = sections[name]
        sheets[name].save(folder / f"{name}.png")
        figures = "".join(
            f"<tr><td>{label}</td><td>{value:.3f}</td><td>{limit:.3f}</td><td>{_VERDICTS[reached]}</td></tr>"
            for label, value, limit, reached in table
        )
        notes = "".join(f"<li>{html.escape(row.note)}</li>" for row in rows)
        parts.append(
            f"<h2>{name}: {lesson.pairs} pairs, {lesson.steps} steps, {lesson.tests} held-out starts</h2>"
            f"<table><tr><th>mean over the starts</th><th>value</th><th>limit</th><th></th></tr>{figures}</table>"
            f'<p><img src="{name}.png" alt="{", ".join(_TITLES[name])}"></p><ol>{notes}</ol>'
        )
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:2px 14px 2px 0;text-align:left}"
    page = f"<!doctype html><meta charset=utf-8><title>wan-one-frame demo</title><style>{style}</style>"
    page += f"<h1>A LoRA that takes school photos</h1><p>{seconds / 60:.1f} minutes.</p>{''.join(parts)}"
    (folder / "index.html").write_text(page, encoding="utf-8")
    stacked = Image.new("RGB", (max(s.width for s in sheets.values()), sum(s.height for s in sheets.values())), "white")
    top = 0
    for one in sheets.values():
        stacked.paste(one, (0, top))
        top += one.height
    stacked.save(folder / "sheet.png")


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
