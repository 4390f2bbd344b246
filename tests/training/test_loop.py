"""The training step, on a small DiT with random weights."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import rel_l2
from utils.randomness import seeded
from wan.files.load import load_dit
from wan.lora.network import inject_lora_
from wan.lora.options import NetworkConfig
from wan.memory.recompute import recompute_blocks_
from wan.nets.conditioning import Conditioning
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.training.loss import flow_matching_loss

SPEC = DiTSpec("i2v", dim=256, ffn_dim=384, num_layers=2, in_dim=36, text_dim=32, image_dim=48)


@pytest.fixture(scope="module")
def base() -> WanDiT:
    torch.manual_seed(0)
    dit = WanDiT(SPEC)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if parameter.ndim == 3:  # modulation, zero at construction
                parameter.normal_(std=0.5)
            elif name.startswith("blocks") and name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return dit


def inputs(batch: int = 1, indices=(0, 1)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "latents": draw(batch, 16, 2, 4, 6),
        "conditioning": Conditioning(draw(batch, 20, 2, 4, 6), draw(batch, 1, 257, 48)),
        "text": draw(batch, 512, 32),
        "noise": draw(batch, 16, 2, 4, 6),
        "t": torch.linspace(0.4, 0.9, batch),
        "frame_indices": torch.tensor([indices] * batch),
    }


def gradients(dit, network, **tensors) -> torch.Tensor:
    for parameter in network.parameters():
        parameter.grad = None
    flow_matching_loss(dit, **tensors).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def trainable(base, rank=4):
    dit = copy.deepcopy(base)
    network = inject_lora_(dit, NetworkConfig(network_dim=rank, network_alpha=rank), generator=seeded("weights"))
    with torch.no_grad():
        for layer in network.layers.values():
            layer.lora_up.weight.normal_(std=0.02, generator=seeded("up"))
    return dit.train(), network


def test_a_fixed_pair_noise_and_timestep_can_be_learned(base):
    dit = copy.deepcopy(base)
    network = inject_lora_(dit.train(), NetworkConfig(network_dim=16, network_alpha=16), generator=seeded("weights"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    tensors, losses = inputs(), []
    for _ in range(300):
        loss = flow_matching_loss(dit, **tensors).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if loss < losses[0] / 5:
            break
    assert losses[-1] < losses[0] / 5, losses[::50]


def test_a_fixed_pair_can_be_learned_by_the_tiny_checkpoint(tiny):
    dit = load_dit(tiny["i2v"], torch.float32, "cpu").train()
    network = inject_lora_(dit, NetworkConfig(network_dim=16, network_alpha=16), generator=seeded("weights"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    tensors, losses = inputs(), []
    tensors["text"] = torch.randn(1, 512, 64, generator=seeded("text"))
    features = torch.randn(1, 1, 257, 160, generator=seeded("image"))
    tensors["conditioning"] = tensors["conditioning"]._replace(clip=features)
    while len(losses) < 300 and (not losses or losses[-1] >= losses[0] / 5):
        loss = flow_matching_loss(dit, **tensors).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5, losses[::50]


def test_the_time_index_of_the_target_reaches_the_gradients(base):
    dit, network = trainable(base)
    near, far = (gradients(dit, network, **inputs(indices=indices)) for indices in ((0, 1), (0, 9)))
    assert rel_l2(far, near) > 1e-2


def test_items_of_a_batch_keep_their_own_indices_noise_and_timestep(base):
    dit, _ = trainable(base)
    tensors = inputs(batch=2)
    tensors["frame_indices"] = torch.tensor([[0, 1], [3, 40]])
    together = flow_matching_loss(dit, **tensors)
    conditioning = tensors.pop("conditioning")
    alone = [
        flow_matching_loss(
            dit,
            conditioning=conditioning.map(lambda tensor, i=i: tensor[i : i + 1]),
            **{key: value[i : i + 1] for key, value in tensors.items()},
        )
        for i in (0, 1)
    ]
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)
    assert together[0] != together[1]


def test_checkpointing_gives_the_same_gradients(base):
    dit, network = trainable(base)
    plain = gradients(dit, network, **inputs())
    recompute_blocks_(dit)
    assert_close(gradients(dit, network, **inputs()), plain, rtol=0, atol=0)


def test_training_needs_no_checkpointing_in_eval_mode(base):
    dit, network = trainable(base)
    assert_close(
        gradients(dit.eval(), network, **inputs()), gradients(dit.train(), network, **inputs()), rtol=1e-3, atol=1e-5
    )


def test_the_loss_is_the_mean_squared_error_of_the_velocity(base):
    tensors = inputs()
    with torch.no_grad():
        noisy = (1 - 0.4) * tensors["latents"] + 0.4 * tensors["noise"]
        velocity = base(
            noisy,
            tensors["conditioning"],
            torch.tensor([400.0]),
            tensors["text"],
            tensors["frame_indices"],
        )
        expected = ((velocity - (tensors["noise"] - tensors["latents"])) ** 2).mean()
        assert_close(flow_matching_loss(base, **tensors), expected[None], rtol=1e-5, atol=0)
        weighted = flow_matching_loss(base, **tensors, weighting_scheme="sigma_sqrt")
    assert_close(weighted, expected[None] / 0.4**2, rtol=1e-5, atol=0)


def test_random_numbers_depend_on_their_address_alone():
    first = torch.randn(4, generator=seeded(42, 1, "item"))
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, generator=seeded(42, 1, "item")), first)
    for other in ((43, 1, "item"), (42, 2, "item"), (42, 1, "other")):
        assert not torch.equal(torch.randn(4, generator=seeded(*other)), first)
