"""Reasoning frames: where they sit, what the network is told of them, and that nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.dit_cases import CPU, SPEC, denoised, random_dit
from tests.project import MODELS, generate, pipeline
from utils.errors import ConfigError
from utils.images import open_image
from wan.files.load import load_vae
from wan.frames.clip import Clip, Role
from wan.frames.condition import causal_condition_video
from wan.frames.encode import encode_video, frame_pixels
from wan.frames.encoding import INDEPENDENT
from wan.frames.layout import OneFrameLayout, parse
from wan.generation.guidance import GuidanceConfig
from wan.generation.pipeline import Encoded, initial_noise
from wan.generation.prompt_lines import GENERATION, parse_line
from wan.generation.request import Request, SamplingConfig
from wan.generation.sampling import SOLVERS, sample, schedule
from wan.models.tasks import TASKS
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text

pytestmark = pytest.mark.usefixtures("workspace")
LINE = "a cat --ci data/start/cat.png --of control_index=0,target_index=7{} --w 48 --h 32 --d 7 --l 2"


def encoded(count: int, steps: int, layout: str = "control_index=0,target_index=7", solver: str = "unipc") -> Encoded:
    """A request with made-up tensors; the condition of every frame to generate is the same."""
    layout = parse(layout)
    request = Request(
        **{"prompt": "a", "negative_prompt": "b", "asked": (48, 32), "width": 48, "height": 32, "steps": 5},
        **{"shift": 5.0, "guidance": 3.0, "seed": 1, "layout": layout, "solver": solver},
        **{"controls": (Path("a"),), "control_masks": (None,), "clip_images": (Path("a"),)},
        **{"reasoning_frames": count, "reasoning_steps": steps},
    )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    texts, features = (draw(7, SPEC.text_dim), draw(5, SPEC.text_dim)), draw(1, 257, SPEC.image_dim)
    condition = draw(20, len(layout.clip.order), 4, 6)
    added = condition[:, [layout.clip.target_slot] * count]
    channels = request.clip.interleave(condition, added)
    return Encoded(request, *texts, Conditioning(channels, features, INDEPENDENT.given(channels)))


def added_indices(clip: Clip) -> tuple[int, ...]:
    """Time indices of the frames that are dropped, ascending."""
    return tuple(slot.time_index for slot in clip.slots if slot.role is Role.SCRATCH)


class Alone:
    """A stand-in for the network that sees of each frame nothing but itself, its condition and its index."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], Tensor]] = []

    def __call__(self, latents, conditioning, timesteps, text, indices, skip_blocks=frozenset(), cache=None, **_):
        condition = conditioning.channels
        self.calls.append((tuple(indices[0].tolist()), condition[0]))
        own = torch.sin(latents) + 0.1 * condition[:, 4:] + 0.01 * indices[:, None, :, None, None]
        return own + (text.mean(dim=(1, 2)) + timesteps / 1000)[:, None, None, None, None]


@pytest.mark.parametrize(
    ("layout", "count", "indices"),
    [
        ("control_index=0,target_index=7", 6, (1, 2, 3, 4, 5, 6)),
        ("control_index=0,target_index=7", 3, (1, 3, 5)),
        ("control_index=0,target_index=7", 1, (3,)),
        ("control_index=0,target_index=7", 0, ()),
        ("control_index=0;2;12,target_index=6", 2, (3, 4)),
        ("control_index=9,target_index=3", 2, (5, 7)),
        ("target_index=3", 0, ()),
    ],
)
def test_frames_are_spread_between_the_target_and_the_control_next_to_it(layout, count, indices):
    own = parse(layout).clip
    clip = own.with_scratch(count)
    assert added_indices(clip) == indices
    assert clip.time_indices == tuple(sorted({*own.time_indices, *indices}))
    assert tuple(clip.slots[number] for number in clip.kept) == own.slots
    assert [clip.time_indices[slot] for slot in clip.numbers(Role.SCRATCH)] == list(indices)


@pytest.mark.parametrize("count", range(1, 7))
def test_every_number_of_frames_that_has_room_gets_indices_of_its_own(count):
    for target in range(count + 1, 12):
        for layout in (OneFrameLayout((0,), target), OneFrameLayout((target,), 0)):
            inside = added_indices(layout.clip.with_scratch(count))
            assert len(set(inside)) == count and 0 < min(inside) <= max(inside) < target


