"""The one home of the one-frame rules: exact answers, and round trips."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from dataset.cache import layout_of_cache
from utils.errors import ConfigError
from wan.frames.clip import Clip, Role, Slot
from wan.frames.condition import clip_controls, natural_indices, stack_condition
from wan.frames.encoding import INDEPENDENT
from wan.frames.layout import OneFrameLayout, layout_from_toml, parse

LAYOUTS = [
    OneFrameLayout((), 1),
    OneFrameLayout((0,), 1),
    OneFrameLayout((0,), 9),
    OneFrameLayout((5,), 0),
    OneFrameLayout((0, 2), 1),
    OneFrameLayout((2, 0), 1),
    OneFrameLayout((10, 0, 3000), 5),
]


def images(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 16, 1, 4, 6, generator=torch.Generator().manual_seed(count)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_printing_and_parsing_a_layout_is_the_identity(layout):
    assert parse(str(layout)) == layout


@pytest.mark.parametrize(
    "text",
    [
        "control_index=0;2,target_index=1",
        " target_index = 1 , control_index = 0 ; 2 ",
        "default,target_index=1,no_2x,control_index=0;2",
    ],
)
def test_blanks_order_and_framepack_words_do_not_matter(text):
    assert parse(text) == OneFrameLayout((0, 2), 1)


def test_what_is_left_out_is_as_in_the_reference():
    assert parse("control_index=3") == OneFrameLayout((3,), 0)
    assert parse("target_index=4") == OneFrameLayout((), 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("control_indices=0,target_index=1", ["control_indices", "did you mean 'control_index'"]),
        ("target_index=1,target_index=2", ["twice"]),
        ("control_index=0;0,target_index=1", ["0;0", "twice"]),
        ("control_index=1,target_index=1", ["target_index=1", "e.g. 2"]),
        ("control_index=0", ["target_index=0"]),
        ("target_index=-1", ["negative"]),
        ("control_index=0;x,target_index=1", ["control_index=x"]),
        ("control_index=0;,target_index=1", ["control_index="]),
        ("target_index=1.5", ["1.5"]),
        ("target_index", ["target_index"]),
        ("something", ["unknown key 'something'"]),
    ],
)
def test_a_wrong_string_is_refused_with_the_reason(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_toml_keys_default_for_one_control_only():
    assert layout_from_toml(None, None, 1) == OneFrameLayout((0,), 1)
    assert layout_from_toml([0, 2], 1, 2) == OneFrameLayout((0, 2), 1)
    for arguments in ((None, None, 2), ([0, 2], None, 2), ([], 1, 0), ([0], 1, 2), ([0, 2], 1, 1), ([0], 0, 1)):
        with pytest.raises(ConfigError, match=r"fp_1f|control"):
            layout_from_toml(*arguments)


def test_frames_lie_in_time_order_and_the_mask_marks_the_target():
    first, second = images(2)
    blank = torch.full((16, 1, 4, 6), 7.0)
    condition = stack_condition(OneFrameLayout((10, 0), 5).clip, [first, second], blank)
    assert_close(condition[4:], torch.cat([second, blank, first], dim=1), rtol=0, atol=0)
    assert condition[:4, :, 0, 0].tolist() == [[1, 0, 1]] * 4
    assert condition[:4].unique().tolist() == [0, 1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stacked_frames_lie_in_the_slots_of_their_sources_and_the_target_is_picked(layout):
    *controls, target = images(len(layout.control_indices) + 1)
    frames = layout.clip.stack([*controls, target])
    for number, slot in enumerate(layout.clip.slots):
        assert torch.equal(frames[:, number : number + 1], [*controls, target][slot.source])
        assert (slot.role is Role.GENERATED) == (slot.source == len(controls)) == (number == layout.clip.target_slot)
    assert torch.equal(INDEPENDENT.target(layout.clip, frames), target)


def test_swapping_images_together_with_their_indices_changes_nothing():
    for indices in itertools.permutations((0, 2, 7)):
        by_time = dict(zip((0, 2, 7), images(3), strict=True))
        controls = [by_time[index] for index in indices]
        stacked = stack_condition(OneFrameLayout(indices, 4).clip, controls, torch.zeros(16, 1, 4, 6))
        straight = stack_condition(OneFrameLayout((0, 2, 7), 4).clip, list(by_time.values()), torch.zeros(16, 1, 4, 6))
        assert torch.equal(stacked, straight)


def test_relayout_equals_stacking_anew():
    controls, blank = images(2), torch.zeros(16, 1, 4, 6)
    old, new = OneFrameLayout((0, 2), 1), OneFrameLayout((9, 3), 12)
    moved = stack_condition(old.clip, controls, blank)[:, new.slots_of(old)]
    assert torch.equal(moved, stack_condition(new.clip, controls, blank))


def test_the_layout_of_a_cache_without_one_is_read_from_mask_and_indices():
    condition = stack_condition(OneFrameLayout((0, 10), 5).clip, images(2), torch.zeros(16, 1, 4, 6))
    assert layout_of_cache((0, 5, 10), INDEPENDENT.given(condition)) == OneFrameLayout((0, 10), 5)
    for broken in (torch.ones_like(condition), torch.zeros_like(condition)):
        with pytest.raises(ConfigError, match="target frames"):
            layout_of_cache((0, 5, 10), INDEPENDENT.given(broken))


def test_clip_sees_the_earliest_and_the_latest_control():
    assert clip_controls(OneFrameLayout((4, 0, 9), 1).clip, 1) == [1]
    assert clip_controls(OneFrameLayout((4, 0, 9), 1).clip, 2) == [1, 2]
    assert clip_controls(OneFrameLayout((4,), 1).clip, 2) == [0, 0]


def test_natural_indices_count_the_frames():
    assert natural_indices(torch.tensor([[0, 9], [3, 200]])).tolist() == [[0, 1], [0, 1]]


def test_a_clip_has_one_slot_per_index_in_ascending_order_and_one_input_per_slot():
    clip = Clip.one_frame([4, 0], 2)
    assert clip.slots == (Slot(0, Role.GIVEN, 1), Slot(2, Role.GENERATED, 2), Slot(4, Role.GIVEN, 0))
    for slots in (clip.slots[::-1], (clip.slots[0], clip.slots[0])):
        with pytest.raises(ValueError, match="each slot needs its own"):
            Clip(slots)
    with pytest.raises(ValueError, match="2 inputs for 3 slots"):
        clip.stack(images(2))
