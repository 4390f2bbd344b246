"""A scene at a moment -> the shapes of its picture."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from demo.drawing import Canvas, Colour, rasterise, stack_shapes
from demo.places import draw_backdrop, draw_place
from demo.world import COLOURS, FRAMES, Outfit, Scene

_HIP, _CHEST, _SHOULDER, _HEAD = 0.31, 0.445, 0.535, 0.75  # heights, feet at 0, crown at about 0.95
_SHOE: Colour = (0.22, 0.2, 0.22)


@dataclass(frozen=True)
class Moment:
    """A scene and how its figure stands at one time."""

    scene: Scene
    x: float
    lift: float = 0.0
    facing: float = 0.0
    left_arm: float = 0.3  # radians, 0 hangs down
    right_arm: float = 0.3
    stride: float = 0.0
    tilt: float = 0.0
    zoom: float = 1.0
    mouth: float = 0.0
    hat_drop: float = 0.0  # how far above the head the hat still is


def picture(scene: Scene, frame: int = 0) -> Tensor:
    """One frame [3, height, width] uint8; frame 0 .. FRAMES - 1."""
    return clip(scene, (frame,))[0]


def clip(scene: Scene, frames: tuple[int, ...] = tuple(range(FRAMES))) -> Tensor:
    """[T, 3, height, width] uint8"""
    return rasterise(stack_shapes([shapes(scene, frame) for frame in frames]), scene.size)


def shapes(scene: Scene, frame: int) -> Tensor:
    """[K, FIELDS] of one frame."""
    moment = moment_at(scene, frame / (FRAMES - 1))
    scene = moment.scene
    width, height = scene.size
    canvas = Canvas(light=scene.light, side=scene.side)
    # Units of the picture's height, from the point on the ground where the figure stands
    ground = Canvas(width / 2, 0.93 * height, height * moment.zoom, 0.0, scene.light, scene.side, canvas.rows)
    draw_place(ground, scene.place, width / height)
    if scene.backdrop:
        draw_backdrop(ground, width / height)
    across = (moment.x - 0.5) * width / height
    ground.ellipse(across, 0.0, (0.17 * scene.height, 0.022), (0.16, 0.16, 0.2), shade=0.0)
    unit = scene.height * min(1.0, 1.15 * width / height)
    _draw_figure(ground.at(across, moment.lift * unit, unit, moment.tilt), moment)
    return canvas.shapes()


def moment_at(scene: Scene, time: float) -> Moment:
    """The scene at a time 0..1 of the clip: the figure moves all the time, attributes change early on."""
    eased = time * time * (3 - 2 * time)
    before = time < 0.06  # the first frame
    early = min(1.0, max(0.0, (time - 0.06) / 0.38))  # over at the fifth frame
    right, left = scene.arms
    now = Moment(scene, scene.x, facing=scene.facing, left_arm=left, right_arm=right)
    sway = math.sin(2 * math.pi * time)
    step = 1 if scene.action.endswith("right") else -1
    match scene.action:
        case "wave":
            return replace(now, left_arm=left + (2.6 - left) * early + 0.35 * max(0.0, time - 0.5) * sway)
        case "raise":
            return replace(now, left_arm=left + (2.7 - left) * eased, right_arm=right + (2.5 - right) * eased)
        case "walk left" | "walk right":
            swing = math.sin(3 * math.pi * time)
            return replace(now, x=now.x + 0.2 * step * time, stride=0.1 * swing, facing=0.7 * step)
        case "jump":
            return replace(now, lift=0.13 * math.sin(math.pi * time), left_arm=left + 0.8 * math.sin(math.pi * time))
        case "turn left" | "turn right":
            return replace(now, facing=now.facing + (0.9 * step - now.facing) * eased)
        case "lean":
            return replace(now, tilt=(0.22 if scene.facing > 0 else -0.22) * eased)
        case "lift":
            return replace(now, right_arm=right + (2.2 - right) * eased)
        case "zoom in":
            return replace(now, zoom=1 + 0.25 * time)
        case "zoom out":
            return replace(now, zoom=1 - 0.18 * time)
        case "darken" | "brighten":
            end = (0.5, 0.5, 0.66) if scene.action == "darken" else (1.08, 1.06, 1.0)
            return replace(now, scene=replace(scene, light=_mix(scene.light, end, early)))
        case "top colour":
            outfit = replace(scene.outfit, top_colour=_mix(scene.outfit.top_colour, scene.change, early))
            return replace(now, scene=replace(scene, outfit=outfit))
        case "hair colour":
            return replace(now, scene=replace(scene, hair_colour=_mix(scene.hair_colour, scene.change, early)))
        case "hat":
            return replace(now, scene=replace(scene, hat=None if before else scene.hat), hat_drop=0.25 * (1 - early))
        case "clothes":
            return replace(now, scene=replace(scene, outfit=scene.outfit if before else scene.change))
        case "place":
            return replace(now, scene=replace(scene, place=scene.place if before else scene.change))
        case "surprise":
            return replace(now, mouth=early, lift=0.012 * sway)
        case _:
            return replace(now, lift=0.006 * sway)


def _mix(start: Colour, end: Colour, share: float) -> Colour:
    return tuple(a + (b - a) * share for a, b in zip(start, end, strict=True))


def _darker(colour: Colour, factor: float = 0.72) -> Colour:
    return tuple(part * factor for part in colour)


def _draw_figure(body: Canvas, moment: Moment) -> None:
    scene = moment.scene
    turn = 0.03 * moment.facing
    _hair_back(body, scene, turn)
    _draw_legs(body, scene, moment.stride)
    _draw_torso(body, scene, turn)
    _draw_arm(body, scene, -1, moment.left_arm, turn)
    _draw_head(body, moment, 2 * turn)
    hand = _draw_arm(body, scene, 1, moment.right_arm, turn)
    if scene.holds:
        _draw_object(body, scene, *hand)


def _draw_legs(body: Canvas, scene: Scene, stride: float) -> None:
    outfit = scene.outfit
    long = (outfit.bottom == "trousers" and outfit.top != "dress") or outfit.top == "overalls"
    colour = outfit.top_colour if outfit.top == "overalls" else outfit.bottom_colour
    for side in (-1, 1):
        hip, foot = (side * 0.055, _HIP), (side * 0.06 + side * stride, 0.05)
        body.limb(hip, foot, 0.04, scene.skin)
        if long:
            body.limb(hip, foot, 0.048, colour)
        elif outfit.bottom == "shorts" and outfit.top != "dress":
            knee = tuple(a + 0.4 * (b - a) for a, b in zip(hip, foot, strict=True))
            body.limb(hip, knee, 0.055, colour)
        body.ellipse(foot[0], 0.03, (0.055, 0.032), _SHOE, cut=-0.7)


def _draw_torso(body: Canvas, scene: Scene, turn: float) -> None:
    outfit = scene.outfit
    colour, second = outfit.top_colour, outfit.second_colour
    body.block(turn, 0.57, (0.035, 0.035), 0.04, scene.skin)
    if outfit.top != "dress":
        _draw_bottom(body, outfit)
    match outfit.top:
        case "coat":
            body.block(turn, 0.37, (0.135, 0.1), 0.17, colour, corner=0.015)
            body.block(turn, 0.39, (0.02, 0.035), 0.165, second)
        case "dress":
            body.block(0, 0.31, (0.165, 0.09), 0.12, colour, corner=0.015)
            body.block(turn, 0.47, (0.085, 0.1), 0.075, colour, corner=0.015)
            body.block(turn / 2, 0.41, (0.09, 0.09), 0.014, second)
        case "overalls":
            body.block(turn, _CHEST, (0.1, 0.1), 0.095, second, corner=0.015)
            body.block(turn, 0.38, (0.1, 0.085), 0.09, colour, corner=0.012)
            for side in (-1, 1):
                body.block(turn + side * 0.06, 0.5, (0.014, 0.014), 0.05, colour)
        case "blazer":
            _draw_blazer(body, outfit, turn)
        case _:
            _draw_shirt(body, outfit, turn)


def _draw_bottom(body: Canvas, outfit: Outfit) -> None:
    """Hips of trousers and shorts, or a skirt; that of a blazer has pleats."""
    if not outfit.has_skirt:
        body.block(0, _HIP + 0.02, (0.095, 0.095), 0.035, outfit.bottom_colour, corner=0.01)
        return
    body.block(0, 0.27, (0.14, 0.09), 0.085, outfit.bottom_colour, corner=0.01)
    for x in (-0.05, 0.05) if outfit.top == "blazer" else ():
        body.block(x, 0.262, (0.016, 0.01), 0.075, _darker(outfit.bottom_colour, 0.75))


def _draw_shirt(body: Canvas, outfit: Outfit, turn: float) -> None:
    body.block(turn, _CHEST, (0.1, 0.1), 0.095, outfit.top_colour, corner=0.015)
    dark = _darker(outfit.top_colour)
    match outfit.top:
        case "striped shirt":
            for y in (0.38, 0.44, 0.5):
                body.block(turn, y, (0.112, 0.112), 0.013, outfit.second_colour)
        case "hoodie":
            body.block(turn, 0.39, (0.07, 0.05), 0.03, dark, corner=0.008)
            body.ellipse(turn, 0.555, (0.085, 0.035), dark)
        case "sweater":
            body.block(turn, 0.36, (0.105, 0.105), 0.014, dark)


def _draw_blazer(body: Canvas, outfit: Outfit, turn: float) -> None:
    white = (0.95, 0.95, 0.95)
    body.block(turn, 0.425, (0.112, 0.102), 0.115, outfit.top_colour, corner=0.015)
    body.block(turn, 0.505, (0.004, 0.06), 0.06, white)
    body.block(turn, 0.485, (0.022, 0.014), 0.05, outfit.second_colour)
    for y in (0.355, 0.4):
        body.ellipse(turn, y, (0.012, 0.012), (0.92, 0.78, 0.35))


def _draw_arm(body: Canvas, scene: Scene, side: int, angle: float, turn: float) -> tuple[float, float]:
    """Draws one arm and returns where its hand is."""
    outfit = scene.outfit
    shoulder = (turn + side * 0.105, _SHOULDER - 0.02)
    direction = (side * math.sin(angle), -math.cos(angle))
    hand = (shoulder[0] + 0.21 * direction[0], shoulder[1] + 0.21 * direction[1])
    sleeve = {"vest": 0.0, "shirt": 0.45, "striped shirt": 0.45, "dress": 0.35, "overalls": 0.45}.get(outfit.top, 0.86)
    colour = outfit.second_colour if outfit.top == "overalls" else outfit.top_colour
    body.limb(shoulder, hand, 0.032, scene.skin)
    if sleeve:
        end = tuple(a + sleeve * (b - a) for a, b in zip(shoulder, hand, strict=True))
        body.limb(shoulder, end, 0.042, _darker(colour, 0.9))
    body.ellipse(*hand, (0.042, 0.042), scene.skin)
    return hand


def _draw_object(body: Canvas, scene: Scene, x: float, y: float) -> None:
    colour = scene.object_colour
    match scene.holds:
        case "ball":
            body.ellipse(x, y + 0.05, (0.085, 0.085), colour)
            body.block(x, y + 0.05, (0.08, 0.08), 0.014, (0.95, 0.95, 0.95))
        case "balloon":
            body.limb((x, y), (x + 0.03, y + 0.22), 0.006, (0.3, 0.3, 0.3))
            body.ellipse(x + 0.03, y + 0.31, (0.09, 0.11), colour, shade=0.25)
        case "flag":
            body.limb((x, y - 0.08), (x, y + 0.32), 0.012, (0.5, 0.36, 0.22))
            body.block(x + 0.095, y + 0.255, (0.085, 0.085), 0.06, colour, fade=0.2)
        case "book":
            body.block(x, y + 0.04, (0.075, 0.075), 0.055, colour)
            body.block(x, y + 0.04, (0.01, 0.01), 0.055, (0.95, 0.93, 0.85))
        case "flower":
            body.limb((x, y - 0.04), (x, y + 0.13), 0.01, (0.25, 0.55, 0.25))
            body.ellipse(x, y + 0.15, (0.06, 0.055), colour)
            body.ellipse(x, y + 0.15, (0.024, 0.024), (0.98, 0.86, 0.35))
        case "lantern":
            body.block(x, y - 0.09, (0.05, 0.04), 0.05, colour, corner=0.01)
            body.ellipse(x, y - 0.09, (0.03, 0.036), (1.0, 0.96, 0.72))
            body.block(x, y - 0.025, (0.05, 0.03), 0.014, (0.25, 0.22, 0.2))


def _hair_back(body: Canvas, scene: Scene, turn: float) -> None:
    colour = _darker(scene.hair_colour, 0.85)
    match scene.hair:
        case "long":
            body.block(-turn, 0.6, (0.17, 0.175), 0.19, colour, corner=0.025)
        case "bob":
            body.block(-turn / 2, 0.71, (0.19, 0.165), 0.1, colour, corner=0.03)
        case "tied":
            body.ellipse(-0.19 - turn, 0.72, (0.06, 0.15), colour, turn=-0.25)
            body.ellipse(0.19 - turn, 0.72, (0.06, 0.15), colour, turn=0.25)
        case "curly":
            for angle in range(0, 360, 45):
                x, y = 0.15 * math.cos(math.radians(angle)), 0.14 * math.sin(math.radians(angle))
                body.ellipse(x - turn, _HEAD + 0.03 + y, (0.08, 0.08), colour)


def _draw_head(body: Canvas, moment: Moment, turn: float) -> None:
    scene = moment.scene
    x = turn / 2
    body.ellipse(x, _HEAD, (0.165, 0.17), scene.skin, shade=0.06)
    for side in (-1, 1):
        eye = x + turn * 0.8 + side * 0.068
        body.ellipse(eye, 0.735, (0.024, 0.036), (0.12, 0.1, 0.14), shade=0.0)
        body.ellipse(eye + 0.008, 0.748, (0.009, 0.011), (0.98, 0.98, 0.98), shade=0.0)
    wide = 0.5 + 0.5 * moment.mouth
    body.ellipse(x + turn * 0.8, 0.655, (0.032 * wide + 0.012, 0.008 + 0.028 * moment.mouth), (0.7, 0.25, 0.25))
    _hair_front(body, scene, x, turn)
    if scene.hat:
        _draw_hat(body, scene, x, moment.hat_drop)


def _hair_front(body: Canvas, scene: Scene, x: float, turn: float) -> None:
    colour = scene.hair_colour
    body.ellipse(x - turn * 0.2, _HEAD + 0.01, (0.182, 0.185), colour, cut=0.3)
    if scene.hair == "spiky":
        for i in range(5):
            angle = math.radians(-60 + 30 * i)
            tip = (x + 0.17 * math.sin(angle), _HEAD + 0.02 + 0.17 * math.cos(angle))
            body.block(*tip, (0.06, 0.004), 0.06, colour, turn=-angle)
    elif scene.hair in ("long", "bob"):
        for side in (-1, 1):
            body.block(x + side * 0.155, _HEAD - 0.02, (0.024, 0.028), 0.09, colour, corner=0.01)
    elif scene.hair == "tied":
        for side in (-1, 1):
            body.ellipse(x + side * 0.165 - turn * 0.2, 0.83, (0.03, 0.03), COLOURS["red"])


def _draw_hat(body: Canvas, scene: Scene, x: float, drop: float) -> None:
    y, colour = 0.86 + drop, scene.hat_colour
    match scene.hat:
        case "cap":
            body.ellipse(x, y, (0.175, 0.12), colour, cut=0.0)
            body.block(x + 0.1 * (1 if scene.facing > 0 else -1), y, (0.13, 0.12), 0.016, _darker(colour))
        case "crown":
            gold = (0.98, 0.82, 0.28)
            body.block(x, y + 0.035, (0.13, 0.14), 0.035, gold)
            for side in (-1, 0, 1):
                body.block(x + side * 0.105, y + 0.09, (0.035, 0.004), 0.035, gold)
                body.ellipse(x + side * 0.09, y + 0.03, (0.018, 0.018), colour)
        case "beanie":
            body.ellipse(x, y - 0.01, (0.18, 0.15), colour, cut=0.0)
            body.block(x, y, (0.17, 0.17), 0.025, _darker(colour), corner=0.008)
            body.ellipse(x, y + 0.15, (0.04, 0.04), (0.95, 0.95, 0.95))
