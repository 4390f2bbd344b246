"""Files -> items: matching of control images, JSONL lists, captions, sizes, and messages for what is wrong."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from dataset.config import DatasetsConfig, ImageDatasetConfig, read_config
from dataset.sources import find_all_items, find_all_targets, find_items, find_targets
from utils.errors import ConfigError
from wan.frames.layout import OneFrameLayout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the empty folders targets/ and controls/."""
    monkeypatch.chdir(tmp_path)
    for name in ("targets", "controls"):
        (tmp_path / name).mkdir()
    return tmp_path


def picture(path, width=32, height=16):
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (width, height), (80, 90, 100)).save(path)
    return path


def target(name, caption="a caption", **size):
    path = picture(f"targets/{name}", **size)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def controls(*names):
    for name in names:
        picture(f"controls/{name}")


def dataset(**changes):
    defaults = {
        "resolution": (64, 32),
        "caption_extension": ".txt",
        "image_directory": Path("targets"),
        "control_directory": Path("controls"),
        "cache_directory": Path("cache"),
    }
    return ImageDatasetConfig(**{**defaults, **changes})


def listed(*lines, **changes):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    Path("list.jsonl").write_text(text, encoding="utf-8")
    return dataset(image_directory=None, control_directory=None, image_jsonl_file=Path("list.jsonl"), **changes)


def matched(config, find=find_items):
    return {item.target.name: [path.name for path in item.controls] for item in find(config, 0)}


def message(config, find=find_items):
    with pytest.raises(ConfigError) as caught:
        find(config, 0)
    text = str(caught.value)
    assert text.startswith("datasets[0]") and "\n" not in text
    return text


# Folders


def test_a_mask_lies_beside_its_control_unless_its_name_is_that_of_a_target(folder):
    for name in ("cat", "dog", "dog_mask"):
        target(f"{name}.png")
    controls("cat_0.png", "cat_0_mask.png", "cat_1.png", "dog_0.png", "dog_1.png", "dog_1_mask.png")
    controls("dog_mask_0.png", "dog_mask_1.png", "dog_0_mask.webp")
    items = find_items(dataset(clean_indices=(0, 2), target_index=1), 0)
    masks = {item.stem: [mask and mask.name for mask in item.control_masks] for item in items}
    assert masks == {
        "cat": ["cat_0_mask.png", None],
        "dog": ["dog_0_mask.webp", "dog_1_mask.png"],
        "dog_mask": [None] * 2,
    }
    assert matched(dataset(clean_indices=(0, 2), target_index=1))["dog.png"] == ["dog_0.png", "dog_1.png"]


def test_what_a_line_leaves_open_of_its_layout_is_the_datasets(folder):
    lines = []
    for name, own in {"a": {"control_index": [4]}, "b": {"target_index": 5}, "c": {"control_index": 2}}.items():
        picture(f"{name}.png")
        lines.append({"image_path": f"{name}.png", "caption": "", "control_path": f"{name}.png", **own})
    items = find_items(listed(*lines, clean_indices=(3,), target_index=6), 0)
    assert [item.layout for item in items] == [OneFrameLayout(*pair) for pair in (((4,), 6), ((3,), 5), ((2,), 6))]
    assert all(item.owns_layout for item in items)


def test_a_target_that_is_called_a_mask_keeps_its_control(folder):
    for name in ("cat", "cat_mask"):
        target(f"{name}.png")
        controls(f"{name}.png")
    assert matched(dataset()) == {"cat.png": ["cat.png"], "cat_mask.png": ["cat_mask.png"]}


def test_an_item_knows_everything_about_its_example(folder):
    target("cat.png", " A cat, größer \n", width=640, height=480)
    controls("cat.png")
    (item,) = find_items(dataset(resolution=(960, 544), enable_bucket=True, target_index=5), 3)
    assert item.stem == "cat" and item.target == Path("targets/cat.png")
    assert item.controls == (Path("controls/cat.png"),)
    assert item.caption == "A cat, größer" and item.dataset == 3
    assert item.size == (640, 480) and item.bucket == (832, 624)
    assert item.layout == OneFrameLayout((0,), 5)


def test_items_are_in_the_order_of_their_names(folder):
    for name in ("b.png", "a_1.png", "c.jpg", "a.webp"):
        target(name)
        controls(name)
    assert list(matched(dataset())) == ["a.webp", "a_1.png", "b.png", "c.jpg"]


def test_suffixes_count_in_small_letters_and_capitals_and_other_pictures_are_named(folder, caplog):
    for name in ("a.PNG", "b.jpg", "c.JPEG", "d.Png", "e.gif", "f.bmp"):
        target(name)
        controls(name)
    (folder / "targets" / "g.png").mkdir()
    (folder / "targets" / "sub").mkdir()
    picture("targets/sub/h.png")
    assert list(matched(dataset())) == ["a.PNG", "b.jpg", "c.JPEG", "d.Png", "f.bmp"]
    for key in ("image_directory", "control_directory"):
        assert f"datasets[0].{key}: 1 image is ignored, because the name doesn't end in .png, .jpg" in caplog.text
    assert caplog.text.count("e.gif") == 2


