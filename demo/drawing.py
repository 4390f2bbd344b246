"""Flat shapes with soft edges -> pictures. Everything in the demo's world is drawn with the two shapes below."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Colour = tuple[float, float, float]  # red, green, blue in 0..1

FIELDS = 15  # numbers of a shape, in the order of `Canvas._add`
_ELLIPSE, _BLOCK = 1.0, 0.0
_NO_CUT = -1e6


@dataclass
class Canvas:
    """Collects the shapes of a picture, back to front.

    Coordinates are those of `at`: x to the right, y up, `scale` pixels per unit from the pixel (x0, y0), turned by
    `tilt` radians. The light tints all colours and comes from above and from `side` (-1 left, 1 right).
    """

    x0: float = 0.0
    y0: float = 0.0
    scale: float = 1.0
    tilt: float = 0.0
    light: Colour = (1.0, 1.0, 1.0)
    side: float = -1.0
    rows: list[tuple[float, ...]] = field(default_factory=list)

    def at(self, x: float, y: float, scale: float, tilt: float = 0.0) -> "Canvas":
        """Canvas of the same picture with its origin at (x, y) of this one; `scale`: their unit in ours."""
        px, py = self._pixel(x, y)
        return Canvas(px, py, self.scale * scale, self.tilt + tilt, self.light, self.side, self.rows)

    def ellipse(
        self,
        x: float,
        y: float,
        radii: tuple[float, float],
        colour: Colour,
        turn: float = 0.0,
        cut: float | None = None,
        shade: float = 0.12,
    ) -> None:
        """`cut`: only what is above this height, in ellipse radii (-1..1), is drawn."""
        cut = _NO_CUT if cut is None else cut * radii[1] * self.scale
        self._add(x, y, turn, radii[0], radii[0], radii[1], 0.0, _ELLIPSE, cut, colour, shade, shade)

    def block(
        self,
        x: float,
        y: float,
        half_widths: tuple[float, float],
        half_height: float,
        colour: Colour,
        turn: float = 0.0,
        corner: float = 0.0,
        shade: float = 0.1,
        fade: float | None = None,
    ) -> None:
        """A trapezoid (half widths at the bottom and at the top) grown by round corners; `fade`: shade from above."""
        fade = shade if fade is None else fade
        low, high = half_widths
        self._add(x, y, turn, low, high, half_height, corner, _BLOCK, _NO_CUT, colour, shade, fade)

    def limb(self, start: tuple[float, float], end: tuple[float, float], radius: float, colour: Colour) -> None:
        """A line with round ends."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        turn = math.atan2(-dx, dy)
        centre = (start[0] + dx / 2, start[1] + dy / 2)
        self.block(*centre, (0.0, 0.0), math.hypot(dx, dy) / 2, colour, turn, corner=radius)

    def shapes(self) -> Tensor:
        """[K, FIELDS] float32, in pixels"""
        return torch.tensor(self.rows, dtype=torch.float32).reshape(-1, FIELDS)

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        return self.x0 + self.scale * (cos * x - sin * y), self.y0 - self.scale * (sin * x + cos * y)

    def _add(
        self,
        x: float,
        y: float,
        turn: float,
        low: float,
        high: float,
        half: float,
        corner: float,
        kind: float,
        cut: float,
        colour: Colour,
        shade: float,
        fade: float,
    ) -> None:
        s, turn = self.scale, self.tilt + turn
        tinted = [part * light for part, light in zip(colour, self.light, strict=True)]
        sizes = (low * s, high * s, half * s, corner * s)
        place = (*self._pixel(x, y), math.cos(turn), math.sin(turn))
        self.rows.append((*place, *sizes, kind, cut, *tinted, shade * self.side, fade))


def stack_shapes(pictures: list[Tensor]) -> Tensor:
    """Pictures of different numbers of shapes [K, FIELDS] -> [N, max K, FIELDS]; the fill is too small to be seen."""
    longest = max(len(shapes) for shapes in pictures)
    stacked = torch.zeros(len(pictures), longest, FIELDS)
    stacked[..., 0], stacked[..., 2] = -1e4, 1.0
    for row, shapes in zip(stacked, pictures, strict=True):
        row[: len(shapes)] = shapes
    return stacked


def rasterise(shapes: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, K, FIELDS] -> pictures [N, 3, height, width] uint8 of this size (width, height), on the shapes' device."""
    width, height = size
    device = shapes.device
    xs = (torch.arange(width, device=device) + 0.5)[None, None, :]
    ys = (torch.arange(height, device=device) + 0.5)[None, :, None]
    picture = torch.zeros(len(shapes), 3, height, width, device=device)
    for shape in shapes.unbind(1):
        x, y, cos, sin, low, high, half, corner, kind, cut, *_ = shape[:, :, None, None].unbind(1)
        dx, dy = xs - x, y - ys
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        distance = torch.where(kind > 0, _ellipse(u, v, low, half, cut), _block(u, v, low, high, half) - corner)
        reach = torch.maximum(torch.maximum(low, high), half) + corner + 1e-3
        light = 1 + shape[:, 13, None, None] * (dx / reach).clamp(-1, 1)
        light = light + shape[:, 14, None, None] * (dy / reach).clamp(-1, 1)
        colour = shape[:, 10:13, None, None] * light[:, None]
        cover = (0.5 - distance).clamp(0, 1)[:, None]
        picture = torch.lerp(picture, colour, cover)
    return (picture.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _block(u: Tensor, v: Tensor, low: Tensor, high: Tensor, half: Tensor) -> Tensor:
    """Signed distance to a trapezoid, as to a rectangle of the width that it has at this height."""
    share = (v / (2 * half + 1e-6) + 0.5).clamp(0, 1)
    outside_u, outside_v = u.abs() - (low + (high - low) * share), v.abs() - half
    outside = torch.hypot(outside_u.clamp(min=0), outside_v.clamp(min=0))
    return outside + torch.maximum(outside_u, outside_v).clamp(max=0)


def _ellipse(u: Tensor, v: Tensor, a: Tensor, b: Tensor, cut: Tensor) -> Tensor:
    """First-order distance to an ellipse: its implicit function over the length of its gradient."""
    a, b = a.clamp(min=1e-3), b.clamp(min=1e-3)
    near = torch.hypot(u / a, v / b)
    slope = torch.hypot(u / a**2, v / b**2)
    distance = torch.where(near > 1e-3, near * (near - 1) / (slope + 1e-6), -torch.minimum(a, b))
    return torch.maximum(distance, cut - v)
