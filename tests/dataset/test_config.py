"""The dataset configuration file: every key, the order of lookup, and one-line messages for mistakes."""

import json
from pathlib import Path

import pytest

from dataset.config import ImageDatasetConfig, image_source, read_config
from utils.errors import ConfigError
from wan.frames.layout import OneFrameLayout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images/, control/ and list.jsonl."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "control", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "list.jsonl").write_text("", encoding="utf-8")
    return tmp_path


def read(text, name="train.toml", **keywords):
    Path(name).write_text(text, encoding="utf-8")
    config = read_config(name, **keywords)
    for i, dataset in enumerate(config.datasets):
        image_source(f"{config.path}: datasets[{i}]", dataset)
    return config


ENTRY = """
[[datasets]]
image_directory = "images"
caption_extension = ".txt"
"""


def test_the_example_of_the_spec_reads_as_documented(folder):
    config = read("""
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true

[[datasets]]                      # plain one-frame editing (i2v-14B)
image_directory = "images"
control_directory = "control"
cache_directory = "data/cache"
num_repeats = 1
fp_1f_clean_indices = [0]
fp_1f_target_index = 1
fp_1f_no_post = false

[[datasets]]                      # intermediate frame (flf2v-14B)
image_directory = "other"
control_directory = "control"
cache_directory = "data2/cache"
fp_1f_clean_indices = [0, 2]
fp_1f_target_index = 1
""")
    common = {"resolution": (960, 544), "caption_extension": ".txt", "enable_bucket": True, "target_index": 1}
    common["control_directory"] = Path("control")
    first = ImageDatasetConfig(
        image_directory=Path("images"), cache_directory=Path("data/cache"), clean_indices=(0,), **common
    )
    second = ImageDatasetConfig(
        image_directory=Path("other"), cache_directory=Path("data2/cache"), clean_indices=(0, 2), **common
    )
    assert config.datasets == (first, second) and config.path == Path("train.toml")
    assert second.layout == OneFrameLayout((0, 2), 1)


def test_defaults_are_those_of_the_spec(folder):
    (dataset,) = read(ENTRY).datasets
    assert dataset == ImageDatasetConfig(
        resolution=(960, 544),
        caption_extension=".txt",
        batch_size=1,
        num_repeats=1,
        enable_bucket=False,
        bucket_no_upscale=False,
        image_directory=Path("images"),
        image_jsonl_file=None,
        control_directory=None,
        cache_directory=Path("images"),
        validation=False,
        clean_indices=None,
        target_index=None,
        no_post=False,
        latent_window_size=9,
    )
    assert dataset.layout == OneFrameLayout((0,), 1)


def test_every_key_arrives_in_its_field(folder):
    (dataset,) = read(
        ENTRY
        + """
resolution = 512
batch_size = 4
num_repeats = 3
enable_bucket = true
bucket_no_upscale = true
control_directory = "control"
cache_directory = 'a\\b [1]'
validation = true
fp_1f_clean_indices = [9, 0]
fp_1f_target_index = 4
fp_1f_no_post = true
fp_latent_window_size = 7
"""
    ).datasets
    assert dataset == ImageDatasetConfig(
        resolution=(512, 512),
        caption_extension=".txt",
        batch_size=4,
        num_repeats=3,
        enable_bucket=True,
        bucket_no_upscale=True,
        image_directory=Path("images"),
        control_directory=Path("control"),
        cache_directory=Path("a\\b [1]"),
        validation=True,
        clean_indices=(9, 0),
        target_index=4,
        no_post=True,
        latent_window_size=7,
    )
    assert (dataset.buckets.resolution, dataset.buckets.enabled, dataset.buckets.no_upscale) == ((512, 512), True, True)


@pytest.mark.parametrize(
    ("entry", "general", "command_line", "expected"),
    [(2, 3, 4, 2), (None, 3, 4, 3), (None, None, 4, 4), (None, None, None, 1), (2, None, 4, 2), (None, 3, None, 3)],
)
def test_a_value_comes_from_entry_then_general_then_command_line_then_default(
    folder, entry, general, command_line, expected
):
    text = "[general]\n" + (f"batch_size = {general}\n" if general else "")
    text += ENTRY + (f"batch_size = {entry}\n" if entry else "")
    assert read(text, batch_size=command_line).datasets[0].batch_size == expected


def test_false_in_an_entry_overrides_true_in_general(folder):
    assert (
        read("[general]\nenable_bucket = true\n" + ENTRY + "enable_bucket = false").datasets[0].enable_bucket is False
    )


def test_a_json_file_reads_like_the_toml_file(folder):
    text = {
        "general": {"resolution": [320, 480]},
        "datasets": [{"image_jsonl_file": "list.jsonl", "cache_directory": "c"}],
    }
    from_json = read(json.dumps(text), "train.json")
    from_toml = read(
        '[general]\nresolution=[320, 480]\n[[datasets]]\nimage_jsonl_file="list.jsonl"\ncache_directory="c"'
    )
    assert from_json.datasets == from_toml.datasets


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(folder):
    assert read("\ufeff[general]\r\nbatch_size = 2\r\n" + ENTRY.replace("\n", "\r\n")).datasets[0].batch_size == 2