@pytest.mark.parametrize("link", ["targets/a.png", "controls/a.png", "targets/a.txt"])
def test_a_link_to_nothing_is_named(folder, link):
    for name in ("a.png", "b.png"):
        target(name)
        controls(name)
    (folder / link).unlink()
    (folder / link).symlink_to("gone")
    assert link in message(dataset())


def test_controls_are_ordered_with_the_plain_name_first_and_then_by_number(folder):
    target("s.png")
    controls("s_10.png", "s_2.jpg", "s_0001.webp", "s.png", "other.png")
    indices = {"clean_indices": (0, 2, 4, 6), "target_index": 1}
    assert matched(dataset(**indices)) == {"s.png": ["s.png", "s_0001.webp", "s_2.jpg", "s_10.png"]}


def test_controls_of_one_number_are_ordered_by_name(folder):
    target("s.png")
    controls("s.png", "s.jpg", "s_1.png", "s_01.png")
    indices = {"clean_indices": (0, 2, 4, 6), "target_index": 1}
    assert matched(dataset(**indices)) == {"s.png": ["s.jpg", "s.png", "s_01.png", "s_1.png"]}


def test_the_longest_name_claims_a_control_image(folder):
    for name in ("a.png", "a_1.png", "a.b.png"):
        target(name)
    controls("a_0.png", "a_1_0.png", "a.b_0.png", "a_b_7.png")
    assert matched(dataset(clean_indices=(0,))) == {
        "a.b.png": ["a.b_0.png"],
        "a.png": ["a_0.png"],
        "a_1.png": ["a_1_0.png"],
    }


def test_control_images_of_an_uncaptioned_target_go_to_no_other(folder):
    target("a.png")
    target("a_1.png", caption=None)
    controls("a_2.png", "a_1.png")
    assert matched(dataset()) == {"a.png": ["a_2.png"]}


def test_control_images_with_other_endings_are_ignored_with_a_warning(folder, caplog):
    target("s.png")
    controls("s_0.png", "s_extra.png", "s.v2.png", "s_.png", "s_².png")
    assert matched(dataset()) == {"s.png": ["s_0.png"]}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "4 images are ignored" in warning and "s.v2.png, s_.png, s_extra.png and 1 more" in warning


def test_only_as_many_controls_as_indices_are_used_with_a_warning(folder, caplog):
    target("s.png")
    controls("s_0.png", "s_1.png", "s_2.png")
    assert matched(dataset(clean_indices=(0, 2), target_index=1)) == {"s.png": ["s_0.png", "s_1.png"]}
    assert "first 2 control images are used for s.png" in caplog.text


def test_without_indices_a_second_control_image_is_an_error(folder):
    target("s.png")
    controls("s_0.png", "s_1.png")
    assert "fp_1f_clean_indices is missing" in message(dataset())


def test_images_without_a_caption_are_skipped_with_a_warning(folder, caplog):
    target("a.png")
    target("b.png", caption=None)
    controls("a.png", "b.png")
    assert list(matched(dataset())) == ["a.png"]
    assert "1 image is skipped without a caption file: b.png" in caplog.text


def test_captions_may_be_empty_or_carry_a_byte_order_mark(folder):
    target("a.png", "")
    target("b.png", "\ufeffhello")
    assert [item.caption for item in find_targets(dataset(), 0)] == ["", "hello"]


def test_controls_are_not_looked_for_unless_they_are_needed(folder):
    target("a.png")
    assert matched(dataset(control_directory=None), find_targets) == {"a.png": []}


def test_folder_names_with_brackets_work(folder):
    picture("controls [1]/a.png")
    target("a.png")
    assert matched(dataset(control_directory=Path("controls [1]"))) == {"a.png": ["a.png"]}


