"""Sample data: what the guide shows, written once and never over files of the user's."""

import pytest

from dataset import config
from dataset.sources import find_all_items
from demo.photos import PHOTOS
from demo.sample_data import guide_files, main
from utils.errors import ConfigError
from wan.models.options import DiTConfig, ReleaseConfig


def test_the_files_of_the_guide_find_every_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--miniature"])
    assert "dataset.toml" in guide_files()
    for name in guide_files():
        if name.endswith(".toml"):
            assert len(find_all_items(config.read_config(name))) == len(PHOTOS)
    assert ReleaseConfig(ckpt_dir=tmp_path / "models").fill(DiTConfig(task="i2v-14B")).resolve().spec.num_layers == 5


@pytest.mark.parametrize("name", ["data", "prompts.txt", "models"])
def test_nothing_is_written_over_what_is_there(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name}: exists"):
        main(["--to", str(tmp_path), "--miniature"])
    assert list(tmp_path.iterdir()) == [tmp_path / name]
