"""`--image_folder`: one picture per image of a folder, as if each had been given alone."""

import shutil
from pathlib import Path

import pytest

from tests.generation.test_preview import FLAGS
from tests.project import generate, pixels
from utils.errors import ConfigError
from wan.generation.options import PromptConfig

pytestmark = pytest.mark.usefixtures("workspace")
REST = FLAGS[2:]


def test_each_picture_is_that_of_its_image_and_named_after_it():
    made = generate("i2v", "folder", "--image_folder", "data/start", *REST)
    stems = [path.stem for path in sorted(Path("data/start").glob("*.png"))]
    assert [path.name.split("_3_")[1] for path in made] == [f"{stem}_000.png" for stem in stems]
    (alone,) = generate("i2v", "alone", "--control_image_path", f"data/start/{stems[-1]}.png", *REST)
    assert alone.read_bytes() == made[-1].read_bytes()  # the recipe included


def test_a_recipe_is_applied_to_a_folder():
    (one,) = generate("i2v", "one", *FLAGS)
    names = ("--image_folder", "data/start", "--recipe", str(one))
    again = [path for path in generate("i2v", "many", *names) if "_cat_" in path.name]
    assert [pixels(path) for path in again] == [pixels(one)]


def test_a_name_that_is_too_long_for_its_picture_is_told_before_any_is_made(tmp_path):
    for stem in ("a", "y" * 240):
        shutil.copy("data/start/cat.png", tmp_path / f"{stem}.png")
    with pytest.raises(ConfigError, match=r"--image_folder: .*yyy.*: names that begin so can't be written here"):
        generate("i2v", "folder", "--image_folder", str(tmp_path), *REST)
    assert not any(Path("folder").iterdir())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"control_image_path": ("a.png",)}, "--image_folder and --control_image_path exclude"),
        ({"from_file": Path("a.txt"), "prompt": None}, "--image_folder and --from_file exclude"),
        ({"image_folder": Path("models")}, "--image_folder models: is no folder with images"),
        ({"image_folder": Path("data/start/cat.png")}, "is no folder with images"),
    ],
)
def test_mistakes_are_one_line(values, words):
    with pytest.raises(ConfigError, match=words):
        PromptConfig(**{"prompt": "a", "image_folder": Path("data/start")} | values).prompts()
