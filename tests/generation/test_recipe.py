"""--recipe: PNG and latent files tell how they were made, and are made again from that."""

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file

import wan.files.load
import wan.generation.pipeline
import wan_generate_video
from tests.project import I2V_KINDS, MODELS, model_flags, pixels
from utils.errors import ConfigError
from wan import __version__
from wan.generation import recipe
from wan.generation.outputs import save_image

ODD = "Bilder 'ünd' 画像 🐈"  # a folder
COMMON = [*model_flags(*I2V_KINDS), "--device", "cpu"]
BASE = [
    *("--control_image_path", f"{ODD}/cat.png", "--one_frame_inference", "control_index=0,target_index=1"),
    *("--video_size", "48", "64", "--infer_steps", "2"),
]
SINGLE = ["--prompt", "--n \"a\"\n'cat' 猫 🐈", *BASE, "--seed", "3"]
LORA = ["--lora_weight", f"{ODD}/my lora.safetensors", "--lora_multiplier", "0.5"]


@pytest.fixture(scope="module")
def project(new_project):
    with new_project("cat", "coffee") as folder:
        shutil.copytree("data/start", ODD)
        name = "lora_unet_blocks_0_self_attn_q"
        torch.manual_seed(0)
        lora = {f"{name}.lora_down.weight": torch.randn(2, 256), f"{name}.lora_up.weight": torch.randn(256, 2)}
        save_file(lora, LORA[1])
    return folder


@pytest.fixture(autouse=True)
def nothing_made(workspace):
    for path in ("out", "again"):
        shutil.rmtree(path, ignore_errors=True)


def generate(folder: str, *flags: str) -> list[Path]:
    wan_generate_video.main(["--save_path", folder, *flags])
    return sorted(Path(folder).iterdir())


def repeated(path: Path, *flags: str) -> Path:
    """The one file that the recipe of another gives."""
    shutil.rmtree("again", ignore_errors=True)
    (made,) = generate("again", "--recipe", str(path), "--device", "cpu", *flags)
    return made


