"""The options as a whole: which settings are refused, what each does, and that none but fp8 changes a bit."""

import os
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
from safetensors.torch import load_file
from torch._dynamo.backends.registry import register_backend
from torch._dynamo.testing import CompileCounter

import wan.models.memory_options
import wan_generate_video
from tests.dit_cases import (
    CPU,
    DEVICES,
    SPEC,
    arguments,
    lora_gradients,
    random_dit,
    velocity,
    watch_blocks_,
    with_lora,
)
from tests.helpers import rel_l2
from tests.project import ENCODERS, model_flags
from utils.errors import ConfigError
from wan.fused import plain as fused_plain
from wan.fused.dit import fuse_
from wan.models.device import DeviceConfig
from wan.models.memory_options import GenerationMemoryConfig, MemoryConfig, TrainingMemoryConfig, apply_memory_options_
from wan.nets.dit import Block, WanDiT

EAGER = {"compile": True, "compile_backend": "eager", "compile_fullgraph": True}
RECOMPUTE = {"gradient_checkpointing": "all"}
SWAP = {"blocks_to_swap": 3, "use_pinned_memory_for_block_swap": True}
OFFLOAD = {"gradient_checkpointing_cpu_offload": True}
SWITCHES = [
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
]
GLOBAL = [*SWITCHES, (torch._dynamo.config, "cache_size_limit")]


@pytest.fixture(autouse=True)
def global_state():
    """Restores what the options switch for the whole process: with TF32 left on, later tests would round otherwise."""
    before = [getattr(*place) for place in GLOBAL]
    yield
    for place, value in zip(GLOBAL, before, strict=True):
        setattr(*place, value)


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def trainable():
    def build(device=CPU, **settings):
        model = random_dit()
        network = with_lora(model)
        model.to(device)
        apply_memory_options_(model, TrainingMemoryConfig(dit_backend="plain", **settings), device)
        return model, network

    return build


# Settings


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        (MemoryConfig, {"blocks_to_swap": -1}, ["--blocks_to_swap -1", "at least 0"]),
        (MemoryConfig, {"compile_cache_size_limit": 0}, ["--compile_cache_size_limit 0", "at least 1"]),
        (
            MemoryConfig,
            {"compile_mode": "max-autotune", "compile_backend": "eager"},
            ["--compile_mode max-autotune", "--compile_backend"],
        ),
        (TrainingMemoryConfig, {"fp8_scaled": True}, ["--fp8_scaled needs --fp8_base"]),
        (TrainingMemoryConfig, OFFLOAD, ["--gradient_checkpointing_cpu_offload needs --gradient_checkpointing;"]),
    ],
)
def test_settings_that_cannot_work_are_refused(section, settings, words):
    with pytest.raises(ConfigError) as caught:
        section(**settings)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("settings", "stored", "words"),
    [
        ({"blocks_to_swap": 4}, torch.bfloat16, ["--blocks_to_swap 4", "has 4 blocks", "at most 3"]),
        ({"fp8_scaled": True}, torch.float8_e4m3fn, ["--fp8_scaled", "already in fp8"]),
        ({"compile": True, "compile_backend": "eagre"}, torch.bfloat16, ["--compile_backend eagre", "'eager'"]),
    ],
)
def test_settings_that_the_model_does_not_allow_are_refused(settings, stored, words):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig(**settings).check(SPEC, stored, CPU)
    assert all(word in str(caught.value) for word in words)


def test_settings_that_the_model_allows_are_not():
    MemoryConfig(blocks_to_swap=3, fp8_scaled=True, **EAGER).check(SPEC, torch.bfloat16, CPU)
    GenerationMemoryConfig(fp8=True).check(SPEC, torch.float8_e4m3fn, CPU)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (TrainingMemoryConfig(), None),
        (TrainingMemoryConfig(fp8_base=True), "cast"),
        (TrainingMemoryConfig(fp8_base=True, fp8_scaled=True), "scaled"),
        (GenerationMemoryConfig(), None),
        (GenerationMemoryConfig(fp8=True), "cast"),
        (GenerationMemoryConfig(fp8_scaled=True), "scaled"),
        (GenerationMemoryConfig(fp8=True, fp8_scaled=True), "scaled"),
    ],
)
def test_the_flags_tell_the_kind_of_fp8(config, kind):
    assert config.fp8_kind == kind


