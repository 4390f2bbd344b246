"""A small DiT with random weights, inputs for it and its LoRA gradients: what the memory options must not change."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.generation.experts import Experts
from wan.generation.pipeline import Encoded, denoise
from wan.lora.network import LoRANetwork, inject_lora_
from wan.lora.options import NetworkConfig
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.nets.dit import Block, WanDiT
from wan.nets.spec import DiTSpec

SPEC = DiTSpec("i2v", dim=128, ffn_dim=192, num_layers=4, in_dim=36, text_dim=32, image_dim=48)
CPU = torch.device("cpu")
DEVICES = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, [B, L, N, D], that repeats to the bit: on a GPU the backward pass of torch's own does not."""
    weights = (torch.einsum("blnd,bmnd->bnlm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bnlm,bmnd->blnd", weights, v)


@torch.no_grad()
def random_dit(spec: DiTSpec = SPEC) -> WanDiT:
    """Every parameter random, frozen, in eval mode; weights are of the size that those of the published models have."""
    generator = torch.Generator().manual_seed(0)
    model = WanDiT(spec, attention)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03 + ("norm" in name))
    return model.eval().requires_grad_(False)


def with_lora(model: WanDiT) -> LoRANetwork:
    """LoRA layers, in train mode, whose product is not zero."""
    settings = NetworkConfig(network_dim=4, network_alpha=4.0)
    network = inject_lora_(model, settings, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in network.layers.values():
            drawn = torch.randn(layer.lora_up.weight.shape, generator=torch.Generator().manual_seed(2))
            layer.lora_up.weight.copy_(0.02 * drawn)  # the same on every device
    model.train()
    return network


def arguments(device: torch.device = CPU, batch: int = 1, spec: DiTSpec = SPEC) -> tuple[Any, ...]:
    """Inputs of WanDiT.forward: two frames at times 0 and 3."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    latents, channels, text, clip = (
        *(draw(16, 2, 4, 6), draw(20, 2, 4, 6)),
        *(pad_text(list(draw(7, spec.text_dim))), draw(1, 257, spec.image_dim)),
    )
    tensors = (torch.linspace(900, 400, batch), text, torch.tensor([[0, 3]] * batch))
    conditioning = Conditioning(channels, clip).map(lambda tensor: tensor.to(device))
    return latents.to(device), conditioning, *(tensor.to(device) for tensor in tensors)


def watch_blocks_(model: WanDiT, seen: Callable[[int, Tensor], object]) -> None:
    """Call `seen` with the number of each block and its input before the runner runs it."""
    numbers, runner = {block: number for number, block in enumerate(model.blocks)}, model.runner

    def watched(block: Block, x: Tensor, *shared) -> Tensor:
        seen(numbers[block], x)
        return runner(block, x, *shared)

    model.runner = watched


def all_rows(text: Tensor) -> Tensor:
    """A text from `pad_text` with the rows that it leaves out, for models that are not ours."""
    return F.pad(text, (0, 0, 0, 512 - text.shape[1]))


def velocity(model: WanDiT, **options) -> Tensor:
    """Without gradients, on the CPU."""
    with torch.inference_mode():
        return model(*arguments(model.patch_embedding.weight.device, **options)).cpu()


def denoised(dit: WanDiT, item: Encoded, **options) -> Tensor:
    """The latents that one DiT makes of an encoded request, on the CPU. options: see `denoise`."""
    return denoise(Experts.one(dit, item.request.guidance), item, CPU, **options)


def lora_gradients(model: WanDiT, network: LoRANetwork, **options) -> Tensor:
    """Gradients of a loss by all LoRA weights, in one vector on the CPU."""
    for parameter in network.parameters():
        parameter.grad = None
    model(*arguments(model.patch_embedding.weight.device, **options)).square().mean().backward()
    return torch.cat([parameter.grad.flatten().cpu() for parameter in network.parameters()])
