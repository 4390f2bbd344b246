"""Random options: a training sample, a generated picture, and that of its recipe are the same.

Each case trains one step with options of `SamplingConfig` and samples prompts whose options are drawn, too. More cases
than in an ordinary run: RANDOM_CASES=200 python -m pytest tests/generation/test_random_requests.py
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

import wan_generate_video
from tests.project import generate, pixels, train
from wan.generation.sampling import SOLVERS

CASES = int(os.environ.get("RANDOM_CASES", "4"))
LINES = 2  # per case
SIDES = (32, 48, 64, 80)
WORDS = ("a cat", '猫 in the  rain, 2: "x"', "evening light", "")
IMAGES = [f"data/{name}.png" for name in ("start/cat", "start/coffee", "ends/brick_1", "middle/astronaut")]


@pytest.fixture(autouse=True)
def files(workspace):
    """Masks of the images, in their size: half of each counts."""
    Path("masks").mkdir(exist_ok=True)
    for path in map(Path, IMAGES):
        with Image.open(path) as image:
            mask = Image.new("L", image.size, 255)
            mask.paste(64, (0, 0, image.width // 2, image.height))
            mask.save(f"masks/{path.name}")


def some(draw: random.Random, *choices: list[str]) -> list[str]:
    """One of the choices; none in half of all draws."""
    return draw.choice(choices) if draw.random() < 0.5 else []


def sampling_flags(draw: random.Random) -> list[str]:
    """Flags that training and generation share."""
    resolution = some(draw, ["--control_resolution", draw.choice(("32", "48x64"))])
    return [
        *some(draw, ["--sample_solver", draw.choice(list(SOLVERS))]),
        *some(draw, ["--cpu_noise"]),
        *some(draw, ["--exact_size"]),
        *some(draw, ["--pin_controls"]),
        *(resolution and [*resolution, *some(draw, ["--no_resize_control"])]),
        *some(draw, ["--reasoning_frames", "2"], ["--reasoning_frames", "1", "--reasoning_steps", "2"]),
    ]


def line(draw: random.Random, model: str, flags: list[str]) -> str:
    """A prompt line that these flags allow."""
    controls = [draw.choice(IMAGES) for _ in range(draw.choice((1, 1, 2, 3)) if model == "i2v" else 2)]
    *indices, target = draw.sample(range(0, 30, 3), len(controls) + 1)  # with room for reasoning frames between them
    free = not {"--pin_controls", "--control_resolution", "--reasoning_frames"} & set(flags)
    causal = free and min(indices) < target and draw.random() < 0.3
    layout = f"control_index={';'.join(map(str, indices))},target_index={target}" + ",layout=causal" * causal
    words = [draw.choice(WORDS), *(f"--ci {path}" for path in controls), f"--of {layout}"]
    words += [
        f"--w {draw.choice(SIDES)} --h {draw.choice(SIDES)}",
        f"--s {draw.randint(1, 3)} --d {draw.randrange(1 << 40)}",
    ]
    words += some(draw, [f"--l {draw.choice((1, 2.5, 7))}"])
    words += some(draw, [f"--fs {draw.choice((1, 3, 14.5))}"])
    words += some(draw, ["--n blurry, grey"])
    words += some(draw, [f"--i {draw.choice(IMAGES)}"])
    words += some(draw, [f"--ei {draw.choice(IMAGES)}"]) if model == "flf2v" else []
    if not causal:
        words += some(draw, [f"--cim masks/{Path(path).name}" for path in controls])
    return " ".join(words)


def only_generated(draw: random.Random) -> list[str]:
    """Flags of generation alone."""
    return [
        *some(draw, ["--lora_multiplier", draw.choice(("0.4", "-1.5"))]),
        *some(draw, ["--cfg_skip_mode", draw.choice(("early", "middle", "alternate")), "--cfg_apply_ratio", "0.6"]),
        *some(draw, ["--slg_mode", draw.choice(("original", "uncond")), "--slg_layers", "1", "--slg_end", "1"]),
        *some(draw, ["--separate_passes"]),
        *some(draw, ["--fp8"], ["--fp8_scaled"], ["--blocks_to_swap", "1"]),
        *some(draw, ["--include_patterns", "self_attn"]),
        *some(draw, ["--output_type", "latent_images"]),
    ]


@pytest.mark.parametrize("case", range(CASES))
def test_a_sample_a_generated_picture_and_that_of_its_recipe_are_the_same(case):
    draw = random.Random(case)
    model, config = (("i2v", "pairs.toml"), ("flf2v", "middle.toml"))[case % 2]
    flags = sampling_flags(draw)
    lines = [line(draw, model, flags) for _ in range(LINES)]
    Path("lines.txt").write_text("\n".join(lines), encoding="utf-8")
    told = f"case {case}: {' '.join(flags)}: {lines}"

    saving = some(draw, ["--save_precision", "bf16"])
    sampled = ("--sample_prompts", "lines.txt", "--sample_every_n_steps", "1", "--max_train_steps", "1")
    lora = train(model, config, f"case{case}", *flags, *saving, *sampled, "--learning_rate", "0.1")
    samples = [pixels(path) for path in sorted(Path("output/sample").glob(f"case{case}_000001_*.png"))]

    common = ("--from_file", "lines.txt", "--lora_weight", str(lora), *flags)
    made = [path for path in generate(model, "out", *common) if path.suffix == ".png"]
    assert [pixels(path) for path in made] == samples and len(samples) == LINES, told
    check_recipe(made[0], told)

    more = only_generated(draw)
    for path in generate(model, "out", *common, *more)[:1]:
        check_recipe(path, f"{told} {more}")


def check_recipe(path: Path, told: str) -> None:
    """The recipe of a file makes the same bytes."""
    shutil.rmtree("again", ignore_errors=True)
    wan_generate_video.main(["--recipe", str(path), "--device", "cpu", "--save_path", "again"])
    (again,) = Path("again").glob("*.png")
    assert again.read_bytes() == path.read_bytes(), told
