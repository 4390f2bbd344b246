"""Teach the miniature an edit that it does not know, "in a school photo", with the four scripts on this machine:

    python run.py demo            96 pairs, 16 held-out starts; at the same time between two images, with flf2v
    python run.py demo --short    a small part of it, to see that everything works

Writes demo/out/index.html and demo/out/sheet.png (start, base model, LoRA, truth), prints a table of figures and ends
with 1 when one of them misses its limit.
"""

import argparse
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from demo.judge import Score
from demo.lesson import ROOT, Lesson, commands, judge, run, write_data
from demo.miniature import FILES, FOLDER
from demo.page import write_page

OUT = ROOT / "demo" / "out"


@dataclass(frozen=True)
class Limits:
    """Limits that the figures of a run must reach."""

    gain: float = 8.0  # dB of the LoRA's output over the base model's, to the truth
    edited_psnr: float = 24.0
    attribute: float = 15 / 16
    drift: float = 0.03


FULL = (Lesson("i2v", pairs=96, steps=1800, tests=16), Lesson("flf2v", pairs=96, steps=1500, tests=16))
SHORT = (Lesson("i2v", pairs=8, steps=60, tests=2),)
LIMITS, SHORT_LIMITS = Limits(), Limits(gain=0.5, edited_psnr=0.0, attribute=0.0, drift=0.1)


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
        ("share with the backdrop", right, limits.attribute, right >= limits.attribute),
        ("difference elsewhere", drift, limits.drift, drift <= limits.drift),
    ]


def teach(lesson: Lesson, log: Path | None, models: Path) -> None:
    """All scripts, one after the other. log: a file for what they print; what is done is told all the same."""
    for step, command in commands(lesson, models).items():
        started = time.monotonic()
        run(command, OUT, log)
        if log is not None:
            print(f"\n{lesson.name}: {step} done in {time.monotonic() - started:.0f} s, see {log}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few pairs and steps, low limits")
    parser.add_argument("--models", type=Path, default=FOLDER, help="folder of the miniature's files")
    parser.add_argument("--steps", type=int, help="training steps of each LoRA")
    args = parser.parse_args(argv)
    started = time.monotonic()
    if absent := [name for name in FILES.values() if not (args.models / name).exists()]:
        print(f"--models {args.models}: {absent[0]} is missing; train the family with demo.pretrain", file=sys.stderr)
        return 1
    lessons, limits = (SHORT, SHORT_LIMITS) if args.short else (FULL, LIMITS)
    lessons = [replace(lesson, steps=args.steps or lesson.steps) for lesson in lessons]
    shutil.rmtree(OUT, ignore_errors=True)
    for lesson in lessons:
        write_data(lesson, OUT)
    with ThreadPoolExecutor(len(lessons)) as pool:  # one process each: so small a model gains little from more threads
        logs = [None, *(OUT / lesson.name / "log.txt" for lesson in lessons[1:])]
        for taught in [pool.submit(teach, *pair, args.models.resolve()) for pair in zip(lessons, logs, strict=True)]:
            taught.result()
    missed, sections = False, {}
    for lesson in lessons:
        rows, scores = judge(lesson, OUT)
        table = figures(scores, limits)
        sections[lesson.model] = rows, table
        missed |= not all(reached for *_, reached in table)
    write_page(OUT, sections, lessons, time.monotonic() - started)
    for name, (_, table) in sections.items():
        print(f"\n{name}, means over held-out starts")
        for label, value, limit, reached in table:
            print(f"  {label:34} {value:8.3f}   limit {limit:6.3f}   {'reached' if reached else 'MISSED'}")
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes; look at {OUT / 'index.html'} and {OUT / 'sheet.png'}")
    return int(missed)