def test_a_misfit_between_folders_and_list_is_a_warning(folder, caplog):
    read(ENTRY + 'image_jsonl_file = "gone.jsonl"')
    assert "image_jsonl_file is ignored" in caplog.text
    caplog.clear()
    read('[[datasets]]\nimage_jsonl_file = "list.jsonl"\ncache_directory = "c"\ncontrol_directory = "gone"')
    assert "control_directory is ignored" in caplog.text


def test_training_reads_a_configuration_whose_images_are_elsewhere(folder):
    text = '[[datasets]]\nimage_directory = "gone"\ncontrol_directory = "gone too"\ncache_directory = "cache"'
    Path("elsewhere.toml").write_text(text, encoding="utf-8")
    assert read_config("elsewhere.toml").datasets[0].cache_directory == Path("cache")
    with pytest.raises(ConfigError, match="does not exist"):
        read(text)


WRONG = [  # text of the file, the start of the message after the file name, words in it
    ("", "holds no dataset", "add a [[datasets]] entry"),
    ("[general]\nbatch_size = 1", "holds no dataset", "[[datasets]]"),
    ("[datasets]\nimage_directory = 'images'", "datasets: ", "two brackets"),
    ("general = 1", "general: ", "[general]"),
    ("datasets = [1]", "datasets: ", "[[datasets]]"),
    ("[[dataset]]\nx = 1", "unknown key 'dataset'", "did you mean 'datasets'?"),
    ("resolution = 512" + ENTRY, "unknown key 'resolution'", "known are general, datasets"),
    ("[general]\nbatchsize = 1" + ENTRY, "general: unknown key 'batchsize'", "did you mean 'batch_size'?"),
    ("[general]\nimage_directory = 'images'" + ENTRY, "general.image_directory: ", "[[datasets]]"),
    ("[general]\nfp_1f_target_index = 1" + ENTRY, "general.fp_1f_target_index: ", "[[datasets]]"),
    ("[general]\nvalidation = true" + ENTRY, "general.validation: ", "[[datasets]]"),
    (ENTRY + "validation = 0.1", "datasets[0].validation = 0.1: must be true or false", "without quotes"),
    (ENTRY + "fp_1f_clean_index = [0]", "datasets[0]: unknown key", "did you mean 'fp_1f_clean_indices'?"),
    (ENTRY + "qqq = 1", "datasets[0]: unknown key 'qqq'", "known are resolution, "),
    (ENTRY + "resolution = 512.0", "datasets[0].resolution = 512.0: ", "[width, height]"),
    (ENTRY + "resolution = [512]", "datasets[0].resolution = [512]: ", "[width, height]"),
    (ENTRY + "resolution = [512, 8]", "datasets[0].resolution = [512, 8]: ", "16"),
    (ENTRY + "resolution = true", "datasets[0].resolution = true: ", "[width, height]"),
    (ENTRY + "resolution = [true, false]", "datasets[0].resolution = [true, false]: ", "whole numbers"),
    ('[general]\nresolution = "512"' + ENTRY, 'general.resolution = "512": ', "[width, height]"),
    (ENTRY + "batch_size = 1.0", "datasets[0].batch_size = 1.0: ", "whole number"),
    (ENTRY + "batch_size = true", "datasets[0].batch_size = true: ", "whole number"),
    (ENTRY + "batch_size = 0", "datasets[0].batch_size = 0: ", "use 1 or more"),
    (ENTRY + "num_repeats = -1", "datasets[0].num_repeats = -1: ", "use 1 or more"),
    (ENTRY + "num_repeats = '2'", 'datasets[0].num_repeats = "2": ', "without quotes"),
    (ENTRY + "enable_bucket = 1", "datasets[0].enable_bucket = 1: ", "true or false"),
    (ENTRY + 'fp_1f_no_post = "yes"', 'datasets[0].fp_1f_no_post = "yes": ', "true or false"),
    (ENTRY + "fp_1f_clean_indices = 0", "datasets[0].fp_1f_clean_indices = 0: ", "[0]"),
    (ENTRY + "fp_1f_clean_indices = ['0']", 'datasets[0].fp_1f_clean_indices = ["0"]: ', "whole numbers"),
    (ENTRY + "fp_1f_clean_indices = []", "datasets[0]: fp_1f_clean_indices = []", "try [0]"),
    (ENTRY + "fp_1f_clean_indices = [0, 0]\nfp_1f_target_index = 1", "datasets[0]: fp_1f_clean_indices", "twice"),
    (ENTRY + "fp_1f_target_index = 0", "datasets[0]: fp_1f_target_index=0", "e.g. 1"),
    (ENTRY + "fp_1f_clean_indices = [0, 2]", "datasets[0]: fp_1f_target_index is missing", "give the time index"),
    (ENTRY + "fp_1f_target_index = -1", "datasets[0]: fp_1f_target_index=-1", "negative"),
    (ENTRY + "control_directory = 3", "datasets[0].control_directory = 3: ", "quotes"),
    (ENTRY + "cache_directory = ''", 'datasets[0].cache_directory = "": ', "quotes"),
    (ENTRY + 'cache_directory = "data\\target"', 'datasets[0].cache_directory = "data\\target": ', "single quotes"),
    ("[[datasets]]\nimage_directory = 'images'\ncaption_extension = 'txt'", "datasets[0].caption_extension", "'.txt'"),
    ("[[datasets]]\nimage_directory = 'images'", "datasets[0].caption_extension: is missing", '".txt"'),
    ("[[datasets]]\ncaption_extension = '.txt'", "datasets[0]: has no images", "image_jsonl_file"),
    ("[[datasets]]\nimage_jsonl_file = 'list.jsonl'", "datasets[0].cache_directory: is missing", "folder"),
    (
        "[[datasets]]\nimage_jsonl_file = 'gone.jsonl'\ncache_directory = 'c'",
        "datasets[0].image_jsonl_file gone.jsonl: does not exist",
        "check the path",
    ),
    (
        "[[datasets]]\nimage_directory = 'gone'\ncaption_extension = '.txt'",
        "datasets[0].image_directory gone: does not exist",
        "check the path",
    ),
    (
        "[[datasets]]\nimage_directory = 'list.jsonl'\ncaption_extension = '.txt'",
        "datasets[0].image_directory list.jsonl: is a file",
        "check the path",
    ),
    (ENTRY + "control_directory = 'gone'", "datasets[0].control_directory gone: does not exist", "check the path"),
    (ENTRY + "control_directory = './images/'", "datasets[0].control_directory: ", "their own folder"),
    (ENTRY + ENTRY, "datasets[1].cache_directory images: is the cache of datasets[0] too", "its own"),
    (
        ENTRY + "cache_directory = 'c'" + ENTRY + "cache_directory = 'images/../c'",
        "datasets[1].cache_directory ",
        "its own",
    ),
    (ENTRY + "multiple_target = true", "datasets[0].multiple_target: is not supported", "remove"),
    (
        "[[datasets]]\nvideo_directory = 'v'",
        "datasets[0].video_directory: video datasets are not supported yet",
        "image",
    ),
    ("[[datasets]]\nvideo_jsonl_file = 'v'", "datasets[0].video_jsonl_file: video datasets are not supported", "image"),
    (ENTRY + "target_frames = [1]", "datasets[0].target_frames: video datasets are not supported yet", "image"),
    (ENTRY + "batch_size 1", "line 5: ", "correct the TOML"),
    (ENTRY + "batch_size = 1\nbatch_size = 1", "line 6: ", "Cannot overwrite a value"),
    (ENTRY + 'cache_directory = "C:\\data"', "line 5: ", "\\ in double quotes"),
    (ENTRY + "fp_1f_clean_indices = [0, 1.5]", "datasets[0].fp_1f_clean_indices = [0, 1.5]: is not a list", "write"),
    ("x = {a=1", "line 1: Unclosed inline table", "brackets"),
    ("[datasets]\n[[datasets]]\nx=1", "line 2: ", "[[datasets]]"),
    ("x = " + "[" * 5000, "is not valid TOML", "check brackets"),
    ("x = " + "9" * 5000, "is not valid TOML", "numbers"),
]


