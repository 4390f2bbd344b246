"""Files of every kind that a user can hand over, damaged or made up, against the code that reads them.

    python -m tests.fuzz --minutes 10            from the project folder; ends with 1 if anything was found
    python -m tests.fuzz --minutes 1 dataset_toml lora

Whatever a file holds, it is read or it is a ConfigError: no other exception, no endless wait, no code run, no file
changed. tests/test_hostile_files.py runs each target briefly, and keeps what was found here.
"""

import argparse
import builtins
import faulthandler
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save

import wan_generate_video
import wan_train_network
from dataset import cache, text_cache
from dataset import config as dataset_config
from dataset.sources import find_all_items
from tests.fuzz_files import (
    CACHE,
    CACHE_METADATA,
    CODE_RAN,
    DATASET,
    LATENT,
    LISTED,
    LORA_METADATA,
    LORAS,
    MODEL,
    OPTIONS,
    PICKLES,
    PICTURES,
    PROMPT_LINE,
    PROMPT_TOML,
    RECIPE,
    TEXT_CACHE,
    TOKENIZER,
    damaged,
    dit,
    in_gguf,
    json_bytes,
    numbers,
    pickled,
    png_with,
    safetensors,
    tables,
    texts,
    toml_lines,
    values,
    write_folder,
)
from utils.errors import ConfigError
from utils.images import check_image, open_image
from wan.files import load, tokenizer
from wan.files.formats import open_checkpoint
from wan.frames import layout
from wan.generation import outputs, recipe
from wan.generation.prompt import Prompt
from wan.generation.prompt_lines import GENERATION, TRAINING, parse_line, read_file
from wan.generation.request import Request, SamplingConfig
from wan.lora.files import read_lora
from wan.lora.merge import check_lora
from wan.lora.tools import inspect
from wan.lora.trained_for import layout_from_metadata
from wan.models.tasks import TASKS
from wan.nets.t5 import clean_prompt
from wan.training import state

SLOWEST = 20.0  # seconds for one file
STUCK = 600.0  # seconds for a hundred of them, after which the search ends with the place where it is


# --- what reads them


@dataclass(frozen=True)
class Target:
    """A kind of file: how such files are made, and what reads them. ConfigErrors are fine, nothing else is."""

    name: str  # of the file
    contents: SearchStrategy[bytes]
    readers: tuple[Callable[[Path], object], ...]


def dataset_items(path: Path) -> None:
    find_all_items(dataset_config.read_config(path))


def listed_items(path: Path) -> None:
    Path("of_list.toml").write_text(f'[[datasets]]\nimage_jsonl_file = "{path}"\ncache_directory = "cache"\n')
    try:
        dataset_items(Path("of_list.toml"))
    finally:
        Path("of_list.toml").unlink()


def captions(path: Path) -> None:
    original = Path("images/cat.txt").read_bytes()
    try:
        Path("images/cat.txt").write_bytes(path.read_bytes())
        Path("of_folder.toml").write_text(DATASET)
        for item in find_all_items(dataset_config.read_config("of_folder.toml")):
            tokenized(item.caption)
    finally:
        Path("images/cat.txt").write_bytes(original)
        Path("of_folder.toml").unlink(missing_ok=True)


_tokenizers: dict[str, object] = {}


def tokenized(text: str) -> None:
    here = str(Path.cwd())
    if here not in _tokenizers:
        _tokenizers[here] = tokenizer.load_tokenizer("tokenizer")
    _tokenizers[here]([clean_prompt(text)], truncation=True, max_length=512)


def requested(prompts: list[Prompt]) -> None:
    """As far as the networks."""
    base = Prompt(control_image_path=("controls/cat.png",), one_frame="target_index=1,control_index=0")
    for prompt in prompts:
        request = Request.resolve(prompt.over(base), TASKS["i2v-14B"], SamplingConfig())
        outputs.latent_metadata(request, "i2v-14B", (), recipe.Recipe.of(torch.device("cpu")).adding(request.options))
        for text in (request.prompt, request.negative_prompt):
            tokenized(text)


def generated_from(path: Path) -> None:
    requested(read_file(path, "--from_file", GENERATION))


def sampled_from(path: Path) -> None:
    requested(read_file(path, "--sample_prompts", TRAINING))


def typed(path: Path) -> None:
    for line in path.read_bytes().decode(errors="surrogateescape").splitlines():
        requested([parse_line(line, "line", GENERATION)])


def trained_with(path: Path) -> None:
    required = ["--dataset_config", "x", "--output_dir", "x", "--output_name", "x"]
    wan_train_network.build_parser().parse_args(["--config_file", str(path), *required])


