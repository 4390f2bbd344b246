"""Damaged, made-up and extreme files: one line, never a traceback, no code of theirs run, nothing lost."""

import builtins
import json
import logging
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_lora
import wan_train_network
from tests.project import I2V_KINDS, MODELS, model_flags
from utils import cli
from wan.generation import recipe

fuzz = pytest.importorskip("tests.fuzz", reason="needs hypothesis")

ODD = "Ünser 'Bild' \"画像\" 🐈 $(x) [1]"  # a folder
if Path("C:/").exists():
    ODD = ODD.replace('"', "")  # not allowed there


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder with the files that the made-up ones name."""
    monkeypatch.chdir(tmp_path)
    fuzz.write_folder()
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_files_of_a_kind_are_read_or_refused_whatever_they_hold(name, given):
    assert fuzz.attack(name, examples=25).total() >= 25


JSON_TOO_DEEP, JSON_TOO_LONG, HALF = b"[" * 100_000, b"9" * 5000, b'["\\ud800"]'
ENDLESS_GGUF = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 1 << 60)  # an array, and nothing in it
FOUND = [  # by tests/fuzz.py, and mended
    *(
        (name, content)
        for name in ("dataset_json", "dataset_list", "prompts_json")
        for content in (JSON_TOO_DEEP, HALF)
    ),
    *((name, JSON_TOO_LONG) for name in ("dataset_json", "dataset_list", "prompts_json")),
    ("prompts_txt", b"a --ci " + b"9" * 5000),
    ("prompts_txt", b"a --d 99999999999999999999999"),
    ("prompts_txt", b"a --l nan"),
    ("prompts_txt", b"a \xff"),
    ("prompts_json", b'[{"prompt": "a", "cfg_scale": 1' + b"0" * 400 + b"}]"),
    ("recipe", fuzz.png_with('{"options": {"slg_layers": false}, "files": {}, "made_by": {}}')),
    ("gguf", ENDLESS_GGUF),
    ("state", b'{"progress": {}}'),
    ("state", b'{"progress": {"step": "1", "epoch": null}, "facts": {}}'),
]


@pytest.mark.parametrize(("name", "content"), FOUND, ids=lambda value: str(value)[:40])
def test_what_was_found_once_stays_mended(name, content, given):
    fuzz.read_all(fuzz.TARGETS[name], content)


def test_the_search_finds_a_reader_that_stumbles(given, monkeypatch):
    """Otherwise it would find nothing anywhere."""
    target = fuzz.TARGETS["indices"]

    def stumbling(path):
        if b"no_post" not in path.read_bytes():
            raise IndexError

    monkeypatch.setitem(fuzz.TARGETS, "indices", fuzz.Target(target.name, target.contents, (stumbling,)))
    with pytest.raises(IndexError):
        fuzz.attack("indices", examples=25)


@pytest.mark.parametrize(
    "change",
    [lambda path: Path("new").touch(), lambda path: path.unlink(), lambda path: setattr(builtins, fuzz.CODE_RAN, 1)],
)
def test_the_search_notices_lost_files_and_code_that_ran(given, change):
    target = fuzz.Target("x.txt", None, (change,))
    try:
        with pytest.raises((AssertionError, FileNotFoundError)):
            fuzz.read_all(target, b"x")
    finally:
        vars(builtins).pop(fuzz.CODE_RAN, None)


# --- through the scripts


@pytest.fixture(scope="module")
def project(new_project):
    with new_project("cat") as folder:
        return folder


PICTURE = [
    *("--prompt", "a", "--control_image_path", "data/start/cat.png", "--video_size", "32", "32", "--infer_steps", "1"),
    *("--one_frame_inference", "control_index=0,target_index=1", "--guidance_scale", "1", "--device", "cpu"),
    *("--save_path", "out", "--seed", "1"),
]


def outcome(main, argv: list[str], monkeypatch, capsys) -> str:
    """The error line of a script, nothing when it succeeds. Any other ending fails the test."""
    monkeypatch.setattr("sys.argv", ["script", *argv])
    capsys.readouterr()
    try:
        cli.run(main)
    except SystemExit as end:
        assert end.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) < 2
    return "".join(lines)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def header_of(entries: dict) -> bytes:
    made = json.dumps(entries).encode()
    return struct.pack("<Q", len(made)) + made


OVERLAP = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "wrong magic": lambda content: b"GIF89a" + content[6:],
    "text": lambda content: b"<html>404</html>",
    "header longer than the file": lambda content: struct.pack("<Q", 1 << 40) + content[8:],
    "header of 2^64 bytes": lambda content: b"\xff" * 8 + content[8:],
    "tensors that overlap": lambda content: header_of({"a": OVERLAP, "b": OVERLAP}) + bytes(8),
    "a tensor of 2^60 numbers": lambda content: header_of({"a": OVERLAP | {"shape": [1 << 30, 1 << 30]}}) + bytes(8),
    "code": lambda content: fuzz.PICKLES[2],
    "code, unzipped": lambda content: fuzz.PICKLES[3],
}


@pytest.mark.parametrize("damage", BAD_FILES)
@pytest.mark.parametrize("kind", ["i2v", "vae", "t5", "clip", "lora", "latent"])
def test_a_damaged_model_file_is_one_line(kind, damage, copied_workspace, monkeypatch, capsys):
    argv = [*model_flags(*I2V_KINDS), *PICTURE]
    if kind == "latent":
        path = Path("latent.safetensors")
        save_file({"latent": torch.zeros(16, 1, 4, 4)}, path)
        argv = [*model_flags("vae"), "--latent_path", str(path), "--save_path", "out", "--device", "cpu"]
    elif kind == "lora":
        path, name = Path("lora.safetensors"), "lora_unet_blocks_0_self_attn_q"
        save_file({f"{name}.lora_down.weight": torch.ones(2, 256), f"{name}.lora_up.weight": torch.ones(256, 2)}, path)
        argv += ["--lora_weight", str(path)]
    else:
        path = Path(MODELS[kind])
    path.write_bytes(BAD_FILES[damage](path.read_bytes()))
    flag = {"i2v": "--dit", "lora": "--lora_weight", "latent": "--latent_path"}.get(kind, f"--{kind}")
    line = outcome(wan_generate_video.main, argv, monkeypatch, capsys)
    assert line.startswith(f"error: {flag} {path}") and not hasattr(builtins, fuzz.CODE_RAN)
    assert not list(Path("out").glob("*"))


def test_numbers_that_are_none_give_a_line_and_no_picture(copied_workspace, monkeypatch, capsys):
    for kind, nothing in (("i2v", torch.nan), ("vae", torch.inf)):
        path = Path(MODELS[kind])
        before = path.read_bytes()
        tensors = load_file(path) if kind == "i2v" else torch.load(path, weights_only=True)
        spoilt = {name: tensor * nothing for name, tensor in tensors.items()}
        save_file(spoilt, path) if kind == "i2v" else torch.save(spoilt, path)
        line = outcome(wan_generate_video.main, [*model_flags(*I2V_KINDS), *PICTURE], monkeypatch, capsys)
        assert "came out as NaN" in line and not list(Path("out").glob("*"))
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("size", "words"),
    [((20_000, 20_000), "decompression bomb"), ((1 << 31, 1), "cannot be read"), ((20_000, 1), "a side below 16")],
)
def test_a_huge_control_image_is_one_line(size, words, copied_workspace, monkeypatch, capsys):
    Path("data/start/cat.png").write_bytes(png_of_size(*size))
    assert words in outcome(wan_generate_video.main, [*model_flags(*I2V_KINDS), *PICTURE], monkeypatch, capsys)


def test_a_control_image_of_one_pixel_is_enlarged(copied_workspace, monkeypatch, capsys):
    Image.new("RGB", (1, 1), "red").save("data/start/cat.png")
    assert outcome(wan_generate_video.main, [*model_flags(*I2V_KINDS), *PICTURE], monkeypatch, capsys) == ""
    assert len(list(Path("out").iterdir())) == 1


def test_a_prompt_of_a_million_characters_is_drawn_and_repeated(copied_workspace, monkeypatch, capsys):
    text = "猫 cat " * 170_000
    Path("p.txt").write_text(text, encoding="utf-8")
    argv = [*model_flags(*I2V_KINDS), *PICTURE[2:], "--from_file", "p.txt"]
    assert outcome(wan_generate_video.main, argv, monkeypatch, capsys) == ""
    (path,) = Path("out").iterdir()
    assert recipe.read(path).options["prompt"] == text.strip()
    argv = ["--recipe", str(path), "--save_path", "again", "--device", "cpu"]
    assert outcome(wan_generate_video.main, argv, monkeypatch, capsys) == ""
    assert next(Path("again").iterdir()).read_bytes() == path.read_bytes()
    line = outcome(wan_generate_video.main, [*argv, "--one_frame_inference", "x" * 10**6], monkeypatch, capsys)
    assert len(line) < 3000 and "try control_index=0,target_index=1" in line


def test_names_with_blanks_quotes_and_any_letters_work_in_every_script(copied_workspace, monkeypatch, capsys):
    for folder in ("models", "data"):
        Path(ODD).mkdir(exist_ok=True)
        shutil.move(folder, f"{ODD}/{folder}")
    Path(f"{ODD}/data.toml").write_text(
        "[[datasets]]\nresolution = [32, 32]\ncaption_extension = '.txt'\n"
        + "".join(
            f"{key} = {json.dumps(f'{ODD}/{folder}', ensure_ascii=False)}\n"
            for key, folder in (
                *(("image_directory", "data/target"), ("control_directory", "data/start")),
                ("cache_directory", "cache"),
            )
        ),
        encoding="utf-8",
    )
    Path(f"{ODD}/p.txt").write_text(
        f"a --ci {ODD}/data/start/cat.png --of control_index=0,target_index=1 --w 32 --h 32 --s 1", encoding="utf-8"
    )
    folder = f"{ODD}/models"
    common = ["--dataset_config", f"{ODD}/data.toml", "--device", "cpu"]
    steps = [
        (wan_cache_latents, [*common, *model_flags("vae", "clip", folder=folder), "--one_frame"]),
        (wan_cache_text_encoder_outputs, [*common, *model_flags("t5", "tokenizer", folder=folder)]),
        (
            wan_train_network,
            [
                *(*common, *model_flags(*I2V_KINDS, folder=folder)),
                *("--output_dir", f"{ODD}/output", "--output_name", "mein 'LoRA' 🐈"),
                *("--max_train_steps", "1", "--max_data_loader_n_workers", "0", "--sample_at_first"),
                *("--sample_prompts", f"{ODD}/p.txt", "--network_dim", "2", "--save_state"),
            ],
        ),
        (
            wan_lora,
            [
                "convert",
                f"{ODD}/output/mein 'LoRA' 🐈.safetensors",
                f"{ODD}/comfy 'LoRA'.safetensors",
                "--to",
                "comfyui",
            ],
        ),
        (
            wan_generate_video,
            [
                *(
                    *model_flags(*I2V_KINDS, folder=folder),
                    "--lora_weight",
                    f"{ODD}/comfy 'LoRA'.safetensors",
                    "--from_file",
                    f"{ODD}/p.txt",
                ),
                *("--save_path", f"{ODD}/out", "--device", "cpu", "--output_type", "latent_images"),
            ],
        ),
    ]
    for script, argv in steps:
        assert outcome(script.main, argv, monkeypatch, capsys) == "", script
    image = next(Path(ODD, "out").glob("*.png"))
    argv = ["--recipe", str(image), "--save_path", f"{ODD}/again", "--device", "cpu"]
    assert outcome(wan_generate_video.main, argv, monkeypatch, capsys) == ""
    assert next(Path(ODD, "again").iterdir()).read_bytes() == image.read_bytes()
