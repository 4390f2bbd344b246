"""musubi-tuner's caches are trained on as they are; ours have what it looks for (docs/formats.md#reading-caches)."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dataset import cache, text_cache
from dataset.config import read_config
from dataset.loader import TrainingSet, load_batch
from utils.dtypes import dtype_name
from wan.frames.condition import stack_condition
from wan.frames.layout import OneFrameLayout
from wan.nets.conditioning import Conditioning

LAYOUT = OneFrameLayout((0, 2), 1)
SETTINGS = cache.LatentSettings(
    bucket=(64, 64), target="t", controls=("a", "b"), vae="v", clip="c", vae_dtype="bfloat16", clip_dtype="float16"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
TOML = """
[[datasets]]
resolution = [64, 64]
batch_size = 2
caption_extension = ".txt"
image_directory = "images"
cache_directory = "{}"
fp_1f_clean_indices = [0, 2]
fp_1f_target_index = 1
"""


def frame(seed: int) -> torch.Tensor:
    """Numbers that all the dtypes hold."""
    return torch.randint(-8, 9, (16, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).float()


def write_ours(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    for number, stem in enumerate(("a", "b_1")):
        controls = [frame(10 * number + 1).to(dtype), frame(10 * number + 2).to(dtype)]
        made = cache.LatentCache(
            latents=LAYOUT.clip.stack([*controls, frame(10 * number + 3).to(dtype)]),
            conditioning=Conditioning(
                stack_condition(LAYOUT.clip, controls, torch.zeros(16, 1, 8, 8, dtype=dtype)),
                torch.randint(-8, 9, (2, 257, 10), generator=torch.Generator().manual_seed(number)).half(),
            ),
            layout=LAYOUT,
        )
        cache.write_latent_cache(cache.latent_cache_path(folder, stem, (80, 70)), made, SETTINGS)
        text = torch.arange(12.0).reshape(3 + number, -1).to(dtype)
        settings = text_cache.TextSettings(t5="t", dtype=dtype_name(dtype))
        text_cache.write_text_cache(text_cache.text_cache_path(folder, stem), text, f"a {stem}", settings)


def as_theirs(source: Path, folder: Path, dtype: torch.dtype, metadata: bool) -> None:
    """Rewrite caches as musubi-tuner would, with its VAE and T5 in some dtype; as other tools also without metadata."""
    for path in source.glob("*.safetensors"):
        tensors = {}
        for key, tensor in load_file(path).items():
            if key == "f_indices_int32":
                tensors[key] = tensor
            else:  # CLIP features are float16 whatever the name says
                values = tensor if key.startswith("clip") else tensor.to(dtype)
                tensors[re.sub("bfloat16$", dtype_name(dtype), key)] = values
        with safe_open(path, "pt") as file:
            ours = ("one_frame", "settings")
            kept = {key: value for key, value in file.metadata().items() if key not in ours}
        save_file(tensors, folder / path.name, kept if metadata else None)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "ours", "theirs"):
        Path(name).mkdir()
        Path(f"{name}.toml").write_text(TOML.format(name))


def batch_of(config: str):
    (plan,) = TrainingSet(read_config(config), seed=0).epoch_batches(1)
    return load_batch(plan)


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_caches_of_musubi_tuner_give_the_batch_that_ours_give(dtype, metadata):
    write_ours(Path("ours"))
    as_theirs(Path("ours"), Path("theirs"), dtype, metadata)
    ours, theirs = batch_of("ours.toml"), batch_of("theirs.toml")
    for name in ("latents", "frame_indices"):
        assert torch.equal(getattr(ours, name).float(), getattr(theirs, name).float()), name
    for name, one, other in zip(Conditioning._fields, ours.conditioning, theirs.conditioning, strict=True):
        assert torch.equal(one.float(), other.float()), name
    for one, other in zip(ours.text, theirs.text, strict=True):
        assert torch.equal(one.float(), other.float())


def collated(path: Path) -> dict[str, torch.Tensor]:
    """The entries that musubi-tuner makes of a file, by the rule of docs/formats.md#reading-caches."""
    entries = {}
    for key, tensor in load_file(path).items():
        name = key.removeprefix("varlen_").rsplit("_", 1)[0]
        if name.startswith("latents_"):
            name = name.rsplit("_", 1)[0]
        assert name not in entries
        entries[name] = tensor
    return entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_our_caches_have_the_names_and_entries_that_musubi_tuner_looks_for(dtype):
    write_ours(Path("ours"), dtype)
    for path in Path("ours").glob("*_wan.safetensors"):
        *stem, size, tag = path.stem.split("_")  # how it takes a name apart
        assert tuple(map(int, size.split("x"))) == (80, 70) and tag == "wan"
        found = collated(path) | collated(Path("ours", f"{'_'.join(stem)}_wan_te.safetensors"))
        assert found.keys() == {"latents", "latents_image", "clip", "f_indices", "t5"}
        assert found["latents"].shape == (16, 3, 8, 8) and found["latents_image"].shape == (20, 3, 8, 8)
        assert found["f_indices"].tolist() == [0, 1, 2] and found["clip"].shape == (2, 257, 10)
        assert found["latents"].dtype == found["t5"].dtype == dtype and found["clip"].dtype == torch.float16
        assert found["t5"].ndim == 2
