"""Training stops on caches whose images or captions were changed after they were cached."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dataset.config import read_config
from dataset.freshness import require_fresh
from tests.project import cache, train
from utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("copied_workspace")
TARGET, CONTROL, CAPTION = Path("data/target/cat.png"), Path("data/start/cat.png"), Path("data/target/cat.txt")


def later(path: Path) -> None:
    """The file is newer than all caches."""
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 3600))


def fresh(config: str = "pairs.toml") -> None:
    require_fresh(read_config(config))


def test_what_was_cached_and_what_was_only_touched_or_copied_is_fresh():
    fresh()
    fresh("middle.toml")
    for path in (TARGET, CONTROL, CAPTION):
        later(path)
    fresh()


@pytest.mark.parametrize(("path", "reason"), [(TARGET, "target image changed"), (CONTROL, "control image changed")])
def test_another_image_under_the_name_is_noticed(path, reason):
    Image.new("RGB", Image.open(path).size, "red").save(path)
    later(path)
    with pytest.raises(ConfigError, match=rf"^pairs.toml: 1 cache out of date: cat_\S+ \({reason}\)"):
        fresh()


def test_another_use_of_alpha_channels_is_noticed():
    picture = Image.open(TARGET).convert("RGBA")
    picture.putalpha(128)
    picture.save(TARGET)
    cache("pairs.toml")
    fresh()
    with pytest.raises(ConfigError, match=r"1 cache out of date: .*other use of alpha channels"):
        require_fresh(read_config("pairs.toml", alpha="ignore"))


def test_another_caption_is_noticed():
    CAPTION.write_text("a dog", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"1 cache out of date: cat_wan_te.safetensors \(the caption has changed\)"):
        fresh()


def test_an_image_that_was_never_cached_is_named(caplog):
    for folder in ("start", "target"):
        shutil.copy(f"data/{folder}/cat.png", f"data/{folder}/new.png")
    shutil.copy(CAPTION, "data/target/new.txt")
    fresh()
    assert "1 image without a cache, not trained on: new.png" in caplog.text


def test_caches_alone_are_enough():
    shutil.rmtree("data/target")
    fresh()


def test_training_stops_unless_it_is_told_to_go_on():
    CAPTION.write_text("a dog", encoding="utf-8")
    with pytest.raises(ConfigError, match="give --use_stale_caches"):
        train("i2v", "pairs.toml", "stopped", "--max_train_steps", "1")
    assert train("i2v", "pairs.toml", "went_on", "--max_train_steps", "1", "--use_stale_caches").is_file()
