"""CUDA graphs: replayed passes equal plain ones, whatever is called in between. On a CPU `rerun` stands in for them."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.dit_cases import CPU, DEVICES, arguments, random_dit, with_lora
from tests.helpers import rel_l2
from wan.fused.dit import can_fuse, fuse_
from wan.fused.graphs import CudaRecorder, GraphedGradients, graph_passes_
from wan.memory.recompute import recompute_blocks_
from wan.models.memory_options import GenerationMemoryConfig, TrainingMemoryConfig
from wan.nets.context import StepCache
from wan.nets.dit import WanDiT
from wan.training.loss import flow_matching_loss

NAMES = ("latents", "conditioning", "text", "frame_indices")


class Rerun:
    """Does the work again with the tensors that it was recorded with, and writes the result over the first one."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1
        result = work()

        def replay():
            self.replayed += 1
            for old, new in zip(tensors(result), tensors(work()), strict=True):
                old.copy_(new)

        return replay, result


class Full:
    """Runs out of memory."""

    def __call__(self, work):
        raise torch.OutOfMemoryError


def tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in tensors(part)]


def recorder(device: torch.device):
    return Rerun() if device == CPU else CudaRecorder()


def on_device(model: WanDiT, device: torch.device) -> WanDiT:
    """With fused blocks where they run."""
    if can_fuse(device):
        fuse_(model.to(device), device)
    return model


def steps(model, device: torch.device, cache: StepCache, **options) -> list[Tensor]:
    """Velocities of five steps, with other latents in each."""
    latents, conditioning, _, *shared = arguments(device, **options)
    with torch.inference_mode():
        return [
            model(
                latents * (1 - i / 10),
                conditioning,
                torch.full_like(latents[:, 0, 0, 0, 0], 900 - 100 * i),
                *shared,
                cache=cache,
            )
            for i in range(5)
        ]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_replayed_passes_equal_plain_ones(device):
    plain, model, record = on_device(random_dit(), device), on_device(random_dit(), device), recorder(device)
    graph_passes_(model, record)
    kept = {batch: StepCache() for batch in (1, 2)}
    for batch in (1, 2, 1):
        expected = steps(plain, device, StepCache(), batch=batch)
        found = steps(model, device, kept[batch], batch=batch)
        assert all(map(torch.equal, found, expected)) and not torch.equal(found[0], found[1])
    if device == CPU:
        assert (record.recorded, record.replayed) == (2, 4 + 4 + 5)


def test_a_new_prompt_and_left_out_blocks_have_graphs_of_their_own():
    plain, model, record = random_dit(), random_dit(), Rerun()
    graph_passes_(model, record)
    latents, conditioning, timesteps, text, *shared = arguments()
    for words in (text, text.flip(1)):
        cache = StepCache()
        for skipped in (frozenset(), frozenset({1}), frozenset(), frozenset({1})):
            inputs = latents, conditioning, timesteps, words, *shared, skipped
            with torch.no_grad():
                assert torch.equal(model(*inputs, cache=cache), plain(*inputs))
    assert record.recorded == 4


def test_gradients_calls_without_a_cache_and_large_batches_are_not_recorded(monkeypatch):
    model, record = random_dit(), Rerun()
    graph_passes_(model, record)
    cache = StepCache()
    model(*arguments(), cache=cache)
    model(*arguments(), cache=cache)
    with torch.no_grad():
        model(*arguments())
        monkeypatch.setattr("wan.fused.graphs._MOST_TOKENS", 11)  # the batch has 12
        model(*arguments(), cache=cache)
        assert record.recorded == 0
        monkeypatch.setattr("wan.fused.graphs._MOST_TOKENS", 12)
        model(*arguments(), cache=cache)
        assert record.recorded == 1


def test_without_memory_for_a_graph_passes_stay_plain():
    plain, model = random_dit(), random_dit()
    graph_passes_(model, Full())
    expected = steps(plain, CPU, StepCache())
    assert all(map(torch.equal, steps(model, CPU, StepCache()), expected))


