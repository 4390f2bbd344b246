"""Questions that the field leaves open, measured on the miniature family. Tables for docs/experiments.md:

    python -m demo.experiments indices loss size --device cuda --jobs 6
    python -m demo.experiments base --device cuda

indices: indices honoured or ignored in training.  base: the base model alone at further target indices, in both
layouts.  loss: on all frames or the target only, controls free or pinned in sampling.  size: rank, steps and pairs.
references: a figure, its clothes and its place from one control or from three.  masks: the figure of one control before
the background of another, with masks that tell which is which and without.  precision: pictures in 8 bits against
those in bfloat16.
Each training is repeated with every seed; a row is the mean over the held-out starts and, after ±, the standard
deviation over the seeds.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from demo.edit import Limits, figures
from demo.figures import clip
from demo.judge import psnr
from demo.lesson import Lesson, commands, emptied, judge, outputs, run, save_picture, write_data, write_tests
from demo.miniature import FOLDER
from demo.page import Row, sheet
from demo.tasks import HELD_OUT_SEED, cut_out
from demo.world import FRAMES, Scene, sample_scene
from wan.nets.spec import TIME_STRIDE, VAE_STRIDE

I2V = Lesson("i2v", pairs=48, steps=600, tests=8)
FLF2V = Lesson("flf2v", pairs=48, steps=600, tests=8)
COLLAGE = Lesson("i2v", pairs=96, steps=1600, tests=8)
CUT_OUT = {"cut out": "cut out of others", "cut out, no masks": "cut out of others, no masks"}
EDIT = ("gain over base, dB", "edited region, dB", "with the backdrop", "difference elsewhere")
PINNED = tuple(f"{name}, controls {how}" for how in ("free", "pinned") for name in EDIT[1::2])
FIDELITY = ("base model, dB", "LoRA, dB")
HIDDEN = tuple(f"changed by hidden pixels, {where}" for where in ("at the edges of masks", "elsewhere"))
PRECISIONS = {"fp8": ("--fp8",), "fp8_scaled": ("--fp8_scaled",), "fp8_fast": ("--fp8_fast",)}
LEGACY = ("--one_frame_legacy_indices",)
TARGETS = (1, 2, 4, 8)
MOVING = ("raise", "walk left", "walk right", "turn left", "zoom in", "darken", "top colour", "hair colour")


@dataclass(frozen=True)
class Trial:
    """One row of a table."""

    label: str
    lesson: Lesson


def index_trials() -> list[Trial]:
    """Loss of quality of the reference, which ignores indices in training, when the same indices are sampled."""
    trials = []
    for lesson, controls, target in ((I2V, (0,), 1), (I2V, (0,), 9), (FLF2V, (0, 2), 1), (FLF2V, (0, 10), 5)):
        lesson = replace(lesson, controls=controls, target=target)
        label = f"{lesson.model} {list(controls)}→{target}"
        trials += [Trial(f"{label}, honoured", lesson), Trial(f"{label}, ignored", with_training_flags(lesson, LEGACY))]
    return trials


def loss_trials() -> list[Trial]:
    """--one_frame_loss for both models."""
    return [
        Trial(f"{lesson.model}, loss on {loss}", with_training_flags(lesson, ("--one_frame_loss", loss)))
        for lesson in (I2V, FLF2V)
        for loss in ("all", "target")
    ]


def size_trials() -> list[Trial]:
    """One setting at a time away from the usual one."""
    trials = [Trial(f"rank {I2V.rank}, {I2V.steps} steps, {I2V.pairs} pairs", I2V)]
    trials += [Trial(f"rank {rank}", replace(I2V, rank=rank)) for rank in (2, 4, 64)]
    trials += [Trial(f"{steps} steps", replace(I2V, steps=steps)) for steps in (150, 300, 1200)]
    return trials + [Trial(f"{pairs} pairs", replace(I2V, pairs=pairs)) for pairs in (6, 12, 24, 96, 240)]


def with_training_flags(lesson: Lesson, flags: Sequence[str]) -> Lesson:
    return replace(lesson, training_flags=(*lesson.training_flags, *flags))


def reference_trials() -> list[Trial]:
    """Trials in which the second and third reference show something that the caption does not say."""
    lesson = replace(COLLAGE, task="collage", target=3)
    return [
        Trial("one reference", replace(lesson, controls=(0,))),
        Trial("three references", replace(lesson, controls=(0, 1, 2))),
    ]


def mask_trials() -> list[Trial]:
    """Which control has the figure is drawn, and known from the masks alone."""
    lesson = replace(COLLAGE, controls=(0, 1), target=2)
    return [Trial(f"trained on: {task}", replace(lesson, task=task)) for task in CUT_OUT]


def teach(lesson: Lesson, models: Path, out: Path) -> None:
    """Train, and generate with the base model and with the LoRA."""
    write_data(lesson, out)
    for command in commands(lesson, models).values():
        run(command, out, out / lesson.name / "log.txt")


def generate_again(lesson: Lesson, models: Path, out: Path, tests: str, flags: Sequence[str] = ()) -> list[Tensor]:
    """With the LoRA that the lesson has taught: its pictures, in the folder `tests`. flags: more of generation."""
    write_tests(lesson, out, tests)
    run([*commands(lesson, models, tests)["edited"], *flags], out, out / lesson.name / "log.txt")
    return outputs(lesson, out, "edited", tests)


def edit_figures(lesson: Lesson, models: Path, out: Path) -> list[float]:
    """The four means of `figures`."""
    teach(lesson, models, out)
    return [value for _, value, *_ in figures(judge(lesson, out)[1], Limits())]


def pinned_figures(lesson: Lesson, models: Path, out: Path) -> list[float]:
    """Edited region and difference elsewhere of `figures`, first with free controls, then with --pin_controls."""
    teach(lesson, models, out)
    free = judge(lesson, out)[1]
    tests = f"{lesson.name}/pinned"
    generate_again(lesson, models, out, tests, ["--pin_controls"])
    pinned = judge(lesson, out, tests)[1]
    return [value for scores in (free, pinned) for _, value, *_ in figures(scores, Limits())[1::2]]


def fidelity(lesson: Lesson, models: Path, out: Path) -> list[float]:
    """Mean PSNR to the truth, dB: of the base model and of the LoRA."""
    teach(lesson, models, out)
    truths = [lesson.example(number, held_out=True).truth for number in range(lesson.tests)]
    return [statistics.mean(map(psnr, outputs(lesson, out, kind), truths)) for kind in ("base", "edited")]


def mask_figures(lesson: Lesson, models: Path, out: Path) -> list[float]:
    """`fidelity`, and how much the outputs change with what masks hide: the mean difference as a share of 255, in the
    latent pixels that the edge of a mask runs through, and in the others."""
    found = fidelity(lesson, models, out)
    others = generate_again(replace(lesson, task=CUT_OUT[lesson.task]), models, out, f"{lesson.name}/others")
    changes = []
    for number, (one, other) in enumerate(zip(outputs(lesson, out, "edited"), others, strict=True)):
        edge = edges(cut_out(number, True, len(lesson.controls)).masks)
        change = (one.float() - other.float()).abs() / 255
        changes.append([float(change[:, where].mean()) for where in (edge, ~edge)])
    return [*found, *map(statistics.mean, zip(*changes, strict=True))]


def edges(masks: Sequence[Tensor]) -> Tensor:
    """Masks [height, width] bool -> the pixels whose latent pixel is neither all white nor all black in one."""
    shares = torch.nn.functional.avg_pool2d(torch.stack([*masks]).float(), VAE_STRIDE)
    edge = ((shares > 0) & (shares < 1)).any(dim=0)
    return edge.repeat_interleave(VAE_STRIDE, 0).repeat_interleave(VAE_STRIDE, 1)


def precision_figures(lesson: Lesson, models: Path, out: Path) -> list[float]:
    """PSNR to the pictures of bfloat16, dB, for each of PRECISIONS."""
    teach(lesson, models, out)
    pictures = {
        name: generate_again(lesson, models, out, f"{lesson.name}/{name}", ["--dit_dtype", "bfloat16", *flags])
        for name, flags in {"bfloat16": (), **PRECISIONS}.items()
    }
    expected = pictures.pop("bfloat16")
    return [statistics.mean(map(psnr, found, expected)) for found in pictures.values()]


def run_trials(
    trials: list[Trial],
    options: argparse.Namespace,
    folder: str,
    measure: Callable[[Lesson, Path, Path], list[float]] = edit_figures,
    header: Sequence[str] = EDIT,
    digits: Sequence[int] = (1, 1, 2, 3),
) -> None:
    """Prints a table of them."""
    out = options.out.resolve() / folder
    lessons = [
        replace(
            trial.lesson,
            name=f"{number:02}-{seed}",
            seed=seed,
            device=options.device,
            steps=max(1, round(trial.lesson.steps * options.scale)),
            tests=min(trial.lesson.tests, options.tests),
        )
        for number, trial in enumerate(trials)
        for seed in options.seeds
    ]

    def measured(lesson: Lesson) -> list[float]:
        values = measure(lesson, options.models.resolve(), out)
        print(folder, lesson.name, *(f"{value:.4g}" for value in values), file=sys.stderr, flush=True)
        return values

    queue = sorted(lessons, key=lambda lesson: -lesson.steps)  # so that no long one is left for the end
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(queue, pool.map(measured, queue), strict=True))
    results = [found[lesson] for lesson in lessons]
    seeds = len(options.seeds)
    rows = []
    for number, trial in enumerate(trials):
        columns = zip(*results[number * seeds : (number + 1) * seeds], strict=True)
        rows.append([trial.label, *map(spread, columns, digits)])
    print_table(["trial", *header], rows)


def spread(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation, or one value"""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def run_base(options: argparse.Namespace) -> None:
    """The base model without a LoRA on starts of clips that it could go on with, at each of TARGETS."""
    out = options.out.resolve() / "base"
    rows = []
    for layout in ("independent", "causal"):
        for target in TARGETS:
            lesson = Lesson(
                "i2v", 0, 0, len(MOVING), f"{layout}-{target}", target=target, layout=layout, device=options.device
            )
            found = [figures_of_motion(lesson, seed, options, out) for seed in options.seeds]
            rows.append([layout, str(target), *(spread(column, 2) for column in zip(*found, strict=True))])
    print_table(
        ["layout", "target index", "dB to the clip there", "dB to the start", "share of the change", "noise"], rows
    )
    continued(options.seeds[0], out).save(out / "sheet.png")


