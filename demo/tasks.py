"""Tasks that a LoRA for the miniature family learns: control pictures, captions, and the truth."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demo.figures import clip, picture
from demo.world import LIGHTS, PLACES, Place, Scene, on_photo, sample_scene

TRAINING_SEED, HELD_OUT_SEED = 300_000_000, 800_000_000
_OTHER = 50_000_000  # between the seeds of an example and those of the next scene in it
_SAME = 8  # levels of 255
MOTIONS = ("wave", "lift", "raise")  # between two images, in place


@dataclass(frozen=True)
class Example:
    """Pictures are [3, height, width] uint8."""

    caption: str
    controls: list[Tensor]  # in the order of control_index
    plain: Tensor  # the truth without the edit: what the unedited parts are compared with
    truth: Tensor
    masks: tuple[Tensor, ...] = ()  # [height, width] bool, one per control or none: what of it is to be used


Task = Callable[[int, bool, int], Example]  # number, whether it is held out, how many controls there are


def photo(number: int, held_out: bool, _count: int) -> Example:
    """One control: the same moment on a school photo."""
    scene = _scene(number, held_out, "stand")
    start = picture(scene)
    return Example(scene.edit_caption, [start], start, picture(on_photo(scene)))


def moment(number: int, held_out: bool, _count: int) -> Example:
    """Two controls: the moment between them on a school photo."""
    scene = _scene(number, held_out, MOTIONS[number % len(MOTIONS)])
    first, middle, last = clip(scene, (0, 1, 2))
    return Example(scene.edit_caption, [first, last], middle, picture(on_photo(scene), 1))


def collage(number: int, held_out: bool, count: int) -> Example:
    """The first `count` of three references: somebody, in clothes of the second, where the third stands."""
    scene, dressed, placed = _in_one_pose(number, held_out)
    truth = replace(scene, outfit=dressed.outfit, place=placed.place)
    start = picture(scene)
    references = [start, picture(dressed), picture(placed)][:count]
    return Example(f"the {scene.person} dressed in the new clothes", references, start, picture(truth))


def cut_out(number: int, held_out: bool, _count: int) -> Example:
    """The figure of one control before the background of the other. Which of the two it is, the masks alone tell."""
    front, back, other = _in_one_pose(number, held_out)
    return _cut_out(number, front, back, [front, back, other])


def cut_out_of_others(number: int, held_out: bool, _count: int) -> Example:
    """`cut_out` from controls that differ in what their masks hide: masks and truth are the same."""
    front, back, other = _in_one_pose(number, held_out)
    hidden = replace(front, place=other.place), replace(other, place=back.place)
    return _cut_out(number, *hidden, [front, back, other])


def without_masks(task: Task) -> Task:
    """Task whose examples have no masks to say which part of the controls counts."""
    return lambda *arguments: replace(task(*arguments), masks=())


def _cut_out(number: int, front: Scene, back: Scene, figures: list[Scene]) -> Example:
    """figures: those that are no background"""
    figure = _same([replace(front, place=Place(name, 0.0, 0)) for name in PLACES])
    masks = figure, _same([replace(scene, place=back.place) for scene in figures])
    controls, truth = [picture(front), picture(back)], picture(replace(front, place=back.place))
    turn = -1 if number % 2 else 1
    controls, masks = controls[::turn], masks[::turn]
    return Example(f"the {front.person} before the same picture", controls, controls[0], truth, masks)


TASKS: dict[str, Task] = {
    "photo": photo,
    "moment": moment,
    "collage": collage,
    "cut out": cut_out,
    "cut out of others": cut_out_of_others,
    "cut out, no masks": without_masks(cut_out),
    "cut out of others, no masks": without_masks(cut_out_of_others),
}


def _scene(number: int, held_out: bool, action: str, which: int = 0) -> Scene:
    """which: of the scenes of this example."""
    if held_out:
        return sample_scene(HELD_OUT_SEED + number + which * _OTHER, held_out, action)
    return in_all_places(sample_scene(TRAINING_SEED + number + which * _OTHER, held_out, action), number + which)


def in_all_places(scene: Scene, number: int) -> Scene:
    """The scene in the place, and in the light, whose turn it is: a small data set had better leave none out."""
    places, lights = list(PLACES), [light for light, _ in LIGHTS.values()]
    light = lights[number // len(places) % len(lights)]
    return replace(scene, place=replace(scene.place, name=places[number % len(places)]), light=light)


def _posed_as(scene: Scene, other: Scene) -> Scene:
    """The other scene from the same camera in the same light, its figure where and as that of `scene` stands."""
    names = ("size", "light", "side", "x", "height", "facing", "arms")
    return replace(other, **{name: getattr(scene, name) for name in names})


def _in_one_pose(number: int, held_out: bool) -> tuple[Scene, Scene, Scene]:
    first, *others = (_scene(number, held_out, "stand", which) for which in range(3))
    return first, *(_posed_as(first, other) for other in others)


def _same(scenes: list[Scene]) -> Tensor:
    """Where their pictures agree, [height, width] bool."""
    pictures = torch.stack([picture(scene) for scene in scenes]).int()
    return (pictures.amax(0) - pictures.amin(0)).amax(0) <= _SAME
