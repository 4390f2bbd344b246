"""Mistakes of every kind, through the scripts: one line, exit code 1, and no weights are loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wan.files.load
import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_train_network
from tests.project import ENCODERS, LATENT_MODELS, MODELS, TEXT_MODELS, dataset_toml, model_flags
from utils import cli
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

CACHE = ["--dataset_config", "data.toml", *LATENT_MODELS, "--one_frame", "--device", "cpu"]
TEXT = ["--dataset_config", "data.toml", *TEXT_MODELS, "--device", "cpu"]
TRAIN = [
    *(*model_flags("i2v"), *ENCODERS, "--device", "cpu", "--task", "i2v-14B", "--dataset_config", "data.toml"),
    *("--output_dir", "output", "--output_name", "x", "--sample_prompts", "prompts.txt", "--seed", "1"),
]
CONTROL = ["--control_image_path", "data/start/cat.png"]
GENERATE = [
    *(*model_flags("i2v"), *ENCODERS, "--device", "cpu", "--prompt", "a cat"),
    *(*CONTROL, "--image_path", "data/start/cat.png"),
    *("--one_frame_inference", "control_index=0,target_index=1", "--save_path", "out", "--video_size", "48", "48"),
]
SCRIPTS = {
    "cache": (wan_cache_latents.main, CACHE),
    "text": (wan_cache_text_encoder_outputs.main, TEXT),
    "train": (wan_train_network.main, TRAIN),
    "generate": (wan_generate_video.main, GENERATE),
}
NO_CACHES = "no caches made"


@pytest.fixture(scope="module")
def project(new_project):
    """Everything right, caches included; each case gets a copy and breaks one thing."""
    with new_project("cat", "coffee") as folder:
        spec = DiTSpec("t2v", dim=128, ffn_dim=128, num_layers=1, in_dim=16, text_dim=64)
        torch.manual_seed(0)
        save_file(WanDiT(spec).state_dict(), "models/t2v.safetensors")
        save_file(
            {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 256)}, "models/other.safetensors"
        )
        lora = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(2, 64)}
        save_file(
            lora | {"lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.zeros(64, 2)}, "models/lora.safetensors"
        )
        dataset_toml("data", keys="fp_1f_clean_indices = [0]\nfp_1f_target_index = 1", cache="cache", batch_size=1)
        Path("prompts.txt").write_text("a --ci data/start/cat.png --of control_index=0,target_index=1 --w 48 --h 48\n")
        wan_cache_latents.main(CACHE)
        wan_cache_text_encoder_outputs.main(TEXT)
    return folder


def write(path: str, content: str | bytes):
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def edit(path: str, old: str, new: str):
    def apply() -> None:
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new))

    return apply


def remove(path: str):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def truncate(path: str):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:-1000])


def drop_tensor(path: str, name: str):
    def apply() -> None:
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path)

    return apply


def prompt(line: str):
    return write("prompts.txt", line)


def flags(*argv: str):
    """Further flags; argparse takes the last value of a flag."""
    return list(argv)


def renamed(name: str):
    """The pair of the cat under another name."""

    def apply() -> None:
        for path in ("data/target/cat.png", "data/target/cat.txt", "data/start/cat.png"):
            Path(path).rename(Path(path).with_stem(name))

    return apply


def small_image():
    Image.new("RGB", (8, 8)).save("data/target/tiny.png")
    Image.new("RGB", (8, 8)).save("data/start/tiny.png")
    Path("data/target/tiny.txt").write_text("x")


CASES = [
    # script, what goes wrong (a change of the files, or flags), words of the message
    ("cache", flags("--dataset_config", "none.toml"), ["none.toml", "does not exist"]),
    ("cache", flags("--vae", "models/none.pth"), ["--vae", "models/none.pth", "does not exist"]),
    ("cache", flags("--clip", "models"), ["--clip", "folder"]),
    ("cache", flags("--vae", MODELS["t5"]), ["--vae", "not a Wan2.1 VAE"]),
    ("cache", flags("--batch_size", "none"), ["--batch_size", "none"]),
    ("cache", flags("--batch_size", "0"), ["--batch_size 0"]),
    ("cache", flags("--vae_dtype", "bf61"), ["--vae_dtype", "bf61", "did you mean 'bf16'"]),
    ("cache", flags("--device", "quantum"), ["--device quantum: is no device that PyTorch knows; use cuda"]),
    ("cache", flags("--device", "xpu"), ["--device xpu: can't be used on this computer; use cuda or cpu"]),
    ("cache", flags("--debug_mode", "image"), ["--debug_mode", "not supported"]),
    ("cache", flags("--skip_exsting"), ["--skip_exsting", "did you mean '--skip_existing'"]),
    ("cache", truncate(MODELS["clip"]), ["--clip", "damaged"]),
    ("cache", write("data.toml", "[general\n"), ["data.toml"]),
    ("cache", edit("data.toml", "resolution", "resolutoin"), ["resolutoin", "did you mean 'resolution'"]),
    ("cache", edit("data.toml", "[48, 48]", '"48"'), ["resolution", "48"]),
    ("cache", edit("data.toml", "clean_indices = [0]", "clean_indices = [1]"), ["datasets[0]", "fp_1f_target_index=1"]),
    ("cache", edit("data.toml", "clean_indices = [0]", "clean_indices = [0, 2]"), ["control", "cat"]),
    ("cache", edit("data.toml", "target_index = 1", "target_index = -1"), ["fp_1f_target_index=-1", "negative"]),
    ("cache", edit("data.toml", "data/start", "data/nowhere"), ["control_directory", "data/nowhere"]),
    ("cache", edit("data.toml", "data/target", "data/nowhere"), ["image_directory", "data/nowhere"]),
    (
        "cache",
        edit("data.toml", 'image_directory = "data/target"', 'video_directory = "data"'),
        ["video", "not supported"],
    ),
    (
        "cache",
        edit("data.toml", 'cache_directory = "cache"', 'cache_directory = "data.toml/cache"'),
        ["cache_directory"],
    ),
    ("cache", remove("data/start/cat.png"), ["control", "cat.png"]),
    ("cache", write("data/start/cat.png", b"\x89PNG\r\n\x1a\nnonsense"), ["cat.png"]),
    ("cache", write("data/target/cat.jpg", b""), ["cat"]),
    ("cache", renamed("\udcff"), ["data.toml: data/target/\\udcff.png", "can't be cached", "not UTF-8", "rename it"]),
    ("text", renamed("\udcff"), ["data/target/\\udcff.png", "not UTF-8", "rename it"]),
    ("cache", renamed("猫" * 70), ["can't be cached as 猫", "bytes, and 217 are possible", "shorten it"]),
    ("text", renamed("m" * 199), ["the name has 218 bytes, and 217 are possible", "shorten it"]),
    ("cache", small_image, ["tiny.png", "16"]),
    ("cache", lambda: [path.unlink() for path in Path("data/target").iterdir()], ["data/target", "no"]),
    ("text", flags("--t5", "models/none.pth"), ["--t5", "does not exist"]),
    ("text", flags("--t5_tokenizer", "models"), ["--t5_tokenizer models", "tokenizer.json"]),
    ("text", flags("--t5", MODELS["clip"]), ["--t5", "not a umT5 encoder"]),
    ("train", flags("--dit", "models/t2v.safetensors"), ["--task i2v-14B", "kind t2v"]),
    ("train", flags("--task", "flf2v-14B"), ["--task flf2v-14B", "kind i2v"]),
    ("train", flags("--task", "i2v-A14B"), ["--task i2v-A14B", "Wan2.2"]),
    ("train", flags("--task", "i2v-15B"), ["--task i2v-15B", "i2v-14B"]),
    ("train", truncate(MODELS["i2v"]), ["--dit", "damaged"]),
    ("train", drop_tensor(MODELS["i2v"], "blocks.1.norm3.bias"), ["--dit", "1 missing", "blocks.1.norm3.bias"]),
    ("train", flags("--learning_rate", "-1"), ["--learning_rate -1"]),
    ("train", flags("--max_train_steps", "0"), ["--max_train_steps 0"]),
    ("train", flags("--network_module", "networks.lora"), ["--network_module networks.lora", "did you mean"]),
    ("train", flags("--network_dim", "0"), ["--network_dim 0"]),
    ("train", flags("--network_args", "rank_dropuot=0.1"), ["rank_dropuot", "did you mean 'rank_dropout'"]),
    ("train", flags("--network_weights", "none.safetensors"), ["--network_weights", "does not exist"]),
    ("train", flags("--base_weights", "models/other.safetensors"), ["--base_weights", "is not a LoRA"]),
    ("train", flags("--optimizer_type", "AdamV"), ["--optimizer_type AdamV", "did you mean 'Adam"]),
    ("train", flags("--optimizer_type", "AdamW8bit"), ["AdamW8bit", "bitsandbytes"]),
    ("train", flags("--optimizer_args", "speed=3"), ["--optimizer_args", "speed"]),
    ("train", flags("--lr_warmup_steps", "ten"), ["--lr_warmup_steps ten", "whole steps"]),
    ("train", flags("--lr_scheduler", "cosin"), ["--lr_scheduler", "cosin"]),
    ("train", flags("--min_timestep", "900", "--max_timestep", "100"), ["--min_timestep 900", "100"]),
    ("train", flags("--mixed_precision", "bf16", "--dit_dtype", "float32"), ["--dit_dtype float32", "bf16"]),
    ("train", flags("--save_precision", "fp8"), ["--save_precision fp8"]),
    (
        "train",
        flags("--blocks_to_swap", "1", "--gradient_checkpointing", "auto"),
        ["--blocks_to_swap", "--gradient_checkpointing auto"],
    ),
    ("train", flags("--fp8_scaled"), ["--fp8_scaled", "--fp8_base"]),
    ("train", flags("--flash_attn"), ["--flash_attn needs", "flash-attn"]),
    ("train", flags("--output_name", "a/b"), ["--output_name a/b"]),
    ("train", flags("--output_dir", "data.toml/out"), ["--output_dir", "cannot write"]),
    ("train", flags("--dit_high_noise", "x"), ["--dit_high_noise", "Wan2.2"]),
    ("train", flags("--sage_attn"), ["--sage_attn"]),
    ("train", flags("--sample_prompts", "none.txt"), ["--sample_prompts", "does not exist"]),
    ("train", prompt("a cat --w 48"), ["prompts.txt:1", "one_frame"]),
    ("train", prompt("a --ci data/none.png --of control_index=0,target_index=1"), ["prompts.txt:1", "data/none.png"]),
    ("train", prompt("a --of control_index=0,target_index=1"), ["prompts.txt:1", "0 control images"]),
    (
        "train",
        prompt("a --ci data/start/cat.png --of control_index=0,target_index=1 --cim m.png"),
        ["prompts.txt:1", "mask of control image m.png", "does not exist"],
    ),
    ("train", remove("cache"), ["cache", "wan_cache_latents.py"]),
    ("train", truncate("cache/cat_0320x0213_wan.safetensors"), ["cat_0320x0213_wan.safetensors"]),
    ("generate", flags("--prompt", "x", "--interactive"), ["--prompt", "--interactive"]),
    ("generate", flags("--one_frame_inference", "control_indx=0"), ["control_indx", "did you mean 'control_index'"]),
    ("generate", flags("--one_frame_inference", "control_index=0;2,target_index=1"), ["1 control image for", "0;2"]),
    ("generate", flags("--one_frame_inference", "control_index=1,target_index=1"), ["target_index=1", "e.g. 2"]),
    ("generate", flags("--one_frame_inference", ""), ["one_frame", "--of"]),
    ("generate", flags("--control_image_path", "none.png"), ["none.png"]),
    ("generate", flags("--image_path", "data.toml"), ["data.toml"]),
    ("generate", flags("--control_image_mask_path", "m.png"), ["mask of control image m.png", "does not exist"]),
    ("generate", flags("--control_image_mask_path", *["data/start/cat.png"] * 2), ["2 masks", "1 control image;"]),
    (
        "generate",
        flags("--control_image_mask_path", "data/start/cat.png", "--one_frame_layout", "causal"),
        ["causal layout takes no masks", "--cim"],
    ),
    (
        "cache",
        edit("data.toml", "fp_1f_target_index = 1", 'fp_1f_layout = "causal"\ncontrol_resolution = 64'),
        ["data.toml: datasets[0]: control_resolution=64x64", "causal", "independent"],
    ),
    (
        "train",
        edit("data.toml", "fp_1f_target_index = 1", "fp_1f_target_index = 1\nno_resize_control = true"),
        ["data.toml: datasets[0]: ", "no_resize_control=true", "run wan_cache_latents.py again"],
    ),
    (
        "train",
        prompt("a --ci data/start/cat.png --of target_index=1,control_index=0,no_resize_control=no"),
        ["write true"],
    ),
    ("train", flags("--control_resolution", "8x99"), ["control_resolution=8x99", "at least 16"]),
    ("generate", flags("--no_resize_control", "--one_frame_layout", "causal"), ["no_resize_control=true: the causal"]),
    ("generate", flags("--one_frame_layout", "casual"), ["--one_frame_layout", "casual"]),
    ("generate", flags("--video_size", "8", "48"), ["--video_size 8 48"]),
    ("generate", flags("--video_size", "48"), ["--video_size", "2"]),
    ("generate", flags("--infer_steps", "0"), ["--infer_steps 0"]),
    ("generate", flags("--flow_shift", "0"), ["flow_shift", "0"]),
    ("generate", flags("--sample_solver", "euler"), ["--sample_solver", "euler"]),
    ("generate", flags("--lora_weight", "none.safetensors"), ["--lora_weight", "does not exist"]),
    ("generate", flags("--lora_weight", "models/other.safetensors"), ["--lora_weight", "is not a LoRA"]),
    ("generate", flags("--lora_weight", "models/lora.safetensors"), ["models/lora.safetensors", "[64, 64]"]),
    ("generate", flags("--lora_multiplier", "1", "2"), ["--lora_multiplier", "2 numbers"]),
    ("generate", flags("--save_path", "data.toml/out"), ["--save_path", "cannot write"]),
    ("generate", flags("--attn_mode", "flash"), ["--attn_mode flash"]),
    ("generate", flags("--dit", "models/t2v.safetensors"), ["text-to-video", "i2v-14B"]),
    ("generate", flags("--ckpt_dir", "data"), ["--ckpt_dir data", "holds no file"]),
    ("generate", flags("--device", "meta"), ["--device meta", "use cuda or cpu"]),
    ("generate", flags("--negative_prompt", "-bad"), ["--negative_prompt", "given as --flag=-value"]),
    ("generate", flags("--save_merged_model", "merged.pth"), ["--save_merged_model merged.pth", ".safetensors"]),
    ("generate", flags("--latent_path", MODELS["vae"]), ["--latent_path"]),
    ("generate", flags("--recipe", "none.png"), ["--recipe none.png", "does not exist"]),
    ("generate", flags("--recipe", "data/start/cat.png"), ["--recipe data/start/cat.png", "holds no recipe"]),
    ("generate", flags("--recipe", MODELS["i2v"]), ["--recipe", "holds no recipe"]),
    ("generate", flags("--seed", "99999999999999999999"), ["seed 99999999999999999999", "digits"]),
    ("generate", flags("--guidance_scale", "nan"), ["guidance scale nan"]),
    ("generate", flags("--prompt", "a \udcff"), ["--prompt a \\udcff", "not UTF-8", "write it as UTF-8"]),
    ("generate", flags("--control_image_path", "x" * 5000), ["cannot be opened", "[...]"]),
    (
        "generate",
        flags("--one_frame_inference", "control_index=0"),  # what a shell leaves of "control_index=0;2,target_index=1"
        ["'control_index=0': ", "put quotes around it"],
    ),
    (
        "generate",
        flags(
            "--control_image_path",
            *["data/start/cat.png"] * 2,
            "--one_frame_inference",
            "target_index=1,control_index=0",
        ),
        ["2 control images for control_index=0", "put quotes around it"],
    ),
    (
        "generate",
        flags("--vae", "none", "--one_frame_inference", "control_index=0"),
        ["--vae none: does not exist", "put quotes around it"],
    ),
    ("train", prompt("a --seed 7"), ["prompts.txt:1", "unknown option --seed; here it is --d, a blank"]),
    ("train", prompt("a --d=7"), ["prompts.txt:1", "unknown option --d=7; here it is --d, a blank"]),
    ("train", prompt("a --ci no\0where/cat.png --of control_index=0,target_index=1"), ["prompts.txt:1", "zero byte"]),
    (
        "generate",
        flags("--of", "control_index=0,target_index=1"),
        ["--of", "option of prompt lines", "--one_frame_inference"],
    ),
    ("generate", flags("--w", "512"), ["--w", "--video_size"]),
    ("generate", flags("--offload_inactive"), ["unknown argument '--offload_inactive'"]),
    ("generate", flags("--infer_step", "2"), ["--infer_step", "did you mean '--infer_steps'"]),
    ("generate", flags("--one_frame_auto_resize"), ["--one_frame_auto_resize", "FramePack", "--exact_size"]),
    ("generate", flags("--video_sections", "1"), ["--video_sections", "FramePack", "one image"]),
    ("generate", flags("--one_frame_inference", "default"), ["names no time indices", "try control_index=0"]),
    ("generate", flags("--one_frame_inference", "no_2x,no_4x"), ["names no time indices", "try control_index=0"]),
    ("generate", flags("--one_frame_inference", ""), ["--one_frame_inference control_index=0"]),
    ("generate", flags("--task", "t2i-14B"), ["use --task i2v-14B or flf2v-14B"]),
    ("train", flags("--network_module", "networks.lora"), ["did you mean 'networks.lora_wan'"]),
    ("cache", flags("--debug_mode", "image"), ["wan_dataset.py sheet"]),
    ("generate", flags("--video_size", "1000000000", "48"), ["--video_size", "16 to 16384"]),
    ("generate", flags("--control_resolution", "99999"), ["control_resolution=99999", "16384"]),
    (
        "generate",
        flags("--one_frame_inference", f"target_index={1 << 31}"),
        ["2147483648", "too large"],
    ),
    ("cache", edit("data.toml", "[48, 48]", "[100000, 48]"), ["resolution", "100000", "at most 16384"]),
    ("cache", edit("data.toml", "target_index = 1", f"target_index = {1 << 31}"), ["fp_1f_target_index", "too large"]),
    ("train", flags("--network_dim", "1000000000000"), ["--network_dim 1000000000000", "at most 16384"]),
    ("train", flags("--one_frame_target_range", "1-99999999999"), ["--one_frame_target_range 1-99999999999"]),
    ("train", flags("--optimizer_type", "SparseAdam"), ["SparseAdam", "cannot take a step"]),
    ("train", flags("--metadata_reso", "512x512"), ["--metadata_reso 512x512: must be W,H"]),
    ("train", flags("--output_name", "x" * 220), ["--output_name xxx", "use a shorter one"]),
    ("train", flags("--metadata_title", "a\udcff"), ["--metadata_title a", "not UTF-8"]),
    ("train", flags("--training_comment", "\udcff"), ["--training_comment", "not UTF-8"]),
    ("train", flags("--metadata_tags", "\udcff"), ["--metadata_tags", "not UTF-8"]),
    ("train", flags("--lr_warmup_steps", "abc"), ["--lr_warmup_steps abc"]),
    ("train", flags("--lr_scheduler", "cosine", "--lr_warmup_steps", "abc"), ["--lr_warmup_steps abc"]),
    ("train", flags("--one_frame_target_range", "0-0"), ["--one_frame_target_range 0-0", "give a wider range"]),
    ("train", flags("--learning_rate", "inf"), ["--learning_rate inf: must be a finite number"]),
    ("train", flags("--lr_scheduler_power", "nan"), ["--lr_scheduler_power nan: must be a finite number"]),
    ("train", flags("--base_weights_multiplier", "inf"), ["--base_weights_multiplier inf"]),
    ("train", flags("--optimizer_args", "weight_decay=1e999"), ["weight_decay=1e999"]),
    ("generate", flags("--guidance_scale", "inf"), ["guidance scale inf"]),
    ("generate", flags("--flow_shift", "inf"), ["flow_shift", "inf"]),
    ("generate", flags("--lora_multiplier", "nan"), ["--lora_multiplier nan"]),
    ("generate", flags("--blocks_to_swap", "2"), ["--blocks_to_swap 2", "at most 1"]),
    ("generate", flags("--dit_dtype", "fp8"), ["--dit_dtype fp8", "--fp8_scaled"]),
]


@pytest.mark.parametrize(("script", "mistake", "words"), CASES, ids=lambda value: str(value)[:60])
def test_a_mistake_gives_one_line_and_exit_code_1_before_weights_load(
    copied_workspace, monkeypatch, capsys, script, mistake, words
):
    for name in ("load_dit", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(wan.files.load, name, lambda *_args, **_more: pytest.fail("weights were loaded"))
    main, argv = SCRIPTS[script]
    if callable(mistake):
        mistake()
    elif "--latent_path" in mistake or "--interactive" in mistake:
        argv = [part for part in argv if part not in ("--prompt", "a cat")]
    elif "--control_image_path" in mistake:  # a list, which may be given once
        argv = [part for i, part in enumerate(argv) if "--control_image_path" not in argv[max(i - 1, 0) : i + 1]]
    before = {path: path.stat().st_mtime_ns for path in copied_workspace.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_, monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["script", *argv, *(mistake if isinstance(mistake, list) else [])])
        cli.run(main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 1 and len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in lines[0] and not [path for path in before if not path.exists()]


def test_the_project_of_the_table_is_right(copied_workspace):
    """Each script runs on it: what the cases report comes from their one mistake."""
    wan_cache_latents.main(CACHE)
    wan_cache_text_encoder_outputs.main(TEXT)
    wan_train_network.main([*TRAIN, "--max_train_steps", "1", "--max_data_loader_n_workers", "0"])
    wan_generate_video.main([*GENERATE, "--infer_steps", "1"])
    assert Path("output/x.safetensors").is_file() and len(list(Path("out").iterdir())) == 1
