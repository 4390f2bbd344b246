"""Recomputing as many blocks as memory demands: any plan gives the same gradients, and no plan exceeds the memory."""

import pytest
import torch

import wan.recompute
from tests.dit_cases import SPEC, lora_gradients, random_dit, velocity, with_lora
from wan.recompute import checkpoint_blocks_, kept_blocks, measured


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kept", range(SPEC.num_layers + 1))
def test_any_plan_gives_the_same_gradients(kept, offload, monkeypatch):
    monkeypatch.setattr(wan.recompute, "kept_blocks", lambda *_: kept)
    plain = random_dit()
    network = with_lora(plain)
    model = random_dit()
    other, calls = with_lora(model), []
    for number, block in enumerate(model.blocks):
        block.forward = lambda *args, n=number, run=block.forward: calls.append(n) or run(*args)
    checkpoint_blocks_(model, offload, only_needed=True)
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
    monkeypatch.setattr(wan.recompute, "kept_blocks", lambda blocks, *found: sizes.append(found) or 0)
    checkpoint_blocks_(model, only_needed=True)
    for batch in (1, 1, 2, 1, 2):
        lora_gradients(model, network, batch=batch)
    (small, small_checkpoint, free), (large, large_checkpoint, _) = sizes
    assert (small_checkpoint, large_checkpoint) == (12 * SPEC.dim * 4, 24 * SPEC.dim * 4)  # tokens x dim in float32
    assert small_checkpoint < small < large and free == 0  # a CPU: nothing is known of its memory


def test_what_autograd_keeps_is_counted_without_the_weights():
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(3, 64, requires_grad=True)
    out, size = measured(lambda y: layer(y.sin()).cos(), layer, x)
    assert size == 2 * x.nbytes  # of sin its input, of the layer its weight, of cos its input
    assert torch.equal(out, layer(x.sin()).cos())


@pytest.mark.parametrize(
    ("free", "expected"),
    [(0, 0), (2 * 10 + 4 * 1, 0), (2 * 10 + 4 * 1 + 9, 1), (2 * 10 + 4 * 1 + 4 * 9, 4), (10**6, 4)],
)
def test_kept_blocks_are_those_that_fit_beside_the_checkpoints_and_two_spare_blocks(free, expected):
    assert kept_blocks(blocks=4, activations=10, checkpoint_size=1, free=free) == expected
