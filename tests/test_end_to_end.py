"""Cache, train, sample and generate with small random models in float32 on the CPU, through the scripts themselves."""

import io
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wan.generation.run
import wan_generate_video
import wan_train_network
from dataset.cache import read_latent_cache
from dataset.loader import clip_for
from tests.project import (
    FLF2V,
    I2V,
    MODELS,
    cache,
    cached_cat,
    dataset_toml,
    encoded,
    from_lines,
    generate,
    model_flags,
    run_flags,
    train,
)
from utils.errors import ConfigError
from wan.frames.layout import OneFrameLayout
from wan.generation.prompt_lines import GENERATION, parse_line
from wan.generation.request import Request, SamplingConfig
from wan.lora.trained_for import TrainedFor
from wan.models.options import LoRAConfig
from wan.models.tasks import TASKS

pytestmark = pytest.mark.usefixtures("workspace")


@pytest.mark.parametrize(("name", "line", "task"), [("pairs", I2V, "i2v-14B"), ("middle", FLF2V, "flf2v-14B")])
def test_the_conditioning_from_the_cache_equals_the_one_from_files(name, line, task):
    batch, row = cached_cat(f"{name}.toml")
    once = encoded(line, task)
    assert torch.equal(batch.conditioning.channels[row], once.conditioning.channels)
    assert torch.equal(clip_for(batch, TASKS[task].clip_images)[row], once.conditioning.clip)
    assert tuple(batch.frame_indices[row].tolist()) == once.request.layout.clip.time_indices


def test_changing_the_indices_alone_needs_no_new_caches_and_gives_what_generation_sees():
    """Indices alone changed in the TOML: no new caches, the frames are laid out again."""
    config = dataset_toml("far", keys="fp_1f_clean_indices = [4]\nfp_1f_target_index = 0", cache="cache/pairs")
    batch, row = cached_cat(config)
    once = encoded(I2V.replace("control_index=0,target_index=1", "control_index=4,target_index=0"), "i2v-14B")
    assert torch.equal(batch.conditioning.channels[row], once.conditioning.channels)
    assert batch.frame_indices[row].tolist() == [0, 4] and batch.conditioning.channels[row, 0, :, 0, 0].tolist() == [
        0,
        1,
    ]


def test_swapped_controls_with_swapped_indices_change_no_bit_of_cache_training_and_generation():
    swapped_data = Path("data/swapped")
    swapped_data.mkdir()
    for path in Path("data/ends").iterdir():
        stem, number = path.stem.rsplit("_", 1)
        shutil.copy(path, swapped_data / f"{stem}_{1 - int(number)}.png")
    cache(dataset_toml("swapped", "middle", "swapped", "fp_1f_clean_indices = [2, 0]\nfp_1f_target_index = 1"))
    for path in sorted(Path("cache/middle").glob("*_wan.safetensors")):
        straight, swapped = (read_latent_cache(Path("cache") / name / path.name) for name in ("middle", "swapped"))
        assert torch.equal(straight.latents, swapped.latents) and torch.equal(
            straight.conditioning.channels, swapped.conditioning.channels
        )
    loras = [train("flf2v", f"{name}.toml", f"order-{name}", "--no_metadata") for name in ("middle", "swapped")]
    straight, swapped = map(load_file, loras)
    assert all(torch.equal(straight[key], swapped[key]) for key in straight)
    first, second = re.findall(r"--ci \S+", FLF2V)
    turned = FLF2V.replace(f"{first} {second}", f"{second} {first}").replace("=0;2", "=2;0")
    one, other = from_lines("flf2v", "out", FLF2V, turned)
    assert one == other


