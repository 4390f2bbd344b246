"""Recomputing as many blocks as memory demands: any plan gives the same gradients, and no plan exceeds the memory."""

import pytest
import torch
from torch import Tensor

import wan.fused.dit
import wan.memory.recompute
from tests.dit_cases import CPU, SPEC, attention, lora_gradients, random_dit, velocity, watch_blocks_, with_lora
from wan.fused import plain as fused_plain
from wan.fused.dit import fuse_
from wan.memory.recompute import kept_blocks, measured, recompute_blocks_
from wan.memory.runner import Saver, Saving


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kept", range(SPEC.num_layers + 1))
def test_any_plan_gives_the_same_gradients(kept, offload, monkeypatch):
    monkeypatch.setattr(wan.memory.recompute, "kept_blocks", lambda *_: kept)
    plain = random_dit()
    network = with_lora(plain)
    model = random_dit()
    other, calls = with_lora(model), []
    watch_blocks_(model, lambda number, _x: calls.append(number))
    recompute_blocks_(model, offload, only_needed=True)
    for options in ({}, {}, {"batch": 2}):
        calls.clear()
        expected = lora_gradients(plain, network, **options)
        assert torch.equal(lora_gradients(model, other, **options), expected) and expected.norm() > 0
    assert torch.equal(velocity(model.eval()), velocity(plain.eval()))
    calls.clear()
    model.train()
    lora_gradients(model, other)  # of a size that is known: the last blocks keep theirs
    recomputed = [number for number in range(SPEC.num_layers) if calls.count(number) == 2]
    assert recomputed == list(range(SPEC.num_layers - kept))


def test_a_size_is_measured_once(monkeypatch):
    sizes, model = [], random_dit()
    network = with_lora(model)
    monkeypatch.setattr(wan.memory.recompute, "kept_blocks", lambda blocks, *found: sizes.append(found) or 0)
    recompute_blocks_(model, only_needed=True)
    for batch in (1, 1, 2, 1, 2):
        lora_gradients(model, network, batch=batch)
    (small, small_checkpoint, free), (large, large_checkpoint, _) = sizes
    # Tokens x dim: the stream in float32, and what attention returns in 16 bits
    assert (small_checkpoint, large_checkpoint) == (12 * SPEC.dim * 6, 24 * SPEC.dim * 6)
    assert small_checkpoint < small < large and free == -small  # a CPU: nothing is known of its memory


def test_what_autograd_keeps_is_counted_without_the_weights():
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(3, 64, requires_grad=True)
    out, size = measured(Saver(lambda block, y: block(y.sin()).cos()), Saving(), layer, x)
    assert size == 2 * x.nbytes  # of sin its input, of the layer its weight, of cos its input
    assert torch.equal(out, layer(x.sin()).cos())


@pytest.mark.parametrize(("free", "expected"), [(0, 0), (4, 0), (4 + 9, 1), (4 + 4 * 9, 4), (10**6, 4)])
def test_kept_blocks_are_those_that_fit_beside_the_checkpoints(free, expected):
    assert kept_blocks(blocks=4, activations=10, checkpoint_size=1, free=free) == expected


def fused(model):
    fuse_(model, CPU, operations=fused_plain)
    return model


def test_a_lean_block_keeps_less_and_has_the_same_gradients():
    results = []
    for save_less in (False, True):
        model = random_dit()
        network, sizes = with_lora(model), []
        runner, saving = fused(model).runner, Saving(less=save_less)

        def count(*inputs, runner=runner, saving=saving, sizes=sizes):
            out, size = measured(runner, saving, *inputs)
            sizes.append(size)
            return out

        model.runner = count
        results.append((lora_gradients(model, network, batch=2), sizes))
    (expected, whole), (found, less) = results
    assert torch.equal(found, expected) and expected.norm() > 0
    tokens, dim = 2 * 12, SPEC.dim
    # Four normalisations or rotations of the stream in width `dim`, twice that of q and k, and the hidden layer
    assert all(one - other >= 4 * tokens * (4 * dim + SPEC.ffn_dim) for one, other in zip(whole, less, strict=True))


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_a_plan_with_lean_blocks_gives_the_same_gradients(kept, monkeypatch):
    fits = iter([1, kept])  # not all blocks keep everything, so that leaner ones are tried
    monkeypatch.setattr(wan.memory.recompute, "kept_blocks", lambda *_: next(fits))
    plain, model = fused(random_dit()), fused(random_dit())
    network, other = with_lora(plain), with_lora(model)
    ways = []
    for number, block in enumerate(model.runner.blocks.values()):
        block.train = lambda saving, *inputs, n=number, run=block.train: (
            ways.append((n, saving.less)) or run(saving, *inputs)
        )
    recompute_blocks_(model, only_needed=True)
    expected = lora_gradients(plain, network)
    for _ in range(2):
        ways.clear()
        assert torch.equal(lora_gradients(model, other), expected)
    recomputed = SPEC.num_layers - kept
    forward = [(n, n >= recomputed) for n in range(SPEC.num_layers)]
    assert ways == [*forward, *((n, False) for n in reversed(range(recomputed)))]


ATTENDED = []


@torch.library.custom_op("wan_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ATTENDED.append(q.shape)
    return attention(q, k, v)


def attend_backward(ctx, gradient):
    inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
    with torch.enable_grad():
        return torch.autograd.grad(attention(*inputs), inputs, gradient)


attend.register_autograd(attend_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@pytest.mark.parametrize("only_needed", [False, True])
def test_recomputing_leaves_out_the_last_product_and_where_memory_is_planned_attention(only_needed, monkeypatch):
    model, products = fused(random_dit()), []
    network = with_lora(model)
    monkeypatch.setattr(wan.memory.recompute, "_ATTENTION", [torch.ops.wan_tests.attend.default])
    for block in model.blocks:
        block.self_attn.attention = attend
    expected = lora_gradients(model, network)
    recompute_blocks_(model, only_needed=only_needed)
    lora_gradients(model, network)
    original = wan.fused.dit.lora_products
    monkeypatch.setattr(wan.fused.dit, "lora_products", lambda *args: products.append(args[3]) or original(*args))
    ATTENDED.clear()
    assert torch.equal(lora_gradients(model, network), expected)
    assert products.count(False) == SPEC.num_layers and len(products) == 2 * 8 * SPEC.num_layers
    assert len(ATTENDED) == (1 if only_needed else 2) * SPEC.num_layers
