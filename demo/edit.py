"""Teach the miniature an edit that it does not know, "wears a school uniform", with the four scripts on this machine:

    python -m demo.edit            about 40 pairs, 16 held-out starts; then the same between two images with flf2v
    python -m demo.edit --short    a small part of it, to see that everything works

Writes demo/out/index.html and demo/out/sheet.png (start, base model, LoRA, truth), prints a table of figures and ends
with 1 when one of them misses its limit.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.figures import clip
from demo.judge import Score, score
from demo.miniature import FILES, FOLDER
from demo.page import Row, write_page
from demo.world import Scene, in_uniform, sample_scene

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo" / "out"
TRAINING_SEED, HELD_OUT_SEED = 300_000_000, 800_000_000
MOTIONS = ("wave", "turn left", "lift", "turn right", "lean")  # between two images, in place

DATASET = """\
[general]
resolution = [96, 96]
caption_extension = ".txt"
enable_bucket = true
batch_size = {batch}

[[datasets]]
image_directory = "{name}/target"
control_directory = "{name}/start"
cache_directory = "{name}/cache"
fp_1f_clean_indices = {controls}
fp_1f_target_index = 1
"""


@dataclass(frozen=True)
class Lesson:
    """One model and what it is asked. Its files are in OUT / name."""

    name: str  # of the model: i2v or flf2v
    pairs: int
    steps: int
    tests: int
    batch: int = 4
    sampling_steps: int = 8

    @property
    def controls(self) -> list[int]:
        return [0] if self.name == "i2v" else [0, 2]

    @property
    def one_frame(self) -> str:
        return f"control_index={';'.join(map(str, self.controls))},target_index=1"


@dataclass(frozen=True)
class Limits:
    """What the figures must reach."""

    gain: float = 8.0  # dB of the LoRA's output over the base model's, to the truth
    edited_psnr: float = 24.0
    attribute: float = 15 / 16
    drift: float = 0.03


FULL = (Lesson("i2v", pairs=40, steps=300, tests=16), Lesson("flf2v", pairs=40, steps=200, tests=8))
SHORT = (Lesson("i2v", pairs=8, steps=20, tests=2),)


@dataclass(frozen=True)
class Example:
    """Start pictures (one, or two for flf2v) and the edited picture, [3, height, width] uint8."""

    scene: Scene
    starts: list[Tensor]
    plain: Tensor  # the truth without the edit: what the unedited parts are compared with
    truth: Tensor


def example(lesson: Lesson, number: int, held_out: bool) -> Example:
    """The example of this number. One image: the same moment in uniform; two: the moment between them in uniform."""
    seed = (HELD_OUT_SEED if held_out else TRAINING_SEED) + number
    if lesson.name == "i2v":
        scene = sample_scene(seed, held_out, action="stand")
        start = clip(scene, (0,))[0]
        return Example(scene, [start], start, clip(in_uniform(scene), (0,))[0])
    scene = sample_scene(seed, held_out, action=MOTIONS[number % len(MOTIONS)])
    first, middle, last = clip(scene, (0, 2, 4))
    return Example(scene, [first, last], middle, clip(in_uniform(scene), (2,))[0])


def write_data(lesson: Lesson) -> None:
    """Pairs with captions, and the start pictures of the tests."""
    folder = OUT / lesson.name
    for part in ("target", "start", "test"):
        (folder / part).mkdir(parents=True)
    for number in range(lesson.pairs):
        pair = example(lesson, number, held_out=False)
        save(pair.truth, folder / f"target/{number:03}.png")
        (folder / f"target/{number:03}.txt").write_text(pair.scene.edit_caption, encoding="utf-8")
        save_starts(pair, folder / "start", number)
    lines = []
    for number in range(lesson.tests):
        test = example(lesson, number, held_out=True)
        images = " ".join(f"--ci {lesson.name}/test/{name}" for name in save_starts(test, folder / "test", number))
        width, height = test.scene.size
        size = f"--w {width} --h {height} --d {number} --s {lesson.sampling_steps}"
        lines.append(f"{test.scene.edit_caption} {images} --of {lesson.one_frame} {size} --l 1 --fs 3")
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    text = DATASET.format(name=lesson.name, batch=lesson.batch, controls=lesson.controls)
    (folder / "dataset.toml").write_text(text, encoding="utf-8")


def save_starts(pair: Example, folder: Path, number: int) -> list[str]:
    """Writes `003.png`, or `003_0.png` and `003_1.png`; returns the names."""
    suffixes = [""] if len(pair.starts) == 1 else [f"_{i}" for i in range(len(pair.starts))]
    names = [f"{number:03}{suffix}.png" for suffix in suffixes]
    for start, name in zip(pair.starts, names, strict=True):
        save(start, folder / name)
    return names


def save(picture: Tensor, path: Path) -> None:
    Image.fromarray(picture.movedim(0, -1).numpy()).save(path)


def load(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)


def commands(lesson: Lesson, models: Path) -> list[list[str]]:
    """The scripts and their arguments, with paths relative to OUT."""
    name = lesson.name
    paths = {kind: str(models / FILES[kind]) for kind in FILES}
    dit = ["--task", f"{name}-14B", "--dit", paths[name], "--dit_dtype", "float32", "--device", "cpu"]
    encoders = ["--vae", paths["vae"], "--t5", paths["t5"], "--t5_tokenizer", paths["tokenizer"]]
    encoders += ["--clip", paths["clip"]]
    data = ["--dataset_config", f"{name}/dataset.toml"]
    generate = ["wan_generate_video.py", *dit, *encoders, "--from_file", f"{name}/prompts.txt", "--exact_size"]
    generate += ["--output_type", "images"]
    return [
        ["wan_cache_latents.py", *data, *encoders[:2], *encoders[-2:], "--one_frame", "--device", "cpu"],
        ["wan_cache_text_encoder_outputs.py", *data, *encoders[2:6], "--device", "cpu"],
        [
            *("wan_train_network.py", *dit, *data, "--network_module", "networks.lora_wan"),
            *("--network_dim", "16", "--network_alpha", "16", "--learning_rate", "2e-3", "--lr_scheduler", "cosine"),
            *("--lr_warmup_steps", "20", "--timestep_sampling", "shift", "--discrete_flow_shift", "2", "--seed", "1"),
            *("--max_train_steps", str(lesson.steps), "--max_data_loader_n_workers", "0"),
            *("--output_dir", f"{name}/lora", "--output_name", "uniform"),
        ],
        [*generate, "--save_path", f"{name}/base"],
        [*generate, "--save_path", f"{name}/edited", "--lora_weight", f"{name}/lora/uniform.safetensors"],
    ]


def judge(lesson: Lesson) -> tuple[list[Row], list[tuple[Score, Score]]]:
    """Pictures and figures (base model, LoRA) of each test."""
    rows, scores = [], []
    for number in range(lesson.tests):
        test = example(lesson, number, held_out=True)
        outputs = [load(next((OUT / lesson.name / kind).glob(f"*_{number}_000.png"))) for kind in ("base", "edited")]
        base, edited = (score(test.scene, test.plain, test.truth, output) for output in outputs)
        note = f"{edited.psnr:.1f} dB (base {base.psnr:.1f}), uniform: {'yes' if edited.attribute else 'no'}"
        rows.append(Row([*test.starts, *outputs, test.truth], f"{test.scene.edit_caption}: {note}"))
        scores.append((base, edited))
    return rows, scores


def figures(scores: list[tuple[Score, Score]], limits: Limits) -> list[tuple[str, float, float, bool]]:
    """(name, value, limit, whether it is reached), means over all tests."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    gain = mean([edited.psnr - base.psnr for base, edited in scores])
    inside = mean([edited.edited_psnr for _, edited in scores])
    right = mean([float(edited.attribute) for _, edited in scores])
    drift = mean([edited.drift for _, edited in scores])
    return [
        ("PSNR above the base model's, dB", gain, limits.gain, gain >= limits.gain),
        ("PSNR in the edited region, dB", inside, limits.edited_psnr, inside >= limits.edited_psnr),
        ("share in uniform", right, limits.attribute, right >= limits.attribute),
        ("difference elsewhere", drift, limits.drift, drift <= limits.drift),
    ]


