"""`--explain`: the tables are right, nothing is loaded or written, and the estimates agree with measurements."""

import re
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_train_network
from dataset.loader import BucketCount
from tests.project import MODELS, dataset_toml
from utils.errors import ConfigError
from wan.files import load
from wan.frames import table
from wan.frames.layout import OneFrameLayout
from wan.lora.options import NetworkConfig
from wan.models import estimate
from wan.models.estimate import expected_memory
from wan.models.memory_options import GenerationMemoryConfig, TrainingMemoryConfig
from wan.nets.spec import DiTSpec

SCRIPTS = {
    "latents": (wan_cache_latents, "--dataset_config data.toml --one_frame --vae {vae} --clip {clip}"),
    "texts": (wan_cache_text_encoder_outputs, "--dataset_config data.toml --t5 {t5} --t5_tokenizer {tokenizer}"),
    "training": (
        wan_train_network,
        "--dataset_config data.toml --dit {i2v} --output_dir out --output_name x --network_dim 4 --max_train_epochs 3",
    ),
    "generation": (
        wan_generate_video,
        "--dit {i2v} --vae {vae} --clip {clip} --t5 {t5} --t5_tokenizer {tokenizer} --save_path out --seed 3 "
        "--prompt cat --control_image_path data/start/cat.png --control_image_mask_path mask.png "
        "--one_frame_inference control_index=5,target_index=2 --video_size 48 64 --exact_size --infer_steps 7",
    ),
}
SPEC_14B = DiTSpec("i2v", 5120, 13824, 40, 36, 4096, 1280)
TINY = DiTSpec("i2v", 256, 384, 2, 36, 64, 160)
DIT_14B = types.SimpleNamespace(spec=SPEC_14B)
GIB = 2**30


