"""One edit that a model of the miniature family learns: its data, the scripts that teach it, and how well it went."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.judge import Score, score
from demo.miniature import FILES
from demo.page import Row
from demo.tasks import TASKS, Example
from utils.images import open_image

ROOT = Path(__file__).resolve().parents[1]

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
fp_1f_target_index = {target}
fp_1f_layout = "{layout}"
"""


@dataclass(frozen=True)
class Lesson:
    """One model and what it is asked. Its files are in a folder of its name."""

    model: str  # i2v or flf2v
    pairs: int
    steps: int
    tests: int
    name: str = ""  # default: that of the model
    task: str = ""  # one of TASKS; default: that of the model
    controls: tuple[int, ...] = ()  # time indices; default: those of the model
    target: int = 1
    layout: str = "independent"
    batch: int = 4
    rank: int = 16
    learning_rate: str = "2e-3"
    seed: int = 1
    sampling_steps: int = 8
    device: str = "cpu"
    training_flags: tuple[str, ...] = ()
    generation_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.model)
        object.__setattr__(self, "task", self.task or ("photo" if self.model == "i2v" else "moment"))
        object.__setattr__(self, "controls", self.controls or ((0,) if self.model == "i2v" else (0, 2)))

    @property
    def one_frame(self) -> str:
        """The value of --of"""
        indices = ";".join(map(str, self.controls))
        return f"control_index={indices},target_index={self.target},layout={self.layout}"

    def example(self, number: int, held_out: bool) -> Example:
        """The example of this number."""
        return TASKS[self.task](number, held_out, len(self.controls))


def write_data(lesson: Lesson, out: Path) -> None:
    """Pairs with captions, and the control pictures of the tests."""
    folder = emptied(out / lesson.name)
    for part in ("target", "start"):
        (folder / part).mkdir()
    for number in range(lesson.pairs):
        pair = lesson.example(number, held_out=False)
        save_picture(pair.truth, folder / f"target/{number:03}.png")
        (folder / f"target/{number:03}.txt").write_text(pair.caption, encoding="utf-8")
        save_controls(pair, folder / "start", number)
    write_tests(lesson, out, lesson.name)
    text = DATASET.format(
        name=lesson.name,
        batch=lesson.batch,
        controls=list(lesson.controls),
        target=lesson.target,
        layout=lesson.layout,
    )
    (folder / "dataset.toml").write_text(text, encoding="utf-8")