def run(script: str, *arguments: str) -> None:
    """Run a script of the project in OUT; ends the demo with its exit code when it fails.

    On one thread unless the environment says otherwise: so small a model gains little from more, and on a busy machine
    two were ten times slower.
    """
    print(f"\n$ python {shlex.join([script, *arguments])}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    code = subprocess.call([sys.executable, str(ROOT / script), *arguments], cwd=OUT, env=environment)
    if code:
        sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few pairs and steps; the figures are not judged")
    parser.add_argument("--models", type=Path, default=FOLDER, help="folder of the miniature's files")
    parser.add_argument("--steps", type=int, help="training steps of each LoRA")
    args = parser.parse_args(argv)
    started = time.monotonic()
    if absent := [name for name in FILES.values() if not (args.models / name).exists()]:
        print(f"--models {args.models}: {absent[0]} is missing; train the family with demo.pretrain", file=sys.stderr)
        return 1
    lessons = SHORT if args.short else FULL
    shutil.rmtree(OUT, ignore_errors=True)
    missed, sections = False, {}
    for lesson in lessons:
        lesson = replace(lesson, steps=args.steps or lesson.steps)
        write_data(lesson)
        for command in commands(lesson, args.models.resolve()):
            run(*command)
        rows, scores = judge(lesson)
        table = figures(scores, Limits())
        sections[lesson.name] = rows, table
        missed |= not all(reached for *_, reached in table)
    write_page(OUT, sections, list(lessons), time.monotonic() - started)
    for name, (_, table) in sections.items():
        print(f"\n{name}, means over held-out starts")
        for label, value, limit, reached in table:
            print(f"  {label:34} {value:8.3f}   limit {limit:6.3f}   {'reached' if reached else 'MISSED'}")
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes; look at {OUT / 'index.html'} and {OUT / 'sheet.png'}")
    return int(missed and not args.short)


if __name__ == "__main__":
    sys.exit(main())