@pytest.fixture(scope="module")
def project(new_project):
    """Two pairs, one with a mask of a half, and their caches."""
    with new_project("cat", "coffee") as folder:
        dataset_toml("data", cache="cache", size=(64, 48))
        half = Image.new("L", Image.open("data/start/cat.png").size)
        half.paste(255, (0, 0, half.width // 2, half.height))
        half.save("mask.png")
        half.save("data/start/cat_mask.png")
        for name in ("latents", "texts"):
            run(name)
    return folder


def run(name: str, more: str = "") -> None:
    script, arguments = SCRIPTS[name]
    script.main(f"{arguments.format(**MODELS)} --device cpu {more}".split())


@pytest.fixture
def explained(workspace, monkeypatch, capsys):
    """name, more options -> what is printed; loading any model or making any other file would fail."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    for name in ("load_dit", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(load, name, refuse)

    def look(name: str, more: str = "") -> str:
        before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()}
        run(name, f"--explain {more}")
        assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()} == before
        return capsys.readouterr().out

    return look


def rows(text: str) -> list[list[str]]:
    """The cells of the frame tables, where columns are two blanks apart."""
    return [re.split(r"\s{2,}", line) for line in text.splitlines() if re.match(r"\d+  +\w", line)]


def test_latent_caching_tells_files_sizes_crops_and_masks(explained):
    text = explained("latents")
    control, target = rows(text)
    cat, crop = Path("data/start/cat.png"), "320x213 -> 64x48"
    assert control == ["0", "control 0", "0", str(cat), crop, "11.1%", "50%", "12"]
    assert target == ["1", "target", "1", str(Path("data/target/cat.png")), crop, "11.1%", "all", "12"]
    assert "2 items, the first is cat" in text and "the VAE over 4 images, CLIP over 2 control images" in text


def test_text_caching_tells_how_long_captions_are(explained):
    text = explained("texts")
    lengths = re.search(r"tokens +(\d+) to (\d+), (\d+) in the mean", text)
    assert 1 < int(lengths[1]) <= int(lengths[3]) <= int(lengths[2]) < 512
    assert "2 captions, 2 of them different" in text and "0 captions at 512" in text


def test_training_tells_what_the_caches_hold(explained):
    text = explained("training")
    control, target = rows(text)
    assert control[:4] == ["0", "control 0", "0", "(cached)"] and control[-2:] == ["50%", "12"]
    assert target[:3] == ["1", "target", "1"] and target[-2:] == ["all", "12"]
    assert "2 frames x 12 = 24" in text and re.search(r"steps +3, 1 in an epoch", text) and "rank 4" in text


def test_generation_tells_slots_in_time_order_and_the_forward_passes(explained):
    text = explained("generation")
    target, control = rows(text)
    assert target == ["0", "target", "2", "(generated)", "64x48", "all", "12"]
    assert control[:4] == ["1", "control 0", "5", str(Path("data/start/cat.png"))]
    assert control[-2:] == ["50%", "12"]
    assert "both prompts together" in text and "the DiT 14 times over one prompt" in text
    assert "one after the other" in explained("generation", "--separate_passes")
    assert "the DiT 7 times" in explained("generation", "--guidance_scale 1")


def test_generation_tells_of_reasoning_frames_and_what_they_cost(explained):
    text = explained("generation", "--reasoning_frames 1 --reasoning_steps 3")
    assert re.search(r"reasoning frames at RoPE index 4 in the first 3 steps: 36 tokens", text)
    cost = 2 * (4 * estimate.forward_flops(TINY, 24) + 3 * estimate.forward_flops(TINY, 36))
    assert f"{cost / 1e12:.3g} TFLOP" in text


@pytest.mark.parametrize("more", ["--latent_path a.safetensors", "--interactive", "--save_merged_model m.safetensors"])
def test_there_is_nothing_to_explain_without_prompts(workspace, more):
    with pytest.raises(ConfigError, match="--explain needs --prompt"):
        wan_generate_video.main(["--explain", *more.split(), "--save_path", "out"])


def test_mistakes_are_told_instead_of_explained(workspace):
    with pytest.raises(ConfigError, match="must be at least 0"):
        run("training", "--explain --blocks_to_swap -1")
    with pytest.raises(ConfigError, match="is no"):
        run("latents", "--explain --vae models/tokenizer/tokenizer.json")


def test_causal_frames_have_a_row_each_and_no_masks_of_controls(explained, workspace):
    mask = workspace / "data/start/cat_mask.png"
    kept = mask.read_bytes()
    mask.unlink()
    try:
        text = explained("latents", "--one_frame_layout causal")
    finally:
        mask.write_bytes(kept)
    assert "layout=causal" in text and [row[-2] for row in rows(text)] == ["all", "all"]


def test_the_operations_of_a_forward_pass_agree_with_torchs_count():
    from torch.utils.flop_counter import FlopCounterMode

    from wan.nets.dit import WanDiT

    spec = DiTSpec("i2v", 256, 512, 3, 36, 64, 32)
    with torch.device("meta"):
        dit = WanDiT(spec)
        block, counter = dit.blocks[0], FlopCounterMode(display=False)
        x, linear = torch.empty(1, 640, 256), [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    by_token = [m for m in linear if m not in (block.cross_attn.k, block.cross_attn.v)]
    by_token = [m for m in by_token if not any(m is getattr(block.cross_attn, n, None) for n in ("k_img", "v_img"))]
    with counter:
        for module in by_token:
            module(torch.empty(1, 640, module.in_features, device="meta"))
        q = torch.empty(1, 2, 640, 128, device="meta")
        (q @ q.mT) @ q
    assert estimate.forward_flops(spec, x.shape[1]) == 3 * counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "measured"),  # GiB after loading, docs/performance.md: a 14B DiT in bfloat16 with a LoRA of rank 32
    [
        ({}, 30.7),
        ({"fp8_base": True}, 16.2),
        ({"blocks_to_swap": 20}, 17.7),
        ({"blocks_to_swap": 36}, 5.6),
    ],
)
def test_the_expected_weights_are_near_those_measured(options, measured):
    memory = TrainingMemoryConfig(gradient_checkpointing="all", **options)
    network = NetworkConfig(network_dim=32)
    dit, lora = estimate.meta_dit(DIT_14B, torch.bfloat16, memory, network)
    trained = sum(parameter.numel() * 4 for parameter in lora.parameters())
    held = sum(p.numel() * p.itemsize for p in dit.parameters() if not p.requires_grad)
    assert (held + trained) / GIB == pytest.approx(measured, rel=0.04)
    told = expected_memory(dit, lora, SPEC_14B, [BucketCount(0, 2, 128, 128, 1, 1)], memory)
    assert f"frozen weights {held / 1e9:.1f}" in told


def test_generation_in_fp8_needs_about_half():
    plain, fp8 = (
        sum(p.numel() * p.itemsize for p in estimate.meta_dit(DIT_14B, torch.bfloat16, memory)[0].parameters())
        for memory in (GenerationMemoryConfig(), GenerationMemoryConfig(fp8=True))
    )
    assert 0.5 < fp8 / plain < 0.55


def test_tables_align_their_columns():
    frames = [
        table.TableFrame("control 0", "a", (64, 32), None, 0.25),
        table.TableFrame("target", "b", (64, 32), None, None),
    ]
    lines = table.frame_table(OneFrameLayout((3,), 1), frames)
    assert [line.index("tokens" if i == 0 else "8") for i, line in enumerate(lines)] == [lines[0].index("tokens")] * 3
    assert lines[1].startswith("0     target") and "25%" in lines[2]