def repeated(path: Path) -> None:
    recipe.parse_args(
        wan_generate_video.build_parser(), ["--save_path", "out", "--device", "cpu", "--recipe", str(path)]
    )


def merged(path: Path) -> None:
    lora = read_lora(path)
    layout_from_metadata(lora.metadata)
    check_lora(lora, {"blocks.0.self_attn.q.weight": (4, 4), "blocks.1.ffn.0.weight": (4, 4)})
    for module in lora.modules.values():
        module.norm()
        for leaf in module.shapes:
            module.delta(leaf)


def state_of(path: Path) -> None:
    folder = Path("state")
    folder.mkdir()
    sound = {
        "progress.json": b'{"progress": {"step": 1}, "facts": {}}',
        "model.safetensors": save({"a": torch.ones(1)}),
    }
    sound["optimizer.bin"] = pickled({})
    try:
        for name, content in sound.items():
            (folder / name).write_bytes(path.read_bytes() if path.suffix == Path(name).suffix else content)
        state.newest_state(Path(), "x")
        state.load_state(folder)
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


MODELS = (
    *(load.inspect_dit, load.dit_dtype, load.inspect_vae),
    *(load.inspect_t5, load.inspect_clip),
)


def loaded(path: Path) -> None:
    load.load_dit(path, torch.float32, torch.device("cpu"))


def opened_whole(path: Path) -> None:
    found = open_checkpoint(path, "--dit")
    for name in found.tensors:
        found.read(name, "cpu")


def tokenizer_of(path: Path) -> None:
    tokenizer.load_tokenizer(path.parent)


def opened(path: Path) -> None:
    open_image(path, "--image_path")


def measured(path: Path) -> None:
    check_image(path, "--image_path")


def indices(path: Path) -> None:
    str(layout.parse(path.read_bytes().decode(errors="surrogateescape")))


_CONFIG_KEYS = (*dataset_config._FIELDS, "general", "datasets", "video_directory")
_PROMPT_KEYS = ("prompt", "width", "seed", "one_frame", "control_image_path", "image_path", "cfg_scale", "sample_steps")
_ENTRY = {"image_directory": "images", "caption_extension": ".txt", "control_directory": "controls"}
_LINE = {"image_path": "images/cat.png", "caption": "a", "control_path": "controls/cat.png"}
_LETTERS = ["", "w", "h", "s", "d", "l", "g", "fs", "n", "ci", "i", "of", "f", "ei", "cn"]
prompt_lines = st.lists(
    st.tuples(st.sampled_from(_LETTERS), texts | numbers.filter(lambda number: abs(number) < 1e300).map(str)),
    max_size=6,
).map(
    lambda pairs: " ".join(f"--{name} {text}" if name else text for name, text in pairs).encode(errors="surrogatepass")
)

