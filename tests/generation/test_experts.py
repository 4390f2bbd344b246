"""Several DiTs, each for its own noise levels, and one DiT that is loaded on demand at any LoRA multipliers."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.dit_cases import CPU, denoised, random_dit
from tests.generation.test_denoise import encoded
from utils.stopwatch import Stopwatch
from wan.generation import sampling
from wan.generation.experts import DiTFiles, Expert, Experts, LoadedModel, ModelOnDemand
from wan.generation.guidance import GuidanceConfig
from wan.generation.on_demand import AfterUse, OnDemand
from wan.generation.pipeline import Encoded, denoise, initial_noise
from wan.generation.sampling import SOLVERS
from wan.models.memory_options import MemoryConfig
from wan.models.plan import Plan
from wan.nets.context import pad_text
from wan.nets.dit import WanDiT

BOUNDARY, LOW_SCALE, HIGH_SCALE = 0.9, 3.0, 4.5


class Noting:
    """A DiT, the timesteps of its passes, and whether it is on the device."""

    def __init__(self, change: float = 0.0):
        self.dit, self.timesteps, self.used = random_dit(), [], []
        self.dit.head.head.bias.data += change

    def __call__(self, latents, conditioning, timesteps, *rest, **more):
        self.timesteps.append(float(timesteps[0]))
        return self.dit(latents, conditioning, timesteps, *rest, **more)

    def use(self, multipliers):
        self.used.append(multipliers)
        return self

    def release(self):
        self.used.append(None)


def two_experts(low_scale: float = LOW_SCALE) -> tuple[Noting, Noting, Experts]:
    low, high = Noting(), Noting(change=0.5)
    experts = Experts([Expert(low, low_scale, 0.0, (0.25,)), Expert(high, HIGH_SCALE, BOUNDARY, (0.75, 1.0))])
    return low, high, experts


def item(solver: str, steps: int) -> Encoded:
    return replace(encoded(), request=replace(encoded().request, solver=solver, steps=steps))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "high_steps"), [(4, 2), (8, 3), (10, 4), (20, 8), (40, 15)])  # of Wan2.2, shift 5
def test_each_step_asks_the_expert_for_its_noise_level(solver, steps, high_steps):
    schedule = sampling.schedule(solver, steps, 5.0)
    _, _, experts = two_experts()
    scales = [experts.at(float(timestep)).guidance for timestep in schedule.timesteps]
    assert scales == [HIGH_SCALE] * high_steps + [LOW_SCALE] * (steps - high_steps)


def test_the_level_at_which_an_expert_begins_is_its_own():
    _, _, experts = two_experts()
    assert experts.at(900.0).from_level == BOUNDARY and experts.at(899.9).from_level == 0 == experts.at(0.0).from_level


@pytest.mark.parametrize("levels", [(), (0.5,), (0.0, 0.0), (0.9, 0.5)])
def test_every_level_has_one_expert(levels):
    with pytest.raises(ValueError, match="all levels down to 0 need one"):
        Experts([Expert(Noting(), 1.0, level) for level in levels])


def velocity_of(dit: Noting, scale: float, item: Encoded):
    """Guided, by two passes that keep nothing from step to step."""

    def velocity(x, timestep, _step):
        def run(text):
            conditioning = item.conditioning.map(lambda tensor: tensor[None])
            return dit.dit(x[None], conditioning, timestep[None], pad_text([text]), torch.tensor([[0, 1]]))[0]

        return run(item.negative) + scale * (run(item.text) - run(item.negative))

    return velocity


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_latents_are_those_of_the_two_parts_written_out(solver):
    """One solver, whose history goes over the boundary, with the velocity of one expert and then of the other."""
    low, high, experts = two_experts()
    picture = item(solver, 4)
    found = denoise(experts, picture, CPU)
    assert len(high.timesteps) == len(low.timesteps) == 2
    assert min(high.timesteps) >= 900 > max(low.timesteps)
    parts = [velocity_of(high, HIGH_SCALE, picture)] * 2 + [velocity_of(low, LOW_SCALE, picture)] * 2
    noise = initial_noise((16, 2, 4, 6), picture.request.seed, CPU, False)
    schedule = sampling.schedule(solver, 4, picture.request.shift)
    whole = sampling.sample(solver, lambda x, timestep, step: parts[step](x, timestep, step), noise, schedule)
    assert_close(found, whole[:, 1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, denoised(low, picture), atol=1e-2)


@torch.no_grad()
def test_with_euler_the_second_part_is_a_run_of_its_own_from_where_the_first_ends():
    low, high, experts = two_experts()
    picture = item("vanilla", 4)
    schedule = sampling.schedule("vanilla", 4, picture.request.shift)
    x = initial_noise((16, 2, 4, 6), picture.request.seed, CPU, False)
    for dit, scale, part in ((high, HIGH_SCALE, slice(0, 2)), (low, LOW_SCALE, slice(2, 4))):
        half = sampling.Schedule(schedule.sigmas[part.start : part.stop + 1], schedule.timesteps[part])
        x = sampling.sample("vanilla", velocity_of(dit, scale, picture), x, half)
    assert_close(denoise(experts, picture, CPU), x[:, 1:2], rtol=1e-4, atol=1e-5)


def test_one_expert_leaves_the_device_before_the_other_is_used_with_its_own_multipliers():
    low, high, experts = two_experts()
    denoise(experts, item("vanilla", 4), CPU)
    assert high.used[-1] is None and set(high.used[:-1]) == {(0.75, 1.0), None} and None in low.used
    last, first = high.used.index(None), len(low.used) - low.used[::-1].index(None)
    assert set(high.used[:last]) == {(0.75, 1.0)} and set(low.used[first:]) == {(0.25,)}


@pytest.mark.parametrize("separate", [False, True])
def test_an_expert_without_guidance_has_one_pass_per_step(separate):
    low, high, experts = two_experts(low_scale=1.0)
    denoise(experts, item("unipc", 4), CPU, guidance=GuidanceConfig(separate_passes=separate))
    assert len(low.timesteps) == 2 and len(high.timesteps) == (4 if separate else 2)


def test_two_experts_of_one_model_make_what_it_makes_alone():
    dit = random_dit()
    same = Experts([Expert(LoadedModel(dit), 3.0, level) for level in (0.0, 0.95, 0.8)])
    assert torch.equal(denoise(same, item("unipc", 4), CPU), denoised(dit, item("unipc", 4)))


class Files(DiTFiles):
    """Notes what is loaded and merged."""

    def __init__(self):
        object.__setattr__(self, "calls", [])

    def load(self, multipliers, memory, device) -> WanDiT:
        self.calls.append(("load", multipliers))
        return random_dit()

    def merge_again_(self, dit, multipliers, device) -> None:
        self.calls.append(("merge", multipliers))
        if multipliers == (9.0,):
            raise torch.OutOfMemoryError


@pytest.mark.parametrize("after_use", AfterUse)
def test_a_model_is_loaded_once_and_merged_again_where_multipliers_differ(after_use):
    files = Files()
    model = ModelOnDemand(files, Plan.of(MemoryConfig()), CPU, Stopwatch(), after_use)
    dit = model.use((1.0,))
    assert model.use((1.0,)) is dit is model.use((2.0,))
    model.release()
    again = model.use((2.0,))
    assert (again is dit) == (after_use is AfterUse.KEEP)
    loads = [("load", (2.0,))] * (after_use is AfterUse.DROP)
    assert files.calls == [("load", (1.0,)), ("merge", (2.0,)), *loads]


def test_after_a_merge_that_failed_the_multipliers_are_merged_anew():
    files = Files()
    model = ModelOnDemand(files, Plan.of(MemoryConfig()), CPU, Stopwatch(), AfterUse.KEEP)
    model.use((1.0,))
    with pytest.raises(torch.OutOfMemoryError):
        model.use((9.0,))
    model.use((1.0,))
    assert files.calls == [("load", (1.0,)), ("merge", (9.0,)), ("merge", (1.0,))]
    model.forget()
    model.use((3.0,))
    assert files.calls[-1] == ("load", (3.0,))


def test_what_is_dropped_after_use_is_loaded_anew_and_timed():
    watch, loaded = Stopwatch(), []
    model = OnDemand("T5", lambda device: loaded.append(device) or torch.nn.Linear(1, 1), CPU, watch, AfterUse.DROP)
    for _ in range(2):
        with model.on_device() as first:
            assert model.use() is first
    assert loaded == [CPU, CPU] and not model.is_loaded and [*watch.seconds] == ["loading T5"]
