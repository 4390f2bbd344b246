"""Masks: which parts of a control image are used, and where the loss on a target counts."""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import dataset.cache
from dataset.cache import LatentSettings, latent_stale_reason, list_latent_caches, read_latent_cache
from dataset.config import read_config
from dataset.loader import TrainingSet, load_batch
from tests.project import FLF2V, I2V, cache, cache_latents, dataset_toml, encoded, generate, pipeline, train
from utils.errors import ConfigError
from utils.images import open_image, open_masked
from wan.frames.condition import loss_weights, stack_condition
from wan.frames.encode import latent_mask
from wan.frames.encoding import INDEPENDENT
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import AS_TARGET
from wan.generation.prompt_lines import TRAINING, parse_line
from wan.generation.request import Request, SamplingConfig
from wan.models.checkpoints import VAECheckpoint
from wan.models.tasks import TASKS
from wan.training.loss import flow_matching_loss

pytestmark = pytest.mark.usefixtures("workspace")
WHERE = 'target_mask_directory = "data/where"\n'
EDIT = "fp_1f_clean_indices = [0]\nfp_1f_target_index = 1"


def half(size: tuple[int, int], left: int = 255, right: int = 0) -> Image.Image:
    """A grey picture of two halves."""
    levels = np.full((size[1], size[0]), right, np.uint8)
    levels[:, : size[0] // 2] = left
    return Image.fromarray(levels)


# --- reading


def test_an_alpha_channel_is_a_mask_unless_it_is_opaque_everywhere(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    for name, alpha in (("half", half((32, 16))), ("opaque", half((32, 16), 255, 255))):
        rgba = rgb.copy()
        rgba.putalpha(alpha)
        rgba.save(tmp_path / f"{name}.png")
    rgb.save(tmp_path / "plain.png")
    image, mask = open_masked(tmp_path / "half.png", "image")
    assert mask.tobytes() == half((32, 16)).tobytes() and image.tobytes() == rgb.tobytes()
    assert open_masked(tmp_path / "opaque.png", "image")[1] is open_masked(tmp_path / "plain.png", "image")[1] is None
    assert open_image(tmp_path / "half.png", "image").tobytes() == rgb.tobytes()


def test_a_mask_file_goes_over_the_alpha_channel_and_has_the_size_of_its_image(tmp_path):
    rgba = Image.new("RGB", (32, 16))
    rgba.putalpha(half((32, 16), 0, 255))
    rgba.save(tmp_path / "image.png")
    half((32, 16)).save(tmp_path / "mask.png")
    half((16, 16)).save(tmp_path / "small.png")
    assert open_masked(tmp_path / "image.png", "x", tmp_path / "mask.png")[1].tobytes() == half((32, 16)).tobytes()
    with pytest.raises(ConfigError, match=r"small\.png: has 16x16 pixels, its image .*image\.png has 32x16"):
        open_masked(tmp_path / "image.png", "x", tmp_path / "small.png")


def test_a_mask_is_turned_upright_with_its_image(tmp_path):
    rgba = Image.new("RGB", (32, 16))
    rgba.putalpha(half((32, 16)))
    exif = Image.Exif()
    exif[0x0112] = 3
    rgba.save(tmp_path / "image.webp", exif=exif, lossless=True, exact=True)
    assert open_masked(tmp_path / "image.webp", "x")[1].tobytes() == half((32, 16), 0, 255).tobytes()


def test_a_latent_has_the_mean_of_its_pixels():
    levels = np.zeros((16, 24), np.uint8)
    levels[:8, :8] = 255
    levels[:8, 8:12] = 255  # half of the second
    levels[8:, 16:] = 51
    mask = latent_mask(Image.fromarray(levels), (24, 16))
    assert_close(mask, torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.2]]))
    assert latent_mask(half((48, 32)), (24, 16)).tolist() == [[1.0, 0.5, 0.0]] * 2  # resized like its image


# --- rules


