"""`--memory auto`: the choice for each amount of memory, and going on after it has run out."""

import logging
import math
import shutil
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import wan.generation.run
import wan.generation.start
import wan.training.run
from dataset.loader import BucketCount
from tests.generation.test_preview import FLAGS
from tests.project import MODELS, from_lines, generate, train
from utils.errors import ConfigError
from wan.lora.options import NetworkConfig
from wan.memory import host
from wan.models.checkpoints import T5Checkpoint
from wan.models.estimate import frozen_bytes, generation_parts, largest_batch, meta_dit, training_parts
from wan.models.memory_options import GenerationMemoryConfig, TrainingMemoryConfig
from wan.models.plan import UNLIMITED, Choice, Plan, Room, chosen_plan, plan_generation, plan_t5, plan_training
from wan.nets.spec import DiTSpec
from wan.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("workspace")
GB = 1e9
DIT_14B = types.SimpleNamespace(
    spec=DiTSpec("i2v", 5120, 13824, 40, 36, 4096, 1280), stored_dtype=torch.bfloat16, dtype=torch.bfloat16
)
LARGE = BucketCount(0, 2, 128, 128, 1, 1)  # 1024 x 1024 with one control image
SMALL = BucketCount(0, 2, 72, 48, 1, 1)  # 576 x 384


def training_plan(device_gb, host_gb=64.0, bucket=LARGE, dit=DIT_14B):
    network, room = NetworkConfig(network_dim=32), Room(device_gb * GB, host_gb * GB)
    return plan_training(dit, torch.bfloat16, TrainingMemoryConfig(memory="auto"), network, None, [bucket], room)


def generation_plan(device_gb, host_gb=64.0, dit=DIT_14B):
    room = Room(device_gb * GB, host_gb * GB)
    return plan_generation(dit, torch.bfloat16, GenerationMemoryConfig(memory="auto"), 2 * 8192, room)


def chosen(plan):
    """The options that differ from their defaults."""
    memory = plan.memory
    assert memory.memory == "manual"
    values = {name: getattr(memory, name) for name in memory.chosen_by_plan}
    return {name: value for name, value in values.items() if value != getattr(type(memory), name)}


@pytest.mark.parametrize(
    ("options", "measured"),  # GiB, docs/performance.md: the peak of a step at 1024 x 1024 with a LoRA of rank 32
    [
        ({}, 40.3),
        ({"gradient_checkpointing_cpu_offload": True}, 34.8),
        ({"fp8_base": True, "fp8_scaled": True}, 25.6),
        ({"blocks_to_swap": 20}, 26.7),
        ({"blocks_to_swap": 36, "gradient_checkpointing_cpu_offload": True}, 9.2),
    ],
)
def test_a_step_is_expected_to_need_what_was_measured_and_up_to_two_gib_more(options, measured):
    memory = TrainingMemoryConfig(gradient_checkpointing="all", **options)
    dit, lora = meta_dit(DIT_14B, torch.bfloat16, memory, NetworkConfig(network_dim=32))
    parts = training_parts(frozen_bytes(dit), lora, DIT_14B.spec, largest_batch([LARGE]), memory)
    assert measured < sum(parts.values()) / 2**30 < measured + 2


def test_generation_is_expected_to_need_what_was_measured_within_half_a_gb():
    dit, _ = meta_dit(DIT_14B, torch.bfloat16, GenerationMemoryConfig(fp8_scaled=True))
    parts = generation_parts(frozen_bytes(dit), DIT_14B.spec, 2 * 8192)
    assert 21.1 - 0.5 < sum(parts.values()) / GB < 21.1 + 0.5  # what PyTorch had reserved on an H100


def test_a_large_gpu_saves_nothing_that_it_need_not():
    assert chosen(training_plan(75, bucket=SMALL)) == {}
    assert chosen(training_plan(75)) == {"gradient_checkpointing": "auto"}
    assert chosen(generation_plan(75)) == {}


def test_training_swaps_before_it_rounds_and_no_more_than_it_must():
    found = [chosen(training_plan(size)) for size in (40, 30, 22, 15)]
    assert all("fp8_base" not in one and one["gradient_checkpointing"] == "all" for one in found)
    swapped = [one["blocks_to_swap"] for one in found]
    assert (
        swapped == sorted(swapped) and swapped[0] < 14 and all(one["use_pinned_memory_for_block_swap"] for one in found)
    )
    fewer = replace(training_plan(22).memory, blocks_to_swap=found[2]["blocks_to_swap"] - 1)
    assert fewer not in [choice.memory for choice in training_plan(22)._fits]


def test_without_host_memory_training_rounds():
    assert chosen(training_plan(30, host_gb=1)) == {
        "fp8_base": True, "fp8_scaled": True, "gradient_checkpointing": "auto"
    }  # fmt: skip
    little = chosen(training_plan(22, host_gb=8))
    assert little["fp8_scaled"] and little["blocks_to_swap"] * 0.35 < 8


def test_generation_rounds_before_it_swaps():
    assert chosen(generation_plan(22)) == {"fp8_scaled": True}
    found = chosen(generation_plan(11))
    assert found["fp8_scaled"] and 10 < found["blocks_to_swap"] < 40


