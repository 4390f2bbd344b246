import dataclasses
import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dataset import cache, cache_files, text_cache
from dataset.cache import LatentCache, LatentSettings
from dataset.text_cache import TextSettings
from utils.errors import ConfigError
from wan.frames.condition import stack_condition
from wan.frames.layout import OneFrameLayout
from wan.nets.conditioning import Conditioning

LAYOUT = OneFrameLayout((0, 2), 1)
SETTINGS = LatentSettings(
    bucket=(64, 64), target="t", controls=("a", "b"), vae="v", clip="c", vae_dtype="bfloat16", clip_dtype="float16"
)


def frame(seed, dtype=torch.bfloat16):
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def item(layout=LAYOUT, controls=(1, 2), target=3, dtype=torch.bfloat16):
    """A cache whose frames are told by seeds: the controls as given, the target; the blank frame is 0."""
    controls = [frame(seed, dtype) for seed in controls]
    return LatentCache(
        latents=layout.clip.stack([*controls, frame(target, dtype)]),
        conditioning=Conditioning(
            stack_condition(layout.clip, controls, frame(0, dtype)), torch.randn(len(controls), 257, 10).half()
        ),
        layout=layout,
    )


def musubi_file(path, layout=LAYOUT, clip=(2, 257, 10)):
    """A file as musubi-tuner writes it: nothing of our metadata."""
    made = item(layout)
    size = f"{made.latents.shape[1]}x8x8_bfloat16"
    tensors = {
        f"latents_{size}": made.latents,
        f"latents_image_{size}": made.conditioning.channels,
        "clip_bfloat16": torch.randn(clip).half(),
        "f_indices_int32": torch.tensor(layout.clip.time_indices, dtype=torch.int32),
    }
    save_file(tensors, path, {"architecture": "wan", "width": "64", "height": "64", "format_version": "1.0.1"})
    return tensors


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("stem", "size", "name"),
    [
        ("image1", (960, 544), "image1_0960x0544_wan.safetensors"),
        ("a_1", (64, 64), "a_1_0064x0064_wan.safetensors"),
        ("x[1].v2", (12000, 8), "x[1].v2_12000x0008_wan.safetensors"),
        ("b_0100x0200", (16, 32), "b_0100x0200_0016x0032_wan.safetensors"),
    ],
)
def test_latent_names_are_the_references_and_can_be_read_back(tmp_path, stem, size, name):
    path = cache.latent_cache_path(tmp_path, stem, size)
    assert path == tmp_path / name
    assert cache.parse_latent_name(path) == (stem, size)


def test_a_file_that_is_not_named_like_a_latent_cache_is_named_in_the_error(tmp_path):
    with pytest.raises(ConfigError, match=r"lora_wan\.safetensors"):
        cache.parse_latent_name(tmp_path / "lora_wan.safetensors")


def test_a_one_frame_cache_has_the_keys_shapes_and_dtypes_of_the_reference(tmp_path):
    path = cache.latent_cache_path(tmp_path, "image", (70, 80))
    cache.write_latent_cache(path, item(), SETTINGS)
    assert {key: (list(tensor.shape), tensor.dtype) for key, tensor in load_file(path).items()} == {
        "latents_3x8x8_bfloat16": ([16, 3, 8, 8], torch.bfloat16),
        "latents_image_3x8x8_bfloat16": ([20, 3, 8, 8], torch.bfloat16),
        "clip_bfloat16": ([2, 257, 10], torch.float16),
        "f_indices_int32": ([3], torch.int32),
    }
    assert load_file(path)["f_indices_int32"].tolist() == [0, 1, 2]
    assert load_file(path)["latents_image_3x8x8_bfloat16"][:4, :, 0, 0].tolist() == [[1, 0, 1]] * 4
    expected = {"architecture": "wan", "width": "70", "height": "80", "format_version": "1.0.1"}
    assert expected.items() <= metadata_of(path).items()


def test_the_clip_key_ends_in_the_dtype_of_the_latents(tmp_path):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    cache.write_latent_cache(path, item(dtype=torch.float32))
    assert load_file(path)["clip_float32"].dtype == torch.float16


