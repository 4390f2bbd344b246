"""Both caching scripts, run as a user does, on small models of random weights."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close

import wan_cache_latents
import wan_cache_text_encoder_outputs
from dataset import cache, text_cache
from tests.helpers import golden, rel_l2
from utils.errors import ConfigError
from utils.images import open_image, resize_to_fill, to_pixels
from wan.caching import run as caching
from wan.caching.run import LatentCachingConfig, run_latents
from wan.files import load
from wan.files import tokenizer as tokenizer_module
from wan.frames.condition import stack_condition
from wan.frames.encode import encode_blank, encode_clip, encode_images, frame_pixels
from wan.frames.layout import OneFrameLayout
from wan.models.device import Processes
from wan.models.options import CLIPConfig, VAEConfig
from wan.nets.clip import build_clip, clip_shapes, encode_image
from wan.nets.t5 import encode_text
from wan.nets.vae import WanVAE

WIDTH = 80  # of the CLIP features


@dataclass(frozen=True)
class Models:
    vae: Path
    clip: Path
    t5: Path
    tokenizer: Path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads than idle cores make these tiny networks a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Models:
    """Model files with the official names, small enough to be written in a moment."""
    folder = tmp_path_factory.mktemp("models")
    found = Models(*(folder / name for name in ("vae.safetensors", "clip.safetensors", "t5.safetensors", "tokenizer")))
    save_file({name: weight.clone() for name, weight in WanVAE(8).state_dict().items()}, found.vae)
    hints = {"visual.patch_embedding.weight": (WIDTH, 3, 14, 14), "visual.transformer.0.mlp.0.weight": (96, WIDTH)}
    last_block = {"visual.transformer.1.norm1.weight": (WIDTH,)}
    save_file(random_weights(clip_shapes(build_clip(hints | last_block)) | last_block), found.clip)
    block = {f"attn.{x}.weight": (16, 24) for x in "qkv"} | {"attn.o.weight": (24, 16), "norm1.weight": (24,)}
    block |= {"pos_embedding.embedding.weight": (32, 2), "norm2.weight": (24,), "ffn.fc2.weight": (24, 40)}
    block |= dict.fromkeys(("ffn.gate.0.weight", "ffn.fc1.weight"), (40, 24))
    text = {f"blocks.0.{name}": shape for name, shape in block.items()}
    save_file(random_weights(text | {"token_embedding.weight": (12, 24), "norm.weight": (24,)}), found.t5)
    words = {
        word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "dog", "cat", "over", "it"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    found.tokenizer.mkdir()
    tokenizer.save(str(found.tokenizer / "tokenizer.json"))
    return found


@pytest.fixture(params=["made", "tiny"])
def either(request, made, tiny) -> Models:
    return made if request.param == "made" else Models(*(tiny[kind] for kind in ("vae", "clip", "t5", "tokenizer")))


def paint(path, seed, size):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


INDICES = "fp_1f_clean_indices = [2, 0]\nfp_1f_target_index = 1"


@pytest.fixture
def data(tmp_path):
    """Three targets of 70 x 50, 60 x 80 and 70 x 50 pixels with two control images each."""
    for i, (stem, size) in enumerate({"a": (70, 50), "b": (60, 80), "c[1]": (70, 50)}.items()):
        paint(tmp_path / "target" / f"{stem}.png", i, size)
        (tmp_path / "target" / f"{stem}.txt").write_text(f"a {['red', 'blue', 'red'][i]} dog")
        paint(tmp_path / "start" / f"{stem}_0.png", 10 + i, (90, 40))
        paint(tmp_path / "start" / f"{stem}_1.png", 20 + i, (33, 55))
    return tmp_path


def toml(data, indices=INDICES, resolution="[64, 48]"):
    path = data / "train.toml"
    folder = data.as_posix()
    path.write_text(
        f'[general]\nresolution = {resolution}\ncaption_extension = ".txt"\nenable_bucket = true\n'
        f'[[datasets]]\nimage_directory = "{folder}/target"\ncontrol_directory = "{folder}/start"\n'
        f'cache_directory = "{folder}/cache"\nbatch_size = 2\n{indices}\n'
    )
    return str(path)


def cache_latents(data, models, *flags, indices=INDICES, **settings):
    files = ["--dataset_config", toml(data, indices, **settings), "--vae", str(models.vae), "--clip", str(models.clip)]
    wan_cache_latents.main([*files, "--one_frame", "--device", "cpu", *flags])


def cache_texts(data, models, *flags):
    files = ["--dataset_config", toml(data), "--t5", str(models.t5), "--t5_tokenizer", str(models.tokenizer)]
    wan_cache_text_encoder_outputs.main([*files, "--device", "cpu", *flags])


def stamps(data):
    return {path.name: path.stat().st_mtime_ns for path in (data / "cache").iterdir()}


def changed(data, before):
    return sorted(name for name, stamp in stamps(data).items() if before.get(name) != stamp)


LATENT_NAMES = ["a_0070x0050_wan.safetensors", "b_0060x0080_wan.safetensors", "c[1]_0070x0050_wan.safetensors"]
TEXT_NAMES = ["a_wan_te.safetensors", "b_wan_te.safetensors", "c[1]_wan_te.safetensors"]


def test_cached_tensors_are_bit_for_bit_what_generation_makes_of_the_files(data, either):
    cache_latents(data, either, "--batch_size", "2", "--num_workers", "2")
    assert sorted(stamps(data)) == LATENT_NAMES
    vae = load.load_vae(either.vae, torch.float32, "cpu")
    clip = load.load_clip(either.clip, torch.float32, "cpu")
    for name, size in zip(LATENT_NAMES, [(64, 48), (48, 64), (64, 48)], strict=True):
        stem, _ = cache.parse_latent_name(Path(name))
        target, *controls = (
            open_image(path, "image")
            for path in (data / f"target/{stem}.png", data / f"start/{stem}_0.png", data / f"start/{stem}_1.png")
        )
        item = cache.read_latent_cache(data / "cache" / name)
        assert item.layout == OneFrameLayout((2, 0), 1)
        assert load_file(data / "cache" / name)["f_indices_int32"].tolist() == [0, 1, 2]
        latents = [
            encode_images(vae, to_pixels(resize_to_fill(np.asarray(image), size))[None])[0] for image in controls
        ]
        assert torch.equal(
            item.conditioning.channels, stack_condition(item.layout.clip, latents, encode_blank(vae, *size))
        )
        assert torch.equal(item.latents[:, :1], latents[1]) and torch.equal(item.latents[:, 2:], latents[0])
        assert torch.equal(item.latents[:, 1:2], encode_images(vae, frame_pixels(target, size)[None])[0])
        assert torch.equal(item.conditioning.clip, encode_clip(clip, [to_pixels(image) for image in controls]))


def test_cached_texts_are_what_generation_makes_of_the_captions(data, either):
    cache_texts(data, either, "--batch_size", "16")
    assert sorted(stamps(data)) == TEXT_NAMES
    model = load.load_t5(either.t5, torch.float32, "cpu")
    tokenizer = tokenizer_module.load_tokenizer(either.tokenizer)
    for name, caption in zip(TEXT_NAMES, ["a red dog", "a blue dog", "a red dog"], strict=True):
        path = data / "cache" / name
        assert text_cache.read_text_header(path).caption == caption
        assert_close(text_cache.read_text_cache(path), encode_text(model, tokenizer, [caption], torch.device("cpu"))[0])


def test_an_image_has_the_same_latents_alone_and_in_a_batch(made):
    vae = load.load_vae(made.vae, torch.float32, "cpu")
    pixels = torch.rand(5, 3, 48, 64) * 2 - 1
    together = encode_images(vae, pixels)
    assert together.shape == (5, 16, 1, 6, 8)
    for i in range(5):
        assert torch.equal(together[i : i + 1], encode_images(vae, pixels[i : i + 1]))
    assert rel_l2(together, vae.encode(pixels[:, :, None])) < 1e-5


def test_latents_have_the_dtype_of_the_vae(made):
    vae = load.load_vae(made.vae, torch.bfloat16, "cpu")
    assert encode_blank(vae, 32, 16).dtype == torch.bfloat16
    assert encode_blank(vae, 32, 16).shape == (16, 1, 2, 4)


def test_half_precision_is_stored_as_the_reference_stores_it(data, made):
    cache_latents(data, made, "--vae_dtype", "bf16", "--clip_dtype", "fp16")
    stored = {key: tensor.dtype for key, tensor in load_file(data / "cache" / LATENT_NAMES[0]).items()}
    assert stored == {
        "latents_3x6x8_bfloat16": torch.bfloat16,
        "latents_image_3x6x8_bfloat16": torch.bfloat16,
        "clip_bfloat16": torch.float16,
        "f_indices_int32": torch.int32,
    }


def test_clip_sees_the_whole_image(made):
    clip = load.load_clip(made.clip, torch.float32, "cpu")
    pixels = torch.rand(3, 40, 300) * 2 - 1
    part = pixels[:, :, 100:200]
    whole, cropped = encode_clip(clip, [pixels, part])
    assert torch.equal(whole, encode_image(clip, pixels[None])[0]) and not torch.equal(whole, cropped)
    assert torch.equal(cropped, encode_clip(clip, [part])[0])


def test_the_blank_frame_is_the_recorded_one(tiny):
    vae = load.load_vae(tiny["vae"], torch.float32, "cpu")
    assert rel_l2(encode_blank(vae, 96, 64), golden("vae")["black_latent_64x96"]) < 1e-5


def test_one_control_image_needs_no_indices(data, made):
    for path in (data / "start").glob("*_1.png"):
        path.unlink()
    cache_latents(data, made, indices="")
    item = cache.read_latent_cache(data / "cache" / LATENT_NAMES[0])
    assert item.layout == OneFrameLayout((0,), 1) and item.conditioning.clip.shape == (1, 257, WIDTH)


def test_three_control_images_are_cached_too(data, made):
    for stem in ("a", "b", "c[1]"):
        paint(data / "start" / f"{stem}_2.png", 30, (64, 64))
    cache_latents(data, made, indices="fp_1f_clean_indices = [0, 4, 2]\nfp_1f_target_index = 1")
    header = cache.read_header(data / "cache" / LATENT_NAMES[0])
    assert header.layout == OneFrameLayout((0, 4, 2), 1) and header.clip == (3, WIDTH)


def test_skip_existing_encodes_nothing_when_nothing_changed(data, made, monkeypatch):
    cache_latents(data, made)
    cache_texts(data, made)
    before = stamps(data)
    for loader in ("load_vae", "load_clip", "load_t5"):
        monkeypatch.setattr(load, loader, lambda *args: pytest.fail("no weights are needed"))
    cache_latents(data, made, "--skip_existing")
    cache_latents(data, made, "--skip_existing", indices="fp_1f_clean_indices = [0, 9]\nfp_1f_target_index = 3")
    cache_texts(data, made, "--skip_existing")
    assert changed(data, before) == []


def test_skip_existing_encodes_what_changed(data, made, caplog):
    caplog.set_level("INFO")
    cache_latents(data, made)
    cache_texts(data, made)
    before = stamps(data)
    paint(data / "start" / "a_1.png", 99, (33, 55))
    (data / "target" / "b.txt").write_text("a cat")
    cache_latents(data, made, "--skip_existing")
    cache_texts(data, made, "--skip_existing")
    assert changed(data, before) == [LATENT_NAMES[0], TEXT_NAMES[1]]
    assert "1 to be made: control image changed" in caplog.text and "1 to be made: caption changed" in caplog.text


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--vae_dtype", "bf16"], {}),
        (["--clip_dtype", "bf16"], {}),
        ([], {"resolution": "[96, 64]"}),
        ([], {"indices": "fp_1f_clean_indices = [0]"}),
    ],
)
def test_skip_existing_encodes_all_after_a_change_of_settings(data, made, flags, settings):
    cache_latents(data, made)
    before = stamps(data)
    cache_latents(data, made, "--skip_existing", *flags, **settings)
    assert changed(data, before) == LATENT_NAMES


def test_without_skip_existing_all_is_encoded_again(data, made):
    cache_latents(data, made)
    before = stamps(data)
    cache_latents(data, made)
    assert changed(data, before) == LATENT_NAMES


def test_caches_of_no_item_are_deleted_and_nothing_else(data, made):
    (data / "cache").mkdir()
    for name in ("old_0070x0050_wan.safetensors", "old_wan_te.safetensors", "notes.txt", "lora_wan.safetensors"):
        (data / "cache" / name).touch()
    cache_latents(data, made, "--keep_cache")
    assert "old_0070x0050_wan.safetensors" in stamps(data)
    cache_latents(data, made)
    assert sorted(stamps(data)) == sorted(
        [*LATENT_NAMES, "lora_wan.safetensors", "notes.txt", "old_wan_te.safetensors"]
    )
    cache_texts(data, made)
    assert sorted(stamps(data)) == sorted([*LATENT_NAMES, *TEXT_NAMES, "lora_wan.safetensors", "notes.txt"])


def test_an_interrupted_run_keeps_what_is_finished_and_deletes_nothing(data, made, monkeypatch):
    (data / "cache").mkdir()
    (data / "cache" / "old_0070x0050_wan.safetensors").touch()
    encode, calls = caching.encode_clip, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:  # the second item
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(caching, "encode_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(data, made)
    left = stamps(data).keys() - {"old_0070x0050_wan.safetensors"}
    assert len(left) == 1 and left < {*LATENT_NAMES} and len(stamps(data)) == 2
    cache.read_latent_cache(data / "cache" / left.pop())


def test_processes_share_whole_batches(data, made, monkeypatch):
    run = LatentCachingConfig(dataset_config=Path(toml(data)), one_frame=True)
    monkeypatch.setattr(Processes, "wait", lambda self: None)  # there is no other process
    parts = []
    for process in (1, 0):
        before = stamps(data) if parts else {}
        run_latents(run, VAEConfig(made.vae), CLIPConfig(made.clip), torch.device("cpu"), Processes(process, 2))
        parts.append(changed(data, before))
    assert parts == [[LATENT_NAMES[0], LATENT_NAMES[2]], [LATENT_NAMES[1]]]


def test_equal_captions_of_a_batch_are_encoded_once(data, made, monkeypatch):
    batches = []
    monkeypatch.setattr(
        caching,
        "encode_text",
        lambda model, tokenizer, prompts, device: [torch.ones(2, 3)] * len(batches.append(prompts) or prompts),
    )
    cache_texts(data, made)
    assert batches == [["a red dog"], ["a blue dog"]]
    assert len(stamps(data)) == 3


def test_a_damaged_image_is_named_in_one_line(data, made):
    path = data / "start" / "b_0.png"
    path.write_bytes(path.read_bytes()[:2000])  # the header is whole
    with pytest.raises(ConfigError, match=r"control image .*b_0\.png: cannot be read") as caught:
        cache_latents(data, made, "--num_workers", "1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda argv: argv.remove("--one_frame"), "--one_frame is missing"),
        (lambda argv: argv.extend(["--debug_mode", "image"]), "--debug_mode: is not supported"),
        (lambda argv: argv.extend(["--num_workers", "0"]), "--num_workers 0: must be at least 1"),
        (lambda argv: argv.extend(["--batch_size", "0"]), "--batch_size 0: must be at least 1"),
        (lambda argv: argv.extend(["--skip_exising"]), "did you mean '--skip_existing'"),
        (lambda argv: argv.extend(["--vae", "nowhere.pth"]), "--vae nowhere.pth: does not exist"),
        (lambda argv: argv.extend(["--clip", argv[3]]), "--clip .*not a CLIP image encoder"),
        (lambda argv: argv.extend(["--vae_dtype", "int7"]), "--vae_dtype: 'int7' is not a dtype"),
        (lambda argv: argv.extend(["--dataset_config", "nowhere.toml"]), "nowhere.toml: does not exist"),
    ],
)
def test_mistakes_are_found_before_any_weights_load(data, made, monkeypatch, spoil, words):
    for loader in ("load_vae", "load_clip"):
        monkeypatch.setattr(load, loader, lambda *args: pytest.fail("weights were loaded"))
    argv = ["--dataset_config", toml(data), "--vae", str(made.vae), "--clip", str(made.clip), "--one_frame"]
    spoil(argv)
    with pytest.raises(ConfigError, match=words):
        wan_cache_latents.main([*argv, "--device", "cpu"])


def test_a_cache_folder_that_cannot_be_written_is_found_before_any_weights_load(data, made, monkeypatch):
    monkeypatch.setattr(load, "load_vae", lambda *args: pytest.fail("weights were loaded"))
    (data / "cache").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.cache_directory"):
        cache_latents(data, made)


def test_flags_without_a_meaning_here_are_accepted_with_a_warning(data, made, caplog):
    cache_latents(data, made, "--i2v", "--vae_cache_cpu", "--console_width", "80")
    assert all(f"{flag} has no effect" in caplog.text for flag in ("--i2v", "--vae_cache_cpu", "--console_width"))


def test_an_fp8_text_encoder_gives_nearly_the_same_embeddings(data, made):
    def embeddings():
        return torch.cat([text_cache.read_text_cache(path).float() for path in sorted((data / "cache").iterdir())])

    cache_texts(data, made)
    plain = embeddings()
    cache_texts(data, made, "--fp8_t5")
    assert 0 < rel_l2(embeddings(), plain) < 0.1


def test_a_caption_that_is_cut_is_named_with_its_count_once(data, made, caplog):
    (data / "target" / "b.txt").write_text("dog " * 600)
    cache_texts(data, made)
    (warning,) = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert (
        warning == f"{data / 'target' / 'b.png'}: its caption has 601 tokens; the model reads the first 512, shorten it"
    )


def test_caches_of_another_dataset_file_are_not_deleted_without_asking(data, made):
    cache_latents(data, made)
    cache_texts(data, made)
    before = set(stamps(data))
    for folder, name in (("target", "b.png"), ("target", "b.txt"), ("start", "b_0.png"), ("start", "b_1.png")):
        (data / f"other_{folder}").mkdir(exist_ok=True)
        shutil.copy(data / folder / name, data / f"other_{folder}" / name.replace("b", "z"))
    config = (data / "train.toml").read_text().replace("/target", "/other_target").replace("/start", "/other_start")
    (data / "other.toml").write_text(config)
    common = ["--dataset_config", str(data / "other.toml"), "--device", "cpu"]
    latents = [*common, "--vae", str(made.vae), "--clip", str(made.clip), "--one_frame"]
    texts = [*common, "--t5", str(made.t5), "--t5_tokenizer", str(made.tokenizer)]
    runs = ((wan_cache_latents.main, latents), (wan_cache_text_encoder_outputs.main, texts))
    for main, flags in runs:
        with pytest.raises(ConfigError, match=r"cache: holds 3 caches of .*/target, e.g. a_.*deleted; .*--keep_cache"):
            main(flags)
        assert before == {name for name in stamps(data) if not name.startswith("z")}
        main([*flags, "--keep_cache"])
    assert len(stamps(data)) == len(before) + 2
    shutil.rmtree(data / "target")  # images that are gone need no caches
    for main, flags in runs:
        main(flags)
    assert sorted(stamps(data)) == ["z_0060x0080_wan.safetensors", "z_wan_te.safetensors"]


def test_caches_of_another_folder_whose_images_have_equal_names_are_replaced_with_a_warning(data, made, caplog):
    shutil.copytree(data / "target", data / "other_target")
    cache_latents(data, made)
    cache_texts(data, made)
    (data / "same.toml").write_text((data / "train.toml").read_text().replace("/target", "/start/../target"))
    (data / "other.toml").write_text((data / "train.toml").read_text().replace("/target", "/other_target"))
    latents = ["--vae", str(made.vae), "--clip", str(made.clip), "--one_frame"]
    texts = ["--t5", str(made.t5), "--t5_tokenizer", str(made.tokenizer)]
    for main, flags in ((wan_cache_latents.main, latents), (wan_cache_text_encoder_outputs.main, texts)):
        for name, warns in (("same", False), ("other", True), ("other", False)):
            caplog.clear()
            main(["--dataset_config", str(data / f"{name}.toml"), "--device", "cpu", *flags])
            assert ("e.g. a_" in caplog.text and "in whose place this dataset has its own" in caplog.text) == warns
