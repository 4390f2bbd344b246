"""The demo's world: who stands where, what happens, and how a caption says it. Deterministic from a seed.

`sample_scene` draws a scene, `picture` (demo/figures.py) draws it. A held-out character has a combination of hair and
clothes that no training character has. Nobody is on a school photo unless `on_photo` takes it.
"""

import random
import zlib
from dataclasses import dataclass, replace

from demo.drawing import Colour

FRAMES = 9  # of a clip: three latent frames, of which the first two are also those of its first five frames
SIZES = ((96, 96), (80, 112), (112, 80))  # width, height

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.18, 0.2),
    "orange": (0.96, 0.56, 0.16),
    "yellow": (0.97, 0.84, 0.26),
    "green": (0.25, 0.65, 0.3),
    "lime": (0.65, 0.85, 0.3),
    "teal": (0.12, 0.62, 0.62),
    "blue": (0.2, 0.45, 0.9),
    "purple": (0.55, 0.3, 0.75),
    "pink": (0.97, 0.6, 0.72),
    "white": (0.94, 0.94, 0.92),
    "brown": (0.52, 0.34, 0.2),
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (0.13, 0.12, 0.15),
    "brown": (0.42, 0.25, 0.14),
    "blond": (0.95, 0.8, 0.42),
    "red": (0.78, 0.3, 0.12),
    "silver": (0.78, 0.8, 0.86),
    "blue": (0.25, 0.42, 0.82),
    "pink": (0.95, 0.5, 0.66),
    "green": (0.3, 0.62, 0.42),
}
SKINS: tuple[Colour, ...] = ((0.99, 0.87, 0.76), (0.94, 0.76, 0.6), (0.8, 0.58, 0.42), (0.6, 0.4, 0.28))
HAIR_STYLES = ("short", "long", "spiky", "bob", "tied", "curly")
TOPS = ("shirt", "sweater", "vest", "hoodie", "striped shirt", "coat", "dress", "overalls")
BOTTOMS = ("trousers", "skirt", "shorts")
OBJECTS = ("ball", "balloon", "flag", "book", "flower", "lantern")
HATS = ("cap", "crown", "beanie")
PLACES = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "room": "in a room",
    "city": "in a city street",
    "forest": "in a forest",
    "snow": "in the snow",
    "hills": "before high hills",
    "stage": "on a stage",
}
LIGHTS: dict[str, tuple[Colour, str]] = {
    "day": ((1.0, 1.0, 1.0), "by day"),
    "evening": ((1.0, 0.84, 0.68), "in warm evening light"),
    "dusk": ((0.7, 0.74, 0.95), "in blue light"),
    "shade": ((0.84, 0.86, 0.88), "in the shade"),
}
PEOPLE = {"girl": "she", "boy": "he", "woman": "she", "man": "he", "child": "they", "person": "they"}

CHANGES = ("clothes", "place")  # actions that the video models see more often than others: drawn by name only

# What happens -> ways to say it. {one} is she, he or they; {colour} and {hat} are those of the change.
ACTIONS: dict[str, tuple[str, ...]] = {
    "stand": ("{one} stands still", "nothing moves", "{one} waits quietly"),
    "wave": ("{one} waves", "{one} waves one hand and greets", "{one} moves one arm up and down"),
    "raise": ("{one} raises both arms", "both arms go up", "{one} cheers with both hands"),
    "walk left": ("{one} walks to the left", "{one} goes left step by step"),
    "walk right": ("{one} walks to the right", "{one} goes right step by step"),
    "jump": ("{one} jumps", "{one} leaps into the air"),
    "turn left": ("{one} turns to the left", "{one} looks left"),
    "turn right": ("{one} turns to the right", "{one} looks right"),
    "lean": ("{one} leans to one side", "{one} tilts the whole body"),
    "lift": ("{one} lifts the {object}", "the {object} goes up"),
    "zoom in": ("the camera moves closer", "slow zoom in on the {person}"),
    "zoom out": ("the camera moves away", "slow zoom out"),
    "darken": ("the light fades", "it gets dark"),
    "brighten": ("the light gets brighter", "the sun comes out"),
    "top colour": ("the {top} turns {colour}", "{one} wears a {colour} {top} now"),
    "hair colour": ("the hair turns {colour}", "{one} has {colour} hair now"),
    "hat": ("{one} puts on a {hat}", "a {hat} appears", "{one} wears a {hat} now"),
    "surprise": ("{one} is surprised", "the mouth opens wide"),
    "clothes": ("{one} wears {clothes} now", "{one} puts on {clothes}", "{one} is dressed in {clothes}"),
    "place": ("{one} is {place} now", "now {one} stands {place}", "the {person} appears {place}"),
}
EDIT_CAPTION = "the {person} in a school photo"
WORDS = (  # words of prompts that no caption has; the tokenizer knows them, the models do not
    "school uniform and its with without frame between the first last same picture photo image style new old "
    "dressed clothes become becomes becoming student pupil class jacket tie suit armour robe gown kimono pyjamas"
)