def content(path: Path) -> tuple[list[float], dict[str, str]]:
    """What a latent file holds: its header has the metadata in any order."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("latent").tolist(), file.metadata()


def test_a_single_picture_is_repeated_to_the_byte():
    (path,) = generate("out", *COMMON, *SINGLE, *LORA, "--sample_solver", "vanilla")
    assert repeated(path).read_bytes() == path.read_bytes()
    options = recipe.read(path).options
    assert options["prompt"] == SINGLE[1] and options["lora_weight"] == [LORA[1]] and options["seed"] == 3


def test_each_picture_of_a_file_of_prompts_is_repeated_to_the_byte():
    lines = ["a cat --l 1", "a dog --n --ci data/start/coffee.png --of control_index=2,target_index=1 --s 3 --fs 4"]
    Path("lines.txt").write_text("\n".join(lines))
    first, second = generate("out", *COMMON, *BASE, "--from_file", "lines.txt", "--exact_size")
    assert pixels(first) != pixels(second)
    for path in (first, second):
        assert repeated(path).read_bytes() == path.read_bytes()  # the seeds were drawn


def test_a_typed_picture_is_repeated_to_the_byte(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --d 5\n"))
    (path,) = generate(
        "out", *COMMON, *BASE, "--interactive", "--fp8_scaled", "--slg_mode", "uncond", "--slg_layers", "0"
    )
    assert repeated(path).read_bytes() == path.read_bytes()


def test_latent_and_picture_of_a_run_are_repeated_from_either_and_so_is_a_decoded_latent():
    image, latent = generate("out", *COMMON, *SINGLE, "--output_type", "latent_images", "--cpu_noise")
    for path in (image, latent):
        assert repeated(path).read_bytes() == image.read_bytes()
        assert content(repeated(path, "--output_type", "latent")) == content(latent)
    (decoded,) = generate("decoded", "--vae", MODELS["vae"], "--latent_path", str(latent), "--device", "cpu")
    assert repeated(decoded).read_bytes() == decoded.read_bytes() and pixels(decoded) == pixels(image)


def test_flags_go_over_the_recipe():
    (path,) = generate("out", *COMMON, *SINGLE, *LORA)
    (expected,) = generate("expected", *COMMON, *SINGLE, *LORA[:-1], "1", "--seed", "4")
    changed = repeated(path, "--seed", "4", "--lora_multiplier", "1")
    assert changed.read_bytes() == expected.read_bytes() != path.read_bytes()


def test_a_recipe_gives_the_settings_of_lines_and_latents(monkeypatch):
    (path,) = generate("out", *COMMON, *SINGLE)
    monkeypatch.setattr("sys.stdin", io.StringIO("a dog\n"))
    typed = repeated(path, "--interactive")
    assert recipe.read(typed).options["prompt"] == "a dog" and recipe.read(typed).options["seed"] == 3
    (latent,) = generate("latent", *COMMON, *SINGLE, "--output_type", "latent")
    assert pixels(repeated(path, "--latent_path", str(latent))) == pixels(path)


def test_without_metadata_nothing_is_told():
    image, latent = generate("out", *COMMON, *SINGLE, "--output_type", "latent_images", "--no_metadata")
    with Image.open(image) as opened, safe_open(latent, "pt") as file:
        assert opened.info == {} and file.metadata() is None
    with pytest.raises(ConfigError, match="holds no recipe"):
        repeated(image)


def test_a_recipe_holds_no_time_and_no_place_of_the_result():
    (path,) = generate("out", *COMMON, *SINGLE)
    found = json.loads(str(recipe.read(path)))
    assert found.keys() == {"options", "files", "made_by"} and "out" not in found["options"].values()
    assert found["made_by"] == {"wan-one-frame": __version__, "torch": torch.__version__, "device": "cpu"}
    assert found["files"].keys() == {*(MODELS[kind] for kind in I2V_KINDS), f"{ODD}/cat.png"}
    assert all(len(value) == 16 for value in found["files"].values())


def edit_when(monkeypatch, function, content: bytes):
    """Put `content` into the control image at the first call of a function of the pipeline."""
    module, original, calls = wan.generation.pipeline, getattr(wan.generation.pipeline, function), []

    def edits(*arguments, **more):
        if not calls:
            Path(f"{ODD}/cat.png").write_bytes(content)
        calls.append(function)
        return original(*arguments, **more)

    monkeypatch.setattr(module, function, edits)


@pytest.fixture
def flipped():
    """The control image upside down, as bytes of a file; the file is put back afterwards."""
    path, buffer = Path(f"{ODD}/cat.png"), io.BytesIO()
    before = path.read_bytes()
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(buffer, "PNG")
    yield buffer.getvalue()
    path.write_bytes(before)


def test_a_recipe_names_the_image_that_was_read_if_it_is_edited_later(monkeypatch, flipped):
    before = Path(f"{ODD}/cat.png").read_bytes()
    Path("lines.txt").write_text("a cat --d 1\na dog --d 2")
    with monkeypatch.context() as patched:
        edit_when(patched, "initial_noise", flipped)
        paths = generate("out", *COMMON, *BASE, "--from_file", "lines.txt")
    for path in paths:
        assert "cat.png is not the file that it was; give" in one_line(path)
    Path(f"{ODD}/cat.png").write_bytes(before)
    for path in paths:
        assert repeated(path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("function", ["encode_text", "encode_clip"])
def test_a_picture_is_of_one_version_of_an_image_that_is_edited_while_it_is_read(monkeypatch, flipped, function):
    """CLIP and the VAE read it one after the other."""
    with monkeypatch.context() as patched:
        edit_when(patched, function, flipped)
        (path,) = generate("out", *COMMON, *SINGLE)
    assert Path(f"{ODD}/cat.png").read_bytes() == flipped
    assert repeated(path).read_bytes() == path.read_bytes()


def test_an_image_that_gets_another_size_meanwhile_is_named(monkeypatch, flipped):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(flipped)).resize((64, 32)).save(buffer, "PNG")
    edit_when(monkeypatch, "encode_text", buffer.getvalue())
    with pytest.raises(ConfigError, match=r"cat.png: has 64x32 pixels, it had \d+x\d+ at the start; run again"):
        generate("out", *COMMON, *SINGLE)


def test_an_image_that_never_stays_the_same_is_named(monkeypatch, flipped):
    versions = iter(range(100))
    monkeypatch.setattr(wan.generation.pipeline, "_version", lambda path: (str(path), next(versions), 0))
    with pytest.raises(ConfigError, match=r"cat.png: changes whenever it is read"):
        generate("out", *COMMON, *SINGLE)


def one_line(path: Path, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        repeated(path, *flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "option"), [(LORA[1], "lora_weight"), (f"{ODD}/cat.png", "control_image_path"), (MODELS["clip"], "clip")]
)
def test_a_file_that_changed_is_named_unless_it_is_given(name, option, monkeypatch):
    (path,) = generate("out", *COMMON, *SINGLE, *LORA)
    before = Path(name).read_bytes()
    for loader in ("load_dit", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(wan.files.load, loader, lambda *_args, **_more: pytest.fail("weights were loaded"))
    try:
        Path(name).write_bytes(before + b" ")
        message = one_line(path)
        assert f"--{option} {name} is not the file that it was; give --{option}" in message
        args = recipe.parse_args(
            wan_generate_video.build_parser(), ["--save_path", "x", "--recipe", str(path), f"--{option}", "other"]
        )
        assert "other" in str(getattr(args, option))
    finally:
        Path(name).write_bytes(before)


def test_a_file_that_is_gone_is_named_and_a_model_can_come_from_a_release_folder(caplog):
    (path,) = generate("out", *COMMON, *SINGLE)
    Path("moved").mkdir()
    shutil.move(MODELS["vae"], "moved")
    try:
        assert "--vae is missing" in one_line(path) and f"--vae {MODELS['vae']} is not there any more" in caplog.text
        assert pixels(repeated(path, "--ckpt_dir", "moved")) == pixels(path)
    finally:
        shutil.move(Path("moved") / Path(MODELS["vae"]).name, "models")
    shutil.move(f"{ODD}/cat.png", "moved")
    try:
        assert "its --control_image_path" in one_line(path)
    finally:
        shutil.move("moved/cat.png", ODD)


def test_other_versions_are_mentioned(caplog, monkeypatch):
    (path,) = generate("out", *COMMON, *SINGLE)
    monkeypatch.setattr(recipe, "__version__", "0.0.9")
    repeated(path)
    assert f"made with wan-one-frame {__version__}, this is 0.0.9" in caplog.text


def png_with(text: str) -> Path:
    info = PngInfo()
    info.add_text("recipe", text)
    Image.new("RGB", (8, 8)).save("hostile.png", pnginfo=info)
    return Path("hostile.png")


def recipe_of(**options: object) -> str:
    return json.dumps({"options": options, "files": {}, "made_by": {}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no JSON", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "damaged"),
        ('{"options": {}}', "damaged"),
        (json.dumps({"options": [], "files": {}, "made_by": {}}), "damaged"),
        (recipe_of(prompt={"a": 1}), "damaged"),
        (recipe_of(prompt=None), "damaged"),
        (recipe_of(save_path="/"), "sets 'save_path'"),
        (recipe_of(save_merged_model="x.safetensors"), "sets 'save_merged_model'"),
        (recipe_of(from_file="x"), "sets 'from_file'"),
        (recipe_of(promt="x"), "did you mean 'prompt'"),
        (recipe_of(seed="x"), "--seed"),
        (recipe_of(seed=[1]), "seed = [1]"),
        (recipe_of(fp8="yes"), "fp8 = 'yes'"),
        (recipe_of(video_size=[48]), "video_size = [48]"),
        (recipe_of(sample_solver="euler"), "--sample_solver"),
        (recipe_of(control_image_path=["none.png"]), "none.png"),
        (recipe_of(prompt="a"), "--vae is missing"),
    ],
)
def test_a_wrong_recipe_is_one_line(text, words):
    assert words in one_line(png_with(text)) and not Path("again").is_dir()


def test_files_without_a_recipe_are_one_line():
    Image.new("RGB", (8, 8)).save("plain.png")
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, "plain.safetensors")
    Path("broken.safetensors").write_bytes(b"\xff" * 100)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, words in {
        **{"plain.png": "no recipe", "plain.safetensors": "no recipe", "none.png": "does not exist"},
        **{"broken.safetensors": "cannot be read", "broken.png": "cannot be read"},
    }.items():
        assert words in one_line(Path(name))


def test_every_option_is_in_recipes_or_makes_no_difference_to_a_picture():
    """A new option belongs into `wan/generation/recipe.py`, or here."""
    elsewhere = {"recipe", "from_file", "interactive", "save_path", "output_type", "no_metadata"}
    elsewhere |= {"save_merged_model", "ckpt_dir", "device", "sweep", "preview", "explain", "image_folder"}
    actions = wan_generate_video.build_parser()._actions
    options = {action.dest for action in actions if action.help != argparse.SUPPRESS and action.dest != "help"}
    assert options - elsewhere == recipe._OPTIONS


def test_versions_of_a_recipe_are_told_on_one_line_without_escape_codes(caplog):
    made_by = {"wan-one-frame": "1\x1b[2J\nx", "torch": torch.__version__, "device": "cpu"}
    with pytest.raises(ConfigError):  # it names no models
        repeated(png_with(json.dumps({"options": {"prompt": "a"}, "files": {}, "made_by": made_by})))
    (line,) = [text for text in caplog.messages if "made with" in text]
    assert "made with wan-one-frame 1 [2J x, this is" in line and line.isprintable()


def test_pictures_and_folders_whose_names_are_no_utf8_work_where_python_opens_them(tmp_path):
    image = shutil.copy(f"{ODD}/cat.png", "cat_\udcff.png")
    base = [image if part == f"{ODD}/cat.png" else part for part in BASE]
    for kind in ("images", "latent"):
        folder = f"out/{kind}_\udcff"
        (made,) = generate(folder, *COMMON, "--prompt", "a cat", "--seed", "3", *base, "--output_type", kind)
        shutil.copy(made, made.name)
        again = repeated(Path(made.name), "--output_type", kind)
        assert recipe.read(again) == recipe.read(Path(made.name))


def test_a_picture_of_the_same_name_at_the_same_moment_replaces_none(tmp_path):
    for shade in (1, 2, 3):
        save_image(tmp_path, "20260101-000000-000_7", Image.new("L", (8, 8), shade), None)
    found = {path.name: Image.open(path).getpixel((0, 0)) for path in tmp_path.iterdir()}
    assert found == {
        "20260101-000000-000_7_000.png": 1,
        "20260101-000000-000_7-2_000.png": 2,
        "20260101-000000-000_7-3_000.png": 3,
    }
