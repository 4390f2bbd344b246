"""control_resolution and no_resize_control from the dataset to the picture, through the scripts with tiny models."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_dataset
import wan_generate_video
from dataset.cache import latent_source_reason, list_latent_caches, read_header, read_latent_cache
from dataset.check import check
from dataset.config import read_config
from dataset.loader import TrainingSet, load_batch
from dataset.sources import find_all_items
from tests.dit_cases import denoised
from tests.frames.test_scratch import Alone
from tests.project import (
    I2V,
    MODELS,
    cache,
    cache_latents,
    cached_cat,
    dataset_toml,
    encoded,
    from_lines,
    generate,
    model_flags,
    pipeline,
    run_flags,
    train,
)
from tests.test_explain import rows
from utils.errors import ConfigError
from wan.frames.sizes import ControlSizes
from wan.generation.prompt_lines import TRAINING, parse_line
from wan.generation.recipe import read as read_recipe
from wan.generation.request import Request, SamplingConfig
from wan.models.tasks import TASKS

pytestmark = pytest.mark.usefixtures("workspace")
INDICES = "fp_1f_clean_indices = [0]\nfp_1f_target_index = 1\n"
KEYS = {  # name -> keys of the dataset; the control images are 320 x 213 and 320 x 320
    "smaller": "control_resolution = 32",
    "larger": "control_resolution = [64, 80]",
    "kept": "no_resize_control = true\ncontrol_resolution = 400",
}
TEXTS = {"smaller": "control_resolution=32", "larger": "control_resolution=64x80"}
TEXTS["kept"] = "control_resolution=400,no_resize_control=true"
SIZES = {"smaller": (32, 32), "larger": (80, 64), "kept": (320, 208)}  # of the cat


def line(name: str, text: str = I2V) -> str:
    return text.replace("target_index=1", f"target_index=1,{TEXTS[name]}")


@pytest.fixture(params=KEYS)
def name(request):
    return request.param


def made(name: str) -> str:
    config = dataset_toml(f"own_{name}", keys=INDICES + KEYS[name])
    if not Path(f"cache/own_{name}").exists():
        cache(config)
    return config


def test_the_cache_and_generation_give_the_same_condition_and_sizes(name):
    batch, row = cached_cat(made(name))
    once = encoded(line(name), "i2v-14B")
    width, height = SIZES[name]
    assert batch.frame_sizes == once.request.frame_sizes == ((height // 8, width // 8), (6, 6))
    assert torch.equal(batch.conditioning.channels[row], once.conditioning.channels)
    assert batch.target_size == (6, 6) and batch.latents.shape[3:] == (max(height // 8, 6), max(width // 8, 6))


def test_items_of_a_batch_have_equal_sizes_and_a_header_tells_them(name):
    training_set = TrainingSet(read_config(made(name)), seed=0)
    for plan in training_set.epoch_batches(1):
        headers = [read_header(item.latents) for item in plan.items]
        assert len({header.sizes for header in headers}) == 1 and {header.bucket for header in headers} == {(48, 48)}
        batch = load_batch(plan)
        assert batch.frame_sizes == plan.items[0].layout.clip.frame_sizes(headers[0].sizes)
        assert batch.target_masks.sum() == len(plan.items) * 36
    assert {bucket.tokens for bucket in training_set.buckets} >= {9 + SIZES[name][0] * SIZES[name][1] // 256}


def test_without_the_keys_caches_hold_nothing_new():
    (path, *_) = list_latent_caches(Path("cache/pairs"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == ["architecture", "format_version", "height", "one_frame", "settings", "width"]
    assert metadata["one_frame"] == "control_index=0,target_index=1" and "sizes" not in metadata["settings"]
    assert read_header(path).sizes is None and read_latent_cache(path).frame_sizes is None


def test_sizes_that_turn_out_equal_are_as_good_as_none():
    cache(dataset_toml("same", keys=INDICES + "control_resolution = 48"))
    (path,) = (path for path in list_latent_caches(Path("cache/same")) if path.name.startswith("brick"))  # a square
    with safe_open(path, "pt") as file:
        assert "one_frame_sizes" not in file.metadata()
    (plain,) = (path for path in list_latent_caches(Path("cache/pairs")) if path.name.startswith("brick"))
    one, other = read_latent_cache(path), read_latent_cache(plain)
    assert torch.equal(one.conditioning.channels, other.conditioning.channels) and torch.equal(
        one.latents, other.latents
    )


def test_a_run_trains_samples_and_tells_sizes_that_generation_takes_up(name):
    """The sample before training equals the picture of the base model, and a LoRA file says what `auto` stands for."""
    Path("prompts.txt").write_text(I2V)
    shutil.rmtree("output", ignore_errors=True)
    flags = ("--sample_prompts", "prompts.txt", "--sample_at_first", "--exact_size")
    train("i2v", made(name), f"own_{name}", *flags)
    (sample,) = Path("output/sample").glob("*.png")
    (drawn,) = from_lines("i2v", "out_base", line(name), flags=("--exact_size",))
    assert Image.open(sample).tobytes() == Image.open(io.BytesIO(drawn)).tobytes()
    lora = f"output/own_{name}.safetensors"
    with safe_open(lora, "pt") as file:
        assert file.metadata()["ss_one_frame"] == str(encoded(line(name), "i2v-14B").request.layout)
    plain = I2V.replace("control_index=0,target_index=1", "auto")
    with_lora = ("--lora_weight", lora, "--exact_size")
    assert from_lines("i2v", "out_lora", plain, flags=with_lora) == from_lines(
        "i2v", "out", line(name), flags=with_lora
    )


def test_a_flag_a_prompt_and_a_recipe_make_the_same_picture():
    flags = ["--prompt", "a", "--control_image_path", "data/start/cat.png", "--seed", "3", "--infer_steps", "2"]
    flags += ["--video_size", "48", "64", "--one_frame_inference"]
    text = "control_index=0,target_index=1"
    pictures = {}
    for case, more in {
        "plain": [text],
        "text": [f"{text},control_resolution=64x80"],
        "flag": [text, "--control_resolution", "64x80"],
        "kept": [text, "--no_resize_control"],
    }.items():
        (path,) = generate("i2v", f"out_{case}", *flags, *more)
        pictures[case] = Image.open(path).tobytes()
        (again,) = generate("i2v", f"again_{case}", "--recipe", str(path))
        assert again.read_bytes() == path.read_bytes()
    assert pictures["text"] == pictures["flag"] and len(set(pictures.values())) == 3
    assert read_recipe(path).options["one_frame_inference"] == f"{text},no_resize_control=true"


def test_the_noise_of_the_target_is_the_same_whatever_the_controls(name):
    """A network that sees each frame alone then makes the same target."""
    text = I2V.replace("target_index=1", "target_index=7")
    results = []
    for words in (text, text.replace("target_index=7", f"target_index=7,{TEXTS[name]}")):
        for frames in (0, 2):
            prompt = parse_line(words, "test", TRAINING)
            settings = SamplingConfig(exact_size=True, reasoning_frames=frames)
            request = Request.resolve(prompt, TASKS["i2v-14B"], settings)
            (once,) = pipeline().encode([request])
            results.append(denoised(Alone(), once))
            assert results[-1].shape == (16, 1, 6, 6)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_sweep_varies_the_size_of_the_controls():
    flags = ["--prompt", "a", "--control_image_path", "data/start/cat.png", "--seed", "3", "--infer_steps", "1"]
    flags += ["--one_frame_inference", "target_index=1,control_index=0", "--video_size", "48", "48"]
    paths = generate("i2v", "out_sweep", *flags, "--sweep", "control_resolution=32,64x80")
    pictures = [path for path in paths if "sweep" not in path.name]
    assert len(pictures) == 2 and len({Image.open(path).tobytes() for path in pictures}) == 2


@pytest.mark.parametrize("flags", [("--pin_controls",), ("--reasoning_frames", "2"), ("--separate_passes",)])
def test_other_options_go_along(name, flags):
    text = line(name).replace("control_index=0", "control_index=4")
    (picture,) = from_lines("i2v", "out_more", text, flags=flags)
    assert picture != from_lines("i2v", "out_less", text)[0] or flags == ("--separate_passes",)


def test_masks_follow_the_size_of_their_image(name):
    half = Image.new("L", (320, 213))
    half.paste(255, (0, 0, 320, 107))
    half.save("mask.png")
    once = encoded(f"{line(name)} --cim mask.png", "i2v-14B")
    rows, columns = once.request.frame_sizes[0]
    given = once.conditioning.channels[0, 0]
    assert torch.equal(once.conditioning.given[0], given)
    assert given[: rows // 2 - 1, :columns].all() and not given[rows // 2 + 1 :].any() and not given[:, columns:].any()


def test_caches_are_made_again_when_a_key_changes_and_training_refuses_them_until_then():
    config = Path(made("smaller"))
    before = config.read_text()
    items = find_all_items(read_config(config))
    paths = {path.name.split("_")[0]: path for path in list_latent_caches(Path("cache/own_smaller"))}
    assert all(latent_source_reason(paths[item.stem], item) is None for item in items)
    for keys in ("", "control_resolution = 64", "control_resolution = 32\nno_resize_control = true"):
        config.write_text(before.replace(KEYS["smaller"], keys))
        for item in find_all_items(read_config(config)):
            reason = latent_source_reason(paths[item.stem], item)
            assert reason == "control_resolution or no_resize_control changed"
        with pytest.raises(ConfigError, match=r"do not serve .*; give the same control_resolution and no_resize_contr"):
            TrainingSet(read_config(config), seed=0)
    config.write_text(before.replace(KEYS["smaller"], "control_resolution = 64"))
    cache_latents(str(config), "--skip_existing")
    assert read_header(paths["brick"]).sizes == ((64, 64), (48, 48))
    TrainingSet(read_config(config), seed=0)
    shutil.rmtree("cache/own_smaller")


def test_older_names_of_the_keys_are_translated(caplog):
    text = INDICES + "qwen_image_edit_control_resolution = 32\nflux_kontext_no_resize_control = true"
    config = dataset_toml("older", keys=text)
    assert read_config(config).control_sizes == ControlSizes((32, 32), True)
    assert "is called control_resolution now" in caplog.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("control_resolution = 8", r"datasets[0].control_resolution = 8: is too small"),
        ("control_resolution = '512'", 'datasets[0].control_resolution = "512": is not a size'),
        ("no_resize_control = 1", "datasets[0].no_resize_control = 1: must be true or false"),
        (
            "control_resolution = 32\nfp_1f_layout = 'causal'",
            "datasets[0]: control_resolution=32x32: the causal layout",
        ),
        ("no_resize_control = true\nfp_1f_layout = 'causal'", "datasets[0]: no_resize_control=true: the causal layout"),
        ("no_resize_control = true\nqwen_image_edit_no_resize_control = true", "no_resize_control: is given twice"),
    ],
)
def test_wrong_keys_are_one_line(keys, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        read_config(dataset_toml("wrong", keys=INDICES + keys))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("wrong.toml: ")


@pytest.mark.parametrize("flags", [("--control_resolution", "8"), ("--control_resolution", "a")])
def test_wrong_flags_are_one_line(flags):
    with pytest.raises(ConfigError, match=rf"control_resolution={flags[1]} is not a size of at least 16 a side"):
        generate("i2v", "out", "--prompt", "a", *flags)


def small_controls() -> str:
    shutil.copytree("data/start", "data/thin", dirs_exist_ok=True)
    Image.new("RGB", (300, 12)).save("data/thin/cat.png")
    return dataset_toml("thin", "target", "thin", INDICES + "no_resize_control = true")


def test_a_control_that_is_too_small_is_named():
    with pytest.raises(ConfigError, match=r"thin\.toml: datasets\[0\]\.control_directory .*cat\.png: 300x12 pixels"):
        find_all_items(read_config(small_controls()))
    (problem, *_) = (problem for problem in check(Path("thin.toml")).problems if problem.code == "D36")
    assert problem.file.endswith("cat.png") and problem.fix == "use another image"
    prompt = I2V.replace("start/cat", "thin/cat").replace("target_index=1", "target_index=1,no_resize_control=true")
    request = parse_line(f"{prompt} --i data/start/cat.png", "line 3", TRAINING)
    with pytest.raises(ConfigError, match=r"line 3: control image .*cat\.png: 300x12 pixels leave a side below 16"):
        Request.resolve(request, TASKS["i2v-14B"], SamplingConfig())


def test_a_damaged_list_of_sizes_is_told(tmp_path):
    (path, *_) = list_latent_caches(Path("cache/pairs"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for sizes in ("", "48x48", "48x48;a", "48x48;480x480", "48x48;0x48", "48x48;40x48", "1;2"):
        save_file(load_file(path), tmp_path / path.name, metadata | {"one_frame_sizes": sizes})
        with pytest.raises(ConfigError, match=r"its one_frame_sizes .* do not fit .*run wan_cache_latents.py again"):
            read_header(tmp_path / path.name)


def test_tables_tell_the_size_and_the_tokens_of_each_frame(name, capsys):
    config = made(name)
    width, height = SIZES[name]
    size, tokens = f"{width}x{height}", width * height // 256
    capsys.readouterr()
    cache_latents(config, "--explain")
    control, target, *_ = rows(capsys.readouterr().out)
    first = [int(side) for side in control[4].rpartition(" ")[2].split("x")]
    assert int(control[-1]) == first[0] * first[1] // 256 and target[4].endswith("48x48") and target[-1] == "9"
    generation = [*model_flags("i2v"), *run_flags(), "--save_path", "out", "--explain"]
    Path("one.txt").write_text(line(name))
    wan_generate_video.main([*generation, "--from_file", "one.txt", "--exact_size"])
    text = capsys.readouterr().out
    assert rows(text)[0][4] == f"320x213 -> {size}" and f"tokens per forward: {tokens} + 9 = {tokens + 9}" in text
    train("i2v", config, "explained", "--explain")
    text = capsys.readouterr().out
    assert f"{size}, 48x48 in" in text and f"tokens per forward: {tokens} + 9 = {tokens + 9}" in text
    assert all(row[-2] == "all" for row in rows(text))


def test_sheets_and_checks_show_controls_in_their_own_size(name):
    config = made(name)
    Path("sheet.png").unlink(missing_ok=True)
    wan_dataset.main(
        ["sheet", "--dataset_config", config, "--output", "sheet.html", "--vae", MODELS["vae"], "--device", "cpu"]
    )
    shown = "control 0 at index 0, {}x{}".format(*SIZES[name])
    assert Path("sheet.png").is_file() and shown in Path("sheet.html").read_text(encoding="utf-8")
    report = check(Path(config))
    (row, *_) = (row for row in report.buckets if SIZES[name] in row.controls)
    assert (row.width, row.height, row.frames) == (48, 48, 2)
    assert json.dumps(report.as_json()) and not {"D20", "D21", "D32"} & {problem.code for problem in report.problems}


def test_random_targets_train_beside_controls_of_their_own_size(name):
    lora = train("i2v", made(name), "ranged", "--one_frame_target_range", "1-9", "--one_frame_loss", "target")
    with safe_open(lora, "pt") as file:
        assert any(file.get_tensor(key).any() for key in file.keys() if "lora_up" in key)  # noqa: SIM118


@pytest.mark.parametrize("indices", [(4, 0, 2), (0, 4, 2), (1, 3, 9)])
@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_several_controls_keep_their_sizes_at_any_index_without_new_caches(indices, task):
    """The cat is wider than high, the wall a square."""
    *controls, target = indices
    entry = {"image_path": "data/target/cat.png", "caption": "a", "control_path_0": "data/start/cat.png"}
    Path("two.jsonl").write_text(json.dumps(entry | {"control_path_1": "data/start/brick.png"}))
    keys = f"fp_1f_clean_indices = {controls}\nfp_1f_target_index = {target}\n{KEYS['larger']}"
    head = '[[datasets]]\nimage_jsonl_file = "two.jsonl"\ncache_directory = "cache/two"\nresolution = [48, 48]\n'
    Path("two.toml").write_text(head + keys)
    if not Path("cache/two").exists():
        cache("two.toml")
    (plan,) = TrainingSet(read_config("two.toml"), seed=0).epoch_batches(1)
    batch = load_batch(plan)
    text = f"control_index={controls[0]};{controls[1]},target_index={target},{TEXTS['larger']}"
    once = encoded(f"a --ci data/start/cat.png --ci data/start/brick.png --of {text} --w 48 --h 48 --d 1", task)
    by_time = dict(zip(indices, [(8, 10), (10, 8), (6, 6)], strict=True))
    assert batch.frame_sizes == once.request.frame_sizes == tuple(by_time[time] for time in sorted(indices))
    assert torch.equal(batch.conditioning.channels[0], once.conditioning.channels) and batch.target_size == (6, 6)