def test_fp8_and_compiling_exclude_each_other_on_gpus_whose_compiler_lacks_it(monkeypatch):
    cuda = torch.device("cuda")
    config = MemoryConfig(compile=True, fp8_scaled=True)
    monkeypatch.setattr(wan.models.memory_options, "find_spec", lambda name: object())
    for capability, allowed in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        replace(config, fp8_scaled=False).check(SPEC, torch.bfloat16, cuda)
        if allowed:
            config.check(SPEC, torch.bfloat16, cuda)
        else:
            with pytest.raises(ConfigError, match="--compile: this GPU's compiler does not know fp8"):
                config.check(SPEC, torch.bfloat16, cuda)
    monkeypatch.setattr(wan.models.memory_options, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--compile needs the package triton"):
        config.check(SPEC, torch.bfloat16, cuda)


def test_backend_switches_are_set_when_asked_for_and_else_left_alone():
    def after(**settings):
        apply_memory_options_(random_dit(), MemoryConfig(**settings), CPU)
        return [getattr(*place) for place in SWITCHES]

    for place in SWITCHES:
        setattr(*place, False)
    assert after() == [False, False, False]
    assert after(cuda_allow_tf32=True) == [True, True, False]
    assert after(cuda_cudnn_benchmark=True) == [True, True, True]


# Effects


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        *(RECOMPUTE, RECOMPUTE | OFFLOAD, RECOMPUTE | SWAP, RECOMPUTE | OFFLOAD | SWAP | EAGER),
        *(EAGER, SWAP, SWAP | EAGER),
    ],
    ids=["recompute", "offload", "swap", "all", "compile", "swap alone", "swap and compile"],
)
def test_training_gradients_and_samples_stay_the_same(settings, device, trainable):
    plain, network = trainable(device)
    model, other = trainable(device, **settings)
    for options in ({}, {"batch": 2}):
        expected = lora_gradients(plain, network, **options)
        assert torch.equal(lora_gradients(model, other, **options), expected) and expected.norm() > 0
    assert torch.equal(velocity(model.eval()), velocity(plain.eval()))


@pytest.mark.parametrize(
    "settings", [RECOMPUTE | OFFLOAD | EAGER, {"gradient_checkpointing": "auto"}, {"dit_backend": "fused"}], ids=str
)
def test_the_plain_runners_undo_what_the_options_did(settings, monkeypatch):
    monkeypatch.setattr(MemoryConfig, "fuses", lambda self, device: self.dit_backend == "fused")
    monkeypatch.setattr(wan.models.memory_options, "fuse_", partial(fuse_, operations=fused_plain))
    model, calls, plain = random_dit(), [], random_dit()
    network, expected = with_lora(model), lora_gradients(plain, with_lora(plain))
    apply_memory_options_(model, TrainingMemoryConfig(**settings), CPU)
    watch_blocks_(model, lambda number, _x: calls.append(number))
    lora_gradients(model, network)
    assert calls == list(range(SPEC.num_layers))
    model.runner, model.pass_runner = Block.compute, WanDiT.predict
    assert torch.equal(lora_gradients(model, network), expected) and expected.norm() > 0
    assert torch.equal(velocity(model.eval()), velocity(plain.eval()))
    assert calls == list(range(SPEC.num_layers))


def test_all_blocks_run_the_program_that_the_first_compiled():

    counter = CompileCounter()
    register_backend(counter, name="counting")
    model = random_dit()
    apply_memory_options_(model, MemoryConfig(compile=True, compile_backend="counting"), CPU)
    velocity(model)
    velocity(model)
    assert counter.frame_count == 1


