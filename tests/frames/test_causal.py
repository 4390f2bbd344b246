"""The causal layout: the frames of an item are one video, as in the training of the base models."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

import wan_generate_video
from dataset.cache import LatentSettings, latent_stale_reason, list_latent_caches, read_latent_cache, write_latent_cache
from dataset.config import read_config
from dataset.loader import TrainingSet, load_batch
from tests.helpers import official_video_condition
from tests.project import (
    CPU,
    FLF2V,
    I2V,
    MODELS,
    cache,
    cache_latents,
    dataset_toml,
    encoded,
    generate,
    pipeline,
    pixels,
    train,
)
from utils.errors import ConfigError
from utils.images import from_pixels, open_image
from utils.randomness import seeded
from wan.files.load import load_vae
from wan.frames.condition import causal_condition_video, causal_video
from wan.frames.encode import encode_images, encode_video, frame_pixels
from wan.frames.encoding import CAUSAL, INDEPENDENT, Pictures
from wan.frames.layout import OneFrameLayout, layout_from_toml, parse
from wan.lora.trained_for import layout_from_metadata
from wan.nets.vae import WanVAE

pytestmark = pytest.mark.usefixtures("workspace")
I2V_LAYOUT = OneFrameLayout((0,), 1, CAUSAL)
FLF2V_LAYOUT = OneFrameLayout((0, 2), 1, CAUSAL)
KEY = 'fp_1f_layout = "causal"'


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(8).requires_grad_(False)


def pictures(count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(count)) * 2 - 1)


def test_it_prints_and_parses_and_is_the_default_only_when_asked():
    assert str(FLF2V_LAYOUT) == "control_index=0;2,target_index=1,layout=causal"
    assert parse(str(FLF2V_LAYOUT)) == FLF2V_LAYOUT
    assert parse("control_index=0,target_index=1") == OneFrameLayout((0,), 1) != I2V_LAYOUT
    assert parse("control_index=0,target_index=1", "causal") == I2V_LAYOUT
    assert parse("control_index=0,target_index=1,layout=independent", "causal") == OneFrameLayout((0,), 1)
    assert layout_from_toml([0], 1, 1, CAUSAL) == I2V_LAYOUT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("control_index=0,target_index=1,layout=casual", "layout=casual is unknown; did you mean 'causal'"),
        ("control_index=2,target_index=1,layout=causal", "target_index=1 comes before every control"),
        ("target_index=1,layout=causal", "comes before every control"),
    ],
)
def test_what_has_no_meaning_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse(text)


def test_the_condition_is_what_the_base_models_were_trained_with(vae):
    first, last = pictures(2)
    for layout, controls in ((I2V_LAYOUT, [first]), (FLF2V_LAYOUT, [first, last])):
        with_last = len(controls) == 2
        video = torch.rand(3, 1 + 4 * len(controls), 16, 24)
        video[:, 0], video[:, -1] = first, last
        expected = official_video_condition(vae, video, with_last)
        made = Pictures(layout.clip, controls, [None] * len(controls), (24, 16))
        found = CAUSAL.condition(vae, made, {})
        assert torch.equal(found.channels, expected) and torch.equal(found.given, expected[:4].amax(dim=0))


def test_controls_are_the_last_of_their_four_video_frames_in_time_order():
    controls = pictures(3)
    layout = OneFrameLayout((7, 0, 2), 5, CAUSAL)  # in time: second, third, target, first
    video = causal_condition_video(layout.clip, controls)
    assert {i: int(video[:, i].any()) for i in range(13)} == {i: int(i in (0, 4, 12)) for i in range(13)}
    for place, control in zip((12, 0, 4), controls, strict=True):
        assert torch.equal(video[:, place], control)


def test_the_latents_are_those_of_a_video_of_still_images(vae):
    first, last, target = pictures(3)
    video = causal_video(FLF2V_LAYOUT.clip, [first, last, target])
    assert torch.equal(video, torch.stack([first, *[target] * 4, *[last] * 4], dim=1))
    assert_close(encode_video(vae, video)[:, :1], encode_images(vae, first[None])[0])  # it knows nothing of the rest


def test_the_target_is_decoded_after_the_frames_before_it():
    frames = torch.randn(16, 3, 2, 2)
    assert torch.equal(CAUSAL.target(FLF2V_LAYOUT.clip, frames), frames[:, :2])
    assert torch.equal(CAUSAL.target(OneFrameLayout((0, 1), 2, CAUSAL).clip, frames), frames)
    assert torch.equal(INDEPENDENT.target(OneFrameLayout((0, 2), 1).clip, frames), frames[:, 1:2])


def test_the_picture_is_the_last_one_of_the_decoded_video():
    latents = torch.randn(16, 2, 4, 4)
    vae = load_vae(Path(MODELS["vae"]), torch.float32, CPU)
    picture = pipeline().decode(latents)
    assert picture.tobytes() == from_pixels(vae.decode(latents[None])[0, :, 4]).tobytes()


def test_a_lora_of_natural_indices_keeps_the_layout():
    told = {"ss_one_frame": "control_index=3;9,target_index=5,layout=causal", "ss_one_frame_legacy_indices": "True"}
    assert layout_from_metadata(told) == FLF2V_LAYOUT


def test_frames_of_a_video_are_never_put_into_another_order():
    frames = torch.randn(20, 3, 2, 2)
    assert torch.equal(frames[:, OneFrameLayout((3, 9), 5, CAUSAL).slots_of(FLF2V_LAYOUT)], frames)
    for other in (OneFrameLayout((2, 0), 1, CAUSAL), OneFrameLayout((0, 1), 2, CAUSAL)):
        with pytest.raises(ConfigError, match="do not serve"):
            other.slots_of(FLF2V_LAYOUT)
    with pytest.raises(ConfigError, match="do not serve"):
        FLF2V_LAYOUT.slots_of(OneFrameLayout((0, 2), 1))


def test_a_random_target_stays_between_the_same_controls():
    layout = OneFrameLayout((0, 5), 2, CAUSAL)
    drawn = {layout.with_random_target(range(0, 10), seeded(number)) for number in range(40)}
    assert drawn == {OneFrameLayout((0, 5), index, CAUSAL) for index in (1, 2, 3, 4)}
    with pytest.raises(ConfigError, match="give a wider range"):
        layout.with_random_target(range(6, 9), seeded(0))


# --- through the scripts


@pytest.fixture
def configs():
    """Dataset files with caches of both kinds, by name; made once."""
    indices = "fp_1f_clean_indices = [0{}]\nfp_1f_target_index = 1\n" + KEY
    made = {
        "still": dataset_toml("still", keys=indices.format("")),
        "moving": dataset_toml("moving", "middle", "ends", indices.format(", 2")),
    }
    for name, path in made.items():
        if not Path("cache", name).exists():
            cache(path)
    return made


def with_layout(line: str) -> str:
    return line.replace("target_index=1", "target_index=1,layout=causal")


@pytest.mark.parametrize(
    ("name", "line", "task"), [("still", I2V, "i2v-14B"), ("moving", FLF2V, "flf2v-14B")], ids=["i2v", "flf2v"]
)
def test_training_and_generation_see_the_same_condition(configs, name, line, task):
    training_set = TrainingSet(read_config(configs[name]), seed=0)
    batches = [load_batch(plan) for plan in training_set.epoch_batches(1)]
    condition = next(
        batch.conditioning.channels[row]
        for batch in batches
        for row, key in enumerate(batch.item_keys)
        if "/cat_" in key
    )
    once = encoded(with_layout(line), task)
    assert torch.equal(condition, once.conditioning.channels)
    assert training_set.layouts == [once.request.layout] and once.request.layout.encoding == CAUSAL
    assert not torch.equal(once.conditioning.channels, encoded(line, task).conditioning.channels)


def test_the_cached_latents_are_those_of_the_video(configs):
    vae = load_vae(Path(MODELS["vae"]), torch.float32, CPU)
    path = next(path for path in list_latent_caches(Path("cache/moving")) if path.name.startswith("cat_"))
    start, end, middle = (
        frame_pixels(open_image(name, "image"), (48, 48))
        for name in ("data/ends/cat_0.png", "data/ends/cat_1.png", "data/middle/cat.png")
    )
    video = torch.stack([start, *[middle] * 4, *[end] * 4], dim=1)
    assert torch.equal(read_latent_cache(path).latents, vae.encode(video[None])[0])


def test_the_flag_stands_in_for_the_dataset_key_and_the_key_wins(configs):
    plain = dataset_toml("flag")
    own = dataset_toml("own", keys='fp_1f_layout = "independent"')
    for config in (plain, own):
        cache_latents(config, "--one_frame_layout", "causal")
    for path in list_latent_caches(Path("cache/flag")):
        flag, key = read_latent_cache(path), read_latent_cache(Path("cache/still") / path.name)
        assert (
            torch.equal(flag.conditioning.channels, key.conditioning.channels)
            and flag.layout == key.layout == I2V_LAYOUT
        )
        assert read_latent_cache(Path("cache/own") / path.name).layout.encoding != CAUSAL


def test_training_records_the_layout_and_auto_reads_it_back(configs):
    lora = train("i2v", configs["still"], "causal")
    with safe_open(lora, "pt") as file:
        assert file.metadata()["ss_one_frame"] == "control_index=0,target_index=1,layout=causal"
    control = ["--control_image_path", "data/start/cat.png", "--prompt", "a", "--seed", "3", "--infer_steps", "2"]
    flags = ["--lora_weight", str(lora), *control, "--output_type", "latent_images", "--video_size", "32", "48"]
    told = [
        pixels(generate("i2v", "out", *flags, "--one_frame_inference", *more)[0])
        for more in (
            ["auto"],
            ["control_index=0,target_index=1,layout=causal"],
            ["control_index=0,target_index=1", "--one_frame_layout", "causal"],
            ["control_index=0,target_index=1"],
            ["auto", "--one_frame_layout", "independent"],
        )
    ]
    assert told[0] == told[1] == told[2] != told[3] == told[4]


def test_saved_latents_are_decoded_to_the_same_picture():
    control = ["--control_image_path", "data/start/cat.png", "--prompt", "a", "--seed", "3", "--infer_steps", "2"]
    indices = "control_index=0,target_index=1,layout=causal"
    picture, latent = generate(
        "i2v", "out_causal", *control, "--output_type", "latent_images", "--one_frame_inference", indices
    )
    decode = ["--vae", MODELS["vae"], "--device", "cpu", "--save_path", "out_decoded", "--output_type", "images"]
    wan_generate_video.main([*decode, "--latent_path", str(latent)])
    assert pixels(next(Path("out_decoded").iterdir())) == pixels(picture)


def test_samples_are_made_in_the_layout_that_is_trained(configs):
    Path("line.txt").write_text(I2V, encoding="utf-8")
    Path("line_causal.txt").write_text(with_layout(I2V), encoding="utf-8")
    pictures = []
    for name, prompts in (("implied", "line.txt"), ("named", "line_causal.txt")):
        train("i2v", configs["still"], name, "--sample_prompts", prompts, "--sample_at_first")
        pictures.append(pixels(next(Path("output/sample").glob(f"{name}_*.png"))))
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("config", "flags"), [("pairs", ["--one_frame_layout", "causal"]), ("still_independent", [])], ids=["flag", "key"]
)
def test_caches_of_the_other_layout_are_refused_in_one_line(configs, config, flags):
    dataset_toml("still_independent", cache="cache/still")
    with pytest.raises(
        ConfigError, match=r"fp_1f_layout or --one_frame_layout.* wan_cache_latents\.py again"
    ) as caught:
        train("i2v", f"{config}.toml", "refused", *flags)
    assert "\n" not in str(caught.value) and "_0" in str(caught.value)


def test_indices_may_change_as_long_as_the_order_stays(configs):
    for indices, fits in (("[3, 9]", True), ("[2, 0]", False)):
        keys = f"fp_1f_clean_indices = {indices}\nfp_1f_target_index = {5 if fits else 1}\n{KEY}"
        path = dataset_toml("order", "middle", "ends", keys, cache="cache/moving")
        if fits:
            assert TrainingSet(read_config(path), seed=0).layouts == [OneFrameLayout((3, 9), 5, CAUSAL)]
        else:
            with pytest.raises(ConfigError, match="latents made for control_index=0;2"):
                TrainingSet(read_config(path), seed=0)


def test_skip_existing_encodes_again_when_the_layout_or_its_order_changes(tmp_path, configs):
    made = read_latent_cache(list_latent_caches(Path("cache/moving"))[0])
    path = tmp_path / "cat_0048x0048_wan.safetensors"

    def settings(layout: OneFrameLayout) -> LatentSettings:
        facts = {"bucket": (48, 48), "target": "t", "controls": ("a", "b"), "vae": "v", "clip": "c"}
        return LatentSettings(**facts, vae_dtype="x", clip_dtype="x", causal_order=layout.cache_key)

    write_latent_cache(path, made, settings(made.layout))
    assert latent_stale_reason(path, settings(OneFrameLayout((0, 9), 3, CAUSAL))) is None
    for other in (OneFrameLayout((0, 2), 1), OneFrameLayout((2, 0), 1, CAUSAL)):
        assert latent_stale_reason(path, settings(other)) == "other one-frame layout"
