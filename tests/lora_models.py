"""Small models with LoRA layers, for tests."""

import torch
from torch import nn

from wan.lora.files import read_lora
from wan.lora.merge import Merger
from wan.lora.network import LoRANetwork, inject_lora_
from wan.lora.options import NetworkConfig


def toy(dtype=torch.float32):
    """Blocks of two linear layers, one of which has a forbidden name, and a linear layer outside the blocks."""

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(6, 10), nn.GELU()), "head": nn.Linear(10, 6)})
                for _ in range(2)
            )
            self.img_emb = nn.Linear(6, 6)

        def forward(self, x):
            x = self.img_emb(x)
            for block in self.blocks:
                x = block["head"](block["ffn"](x))
            return x

    torch.manual_seed(0)
    return Toy().to(dtype)


def config(rank=3, alpha=2.0, *args, **settings) -> NetworkConfig:
    return NetworkConfig(network_dim=rank, network_alpha=alpha, network_args=args, **settings)


def trained(model, rank=3, alpha=2.0, *args, **settings) -> LoRANetwork:
    """A network whose weights are all random: as if it had been trained."""
    network = inject_lora_(model, config(rank, alpha, *args, **settings))
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5, generator=random)
    return network


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def merged_copy(path, dtype, multiplier=1.0):
    """The toy with a file merged into its weights, as the loader does it."""
    model = toy(dtype)
    merger = Merger([(read_lora(path), multiplier)], shapes_of(model))
    model.load_state_dict({name: merger(name, tensor) for name, tensor in model.state_dict().items()})
    return model