def emptied(folder: Path) -> Path:
    """The folder, there and without what an earlier run has left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_tests(lesson: Lesson, out: Path, name: str) -> None:
    """The held-out control pictures and their prompts, into the folder of this name."""
    folder = out / name / "test"
    folder.mkdir(parents=True)
    lines = []
    for number in range(lesson.tests):
        test = lesson.example(number, held_out=True)
        images, masks = save_controls(test, folder, number)
        files = [f"--ci {name}/test/{image}" for image in images] + [f"--cim {name}/test/{mask}" for mask in masks]
        _, height, width = test.truth.shape
        size = f"--w {width} --h {height} --d {number} --s {lesson.sampling_steps}"
        lines.append(f"{test.caption} {' '.join(files)} --of {lesson.one_frame} {size} --l 1 --fs 3")
    (out / name / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")


def save_controls(pair: Example, folder: Path, number: int) -> tuple[list[str], list[str]]:
    """Writes `003.png`, or `003_0.png`, `003_1.png` ...; and `003_0_mask.png`. Returns the names of both."""
    stems = [f"{number:03}" + (f"_{i}" if len(pair.controls) > 1 else "") for i in range(len(pair.controls))]
    for control, stem in zip(pair.controls, stems, strict=True):
        save_picture(control, folder / f"{stem}.png")
    names = [f"{stem}_mask.png" for stem in stems[: len(pair.masks)]]
    for mask, name in zip(pair.masks, names, strict=True):
        save_picture(mask.expand(3, -1, -1).to(torch.uint8) * 255, folder / name)
    return [f"{stem}.png" for stem in stems], names


def save_picture(picture: Tensor, path: Path) -> None:
    Image.fromarray(picture.movedim(0, -1).numpy()).save(path)


def load_picture(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path, "picture"))).movedim(-1, 0)


def commands(lesson: Lesson, models: Path, tests: str = "") -> dict[str, list[str]]:
    """Script and arguments of each step: `latents`, `texts`, `train`, `base` and `edited`.

    Paths are relative to the folder that holds the lesson's. tests: folder of what `write_tests` wrote, there as well;
    default: the lesson's.
    """
    name = lesson.name
    tests = tests or name
    paths = {kind: str(models / FILES[kind]) for kind in FILES}
    device = ["--device", lesson.device]
    dit = ["--task", f"{lesson.model}-14B", "--dit", paths[lesson.model], "--dit_dtype", "float32", *device]
    vae, clip_model = ["--vae", paths["vae"], "--vae_dtype", "float32"], ["--clip", paths["clip"]]
    t5 = ["--t5", paths["t5"], "--t5_tokenizer", paths["tokenizer"]]
    data = ["--dataset_config", f"{name}/dataset.toml"]
    generate = ["wan_generate_video.py", *dit, *vae, *t5, *clip_model, "--from_file", f"{tests}/prompts.txt"]
    generate += ["--exact_size", "--output_type", "images", *lesson.generation_flags]
    return {
        "latents": ["wan_cache_latents.py", *data, *vae, *clip_model, "--one_frame", *device],
        "texts": ["wan_cache_text_encoder_outputs.py", *data, *t5, *device],
        "train": [
            *("wan_train_network.py", *dit, *data, "--network_module", "networks.lora_wan"),
            *("--network_dim", str(lesson.rank), "--network_alpha", str(lesson.rank)),
            *("--learning_rate", lesson.learning_rate, "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"),
            *("--timestep_sampling", "shift", "--discrete_flow_shift", "2", "--seed", str(lesson.seed)),
            *("--max_train_steps", str(lesson.steps), "--max_data_loader_n_workers", "0"),
            *("--output_dir", f"{name}/lora", "--output_name", "edit", *lesson.training_flags),
        ],
        "base": [*generate, "--save_path", f"{tests}/base"],
        "edited": [*generate, "--save_path", f"{tests}/edited", "--lora_weight", f"{name}/lora/edit.safetensors"],
    }


def run(command: list[str], out: Path, log: Path | None = None) -> None:
    """Run a script of the project in `out`, and end with its exit code when it fails. log: a file for its output.

    On one thread unless the environment says otherwise: so small a model gains little from more, and on a busy machine
    two were ten times slower.
    """
    script, *arguments = command
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    call = [sys.executable, str(ROOT / script), *arguments]
    if log is None:
        print(f"\n$ python {shlex.join(command)}", flush=True)
        code = subprocess.call(call, cwd=out, env=environment)
    else:
        with log.open("ab") as file:
            code = subprocess.call(call, cwd=out, env=environment, stdout=file, stderr=file)
    if code:
        print(f"{script} ended with {code}" + (f"; see {log}" if log else ""), file=sys.stderr)
        sys.exit(code)


def outputs(lesson: Lesson, out: Path, kind: str, tests: str = "") -> list[Tensor]:
    """The pictures of all tests, in the folder `tests` or the lesson's, that the step `kind` (base or edited) wrote."""
    paths = sorted((out / (tests or lesson.name) / kind).glob("*.png"))  # their names begin with the time
    assert len(paths) == lesson.tests, f"{len(paths)} pictures of {lesson.tests} tests"
    return [load_picture(path) for path in paths]


def judge(lesson: Lesson, out: Path, tests: str = "") -> tuple[list[Row], list[tuple[Score, Score]]]:
    """Pictures and figures (base model, LoRA) of each test. tests: where the LoRA's pictures are; see `outputs`."""
    rows, scores = [], []
    pictures = zip(outputs(lesson, out, "base"), outputs(lesson, out, "edited", tests), strict=True)
    for number, pair in enumerate(pictures):
        test = lesson.example(number, held_out=True)
        base, edited = (score(test.plain, test.truth, output) for output in pair)
        note = f"{edited.psnr:.1f} dB (base {base.psnr:.1f}), backdrop: {'yes' if edited.attribute else 'no'}"
        rows.append(Row([*test.controls, *pair, test.truth], f"{test.caption}: {note}"))
        scores.append((base, edited))
    return rows, scores
