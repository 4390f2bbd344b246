"""Every option that a script shows does something: it is set, and what a run makes or builds is compared."""

import ast
import importlib
import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from demo.tiny_models import FILES, write_models
from tests.option_runs import SCRIPTS, run, words
from tests.project import dataset_toml
from tests.test_options import visible
from utils import cli
from utils.errors import ConfigError
from wan.training.optimizers import OptimizerConfig, build_optimizer, build_scheduler
from wan.training.timestep_plot import draw_levels
from wan.training.timesteps import NoiseConfig

# --- A case: what is given beside the base arguments, then the option's value, and where to look (keys of `run`).

PROMPT = "a {} --ci data/start/cat.png --of control_index=0,target_index=1 --w 48 --h 32 --s 3 --d 7"
SAMPLES = "--sample_prompts a.txt --sample_at_first"
EPOCHS = "--gradient_accumulation_steps 2 --max_train_epochs 3 --save_every_n_epochs 1"
STEPS = "--max_train_steps 3 --save_every_n_steps 1"
WANDB = "--log_with wandb"
CASES = {
    "wan_cache_latents": {
        "dataset_config": ("", "other.toml", "files"),
        "batch_size": ("", "1", "built"),
        "num_workers": ("", "61", "built"),
        "skip_existing": ("", "", "built"),
        "keep_cache": ("", "", "files"),
        "disable_cudnn_backend": ("", "", "switches"),
        "vae": ("", "more/vae", "weights"),
        "vae_dtype": ("", "bf16", "weights"),
        "clip": ("", "more/clip", "weights"),
        "clip_dtype": ("", "bf16", "weights"),
        "one_frame_layout": ("", "causal", "weights"),
        "alpha": ("--dataset_config clear.toml", "ignore", "weights"),
        "explain": ("", "", "printed"),
        "device": ("", "quantum", "outcome"),
    },
    "wan_cache_text_encoder_outputs": {
        "dataset_config": ("", "other.toml", "files"),
        "batch_size": ("", "1", "built"),
        "num_workers": ("--skip_existing", "61", "built"),
        "fp8_t5": ("", "", "weights"),
        "skip_existing": ("", "", "built"),
        "keep_cache": ("", "", "files"),
        "t5": ("", "more/t5", "weights"),
        "t5_dtype": ("", "bf16", "weights"),
        "t5_tokenizer": ("", "more/tokenizer", "weights"),
        "explain": ("", "", "printed"),
        "device": ("", "quantum", "outcome"),
    },
    "wan_train_network": {
        "config_file": ("", "more.toml", "weights"),
        "task": ("", "flf2v-14B", "outcome"),
        "dit": ("", "more/i2v", "weights"),
        "dit_dtype": ("", "bf16", "weights"),
        "vae": (SAMPLES, "more/vae", "pictures"),
        "vae_dtype": (SAMPLES, "bf16", "pictures"),
        "t5": (SAMPLES, "more/t5", "pictures"),
        "t5_dtype": (SAMPLES, "bf16", "pictures"),
        "t5_tokenizer": (SAMPLES, "more/tokenizer", "pictures"),
        "clip": (SAMPLES, "more/clip", "pictures"),
        "clip_dtype": (SAMPLES, "bf16", "pictures"),
        "device": ("", "meta", "outcome"),
        "dataset_config": ("", "far.toml", "weights"),
        "max_train_steps": ("", "1", "weights"),
        "max_train_epochs": ("", "2", "weights"),
        "seed": ("", "6", "weights"),
        "mixed_precision": ("", "bf16", "weights"),
        "gradient_accumulation_steps": ("", "2", "weights"),
        "max_data_loader_n_workers": ("", "1", "built"),
        "persistent_data_loader_workers": ("--max_data_loader_n_workers 1", "", "built"),
        "one_frame_legacy_indices": ("--dataset_config far.toml", "", "weights"),
        "one_frame_loss": ("", "target", "weights"),
        "one_frame_target_range": ("", "3-9", "weights"),
        "one_frame_layout": ("", "causal", "outcome"),
        "alpha": ("--sample_prompts clear.txt --sample_at_first", "ignore", "pictures"),
        "stop_after_skipped_steps": ("--learning_rate 1e30 --max_train_steps 4", "2", "outcome"),
        "network_module": ("", "networks.loha", "weights" if find_spec("lycoris") else "outcome"),
        "network_dim": ("", "3", "weights"),
        "network_alpha": ("", "2", "weights"),
        "network_dropout": ("", "0.5", "weights"),
        "network_args": ("", "loraplus_lr_ratio=16", "weights"),
        "network_weights": ("", "first/run.safetensors", "weights"),
        "dim_from_weights": ("--network_dim 3 --network_weights first/run.safetensors", "", "outcome"),
        "scale_weight_norms": ("", "0.001", "weights"),
        "base_weights": ("", "first/run.safetensors", "weights"),
        "base_weights_multiplier": ("--base_weights first/run.safetensors", "0.5", "weights"),
        "optimizer_type": ("", "SGD", "weights"),
        "optimizer_args": ("", "weight_decay=0.5", "weights"),
        "learning_rate": ("", "1e-3", "weights"),
        "max_grad_norm": ("--optimizer_type SGD", "1e-6", "weights"),
        "lr_scheduler": ("", "cosine", "rates"),
        "lr_scheduler_type": ("", "StepLR --lr_scheduler_args step_size=3", "rates"),
        "lr_scheduler_args": ("--lr_scheduler rex", "rex_alpha=0.5", "rates"),
        "lr_warmup_steps": ("--lr_scheduler constant_with_warmup", "4", "rates"),
        "lr_decay_steps": ("--lr_scheduler warmup_stable_decay", "4", "rates"),
        "lr_scheduler_num_cycles": ("--lr_scheduler cosine_with_restarts", "2", "rates"),
        "lr_scheduler_power": ("--lr_scheduler polynomial", "2", "rates"),
        "lr_scheduler_timescale": ("--lr_scheduler inverse_sqrt", "3", "rates"),
        "lr_scheduler_min_lr_ratio": ("--lr_scheduler cosine_with_min_lr", "0.5", "rates"),
        "timestep_sampling": ("", "sigmoid", "levels"),
        "discrete_flow_shift": ("--timestep_sampling shift", "3", "levels"),
        "sigmoid_scale": ("--timestep_sampling sigmoid", "2", "levels"),
        "weighting_scheme": ("", "sigma_sqrt", "weights"),
        "logit_mean": ("--weighting_scheme logit_normal", "1", "levels"),
        "logit_std": ("--weighting_scheme logit_normal", "2", "levels"),
        "mode_scale": ("--weighting_scheme mode", "0.5", "levels"),
        "min_timestep": ("", "500", "levels"),
        "max_timestep": ("", "500", "levels"),
        "preserve_distribution_shape": ("--max_timestep 500", "", "levels"),
        "num_timestep_buckets": ("", "4", "weights"),
        "fp8_base": ("", "", "weights"),
        "fp8_scaled": ("--fp8_base", "", "weights"),
        "blocks_to_swap": ("", "1", "built"),
        "use_pinned_memory_for_block_swap": ("--blocks_to_swap 1", "", "built"),
        "compile": ("", "", "built"),
        "compile_backend": ("--compile", "eager", "built"),
        "compile_mode": ("--compile", "max-autotune-no-cudagraphs", "built"),
        "compile_dynamic": ("--compile", "true", "built"),
        "compile_fullgraph": ("--compile", "", "built"),
        "compile_cache_size_limit": ("--compile", "61", "switches"),
        "dit_backend": ("", "fused", "outcome"),
        "cuda_allow_tf32": ("", "", "switches"),
        "cuda_cudnn_benchmark": ("", "", "switches"),
        "gradient_checkpointing": ("", "auto", "built"),
        "gradient_checkpointing_cpu_offload": ("--gradient_checkpointing", "", "built"),
        "output_dir": ("", "output_2", "files"),
        "output_name": ("", "other", "files"),
        "save_every_n_epochs": ("--max_train_epochs 2", "1", "files"),
        "save_every_n_steps": ("", "1", "files"),
        "save_precision": ("", "bf16", "weights"),
        "save_last_n_epochs": (EPOCHS, "1", "files"),
        "save_last_n_steps": (STEPS, "0", "files"),
        "save_state": (STEPS, "", "files"),
        "save_state_on_train_end": (STEPS, "", "files"),
        "save_last_n_epochs_state": (f"{EPOCHS} --save_state", "1", "files"),
        "save_last_n_steps_state": (f"{STEPS} --save_state", "0", "files"),
        "resume": ("", "first/run-step00000001-state", "metrics"),
        "sample_prompts": (SAMPLES, "b.txt", "pictures"),
        "sample_at_first": ("--sample_prompts a.txt", "", "files"),
        "sample_every_n_epochs": ("--sample_prompts a.txt", "1", "files"),
        "sample_every_n_steps": ("--sample_prompts a.txt", "2", "files"),
        "sample_solver": (SAMPLES, "vanilla", "pictures"),
        "exact_size": (SAMPLES, "", "pictures"),
        "pin_controls": (SAMPLES, "", "pictures"),
        "control_resolution": (SAMPLES, "64", "pictures"),
        "no_resize_control": (SAMPLES, "", "pictures"),
        "reasoning_frames": ("--sample_prompts far.txt --sample_at_first", "2", "pictures"),
        "reasoning_steps": ("--sample_prompts far.txt --sample_at_first --reasoning_frames 2", "2", "pictures"),
        "validation_split": ("--validate_every_n_steps 1", "1", "outcome"),
        "validate_every_n_steps": ("--validation_split 1 --validate_every_n_epochs 9", "1", "metrics"),
        "validate_every_n_epochs": ("--validation_split 1 --validate_every_n_steps 9", "1", "metrics"),
        "validation_levels": ("--validation_split 1 --validate_every_n_steps 1", "2", "metrics"),
        "logging_dir": ("", "output_logs", "files"),
        "log_with": ("", "wandb", "files"),
        "log_prefix": ("--logging_dir output_logs", "x-", "files"),
        "log_tracker_name": ("--logging_dir output_logs", "cats", "files"),
        "log_tracker_config": (WANDB, "wandb.toml", "told"),
        "wandb_run_name": (WANDB, "cats", "told"),
        "wandb_api_key": (WANDB, "12345", "told"),
        "log_config": (WANDB, "", "told"),
        "training_comment": ("", "cats", "metadata"),
        "no_metadata": ("", "", "metadata"),
        "metadata_title": ("", "cats", "metadata"),
        "metadata_author": ("", "me", "metadata"),
        "metadata_description": ("", "cats", "metadata"),
        "metadata_license": ("", "MIT", "metadata"),
        "metadata_tags": ("", "cat,dog", "metadata"),
        "metadata_reso": ("", "512,512", "metadata"),
        "metadata_arch": ("", "wan2.1-i2v", "metadata"),
        "show_timesteps": ("", "console", "printed"),
        "explain": ("", "", "printed"),
    },
}
RELEASE = "fills in paths that are left out; tests/files/test_names.py and test_end_to_end.py have it"
BACKEND = "there is one way only without a GPU; tests/fused/test_dit.py tells it that there is one"
EXCUSED = {  # options without a case, and why
    "wan_cache_latents": {
        "one_frame": "has to be given; a test of its own below",
        "ckpt_dir": RELEASE,
        "vae_backend": BACKEND,
    },
    "wan_cache_text_encoder_outputs": {"ckpt_dir": RELEASE},
    "wan_train_network": {
        "ckpt_dir": RELEASE,
        "sdpa": "names the only attention there is, as commands for musubi-tuner do",
        "one_frame": "names the only mode there is, as commands for musubi-tuner do",
        "cpu_noise": "the noise of a run on the CPU is drawn there anyway",
        "fp8_t5": "reaches T5 as it does in text caching, where it has a case",
        "use_stale_caches": "takes caches that are out of date; tests/dataset/test_freshness.py makes some",
        "preview": "leaves nothing behind; tests/generation/test_preview.py watches it",
        "vae_backend": BACKEND,
        "memory": "chooses nothing where there is no GPU; tests/models/test_plan.py tells it how much is free",
        **dict.fromkeys(
            ("flash_attn", "flash3", "xformers"), "need packages for CUDA; tests/nets/test_attention.py has them"
        ),
    },
}