TARGETS = {
    "dataset_toml": Target(
        "data.toml",
        damaged(DATASET.encode()) | toml_lines(*_CONFIG_KEYS),
        (dataset_items,),
    ),
    "dataset_json": Target(
        "data.json",
        tables(*_CONFIG_KEYS, fixed=_ENTRY).map(lambda entry: json_bytes({"datasets": [entry]}))
        | tables("general", "datasets").map(json_bytes)
        | values.map(json_bytes)
        | st.sampled_from([b"[" * 100_000, b"9" * 5000]),
        (dataset_items,),
    ),
    "dataset_list": Target(
        "list.jsonl.txt",
        tables("control_path_1", "image_path_0", "caption", fixed=_LINE).map(json_bytes)
        | damaged(LISTED.encode() * 3)
        | st.sampled_from([b"[" * 100_000, b"9" * 5000]),
        (listed_items,),
    ),
    "caption": Target("caption.txt", damaged("a cat &amp; 猫".encode()) | st.binary(max_size=50), (captions,)),
    "prompts_txt": Target("p.txt", damaged(PROMPT_LINE.encode()) | prompt_lines, (generated_from, sampled_from, typed)),
    "prompts_json": Target(
        "p.json",
        st.lists(tables(*_PROMPT_KEYS) | texts, max_size=3).map(json_bytes)
        | values.map(json_bytes)
        | st.sampled_from([b"[" * 100_000, b"9" * 5000]),
        (generated_from,),
    ),
    "prompts_toml": Target(
        "p.toml", damaged(PROMPT_TOML.encode()) | toml_lines("prompt", "prompt.subset", *_PROMPT_KEYS), (sampled_from,)
    ),
    "options_toml": Target(
        "o.toml",
        damaged(OPTIONS.encode()) | toml_lines("learning_rate", "seed", "sdpa", "network_args", "optimizer_type", "x"),
        (trained_with,),
    ),
    "indices": Target(
        "i.txt", damaged(b"control_index=0;2, target_index = 1,no_post") | st.binary(max_size=30), (indices,)
    ),
    "recipe": Target(
        "r.png",
        damaged(png_with(json.dumps(RECIPE)))
        | tables(*recipe._OPTIONS).map(lambda options: png_with(json_bytes({**RECIPE, "options": options}).decode()))
        | values.map(lambda value: png_with(json_bytes(value).decode())),
        (repeated,),
    ),
    "picture": Target("p.png", damaged(*PICTURES) | st.binary(max_size=100), (opened, measured)),
    "lora": Target("l.safetensors", safetensors(LORAS, LORA_METADATA), (merged, inspect)),
    "cache": Target(
        "a_0016x0016_wan.safetensors",
        safetensors([CACHE, TEXT_CACHE], CACHE_METADATA),
        (cache.read_header, cache.read_latent_cache, text_cache.read_text_header, text_cache.read_text_cache),
    ),
    "latent": Target("l.safetensors", safetensors([LATENT], CACHE_METADATA), (outputs.read_latent,)),
    "latent_recipe": Target("r.safetensors", safetensors([LATENT], {recipe.KEY: json.dumps(RECIPE)}), (repeated,)),
    "pickle": Target("p.pth", damaged(*PICKLES) | st.sampled_from(PICKLES), (*MODELS, outputs.read_latent)),
    "model": Target("m.safetensors", safetensors([MODEL, *LORAS], CACHE_METADATA), MODELS),
    "dit": Target("dit.safetensors", safetensors([dit()], {"format": "pt"}), (load.inspect_dit, loaded)),
    "gguf": Target("m.gguf", damaged(in_gguf()), (*MODELS, opened_whole)),
    "state": Target(
        "progress.json",
        tables("progress", "facts", fixed={"progress": {"step": 1}, "facts": {}}).map(json_bytes)
        | damaged(b'{"progress": {"step": 1, "losses": [0.5]}, "facts": {}}'),
        (state_of,),
    ),
    "state_pickle": Target("optimizer.bin", damaged(*PICKLES) | st.sampled_from(PICKLES), (state_of,)),
    "tokenizer": Target("tokenizer.json", damaged(TOKENIZER) | values.map(json_bytes), (tokenizer_of,)),
}


# --- running


def read_all(target: Target, content: bytes) -> str:
    """Hand a file to the readers of a target; `read` or `refused`. Raises AssertionError, or what a reader raised."""
    path = Path("given", target.name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    before, outcome, start = listing(), "refused", time.monotonic()
    for read in target.readers:
        try:
            read(path)
            outcome = "read"
        except ConfigError as error:
            assert str(error).strip(), "no message"
    assert time.monotonic() - start < SLOWEST, "takes too long"
    assert not hasattr(builtins, CODE_RAN), "code of the file was run"
    assert listing() == before and path.read_bytes() == content, "files were changed"
    return outcome


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def attack(name: str, examples: int, number: int | None = None) -> Counter:
    """Files for one target; number: other ones for each, None: the same every time. Raises what was found."""
    outcomes: Counter = Counter()

    @settings(
        max_examples=examples,
        derandomize=number is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(TARGETS[name].contents)
    def run(content: bytes) -> None:
        outcomes[read_all(TARGETS[name], content)] += 1

    (run if number is None else seed(number)(run))()
    return outcomes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help="kinds of files; default: all")
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    outcomes: dict[str, Counter] = {name: Counter() for name in args.targets}
    end, number, found = time.monotonic() + 60 * args.minutes, args.seed, {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_folder()
        while time.monotonic() < end:
            for name in [name for name in args.targets if name not in found]:
                faulthandler.dump_traceback_later(STUCK, exit=True)
                try:
                    outcomes[name] += attack(name, 100, number)
                except BaseException as error:  # whatever came out of a reader
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    found[name] = error
                    content = Path("given", TARGETS[name].name).read_bytes()
                    print(f"{name}: {type(error).__name__}: {str(error)[:300]}\n    {content[:300]!r}", flush=True)
            number += 1
        faulthandler.cancel_dump_traceback_later()
        os.chdir(Path(folder).parent)
    for name, counts in outcomes.items():
        print(f"{name}: {counts['read']} read, {counts['refused']} refused{', 1 found' * (name in found)}")
    print(f"{sum(map(Counter.total, outcomes.values()))} files, {len(found)} kinds with something found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