@pytest.mark.parametrize(
    ("model", "config", "line", "saving"),
    [
        ("i2v", "pairs", I2V, ()),
        ("flf2v", "middle", FLF2V, ()),
        ("i2v", "pairs", I2V, ("--save_precision", "bf16", "--network_alpha", "1.3")),
        ("i2v", "pairs", I2V, ("--save_precision", "fp16", "--network_alpha", "1.3")),
    ],
    ids=["i2v", "flf2v", "bf16", "fp16"],
)
def test_a_training_sample_has_the_bytes_of_generation_with_the_saved_lora(model, config, line, saving):
    Path("prompts.txt").write_text(line, encoding="utf-8")
    flags = ("--sample_prompts", "prompts.txt", "--sample_at_first", "--sample_every_n_steps", "2", *saving)
    name = f"sampled-{model}{''.join(saving[1:2])}"
    lora = train(model, f"{config}.toml", name, *flags)
    samples = {path.name.split("_")[1]: path.read_bytes() for path in Path("output/sample").glob(f"{name}_*")}
    assert samples.keys() == {"e000000", "000002"}
    assert from_lines(model, "out", line, flags=("--lora_weight", str(lora))) == [samples["000002"]]
    assert from_lines(model, "out", line) == [samples["e000000"]] != [samples["000002"]]


def test_latent_images_writes_a_latent_and_the_image_that_it_decodes_to():
    flags = ["--prompt", "a cat", "--image_path", "data/start/cat.png", "--control_image_path", "data/start/cat.png"]
    flags += ["--one_frame_inference", "control_index=0, target_index=1", "--infer_steps", "2", "--seed", "3"]
    image, latent = generate("i2v", "both", *flags, "--video_size", "48", "48", "--output_type", "latent_images")
    assert re.fullmatch(r"\d{8}-\d{6}-\d{3}_3_000\.png", image.name), image
    assert latent.name == image.name.replace("000.png", "latent.safetensors")
    (decoded,) = generate("i2v", "decoded", "--latent_path", str(latent), "--output_type", "images")
    assert Image.open(decoded).tobytes() == Image.open(image).tobytes() and decoded.name.endswith(
        f"_3_{latent.stem}_000.png"
    )


def test_flf2v_without_an_end_image_takes_the_control_with_the_largest_index():
    given = FLF2V + " --i data/ends/cat_0.png --ei data/ends/cat_1.png"
    wrong = FLF2V + " --i data/ends/cat_0.png --ei data/ends/cat_0.png"
    absent, present, other = from_lines("flf2v", "out", FLF2V, given, wrong)
    assert absent == present != other


def test_lines_with_one_prompt_and_other_images_or_negative_prompts_give_other_pictures():
    pictures = from_lines(
        "i2v",
        "out",
        I2V,
        I2V.replace("cat.png", "brick.png"),
        I2V + " --n ugly",
        I2V + " --n",
        I2V + " --l 1",
        I2V.replace("target_index=1", "target_index=9"),
        I2V + " --d 8",
    )
    assert len(set(pictures)) == 7


def test_every_model_is_loaded_once_for_a_file_of_prompts(monkeypatch):
    import wan.files.load

    loads = []
    for name in ("load_dit", "load_vae", "load_t5", "load_clip"):
        original = getattr(wan.files.load, name)
        monkeypatch.setattr(
            wan.files.load,
            name,
            lambda *args, _load=original, _name=name, **more: loads.append(_name) or _load(*args, **more),
        )
    from_lines("i2v", "out", I2V, I2V.replace("cat", "brick"), I2V + " --n x")
    assert sorted(loads) == ["load_clip", "load_dit", "load_t5", "load_vae"]


def test_the_size_is_the_area_with_the_start_images_aspect_ratio_unless_exact():
    line = I2V.replace("cat.png", "coffee.png")  # 3:2
    for flags, size in (((), (48, 32)), (("--exact_size",), (48, 48))):
        Path("lines.txt").write_text(line, encoding="utf-8")
        (path,) = generate("i2v", "out", "--from_file", "lines.txt", *flags)
        assert Image.open(path).size == size


def test_a_typed_line_gives_the_picture_of_the_same_line_in_a_file(monkeypatch):
    expected = from_lines("i2v", "out", I2V)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"nonsense --x\n{I2V}\n\n"))
    (path,) = generate("i2v", "out", "--interactive", "--no_metadata")
    assert [path.read_bytes()] == expected


