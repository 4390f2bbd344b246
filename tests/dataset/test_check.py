"""`wan_dataset.py check`: every planted fault is found, and a clean dataset has none."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wan_dataset
from dataset import likeness
from dataset.cache import LatentCache, latent_cache_path, latent_settings, write_latent_cache
from dataset.check import check
from dataset.config import read_config
from dataset.problems import KINDS, Problem
from dataset.sources import find_all_items
from dataset.text_cache import text_cache_path, write_text_cache
from utils import images
from utils.errors import ConfigError
from utils.images import Resize, resize_to_fill
from wan.nets.conditioning import Conditioning

SIZE = (128, 96)
NAMES = ("ant", "bee", "cow", "dog")
TOML = """
[general]
resolution = [128, 96]
caption_extension = ".txt"
enable_bucket = true
batch_size = 2
[[datasets]]
image_directory = "target"
control_directory = "start"
target_mask_directory = "mask"
cache_directory = "cache"
fp_1f_clean_indices = [0]
fp_1f_target_index = 1
"""
LIST = TOML.replace("image_directory", "image_jsonl_file").replace('"target"', '"list.jsonl"')
VALIDATION = """
[[datasets]]
image_directory = "held_back"
control_directory = "start"
cache_directory = "cache_2"
validation = true
batch_size = 1
"""


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A texture without repetition."""
    coarse = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def edited(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((250, 30, 30), (40, 30, 70, 60))
    return image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four pairs with captions and up to date caches; one has a mask beside its control, one a mask of its target."""
    monkeypatch.chdir(tmp_path)
    for name in ("target", "start", "mask", "cache"):
        Path(name).mkdir()
    for seed, name in enumerate(NAMES):
        start = picture(seed)
        start.save(f"start/{name}.png")
        edited(start).save(f"target/{name}.png")
        Path(f"target/{name}.txt").write_text(f"a red square on the {name}", encoding="utf-8")
    half = Image.new("L", SIZE)
    half.paste(255, (0, 0, 64, 96))
    half.save("start/ant_mask.png")
    half.save("mask/bee.png")
    Path("data.toml").write_text(TOML)
    write_caches()
    return tmp_path


def write_caches() -> None:
    config = read_config("data.toml")
    models = dict.fromkeys(("vae", "clip", "vae_dtype", "clip_dtype"), "x")
    for item in find_all_items(config):
        latents, channels = torch.zeros(16, 2, 12, 16), torch.zeros(20, 2, 12, 16)
        cache = LatentCache(latents, Conditioning(channels, torch.zeros(1, 257, 8)), item.layout)
        write_latent_cache(latent_cache_path(Path("cache"), item.stem, item.size), cache, latent_settings(item, models))
        write_text_cache(text_cache_path(Path("cache"), item.stem), torch.zeros(3, 8), item.caption)


def codes(**options) -> set[str]:
    return {problem.code for problem in check(Path("data.toml"), **options).problems}


def replace(path: str, image: Image.Image) -> None:
    image.save(path)


def thin_control() -> None:
    picture(0, (128, 12)).save("start/cow.png")


def in_toml(old: str, new: str) -> None:
    text = Path("data.toml").read_text()
    assert old in text
    Path("data.toml").write_text(text.replace(old, new))


def as_list(*lines: str) -> None:
    Path("data.toml").write_text(LIST)
    good = [
        {
            "image_path": f"target/{name}.png",
            "control_path": f"start/{name}.png",
            "caption": f"a red square on the {name}",
        }
        for name in ("cow", "dog")
    ]
    Path("list.jsonl").write_text("\n".join([*map(json.dumps, good), *lines]), encoding="utf-8")


def large(size: tuple[int, int]) -> None:
    """A pair of one size, without caches, so that nothing but the size is noticed."""
    shutil.rmtree("cache")
    start = picture(9, size)
    for name in ("cow", "dog"):  # two, to fill a batch
        start.putpixel((0, 0), (ord(name[0]), 0, 0))
        replace(f"start/{name}.png", start)
        replace(f"target/{name}.png", edited(start))


def pair_of_shapes() -> None:
    shutil.rmtree("cache")
    replace("start/cow.png", picture(2, (128, 80)))


def shifted() -> None:
    shutil.rmtree("cache")
    big = picture(2, (160, 128))
    replace("start/cow.png", big.crop((16, 16, 144, 112)))
    replace("target/cow.png", edited(big.crop((10, 20, 138, 116))))


def copied_for_validation() -> None:
    Path("held_back").mkdir()
    for suffix in ("png", "txt"):
        shutil.copy(f"target/cow.{suffix}", f"held_back/cow.{suffix}")
    Path("start_2").mkdir()
    shutil.copy("start/cow.png", "start_2")
    Path("data.toml").write_text(TOML + VALIDATION.replace('"start"', '"start_2"'))


def twin() -> None:
    for name in ("cow_b", "dog_b"):
        shutil.copy(f"target/{name[:3]}.png", f"target/{name}.png")
        shutil.copy(f"start/{name[:3]}.png", f"start/{name}.png")
        shutil.copy(f"target/{name[:3]}.txt", f"target/{name}.txt")
    shutil.rmtree("cache")


def two_controls_of_one_picture() -> None:
    shutil.rmtree("cache")
    Path("start/ant_mask.png").unlink()
    in_toml("[0]", "[0, 2]")
    for name in NAMES:
        shutil.copy(f"start/{name}.png", f"start/{name}_1.png")


def transparent() -> None:
    shutil.rmtree("cache")
    image = Image.open("start/cow.png").convert("RGBA")
    image.putalpha(0)
    image.save("start/cow.png")


def other_indices_in_cache() -> None:
    in_toml("fp_1f_target_index = 1", 'fp_1f_target_index = 1\nfp_1f_layout = "causal"')
    Path("start/ant_mask.png").unlink()


def no_caption_left() -> None:
    shutil.rmtree("cache")
    for path in Path("target").glob("*.txt"):
        path.unlink()


def rename(old: str, new: str) -> None:
    Path(old).rename(new)


def long_name() -> None:
    for suffix in ("png", "txt"):
        Path("target/cow." + suffix).rename(f"target/{'m' * 230}.{suffix}")
    Path("start/cow.png").rename(f"start/{'m' * 230}.png")


FAULTS = {  # what is done to the clean dataset, and the codes that it must have then, and no others
    "a key that does not exist": (lambda: in_toml("batch_size", "batchsize"), {"D01"}),
    "indices that clash": (lambda: in_toml("[0]", "[1]"), {"D01"}),
    "a folder that is not there": (lambda: in_toml('"start"', '"begin"'), {"D02", "D28", "D35"}),
    "a line that is no JSON": (lambda: as_list("{image_path: 1}"), {"D03", "D35"}),
    "a line with an index twice": (
        lambda: as_list(
            '{"image_path": "target/ant.png", "control_path": "start/ant.png", "caption": "x", '
            '"control_index": [1], "target_index": 1}'
        ),
        {"D03", "D35"},
    ),
    "two targets of one name": (lambda: replace("target/cow.jpg", picture(2)), {"D04"}),
    "indices that are missing": (
        lambda: (in_toml("fp_1f_clean_indices = [0]", ""), replace("start/cow_1.png", picture(7))),
        {"D05", "D28"},
    ),
    "a target without control": (lambda: Path("start/cow.png").unlink(), {"D06"}),
    "a control without target": (lambda: replace("start/elk.png", picture(7)), {"D07"}),
    "a control too many": (lambda: replace("start/cow_1.png", picture(7)), {"D08"}),
    "one picture as two controls": (two_controls_of_one_picture, {"D09"}),
    "a mask without target": (lambda: Image.new("L", SIZE, 255).save("mask/elk.png"), {"D10"}),
    "a caption that is missing": (lambda: Path("target/cow.txt").unlink(), {"D11", "D35"}),
    "a caption that is empty": (lambda: Path("target/cow.txt").write_text(" \n"), {"D12", "D33"}),
    "a caption that is too long": (lambda: Path("target/cow.txt").write_text("ox " * 900), {"D13", "D33"}),
    "a caption in another encoding": (lambda: Path("target/cow.txt").write_bytes(b"caf\xe9"), {"D14", "D35"}),
    "a caption that is a link to nothing": (
        lambda: (Path("target/cow.txt").unlink(), Path("target/cow.txt").symlink_to("gone")),
        {"D14", "D35"},
    ),
    "a picture that is a link to nothing": (
        lambda: (Path("start/cow.png").unlink(), Path("start/cow.png").symlink_to("gone")),
        {"D15"},
    ),
    "a picture of a kind that is not taken": (lambda: picture(7).save("target/elk.gif"), {"D37"}),
    "a name that leaves no room for those of the caches": (long_name, {"D35", "D38"}),
    "a picture cut short": (
        lambda: Path("start/cow.png").write_bytes(Path("start/cow.png").read_bytes()[:900]),
        {"D15"},
    ),
    "a target of a few pixels": (lambda: replace("target/cow.png", picture(2, (12, 8))), {"D16"}),
    "targets that are enlarged": (lambda: large((64, 48)), {"D17"}),
    "targets far larger than needed": (lambda: large((1280, 960)), {"D18"}),
    "targets that are cropped": (lambda: (in_toml("= true", "= false"), large((128, 48))), {"D17", "D19"}),
    "a control in another shape": (pair_of_shapes, {"D20"}),
    "nothing edited": (lambda: shutil.copy("start/cow.png", "target/cow.png"), {"D21", "D32"}),
    "a mask of another size": (lambda: Image.new("L", (8, 8), 255).save("start/ant_mask.png"), {"D23"}),
    "a black mask of a target": (lambda: Image.new("L", SIZE).save("mask/bee.png"), {"D24"}),
    "a black mask of a control": (lambda: Image.new("L", SIZE).save("start/ant_mask.png"), {"D25", "D32"}),
    "a control that is transparent": (transparent, {"D25"}),
    "a control too small for a size of its own": (
        lambda: (in_toml("fp_1f_target_index = 1", "fp_1f_target_index = 1\nno_resize_control = true"), thin_control()),
        {"D32", "D36"},
    ),
    "masks in the causal layout": (
        lambda: in_toml("fp_1f_target_index = 1", 'fp_1f_target_index = 1\nfp_1f_layout = "causal"'),
        {"D26", "D32"},
    ),
    "more places in a batch than items": (lambda: in_toml("batch_size = 2", "batch_size = 5"), {"D27"}),
    "nothing with a caption": (no_caption_left, {"D11", "D28"}),
    "items that are there twice": (twin, {"D29"}),
    "a target in training and validation": (copied_for_validation, {"D30"}),
    "a damaged cache": (lambda: Path("cache/cow_0128x0096_wan.safetensors").write_bytes(b"1234567890"), {"D31"}),
    "a damaged text cache": (lambda: Path("cache/cow_wan_te.safetensors").write_bytes(b"1234567890"), {"D31"}),
    "a target changed after caching": (lambda: replace("target/cow.png", edited(picture(8))), {"D32"}),
    "a cache of another layout": (other_indices_in_cache, {"D32"}),
    "a cache of another resolution": (lambda: in_toml("[128, 96]", "[64, 48]"), {"D32"}),
    "a caption changed after caching": (lambda: Path("target/cow.txt").write_text("a green square"), {"D33"}),
    "an item that is not cached": (lambda: Path("cache/cow_0128x0096_wan.safetensors").unlink(), {"D34"}),
    "a text that is not cached": (lambda: Path("cache/cow_wan_te.safetensors").unlink(), {"D34"}),
    "a cache of an item that is gone": (
        lambda: rename("cache/cow_wan_te.safetensors", "cache/elk_wan_te.safetensors"),
        {"D34", "D35"},
    ),
}


def test_a_clean_dataset_has_no_problems(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    wan_dataset.main(["check", "--dataset_config", "data.toml", "--alignment"])
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(folder, fault):
    plant, expected = FAULTS[fault]
    plant()
    assert codes() == expected


@pytest.mark.parametrize("bucket", ["true", "false"])
def test_no_fix_is_what_is_set_already(folder, bucket):
    in_toml("enable_bucket = true", f"enable_bucket = {bucket}")
    for path in ("target/cow.png", "start/cow.png"):
        replace(path, picture(8, (16, 240)))
    fixes = {problem.code: problem.fix for problem in check(Path("data.toml")).problems}
    enlarged = "use a larger picture or a lower resolution, or set bucket_no_upscale"
    on = bucket == "true"
    assert fixes["D19"] == ("crop it yourself" if on else "crop it yourself, or set enable_bucket = true")
    assert fixes["D17"] == f"{enlarged} = true" if on else f"{enlarged} and enable_bucket = true"


def test_every_kind_of_problem_is_planted_somewhere():
    assert set().union(*(expected for _, expected in FAULTS.values())) | {"D22"} == set(KINDS)


def test_a_shift_is_found_on_request_with_its_size(folder):
    shifted()
    assert codes() == set()
    (problem,) = check(Path("data.toml"), alignment=True).problems
    assert problem.code == "D22" and "+6,-4" in problem.message


def test_many_faults_are_found_at_once(folder, capsys):
    together = (
        *("a control too many", "a control without target", "a mask without target", "a caption that is too long"),
        *("a black mask of a control", "a mask of another size", "more places in a batch than items"),
    )
    for number in range(12):
        name = f"more_{number:02d}"
        start = picture(100 + number)
        start.save(f"start/{name}.png")
        edited(start).save(f"target/{name}.png")
        Path(f"target/{name}.txt").write_text("x", encoding="utf-8")
    Path("start/more_00.png").unlink()  # D06
    Path("target/more_01.txt").unlink()  # D11
    Path("target/more_02.txt").write_text("")  # D12
    Path("target/more_03.txt").write_bytes(b"caf\xe9")  # D14
    Path("start/more_04.png").write_bytes(b"no picture")  # D15
    picture(1, (12, 12)).save("target/more_05.png")  # D16
    shutil.copy("start/more_06.png", "target/more_06.png")  # D21
    for name in ("more_07", "more_08"):  # D29
        shutil.copy("start/more_09.png", f"start/{name}.png")
        shutil.copy("target/more_09.png", f"target/{name}.png")
    picture(5, (128, 80)).save("start/more_10.png")  # D20
    picture(6, (48, 36)).save("start/more_11.png")  # D17
    replace("target/dog.png", edited(picture(8)))  # D32
    Path("cache/bee_wan_te.safetensors").write_bytes(b"1234567890")  # D31
    rename("cache/ant_wan_te.safetensors", "cache/elk_wan_te.safetensors")  # D34, D35
    for fault in together[:4]:
        FAULTS[fault][0]()
    found = codes()
    expected = {f"D{n:02d}" for n in (6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 29, 31, 32, 33, 34, 35)}
    assert len(expected) >= 15 and found >= expected
    with pytest.raises(ConfigError, match=r"data.toml: \d+ errors, \d+ warnings; fix"):
        wan_dataset.main(["check", "--dataset_config", "data.toml", "--json", "report.json"])
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert {problem["code"] for problem in report["problems"]} == found
    assert all(problem["fix"] and problem["severity"] in ("error", "warning") for problem in report["problems"])
    printed = capsys.readouterr().out
    assert all(f"{code} {KINDS[code].title}" in printed for code in found)


def test_a_problem_names_file_and_fix(folder):
    FAULTS["a target without control"][0]()
    (problem,) = check(Path("data.toml")).problems
    assert problem.file == str(Path("target/cow.png")) and "0 of 1" in problem.message and "add" in problem.fix
    error = Problem.of_error("D01", "a.toml", ConfigError("a.toml: resolution = 8; too small; use 16"))
    assert (error.message, error.fix) == ("resolution = 8; too small", "use 16")


def test_only_errors_end_with_exit_code_1(folder):
    FAULTS["a control without target"][0]()
    wan_dataset.main(["check", "--dataset_config", "data.toml"])
    FAULTS["a target without control"][0]()
    with pytest.raises(ConfigError):
        wan_dataset.main(["check", "--dataset_config", "data.toml"])


def test_equal_pictures_with_another_caption_are_no_twins(folder):
    twin()
    for name in ("cow_b", "dog_b"):
        Path(f"target/{name}.txt").write_text("draw a red square", encoding="utf-8")
    assert codes() == set()


def test_a_cache_without_settings_is_out_of_date_when_an_image_is_newer(folder):
    (item, *_) = find_all_items(read_config("data.toml"))
    path = latent_cache_path(Path("cache"), item.stem, item.size)
    write_latent_cache(
        path, LatentCache(torch.zeros(16, 2, 12, 16), Conditioning(torch.zeros(20, 2, 12, 16)), item.layout)
    )
    assert codes() == set()
    later = path.stat().st_mtime + 10
    os.utime(item.target, (later, later))
    assert codes() == {"D32"}


def test_the_bucket_table_counts_items_places_and_losses(folder):
    large((128, 32))
    rows = {(row.width, row.height): row for row in check(Path("data.toml")).buckets}
    assert sum(row.items for row in rows.values()) == 4 and rows[128, 96].items == 2
    other = next(row for size, row in rows.items() if size != (128, 96))
    assert other.unused_places == 0 and other.batches == 1
    fit = Resize((128, 32), (other.width, other.height))
    assert other.cropped_mean == other.cropped_most == fit.cropped and other.scale == (fit.scale, fit.scale)


@pytest.mark.parametrize("size", [(200, 100), (100, 300), (64, 48), (333, 211), (128, 96)])
def test_a_fit_says_what_resizing_does(size):
    bucket = (128, 96)
    fit = images.Resize(size, bucket)
    assert (
        fit.resized[0] >= 128
        and fit.resized[1] >= 96
        and min(a - b for a, b in zip(fit.resized, bucket, strict=True)) == 0
    )
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, size[0])
    ramp[..., 1] = np.linspace(0, 255, size[1])[:, None]
    cut = resize_to_fill(ramp, bucket).astype(float)
    kept = [np.ptp(cut[48, :, 0]) / 255, np.ptp(cut[:, 64, 1]) / 255]
    assert kept[0] * kept[1] == pytest.approx(1 - fit.cropped, abs=0.04)


@pytest.mark.parametrize("move", [(5, 3), (-7, 0), (0, -9), (12, -8)])
def test_a_shift_is_measured_with_its_direction(move):
    big = np.asarray(picture(1, (256, 192)))
    right, down = move
    one, other = big[40:136, 40:168], big[40 - down : 136 - down, 40 - right : 168 - right]
    assert likeness.shift_between(one, other) == move


def test_pictures_of_different_things_have_no_shift():
    one, other = (np.asarray(picture(seed)) for seed in (1, 2))
    assert likeness.shift_between(one, other) is None and likeness.shift_between(one, one) is None
    assert likeness.largest_difference(one, other) > 30 and likeness.largest_difference(one, one) == 0
