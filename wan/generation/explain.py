"""`--explain` of generation: frames, tokens, time and memory of every picture."""

from collections.abc import Sequence

from utils.text import printable, table
from wan.frames.clip import Role
from wan.frames.table import SHOWN, TableFrame, control_frames, frame_table, left_out, tokens_line
from wan.generation.guidance import GuidanceConfig
from wan.generation.request import Request
from wan.models.checkpoints import DiTCheckpoint
from wan.models.estimate import describe_parts, forward_flops, frozen_bytes, generation_parts, meta_dit, time_text
from wan.models.memory_options import MemoryConfig
from wan.nets.tokens import frame_tokens


def prompts_per_pass(request: Request, guidance: GuidanceConfig) -> tuple[int, int]:
    """(prompts in one forward pass, prompts in one step), as far as every step is guided."""
    if request.guidance == 1:
        return 1, 1
    return (1 if guidance.separate_passes else 2), 2


def request_tokens(request: Request) -> tuple[int, int]:
    """Tokens of one prompt with a picture's own frames, and with the reasoning frames too."""
    counts = [frame_tokens(size) for size in request.sizes]
    return sum(counts), sum(counts) + request.reasoning_frames * counts[-1]


def forward_tokens(request: Request, guidance: GuidanceConfig) -> int:
    """Tokens of the longest forward pass."""
    return prompts_per_pass(request, guidance)[0] * request_tokens(request)[1]


def explain_generation(
    requests: Sequence[Request],
    dit: DiTCheckpoint,
    memory: MemoryConfig,
    guidance: GuidanceConfig,
) -> list[str]:
    """A table per picture, then what all of them need."""
    lines: list[str] = []
    forwards, flops = 0, 0.0
    for number, request in enumerate(requests, start=1):
        together, in_step = prompts_per_pass(request, guidance)
        own, tokens = request_tokens(request)
        at_length = request.reasoning_steps if request.reasoning_frames else 0
        steps = ((own, request.steps - at_length), (tokens, at_length))
        cost = in_step * sum(count * forward_flops(dit.spec, length) for length, count in steps)
        forwards += in_step * request.steps
        flops += cost
        if number <= SHOWN:
            lines += [f"picture {number} of {len(requests)}, seed {request.seed}: {printable(request.prompt)}"]
            lines += [*_request_lines(request, in_step, together, cost), ""]
    lines += left_out(len(requests))
    most = max((forward_tokens(request, guidance) for request in requests), default=0)
    held, _ = meta_dit(dit, dit.dtype, memory)
    rows = [
        ("task", f"{dit.task.name}, {dit.spec.num_layers} blocks of width {dit.spec.dim}"),
        ("runs", f"T5, CLIP and the VAE once per text and image, the DiT {forwards} times over one prompt"),
        ("expected time", time_text(flops)),
        ("expected memory", describe_parts(generation_parts(frozen_bytes(held), dit.spec, most))),
    ]
    return [*lines, *table(rows)]


def _request_lines(request: Request, in_step: int, together: int, cost: float) -> list[str]:
    target = TableFrame("target", "(generated)", (request.width, request.height), None, None)
    frames = [*control_frames(request), target]
    added = [slot.time_index for slot in request.clip.slots if slot.role is Role.SCRATCH]
    reasoning = [
        f"reasoning frames at RoPE index {', '.join(map(str, added))} in the first {request.reasoning_steps} steps: "
        f"{request_tokens(request)[1]} tokens"
    ]
    how = "one prompt" if in_step == 1 else f"both prompts {'together' if together == 2 else 'one after the other'}"
    return [
        *frame_table(request.layout, frames),
        tokens_line(request.layout, frames, len(request.clip_images)),
        *(reasoning if added else ()),
        f"CLIP sees {', '.join(map(str, request.clip_images))}",
        f"{request.steps} steps of {request.solver}, shift {request.shift:g}, guidance {request.guidance:g}: {how} "
        f"in each, {cost / 1e12:.3g} TFLOP",
    ]
