"""Frames of several sizes: each token keeps its place, padding counts nowhere, and without them nothing changes."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.dit_cases import CPU, arguments, random_dit, with_lora
from tests.fused.test_graphs import Rerun, flat, losses_and_gradients, training_inputs
from tests.helpers import rel_l2
from utils.errors import ConfigError
from utils.images import resize_to_fill
from wan.frames.condition import loss_weights, stack_condition
from wan.frames.encoding import INDEPENDENT
from wan.frames.layout import OneFrameLayout, parse
from wan.frames.sizes import AS_TARGET, ControlSizes, pad_to, padded, parse_resolution
from wan.fused import plain as fused_plain
from wan.fused.dit import fuse_
from wan.fused.graphs import GraphedGradients, graph_passes_
from wan.nets.context import Context, StepCache
from wan.nets.dit import timestep_features
from wan.nets.rope import rope_angles
from wan.nets.tokens import token_count
from wan.training.loss import flow_matching_loss

SIZES = ((4, 6), (2, 4))  # of the frames of `arguments`: rows and columns
LAYOUT = OneFrameLayout((3,), 0, control_sizes=ControlSizes((32, 16)))  # the target comes first


# Which size a control image gets


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),  # docs/formats.md#control-sizes
    [
        ((1000, 700), (1024, 1024), (1216, 848)),
        ((1920, 1080), (1024, 1024), (1360, 768)),
        ((333, 777), (512, 512), (336, 768)),
    ],
)
def test_a_control_image_gets_the_size_with_the_area_and_nearest_to_its_shape(size, resolution, expected):
    assert ControlSizes(resolution).fit(size, (64, 64)).bucket == expected


@pytest.mark.parametrize(
    ("sizes", "bucket", "crop_only"),
    [
        (AS_TARGET, (64, 48), False),
        (ControlSizes(None, True), (992, 688), True),
        (ControlSizes((1024, 1024), True), (992, 688), True),  # smaller than that
        (ControlSizes((512, 512), True), (608, 416), False),
    ],
)
def test_images_keep_their_size_unless_it_is_above_the_resolution(sizes, bucket, crop_only):
    fit = sizes.fit((1000, 700), (64, 48))
    assert (fit.bucket, fit.crop_only) == (bucket, crop_only)
    assert fit.scale == (1.0 if crop_only else max(bucket[0] / 1000, bucket[1] / 700))


def test_an_image_that_keeps_its_size_keeps_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    assert np.array_equal(resize_to_fill(image, (48, 32), crop_only=True), image[2:34, 1:49])
    assert not np.array_equal(resize_to_fill(image, (48, 32)), image[2:34, 1:49])


@pytest.mark.parametrize(("sizes", "size"), [(ControlSizes(None, True), (15, 99)), (ControlSizes((32, 32)), (900, 9))])
def test_sides_below_16_pixels_are_refused(sizes, size):
    with pytest.raises(
        ConfigError, match=rf"{size[0]}x{size[1]} pixels leave a side below 16 with (no_resize|control_res)"
    ):
        sizes.fit(size, (64, 64))


@pytest.mark.parametrize(
    "sizes", [AS_TARGET, ControlSizes((512, 768)), ControlSizes(None, True), ControlSizes((16, 16), True)]
)
def test_indices_with_sizes_are_printed_as_they_are_read(sizes):
    layout = OneFrameLayout((0, 4), 2, control_sizes=sizes)
    assert parse(str(layout)) == layout
    assert parse("control_index=0;4,target_index=2", None, sizes) == layout


def test_what_the_text_says_goes_over_the_default():
    default = ControlSizes((512, 512), True)
    assert parse("control_resolution=64", None, default).control_sizes == ControlSizes((64, 64), True)
    assert parse("no_resize_control=true", None, ControlSizes((16, 16))).control_sizes == ControlSizes((16, 16), True)


@pytest.mark.parametrize("text", ["8", "512 x 512", "512x", "a", "-64", "1x1x1", "123456", "512x8"])
def test_other_texts_are_no_resolution(text):
    with pytest.raises(ConfigError, match=rf"control_resolution={text} is not a size"):
        parse_resolution(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("control_index=0,target_index=1,layout=causal,control_resolution=64", "control_resolution=64x64: the causal"),
        ("control_index=0,target_index=1,layout=causal,no_resize_control=true", "no_resize_control=true: the causal"),
        ("control_index=0,target_index=1,no_resize_control=false", "no_resize_control=false is unknown; write true"),
        ("control_index=0,target_index=1,control_resolutoin=64", "did you mean 'control_resolution'"),
    ],
)
def test_wrong_texts_are_one_line(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


# Tensors


def test_frames_sit_in_the_corner_of_their_slots_and_the_target_is_taken_out_again():
    control, target = torch.randn(16, 1, 2, 4), torch.randn(16, 1, 4, 2)
    frames = LAYOUT.clip.stack([control, target])
    assert LAYOUT.clip.frame_sizes([(32, 16), (16, 32)]) == ((4, 2), (2, 4)) and frames.shape == (16, 2, 4, 4)
    assert torch.equal(frames[:, 1:, :2], control) and not frames[:, 1, 2:].any() and not frames[:, 0, :, 2:].any()
    assert torch.equal(INDEPENDENT.target(LAYOUT.clip, frames, ((4, 2), (2, 4))), target)


def test_frames_of_one_size_have_no_sizes():
    assert LAYOUT.clip.frame_sizes([(32, 16), (32, 16)]) is None
    frames = [torch.randn(16, 1, 4, 6) for _ in range(2)]
    assert all(one is other for one, other in zip(padded(frames), frames, strict=True))


def test_the_condition_gives_nothing_in_the_padding_and_masks_are_those_of_the_own_size():
    control, blank, mask = torch.randn(16, 1, 2, 4), torch.randn(16, 1, 4, 6), torch.rand(2, 4)
    condition = stack_condition(LAYOUT.clip, [control], blank, [mask])
    assert torch.equal(condition[:4, 1, :2, :4], mask.expand(4, 2, 4)) and not condition[:4, 0].any()
    assert torch.equal(condition[4:, 1, :2, :4], control[:, 0] * mask) and torch.equal(condition[4:, 0], blank[:, 0])
    assert not condition[:, 1, 2:].any() and not condition[:, 1, :, 4:].any()


def test_targets_are_drawn_between_the_same_controls_so_that_slots_keep_their_sizes():
    layout = OneFrameLayout((0, 4), 2, control_sizes=ControlSizes((32, 16)))
    drawn = {layout.with_random_target(range(0, 9), torch.Generator().manual_seed(i)).target_index for i in range(40)}
    assert drawn == {1, 2, 3}


# The network


@torch.no_grad()
def by_tokens(model, sizes, latents, conditioning, timesteps, text, frame_indices):
    """The velocity by a list of tokens, each with its own time, row and column."""
    channels, image = conditioning.channels, conditioning.clip.flatten(1, 2)
    x = torch.cat([latents, channels], dim=1)
    places = [
        (frame, row, column)
        for frame, (rows, columns) in enumerate(sizes)
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
    ]
    patches = [x[:, :, frame : frame + 1, row : row + 2, column : column + 2] for frame, row, column in places]
    tokens = torch.stack([model.patch_embedding(patch).flatten(1) for patch in patches], dim=1)
    positions = torch.tensor(
        [[[int(times[frame]), row // 2, column // 2] for frame, row, column in places] for times in frame_indices]
    )
    angles = rope_angles(positions)
    time = model.time_embedding(timestep_features(timesteps, model.spec.freq_dim))
    modulation = model.time_projection(time).unflatten(1, (6, -1))
    seen = torch.cat([model.img_emb(image, model.dtype), model.text_embedding(text)], dim=1)
    for block in model.blocks:
        context = Context(seen, text.shape[1])
        tokens = block(tokens, modulation, context, angles.cos().float(), angles.sin().float())
    velocity = torch.zeros_like(latents)
    for (frame, row, column), values in zip(places, model.head(tokens, time).unbind(1), strict=True):
        patch = values.unflatten(1, (2, 2, 16)).permute(0, 3, 1, 2)
        velocity[:, :, frame, row : row + 2, column : column + 2] = patch
    return velocity


@pytest.mark.parametrize("sizes", [SIZES, ((2, 6), (4, 2)), ((2, 2), (4, 6))])
@pytest.mark.parametrize("fused", [False, True])
def test_the_velocity_is_that_of_the_frames_tokens_alone(sizes, fused):
    plain, model, inputs = random_dit(), random_dit(), arguments(batch=2)
    if fused:
        fuse_(model, CPU, operations=fused_plain)
    with torch.inference_mode():
        found = model(*inputs, frame_sizes=sizes)
    assert rel_l2(found, by_tokens(plain, sizes, *inputs)) < 1e-5


def test_what_lies_in_the_padding_changes_no_bit_and_has_no_velocity():
    model, (latents, conditioning, *rest) = random_dit(), arguments()
    expected = model(latents, conditioning, *rest, frame_sizes=SIZES)
    for tensor in (latents, conditioning.channels):
        tensor[:, :, 1, 2:] = 1e30
        tensor[:, :, 1, :, 4:] = float("nan")
    found = model(latents, conditioning, *rest, frame_sizes=SIZES)
    assert torch.equal(found, expected) and not found[:, :, 1, 2:].any() and not found[:, :, 1, :, 4:].any()
    assert found[:, :, 1, :2, :4].all()


def test_full_sizes_are_the_same_bits_as_none():
    model, inputs = random_dit(), arguments(batch=2)
    assert torch.equal(model(*inputs, frame_sizes=((4, 6), (4, 6))), model(*inputs))


def test_a_smaller_frame_is_another_input_than_one_cut_by_a_mask():
    assert rel_l2(random_dit()(*arguments(), frame_sizes=SIZES)[:, :, 0], random_dit()(*arguments())[:, :, 0]) > 1e-4


@pytest.mark.parametrize("sizes", [((4, 6),), ((4, 6), (6, 6)), ((4, 6), (2, 3)), ((4, 6), (0, 2)), ((4, 6), (4, 8))])
def test_the_network_refuses_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match=r"frame sizes .* two even sides"):
        random_dit()(*arguments(), frame_sizes=sizes)


def test_the_number_of_tokens_is_that_of_the_frames():
    assert token_count((2, 4, 6), None) == 12 and token_count((2, 4, 6), SIZES) == 6 + 2


def test_steps_of_other_sizes_are_recorded_apart():
    plain, model, record = random_dit(), random_dit(), Rerun()
    graph_passes_(model, record)
    caches = {sizes: StepCache() for sizes in (None, SIZES)}
    with torch.no_grad():
        for sizes in (None, SIZES, SIZES, None, SIZES):
            found = model(*arguments(), cache=caches[sizes], frame_sizes=sizes)
            assert torch.equal(found, plain(*arguments(), frame_sizes=sizes))
    assert record.recorded == 2


def test_gradients_of_other_sizes_are_recorded_apart():
    model, record = random_dit(), Rerun()
    network = with_lora(model)
    parameters, loss = list(network.parameters()), partial(flow_matching_loss, model)
    gradients, factor = GraphedGradients(loss, parameters, record), torch.tensor(1.0)
    weights = torch.stack([pad_to(torch.ones(size), 4, 6) for size in SIZES])[None]
    for sizes in (None, SIZES, None, SIZES, SIZES):
        inputs = training_inputs(CPU) | {"frame_sizes": sizes, "weights": None if sizes is None else weights}
        expected_losses, expected = losses_and_gradients(loss, parameters, inputs, factor)
        losses, found = gradients(inputs, factor)
        assert torch.equal(losses, expected_losses) and torch.equal(flat(found), expected)
    assert record.recorded == 2


@pytest.mark.parametrize("target_only", [False, True])
@pytest.mark.parametrize("sizes", [((4, 6), (2, 4)), ((2, 4), (4, 6))])
def test_the_loss_is_the_mean_over_the_places_of_the_frames(sizes, target_only):
    """Slot 0 is the target, as in LAYOUT."""
    target, control = (torch.randn(16, 1, *size) for size in sizes)
    condition = stack_condition(LAYOUT.clip, [control], torch.zeros_like(target))[None]
    latents, noise, velocity = LAYOUT.clip.stack([control, target])[None], *torch.randn(2, 1, 16, 2, 4, 6)
    masks = pad_to(torch.ones(sizes[0]), 4, 6)[None]
    weights = loss_weights([LAYOUT.clip], INDEPENDENT.given(condition), masks, target_only)
    inputs = {"conditioning": None, "text": None, "frame_indices": None, "t": torch.full((1,), 0.5)}
    loss = flow_matching_loss(
        lambda *_, **__: velocity, latents=latents, noise=noise, weights=weights, frame_sizes=sizes, **inputs
    )
    errors = (velocity - (noise - latents)).square()[0]
    places = [errors[:, slot, :rows, :columns] for slot, (rows, columns) in enumerate(sizes)][: 1 if target_only else 2]
    assert_close(loss[0], sum(map(torch.sum, places)) / sum(place.numel() for place in places))