@dataclass(frozen=True)
class Outfit:
    """Clothes of one figure. The bottom of a dress, of overalls and of a coat belongs to the top."""

    top: str
    top_colour: Colour
    second_colour: Colour  # stripes, lining, straps
    bottom: str
    bottom_colour: Colour

    @property
    def has_skirt(self) -> bool:
        return self.top == "dress" or (self.bottom == "skirt" and self.top != "overalls")


@dataclass(frozen=True)
class Place:
    name: str
    hue: float  # -1..1, warmer or cooler colours
    seed: int  # where trees, clouds and windows are


@dataclass(frozen=True)
class Scene:
    """A clip. Lengths are in body heights, places in shares of the picture."""

    person: str
    look: str  # hair, its colour, top and its colour: what no held-out and training character have in common
    skin: Colour
    hair: str
    hair_colour: Colour
    outfit: Outfit
    hat: str | None
    hat_colour: Colour
    holds: str | None
    object_colour: Colour
    place: Place
    light: Colour
    side: float
    size: tuple[int, int]
    x: float
    height: float
    facing: float  # -1 left .. 1 right
    arms: tuple[float, float]  # radians, 0 hangs down
    action: str
    change: Colour | Outfit | Place | None  # what the action makes of the attribute that it changes
    caption: str
    backdrop: bool = False

    @property
    def edit_caption(self) -> str:
        return EDIT_CAPTION.format(person=self.person)


def on_photo(scene: Scene) -> Scene:
    """Scene with the same figure on a school photo: on the same floor, before a plain blue backdrop."""
    return replace(scene, backdrop=True)


def in_blazer(scene: Scene, seed: int) -> Scene:
    """Scene with a blazer and a tie, in colours drawn from the seed: clothes for the VAE to see, which is to
    know pictures of all kinds. The video models never see any."""
    rng = random.Random(seed)
    top, tie, below = (tuple(rng.random() for _ in range(3)) for _ in range(3))
    return replace(scene, outfit=Outfit("blazer", top, tie, rng.choice(("skirt", "trousers")), below))


def sample_scene(seed: int, held_out: bool = False, action: str | None = None) -> Scene:
    """The scene of this seed. `action`: what happens, drawn as well when None."""
    rng = random.Random(seed)
    while True:
        look = [rng.choice(list(choices)) for choices in (HAIR_STYLES, HAIR_COLOURS, TOPS, COLOURS)]
        if is_held_out("/".join(look)) == held_out:
            return _scene(rng, action, *look)


def is_held_out(look: str) -> bool:
    """One look of eight"""
    return zlib.crc32(look.encode()) % 8 == 0


