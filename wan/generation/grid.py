"""Pictures side by side, with labels on two sides, as one picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_LARGEST = 8192  # pixels: beyond this, pictures are drawn smaller
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_BACKGROUND, _TEXT, _MISSING = "white", "black", "lightgrey"


def draw_grid(rows: Sequence[Sequence[Image.Image | None]], across: Sequence[str], down: Sequence[str]) -> Image.Image:
    """`rows` of equally many pictures, with a label of `across` above each column and one of `down` beside each row.

    Labels may have several lines; with empty ones there is no room for them. A missing picture is a grey field.
    Pictures keep their sizes, unless all together would exceed 8192 pixels in width or height.
    """
    pictures = [picture for row in rows for picture in row if picture is not None]
    width = max((picture.width for picture in pictures), default=256)
    height = max((picture.height for picture in pictures), default=256)
    shrink = min(1, _LARGEST / (width * len(across)), _LARGEST / (height * len(down)))
    width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    font_size = max(14, min(width, height) // 16)
    font, gap = ImageFont.load_default(font_size), font_size // 2
    (top_width, top), (left, left_height) = _room(across, font), _room(down, font)
    column, row_height = max(width, top_width), max(height, left_height)
    size = (gap + len(across) * (column + gap), gap + len(down) * (row_height + gap))
    left, top = (extent + gap if extent else 0 for extent in (left, top))
    grid = Image.new("RGB", (left + size[0], top + size[1]), _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    xs = [left + gap + i * (column + gap) for i in range(len(across))]
    ys = [top + gap + i * (row_height + gap) for i in range(len(down))]
    for x, label in zip(xs, across, strict=True):
        draw.multiline_text((x + column / 2, gap), label, fill=_TEXT, font=font, anchor="ma", align="center")
    for y, label, row in zip(ys, down, rows, strict=True):
        draw.multiline_text((gap, y + row_height / 2), label, fill=_TEXT, font=font, anchor="lm")
        for x, picture in zip(xs, row, strict=True):
            if picture is None:
                draw.rectangle((x, y, x + column - 1, y + row_height - 1), fill=_MISSING)
                continue
            if shrink < 1:
                scaled = max(1, int(picture.width * shrink)), max(1, int(picture.height * shrink))
                picture = picture.resize(scaled, Image.Resampling.LANCZOS)
            grid.paste(picture, (x + (column - picture.width) // 2, y + (row_height - picture.height) // 2))
    return grid


def _room(labels: Sequence[str], font: _Font) -> tuple[int, int]:
    """Width and height in pixels that any of the labels needs; 0 when all are empty."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), label, font=font) for label in labels if label]
    if not boxes:
        return 0, 0
    return int(max(right for _, _, right, _ in boxes)) + 1, int(max(bottom for *_, bottom in boxes)) + 1
