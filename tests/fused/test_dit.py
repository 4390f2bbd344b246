"""The fused DiT and VAE against the reference, with their operations in plain PyTorch. The kernels: test_kernels.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wan.models.memory_options
import wan.models.options
from tests.dit_cases import CPU, SPEC, arguments, lora_gradients, random_dit, velocity, watch_blocks_, with_lora
from tests.helpers import rel_l2
from utils.errors import ConfigError
from wan.fused import plain as fused_plain
from wan.fused.dit import Residual, fuse_
from wan.fused.vae import fuse_vae_
from wan.memory.fp8 import fp8_entries, is_inner_dit_weight, use_fp8_
from wan.models import checkpoints
from wan.models.memory_options import GenerationMemoryConfig, MemoryConfig, TrainingMemoryConfig, apply_memory_options_
from wan.models.options import VAEConfig
from wan.nets import vae
from wan.nets.attention import sdpa
from wan.nets.conditioning import Conditioning
from wan.nets.context import StepCache
from wan.nets.vae import ChannelNorm, FrameAttention, SiLU, WanVAE


def fused(model, **options):
    fuse_(model, CPU, operations=fused_plain, **options)
    return model


@pytest.mark.parametrize("swapped", [0, 4])
@pytest.mark.parametrize("skipped", [(), (0,), (1, 3), (0, 1, 2, 3)], ids=str)
@torch.no_grad()
def test_velocities_agree(skipped, swapped):
    inputs, options = arguments(batch=2), {"skip_blocks": frozenset(skipped)}
    found = fused(random_dit(), swapped=swapped)(*inputs, **options)
    assert rel_l2(found, random_dit()(*inputs, **options)) < 1e-6


def test_lora_gradients_agree():
    results = []
    for change in (lambda model: model, fused):
        model = random_dit()
        network = with_lora(model)
        results.append(lora_gradients(change(model), network, batch=2))
    assert rel_l2(*results) < 2e-6


def with_attention(function):
    model = random_dit()
    for block in model.blocks:
        block.self_attn.attention = block.cross_attn.attention = function
    return model


def test_with_torchs_attention_cross_attention_is_one_operation_and_agrees(monkeypatch):
    rows, original = [], fused_plain.cross_attention
    monkeypatch.setattr(
        fused_plain, "cross_attention", lambda *inputs: rows.append(inputs[1].shape[1]) or original(*inputs)
    )
    gradients, velocities = [], []
    for change in (lambda model: model, fused):
        model = change(with_attention(sdpa))
        velocities.append(velocity(model, batch=2))
        gradients.append(lora_gradients(model, with_lora(model), batch=2))
    assert rel_l2(*velocities) < 1e-6 and rel_l2(*gradients) < 2e-6
    assert rows == 2 * SPEC.num_layers * [64 + 257]  # of 512 + 257 keys that the reference looks at


def test_an_attention_that_was_chosen_serves_text_and_image_too():
    seen = []
    model = fused(with_attention(lambda q, k, v: seen.append(k.shape[1]) or sdpa(q, k, v)))
    assert rel_l2(velocity(model), velocity(random_dit())) < 1e-6
    assert seen == SPEC.num_layers * [12, 512, 257]


@torch.no_grad()
def test_samples_during_training_agree():
    model, other = random_dit(), random_dit()
    with_lora(model), with_lora(other)
    assert rel_l2(velocity(fused(model.eval())), velocity(other.eval())) < 1e-6


@pytest.mark.parametrize("name", ["norm3.weight", "self_attn.norm_q.weight", "modulation"])
def test_parameters_that_the_kernels_have_no_gradient_for_are_trained_on_the_plain_path(name):
    model = fused(random_dit())
    model.runner.blocks[model.blocks[1]].operations = None  # an error if it used them
    parameter = model.blocks[1].get_parameter(name).requires_grad_()
    model(*arguments()).square().mean().backward()
    assert parameter.grad.norm() > 0


@torch.no_grad()
def test_between_blocks_the_last_addition_is_left_to_the_next():
    model, kinds = fused(random_dit()), []
    watch_blocks_(model, lambda _number, x: kinds.append(type(x)))
    velocity(model)
    assert kinds == [torch.Tensor, Residual, Residual, Residual]


def joined(model, number=0):
    own = model.blocks[number].self_attn
    return own.k.weight.data_ptr() == own.q.weight.data_ptr() + own.q.weight.nbytes


@torch.no_grad()
def test_q_k_and_v_become_one_matrix_and_stay_what_they_are():
    model, expected = fused(random_dit(), swapped=1), random_dit().state_dict()
    assert not joined(model)
    before = velocity(model)
    assert [joined(model, number) for number in range(4)] == [True, True, True, False]
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    for parameter in model.parameters():  # as moving to another device and back does
        parameter.data = parameter.data.clone()
    assert not joined(model)
    assert torch.equal(velocity(model), before) and joined(model)
    own = model.blocks[0].self_attn
    address = own.q.weight.data_ptr()
    velocity(model)
    assert own.q.weight.data_ptr() == address  # joined once
    own.v.weight += 1  # the matrix is made of the weights, no copy of them
    assert not torch.equal(velocity(model), before)


def in_rows8(model):
    state = model.state_dict()
    layers = use_fp8_(model, torch.float32, "rows", lambda name: is_inner_dit_weight(name, SPEC.num_layers))
    entries = {}
    for key, tensor in state.items():
        entries |= fp8_entries(layers, key, tensor.clone())
    model.load_state_dict(entries, assign=True)
    return model.requires_grad_(False)


def test_fp8_products_agree():
    plain = velocity(in_rows8(random_dit()))
    model = fused(in_rows8(random_dit()))
    assert rel_l2(velocity(model), plain) < 0.01  # a number near the middle between two of fp8 may fall to either side
    own = model.blocks[1].self_attn
    assert own.k.quantized.data_ptr() == own.q.quantized.data_ptr() + own.q.quantized.nbytes
    assert own.v.scale_weight.data_ptr() == own.k.scale_weight.data_ptr() + own.k.scale_weight.nbytes
    assert 0.001 < rel_l2(plain, velocity(random_dit())) < 0.1


def test_a_t2v_model_which_has_no_image_agrees():
    spec = replace(SPEC, model_type="t2v", in_dim=16, image_dim=None)
    latents, _, *others = arguments()
    inputs = latents, Conditioning(), *others
    with torch.no_grad():
        assert rel_l2(fused(random_dit(spec))(*inputs), random_dit(spec)(*inputs)) < 1e-6


@torch.no_grad()
def test_further_steps_reuse_what_the_first_made_of_the_prompt():
    model, cache = fused(random_dit()), StepCache()
    first, *rest = arguments()
    model(first, *rest, cache=cache)
    assert torch.equal(model(2 * first, *rest, cache=cache), model(2 * first, *rest))
    kept = cache.prepared.contexts[0].kept
    kept.values.zero_()
    assert not torch.equal(model(first, *rest, cache=cache), model(first, *rest))


# Which path is used


def test_a_cpu_runs_the_plain_path_and_refuses_the_other():
    assert not MemoryConfig().fuses(CPU) and not MemoryConfig(dit_backend="plain").fuses(CPU)
    with pytest.raises(ConfigError, match=r"--dit_backend fused needs a CUDA GPU.* and the package triton"):
        MemoryConfig(dit_backend="fused").check(SPEC, torch.bfloat16, CPU)


def test_auto_is_the_fused_path_on_cuda_with_triton(monkeypatch):
    monkeypatch.setattr(wan.fused.dit, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda, auto = torch.device("cuda"), MemoryConfig()
    assert auto.fuses(cuda) and not auto.fuses(CPU) and not MemoryConfig(dit_backend="plain").fuses(cuda)
    assert not MemoryConfig(compile=True).fuses(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not auto.fuses(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(wan.fused.dit, "find_spec", lambda name: None)
    assert not auto.fuses(cuda)


def test_prepare_fuses_when_the_settings_say_so(monkeypatch):
    asked = []
    monkeypatch.setattr(wan.models.memory_options, "fuse_", lambda dit, device, swapped: asked.append(swapped))
    monkeypatch.setattr(MemoryConfig, "fuses", lambda self, device: self.dit_backend == "fused")
    apply_memory_options_(random_dit(), MemoryConfig(dit_backend="plain"), CPU)
    apply_memory_options_(random_dit(), MemoryConfig(dit_backend="fused"), CPU)
    assert asked == [0]


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        (MemoryConfig, {"compile": True, "dit_backend": "fused"}, "--compile.*--dit_backend fused"),
        (GenerationMemoryConfig, {"fp8_fast": True, "blocks_to_swap": 1}, "--fp8_fast.*--blocks_to_swap"),
        (
            TrainingMemoryConfig,
            {"blocks_to_swap": 1, "gradient_checkpointing": "auto"},
            "--gradient_checkpointing auto: can't be combined with --blocks_to_swap; use all",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(section, settings, words):
    with pytest.raises(ConfigError, match=words):
        section(**settings)


def test_fp8_products_are_refused_on_gpus_without_them(monkeypatch):
    monkeypatch.setattr(wan.fused.dit, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match="--fp8_fast: this GPU does not multiply in fp8"):
        GenerationMemoryConfig(fp8_fast=True).check(SPEC, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    GenerationMemoryConfig(fp8_fast=True).check(SPEC, torch.bfloat16, torch.device("cuda"))


# The VAE


@pytest.mark.parametrize(
    ("settings", "able", "fused"),
    [
        ({"vae_dtype": "bf16"}, True, True),
        ({"vae_dtype": "bf16"}, False, False),
        ({"vae_dtype": "float32"}, True, False),
        ({"vae_dtype": "bf16", "vae_backend": "plain"}, True, False),
    ],
)
def test_the_vae_is_fused_in_16_bits_where_that_runs(monkeypatch, settings, able, fused):
    asked = []
    monkeypatch.setattr(checkpoints, "can_fuse", lambda device: able)
    monkeypatch.setattr(checkpoints, "fuse_vae_", asked.append)
    monkeypatch.setattr(checkpoints.load, "load_vae", lambda path, dtype, device: "the VAE")
    monkeypatch.setattr(wan.models.options.load, "inspect_vae", lambda path: None)
    checkpoint = VAEConfig(Path(__file__), **settings).resolve()
    assert checkpoint.load(CPU) == "the VAE" and asked == (["the VAE"] if fused else [])


def channel_norm(x, gain, silu):
    """The kernel's result, and like the kernel's it is channels-last."""
    out = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gain.view(-1, 1, 1)
    return (F.silu(out) if silu else out).contiguous(memory_format=torch.channels_last)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


@pytest.fixture
def vaes():
    """The same VAE twice, plain and fused."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = WanVAE(8).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(1, 0.2)
        models.append(model)
    fuse_vae_(models[1], channel_norm, attend)
    return models


