"""A user's folder at a tiny scale, and calls of the scripts from within it.

The folder comes from the fixtures `new_project` and `project`; all paths are relative to it, and pictures in float32 on
a CPU repeat to the byte.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_train_network
from dataset.config import read_config
from dataset.loader import TrainingBatch, TrainingSet, load_batch
from demo.tiny_models import FILES
from wan.generation.pipeline import Encoded, Pipeline
from wan.generation.prompt_lines import TRAINING, parse_line
from wan.generation.request import Request, SamplingConfig
from wan.models.checkpoints import CLIPCheckpoint, T5Checkpoint, VAECheckpoint
from wan.models.tasks import TASKS

CPU = torch.device("cpu")
MODELS = {kind: f"models/{name}" for kind, name in FILES.items()}
_FLAGS = {"i2v": "--dit", "flf2v": "--dit", "tokenizer": "--t5_tokenizer"}
SIZE = "--w 48 --h 48"
I2V = f"a cat in the evening light --ci data/start/cat.png --of control_index=0,target_index=1 {SIZE} --s 2 --d 7"
FLF2V = (
    "the frame between --ci data/ends/cat_0.png --ci data/ends/cat_1.png --of control_index=0;2,target_index=1 "
    f"{SIZE} --s 2 --d 7"
)


def model_flags(*kinds: str, folder: str = "models") -> list[str]:
    """The flags that name the models of these kinds (keys of FILES) in `folder`."""
    return [part for kind in kinds for part in (_FLAGS.get(kind, f"--{kind}"), f"{folder}/{FILES[kind]}")]


I2V_KINDS = ("i2v", "vae", "clip", "t5", "tokenizer")  # what the task i2v-14B needs
LATENT_MODELS, TEXT_MODELS = model_flags("vae", "clip"), model_flags("t5", "tokenizer")
ENCODERS = [*LATENT_MODELS, *TEXT_MODELS]


def dataset_toml(
    name: str,
    images: str = "target",
    controls: str = "start",
    keys: str = "",
    *,
    cache: str | None = None,
    size: tuple[int, int] = (48, 48),
    batch_size: int = 2,
) -> str:
    """Write `name`.toml with one dataset of two folders in data/; `cache` is cache/`name` when not given."""
    Path(f"{name}.toml").write_text(
        f'[general]\nresolution = {list(size)}\ncaption_extension = ".txt"\nbatch_size = {batch_size}\n'
        f'[[datasets]]\nimage_directory = "data/{images}"\ncontrol_directory = "data/{controls}"\n'
        f'cache_directory = "{cache or f"cache/{name}"}"\n{keys}\n'
    )
    return f"{name}.toml"


def cache_latents(config: str, *flags: str) -> None:
    wan_cache_latents.main(["--dataset_config", config, *LATENT_MODELS, "--one_frame", "--device", "cpu", *flags])


def cache_texts(config: str, *flags: str) -> None:
    wan_cache_text_encoder_outputs.main(["--dataset_config", config, *TEXT_MODELS, "--device", "cpu", *flags])


def cache(config: str) -> None:
    cache_latents(config)
    cache_texts(config)


def run_flags() -> list[str]:
    """What training and generation need beside the DiT."""
    return [*ENCODERS, "--device", "cpu", "--dit_dtype", "float32"]


def train(model: str, config: str, name: str, *flags: str) -> Path:
    """The LoRA of two steps."""
    wan_train_network.main(
        [
            *(*model_flags(model), "--dataset_config", config, *run_flags()),
            *("--task", f"{model}-14B", "--network_dim", "2", "--learning_rate", "1e-2", "--seed", "5"),
            *("--max_data_loader_n_workers", "0", "--max_train_steps", "2"),
            *("--output_dir", "output", "--output_name", name, "--overwrite", *flags),
        ]
    )
    return Path(f"output/{name}.safetensors")


def generate(model: str, folder: str, *flags: str) -> list[Path]:
    """The files that one run wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    wan_generate_video.main([*model_flags(model), *run_flags(), "--save_path", folder, *flags])
    return sorted(Path(folder).iterdir())


def from_lines(model: str, folder: str, *lines: str, flags: Iterable[str] = ()) -> list[bytes]:
    """The images of a prompt file, in its order, without recipes: equal pictures are equal bytes."""
    Path("lines.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = ("--from_file", "lines.txt", "--no_metadata", *flags)
    return [path.read_bytes() for path in generate(model, folder, *flags)]


def pixels(path: Path) -> bytes:
    """The picture in a file, whatever its metadata."""
    with Image.open(path) as image:
        return image.tobytes()


def pipeline() -> Pipeline:
    return Pipeline(
        VAECheckpoint(Path(MODELS["vae"])),
        T5Checkpoint(Path(MODELS["t5"]), Path(MODELS["tokenizer"])),
        CLIPCheckpoint(Path(MODELS["clip"])),
        CPU,
    )


def encoded(line: str, task: str) -> Encoded:
    request = Request.resolve(parse_line(line, "test", TRAINING), TASKS[task], SamplingConfig(exact_size=True))
    return pipeline().encode([request])[0]


def cached_cat(config: str) -> tuple[TrainingBatch, int]:
    """A training batch with the photograph of the cat, and the row that it is in."""
    for plan in TrainingSet(read_config(config), seed=0).epoch_batches(1):
        for row, item in enumerate(plan.items):
            if "/cat_" in item.key:
                return load_batch(plan), row
    raise AssertionError("no cat")