@pytest.mark.parametrize("script", CASES)
def test_every_option_has_a_case_or_a_reason(script):
    assert sorted([*CASES[script], *EXCUSED[script]]) == sorted(visible(script))


def test_latents_are_cached_for_one_frame_use_only():
    with pytest.raises(ConfigError, match="add --one_frame"):
        SCRIPTS["wan_cache_latents"].main(["--dataset_config", "data.toml"])


WANDB_PACKAGE = """
from pathlib import Path

def tell(*words):
    with Path("output_wandb.txt").open("a") as file:
        print(*words, file=file)

class Run:
    def log(self, values, step): tell(step, values)
    def finish(self): tell("finish")

def login(**keywords): tell("login", keywords)

def init(**keywords):
    tell("init", keywords)
    return Run()
"""


class SummaryWriter:
    """TensorBoard's, as far as it is used: its folder."""

    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        Path(log_dir, "events").touch()

    def __getattr__(self, name):
        return lambda *_: None


@pytest.fixture(scope="module")
def runs(new_project):
    """The folder that runs start in, and what runs there have shown so far.

    In it: two sets of models, caches of two items, a trained LoRA with its states, and stand-ins for the packages of
    the logs.
    """
    with new_project("cat", "coffee") as folder:
        write_models(Path("more"), 1)
        for models in ("models", "more"):
            dit = Path(models, FILES["i2v"])
            save_file({name: tensor.float() for name, tensor in load_file(dit).items()}, dit)
        tokenizer = Path("more/tokenizer/tokenizer.json")
        tokenizer.write_text(tokenizer.read_text().replace('"a"', '"?"').replace('"c"', '"a"').replace('"?"', '"c"'))
        shutil.copytree("data/start", "data/clear")
        for path in Path("data/clear").iterdir():
            clear = Image.open(path)
            clear.putalpha(Image.linear_gradient("L").resize(clear.size))
            clear.save(path)
        for name, size, cache, target in (
            *(("data", 1, "cache", 1), ("far", 1, "cache", 7), ("clear", 2, "output_cache", 1)),
            *(("fill", 2, "output_cache", 1), ("other", 2, "output_other", 1)),
        ):
            keys = f"fp_1f_clean_indices = [0]\nfp_1f_target_index = {target}"
            controls = "clear" if name == "clear" else "start"
            dataset_toml(name, "target", controls, keys, cache=cache, size=(32, 32), batch_size=size)
        Path("clear.txt").write_text(PROMPT.format("cat").replace("start", "clear"))
        Path("more.toml").write_text("network_alpha = 4")
        Path("wandb.toml").write_text('[wandb]\ntags = ["cats"]')
        Path("a.txt").write_text(PROMPT.format("cat"))
        Path("b.txt").write_text(PROMPT.format("dog"))
        Path("far.txt").write_text(PROMPT.format("cat").replace("target_index=1", "target_index=7"))
        for name, code in {"wandb": WANDB_PACKAGE, "tensorboard": ""}.items():
            Path("site", name).mkdir(parents=True)
            Path("site", name, "__init__.py").write_text(code)
        for script in ("wan_cache_latents", "wan_cache_text_encoder_outputs"):
            SCRIPTS[script].main(words(script, "--dataset_config data.toml"))
        first = "--output_dir first --save_state --save_every_n_steps 1"
        SCRIPTS["wan_train_network"].main(words("wan_train_network", first))
    return folder, {}