@pytest.mark.parametrize("frames", [1, 5])
def test_the_fused_vae_agrees(frames, vaes):
    plain, other = vaes
    pixels = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    latents = plain.encode(pixels)
    assert rel_l2(other.encode(pixels), latents) < 1e-5
    assert rel_l2(other.decode(latents), plain.decode(latents)) < 1e-5


@torch.no_grad()
def test_plain_operations_undo_the_fusing_of_a_vae(vaes):
    plain, other = vaes
    for module in other.modules():
        for kind, operation in ((ChannelNorm, vae.channel_norm), (SiLU, F.silu), (FrameAttention, vae.attend)):
            if isinstance(module, kind):
                module.operation = operation
    other.load_state_dict({name: tensor.clone() for name, tensor in plain.state_dict().items()}, assign=True)
    pixels = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    assert torch.equal(other.decode(other.encode(pixels)), plain.decode(plain.encode(pixels)))


def test_all_convolutions_of_an_image_but_the_first_get_channels_last_inputs_and_weights(vaes, monkeypatch):
    found, convolve = [], F.conv2d

    def spy(x, weight, *rest, **options):
        layouts = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight)]
        found.append((x.shape[1], *layouts))
        return convolve(x, weight, *rest, **options)

    monkeypatch.setattr(F, "conv2d", spy)
    latents = vaes[1].encode(torch.rand(1, 3, 1, 16, 24))
    vaes[1].decode(latents)
    assert len(found) > 50 and {entry[1:] for entry in found[1:]} == {(True, True)} and found[0] == (3, False, True)


def test_weights_of_the_fused_vae_keep_their_names_and_values(vaes):
    plain, other = (model.state_dict() for model in vaes)
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    assert any(isinstance(module, nn.SiLU) for module in vaes[1].modules())