def test_mask_and_latents_of_a_control_are_multiplied_and_nothing_else_changes():
    layout = OneFrameLayout((2, 0), 1)
    controls, blank = list(torch.randn(2, 16, 1, 2, 3)), torch.randn(16, 1, 2, 3)
    mask = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]])
    plain = stack_condition(layout.clip, controls, blank)
    masked = stack_condition(layout.clip, controls, blank, [mask, None])
    assert torch.equal(masked[:, :2], plain[:, :2])  # the second control and the target
    assert torch.equal(masked[:4, 2], mask.expand(4, 2, 3))
    assert torch.equal(masked[4:, 2], controls[0][:, 0] * mask)
    assert torch.equal(stack_condition(layout.clip, controls, blank, [None, None]), plain)


def test_the_loss_counts_targets_and_controls_where_their_masks_are():
    layouts = (OneFrameLayout((0,), 1), OneFrameLayout((2,), 1))
    mask = torch.tensor([[1.0, 0.0]])
    frames, blank = torch.ones(16, 1, 1, 2), torch.ones(16, 1, 1, 2)
    plain = torch.stack([stack_condition(layout.clip, [frames], blank) for layout in layouts])
    masked = torch.stack([stack_condition(layout.clip, [frames], blank, [1 - mask]) for layout in layouts])
    targets, clips = torch.stack([mask, torch.ones(1, 2)]), [layout.clip for layout in layouts]
    assert loss_weights(clips, INDEPENDENT.given(plain), None, False) is None
    assert loss_weights(clips, INDEPENDENT.given(plain), None, True).tolist() == [[0, 1], [1, 0]]
    assert loss_weights(clips, INDEPENDENT.given(masked), None, False).tolist() == [
        [[[0, 1]], [[1, 1]]],
        [[[1, 1]], [[0, 1]]],
    ]
    weights = loss_weights(clips, INDEPENDENT.given(masked), targets, False)
    assert weights.tolist() == [[[[0, 1]], [[1, 0]]], [[[1, 1]], [[0, 1]]]]
    assert loss_weights(clips, INDEPENDENT.given(masked), targets, True).tolist() == [
        [[[0, 0]], [[1, 0]]],
        [[[1, 1]], [[0, 0]]],
    ]


def test_the_loss_is_the_mean_over_what_counts():
    latents, noise = torch.randn(2, 16, 2, 2, 3), torch.randn(2, 16, 2, 2, 3)
    weights = torch.rand(2, 2, 2, 3).round()
    weights[:, 1] = 1
    answer = torch.randn(2, 16, 2, 2, 3)

    def loss(velocity, weights):
        given = {"conditioning": None, "text": None, "frame_indices": None, "t": torch.full((2,), 0.5)}
        return flow_matching_loss(lambda *_, **__: velocity, latents=latents, noise=noise, weights=weights, **given)

    squared = (answer - (noise - latents)).square()
    expected = [squared[i, :, weights[i] == 1].mean() for i in range(2)]
    assert_close(loss(answer, weights), torch.stack(expected))
    assert_close(loss(answer, torch.ones(2, 2, 2, 3)), loss(answer, None))
    elsewhere = torch.where(weights[:, None] == 1, answer, 1e6)
    assert torch.equal(loss(elsewhere, weights), loss(answer, weights))


# --- through the scripts


@pytest.fixture
def masked():
    """data/faces: the start images with masks beside them; data/where: masks of targets; and caches with both."""
    for name in ("astronaut", "brick", "cat", "coffee"):
        Path("data/faces").mkdir(exist_ok=True)
        Path("data/where").mkdir(exist_ok=True)
        start = open_image(f"data/start/{name}.png", "image")
        start.save(f"data/faces/{name}.png")
        if name != "brick":
            half(start.size).save(f"data/faces/{name}_mask.png")
            half(start.size, 0, 255).save(f"data/where/{name}.png")
    config = dataset_toml("masked", "target", "faces", WHERE + EDIT)
    if not Path("cache/masked").exists():
        cache(config)
    return config


