"""Runs of the caching and training scripts on a tiny scale, and all that they show: for tests of their options."""

import hashlib
import re
import shutil
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import dataset.loader
import wan.caching.run
import wan.frames.encoding
import wan.models.memory_options
import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_train_network
from demo.tiny_models import FILES
from utils import cli
from utils.errors import ConfigError

SCRIPTS = {
    "wan_cache_latents": wan_cache_latents,
    "wan_cache_text_encoder_outputs": wan_cache_text_encoder_outputs,
    "wan_train_network": wan_train_network,
}
# What the runs have in common; `models/vae` stands for the file in that folder.
BASE = {
    "wan_cache_latents": "--dataset_config fill.toml --vae models/vae --clip models/clip --one_frame --device cpu",
    "wan_cache_text_encoder_outputs": "--dataset_config fill.toml --t5 models/t5 --t5_tokenizer models/tokenizer "
    "--device cpu",
    "wan_train_network": "--dit models/i2v --dataset_config data.toml --device cpu --max_train_steps 2 --seed 5 "
    "--learning_rate 1e-2 --network_dim 2 --max_data_loader_n_workers 0 --output_dir output --output_name run "
    "--vae models/vae --clip models/clip --t5 models/t5 --t5_tokenizer models/tokenizer",
}


def words(script: str, arguments: str) -> list[str]:
    """The base arguments and these; `models/vae` stands for the file in that folder."""
    return [
        f"{folder}/{FILES[kind]}" if slash and kind in FILES else word
        for word in (*BASE[script].split(), *arguments.split())
        for folder, slash, kind in [word.partition("/")]
    ]


def run(script: str, arguments: str) -> dict[str, object]:
    """What a run shows, by the place to look. Everything it writes begins with `output`."""
    for path in Path().glob("output*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if script != "wan_train_network":
        shutil.copytree("cache", "output_cache")  # up to date, and with files that belong to no item
        shutil.copy(*(f"output_cache/{name}_0320x0213_wan.safetensors" for name in ("cat", "dog")))
        shutil.copy(*(f"output_cache/{name}_wan_te.safetensors" for name in ("cat", "dog")))
    built, printed, outcome = [], StringIO(), "done"
    with recorded(built), switches() as switched, redirect_stdout(printed):
        try:
            SCRIPTS[script].main(words(script, arguments))
        except (ConfigError, cli.Stopped) as error:
            outcome = f"{type(error).__name__}: {error}"
        switched += [getattr(*place) for place in SWITCHES]
    files = sorted(path for path in Path().glob("output*/**/*") if path.is_file())
    return {
        "outcome": outcome,
        "built": built,
        "switches": switched,
        "printed": printed.getvalue(),
        "files": [re.sub(r"\d{14}", "TIME", path.as_posix()) for path in (*files, *Path().glob("output*.txt"))],
        "weights": [digest(path) for path in files if path.suffix == ".safetensors"],
        "metadata": [metadata(path) for path in files if path.name == "run.safetensors"],
        "pictures": [(Image.open(path).size, Image.open(path).tobytes()) for path in files if path.suffix == ".png"],
        "metrics": [path.read_text() for path in files if path.suffix == ".jsonl"],
        "told": [path.read_text() for path in Path().glob("output*.txt")],
    }


def digest(path: Path) -> str:
    tensors = load_file(path).items()
    return hashlib.sha256(
        repr([(name, tensor.dtype, tensor.tolist()) for name, tensor in tensors]).encode()
    ).hexdigest()


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {
            key: value for key, value in (file.metadata() or {}).items() if not re.search("date|_at$|session_id", key)
        }


SWITCHES = (
    *((torch.backends.cudnn, name) for name in ("enabled", "benchmark", "allow_tf32")),
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch._dynamo.config, "cache_size_limit"),
)


@contextmanager
def switches():
    """Put torch's global settings back afterwards."""
    before = [getattr(*place) for place in SWITCHES]
    yield []
    for place, value in zip(SWITCHES, before, strict=True):
        setattr(*place, value)


@contextmanager
def recorded(calls: list):
    """Note what is built, without processes, threads, pinned memory and compilers: it has to be quick anywhere."""

    def loader(original, *args, num_workers, persistent_workers, multiprocessing_context, **more):
        calls.append(("loader", num_workers, persistent_workers))
        return original(*args, **more)

    def threads(original, workers):
        calls.append(("threads", workers))
        return original(1)

    def images(original, vae, frames):
        calls.append(("images", len(frames)))
        return original(vae, frames)

    def texts(original, model, tokenizer, captions, **more):
        calls.append(("texts", len(captions)))
        return original(model, tokenizer, captions, **more)

    def swap(original, dit, count, device, pinned, recomputed):
        calls.append(("swap", count, pinned))
        original(dit, count, device, False, recomputed)

    def checkpoint(original, dit, cpu_offload, only_needed):
        calls.append(("checkpoint", cpu_offload, only_needed))
        original(dit, cpu_offload, only_needed)

    def compiler(original, function, **settings):
        calls.append(("compile", settings))
        return function

    places = {
        (dataset.loader, "DataLoader"): loader,
        (wan.caching.run, "ThreadPoolExecutor"): threads,
        (wan.frames.encoding, "encode_frames"): images,
        (wan.caching.run, "encode_text"): texts,
        (wan.models.memory_options, "swap_blocks_"): swap,
        (wan.models.memory_options, "recompute_blocks_"): checkpoint,
        (torch, "compile"): compiler,
    }
    with ExitStack() as stack:
        for (owner, name), build in places.items():
            stack.enter_context(mock.patch.object(owner, name, partial(build, getattr(owner, name))))
        yield