def test_a_file_in_fp8_is_left_as_it_is():
    dit = types.SimpleNamespace(**vars(DIT_14B) | {"stored_dtype": torch.float8_e4m3fn})
    assert "fp8_scaled" not in chosen(training_plan(22, dit=dit)) | chosen(generation_plan(22, dit=dit))


@pytest.mark.parametrize("plan", [training_plan, generation_plan])
def test_every_step_down_needs_less_until_there_is_none(plan):
    made, sizes = plan(60), []
    while True:
        sizes.append(made._fits[0].size)
        if not made.step_down():
            break
    assert len(sizes) > 3 and all(one * 0.9 >= other for one, other in pairwise(sizes))


def test_when_nothing_fits_the_smallest_is_tried(caplog):
    plan = training_plan(3)
    assert plan.memory.blocks_to_swap == 39 and plan.memory.fp8_scaled and "may not be enough" in caplog.text
    assert not plan.step_down()


def test_the_plan_says_what_it_chose_and_what_that_needs():
    text = str(training_plan(22))
    assert "--blocks_to_swap " in text and "--use_pinned_memory_for_block_swap" in text and "in host memory" in text
    assert "--gradient_checkpointing all" in text and "frozen weights" in text and "False" not in text
    assert str(generation_plan(75)).startswith("nothing to save; about 3")


SMALL_ROOM = Room(24 * GB, 64 * GB)


@pytest.mark.parametrize(
    ("memory", "room"),
    [
        (GenerationMemoryConfig(blocks_to_swap=2), SMALL_ROOM),
        (TrainingMemoryConfig(gradient_checkpointing="all"), SMALL_ROOM),
        (TrainingMemoryConfig(memory="manual"), SMALL_ROOM),
        (TrainingMemoryConfig(), UNLIMITED),
    ],
)
def test_what_somebody_else_has_chosen_or_has_room_enough_has_no_next_choice(memory, room):
    plan = chosen_plan(memory, room, lambda room: pytest.fail("nothing is to be chosen"))
    assert plan.memory is memory and not plan.step_down()


@pytest.mark.parametrize(
    ("memory", "room"), [(None, SMALL_ROOM), ("auto", SMALL_ROOM), ("auto", UNLIMITED)], ids=["default", "auto", "cpu"]
)
def test_without_options_of_ones_own_they_are_chosen(memory, room):
    expected = plan_of(TrainingMemoryConfig(gradient_checkpointing="all"))
    asked = []
    assert (
        chosen_plan(TrainingMemoryConfig(memory=memory), room, lambda room: asked.append(room) or expected) is expected
    )
    assert asked == [room]


@pytest.mark.parametrize(
    ("kind", "options", "flag"),
    [
        (TrainingMemoryConfig, {"fp8_base": True}, "fp8_base"),
        (TrainingMemoryConfig, {"gradient_checkpointing": "all"}, "gradient_checkpointing"),
        (GenerationMemoryConfig, {"blocks_to_swap": 3}, "blocks_to_swap"),
        (GenerationMemoryConfig, {"fp8_fast": True}, "fp8_fast"),
    ],
)
def test_what_the_plan_chooses_nobody_else_does(kind, options, flag):
    with pytest.raises(ConfigError, match=f"^--{flag}: --memory auto chooses it"):
        kind(memory="auto", **options)


def test_a_device_without_memory_of_its_own_has_room():
    assert Room.on(torch.device("cpu")) == Room(math.inf, math.inf)


# Going on after memory has run out


RECOMPUTED, SWAPPED = {"gradient_checkpointing": "all"}, {"gradient_checkpointing": "all", "blocks_to_swap": 1}
SWAPPED_IN_GENERATION = GenerationMemoryConfig(blocks_to_swap=1)


def plan_of(*memories):
    return Plan([Choice(memory, {"all": 1 / 2**n}) for n, memory in enumerate(memories)], Room(1, 1))


@pytest.fixture
def three_choices(monkeypatch):
    """For training, none of which changes a result."""
    memories = [TrainingMemoryConfig(**options) for options in ({}, RECOMPUTED, SWAPPED)]
    monkeypatch.setattr(wan.training.run, "plan_training", lambda *_: plan_of(*memories))


@pytest.mark.parametrize("failing", [{1}, {3}, {2, 4}])
def test_training_goes_on_from_the_last_step_and_ends_in_the_same_lora(monkeypatch, three_choices, caplog, failing):
    expected = train("i2v", "pairs.toml", "enough", "--no_metadata", "--max_train_steps", "5")
    original, steps = TrainingStep.run, []

    def run(self, batches, items, epoch, step, stop):
        steps.append(step)
        if step in failing and steps.count(step) == 1:
            raise torch.OutOfMemoryError("not enough")
        return original(self, batches, items, epoch, step, stop)

    monkeypatch.setattr(TrainingStep, "run", run)
    caplog.set_level(logging.INFO)
    made = train("i2v", "pairs.toml", "scarce", "--no_metadata", "--max_train_steps", "5", "--memory", "auto")
    assert_close(load_file(made), load_file(expected), rtol=0, atol=0)
    assert steps == sorted([*range(1, 6), *failing])
    assert caplog.text.count("it was not enough; continuing with") == len(failing)