def cached(folder: str, stem: str) -> dataset.cache.LatentCache:
    (path,) = (path for path in list_latent_caches(Path("cache") / folder) if path.name.startswith(f"{stem}_"))
    return read_latent_cache(path)


def test_masks_reach_the_cache_and_items_without_one_keep_every_bit(masked):
    plain, item = cached("pairs", "cat"), cached("masked", "cat")
    control, target = latent_mask(half((320, 213)), (48, 48)), latent_mask(half((320, 213), 0, 255), (48, 48))
    assert control.unique().tolist() == [0, 1]  # an edge between latents, so that the answer is exact
    assert torch.equal(item.target_mask, target) and torch.equal(item.latents, plain.latents)
    assert torch.equal(item.conditioning.channels[:, 0], plain.conditioning.channels[:, 0] * control)
    assert torch.equal(item.conditioning.channels[:, 1], plain.conditioning.channels[:, 1])
    brick, bare = cached("pairs", "brick"), cached("masked", "brick")
    assert torch.equal(brick.conditioning.channels, bare.conditioning.channels) and bare.target_mask is None


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_generation_makes_the_condition_that_is_cached(masked, monkeypatch, dtype):
    if dtype == "bf16":
        monkeypatch.setattr("tests.project.VAECheckpoint", partial(VAECheckpoint, chosen_dtype=torch.bfloat16))
        cache_latents(dataset_toml("masked_bf16", "target", "faces", EDIT), "--vae_dtype", "bf16")
    line = I2V.replace("--ci data/start/cat.png", "--ci data/faces/cat.png --cim data/faces/cat_mask.png")
    item = cached("masked" if dtype == "float32" else "masked_bf16", "cat")
    assert torch.equal(encoded(line, "i2v-14B").conditioning.channels, item.conditioning.channels.float())


def test_an_alpha_channel_does_what_the_same_mask_file_does():
    for name in ("cat", "astronaut"):
        Path("data/alpha").mkdir(exist_ok=True)
        image = open_image(f"data/start/{name}.png", "image")
        half(image.size).save(f"data/alpha/{name}_white_left.png")
        image.putalpha(half(image.size))
        image.save(f"data/alpha/{name}.png")
    by_alpha = encoded(I2V.replace("data/start", "data/alpha"), "i2v-14B").conditioning.channels
    by_file = encoded(I2V + " --cim data/alpha/cat_white_left.png", "i2v-14B").conditioning.channels
    assert torch.equal(by_alpha, by_file) and not torch.equal(by_file, encoded(I2V, "i2v-14B").conditioning.channels)
    opaque = half((320, 213), 255, 255)
    opaque.save("data/alpha/white.png")
    assert torch.equal(
        encoded(I2V + " --cim data/alpha/white.png", "i2v-14B").conditioning.channels,
        encoded(I2V, "i2v-14B").conditioning.channels,
    )


@pytest.fixture
def transparent() -> str:
    """A dataset whose cat has a transparent control and target, and nothing else that is masked."""
    for folder in ("start", "target"):
        shutil.copytree(f"data/{folder}", f"data/clear_{folder}", dirs_exist_ok=True)
        rgba = open_image(f"data/{folder}/cat.png", "image")
        rgba.putalpha(half(rgba.size))
        rgba.save(f"data/clear_{folder}/cat.png")
    return dataset_toml("clear", "clear_target", "clear_start", EDIT)


