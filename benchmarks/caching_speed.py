"""Items per second of wan_cache_latents.py, and what they wait for: a target and a control image each, random weights.

    python benchmarks/caching_speed.py                 VAE and CLIP of the real sizes, 512 and 1024 pixels, on a GPU
    python benchmarks/caching_speed.py --size tiny     a smoke test on a CPU, in seconds

Reading alone: files to resized pixels, by the threads. Encoding alone: what the GPU needs when everything is read. The
slower of the two is the limit of the whole.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from benchmarks.random_model import SPECS, write_release
from dataset.sources import find_all_items
from demo.tiny_models import FILES
from wan.caching import run as caching
from wan.caching.run import LatentCachingConfig
from wan.models.checkpoints import CLIPCheckpoint, VAECheckpoint
from wan.models.device import DeviceConfig

MODELS = dict.fromkeys(("vae", "clip", "vae_dtype", "clip_dtype"), "random")


def write_photos(folder: Path, side: int, count: int) -> Path:
    """PNG files that are as hard to read as photographs, and the dataset file for them."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (max(side // 16, 1), max(side // 16, 1), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    for kind in ("target", "start"):
        (folder / kind).mkdir()
        for number in range(count):
            levels = (smooth + random.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(levels).save(folder / kind / f"{number:04}.png", compress_level=1)
            (folder / kind / f"{number:04}.txt").write_text("a photograph", encoding="utf-8")
    path, root = folder / "data.toml", folder.as_posix()
    path.write_text(
        f'[general]\nresolution = [{side}, {side}]\nbatch_size = 4\ncaption_extension = ".txt"\n[[datasets]]\n'
        f'image_directory = "{root}/target"\ncontrol_directory = "{root}/start"\ncache_directory = "{root}/cache"\n'
        "fp_1f_clean_indices = [0]\nfp_1f_target_index = 1\n",
        encoding="utf-8",
    )
    return path


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def exhaust(iterable: Iterable[object]) -> None:
    for _ in iterable:
        pass


def measure(side: int, count: int, vae: torch.nn.Module, clip: torch.nn.Module) -> list[float]:
    """Items per second: of the whole, of reading alone, of encoding alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = LatentCachingConfig(dataset_config=write_photos(Path(folder), side, count), one_frame=True)
        config, items = run.read(find_all_items, caching.latent_path, run)
        load = partial(caching.load_item, models=MODELS)
        batch = [load(item) for item in items[:4]]
        exhaust(caching.encode_items(vae, clip, [batch]))  # compiles and chooses kernels
        reading = seconds(lambda: exhaust(caching.ahead(load, items, run.workers)))
        encoding = seconds(lambda: exhaust(caching.encode_items(vae, clip, [batch] * (count // 4))))
        whole = seconds(lambda: caching.cache_latents(config, items, vae, clip, MODELS, run))
    return [count / whole, count / reading, count / encoding]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SPECS, default="14B")
    parser.add_argument("--items", type=int, default=128)
    arguments = parser.parse_args()
    device = DeviceConfig("cpu" if arguments.size == "tiny" else "cuda").resolve()
    with tempfile.TemporaryDirectory() as folder:
        write_release(Path(folder), arguments.size, kinds=("vae", "clip"))
        vae = VAECheckpoint(Path(folder, FILES["vae"])).load(device)
        clip = CLIPCheckpoint(Path(folder, FILES["clip"])).load(device)
    print("| images of | items/s | reading alone | encoding alone |\n|---|---|---|---|")
    for side in (32,) if arguments.size == "tiny" else (512, 1024):
        cells = " | ".join(f"{value:.1f}" for value in measure(side, arguments.items // 4 * 4, vae, clip))
        print(f"| {side}x{side} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
