"""`--explain`: what a run would do, as text: frames, sizes, tokens, memory. No weights are loaded for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.buckets import Fit
from dataset.cache import read_header, read_latent_cache
from dataset.config import DatasetsConfig, read_config
from dataset.loader import TrainingItem, TrainingSet
from dataset.sources import Item, find_all_items
from utils.cli import option
from utils.dtypes import dtype_name
from utils.images import open_masked
from utils.tables import table
from wan.checkpoint import load_tokenizer
from wan.config import CLIP_TOKENS, TEXT_LENGTH, DiTSpec, TaskSpec
from wan.encoding import latent_mask
from wan.footprint import (
    expected_memory,
    forward_tokens,
    frame_tokens,
    frozen_bytes,
    generation_parts,
    passes,
    request_tokens,
    size_text,
    told,
    weightless_dit,
)
from wan.frame_sizes import Size, frame_of
from wan.guidance import GuidanceConfig
from wan.lora_files import LoRAFile
from wan.memory import MemoryConfig
from wan.models import DiTConfig
from wan.one_frame import OneFrameLayout
from wan.report import dataset_rows, start_table
from wan.request import Request
from wan.t5 import clean_prompt
from wan.training_options import TrainingOptions

_SHOWN = 8  # frame tables of one run
_H100_FLOPS = 2.8e14  # a second: the forward pass of docs/performance.md, 8192 tokens in 0.89 s


@dataclass(frozen=True)
class ExplainConfig:
    """explaining"""

    explain: bool = option(
        False, help="print frames, sizes, tokens and expected memory of the run, and end before weights are loaded"
    )


@dataclass(frozen=True)
class _Frame:
    """What is put into one slot."""

    name: str  # "control 0", "target"
    file: str
    size: Size  # width and height in pixels
    fit: Fit | None  # None: nothing is resized
    used: float | None  # share that its mask leaves; None without a mask


def frame_table(layout: OneFrameLayout, frames: Sequence[_Frame]) -> list[str]:
    """A row per slot. frames: the controls as given, then the target."""
    rows = [("slot", "role", "RoPE index", "file", "size", "cropped", "mask used", "tokens")]
    for slot, i in enumerate(layout.order):
        frame = frames[i]
        wide = "{}x{}".format(*frame.size)
        rows.append(
            (
                *(str(slot), frame.name, str(layout.frame_indices[slot]), frame.file),
                "{}x{} -> {}".format(*frame.fit.size, wide) if frame.fit else wide,
                f"{frame.fit.cropped:.1%}" if frame.fit else "",
                "all" if frame.used is None else f"{frame.used:.0%}",
                str(frame_tokens(frame.size)),
            )
        )
    return table(rows)


def _file_frame(name: str, path: Path, mask: Path | None, fit: Fit, masked: bool) -> _Frame:
    """masked: whether a mask counts at all."""
    coverage = open_masked(path, name, mask)[1] if masked else None
    used = None if coverage is None else float(latent_mask(coverage, fit.bucket, fit.crop_only).mean())
    return _Frame(name, str(path), fit.bucket, fit, used)


def _control_frames(made: Item | Request) -> list[_Frame]:
    """The control images of an item or a picture. The causal layout takes no masks of them."""
    files = zip(made.controls, made.control_masks, made.control_fits, strict=True)
    masked = not made.layout.causal
    return [_file_frame(f"control {i}", *file, masked) for i, file in enumerate(files)]


def _tokens_line(layout: OneFrameLayout, frames: Sequence[_Frame], images: int) -> str:
    each = [frame_tokens(frames[i].size) for i in layout.order]
    counts = f"{len(each)} frames x {each[0]}" if len(set(each)) == 1 else " + ".join(map(str, each))
    context = f"{TEXT_LENGTH} of the text and {CLIP_TOKENS * images} of CLIP"
    return f"tokens per forward: {counts} = {sum(each)}, which also look at {context}"


# --- caching


def latents(dataset_config: Path, layout: str | None, batch_size: int | None, weights: Sequence[Path]) -> list[str]:
    """Latent caching: the first item of each dataset, size and layout. weights: the model files, for their sizes."""
    config = read_config(dataset_config, batch_size, layout)
    items = find_all_items(config, need_controls=True)
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault((item.dataset, item.bucket, str(item.layout), item.sizes), []).append(item)
    lines = []
    for (index, size, *_), group in list(groups.items())[:_SHOWN]:
        item = group[0]
        wide = "{}x{}".format(*size)
        lines += [f"dataset {index}, {wide}, {item.layout}: {len(group)} items, the first is {item.stem}"]
        lines += [*frame_table(item.layout, _item_frames(item)), ""]
    lines += _left_out(len(groups))
    images = sum(1 + len(item.controls) for item in items)
    largest = max(items, key=lambda item: item.bucket[0] * item.bucket[1])
    rows = [
        ("runs", f"the VAE over {images} images, CLIP over {images - len(items)} control images, each uncropped"),
        ("writes", f"{len(items)} caches to {_folders(config)}"),
        ("batches", ", ".join(f"dataset {i}: {one.batch_size}" for i, one in enumerate(config.datasets)) + " at most"),
        ("largest image", "{}x{}".format(*largest.bucket)),
        ("weights", _file_sizes(weights)),
    ]
    return [*lines, start_table(rows)]


def _item_frames(item: Item) -> list[_Frame]:
    target = _file_frame("target", item.target, item.target_mask, item.target_fit, masked=True)
    return [*_control_frames(item), target]


def texts(dataset_config: Path, batch_size: int | None, tokenizer: Path | None, weights: Path) -> list[str]:
    """Text caching: how long the captions are."""
    config = read_config(dataset_config, batch_size)
    items = find_all_items(config, need_controls=False)
    read = load_tokenizer(tokenizer)
    lengths = {item.caption: len(read(clean_prompt(item.caption)).input_ids) for item in items}
    counts = [lengths[item.caption] for item in items]
    longest = max(items, key=lambda item: lengths[item.caption])
    rows = [
        ("runs", f"T5 over {len(items)} captions, {len(lengths)} of them different"),
        ("tokens", f"{min(counts)} to {max(counts)}, {sum(counts) / len(counts):.0f} in the mean"),
        ("longest caption", str(longest.target)),
        ("cut", f"{sum(count > TEXT_LENGTH for count in counts)} captions at {TEXT_LENGTH} tokens"),
        ("writes", f"{len(items)} caches to {_folders(config)}"),
        ("weights", _file_sizes([weights])),
    ]
    return [start_table(rows)]


def _folders(config: DatasetsConfig) -> str:
    return ", ".join(str(dataset.cache_directory) for dataset in config.datasets)


def _file_sizes(paths: Sequence[Path]) -> str:
    return ", ".join(f"{path.name} {size_text(path.stat().st_size)}" for path in paths)


def _left_out(count: int) -> list[str]:
    return [f"... and {count - _SHOWN} more", ""] if count > _SHOWN else []


# --- generation


def generation(
    requests: Sequence[Request],
    task: TaskSpec,
    dit: DiTConfig,
    memory: MemoryConfig,
    guidance: GuidanceConfig,
) -> list[str]:
    """A table per picture, then what all of them need."""
    lines, forwards, flops, most = [], 0, 0.0, 0
    for number, request in enumerate(requests, start=1):
        together, in_step = passes(request, guidance)
        own, tokens = request_tokens(request)
        at_length = request.reasoning_steps if request.reasoning.count else 0
        steps = ((own, request.steps - at_length), (tokens, at_length))
        cost = in_step * sum(count * forward_flops(dit.spec, length) for length, count in steps)
        forwards, flops, most = (
            forwards + in_step * request.steps,
            flops + cost,
            max(most, forward_tokens(request, guidance)),
        )
        if number <= _SHOWN:
            lines += [f"picture {number} of {len(requests)}, seed {request.seed}: {request.prompt}"]
            lines += [*_request_lines(request, in_step, together, cost), ""]
    lines += _left_out(len(requests))
    held, _ = weightless_dit(dit, dit.dtype, memory)
    rows = [
        ("task", f"{task.name}, {dit.spec.num_layers} blocks of width {dit.spec.dim}"),
        ("runs", f"T5, CLIP and the VAE once per text and image, the DiT {forwards} times over one prompt"),
        ("expected time", _time(flops)),
        ("expected memory", told(generation_parts(frozen_bytes(held), dit.spec, most))),
    ]
    return [*lines, start_table(rows)]


def _request_lines(request: Request, in_step: int, together: int, cost: float) -> list[str]:
    target = _Frame("target", "(generated)", (request.width, request.height), None, None)
    frames = [*_control_frames(request), target]
    added = request.reasoning.indices
    reasoning = [
        f"reasoning frames at RoPE index {', '.join(map(str, added))} in the first {request.reasoning_steps} steps: "
        f"{request_tokens(request)[1]} tokens"
    ]
    how = "one prompt" if in_step == 1 else f"both prompts {'together' if together == 2 else 'one after the other'}"
    return [
        *frame_table(request.layout, frames),
        _tokens_line(request.layout, frames, len(request.clip_images)),
        *(reasoning if added else ()),
        f"CLIP sees {', '.join(map(str, request.clip_images))}",
        f"{request.steps} steps of {request.solver}, shift {request.shift:g}, guidance {request.guidance:g}: {how} "
        f"in each, {cost / 1e12:.3g} TFLOP",
    ]


# --- training


def training(
    options: TrainingOptions,
    dit: DiTConfig,
    task: TaskSpec,
    training_set: TrainingSet,
    weights: LoRAFile | None,
    processes: int,
) -> list[str]:
    """A table per dataset, size and layout, then what a step needs. weights: the LoRA that training starts from."""
    run, memory = options.run, options.memory
    groups: dict[tuple, TrainingItem] = {}
    for item in training_set.items:
        header = read_header(item.latents)
        groups.setdefault((item.key.split("/")[0], header.bucket, str(item.layout), header.sizes), item)
    lines = []
    for (dataset, size, layout, _), item in list(groups.items())[:_SHOWN]:
        lines += [f"dataset {dataset}, {'{}x{}'.format(*size)}, {layout}: for example {item.latents.name}"]
        frames = _cached_frames(item)
        lines += [*frame_table(item.layout, frames), _tokens_line(item.layout, frames, task.clip_images), ""]
    lines += _left_out(len(groups))
    dtype = run.compute_dtype(dit.dit_dtype) or dit.stored_dtype
    held, network = weightless_dit(dit, dtype, memory, options.network, weights)
    steps = len(training_set.epoch_steps(1, run.gradient_accumulation_steps * processes))
    total = run.max_train_epochs * steps if run.max_train_epochs else run.max_train_steps
    epoch = sum(_training_flops(dit.spec, training_set, recomputed=memory.gradient_checkpointing != "none"))
    rows = [
        ("task", f"{task.name}, {dit.spec.num_layers} blocks of width {dit.spec.dim}"),
        *dataset_rows(training_set),
        ("network", str(network.summary())),
        ("precision", f"DiT {dtype_name(dtype)}, LoRA float32"),
        ("steps", f"{total}, {steps} in an epoch" + f", in {processes} processes" * (processes > 1)),
        ("expected time", _time(epoch * total / steps)),
        ("expected memory", expected_memory(held, network, dit.spec, training_set.buckets, memory)),
    ]
    return [*lines, start_table(rows)]


def _cached_frames(item: TrainingItem) -> list[_Frame]:
    cache = read_latent_cache(item.latents)
    controls, used = len(item.layout.control_indices), {}
    for slot, i in enumerate(cache.layout.order):
        given = frame_of(cache.condition[:4], slot, cache.frame_sizes).amax(dim=0).float()
        if i < controls and bool((given < 1).any()):
            used[i] = float(given.mean())
    if cache.target_mask is not None:
        used[controls] = float(cache.target_mask.mean())
    sizes = cache.sizes or [read_header(item.latents).bucket] * (controls + 1)
    names = [*(f"control {i}" for i in range(controls)), "target"]
    return [_Frame(name, "(cached)", sizes[i], None, used.get(i)) for i, name in enumerate(names)]


def _training_flops(spec: DiTSpec, training_set: TrainingSet, recomputed: bool) -> Iterator[float]:
    """Of the items of each bucket: forward, the gradients of the activations, and forward again when recomputed."""
    for bucket in training_set.buckets:
        yield bucket.items * (3 if recomputed else 2) * forward_flops(spec, bucket.tokens)


# --- estimates


def forward_flops(spec: DiTSpec, tokens: int) -> float:
    """Floating point operations of one forward pass of one item: 2 per weight and token, 4 per pair of tokens and
    channel for attention. Text and image tokens are left out."""
    per_block = 6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim  # q, k, v, o; q and o of the text; both layers of the ffn
    return spec.num_layers * (2.0 * tokens * per_block + 4.0 * tokens**2 * spec.dim)


def _time(flops: float) -> str:
    """On the one GPU that was measured; others differ."""
    seconds = flops / _H100_FLOPS
    shown = f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{flops / 1e12:.3g} TFLOP, about {shown} on an H100 without fp8 and compiling"