def test_alpha_that_is_ignored_changes_no_bit_and_is_part_of_what_a_cache_was_made_with(transparent, caplog):
    caplog.set_level("INFO")
    cache_latents(transparent)
    masked = cached("clear", "cat")
    assert masked.target_mask is not None and "datasets[0]: 2 images with transparent pixels, which are" in caplog.text
    stamps = {path: path.stat().st_mtime_ns for path in Path("cache/clear").iterdir()}
    cache_latents(transparent, "--alpha", "ignore", "--skip_existing")
    changed = [path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == ["cat_0320x0213_wan.safetensors"] and "1 to be made: other use of alpha channels" in caplog.text
    assert "datasets[0]: 2 images with an alpha channel, which is ignored" in caplog.text
    plain, whole = cached("pairs", "cat"), cached("clear", "cat")
    assert whole.target_mask is None and torch.equal(whole.conditioning.channels, plain.conditioning.channels)
    config = dataset_toml("clear", "clear_target", "clear_start", f'alpha = "ignore"\n{EDIT}')
    caplog.clear()
    cache_latents(config, "--skip_existing", "--alpha", "mask")  # the dataset's own word counts
    assert "4 of 4 caches are up to date" in caplog.text
    with pytest.raises(ConfigError, match=r'datasets\[0\].alpha = "ignor": is unknown; did you mean \'ignore\'\?'):
        cache_latents(dataset_toml("clear", "clear_target", "clear_start", f'alpha = "ignor"\n{EDIT}'))


def test_generation_ignores_alpha_when_it_is_told_so(transparent):
    line = ["--prompt", "a", "--one_frame_inference", "control_index=0,target_index=1", "--video_size", "48", "48"]
    flags = [*line, "--infer_steps", "2", "--seed", "7", "--no_metadata"]

    def picture(folder: str, *more: str) -> bytes:
        (made,) = generate("i2v", "out", *flags, "--control_image_path", f"data/{folder}/cat.png", *more)
        return made.read_bytes()

    plain = picture("start")
    assert picture("clear_start", "--alpha", "ignore") == plain != picture("clear_start")


def test_samples_follow_the_alpha_of_the_datasets():
    sampling = SamplingConfig()
    assert sampling.like(None, AS_TARGET, "ignore").alpha == "ignore"
    assert SamplingConfig(alpha="mask").like(None, AS_TARGET, "ignore").alpha == "mask"


def test_each_control_has_its_own_mask_and_goes_to_its_own_index():
    for side, levels in (("left", (255, 0)), ("right", (0, 255))):
        half((320, 213), *levels).save(f"data/{side}.png")
    line = f"{FLF2V} --cim data/left.png --cim data/right.png"
    both, plain = encoded(line, "flf2v-14B").conditioning.channels, encoded(FLF2V, "flf2v-14B").conditioning.channels
    left, right = both[0, 0], both[0, 2]
    assert torch.equal(left, latent_mask(half((320, 213)), (48, 48))) and torch.equal(right, 1 - left)
    assert torch.equal(both[:, 0], plain[:, 0] * left) and torch.equal(both[:, 2], plain[:, 2] * right)
    swapped = encoded(line.replace("control_index=0;2", "control_index=2;0"), "flf2v-14B").conditioning.channels
    assert torch.equal(swapped[:, 2], both[:, 0]) and torch.equal(swapped[:, 0], both[:, 2])


def test_batches_hold_masks_and_the_trained_weights_depend_on_them(masked):
    batches = [load_batch(plan) for plan in TrainingSet(read_config(masked), seed=0).epoch_batches(1)]
    where = {
        key.split("/")[1].split("_")[0]: mask
        for batch in batches
        for key, mask in itertools.zip_longest(
            batch.item_keys, () if batch.target_masks is None else batch.target_masks
        )
    }
    assert torch.equal(where["cat"], latent_mask(half((320, 213), 0, 255), (48, 48)))
    assert where["brick"] is None or where["brick"].unique().tolist() == [1]
    trained = set()
    for name, controls, keys in (("neither", "start", ""), ("loss", "start", WHERE), ("control", "faces", "")):
        config = dataset_toml(f"masked_{name}", "target", controls, keys + EDIT)
        cache(config)
        weights = load_file(train("i2v", config, "masked"))
        trained.add(tuple(weight.sum().item() for weight in weights.values()))
    assert len(trained) == 3


def test_a_mask_changes_the_picture(masked):
    flags = ["--prompt", "a", "--seed", "3", "--infer_steps", "2", "--one_frame_inference"]
    control = ["control_index=0,target_index=1", "--control_image_path", "data/faces/cat.png"]
    pictures = [
        Image.open(generate("i2v", "out_mask", *flags, *control, *more)[0]).tobytes()
        for more in ([], ["--control_image_mask_path", "data/faces/cat_mask.png"])
    ]
    assert pictures[0] != pictures[1]


def test_a_list_names_its_masks(masked):
    lines = [
        {
            "image_path": "data/target/cat.png",
            "caption": "a",
            "control_path": "data/faces/cat.png",
            "control_mask": "data/faces/cat_mask.png",
            "target_mask": "data/where/cat.png",
        }
    ]
    Path("masked.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    Path("listed.toml").write_text(
        '[[datasets]]\nimage_jsonl_file = "masked.jsonl"\ncache_directory = "cache/listed"\nresolution = [48, 48]\n'
    )
    cache("listed.toml")
    listed, folder = cached("listed", "cat"), cached("masked", "cat")
    assert torch.equal(listed.conditioning.channels, folder.conditioning.channels) and torch.equal(
        listed.target_mask, folder.target_mask
    )


def test_the_same_images_with_another_mask_are_encoded_anew():
    half((320, 213)).save("data/left.png")
    lines = (
        I2V,
        f"{I2V} --cim data/left.png",
        I2V.replace("control_index=0,target_index=1", "control_index=4,target_index=0"),
    )
    resolved = [
        Request.resolve(parse_line(line, "test", TRAINING), TASKS["i2v-14B"], SamplingConfig(exact_size=True))
        for line in lines
    ]
    together = pipeline().encode(resolved)
    for line, one in zip(lines, together, strict=True):
        assert torch.equal(one.conditioning.channels, encoded(line, "i2v-14B").conditioning.channels)
    assert not torch.equal(together[0].conditioning.channels, together[1].conditioning.channels)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda: half((320, 213), 0, 0).save("data/where/cat.png"), r"target image .*cat\.png: is entirely black"),
        (lambda: half((64, 64)).save("data/where/cat.png"), r"where/cat\.png: has 64x64 pixels, its image"),
        (lambda: half((64, 64)).save("data/faces/cat_mask.png"), r"cat_mask\.png: has 64x64 pixels, its image"),
        (lambda: Path("data/where/cat.png").write_bytes(b"no"), r"cat\.png: cannot be read as an image"),
        (lambda: [path.unlink() for path in Path("data/where").iterdir()], "target_mask_directory .*like a target"),
        (
            lambda: Path("masked.toml").write_text(Path("masked.toml").read_text() + '\nfp_1f_layout = "causal"'),
            "has a mask, which the causal layout",
        ),
    ],
    ids=["black", "target size", "control size", "broken", "none", "causal"],
)
def test_a_wrong_mask_is_named_in_one_line(masked, spoil, words):
    spoil()
    with pytest.raises(ConfigError, match=words) as caught:
        cache(masked)
    assert "\n" not in str(caught.value)


def test_masks_come_one_per_control():
    prompt = parse_line(f"{FLF2V} --cim data/start/cat.png", "here", TRAINING)
    with pytest.raises(ConfigError, match=r"here: 1 mask \(--cim\) for 2 control images; give one per image"):
        Request.resolve(prompt, TASKS["flf2v-14B"], SamplingConfig())


def test_skip_existing_encodes_again_when_a_mask_changes(masked):
    (path,) = (path for path in list_latent_caches(Path("cache/masked")) if path.name.startswith("cat_"))
    recorded = json.loads(dataset.cache.read_header(path).metadata["settings"])
    recorded = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    settings = LatentSettings(**recorded)
    assert latent_stale_reason(path, settings) is None
    for masks in (None, (settings.masks[0], "other")):
        changed = LatentSettings(**{**recorded, "masks": masks})
        assert latent_stale_reason(path, changed) == "mask changed"