@pytest.mark.parametrize(("text", "start", "words"), WRONG)
def test_a_mistake_is_one_line_with_file_key_value_and_fix(folder, text, start, words):
    with pytest.raises(ConfigError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"train.toml: {start}") and words in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.yaml", b"", "train.yaml: suffix '.yaml' is unknown; name the file .toml or .json"),
        ("train.toml", b'a = "\xff"', "train.toml: is not UTF-8"),
        ("train.json", b'{\n"general": {},\n"datasets": [}', "train.json: line 3: "),
        ("train.json", b"[]", "train.json: holds no table"),
    ],
)
def test_a_file_of_the_wrong_kind_is_named(folder, name, content, words):
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(name)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named_with_the_flag(folder):
    with pytest.raises(ConfigError, match=r"^--dataset_config none\.toml: does not exist"):
        read_config("none.toml")
    with pytest.raises(ConfigError, match=r"^--dataset_config images: is a folder"):
        read_config("images")


def test_a_command_line_batch_size_below_one_is_refused(folder):
    with pytest.raises(ConfigError, match=r"^--batch_size = 0: is too small; use 1 or more"):
        read(ENTRY, batch_size=0)


def test_a_read_configuration_can_not_be_changed(folder):
    (dataset,) = read(ENTRY).datasets
    with pytest.raises(AttributeError):
        dataset.batch_size = 2


def test_full_width_and_no_break_blanks_count_as_blanks_outside_of_text(folder):
    Path("train.toml").write_text(
        "[[datasets]]\u3000# a\u3000b\nimage_directory\u00a0=\u3000'images'\n"
        "\u3000caption_extension = '.t\u3000xt'\u00a0\n"
        'resolution = [64,\u300032]\n[general]\nbatch_size = 3 # "\n',
        encoding="utf-8",
    )
    (dataset,) = read_config("train.toml").datasets
    assert (dataset.resolution, dataset.batch_size, dataset.caption_extension) == ((64, 32), 3, ".t\u3000xt")
