"""A run resumed inside an epoch with any two other settings goes on exactly, says what differs, or refuses in one line.

RANDOM_RESUMES pairs are drawn; a run that takes too long ends with another code than 0 or 1.
"""

import os
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.crash_points import Forks, Job, Outcome
from tests.project import ENCODERS, cache, dataset_toml, model_flags

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are forks")
PAIRS = int(os.environ.get("RANDOM_RESUMES", "40"))
STEPS, AT = 7, 3  # of which 5 are an epoch

_TRAINING = {
    "dataset_config": "data.toml",
    "network_module": "networks.lora_wan",
    "network_dim": "2",
    "network_alpha": "1",
    "seed": "5",
    "learning_rate": "1e-3",
    "max_train_steps": str(STEPS),
    "max_data_loader_n_workers": "0",
    "output_dir": "output",
    "output_name": "run",
}
# What changes neither the training nor its result, one choice per line.
FREE = [
    {"max_data_loader_n_workers": "1"},
    {"max_data_loader_n_workers": "1", "persistent_data_loader_workers": ""},
    {"save_every_n_steps": "1", "save_state": ""},
    {"save_every_n_epochs": "1"},
    {"save_every_n_steps": "1", "save_last_n_steps": "0"},
    {"save_state_on_train_end": ""},
    {"no_metadata": ""},
    {"training_comment": "again", "metadata_title": "again"},
    {"sample_prompts": "a.txt", "sample_every_n_steps": "2"},
    {"sample_prompts": "a.txt", "sample_at_first": "", "sample_every_n_epochs": "1"},
    {"gradient_checkpointing": ""},
    {"gradient_checkpointing": "", "blocks_to_swap": "1"},
    {"stop_after_skipped_steps": "1"},
    {"seed": "6"},
    {"output_name": "other"},
    {"network_weights": "output/run.safetensors"},
]
# What changes it, by the name that the log then has to mention.
HEARD = {
    "steps_per_epoch": {"dataset_config": "batch2.toml"},
    "items": {"dataset_config": "twice.toml"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": "2"},
    "total_steps": {"max_train_steps": "9"},
    "precision": {"mixed_precision": "bf16"},
    "validation_split": {"validation_split": "1", "validate_every_n_steps": "2"},
    "optimizer_type": [{"optimizer_type": name} for name in ("Adafactor", "SGD", "Adam", "RAdam", "Prodigy")],
    "optimizer_args": {"optimizer_args": "weight_decay=0.1"},
    "learning_rate": {"learning_rate": "1e-4"},
    "lr_scheduler": [{"lr_scheduler": name} for name in ("cosine", "rex", "constant_with_warmup")],
    "lr_scheduler_args": {"lr_scheduler_type": "StepLR", "lr_scheduler_args": "step_size=2"},
    "lr_warmup_steps": {"lr_scheduler": "linear", "lr_warmup_steps": "2"},
    "max_grad_norm": {"max_grad_norm": "0.01"},
    "network_dim": {"network_dim": "4"},
    "network_alpha": {"network_alpha": "2"},
    "network_module": {"network_module": "networks.loha"},
    "network_args": {"network_args": "exclude_patterns=['.*ffn.*']"},
    "network_dropout": {"network_dropout": "0.1"},
    "scale_weight_norms": {"scale_weight_norms": "0.1"},
    "base_weights": {"base_weights": "output/run.safetensors"},
    "timestep_sampling": [{"timestep_sampling": name} for name in ("sigmoid", "shift", "uniform")],
    "discrete_flow_shift": {"discrete_flow_shift": "3"},
    "weighting_scheme": {"weighting_scheme": "sigma_sqrt"},
    "min_timestep": {"min_timestep": "500"},
    "num_timestep_buckets": {"num_timestep_buckets": "4"},
    "one_frame_loss": {"one_frame_loss": "target"},
    "one_frame_legacy_indices": {"one_frame_legacy_indices": ""},
    "one_frame_target_range": {"one_frame_target_range": "1-4"},
    "fp8_base": {"fp8_base": ""},
}
CHOICES = [("", choice) for choice in FREE] + [
    (name, choice) for name, found in HEARD.items() for choice in (found if isinstance(found, list) else [found])
]


@pytest.fixture(scope="module")
def forks(new_project):
    """In a folder with the end of a run, and its state inside the first epoch."""
    with new_project("astronaut", "brick", "cat", "coffee", "coins"), Forks() as forks:
        dataset_toml("data", cache="cache", size=(32, 32), batch_size=1)
        dataset_toml("batch2", cache="cache", size=(32, 32), batch_size=2)
        cache("data.toml")
        dataset_toml("twice", keys="num_repeats = 2", cache="cache", size=(32, 32), batch_size=1)
        Path("a.txt").write_text(
            "a cat --ci data/start/cat.png --of control_index=0,target_index=1 --w 32 --h 32 --s 1 --d 7"
        )
        outcome = run(forks, "first", {"save_every_n_steps": str(AT), "save_state": ""})
        assert outcome.code == 0, outcome.output
        yield forks


def run(forks: Forks, name: str, *settings: dict[str, str]) -> Outcome:
    flags = {key: value for found in (_TRAINING, *settings) for key, value in found.items()}
    words = [word for key, value in flags.items() for word in (f"--{key}", value) if word]
    models = (*model_flags("i2v"), *ENCODERS, "--dit_dtype", "float32", "--device", "cpu")
    if "mixed_precision" in flags:
        models = tuple(word for word in models if word not in ("--dit_dtype", "float32"))
    return forks.run(Job(os.getcwd(), "wan_train_network", (*models, *words), name=name))  # noqa: PTH109


def drawn() -> list[tuple[tuple[str, dict[str, str]], ...]]:
    """Each choice alone, and pairs of choices about different settings, always the same."""
    pairs = [(one, other) for one, other in combinations(CHOICES, 2) if not one[1].keys() & other[1].keys()]
    random.Random(8).shuffle(pairs)
    return [*((choice,) for choice in CHOICES), *pairs[:PAIRS]]


def wrong(forks: Forks, number: int, choices: tuple[tuple[str, dict[str, str]], ...]) -> str | None:
    """What is wrong with the run that goes on with these choices."""
    changes = [choice for _, choice in choices]
    folder, name = (
        f"resumed{number}",
        next((found["output_name"] for found in changes if "output_name" in found), "run"),
    )
    outcome = run(forks, folder, {"resume": f"output/run-step{AT:08d}-state"}, *changes, {"output_dir": folder})
    heard = {name for name, _ in choices if name}
    said = set(re.findall(r"resuming with (\w+) =", outcome.output))
    reason = None
    if "Traceback" in outcome.output or outcome.code not in (0, 1):
        reason = "broke"
    elif outcome.code == 1 and (len(outcome.errors) != 1 or not heard):
        reason = "refused"
    elif outcome.code == 0 and not heard <= said:
        reason = f"did not say {heard - said}"
    elif outcome.code == 0 and not heard:
        found, wanted = load_file(f"{folder}/{name}.safetensors"), load_file("output/run.safetensors")
        if found.keys() != wanted.keys() or any(not found[key].equal(wanted[key]) for key in wanted):
            reason = "is another training"
    shutil.rmtree(folder, ignore_errors=True)
    return reason and f"{choices} {reason}, {outcome.code}: {outcome.output[-1500:]}"


def test_a_run_resumed_with_one_or_two_other_settings_is_the_same_or_says_what_differs_or_refuses(forks):
    sets = drawn()
    with ThreadPoolExecutor(2) as pool:
        found = [text for text in pool.map(lambda one: wrong(forks, *one), enumerate(sets)) if text]
    if found:
        pytest.fail("\n".join([f"{len(found)} of {len(sets)}", *found]), pytrace=False)
