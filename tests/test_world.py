"""The demo's world: shapes against exact areas, scenes, captions and the school photo."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from demo.drawing import Canvas, rasterise, stack_shapes
from demo.figures import clip, moment_at, picture
from demo.miniature import build_tokenizer, write_tokenizer
from demo.tiny_models import FILES
from demo.train_dit import TEXT_LENGTH_IN_TRAINING
from demo.world import ACTIONS, CHANGES, COLOURS, FRAMES, PLACES, SIZES, Place, is_held_out, on_photo, sample_scene
from utils.images import STEP
from wan.files.tokenizer import load_tokenizer

WHITE = (1.0, 1.0, 1.0)


def covered(draw) -> float:
    """How many pixels of 64 x 64 the shape covers; the origin is the middle."""
    canvas = Canvas(32, 32)
    draw(canvas)
    return float(rasterise(canvas.shapes()[None], (64, 64))[0, 0].double().sum() / 255)


@pytest.mark.parametrize("turn", [0.0, 0.4, math.pi / 2])
@pytest.mark.parametrize(
    ("draw", "area"),
    [
        (lambda c, t: c.block(0, 0, (10, 10), 6, WHITE, turn=t, shade=0), 20 * 12),
        (lambda c, t: c.block(0, 0, (10, 4), 6, WHITE, turn=t, shade=0), 14 * 12),
        (lambda c, t: c.block(0, 0, (8, 8), 5, WHITE, turn=t, corner=3, shade=0), 16 * 10 + 52 * 3 + math.pi * 9),
        (lambda c, t: c.ellipse(0, 0, (14, 9), WHITE, turn=t, shade=0), math.pi * 14 * 9),
        (lambda c, t: c.ellipse(0, 0, (14, 9), WHITE, turn=t, cut=0, shade=0), math.pi * 14 * 9 / 2),
        (lambda c, t: c.limb((0, 0), (20 * math.sin(t), 20 * math.cos(t)), 3, WHITE), 120 + math.pi * 9),
    ],
)
def test_a_shape_covers_its_area_whichever_way_it_is_turned(draw, area, turn):
    assert covered(lambda canvas: draw(canvas, turn)) == pytest.approx(area, rel=0.04)


def test_a_block_on_whole_pixels_has_sharp_edges():
    canvas = Canvas(8, 8)
    canvas.block(2, 1, (3, 3), 2, WHITE, shade=0)  # columns 7..12, rows 5..8
    expected = torch.zeros(16, 16, dtype=torch.uint8)
    expected[5:9, 7:13] = 255
    assert torch.equal(rasterise(canvas.shapes()[None], (16, 16))[0, 1], expected)


def test_later_shapes_hide_earlier_ones_and_take_the_light():
    canvas = Canvas(8, 8, light=(0.5, 1.0, 1.0))
    canvas.block(0, 0, (9, 9), 9, (1, 0, 0), shade=0)
    canvas.block(0, 0, (2, 2), 2, (1, 1, 0), shade=0)
    drawn = rasterise(canvas.shapes()[None], (16, 16))[0]
    assert drawn[:, 0, 0].tolist() == [128, 0, 0] and drawn[:, 8, 8].tolist() == [128, 255, 0]


def test_pictures_of_different_numbers_of_shapes_stack_without_a_trace():
    scenes = [sample_scene(seed) for seed in range(6)]
    scenes = [replace(scene, size=SIZES[0]) for scene in scenes]
    from demo.figures import shapes

    alone = [rasterise(shapes(scene, 0)[None], SIZES[0])[0] for scene in scenes]
    together = rasterise(stack_shapes([shapes(scene, 0) for scene in scenes]), SIZES[0])
    assert torch.equal(torch.stack(alone), together)


def test_a_nested_place_keeps_scale_and_tilt():
    outer = Canvas(10, 20, scale=2.0)
    inner = outer.at(3, 4, scale=5.0, tilt=math.pi / 2)
    inner.ellipse(1, 0, (0.5, 0.5), WHITE)
    # one unit (10 pixels) along an x axis that now points up, from (10 + 6, 20 - 8)
    assert_close(outer.shapes()[0, :2], torch.tensor([16.0, 2.0]))


def test_a_seed_gives_one_scene_and_other_seeds_give_others():
    assert sample_scene(5) == sample_scene(5)
    assert torch.equal(clip(sample_scene(5)), clip(sample_scene(5)))
    assert len({sample_scene(seed).look for seed in range(300)}) > 270
    assert len({sample_scene(seed).caption for seed in range(300)}) > 250


def test_held_out_characters_look_like_no_training_character():
    training = {sample_scene(seed).look for seed in range(400)}
    held_out = {sample_scene(seed, held_out=True).look for seed in range(400)}
    assert not training & held_out and len(held_out) > 200
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, training))


@pytest.mark.parametrize("place", PLACES)
def test_every_place_fills_the_picture_in_every_size(place):
    for size in SIZES:
        assert not size[0] % STEP and not size[1] % STEP
        drawn = picture(replace(sample_scene(3), place=Place(place, 0.5, 3), size=size, light=(1.0, 1.0, 1.0)))
        assert tuple(drawn.shape) == (3, size[1], size[0])
        assert drawn.amax(0).min() > 20  # black shows through nowhere; eyes and shoes are lighter than that


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "stand"])
def test_every_action_starts_at_the_still_picture_and_changes_it(action):
    scene = sample_scene(11, action=action)
    frames = clip(scene)
    assert len(frames) == FRAMES
    assert (frames[0].int() - frames[4].int()).abs().amax() > 40
    still = replace(scene, action="stand")
    if not action.startswith(("walk", "hat")):  # walkers look where they go, a hat comes from nowhere
        assert torch.equal(frames[0], picture(still))


def test_new_clothes_leave_everybody_where_they_belong():
    for seed in range(40):
        for held_out in (False, True):
            scene = sample_scene(seed, held_out, action="clothes")
            names = {colour: name for name, colour in COLOURS.items()}
            look = [*scene.look.split("/")[:2], scene.change.top, names[scene.change.top_colour]]
            assert is_held_out("/".join(look)) == held_out and names[scene.change.top_colour] in scene.caption
            assert moment_at(scene, 0.0).scene.outfit == scene.outfit
            assert moment_at(scene, 1 / (FRAMES - 1)).scene.outfit == scene.change


def test_another_place_is_there_from_the_second_frame_on_and_in_the_caption():
    for seed in range(20):
        scene = sample_scene(seed, action="place")
        assert scene.change.name != scene.place.name and PLACES[scene.change.name] in scene.caption
        moved = moment_at(scene, 1 / (FRAMES - 1)).scene
        assert moved == replace(scene, place=scene.change) and moment_at(scene, 0.0).scene == scene


def test_only_those_who_ask_for_them_see_sudden_changes():
    assert not any(sample_scene(seed).action in CHANGES for seed in range(300))


def test_walking_right_moves_right_and_walking_left_moves_left():
    right, left = (sample_scene(4, action=f"walk {side}") for side in ("right", "left"))
    assert moment_at(right, 1.0).x > right.x and moment_at(left, 1.0).x < left.x


def test_a_school_photo_leaves_the_figure_and_the_floor():
    for seed in range(12):
        scene = sample_scene(seed)
        taken = on_photo(scene)
        assert replace(taken, backdrop=False) == scene
        before, after = picture(scene), picture(taken)
        changed = (before.int() - after.int()).abs().amax(0) > 8
        assert 0.3 < changed.float().mean() < 0.85
        floor = round(0.14 * len(changed))
        assert torch.equal(before[:, -floor:], after[:, -floor:])


def test_the_backdrop_is_the_same_in_every_place_and_light():
    scene = sample_scene(3)
    others = replace(scene, light=(0.5, 0.5, 0.6)), replace(scene, place=Place("forest", 0.5, 7))
    top, *others = (picture(on_photo(each))[:, 0] for each in (scene, *others))
    assert all(torch.equal(top, other) for other in others)


def test_no_caption_speaks_of_a_photo_and_all_its_words_are_known(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path / FILES["tokenizer"])
    for seed in range(300):
        scene = sample_scene(seed, action=(None, *CHANGES)[seed % 3])
        assert "photo" not in scene.caption and "school photo" in scene.edit_caption
        for text in (scene.caption, scene.edit_caption):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
            assert len(ids) < TEXT_LENGTH_IN_TRAINING


def test_all_words_of_the_grammar_are_known():
    tokenizer = build_tokenizer()
    phrases = [phrase for phrases in ACTIONS.values() for phrase in phrases]
    names = {"one": "they", "person": "girl", "colour": "red", "top": "striped shirt", "hat": "cap", "object": "book"}
    names |= {"clothes": "a red coat and blue shorts", "place": "on a beach"}
    for phrase in (*phrases, *PLACES.values()):
        assert 2 not in tokenizer.encode(phrase.format(**names)).ids, phrase
    assert tokenizer.encode("SHE Waves").ids == tokenizer.encode("she waves").ids
    assert 2 in tokenizer.encode("a helicopter").ids
