"""The eight places of the demo's world, and the backdrop of school photos."""

import random
from dataclasses import replace

from demo.drawing import Canvas, Colour
from demo.world import Place

BLUE: Colour = (0.62, 0.72, 0.86)  # of the backdrop, in any light
_FLOOR = 0.09  # height to which the floor is seen below it


def draw_backdrop(ground: Canvas, aspect: float) -> None:
    """A blue wall before the place, whose floor stays. Sizes are those of `draw_place`."""
    _Place(replace(ground, light=(1.0, 1.0, 1.0)), 0.0, aspect / 2 * 1.5).band(_FLOOR, 1.4, BLUE, fade=-0.15)


def draw_place(ground: Canvas, place: Place, aspect: float) -> None:
    """Background of a picture: units of its height, origin on the ground in the middle, 0.93 above it is the top.

    aspect: width over height.
    """
    rng = random.Random(place.seed)
    half = aspect / 2 * 1.5  # a little more than is seen, for a camera that moves away
    _PLACES[place.name](_Place(ground, place.hue, half), rng)


class _Place:
    """A canvas with the strokes that the places share."""

    def __init__(self, canvas: Canvas, hue: float, half: float) -> None:
        self.canvas, self.hue, self.half = canvas, hue, half

    def colour(self, red: float, green: float, blue: float) -> Colour:
        return red * (1 + 0.12 * self.hue), green, blue * (1 - 0.12 * self.hue)

    def band(self, low: float, high: float, colour: Colour, fade: float = 0.0) -> None:
        y, half = (low + high) / 2, (high - low) / 2
        self.canvas.block(0, y, (self.half, self.half), half, self.colour(*colour), shade=0.0, fade=fade)

    def somewhere(self, rng: random.Random) -> float:
        """A place to the left or right, rarely behind the figure."""
        return rng.choice((-1, 1)) * rng.uniform(0.3, 1.0) * self.half / 1.5

    def sky(self, horizon: float, colour: Colour) -> None:
        self.band(horizon - 0.1, 1.4, colour, fade=-0.12)

    def clouds(self, rng: random.Random, count: int) -> None:
        for _ in range(count):
            x, y, size = self.somewhere(rng), rng.uniform(0.72, 0.88), rng.uniform(0.04, 0.07)
            for dx, grow in ((-1.1, 0.8), (0, 1.1), (1.1, 0.75)):
                self.canvas.ellipse(x + dx * size, y, (size * 1.1 * grow, size * 0.7 * grow), (0.97, 0.97, 0.98))

    def tree(self, x: float, y: float, size: float, leaves: Colour) -> None:
        self.canvas.block(x, y + size * 0.3, (size * 0.09, size * 0.07), size * 0.3, (0.42, 0.3, 0.2))
        self.canvas.ellipse(x, y + size * 0.8, (size * 0.36, size * 0.42), self.colour(*leaves), shade=0.18)


def _meadow(place: _Place, rng: random.Random) -> None:
    place.sky(0.3, (0.56, 0.78, 0.95))
    place.clouds(rng, 2)
    place.canvas.ellipse(rng.uniform(-0.4, 0.4), 0.24, (0.75, 0.2), place.colour(0.5, 0.74, 0.42))
    place.band(-0.3, 0.28, (0.56, 0.8, 0.4), fade=0.12)
    place.tree(place.somewhere(rng), 0.22, 0.4, (0.3, 0.58, 0.3))


def _beach(place: _Place, rng: random.Random) -> None:
    place.sky(0.45, (0.6, 0.84, 0.97))
    place.canvas.ellipse(place.somewhere(rng), 0.76, (0.08, 0.08), (1.0, 0.92, 0.6), shade=0.0)
    place.band(0.16, 0.46, (0.25, 0.58, 0.78), fade=-0.12)
    place.band(-0.3, 0.2, (0.93, 0.85, 0.65), fade=-0.06)