@pytest.mark.parametrize("layout", [LAYOUT, OneFrameLayout((2, 0), 1), OneFrameLayout((9,), 3)])
def test_what_is_written_is_read_back_with_the_order_of_the_controls(tmp_path, layout):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    written = item(layout, controls=range(1, 1 + len(layout.control_indices)))
    cache.write_latent_cache(path, written, SETTINGS)
    read = cache.read_latent_cache(path)
    assert read.layout == layout
    assert torch.equal(read.latents, written.latents)
    assert torch.equal(read.conditioning.channels, written.conditioning.channels)
    assert torch.equal(read.conditioning.clip, written.conditioning.clip)
    assert read.conditioning.given.tolist() == [
        torch.full((8, 8), float(time != layout.target_index)).tolist() for time in layout.clip.time_indices
    ]
    header = cache.read_header(path)
    assert (header.frames, header.bucket, header.layout) == (len(layout.clip.time_indices), (64, 64), layout)
    assert header.clip == (len(layout.control_indices), 10)


def test_swapped_control_images_with_swapped_indices_give_the_same_tensors(tmp_path):
    paths = [cache.latent_cache_path(tmp_path, stem, (64, 64)) for stem in "ab"]
    cache.write_latent_cache(paths[0], item(OneFrameLayout((0, 2), 1), controls=(1, 2)))
    cache.write_latent_cache(paths[1], item(OneFrameLayout((2, 0), 1), controls=(2, 1)))
    first, second = map(cache.read_latent_cache, paths)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.conditioning.channels, second.conditioning.channels)


def test_a_file_of_musubi_tuner_is_read_with_the_target_where_the_mask_is_zero(tmp_path):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    tensors = musubi_file(path, OneFrameLayout((0, 10), 5))
    read = cache.read_latent_cache(path)
    assert read.layout == OneFrameLayout((0, 10), 5)
    assert torch.equal(read.latents, tensors["latents_3x8x8_bfloat16"])
    assert torch.equal(read.conditioning.channels, tensors["latents_image_3x8x8_bfloat16"])
    assert torch.equal(read.conditioning.clip, tensors["clip_bfloat16"])


def test_clip_features_without_an_image_axis_are_those_of_one_image(tmp_path):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    musubi_file(path, clip=(257, 10))
    assert cache.read_header(path).clip == (1, 10)
    assert cache.read_latent_cache(path).conditioning.clip.shape == (1, 257, 10)


def test_nans_become_zero_with_a_warning(tmp_path, caplog):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    made = item()
    made.latents[3, 1, 2, 2] = float("nan")
    cache.write_latent_cache(path, made)
    latents = cache.read_latent_cache(path).latents
    assert latents[3, 1, 2, 2] == 0
    assert torch.equal(latents[4:], made.latents[4:])
    assert "latents_3x8x8_bfloat16 holds 1 NaNs" in caplog.text


def without(key):
    def spoil(path):
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(key)}
        save_file(tensors, path, metadata_of(path))

    return spoil


def with_metadata(**changes):
    return lambda path: save_file(load_file(path), path, metadata_of(path) | changes)


