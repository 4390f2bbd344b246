"""--sweep: each combination of values is the picture that its flags alone make, and stands where its labels say."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import wan.files.load
import wan.generation.start
import wan.generation.sweep
import wan_generate_video
from tests.project import ENCODERS, model_flags, pixels
from utils.errors import ConfigError
from wan.files.formats import Checkpoint
from wan.frames import layout
from wan.generation import recipe
from wan.generation.grid import draw_grid
from wan.generation.sweep import Axis, SweepConfig
from wan.models.memory_options import GenerationMemoryConfig
from wan.models.plan import Choice, Plan, Room

FLAGS = [
    *(*model_flags("i2v"), *ENCODERS, "--device", "cpu"),
    *("--prompt", "a cat", "--control_image_path", "data/start/cat.png", "--guidance_scale", "1"),
    *("--one_frame_inference", "control_index=0,target_index=1", "--video_size", "32", "48", "--infer_steps", "2"),
]
LORA = ["--lora_weight", "a.safetensors", "b.safetensors", "--lora_multiplier", "1", "0.5"]
LABEL = 14  # pixels, at least, that labels take


@pytest.fixture(scope="module")
def project(new_project):
    with new_project("cat") as folder:
        torch.manual_seed(0)
        for file in "ab":
            name = f"lora_unet_blocks_0_self_attn_{'q' if file == 'a' else 'v'}"
            lora = {f"{name}.lora_down.weight": torch.randn(2, 256), f"{name}.lora_up.weight": torch.randn(256, 2)}
            save_file(lora, f"{file}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def nothing_made(workspace):
    for path in ("out", "alone", "again"):
        shutil.rmtree(path, ignore_errors=True)


def generate(folder: str, *flags: str) -> list[Path]:
    wan_generate_video.main(["--save_path", folder, *FLAGS, *flags])
    return sorted(Path(folder).iterdir())


def test_each_picture_is_the_one_that_its_values_make_alone_and_its_recipe_repeats_it():
    sweep = ("--sweep", "target_index=1,5", "lora_multiplier=0,1;-2", "--sweep", "steps=1,2", "--seed", "7")
    *singles, _grid = generate("out", *LORA, *sweep)
    assert len(singles) == 8 and len({pixels(path) for path in singles}) == 8
    for index, (named, multipliers), steps in itertools.product("15", (("0", "0 0.5"), ("1+-2", "1 -2")), "12"):
        name = f"_7_target_index-{index}_lora_multiplier-{named}_steps-{steps}_000.png"
        (path,) = [path for path in singles if path.name.endswith(name)]
        flags = (
            "--one_frame_inference",
            f"control_index=0,target_index={index}",
            "--infer_steps",
            steps,
            "--seed",
            "7",
        )
        shutil.rmtree("alone", ignore_errors=True)
        (alone,) = generate("alone", *LORA[:3], "--lora_multiplier", *multipliers.split(), *flags, "--seed", "7")
        assert path.read_bytes() == alone.read_bytes()
    wan_generate_video.main(["--recipe", str(singles[5]), "--save_path", "again", "--device", "cpu"])
    (again,) = Path("again").iterdir()
    assert again.read_bytes() == singles[5].read_bytes()


def test_the_grid_shows_the_pictures_in_rows_of_the_first_sweep():
    *singles, grid = generate("out", "--sweep", "target_index=1,5,9", "--sweep", "solver=unipc,vanilla")
    shown = Image.open(grid)
    width, height = Image.open(singles[0]).size
    first, found = {path: Image.open(path).getpixel((0, 0)) for path in singles}, {}
    for x, y in itertools.product(range(shown.width - width + 1), range(shown.height - height + 1)):
        for path in [path for path in singles if first[path] == shown.getpixel((x, y))]:
            if shown.crop((x, y, x + width, y + height)).tobytes() == pixels(path):
                found[path] = (x, y)
    places = [found[path] for path in singles]  # made row by row
    rows = [places[:3], places[3:]]
    for row in rows:
        assert len({y for _, y in row}) == 1 and [x for x, _ in row] == sorted(x for x, _ in row)
    assert [x for x, _ in rows[0]] == [x for x, _ in rows[1]] and rows[0][0][1] < rows[1][0][1]
    solvers = [recipe.read(path).options["sample_solver"] for path in singles]
    assert solvers == [*["unipc"] * 3, *["vanilla"] * 3]
    with pytest.raises(ConfigError, match="holds no recipe"):
        recipe.read(grid)


def test_one_seed_is_drawn_for_all_pictures_of_a_prompt():
    *singles, _grid = generate("out", "--sweep", "guidance=1,2")
    assert len({recipe.read(path).options["seed"] for path in singles}) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--dit_dtype", "bfloat16"],
        ["--fp8_scaled"],
        ["--fp8_scaled", "--blocks_to_swap", "1", "--use_pinned_memory_for_block_swap"],
        ["--blocks_to_swap", "1"],
        ["--compile", "--compile_backend", "eager"],
    ],
    ids=" ".join,
)
def test_pictures_of_other_multipliers_are_those_of_runs_of_their_own(flags):
    sweep = ("--sweep", "lora_multiplier=1,-2,0.3", "--sweep", "seed=7,8")
    *singles, _grid = generate("out", *LORA, *flags, *sweep)
    assert len({pixels(path) for path in singles}) == 6
    for multiplier in ("1", "-2", "0.3"):
        shutil.rmtree("alone", ignore_errors=True)
        (alone,) = generate("alone", *LORA[:3], "--lora_multiplier", multiplier, "0.5", "--seed", "8", *flags)
        (found,) = Path("out").glob(f"*_8_lora_multiplier-{multiplier}_seed-8_000.png")
        assert found.read_bytes() == alone.read_bytes()


def test_models_load_once_whatever_varies_and_other_multipliers_read_what_the_lora_changes(monkeypatch):
    loaded = []
    for name in ("load_dit", "load_vae", "load_t5", "load_clip"):
        original = getattr(wan.files.load, name)

        def counted(*arguments, _name=name, _original=original, **more):
            loaded.append(_name)
            return _original(*arguments, **more)

        monkeypatch.setattr(wan.files.load, name, counted)
    generate("out", "--sweep", "target_index=1,2", "seed=1,2")
    assert sorted(loaded) == ["load_clip", "load_dit", "load_t5", "load_vae"]
    loaded.clear()
    read, original = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *more: read.append(name) or original(self, name, *more))
    generate("out", *LORA, "--sweep", "target_index=1,2", "--sweep", "lora_multiplier=1,2,3")
    assert sorted(loaded) == ["load_clip", "load_dit", "load_t5", "load_vae"]
    assert {name for name in read if read.count(name) == 3} == {f"blocks.0.self_attn.{part}.weight" for part in "qv"}
    assert len(read) == len(set(read)) + 2 * 2


def test_when_memory_runs_out_at_another_multiplier_the_next_choice_makes_the_same_pictures(monkeypatch):
    sweep = (*LORA, "--sweep", "lora_multiplier=1,-2", "seed=7,8")
    expected = [pixels(path) for path in generate("again", *sweep)]
    memories = GenerationMemoryConfig(), GenerationMemoryConfig(blocks_to_swap=1)
    plan = Plan([Choice(memory, {"all": size}) for memory, size in zip(memories, (1, 0), strict=True)], Room(1, 1))
    monkeypatch.setattr(wan.generation.start, "plan_generation", lambda *_: plan)
    original, failing = wan.files.load.merge_again_, [True]

    def merge_again_(*arguments):
        original(*arguments)
        if failing.pop():
            raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(wan.files.load, "merge_again_", merge_again_)
    assert [pixels(path) for path in generate("out", *sweep, "--memory", "auto")] == expected
    assert not failing


def test_each_prompt_of_a_file_gets_its_grid():
    Path("lines.txt").write_text("a --d 1\nb --d 2\n", encoding="utf-8")
    made = generate("out", "--from_file", "lines.txt", "--sweep", "shift=3,5")
    grids = [path.name.split("_", 1)[1] for path in made if "sweep" in path.name]
    assert grids == ["1_sweep_000.png", "2_sweep_000.png"]
    assert len(made) == 6


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["target_indx=1"], "--sweep target_indx=1: unknown key 'target_indx'; did you mean 'target_index'?"),
        (["prompt=a"], "unknown key 'prompt'; use one of control_index"),
        (["seed"], "a value is missing; write e.g. seed=1,2"),
        (["seed=1,"], "a value is missing"),
        (["seed=1,1"], "holds a value twice"),
        (["steps=1,2", "infer_steps=3"], "--sweep steps: varies twice"),
        (["seed=a"], "command line: --sweep seed=a: seed = a: is not a whole number"),
        (["steps=0"], "sample_steps = 0: must be 1 to 1000"),
        (["guidance=x"], "is not a number"),
        (["shift=-1"], "--sweep shift=-1: --flow_shift -1.0: must be above 0"),
        (["solver=euler"], "--sweep solver=euler: --sample_solver euler: unknown solver"),
        (["target_index=1,0"], "--sweep target_index=0: one_frame 'control_index=0,target_index=0': target_index=0 is"),
        (["control_index=0;2"], "1 control image for control_index=0;2"),
        (["lora_multiplier=1"], "1 number for 0 LoRA files"),
        (["lora_multiplier=inf"], "is not a number; write e.g. lora_multiplier=0.6,1"),
        (["lora_multiplier=a"], "--sweep lora_multiplier=a: is not a number"),
        (["seed=1,2", "--output_type", "latent"], "--sweep needs --prompt or --from_file, and images"),
    ],
)
def test_a_wrong_sweep_is_one_line_before_anything_loads(sweep, words, monkeypatch):
    for loader in ("load_dit", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(wan.files.load, loader, lambda *_args, **_more: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError) as caught:
        generate("out", "--sweep", *sweep)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_keys_go_where_prompt_lines_put_them():
    swept = layout.with_values("control_index=0, target_index=1", {"target_index": "4"})
    assert swept == "control_index=0,target_index=4"
    swept = layout.with_values("", {"control_index": "0;2", "target_index": "1"})
    assert swept == "control_index=0;2,target_index=1"
    assert Axis.parse("control_index=0;2, 0;4").values == ("0;2", "0;4")
    assert SweepConfig().size == 1 and SweepConfig(("seed=1,2,3", "steps=4,5")).size == 6


def test_labels_name_the_values_of_their_column_and_row(monkeypatch):
    monkeypatch.setattr(wan.generation.sweep, "draw_grid", lambda *arguments: arguments)
    rows, across, down = SweepConfig(("seed=1,2", "steps=3,4", "shift=5,6")).draw(range(8))
    assert rows == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)] and across == ["seed=1", "seed=2"]
    assert down == ["steps=3\nshift=5", "steps=3\nshift=6", "steps=4\nshift=5", "steps=4\nshift=6"]


def test_a_grid_has_room_for_labels_keeps_pictures_and_marks_missing_ones():
    red, blue = Image.new("RGB", (400, 20), "red"), Image.new("RGB", (40, 200), "blue")
    grid = draw_grid([[red, None], [None, blue]], ["one", "two"], ["a\nlong label", ""])
    colours = dict(map(reversed, grid.getcolors(1 << 20)))
    assert colours[(255, 0, 0)] == 400 * 20 and colours[(0, 0, 255)] == 40 * 200
    assert 2 * 400 * 200 <= colours[(211, 211, 211)] < 2.01 * 400 * 200 and (0, 0, 0) in colours  # letters have greys
    assert grid.width > 800 + LABEL and grid.height > 400 + LABEL
    bare = draw_grid([[red]], [""], [""])
    assert bare.size == (400 + bare.height - 20, bare.height) and bare.getcolors()[0] is not None
    wide = draw_grid([[Image.new("RGB", (3000, 30))] * 5], list("abcde"), [""])
    assert 8000 < wide.width < 8400