def test_training_without_a_plan_ends_when_memory_does(monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(TrainingStep, "run", run)
    with pytest.raises(torch.OutOfMemoryError):
        train("i2v", "pairs.toml", "ended")


def test_generation_loads_anew_and_makes_every_picture(monkeypatch):
    lines = ("a --d 1", "b --d 2", "c --d 3")
    lines = [
        f"{line} --w 32 --h 32 --s 2 --ci data/start/cat.png --of target_index=1,control_index=0" for line in lines
    ]
    expected = from_lines("i2v", "enough", *lines)
    original, calls = wan.generation.run.denoise, []

    def denoise(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("not enough")
        return original(*arguments)

    monkeypatch.setattr(wan.generation.run, "denoise", denoise)
    with pytest.raises(torch.OutOfMemoryError):
        from_lines("i2v", "ended", *lines)
    calls.clear()
    choices = plan_of(GenerationMemoryConfig(), SWAPPED_IN_GENERATION)
    monkeypatch.setattr(wan.generation.start, "plan_generation", lambda *_: choices)
    made = from_lines("i2v", "scarce", *lines, flags=("--memory", "auto"))
    assert len(calls) == 4 and made == expected


def test_the_recipe_names_what_was_chosen(monkeypatch):
    monkeypatch.setattr(wan.generation.start, "plan_generation", lambda *_: plan_of(SWAPPED_IN_GENERATION))
    (path,) = generate("i2v", "planned", *FLAGS, "--memory", "auto")
    (same,) = generate("i2v", "swapped", *FLAGS, "--blocks_to_swap", "1")
    assert path.read_bytes() == same.read_bytes()


# T5


@pytest.fixture
def room_for_less_than_t5(monkeypatch):
    t5 = T5Checkpoint(Path(MODELS["t5"]))
    bytes_in_float32 = 4 * sum(tensor.numel() for tensor in torch.load(t5.path, weights_only=True).values())
    assert t5.size(torch.device("cpu")) == bytes_in_float32
    monkeypatch.setattr(Room, "on", lambda device: Room(bytes_in_float32 - 1, math.inf))
    return bytes_in_float32


def test_t5_stays_as_it_is_where_it_fits(room_for_less_than_t5):
    t5, cpu = T5Checkpoint(Path(MODELS["t5"])), torch.device("cpu")
    assert plan_t5(t5, cpu, Room(room_for_less_than_t5, 0)) == t5
    assert plan_t5(t5, cpu, Room(room_for_less_than_t5 - 1, 0)) == replace(t5, fp8=True)
    assert replace(t5, chosen_dtype=torch.bfloat16).size(cpu) == room_for_less_than_t5 // 2


def test_pictures_and_recipes_are_those_of_fp8_t5_where_t5_does_not_fit(monkeypatch, room_for_less_than_t5, caplog):
    monkeypatch.setattr(wan.generation.start, "plan_generation", lambda *_: plan_of(GenerationMemoryConfig()))
    (path,) = generate("i2v", "planned", *FLAGS, "--memory", "auto")
    assert caplog.text.count("its weights become fp8") == 1
    (same,) = generate("i2v", "told", *FLAGS, "--fp8_t5")
    assert path.read_bytes() == same.read_bytes()


def test_samples_of_training_are_those_of_fp8_t5_where_t5_does_not_fit(monkeypatch, room_for_less_than_t5):
    line = "a cat --w 32 --h 32 --s 2 --d 1 --ci data/start/cat.png --of target_index=1,control_index=0"
    Path("samples.txt").write_text(line, encoding="utf-8")
    monkeypatch.setattr(wan.training.run, "plan_training", lambda *_: plan_of(TrainingMemoryConfig()))
    pictures = []
    for name, flags in {"planned": ("--memory", "auto"), "told": ("--fp8_t5",)}.items():
        shutil.rmtree("output/sample", ignore_errors=True)
        train("i2v", "pairs.toml", name, "--sample_prompts", "samples.txt", "--sample_at_first", *flags)
        pictures.append([path.read_bytes() for path in sorted(Path("output/sample").glob("*.png"))])
    assert pictures[0] and pictures[0] == pictures[1]


# Host memory


def test_a_container_may_have_less(tmp_path, monkeypatch):
    machine = host.psutil.virtual_memory()._replace(available=400)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: machine)
    assert host.available_memory(tmp_path) == 400
    for name, text in (("memory.max", "1000"), ("memory.current", "700"), ("memory.stat", "anon 5\ninactive_file 50")):
        (tmp_path / name).write_text(text + "\n")
    assert host.available_memory(tmp_path) == 350
    (tmp_path / "memory.current").write_text("600\n")
    assert host.available_memory(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert host.available_memory(tmp_path) == 400


def test_this_machine_has_memory():
    assert 1e8 < host.available_memory() < 1e14 and Path("data").is_dir()