def test_sizes_are_those_of_the_upright_picture(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    target("a.jpg")
    Image.new("RGB", (640, 480)).save("targets/a.jpg", exif=exif)
    controls("a.png")
    (item,) = find_items(dataset(resolution=(960, 544), enable_bucket=True), 0)
    assert item.size == (480, 640) and item.bucket == (624, 832)


def test_no_image_is_decoded(folder, monkeypatch):
    for suffix in ("png", "jpg", "webp"):
        target(f"{suffix}.{suffix}")
        controls(f"{suffix}.{suffix}")
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    assert len(find_items(dataset(), 0)) == 3 and not decoded


def test_all_datasets_of_a_file_are_read_and_its_name_is_put_before_errors(folder):
    target("a.png")
    controls("a.png")
    picture("more/b.png").with_suffix(".txt").write_text("b", encoding="utf-8")
    Path("train.toml").write_text(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nimage_directory = 'targets'\n"
        "control_directory = 'controls'\n[[datasets]]\nimage_directory = 'more'",
        encoding="utf-8",
    )
    config = read_config("train.toml")
    assert [(item.stem, item.dataset) for item in find_all_targets(config)] == [("a", 0), ("b", 1)]
    with pytest.raises(ConfigError, match=r"^train\.toml: datasets\[1\]: no image has a control image"):
        find_all_items(config)
    assert find_all_items(DatasetsConfig(config.datasets[:1], config.path))[0].controls


NFC, NFD = "が", "か\u3099"  # one letter, and the same in two parts as macOS writes it


@pytest.mark.skipif(sys.platform == "darwin", reason="such names are one file there")
@pytest.mark.parametrize("forms", [(NFC, NFD, NFC, NFD, NFC), (NFD, NFC, NFD, NFC, NFD), (NFC, NFC, NFD, NFD, NFD)])
def test_composed_and_decomposed_letters_are_one_name(folder, forms):
    name, caption, control, control_mask, mask = forms
    target(f"{name}.png", caption=None)
    Path(f"targets/{caption}.txt").write_text("hello", encoding="utf-8")
    controls(f"{control}_1.png", f"{control_mask}_0.png", f"{control}_0_mask.png")
    picture(f"masks/{mask}.png")
    (item,) = find_items(dataset(clean_indices=(0, 2), target_index=1, target_mask_directory=Path("masks")), 0)
    assert (item.stem, item.caption) == (name, "hello")
    assert [path.name for path in item.controls] == [f"{control_mask}_0.png", f"{control}_1.png"]
    assert [mask and mask.name for mask in item.control_masks] == [f"{control}_0_mask.png", None]
    assert item.target_mask == Path(f"masks/{mask}.png")
    target(f"{NFC if name == NFD else NFD}.jpg")
    assert "would share their cache files" in message(dataset())


@pytest.mark.skipif(sys.platform == "darwin", reason="such names are one file there")
def test_a_listed_file_whose_name_has_another_form_is_pointed_out(folder):
    controls("a.png")
    target(f"{NFD}.png")
    text = message(listed({"image_path": f"targets/{NFC}.png", "caption": "", "control_path": "controls/a.png"}))
    assert f"does not exist, but '{NFD}.png' in another Unicode form does" in text


# JSONL files


def test_a_list_keeps_its_order_and_the_caption_as_written(folder):
    controls("x.png")
    line = {"caption": " b ", "control_path": "controls/x.png"}
    config = listed(
        {"image_path": str(target("b.png")), **line},
        "",
        "   ",
        {"image_path_0": str(target("a.png").resolve()), **line},
    )
    items = find_items(config, 0)
    assert [(item.stem, item.caption) for item in items] == [("b", " b "), ("a", " b ")]
    assert items[0].target == Path("targets/b.png") and items[1].target == folder / "targets" / "a.png"
    assert {item.controls for item in items} == {(Path("controls/x.png"),)}


def test_line_separators_of_unicode_do_not_cut_a_line(folder):
    text = '{"image_path": "targets/a.png", "caption": "one\u2028two"}\r\n'
    target("a.png")
    assert [item.caption for item in find_targets(listed(text), 0)] == ["one\u2028two"]


@pytest.mark.parametrize(
    "keys",
    [
        ("control_path", "control_path_1"),
        ("control_path_0000", "control_path_0010"),
        ("control_path_2", "control_path_10"),
    ],
)
def test_listed_controls_are_ordered_by_their_number(folder, keys):
    target("a.png")
    controls("first.png", "second.png")
    line = {"image_path": "targets/a.png", "caption": "", keys[1]: "controls/second.png", keys[0]: "controls/first.png"}
    config = listed(line, clean_indices=(0, 2), target_index=1)
    assert matched(config) == {"a.png": ["first.png", "second.png"]}


GOOD = {"image_path": "targets/a.png", "caption": "c", "control_path": "controls/a.png"}


@pytest.mark.parametrize(
    ("line", "start", "words"),
    [
        ('{"image_path": ', ":2: is not JSON", "correct the line"),
        ('["targets/a.png"]', ":2: is not a JSON object", "image_path"),
        ({**GOOD, "image_path": 3}, ":2: image_path = 3: is not text", "quotes"),
        ({**GOOD, "caption": None}, ":2: caption = null: is not text", "quotes"),
        ({**GOOD, "control_path": ["controls/a.png"]}, ":2: control_path = ", "is not text"),
        ({"image_path": "targets/a.png"}, ":2: 'caption' is missing", "add it"),
        ({"caption": "c"}, ":2: 'image_path' is missing", "add it"),
        (
            {**GOOD, "control_path_0": "controls/a.png"},
            ":2: control_path_0: there is a control image 0 already",
            "number",
        ),
        ({**GOOD, "target_indx": 1}, ":2: unknown key 'target_indx'", "did you mean 'target_index'?"),
        ({**GOOD, "control_indices": [0]}, ":2: unknown key 'control_indices'", "did you mean 'control_index'?"),
        ({**GOOD, "note": 1}, ":2: unknown key 'note'", "known are image_path, caption, control_path"),
        ({**GOOD, "image_path_1": "targets/a.png"}, ":2: image_path_1: several targets", "one line for each"),
        ({**GOOD, "image_path_0": "targets/b.png"}, ":2: image_path_0: is the same as image_path", "remove one"),
        ({**GOOD, "control_path_" + "1" * 5000: "x"}, ":2: unknown key", "known are image_path"),
        (
            '{"caption": "a", "caption": "b"}',
            ":2: is not JSON (The key 'caption' is given twice at column 18",
            "correct",
        ),
        ({"video_path": "v.mp4", "caption": "c"}, ":2: video_path: video datasets are not supported yet", "image_path"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(folder, line, start, words):
    target("a.png")
    controls("a.png")
    text = message(listed(GOOD, line))
    assert text.startswith(f"datasets[0].image_jsonl_file list.jsonl{start}") and words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_path": "targets/gone.png"}, "gone.png: does not exist"),
        ({"control_path": "controls/gone.png"}, "gone.png: does not exist"),
        ({"control_path": "controls"}, "is a folder"),
    ],
)
def test_a_listed_file_that_is_not_there_is_named(folder, change, words):
    target("a.png")
    controls("a.png")
    assert words in message(listed({**GOOD, **change}))


def test_a_list_without_lines_is_refused(folder):
    assert "holds no images" in message(listed("", " "))


def test_a_list_without_any_control_is_refused(folder):
    target("a.png")
    assert "add control_path to each line" in message(listed({"image_path": "targets/a.png", "caption": "c"}))


def test_one_line_without_controls_among_others_is_named(folder):
    target("a.png")
    target("b.png")
    controls("a.png")
    text = message(listed(GOOD, {"image_path": "targets/b.png", "caption": "c"}))
    assert "1 image is without 1 control image: b.png" in text


# What is wrong with folders and images


def test_missing_controls_are_listed_up_to_three(folder):
    for name in "abcdef":
        target(f"{name}.png")
    controls("a_0.png", "a_1.png", "b_0.png")
    text = message(dataset(clean_indices=(0, 2), target_index=1))
    assert (
        "fp_1f_clean_indices = [0, 2]: 5 images are without 2 control images: b.png, c.png, d.png and 2 more;" in text
    )


def test_a_dataset_without_controls_says_what_to_add(folder):
    target("a.png")
    assert "add control_directory" in message(dataset(control_directory=None))
    assert "name the files in controls like the targets" in message(dataset())


def test_two_targets_of_one_stem_are_refused_by_name(folder):
    for name in ("a.png", "a.jpg"):
        target(name)
    controls("a.png")
    text = message(dataset())
    assert str(Path("targets/a.png")) in text and str(Path("targets/a.jpg")) in text and "rename" in text
    picture("else/a.png")
    text = message(listed(GOOD, {**GOOD, "image_path": "else/a.png"}))
    assert "targets" in text and "else" in text
    text = message(listed(GOOD, {**GOOD, "control_path": "controls/b.png"}))
    assert (
        f"{Path('targets/a.png')} is the target of two items" in text and "copy or link it under another name" in text
    )


def test_an_empty_folder_and_one_without_captions_are_refused(folder):
    assert "holds no images" in message(dataset())
    target("a.png", caption=None)
    assert "no image has a caption file (.txt)" in message(dataset())


def test_a_broken_target_or_control_is_named(folder):
    target("a.png")
    controls("a.png")
    Path("controls/a.png").write_bytes(b"text")
    text = message(dataset())
    assert text.startswith(f"datasets[0].control_directory {Path('controls/a.png')}: cannot be read as an image")
    Path("targets/a.png").write_bytes(b"")
    text = message(dataset())
    assert text.startswith(f"datasets[0].image_directory {Path('targets/a.png')}: cannot be read as an image")


def test_a_target_with_a_side_below_16_is_named(folder):
    target("a.png", width=100, height=15)
    controls("a.png")
    assert f"{Path('targets/a.png')}: 100x15 pixels are too few" in message(dataset())


def test_a_caption_in_another_encoding_is_named(folder):
    target("a.png").with_suffix(".txt").write_bytes("größer".encode("latin-1"))
    assert f"{Path('targets/a.txt')}: is not UTF-8 text" in message(dataset(), find_targets)