def test_ctrl_c_and_a_broken_picture_end_one_image_and_not_the_typing(monkeypatch, caplog):
    denoise, cut = wan.generation.run.denoise, Path("data/cut.png")
    cut.write_bytes(Path("data/start/cat.png").read_bytes()[:2000])

    def stopped_once(*_arguments, **_more):
        monkeypatch.setattr(wan.generation.run, "denoise", denoise)
        raise KeyboardInterrupt

    monkeypatch.setattr(wan.generation.run, "denoise", stopped_once)
    broken = I2V.replace("data/start/cat.png", str(cut))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{I2V}\n{broken}\n{I2V}\n"))
    (path,) = generate("i2v", "out", "--interactive", "--no_metadata")
    assert "stopped; Ctrl-D ends" in caplog.text and f"{cut}: cannot be read" in caplog.text
    assert [path.read_bytes()] == from_lines("i2v", "out", I2V)


def test_a_merged_model_generates_what_model_and_lora_do():
    lora = str(train("i2v", "pairs.toml", "to-merge"))
    wan_generate_video.main(
        [
            *(*model_flags("i2v"), *run_flags(), "--save_path", "out", "--lora_weight", lora),
            *("--save_merged_model", "models/merged.safetensors"),
        ]
    )

    def picture(*flags: str) -> torch.Tensor:
        (content,) = from_lines("i2v", "out", I2V, flags=flags)
        return torch.tensor(list(Image.open(io.BytesIO(content)).tobytes()))

    expected = picture("--lora_weight", lora)
    # The same weights, but at other places in memory, which changes the rounding of products.
    assert (picture("--dit", "models/merged.safetensors") - expected).abs().max() <= 1
    assert (picture() - expected).abs().max() > 1


def test_a_release_folder_serves_for_paths_that_are_left_out():
    Path("release").mkdir()
    for kind in ("vae", "t5", "clip"):
        shutil.copy(MODELS[kind], "release")
    Path("lines.txt").write_text(I2V, encoding="utf-8")
    shutil.rmtree("out", ignore_errors=True)
    wan_generate_video.main(
        [
            *("--ckpt_dir", "release", *model_flags("i2v", "tokenizer"), "--device", "cpu", "--dit_dtype", "float32"),
            *("--save_path", "out", "--from_file", "lines.txt", "--no_metadata"),
        ]
    )
    (path,) = Path("out").iterdir()
    assert [path.read_bytes()] == from_lines("i2v", "out", I2V)


@pytest.mark.parametrize(
    ("model", "folder_config", "indices"), [("i2v", "pairs", "[0]"), ("flf2v", "middle", "[0, 2]")]
)
def test_a_list_of_files_trains_the_same_lora_as_the_folders(model, folder_config, indices):
    name = f"{folder_config}_list"
    Path(f"{name}.toml").write_text(
        f'[[datasets]]\nresolution = [48, 48]\nbatch_size = 2\nimage_jsonl_file = "data/{folder_config}.jsonl"\n'
        f'cache_directory = "cache/{name}"\nfp_1f_clean_indices = {indices}\nfp_1f_target_index = 1\n'
    )
    cache(f"{name}.toml")
    loras = [train(model, f"{config}.toml", f"{config}-same") for config in (folder_config, name)]
    from_folders, from_list = map(load_file, loras)
    assert all(torch.equal(from_folders[key], from_list[key]) for key in from_folders)


def test_auto_takes_the_indices_of_the_lora_and_others_are_warned_about(caplog):
    config = dataset_toml("three", keys="fp_1f_clean_indices = [0]\nfp_1f_target_index = 3", cache="cache/pairs")
    flags = ("--lora_weight", str(train("i2v", config, "three")))
    lines = [I2V.replace("control_index=0,target_index=1", text) for text in ("auto", "control_index=0,target_index=3")]
    auto, explicit = from_lines("i2v", "out", *lines, flags=flags)
    assert auto == explicit and "trained at" not in caplog.text
    assert from_lines("i2v", "out", I2V, flags=flags) != [auto]
    assert "target_index=1, but the LoRA was trained at control_index=0,target_index=3" in caplog.text
    with pytest.raises(ConfigError, match="no LoRA file names the indices"):
        from_lines("i2v", "out", lines[0])