def _room(place: _Place, rng: random.Random) -> None:
    place.band(0.1, 1.4, (0.86, 0.8, 0.72), fade=0.04)
    place.band(-0.3, 0.14, (0.62, 0.45, 0.33), fade=-0.08)
    place.band(0.13, 0.16, (0.95, 0.92, 0.86))
    x = place.somewhere(rng)
    place.canvas.block(x, 0.6, (0.15, 0.15), 0.17, (0.96, 0.95, 0.92))
    place.canvas.block(x, 0.6, (0.125, 0.125), 0.145, (0.62, 0.82, 0.95), fade=0.15)
    place.canvas.block(x, 0.6, (0.01, 0.01), 0.145, (0.96, 0.95, 0.92))


def _city(place: _Place, rng: random.Random) -> None:
    place.sky(0.2, (0.72, 0.8, 0.9))
    x = -place.half
    while x < place.half:
        width, top = rng.uniform(0.09, 0.15), rng.uniform(0.42, 0.85)
        grey = rng.uniform(0.42, 0.62)
        place.canvas.block(x, top / 2, (width, width), top / 2, place.colour(grey, grey, grey * 1.1), fade=-0.1)
        for y in (top - 0.1, top - 0.22):
            for side in (-1, 1):
                place.canvas.block(x + side * width / 2, y, (0.022, 0.022), 0.03, (0.98, 0.93, 0.7), shade=0.0)
        x += 2 * width + 0.02
    place.band(-0.3, 0.12, (0.5, 0.5, 0.53), fade=0.06)


def _forest(place: _Place, rng: random.Random) -> None:
    place.sky(0.2, (0.62, 0.82, 0.72))
    for i in range(5):
        x = (i - 2) / 2 * place.half / 1.5 + rng.uniform(-0.06, 0.06)
        place.tree(x, 0.16, rng.uniform(0.55, 0.8), (rng.uniform(0.12, 0.24), rng.uniform(0.4, 0.55), 0.26))
    place.band(-0.3, 0.18, (0.36, 0.5, 0.28), fade=0.1)


def _snow(place: _Place, rng: random.Random) -> None:
    place.sky(0.3, (0.7, 0.78, 0.9))
    for _ in range(3):
        x, size = place.somewhere(rng), rng.uniform(0.35, 0.5)
        for step in range(3):
            y, width = 0.24 + size * (0.25 + 0.25 * step), size * (0.3 - 0.07 * step)
            place.canvas.block(x, y, (width, 0.01), size * 0.18, place.colour(0.2, 0.42, 0.4))
    place.band(-0.3, 0.26, (0.92, 0.94, 0.98), fade=0.04)


def _hills(place: _Place, rng: random.Random) -> None:
    place.sky(0.3, (0.95, 0.8, 0.66))
    for level, grey in ((0.62, 0.66), (0.5, 0.52)):
        for _ in range(2):
            x = rng.uniform(-1, 1) * place.half / 1.5
            place.canvas.block(x, level / 2, (0.55, 0.02), level / 2, place.colour(grey, grey * 0.92, grey * 1.1))
    place.band(-0.3, 0.2, (0.7, 0.62, 0.42), fade=0.1)


def _stage(place: _Place, rng: random.Random) -> None:
    place.band(0.1, 1.4, (0.32, 0.2, 0.36), fade=0.15)
    place.canvas.ellipse(rng.uniform(-0.2, 0.2), 0.5, (0.36, 0.5), place.colour(0.52, 0.38, 0.5), shade=0.0)
    for side in (-1, 1):
        x = side * place.half / 1.5 * 0.92
        for dx in (-0.06, 0.0, 0.06):
            place.canvas.block(x + dx, 0.55, (0.035, 0.03), 0.5, place.colour(0.7, 0.15, 0.2), shade=0.25)
    place.band(-0.3, 0.13, (0.55, 0.38, 0.25), fade=0.1)


_PLACES = {
    "meadow": _meadow,
    "beach": _beach,
    "room": _room,
    "city": _city,
    "forest": _forest,
    "snow": _snow,
    "hills": _hills,
    "stage": _stage,
}