def test_without_room_or_controls_there_is_one_line():
    with pytest.raises(ConfigError, match="3 free time indices; give at most as many, or an index further away"):
        parse("control_index=0,target_index=4").clip.with_scratch(4)
    with pytest.raises(ConfigError, match="need a control image"):
        parse("target_index=4").clip.with_scratch(1)
    with pytest.raises(ConfigError, match="--reasoning_frames -1: must be at least 0"):
        SamplingConfig(reasoning_frames=-1)
    with pytest.raises(ConfigError, match="--reasoning_steps 0: must be at least 1"):
        SamplingConfig(reasoning_steps=0)
    prompt = parse_line(LINE.format("").replace("target_index=7", "target_index=1"), "line 1", GENERATION)
    with pytest.raises(ConfigError, match=r"line 1: --reasoning_frames 2: .* 0 free time indices"):
        Request.resolve(prompt, TASKS["i2v-14B"], SamplingConfig(reasoning_frames=2))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("layout", ["control_index=0,target_index=7", "control_index=9,target_index=2"])
def test_a_network_that_ignores_other_frames_makes_what_it_makes_without_them(solver, layout):
    plain = denoised(Alone(), encoded(0, 0, layout, solver))
    for count, steps in ((1, 1), (3, 2), (6, 5), (2, 9)):
        assert torch.equal(denoised(Alone(), encoded(count, steps, layout, solver)), plain)


def test_a_network_that_sees_other_frames_makes_something_else():
    dit = random_dit()
    results = [denoised(dit, encoded(count, steps)) for count, steps in ((0, 0), (2, 1), (2, 2), (3, 2))]
    for i, result in enumerate(results):
        assert all(not torch.equal(result, other) for other in results[:i])


def test_they_take_part_in_the_first_steps_only():
    network = Alone()
    denoised(network, encoded(2, 3), guidance=GuidanceConfig(separate_passes=True))
    assert [indices for indices, _ in network.calls] == [(0, 2, 4, 7)] * 6 + [(0, 7)] * 4
    first, last = network.calls[0][1], network.calls[-1][1]
    assert torch.equal(first[:, [0, 3]], last) and torch.equal(first[:, 1], first[:, 3])


def written_out(item: Encoded, steps: int) -> Tensor:
    """Euler with the frames cut off by hand; one text."""
    x = initial_noise((16, 2, 4, 6), 1, CPU, False, 2)[:, [0, 2, 3, 1]]
    levels, dit, condition, indices = (
        schedule("vanilla", 5, 5.0),
        random_dit(),
        item.conditioning.channels,
        [0, 2, 4, 7],
    )
    for step in range(5):
        if step == steps:
            x, condition, indices = x[:, [0, 3]], condition[:, [0, 3]], [0, 7]
        inputs = x[None], Conditioning(condition[None], item.conditioning.clip[None]), levels.timesteps[step, None]
        velocity = dit(*inputs, pad_text([item.text]), torch.tensor([indices]))[0]
        x = x + (levels.sigmas[step + 1] - levels.sigmas[step]) * velocity
    return x[:, 1:]


@torch.no_grad()
def test_the_result_is_that_of_euler_with_the_frames_cut_off_in_between():
    item = encoded(2, 3, solver="vanilla")
    item = replace(item, negative=None, request=replace(item.request, guidance=1.0))
    assert_close(denoised(random_dit(), item), written_out(item, 3), rtol=1e-4, atol=1e-5)


def test_the_noise_of_the_target_does_not_depend_on_them():
    plain = initial_noise((16, 2, 4, 6), 3, CPU, True)
    for count in (1, 6):
        noise = initial_noise((16, 2, 4, 6), 3, CPU, True, count)
        assert noise.shape == (16, 2 + count, 4, 6) and torch.equal(noise[:, :2], plain)
        assert abs(float(noise[:, 2:].std()) - 1) < 0.2


def resolved(layout: str = "", steps: int = 4, **settings: object) -> Request:
    prompt = parse_line(f"{LINE.format(layout)} --s {steps}", "line", GENERATION)
    return Request.resolve(prompt, TASKS["i2v-14B"], SamplingConfig(**settings))