def with_mask(value):
    def spoil(path):
        metadata = {key: text for key, text in metadata_of(path).items() if key != "one_frame"}
        tensors = load_file(path)
        tensors["latents_image_3x8x8_bfloat16"][:4] = value
        save_file(tensors, path, metadata)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(bytes(range(256)) * 20), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (without("f_indices"), "not a one-frame cache"),
        (without("latents_image"), "not a one-frame cache"),
        (with_metadata(one_frame="control_index=0;2,target_index=7"), "does not fit"),
        (with_metadata(one_frame="nonsense"), "unknown key"),
        (with_mask(1), "0 target frames"),
        (with_mask(0), "3 target frames"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line_with_its_name_and_what_to_do(tmp_path, spoil, words):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    cache.write_latent_cache(path, item(), SETTINGS)
    spoil(path)
    for read in (cache.read_header, cache.read_latent_cache):
        with pytest.raises(ConfigError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value) and "wan_cache_latents.py" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert cache.latent_stale_reason(path, SETTINGS) is not None


@pytest.mark.parametrize("raises", [KeyboardInterrupt, RuntimeError])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, raises):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    cache.write_latent_cache(path, item(), SETTINGS)
    before = path.read_bytes()

    def half_a_file(tensors, name, metadata):
        name.write_bytes(b"half")
        raise raises

    monkeypatch.setattr(cache_files, "save_file", half_a_file)
    with pytest.raises(raises):
        cache.write_latent_cache(path, item(), SETTINGS)
    with pytest.raises(raises):
        text_cache.write_text_cache(tmp_path / "image_wan_te.safetensors", torch.ones(3, 4), "caption")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"target": "other"}, "target image changed"),
        ({"controls": ("a", "other")}, "control image changed"),
        ({"controls": ("b", "a")}, "control image changed"),
        ({"controls": ("a",)}, "number of control images 2 -> 1"),
        ({"bucket": (128, 64)}, "bucket 64x64 -> 128x64"),
        ({"vae": "other"}, "other VAE"),
        ({"clip": "other"}, "other CLIP"),
        ({"vae_dtype": "float32"}, "VAE dtype bfloat16 -> float32"),
        ({"clip_dtype": "float32"}, "CLIP dtype float16 -> float32"),
        ({"recipe": cache.RECIPE + 1}, "made by another version of this script"),
    ],
)
def test_a_latent_cache_is_stale_when_a_setting_differs(tmp_path, change, reason):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    assert cache.latent_stale_reason(path, SETTINGS) == "not cached yet"
    cache.write_latent_cache(path, item(), SETTINGS)
    assert cache.latent_stale_reason(path, dataclasses.replace(SETTINGS, **change)) == reason


def test_other_time_indices_do_not_make_a_cache_stale(tmp_path):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    cache.write_latent_cache(path, item(OneFrameLayout((10, 3), 5)), SETTINGS)
    assert cache.latent_stale_reason(path, SETTINGS) is None


def test_a_file_of_musubi_tuner_is_kept_with_one_notice_unless_its_size_or_frames_differ(tmp_path, caplog):
    warned = set()
    for stem in "ab":
        path = cache.latent_cache_path(tmp_path, stem, (64, 64))
        musubi_file(path)
        assert cache.latent_stale_reason(path, SETTINGS, warned=warned) is None
    assert caplog.text.count("musubi-tuner") == 1 and warned == {tmp_path}
    assert "bucket" in cache.latent_stale_reason(path, dataclasses.replace(SETTINGS, bucket=(64, 80)))
    assert "number" in cache.latent_stale_reason(path, dataclasses.replace(SETTINGS, controls=("a",)))


def test_only_caches_are_listed_and_only_those_without_an_item_removed(tmp_path):
    folder = tmp_path / "a[1]"  # a glob of this name would look into "a1"
    folder.mkdir()
    latents = [cache.latent_cache_path(folder, stem, (64, 64)) for stem in ("a[b]", "old", "x")]
    texts = [text_cache.text_cache_path(folder, stem) for stem in ("a[b]", "old")]
    others = [
        folder / name for name in ("lora_wan.safetensors", "old.png", "old_0064x0064_flux.safetensors", "old.txt")
    ]
    for path in (*latents, *texts, *others):
        path.touch()
    assert cache.list_latent_caches(folder) == latents
    assert text_cache.list_text_caches(folder) == texts
    assert cache_files.remove_except(cache.list_latent_caches(folder), {latents[0], latents[2]}) == [latents[1]]
    assert sorted(folder.iterdir()) == sorted([latents[0], latents[2], *texts, *others])


def test_the_cache_of_an_image_that_was_renamed_to_another_unicode_form_goes(tmp_path):
    now, before = (cache.latent_cache_path(tmp_path, stem, (64, 64)) for stem in ("が", "か\u3099"))
    now.touch()
    before.touch()
    assert cache_files.remove_except([now, before], {now}) == [before]
    assert cache_files.remove_except([now], {before}) == [] and now.exists()  # one name, where the system says so


