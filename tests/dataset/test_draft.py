"""`wan_dataset.py init`: the files that it writes serve the other scripts, and nothing of the user's is touched."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_dataset
import wan_train_network
from dataset.config import read_config
from dataset.sources import find_all_items
from utils.errors import ConfigError
from wan.frames.layout import parse
from wan.generation.prompt_lines import TRAINING, parse_line

BEFORE, AFTER = Path("before"), Path("after")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Two pairs with captions, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for folder in (BEFORE, AFTER):
        folder.mkdir()
        for name in ("cat", "my_dog"):
            Image.new("RGB", (640, 480), "red").save(folder / f"{name}.png")
    for name in ("cat", "my_dog"):
        (AFTER / f"{name}.txt").write_text(f"a {name}", encoding="utf-8")


def init(*flags: str) -> None:
    wan_dataset.main(["init", str(BEFORE), str(AFTER), *flags])


def test_the_files_serve_the_other_scripts(capsys):
    init()
    shown = capsys.readouterr().out
    (dataset,) = read_config("dataset.toml").datasets
    assert dataset.resolution == (640, 480) and dataset.cache_directory == Path("cache")
    items = find_all_items(read_config("dataset.toml"))
    assert [item.caption for item in items] == ["a cat", "a my_dog"]
    assert str(items[0].layout) == "control_index=0,target_index=1"
    lines = Path("prompts.txt").read_text(encoding="utf-8").splitlines()
    for line, item in zip(lines, items, strict=True):
        prompt = parse_line(line, "prompts.txt", TRAINING)
        assert prompt.prompt == item.caption and parse(prompt.one_frame) == item.layout
        assert [Path(path) for path in prompt.control_image_path] == list(item.controls)
    scripts = {
        **{"wan_dataset": wan_dataset, "wan_cache_latents": wan_cache_latents},
        **{"wan_cache_text_encoder_outputs": wan_cache_text_encoder_outputs, "wan_train_network": wan_train_network},
    }
    commands = [shlex.split(line) for line in shown.partition("next:\n")[2].splitlines()]
    assert len(commands) == 4
    for words in commands:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        scripts[words[place].removesuffix(".py")].build_parser().parse_args(words[place + 1 :])


def test_what_has_no_partner_is_named(capsys):
    Image.new("RGB", (32, 32)).save(BEFORE / "lonely.png")
    Image.new("RGB", (32, 32)).save(AFTER / "new.png")
    init()
    shown = capsys.readouterr().out
    assert "2 pairs" in shown
    assert (
        "1 without a control image, left out: new.png" in shown and "1 without a target, left out: lonely.png" in shown
    )


def test_missing_captions_are_written_and_others_stay():
    (AFTER / "my_dog.txt").unlink()
    init("--caption", "{name} in the rain", "--trigger", "zq")
    assert (AFTER / "my_dog.txt").read_text(encoding="utf-8") == "zq, my dog in the rain\n"
    assert (AFTER / "cat.txt").read_text(encoding="utf-8") == "a cat"


def test_several_control_images_surround_the_target():
    (BEFORE / "cat.png").rename(BEFORE / "cat_0.png")
    (BEFORE / "my_dog.png").rename(BEFORE / "my_dog_0.png")
    for name in ("cat", "my_dog"):
        Image.new("RGB", (640, 480)).save(BEFORE / f"{name}_1.png")
    init()
    assert [str(item.layout) for item in find_all_items(read_config("dataset.toml"))] == [
        "control_index=0;2,target_index=1"
    ] * 2


@pytest.mark.parametrize(
    ("sizes", "resolution"),
    [([(640, 480), (640, 480)], (640, 480)), ([(4000, 3000)] * 2, (1168, 880)), ([(640, 480), (300, 200)], (544, 544))],
)
def test_the_resolution_is_that_of_the_targets(sizes, resolution):
    for name, size in zip(("cat", "my_dog"), sizes, strict=True):
        Image.new("RGB", size).save(AFTER / f"{name}.png")
    init()
    assert read_config("dataset.toml").datasets[0].resolution == resolution


@pytest.mark.parametrize("name", ["dataset.toml", "prompts.txt"])
def test_nothing_is_written_over_what_is_there(name):
    Path(name).write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name}: exists"):
        init("--caption", "x")
    assert Path(name).read_text(encoding="utf-8") == "mine"
    assert len(list(Path().iterdir())) == 3


def test_mistakes_are_one_line_and_write_nothing():
    (AFTER / "my_dog.txt").unlink()
    with pytest.raises(ConfigError, match=r"1 target without a caption file \(my_dog.png\)"):
        init()
    with pytest.raises(ConfigError, match="nowhere: is not a folder"):
        wan_dataset.main(["init", "nowhere", str(AFTER)])
    empty = Path("empty")
    empty.mkdir()
    with pytest.raises(ConfigError, match="no picture is named like one in"):
        wan_dataset.main(["init", str(empty), str(AFTER)])
    assert not Path("dataset.toml").exists() and not (AFTER / "my_dog.txt").exists()
