"""How fast one-frame generation, training and the VAE are, beside what the GPU can do. Random weights, real sizes.

    python benchmarks/one_frame_speed.py                        every row
    python benchmarks/one_frame_speed.py --only forward guided  rows whose names contain one of these words
    python benchmarks/one_frame_speed.py --only none --profile "forward bf16 1024x1024 2 frames"
    python benchmarks/one_frame_speed.py --size tiny            a smoke test on a CPU, in seconds

Ceilings are measured first, in the same call. A row is the median of --repeat runs; what comes before them is reported
as warm-up: it compiles kernels and lets the libraries choose theirs. Floor: the time of the matrix products and of the
attention alone, at the ceilings.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.measure import HEADER, Bench, last_line, measure_ceilings
from benchmarks.random_model import SPECS, dit_inputs, latent_size, loss_inputs, random_checkpoint
from wan.files.load import load_dit
from wan.fused.dit import can_fuse
from wan.fused.graphs import GraphedGradients
from wan.fused.vae import fuse_vae_
from wan.lora.network import LoRANetwork, inject_lora_
from wan.lora.options import NetworkConfig
from wan.memory.fp8 import Fp8Rows, product_of_rows, quantize_rows
from wan.memory.recompute import recompute_blocks_
from wan.models.device import DeviceConfig
from wan.models.estimate import pass_flops
from wan.models.memory_options import GenerationMemoryConfig, apply_memory_options_
from wan.nets.context import StepCache
from wan.nets.dit import BlockRunner, WanDiT
from wan.nets.spec import CLIP_TOKENS, LATENT_CHANNELS, TEXT_LENGTH, DiTSpec
from wan.nets.tokens import token_count
from wan.nets.vae import WanVAE
from wan.training.loss import flow_matching_loss
from wan.training.optimizers import OptimizerConfig, build_optimizer

FORWARDS = ((576, 384, 2), (832, 480, 2), (1024, 1024, 2), (1024, 1024, 3))  # width, height, latent frames
STEPS = ((576, 384, "none"), (832, 480, "none"), (832, 480, "all"), (1024, 1024, "auto"), (1024, 1024, "all"))
NETWORK = NetworkConfig(network_dim=32, network_alpha=32)
PICTURES = ((1024, 1024), (832, 480))


def sizes(bench: Bench, cases: tuple) -> list[tuple]:
    """The cases; with the tiny model one of each kind, of 32 x 32."""
    return sorted({(32, 32, *rest) for _, _, *rest in cases}) if bench.tiny else list(cases)


def forward_flops(spec: DiTSpec, tokens: int, batch: int = 1) -> tuple[float, float]:
    """Matrix products and attention of a forward pass of i2v, text and image projected beforehand."""
    products, attention = pass_flops(spec, tokens, context=TEXT_LENGTH + CLIP_TOKENS)
    return batch * products, batch * attention


def step_flops(spec: DiTSpec, tokens: int) -> tuple[float, float]:
    """Forward, and backward without weight gradients: products twice, attention 3.5 times (its backward has five)."""
    products, attention = forward_flops(spec, tokens)
    return 2 * products, 3.5 * attention


def load(bench: Bench, spec: DiTSpec, backend: str, fp8_fast: bool = False) -> WanDiT:
    start = time.perf_counter()
    memory = GenerationMemoryConfig(fp8_fast=fp8_fast, dit_backend=backend)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    with random_checkpoint(spec, bench.device):
        dit = load_dit("dit.safetensors", dtype, bench.device, fp8=memory.fp8_kind)
    apply_memory_options_(dit, memory, bench.device)
    bench.synchronize()
    print(f"{spec.num_layers} blocks of random weights made in {time.perf_counter() - start:.1f} s", flush=True)
    return dit


@torch.no_grad()
def forward(dit: WanDiT, tensors: dict[str, Any], kept: StepCache | None = None) -> Tensor:
    timesteps = torch.full((len(tensors["latents"]),), 700.0, device=tensors["text"].device)
    return dit(**tensors, timesteps=timesteps, cache=kept)


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    expected = expected.double()
    return ((found.to(expected) - expected).norm() / expected.norm()).item()


def seeded(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(5)


def forward_rows(bench: Bench, model: Callable[[], WanDiT], kind: str, reference: dict[str, Tensor]) -> None:
    """A forward pass, and both passes of guidance as one batch, with the keys and values of the text kept.

    reference: velocities by size; the first kind fills it and the others are compared with it.
    """
    for width, height, frames in sizes(bench, FORWARDS):
        name = f"{width}x{height} {frames} frames"
        tokens = token_count(latent_size(width, height, frames), None)

        def prepare(batch, name=name, shape=(width, height, frames)):
            tensors, kept = dit_inputs(bench.spec, bench.device, shape, batch), StepCache()
            found = forward(model(), tensors, kept).cpu()
            forward(model(), tensors, kept)  # records a graph
            expected = reference.get(f"{name} {batch}")
            reference.setdefault(f"{name} {batch}", found)
            note = f"finite: {bool(found.isfinite().all())}"
            if expected is not None:
                note += f", differs from bf16 by {relative(found, expected):.2%}"
            return partial(forward, model(), tensors, kept), note

        bench.row(f"forward {kind} {name}", partial(prepare, 1), forward_flops(bench.spec, tokens), kind, model)
        if width <= 576:
            flops = forward_flops(bench.spec, tokens, 2)
            bench.row(f"guided {kind} {name}, as one batch", partial(prepare, 2), flops, kind, model)


def lora_rows(bench: Bench, model: Callable[[], WanDiT]) -> None:
    """Training steps: forward, backward, clipping and AdamW, with as much recomputed as the row says."""

    @cache
    def trained() -> tuple[WanDiT, LoRANetwork, torch.optim.Optimizer, BlockRunner]:
        dit = model()
        network = inject_lora_(dit, NETWORK)
        return dit.train(), network, optimizer_of(network), dit.runner

    for width, height, mode in sizes(bench, STEPS):

        def prepare(shape=(width, height, 2), mode=mode):
            dit, network, optimizer, runner = trained()
            dit.runner = runner
            if mode != "none":
                recompute_blocks_(dit, only_needed=mode == "auto")
            gradients = gradients_of(dit, network, recorded=not bench.tiny)
            step = partial(training_step, network, gradients, optimizer, loss_inputs(bench.spec, bench.device, shape))
            step()  # a graph is recorded at the second step
            return step, ""

        name = f"LoRA step {width}x{height}, recompute {mode}"
        tokens = token_count(latent_size(width, height, frames=2), None)
        bench.row(name, prepare, step_flops(bench.spec, tokens), load=trained)


def optimizer_of(network: LoRANetwork) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(learning_rate=1e-4), network.param_groups(1e-4))


def gradients_of(dit: WanDiT, network: LoRANetwork, recorded: bool) -> Callable[[dict[str, Any]], Sequence[Tensor]]:
    """Gradients of the loss by what is trained, from its inputs."""
    loss, parameters = partial(flow_matching_loss, dit), list(network.parameters())
    if not recorded:
        return lambda tensors: torch.autograd.grad(loss(**tensors).mean(), parameters)
    replayed = GraphedGradients(loss, parameters)
    return lambda tensors: replayed(tensors, torch.ones((), device=tensors["t"].device))[1]


def training_step(network: LoRANetwork, gradients: Callable, optimizer, tensors: dict[str, Any]) -> None:
    for parameter, gradient in zip(network.parameters(), gradients(tensors), strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def error_rows(bench: Bench) -> None:
    """Distance from float64 of two blocks of the real width: plain and fused, velocity and LoRA gradients."""
    spec = replace(bench.spec, num_layers=2)
    width, height, frames = sizes(bench, FORWARDS[:1])[0]
    tensors = dit_inputs(bench.spec, bench.device, (width, height, frames))

    def results(backend: str, double: bool = False) -> tuple[Tensor, ...]:
        dit = load(bench, spec, backend)
        network = inject_lora_(dit, NetworkConfig(network_dim=8, network_alpha=8), generator=seeded())
        for layer in network.layers.values():
            nn.init.normal_(layer.lora_up.weight, std=0.02, generator=seeded(bench.device))
        if not double:
            return velocities_and_gradients(dit, network, tensors)
        conditioning = tensors["conditioning"].map(Tensor.double)
        alone = {name: tensor for name, tensor in tensors.items() if name != "conditioning"}
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in alone.items()}
        doubles["conditioning"] = conditioning
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # the DiT asks for float32 here and there
            return velocities_and_gradients(dit.double(), network, doubles)

    expected = cache(partial(results, "plain", double=True))

    def prepare(backend: str):
        errors = [relative(one, other) for one, other in zip(results(backend), expected(), strict=True)]
        words = ("velocity with LoRA beside", "with LoRA merged", "LoRA gradients")
        return lambda: None, ", ".join(f"{word} {error:.2e}" for word, error in zip(words, errors, strict=True))

    for backend in ("plain", "fused") if can_fuse(bench.device) else ("plain",):
        bench.row(f"error of {backend} against float64", partial(prepare, backend))


def velocities_and_gradients(dit: WanDiT, network: LoRANetwork, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    timesteps = torch.full((1,), 700.0, device=tensors["text"].device)
    velocity = dit.train()(**tensors, timesteps=timesteps)
    velocity.square().mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    return velocity.detach(), forward(dit.eval(), tensors), gradients


def kernel_rows(bench: Bench) -> None:
    """The fused kernels alone, at 8192 tokens: bytes per second, to compare with the copy."""
    if not can_fuse(bench.device):
        return
    from wan.fused import kernels

    length, dim = 8192, bench.spec.dim
    x = torch.randn(1, length, dim, device=bench.device)
    h, modulation = x.bfloat16(), torch.randn(1, 6, dim, device=bench.device)
    hidden = torch.randn(1, length, bench.spec.ffn_dim, device=bench.device, dtype=torch.bfloat16)
    weight = torch.ones(dim, device=bench.device, dtype=torch.bfloat16)
    cos, sin = (torch.rand(1, length, 64, device=bench.device) for _ in range(2))
    size, gate, scale, shift = length * dim, modulation[:, 2], modulation[:, 1], modulation[:, 0]
    norm = partial(kernels.residual_norm_, x)
    cases = {
        "residual, norm": (12 * size, lambda: norm(h, gate, scale, shift, 1e-6, True, h.dtype)),
        "residual, norm, fp8": (11 * size, lambda: norm(h, gate, scale, shift, 1e-6, True, h.dtype, True)),
        "norm": (6 * size, lambda: norm(None, None, scale, shift, 1e-6, True, h.dtype)),
        "rms, rope": (4 * size, lambda: kernels.rms_rope_(h, weight, cos, sin, 1e-6)),
        "rms": (4 * size, lambda: kernels.rms_rope_(h, weight, None, None, 1e-6)),
        "quantise": (3 * size, lambda: kernels.quantized(h)),
        "gelu, quantise": (3 * hidden.numel(), lambda: kernels.quantized(hidden, gelu=True)),
    }
    for name, (moved, work) in cases.items():
        if bench.wants(f"kernel {name}"):
            print(f"kernel {name}: {rate(bench, moved, work)} TB/s", flush=True)


def product_rows(bench: Bench) -> None:
    """The matrix products of a block alone."""
    dim, ffn = bench.spec.dim, bench.spec.ffn_dim
    for length in () if bench.tiny else (1728, 3456, 8192):
        for name, outputs, width in (("q", dim, dim), ("q k v", 3 * dim, dim), ("up", ffn, dim), ("down", dim, ffn)):
            if not bench.wants(f"product {name} {length}"):
                continue
            make = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
            x, weight, bias = make(length, width), make(outputs, width), make(outputs)
            x8, weight8 = quantize_rows(x), Fp8Rows(*quantize_rows(weight))
            cases = {
                "bf16": partial(nn.functional.linear, x, weight, bias),
                "with gelu": partial(torch._addmm_activation, bias, x, weight.t(), use_gelu=True),
                "fp8": partial(product_of_rows, x8, weight8, bias, torch.bfloat16),
            }
            flops = 2 * length * width * outputs
            found = ", ".join(f"{kind} {rate(bench, flops, work)}" for kind, work in cases.items())
            print(f"product {name} of {length} tokens, TFLOP/s: {found}", flush=True)


def rate(bench: Bench, amount: float, work: Callable[[], object]) -> str:
    """Trillions of `amount` per second."""
    try:
        return f"{amount / bench.seconds(work, 10)[0] / 1e12:.2f}"
    except Exception as error:
        return last_line(error)


@torch.no_grad()
def vae_rows(bench: Bench) -> None:
    torch.manual_seed(0)
    vae = WanVAE(16 if bench.tiny else 96).to(bench.device).eval().requires_grad_(False)
    reference: dict[str, Tensor] = {}
    for kind in ("plain float32", "plain", "fused"):
        torch.backends.cudnn.allow_tf32 = kind != "plain float32"
        if kind == "plain" and not bench.tiny:
            vae.bfloat16()
        if kind == "fused" and not can_fuse(bench.device):
            return
        if kind == "fused":
            fuse_vae_(vae)
        for width, height in sizes(bench, PICTURES):
            pixels = torch.rand(1, 3, 1, height, width, device=bench.device, generator=seeded(bench.device)) * 2 - 1
            shape = (1, LATENT_CHANNELS, *latent_size(width, height, frames=1))
            latents = torch.randn(shape, device=bench.device, generator=seeded(bench.device))
            for name, work in (("encode", partial(vae.encode, pixels)), ("decode", partial(vae.decode, latents))):
                key = f"{name} {width}x{height}"

                def prepare(work=work, key=key):
                    found = work().cpu()
                    error = relative(found, reference.setdefault(key, found))
                    return work, f"differs from float32 by {error:.2%}"

                bench.row(f"VAE {key} {kind}", prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SPECS, default="14B")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names contain one of these words")
    parser.add_argument("--profile", help="also print the top kernels of the row of this name")
    parser.add_argument("--dit_backend", choices=("auto", "plain", "fused"), default="auto")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = DeviceConfig("cpu" if arguments.size == "tiny" else "cuda").resolve()
    bench = Bench(device, SPECS[arguments.size], arguments.repeat, arguments.only, arguments.profile)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    measure_ceilings(bench)
    print(HEADER)
    bf16 = cache(partial(load, bench, bench.spec, arguments.dit_backend))
    fp8 = cache(partial(load, bench, bench.spec, arguments.dit_backend, fp8_fast=True))
    reference: dict[str, Tensor] = {}
    groups = [partial(rows, bench) for rows in (kernel_rows, product_rows, error_rows, vae_rows)]
    groups += [partial(forward_rows, bench, bf16, "bf16", reference), partial(lora_rows, bench, bf16), bf16.cache_clear]
    groups += [partial(forward_rows, bench, fp8, "fp8", reference)] if "fp8" in bench.ceilings else []
    for group in groups:
        try:
            group()
        except Exception as error:
            print(f"| {group} | {last_line(error)} | | | | | | |", flush=True)
        bench.free()


if __name__ == "__main__":
    main()