def test_independent_frames_are_told_what_the_target_is_told():
    condition = pipeline().encode([resolved(reasoning_frames=3)])[0].conditioning.channels
    plain = pipeline().encode([resolved()])[0].conditioning.channels
    assert torch.equal(condition[:, [0, 4]], plain)
    assert all(torch.equal(condition[:, slot], plain[:, 1]) for slot in (1, 2, 3))


def test_causal_frames_are_grey_ones_of_one_video():
    request = resolved(",layout=causal", reasoning_frames=3)
    condition = pipeline().encode([request])[0].conditioning.channels
    start = frame_pixels(open_image("data/start/cat.png", "test"), (request.width, request.height))
    video = torch.zeros(3, 1 + 4 * 4, *start.shape[1:])
    video[:, 0] = start
    vae = load_vae(MODELS["vae"], torch.float32, CPU)
    assert torch.equal(condition[4:], encode_video(vae, video))
    assert (condition[:4, 0] == 1).all() and not condition[:4, 1:].any()
    plain = pipeline().encode([resolved(",layout=causal")])[0].conditioning.channels
    assert torch.equal(condition[:, :2], plain)  # what comes later in a video changes nothing before


def test_causal_frames_stand_before_a_target_between_controls():
    layout = parse("control_index=0;9,target_index=5,layout=causal")
    first, last = (torch.full((3, 1, 1), level) for level in (1.0, 9.0))
    clip = layout.clip.with_scratch(2)
    assert clip.numbers(Role.SCRATCH) == [1, 2] and clip.target_slot == 3
    video = causal_condition_video(clip, [first, last])
    assert video[0, :, 0, 0].tolist() == [1.0, *[0.0] * (8 + 4 + 3), 9.0]
    plain = causal_condition_video(layout.clip, [first, last])
    assert torch.equal(video[:, [0, *range(9, 17)]], plain) and not video[:, 1:9].any()


def test_one_condition_does_not_stand_in_for_another():
    line = pipeline()
    counts = [0, 2, 3, 2]
    items = line.encode([resolved(reasoning_frames=count) for count in counts])
    assert [item.conditioning.channels.shape[1] for item in items] == [2 + count for count in counts]


def test_steps_default_to_a_fifth_and_the_recipe_names_them():
    request = resolved(reasoning_frames=2)
    assert request.reasoning_steps == 1 and request.options["reasoning_steps"] == 1
    assert resolved(steps=20, reasoning_frames=2).reasoning_steps == 4
    assert resolved(reasoning_frames=2, reasoning_steps=3).reasoning_steps == 3
    assert "reasoning_frames" not in resolved().options


@pytest.mark.parametrize("layout", ["", ",layout=causal"])
def test_the_script_makes_and_repeats_such_a_picture(layout):
    flags = ["--control_image_path", "data/start/cat.png", "--prompt", "a", "--seed", "3", "--infer_steps", "5"]
    flags += ["--one_frame_inference", f"control_index=0,target_index=7{layout}", "--video_size", "32", "48"]
    (plain,) = generate("i2v", "plain", *flags)
    (path,) = generate("i2v", "reasoned", *flags, "--reasoning_frames", "2")
    (again,) = generate("i2v", "again", "--recipe", str(path))
    assert path.read_bytes() == again.read_bytes() and path.read_bytes() != plain.read_bytes()


def test_solvers_leave_alone_what_has_no_velocity():
    """Each number is stepped on its own, which `denoise` relies on."""
    torch.manual_seed(0)
    noise, target = torch.randn(2, 3, 4), torch.randn(2, 4)
    for solver in SOLVERS:
        levels = schedule(solver, 6, 5.0)

        def velocity(x: Tensor, _time: Tensor, step: int) -> Tensor:
            return torch.stack([torch.sin(x[:, 0]) - target, x[:, 1] * step, torch.zeros_like(x[:, 2])], dim=1)

        alone = sample(solver, lambda x, _time, _step: torch.sin(x) - target, noise[:, 0], levels)
        assert torch.equal(sample(solver, velocity, noise, levels)[:, 0], alone)