def continued(seed: int, out: Path) -> Image.Image:
    """Outputs of the causal layout for the starts of this seed, beside the clips."""
    made = [outputs(Lesson("i2v", 0, 0, len(MOVING), f"causal-{target}-{seed}"), out, "base") for target in (1, 2)]
    rows = []
    for number, action in enumerate(MOVING):
        start, fourth, last = clip(moving(action, seed, number), (0, 4, 8))
        rows.append(Row([start, made[0][number], fourth, made[1][number], last], action))
    return sheet(rows, ["start", "model at 1", "clip at 1", "model at 2", "clip at 2"])


def moving(action: str, seed: int, number: int) -> Scene:
    """Somebody held out, whom this happens to."""
    return sample_scene(HELD_OUT_SEED + 1000 * seed + number, held_out=True, action=action)


def figures_of_motion(lesson: Lesson, seed: int, options: argparse.Namespace, out: Path) -> list[float]:
    """Means over MOVING: PSNR to the clip's frame at the target (its last, when the clip is over), PSNR to the start,
    the share of the change between the two that the output makes (1 where it is the clip's), and noise: the mean
    difference of neighbouring pixels, as a multiple of the start's."""
    lesson = replace(lesson, name=f"{lesson.name}-{seed}")
    folder = emptied(out / lesson.name)
    lines, clips = [], []
    for number, action in enumerate(MOVING):
        scene = moving(action, seed, number)
        start, end = clip(scene, (0, min(TIME_STRIDE * lesson.target, FRAMES - 1)))
        save_picture(start, folder / f"{number}.png")
        width, height = scene.size
        lines.append(
            f"{scene.caption} --ci {lesson.name}/{number}.png --of {lesson.one_frame} --w {width} --h {height} "
            f"--d {seed} --s {options.sampling_steps} --l {options.guidance} --fs 3"
        )
        clips.append((start, end))
    (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    run(commands(lesson, options.models.resolve())["base"], out, folder / "log.txt")
    found = [
        (psnr(output, end), psnr(output, start), share_of_change(start, end, output), noise(output) / noise(start))
        for (start, end), output in zip(clips, outputs(lesson, out, "base"), strict=True)
    ]
    return [statistics.mean(column) for column in zip(*found, strict=True)]


def share_of_change(start: Tensor, end: Tensor, output: Tensor) -> float:
    """The projection of output - start onto end - start: 0 for the start, 1 for the end."""
    change, made = (picture.double() - start.double() for picture in (end, output))
    return float((change * made).sum() / change.square().sum().clamp(min=1))


def noise(picture: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, in levels."""
    values = picture.float()
    return float(torch.cat([values.diff(dim=1).abs().flatten(), values.diff(dim=2).abs().flatten()]).mean())


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "indices": lambda options: run_trials(index_trials(), options, "indices"),
    "base": run_base,
    "loss": lambda options: run_trials(loss_trials(), options, "loss", pinned_figures, PINNED, digits=(1, 3, 1, 3)),
    "size": lambda options: run_trials(size_trials(), options, "size"),
    "references": lambda options: run_trials(
        reference_trials(), options, "references", fidelity, FIDELITY, digits=(1, 1)
    ),
    "masks": lambda options: run_trials(
        mask_trials(), options, "masks", mask_figures, (*FIDELITY, *HIDDEN), digits=(1, 1, 3, 3)
    ),
    "precision": lambda options: run_trials(
        [Trial("LoRA of the demo", I2V)],
        options,
        "precision",
        precision_figures,
        [f"--{name}, dB" for name in PRECISIONS],
        (1, 1, 1),
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--models", type=Path, default=FOLDER, help="folder of the miniature's files")
    parser.add_argument("--out", type=Path, default=Path("output/experiments"), help="earlier runs are replaced")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of training steps")
    parser.add_argument("--tests", type=int, default=8, help="held-out starts at most")
    parser.add_argument("--sampling_steps", type=int, default=16, help="of the experiment `base`")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the experiment `base`")
    options = parser.parse_args(argv)
    for name in options.names:
        EXPERIMENTS[name](options)


if __name__ == "__main__":
    main()