@pytest.mark.skipif(len(DEVICES) == 1, reason="takes a minute on a CPU")
def test_inductor_compiles_blocks_within_rounding(trainable):
    torch._dynamo.reset()
    settings = {"compile": True, "compile_fullgraph": True} | RECOMPUTE | SWAP
    (plain, network), (model, other) = trainable(DEVICES[-1]), trainable(DEVICES[-1], **settings)
    assert rel_l2(lora_gradients(model, other), lora_gradients(plain, network)) < 1e-5
    assert rel_l2(velocity(model.eval()), velocity(plain.eval())) < 1e-5


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("default", "default"),
        ("reduce-overhead", "default"),
        ("max-autotune", "max-autotune-no-cudagraphs"),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs"),
    ],
)
def test_no_mode_uses_cuda_graphs(asked, used, monkeypatch, caplog):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda forward, mode, **_: modes.append(mode) or forward)
    apply_memory_options_(random_dit(), MemoryConfig(compile=True, compile_mode=asked), CPU)
    assert modes == [used]
    assert (f"--compile_mode {asked}: used as {used}" in caplog.text) == (asked != used)


def test_the_limit_of_compiled_programs_is_handed_on():
    apply_memory_options_(
        random_dit(), MemoryConfig(compile=True, compile_backend="eager", compile_cache_size_limit=13), CPU
    )
    assert torch._dynamo.config.cache_size_limit == 13


@pytest.mark.parametrize(
    ("platform", "set_by_user", "settings"),
    [
        ("linux", {}, "expandable_segments:True"),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ("linux", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, None),
        ("win32", {}, None),
    ],
)
def test_reserves_on_a_gpu_grow_unless_the_user_wants_otherwise(platform, set_by_user, settings, monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
        if name in set_by_user:
            monkeypatch.setenv(name, set_by_user[name])
    monkeypatch.setattr(sys, "platform", platform)
    config = DeviceConfig("cpu")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in set_by_user
    config.resolve()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == settings


def test_offloading_keeps_the_residual_stream_of_each_block_on_the_host_and_nothing_else(monkeypatch, trainable):
    model, _ = trainable(**RECOMPUTE, **OFFLOAD)
    on_host, on_device, original = [], [], torch.empty_like

    def empty_like(tensor, **options):
        if options.get("device") == "cpu":
            on_host.append((tuple(tensor.shape), tensor.dtype))
        return original(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _block, inputs: on_device.append(weakref.ref(inputs[0])))
    output = model(*arguments())
    assert output.requires_grad and on_host == [((1, 12, SPEC.dim), torch.float32)] * SPEC.num_layers
    assert [stream() for stream in on_device] == [None] * SPEC.num_layers


def test_recomputing_keeps_the_inputs_of_blocks_only(trainable):
    sizes = {}
    for settings in ({}, RECOMPUTE):
        model, _ = trainable(**settings)
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        weights = {parameter.data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            velocity_with_gradients = model(*arguments())
        sizes[bool(settings)] = sum(size for pointer, size in kept.items() if pointer not in weights)
        assert velocity_with_gradients.requires_grad
    assert sizes[True] < sizes[False] / 10


# Generation


@pytest.fixture(scope="module")
def project(new_project):
    with new_project("cat") as folder:
        return folder


def picture(name, *flags):
    wan_generate_video.main(
        [
            *(*model_flags("i2v"), *ENCODERS),
            *("--prompt", "a cat", "--control_image_path", "data/start/cat.png", "--seed", "7", "--infer_steps", "2"),
            *("--one_frame_inference", "control_index=0,target_index=1", "--video_size", "48", "48"),
            *("--device", "cpu", "--dit_dtype", "float32", "--output_type", "latent", "--save_path", name, *flags),
        ]
    )
    (path,) = Path(name).iterdir()
    return path


def test_generation_takes_the_options(workspace):
    latent = {
        name: load_file(picture(name, *flags))["latent"]
        for name, flags in {
            "plain": (),
            "swapped": ("--blocks_to_swap", "1", "--compile", "--compile_backend", "eager"),
            "cast": ("--fp8",),
            "scaled": ("--fp8_scaled", "--blocks_to_swap", "1"),
            "t5": ("--fp8_t5",),
        }.items()
    }
    assert torch.equal(latent["swapped"], latent["plain"])
    for name in ("cast", "scaled", "t5"):
        assert 0 < rel_l2(latent[name], latent["plain"]) < 0.1, name