def test_a_text_cache_has_the_key_and_metadata_of_the_reference(tmp_path):
    path = text_cache.text_cache_path(tmp_path, "image")
    assert path.name == "image_wan_te.safetensors"
    embedding = torch.randn(7, 12).bfloat16()
    text_cache.write_text_cache(path, embedding, "a cat")
    assert list(load_file(path)) == ["varlen_t5_bfloat16"]
    assert metadata_of(path) == {"architecture": "wan", "caption1": "a cat", "format_version": "1.0.1"}
    assert torch.equal(text_cache.read_text_cache(path), embedding)
    header = text_cache.read_text_header(path)
    assert (header.length, header.width, header.caption) == (7, 12, "a cat")


def test_writing_a_text_cache_again_replaces_the_embedding_and_keeps_other_keys(tmp_path, caplog):
    path = text_cache.text_cache_path(tmp_path, "image")
    save_file({"varlen_t5_bfloat16": torch.ones(3, 4).bfloat16(), "mine": torch.ones(2)}, path, {"caption1": "old"})
    text_cache.write_text_cache(path, torch.zeros(5, 4), "new", TextSettings(t5="t", dtype="float32"))
    assert {key: list(tensor.shape) for key, tensor in load_file(path).items()} == {
        "varlen_t5_float32": [5, 4],
        "mine": [2],
    }
    assert text_cache.read_text_header(path).caption == "new"
    assert "the caption has changed" in caplog.text


def test_settings_are_not_kept_from_a_file_whose_embedding_is_replaced(tmp_path):
    path = text_cache.text_cache_path(tmp_path, "image")
    text_cache.write_text_cache(path, torch.zeros(5, 4), "a", TextSettings(t5="t", dtype="float32"))
    text_cache.write_text_cache(path, torch.zeros(5, 4), "a")
    assert "settings" not in metadata_of(path)


def test_a_damaged_text_cache_is_named_stale_and_replaced(tmp_path, caplog):
    path = text_cache.text_cache_path(tmp_path, "image")
    path.write_bytes(b"nonsense")
    for read in (text_cache.read_text_header, text_cache.read_text_cache):
        with pytest.raises(ConfigError, match=r"image_wan_te\.safetensors: cannot be read"):
            read(path)
    assert text_cache.text_stale_reason(path, "a", TextSettings(t5="t", dtype="float32")) == "no readable text cache"
    text_cache.write_text_cache(path, torch.zeros(5, 4), "a")
    assert text_cache.read_text_cache(path).shape == (5, 4)
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("caption", "settings", "reason"),
    [
        ("a cat", TextSettings(t5="t", dtype="bfloat16"), None),
        ("a dog", TextSettings(t5="t", dtype="bfloat16"), "caption changed"),
        ("a cat", TextSettings(t5="other", dtype="bfloat16"), "other T5"),
        ("a cat", TextSettings(t5="t", dtype="float32"), "T5 dtype bfloat16 -> float32"),
    ],
)
def test_a_text_cache_is_stale_when_caption_or_encoder_differ(tmp_path, caption, settings, reason):
    path = text_cache.text_cache_path(tmp_path, "image")
    assert text_cache.text_stale_reason(path, caption, settings) == "not cached yet"
    text_cache.write_text_cache(path, torch.ones(3, 4), "a cat", TextSettings(t5="t", dtype="bfloat16"))
    assert text_cache.text_stale_reason(path, caption, settings) == reason


def test_a_text_cache_of_musubi_tuner_is_kept_while_the_caption_is_the_same(tmp_path, caplog):
    path = text_cache.text_cache_path(tmp_path, "image")
    text_cache.write_text_cache(path, torch.ones(3, 4), "a cat")
    caplog.set_level(logging.WARNING)
    assert text_cache.text_stale_reason(path, "a cat", TextSettings(t5="t", dtype="bfloat16")) is None
    assert text_cache.text_stale_reason(path, "a dog", TextSettings(t5="t", dtype="bfloat16")) == "caption changed"


def test_the_settings_are_readable_json(tmp_path):
    path = cache.latent_cache_path(tmp_path, "image", (64, 64))
    cache.write_latent_cache(path, item(), SETTINGS)
    settings = json.loads(metadata_of(path)["settings"])
    assert settings["bucket"] == [64, 64] and settings["controls"] == ["a", "b"] and settings["recipe"] == cache.RECIPE
    assert metadata_of(path)["one_frame"] == "control_index=0;2,target_index=1"