def _scene(rng: random.Random, action: str | None, hair: str, hair_colour: str, top: str, top_colour: str) -> Scene:
    person = rng.choice(list(PEOPLE))
    bottom, bottom_colour, second = rng.choice(BOTTOMS), rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
    holds = rng.choice(OBJECTS) if rng.random() < 0.6 else None
    hat = rng.choice(HATS) if rng.random() < 0.25 else None
    place, light = rng.choice(list(PLACES)), rng.choice(list(LIGHTS))
    object_colour, hat_colour = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
    action = action or rng.choice([name for name in ACTIONS if name not in CHANGES])
    if action == "lift" and holds is None:
        holds = rng.choice(OBJECTS)
    if action == "hat":
        hat = rng.choice(HATS)
    palette = HAIR_COLOURS if action == "hair colour" else COLOURS
    new_colour = rng.choice([name for name in palette if name not in (hair_colour, top_colour)])
    skin, size = rng.choice(SKINS), rng.choice((SIZES[0], *SIZES))
    look = [
        f"a {person} with {hair} {hair_colour} hair",
        f"in a {top_colour} {top}" + ("" if top in ("dress", "overalls") else f" and {bottom_colour} {bottom}"),
        *([f"with a {object_colour} {holds} in one hand"] if holds else []),
        *([f"under a {hat_colour} {hat}"] if hat and action != "hat" else []),
        *([PLACES[place]] if rng.random() < 0.7 else []),
        *([LIGHTS[light][1]] if rng.random() < 0.5 else []),
    ]
    names = {"one": PEOPLE[person], "person": person, "top": top, "hat": f"{hat_colour} {hat}", "object": holds}
    way = rng.choice(ACTIONS[action])
    arms = (rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.9))
    varied = [min(1.0, part * rng.uniform(0.93, 1.05)) for part in COLOURS[top_colour]]
    change = palette[new_colour] if action in ("top colour", "hair colour") else None
    if action == "clothes":
        held_out = is_held_out("/".join((hair, hair_colour, top, top_colour)))
        change, names["clothes"] = _new_clothes(rng, hair, hair_colour, held_out)
    if action == "place":
        change = Place(rng.choice([name for name in PLACES if name != place]), *_surroundings(rng))
        names["place"] = PLACES[change.name]
    return Scene(
        person=person,
        look="/".join((hair, hair_colour, top, top_colour)),
        skin=skin,
        hair=hair,
        hair_colour=HAIR_COLOURS[hair_colour],
        outfit=Outfit(top, tuple(varied), COLOURS[second], bottom, COLOURS[bottom_colour]),
        hat=hat,
        hat_colour=COLOURS[hat_colour],
        holds=holds,
        object_colour=COLOURS[object_colour],
        place=Place(place, *_surroundings(rng)),
        light=LIGHTS[light][0],
        side=rng.choice((-1.0, 1.0)),
        size=size,
        x=rng.uniform(0.36, 0.64),
        height=rng.uniform(0.74, 0.95),
        facing=rng.uniform(-0.8, 0.8),
        arms=arms,
        action=action,
        change=change,
        caption=(", ".join(look) + ". " if rng.random() < 0.7 else "") + way.format(**names, colour=new_colour),
    )


def _new_clothes(rng: random.Random, hair: str, hair_colour: str, held_out: bool) -> tuple[Outfit, str]:
    """An outfit and its name. Whoever is held out stays so in it, and nobody else becomes so."""
    while True:
        top, colour = rng.choice(TOPS), rng.choice(list(COLOURS))
        if is_held_out("/".join((hair, hair_colour, top, colour))) == held_out:
            break
    bottom, bottom_colour, second = rng.choice(BOTTOMS), rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
    name = f"a {colour} {top}" + ("" if top in ("dress", "overalls") else f" and {bottom_colour} {bottom}")
    return Outfit(top, COLOURS[colour], COLOURS[second], bottom, COLOURS[bottom_colour]), name


def _surroundings(rng: random.Random) -> tuple[float, int]:
    """Hue and seed of a place."""
    return rng.uniform(-1, 1), rng.randrange(1 << 30)


def vocabulary() -> list[str]:
    """All words of captions and WORDS, sorted."""
    texts = [*PLACES.values(), *(words for _, words in LIGHTS.values()), *PEOPLE, *PEOPLE.values(), *COLOURS]
    texts += [*HAIR_COLOURS, *HAIR_STYLES, *TOPS, *BOTTOMS, *OBJECTS, *HATS, WORDS, EDIT_CAPTION]
    texts += [phrase for phrases in ACTIONS.values() for phrase in phrases]
    texts += ["a with hair in and one hand under , ."]
    return sorted({word for text in texts for word in text.split() if "{" not in word})