def training_inputs(device: torch.device, **options) -> dict[str, Tensor]:
    latents, conditioning, _, *shared = arguments(device, **options)
    batch = len(latents)
    inputs = dict(zip(NAMES, (latents, conditioning, *shared), strict=True))
    return inputs | {"noise": latents.flip(1), "t": torch.linspace(0.9, 0.3, batch, device=device), "weights": None}


def losses_and_gradients(loss, parameters, inputs: dict[str, Tensor], factor: Tensor) -> tuple[Tensor, Tensor]:
    """Plain ones. Nothing of autograd's graph may be left: CUDA would not record beside it."""
    losses = loss(**inputs)
    return losses.detach(), flat(torch.autograd.grad(losses.sum() * factor, parameters))


def flat(gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_replayed_gradients_equal_plain_ones_while_the_weights_change(device, recompute):
    model, record = random_dit(), recorder(device)
    network = with_lora(model)
    model = on_device(model, device)
    if recompute:
        recompute_blocks_(model)
    parameters, loss = list(network.parameters()), partial(flow_matching_loss, model)
    gradients = GraphedGradients(loss, parameters, record)
    factor = torch.tensor(0.5, device=device)
    for number, batch in enumerate((1, 2, 1, 1, 2, 2, 1)):
        inputs = training_inputs(device, batch=batch)
        inputs["latents"] *= 1 - number / 10
        expected_losses, expected = losses_and_gradients(loss, parameters, inputs, factor)
        losses, found = gradients(inputs, factor)
        assert torch.equal(losses, expected_losses)
        assert rel_l2(flat(found), expected) < 1e-6 and expected.norm() > 0
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= 10 * gradient
        if number == 3:
            gradients.release()
    if device == CPU:
        assert (record.recorded, record.replayed) == (3, 5)


def test_a_size_that_does_not_fit_beside_the_graphs_takes_their_memory():
    model = random_dit()
    network, record = with_lora(model), Rerun()
    full = [False]

    def loss(**inputs):
        if len(inputs["t"]) == 2 and gradients._recorded:
            full[0] = True
            raise torch.OutOfMemoryError
        return flow_matching_loss(model, **inputs)

    gradients, factor = GraphedGradients(loss, list(network.parameters()), record), torch.tensor(1.0)
    one, two = training_inputs(CPU), training_inputs(CPU, batch=2)
    expected = flat(gradients(one, factor)[1])
    gradients(one, factor)
    assert record.recorded == 1
    found = flat(gradients(two, factor)[1])
    assert full == [True] and torch.equal(found, flat(torch.autograd.grad(loss(**two).sum(), gradients.parameters)))
    assert torch.equal(flat(gradients(one, factor)[1]), expected) and record.recorded == 2


def test_without_memory_for_a_graph_gradients_stay_plain_and_without_any_the_error_is_told():
    model = random_dit()
    network = with_lora(model)
    gradients, factor = (
        GraphedGradients(partial(flow_matching_loss, model), list(network.parameters()), Full()),
        torch.tensor(1.0),
    )
    first, second = (flat(gradients(training_inputs(CPU), factor)[1]) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(torch.OutOfMemoryError):
        GraphedGradients(lambda **_: Full()(None), [], Full())(training_inputs(CPU), factor)


def test_graphs_are_for_fused_blocks_that_stay_on_a_gpu(monkeypatch):
    monkeypatch.setattr("wan.models.memory_options.can_fuse", lambda device: device.type == "cuda")
    gpu = torch.device("cuda")
    assert GenerationMemoryConfig().records(gpu) and TrainingMemoryConfig(gradient_checkpointing="all").records(gpu)
    assert not GenerationMemoryConfig().records(CPU)
    for settings in ({"dit_backend": "plain"}, {"blocks_to_swap": 2}, {"compile": True}):
        assert not GenerationMemoryConfig(**settings).records(gpu)
    offload = TrainingMemoryConfig(gradient_checkpointing="all", gradient_checkpointing_cpu_offload=True)
    assert not offload.records(gpu)
