"""Denoising against the formulas of guidance: how many passes there are, and of what, changes nothing but rounding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dit_cases import CPU, SPEC, denoised, random_dit
from tests.helpers import rel_l2
from wan.frames.encoding import INDEPENDENT
from wan.frames.layout import OneFrameLayout
from wan.generation import sampling
from wan.generation.guidance import GuidanceConfig
from wan.generation.pipeline import Encoded, initial_noise
from wan.generation.request import Request
from wan.generation.sampling import SOLVERS
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text

STEPS, SCALE = 4, 3.0
UNCOND = {"slg_mode": "uncond", "slg_layers": "1", "slg_end": 0.5}
CASES = {
    "guided": {},
    "separate": {"separate_passes": True},
    "half of the steps": {"cfg_skip_mode": "early", "cfg_apply_ratio": 0.5},
    "uncond": UNCOND,
    "original": UNCOND | {"slg_mode": "original"},
    "original, separate": UNCOND | {"slg_mode": "original", "separate_passes": True},
}


def encoded(guidance: float = SCALE) -> Encoded:
    generator = torch.Generator().manual_seed(0)
    request = Request(
        prompt="a",
        negative_prompt="b",
        asked=(48, 32),
        width=48,
        height=32,
        steps=STEPS,
        shift=5.0,
        guidance=guidance,
        seed=1,
        layout=OneFrameLayout((0,), 1),
        controls=(Path("a"),),
        control_masks=(None,),
        clip_images=(Path("a"),),
    )

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    negative = None if guidance == 1 else draw(5, SPEC.text_dim)
    text, features, channels = draw(7, SPEC.text_dim), draw(1, 257, SPEC.image_dim), draw(20, 2, 4, 6)
    return Encoded(request, text, negative, Conditioning(channels, features, INDEPENDENT.given(channels)))


class Recorder:
    """A DiT that notes for each pass how many items it had and which blocks it skipped."""

    def __init__(self):
        self.dit, self.passes = random_dit(), []

    def __call__(self, latents, conditioning, timesteps, text, indices, skip_blocks=frozenset(), cache=None, **_):
        self.passes.append((len(latents), *sorted(skip_blocks)))
        return self.dit(latents, conditioning, timesteps, text, indices, skip_blocks, cache)


@torch.no_grad()
def written_out(item: Encoded, guidance: GuidanceConfig) -> torch.Tensor:
    """The same with one pass for each velocity, nothing kept between steps."""
    dit, request = random_dit(), item.request
    guided = guidance.guided_steps(STEPS)

    def velocity(x, timestep, step):
        def run(text, skipped=frozenset()):
            conditioning = Conditioning(item.conditioning.channels[None], item.conditioning.clip[None])
            inputs = x[None], conditioning, timestep[None], pad_text([text])
            return dit(*inputs, torch.tensor([[0, 1]]), skipped)[0]

        conditional = run(item.text)
        if not guided[step] or item.negative is None:
            return conditional
        negative = run(item.negative)
        if guidance.skips_layers(step, STEPS):
            skipped = run(item.negative, guidance.skipped_blocks)
            if guidance.slg_mode == "uncond":
                return skipped + SCALE * (conditional - skipped)
            return negative + SCALE * (conditional - negative) + guidance.slg_scale * (conditional - skipped)
        return negative + SCALE * (conditional - negative)

    noise = initial_noise((16, 2, 4, 6), request.seed, CPU, False)
    latents = sampling.sample("unipc", velocity, noise, sampling.schedule("unipc", STEPS, request.shift))
    return latents[:, 1:2]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_latents_are_those_of_the_formula(settings):
    guidance, item = GuidanceConfig(**settings), encoded()
    assert rel_l2(denoised(random_dit(), item, guidance=guidance), written_out(item, guidance)) < 1e-5


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        ("guided", [(2,)] * 4),
        ("separate", [(1,)] * 8),
        ("half of the steps", [(1,), (1,), (2,), (2,)]),
        ("uncond", [(1, 1), (1,)] * 2 + [(2,)] * 2),
        ("original", [(1, 1), (2,)] * 2 + [(2,)] * 2),
    ],
)
def test_both_passes_of_a_step_are_one_batch_unless_they_are_to_be_separate(case, passes):
    dit = Recorder()
    denoised(dit, encoded(), guidance=GuidanceConfig(**CASES[case]))
    assert dit.passes == passes


@pytest.mark.parametrize("solver", SOLVERS)
def test_pinned_control_frames_are_their_own_images_with_the_noise_of_each_step(solver):
    item = encoded(guidance=1.0)
    channels = item.conditioning.channels
    channels[:4], channels[:4, 0] = 0, 1
    channels[:4, 0, :2] = 0.5  # a mask: only partly given
    item = replace(item, conditioning=item.conditioning._replace(given=INDEPENDENT.given(channels)))
    seen, dit = [], random_dit()

    def note(latents, *rest, **cache):
        seen.append(latents[0])
        return dit(latents, *rest, **cache)

    free = denoised(dit, replace(item, request=replace(item.request, solver=solver)))
    pinned = denoised(note, replace(item, request=replace(item.request, solver=solver, pin_controls=True)))
    noise = initial_noise((16, 2, 4, 6), item.request.seed, CPU, False)
    control = channels[4:, 0]
    for latents, sigma in zip(seen, sampling.schedule(solver, STEPS, item.request.shift).sigmas, strict=False):
        exact = (1 - sigma) * control + sigma * noise[:, 0]
        assert rel_l2(latents[:, 0, 2:], exact[:, 2:]) < 1e-3  # UniPC starts at 0.9997, with noise alone
        if sigma < 0.99:
            assert rel_l2(latents[:, 0, :2], exact[:, :2]) > 1e-2
    assert len(seen) == STEPS and rel_l2(pinned, free) > 1e-4


def test_without_guidance_there_is_one_pass_per_step():
    dit = Recorder()
    denoised(dit, encoded(guidance=1.0))
    assert dit.passes == [(1,)] * STEPS
