"""Any number of control images, and items that choose their own time indices."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dataset.cache import list_latent_caches, read_header, read_latent_cache
from dataset.config import read_config
from dataset.loader import TrainingSet, clip_for, load_batch
from tests.project import cache, cache_latents, encoded, generate, train
from utils.errors import ConfigError
from wan.frames.layout import OneFrameLayout
from wan.models.tasks import TASKS

pytestmark = pytest.mark.usefixtures("workspace")
STARTS = [f"data/start/{name}.png" for name in ("cat", "coffee", "brick", "astronaut")]
LINES = {  # stem of the target -> its own indices
    "cat": {"control_index": [0, 2], "target_index": 1},
    "coffee": {"control_index": [0, 4, 2], "target_index": 9},
    "brick": {"target_index": 5},
    "astronaut": {},
}
LAYOUTS = {
    "cat": OneFrameLayout((0, 2), 1),
    "coffee": OneFrameLayout((0, 4, 2), 9),
    "brick": OneFrameLayout((3,), 5),
    "astronaut": OneFrameLayout((3,), 1),
}


def write_list(name: str, changes: dict | None = None, keys: str = "fp_1f_clean_indices = [3]\nfp_1f_target_index = 1"):
    """`name`.toml and its list, in which each item has as many controls as its layout asks for."""
    lines = []
    for stem, own in (LINES | (changes or {})).items():
        controls = {f"control_path_{i}": STARTS[i] for i in range(len(LAYOUTS[stem].control_indices))}
        lines.append({"image_path": f"data/target/{stem}.png", "caption": stem, **controls, **own})
    Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    Path(f"{name}.toml").write_text(
        f'[[datasets]]\nimage_jsonl_file = "{name}.jsonl"\ncache_directory = "cache/{name}"\nresolution = [48, 48]\n'
        f"batch_size = 2\n{keys}\n",
        encoding="utf-8",
    )
    return f"{name}.toml"


@pytest.fixture
def config():
    path = write_list("many")
    if not Path("cache/many").exists():
        cache(path)
    return path


def line(stem: str) -> str:
    layout = LAYOUTS[stem]
    controls = " ".join(f"--ci {path}" for path in STARTS[: len(layout.control_indices)])
    return f"{stem} {controls} --of {layout} --w 48 --h 48 --s 2 --d 7"


def test_items_have_their_own_layouts_and_what_they_leave_open_is_the_datasets(config):
    training_set = TrainingSet(read_config(config), seed=0)
    found = {item.key.split("/")[1].split("_")[0]: item.layout for item in training_set.items}
    assert found == LAYOUTS
    assert Counter(bucket.frames for bucket in training_set.buckets) == {2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
@pytest.mark.parametrize("stem", LAYOUTS)
def test_training_and_generation_see_the_same(config, stem, task):
    for plan in TrainingSet(read_config(config), seed=0).epoch_batches(1):
        batch = load_batch(plan)
        for row, key in enumerate(batch.item_keys):
            if f"/{stem}_" in key:
                once = encoded(line(stem), task)
                assert torch.equal(batch.conditioning.channels[row], once.conditioning.channels)
                assert torch.equal(clip_for(batch, TASKS[task].clip_images)[row], once.conditioning.clip)
                assert tuple(batch.frame_indices[row].tolist()) == once.request.layout.clip.time_indices


@pytest.mark.parametrize("model", ["i2v", "flf2v"])
def test_one_run_trains_on_items_with_different_numbers_of_controls(config, model):
    lora = train(model, config, f"many_{model}", "--max_train_steps", "6")
    with safe_open(lora, "pt") as file:
        told = json.loads(file.metadata()["ss_one_frame_layouts"])
    assert sorted(told) == sorted(map(str, LAYOUTS.values()))


@pytest.mark.parametrize("model", ["i2v", "flf2v"])
def test_generation_takes_three_controls_and_each_of_them_counts(model):
    flags = ["--prompt", "a", "--seed", "3", "--infer_steps", "2", "--one_frame_inference", str(LAYOUTS["coffee"])]
    pictures = set()
    for third in ("brick", "astronaut"):
        controls = [*STARTS[:2], f"data/start/{third}.png"]
        (path,) = generate(model, f"out_{model}", *flags, "--control_image_path", *controls)
        pictures.add(Image.open(path).tobytes())
    assert len(pictures) == 2


def test_indices_of_an_item_are_those_it_was_cached_with(config):
    (path,) = (path for path in list_latent_caches(Path("cache/many")) if path.name.startswith("coffee_"))
    assert (
        read_header(path).layout == LAYOUTS["coffee"] == read_latent_cache(path).layout
        and read_header(path).owns_layout
    )
    other = write_list("other_keys", keys="fp_1f_clean_indices = [7]\nfp_1f_target_index = 8")
    shutil.copytree("cache/many", "cache/other_keys")
    found = {item.key.split("/")[1].split("_")[0]: item.layout for item in TrainingSet(read_config(other), 0).items}
    assert found == LAYOUTS | {"astronaut": OneFrameLayout((7,), 8)}


def test_skip_existing_encodes_items_whose_own_indices_changed(config):
    write_list("many", {"coffee": {"control_index": [0, 4, 2], "target_index": 1}, "brick": {}})
    before = {path.name: path.stat().st_mtime_ns for path in list_latent_caches(Path("cache/many"))}
    cache_latents(config, "--skip_existing")
    after = {path.name: path.stat().st_mtime_ns for path in list_latent_caches(Path("cache/many"))}
    assert sorted(name.split("_")[0] for name in after if after[name] != before[name]) == ["brick", "coffee"]
    shutil.rmtree("cache/many")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"control_index": [0], "target_index": 1}, "2 control images for control_index=0"),
        ({"control_index": [0, 1], "target_index": 1}, "target_index=1 is also a control index"),
        ({"control_index": [0, 0], "target_index": 1}, "control_index=0;0 holds an index twice"),
        ({"control_index": [0, -2], "target_index": 1}, "control_index=-2 is negative"),
        ({"control_index": "0;2", "target_index": 1}, 'control_index = "0;2": is not a list'),
        ({"control_index": [0, 2], "target_index": "1"}, 'target_index = "1": is not a whole number'),
        ({"control_index": [0, 2]}, "target_index is missing"),
        ({"target_index": 1}, "control_index is missing; give 2 indices"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(own, words):
    path = write_list("wrong", {"cat": own}, keys="")
    with pytest.raises(ConfigError, match=rf"wrong\.jsonl:1: {words}") as caught:
        cache(path)
    assert "\n" not in str(caught.value)