@pytest.fixture
def seen(runs, monkeypatch):
    """(script, arguments) -> what a run with them shows, each run once."""
    folder, known = runs
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder / "site")
    tensorboard = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    for package in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, package, raising=False)
        importlib.import_module(package)

    def look(script: str, arguments: str) -> dict[str, object]:
        if (script, arguments) not in known:
            known[script, arguments] = run(script, arguments)
        return known[script, arguments]

    yield look
    for package in ("wandb", "tensorboard"):
        sys.modules.pop(package, None)


def rates(arguments: str) -> list[float]:
    """The learning rates of 20 steps."""
    config = cli.build(OptimizerConfig, parsed(arguments))
    optimizer = build_optimizer(config, [{"params": [torch.zeros(1, requires_grad=True)]}])
    scheduler = build_scheduler(config, optimizer, 20)
    found = []
    for _ in range(20):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


def levels(arguments: str) -> list[float]:
    """1000 noise levels."""
    return draw_levels(cli.build(NoiseConfig, parsed(arguments)), (4, 4), 1000).tolist()


def parsed(arguments: str):
    script = "wan_train_network"
    return SCRIPTS[script].build_parser().parse_args(words(script, arguments))


COMPUTED = {"rates": rates, "levels": levels}  # these need no run


@pytest.mark.parametrize(("script", "option"), [(script, option) for script in CASES for option in CASES[script]])
def test_an_option_has_an_effect(seen, script, option):
    given, value, place = CASES[script][option]
    changed = f"{given} --{option} {value}"
    if place in COMPUTED:
        assert COMPUTED[place](changed) != COMPUTED[place](given)
        return
    before, after = seen(script, given), seen(script, changed)
    if place != "outcome":
        assert (before["outcome"], after["outcome"]) == ("done", "done")
    assert before[place] != after[place]


@pytest.mark.parametrize("script", CASES)
def test_the_same_options_show_the_same(seen, script):
    """Otherwise any option would seem to have an effect."""
    more = f"{SAMPLES} {STEPS} {WANDB} --log_config --save_state --validation_split 1 --validate_every_n_steps 1"
    arguments = more if script == "wan_train_network" else ""
    assert run(script, arguments) == run(script, arguments)


def test_the_settings_that_logs_get_are_the_options_of_the_run(seen):
    told = seen("wan_train_network", f"{WANDB} --log_config")["told"][0]
    settings = ast.literal_eval(told.partition("\n")[0].removeprefix("init "))["config"]
    assert {"learning_rate", "network_dim", "dit"} < set(settings) <= set(visible("wan_train_network"))