def test_auto_takes_the_size_of_the_lora_where_none_is_given():
    trained = LoRAConfig(lora_weight=(train("i2v", "pairs.toml", "sized"),)).trained_for
    assert trained == TrainedFor(OneFrameLayout((0,), 1), (48, 48))

    def asked(one_frame: str, size: str = "") -> tuple[int, int]:
        line = f"a cat --ci data/start/cat.png --of {one_frame} {size}"
        prompt = parse_line(line, "test", GENERATION)
        return Request.resolve(prompt, TASKS["i2v-14B"], SamplingConfig(), trained).asked

    assert asked("auto") == (48, 48) and asked("auto", "--w 64 --h 32") == (64, 32)
    assert asked("control_index=0,target_index=1") == (256, 256)


def test_a_lora_file_names_its_task_and_indices():
    from safetensors import safe_open

    config = dataset_toml("nine", keys="fp_1f_clean_indices = [0]\nfp_1f_target_index = 9", cache="cache/pairs")
    honoured = train("i2v", config, "nine")
    legacy = train("i2v", config, "nine-legacy", "--one_frame_legacy_indices")
    near = train("i2v", "pairs.toml", "near")
    with safe_open(honoured, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_one_frame"] == "control_index=0,target_index=9"
    assert metadata["ss_one_frame_task"] == "i2v-14B" and metadata["ss_network_module"] == "networks.lora_wan"
    assert metadata["ss_one_frame_size"] == "48x48"
    assert metadata["modelspec.architecture"] == "wan2.1/lora" and metadata["ss_steps"] == "2"
    weights = {
        path: torch.cat([tensor.flatten() for tensor in load_file(path).values()]) for path in (honoured, legacy, near)
    }
    assert not torch.equal(weights[honoured], weights[near])
    assert torch.equal(weights[legacy], weights[near])


@pytest.mark.parametrize("failing", ["Pipeline.decode", "denoise"])
def test_a_failing_sample_does_not_end_a_run(monkeypatch, caplog, failing):
    import wan.training.samples

    def broken(*_args, **_more):
        raise RuntimeError("out of luck")

    target = wan.training.samples.Pipeline if failing == "Pipeline.decode" else wan.training.samples
    monkeypatch.setattr(target, failing.split(".")[-1], broken)
    Path("prompts.txt").write_text(I2V, encoding="utf-8")
    lora = train("i2v", "pairs.toml", "unlucky", "--sample_prompts", "prompts.txt", "--sample_at_first")
    assert lora.is_file() and "training goes on" in caplog.text


def test_epochs_steps_and_files_are_counted_as_documented():
    train(
        "i2v",
        "pairs.toml",
        "counted",
        "--max_train_epochs",
        "3",
        "--save_every_n_epochs",
        "1",
        "--save_every_n_steps",
        "4",
    )
    names = sorted(path.name for path in Path("output").glob("counted*.safetensors"))
    # 4 photographs of 3 sizes at batch size 2 without buckets: 2 steps per epoch; the last epoch is the final file
    assert names == [
        "counted-000001.safetensors",
        "counted-000002.safetensors",
        "counted-step00000004.safetensors",
        "counted.safetensors",
    ]


def test_an_fp8_file_trains_in_bfloat16_unless_the_flags_name_a_dtype():
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(MODELS["i2v"]).items()}
    save_file(rounded, "models/fp8.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in rounded.items()}, "models/rounded.safetensors")

    def lora(name: str) -> dict[str, torch.Tensor]:
        wan_train_network.main(
            [
                *("--dit", f"models/{name}.safetensors", "--dataset_config", "pairs.toml", "--device", "cpu"),
                *("--network_dim", "2", "--learning_rate", "1e-2", "--seed", "5", "--max_data_loader_n_workers", "0"),
                *("--max_train_steps", "1", "--output_dir", "output", "--output_name", name),
            ]
        )
        return load_file(f"output/{name}.safetensors")

    found, expected = lora("fp8"), lora("rounded")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
