"""Optimizers and schedules by name: what they compute, and that they are tried before anything loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_train_network
from tests.project import I2V, from_lines, train
from utils.errors import ConfigError
from wan.training.optimizers import OptimizerConfig, build_optimizer, build_scheduler
from wan.training.state import load_state


class ScheduleFreeSGD(torch.optim.Optimizer):
    """SGD as in arXiv 2405.15682, with the methods and the behaviour of the package schedulefree.

    z takes the steps, x is the mean of all z, and the gradient is of y = 0.9 x + 0.1 z, which `train` puts into the
    parameters. `eval` puts x there.
    """

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "steps": 0, "train_mode": False})

    @torch.no_grad()
    def _blend(self, train_mode, weight):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = train_mode

    def train(self):
        self._blend(True, 1 - 0.9)

    def eval(self):
        self._blend(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure=None):
        assert all(group["train_mode"] for group in self.param_groups), "not in train mode"
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                x = (parameter - 0.1 * z) / 0.9
                z -= group["lr"] * parameter.grad
                x.lerp_(z, 1 / group["steps"])
                parameter.copy_(0.9 * x + 0.1 * z)


class Estimating(torch.optim.SGD):
    """SGD whose groups have an estimate `d` as those of Prodigy and D-Adaptation, here the number of steps."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["d"] = 0.0

    def step(self, closure=None):
        for group in self.param_groups:
            group["d"] += 1.0
        super().step(closure)


SCHEDULE_FREE = ("--optimizer_type", f"{__name__}.ScheduleFreeSGD", "--learning_rate", "1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer_type": "SparseAdam"}, "--optimizer_type SparseAdam .*: cannot take a step"),
        ({"optimizer_type": ".AdamW"}, "--optimizer_type .AdamW: can't be imported .*; use AdamW"),
        ({"optimizer_type": "LBFGS"}, "--optimizer_type LBFGS .*: cannot take a step .*closure"),
        ({"optimizer_args": ("betas=(0.9,)",)}, "--optimizer_args: AdamW: tuple index"),
        ({"optimizer_args": ("capturable=True",)}, "--optimizer_args capturable=True .*: cannot take a step"),
        ({"optimizer_args": ("differentiable=True",)}, "--optimizer_args differentiable=True .*: cannot take a step"),
        ({"learning_rate": 1e38}, r"--learning_rate 1e\+38: cannot take a step"),
        ({"optimizer_type": "SGD", "learning_rate": 1e39}, r"--learning_rate 1e\+39: cannot take a step"),
    ],
)
def test_an_optimizer_that_can_take_no_step_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**settings).check(on_cpu=True)


def test_what_works_on_a_gpu_alone_is_not_refused_for_one():
    OptimizerConfig(optimizer_args=("capturable=True",)).check(on_cpu=False)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD", "RAdam", "NAdam", "Adagrad", "RMSprop", "Adamax"])
def test_usual_optimizers_take_a_step(name):
    OptimizerConfig(optimizer_type=name, learning_rate=1e-3).check(on_cpu=True)


def test_a_schedule_free_run_saves_and_samples_averages_and_trains_on_unharmed(workspace):
    Path("prompts.txt").write_text(I2V)
    seen = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "1", "--save_every_n_steps", "2")
    checked = ("--validation_split", "1", "--validate_every_n_steps", "1")
    run = (*SCHEDULE_FREE, "--max_train_steps", "4", "--save_state", *checked)
    plain, watched = train("i2v", "pairs.toml", "plain", *run), train("i2v", "pairs.toml", "watched", *run, *seen)
    averages = load_file(watched)
    assert all(torch.equal(tensor, averages[name]) for name, tensor in load_file(plain).items())

    state = load_state(Path("output/watched-state"))
    stepped = [float(values["z"].norm()) for values in state.optimizer["optimizer"]["state"].values()]
    names = [name for name in averages if not name.endswith("alpha")]
    expected = [float(((state.weights[name] - 0.9 * averages[name]) / 0.1).norm()) for name in names]
    assert sorted(stepped) == pytest.approx(sorted(expected), rel=1e-4)
    assert state.optimizer["optimizer"]["param_groups"][0]["train_mode"] is True

    sample = next(Path("output/sample").glob("watched_000004_*")).read_bytes()
    assert from_lines("i2v", "out", I2V, flags=("--lora_weight", str(watched))) == [sample]

    resumed = train("i2v", "pairs.toml", "again", *run, "--resume", "output/watched-step00000002-state")
    assert all(torch.equal(tensor, averages[name]) for name, tensor in load_file(resumed).items())


def test_the_rates_that_an_optimizer_estimates_are_logged(workspace):
    train("i2v", "pairs.toml", "d", "--optimizer_type", f"{__name__}.Estimating", "--learning_rate", "0.5")
    lines = [json.loads(line) for line in Path("output/d-metrics.jsonl").read_text().splitlines()]
    assert [line["lr/d*lr/unet"] for line in lines] == [0.5, 1.0]


def rates(steps, **settings):
    config = OptimizerConfig(optimizer_type="SGD", learning_rate=1.0, **settings)
    optimizer = build_optimizer(config, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    scheduler, found = build_scheduler(config, optimizer, steps), []
    for _ in range(steps):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


def test_rex_follows_its_formula_with_other_parameters_too():
    found = rates(6, lr_scheduler="rex", lr_warmup_steps="2", lr_scheduler_args=("rex_alpha=0.5", "rex_beta=0.5"))
    left = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    expected = [0.01, 0.505, *(0.01 + 0.99 * left / (0.5 + 0.5 * left)).tolist()]
    assert found == pytest.approx(expected)


def test_piecewise_constant_changes_at_the_steps_of_its_rules():
    found = rates(6, lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1:2,0.1:4,0.01",))
    assert found == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_a_schedule_of_torch_takes_the_place_of_the_named_ones():
    settings = {"lr_scheduler": "linear", "lr_scheduler_type": "StepLR"}
    found = rates(5, **settings, lr_scheduler_args=("step_size=2", "gamma=0.5"))
    assert found == [1, 1, 0.5, 0.5, 0.25]


def test_arguments_reach_the_schedules_of_transformers():
    usual, other = (rates(9, lr_scheduler="polynomial", lr_scheduler_args=given) for given in ((), ("lr_end=0.5",)))
    assert other[-1] > 0.5 > usual[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lr_scheduler": "rex", "lr_scheduler_args": ("alpha=1",)},
            "alpha: is not an argument of rex; it takes",
        ),
        ({"lr_scheduler_args": ("x=1",)}, "x: is not an argument of constant; it takes none"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules '' must be"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:x,2",)}, "step_rules '1:x,2' must"),
        ({"lr_scheduler_type": "StepLr"}, "there is no torch.optim.lr_scheduler.StepLr; did you mean 'StepLR'"),
        ({"lr_scheduler_type": "nowhere.StepLR"}, "needs the package 'nowhere'"),
        ({"lr_scheduler_type": "Counter"}, "is no schedule of steps"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "is no schedule of steps"),
        ({"lr_scheduler_type": "StepLR"}, "step_size.*; it takes step_size, gamma"),
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=10")},
            "OneCycleLR: does not work for 50 steps .*total",
        ),
        ({"lr_scheduler_type": ".StepLR"}, "StepLR: can't be imported .*; use e.g. CosineAnnealingLR"),
        ({"lr_scheduler": "adafactor"}, "--lr_scheduler adafactor: .*; add --optimizer_type Adafactor"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ("rex_alpha=x",)}, "rex_alpha=x: is not a number; try .*0.1"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ("rex_alpha=0",)}, "rex_alpha=0: does not work at step 50 of 50"),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_power": -1.0},
            "--lr_scheduler polynomial: does not work at step 50 of 50 .*; change its arguments",
        ),
        (
            {"lr_scheduler": "inverse_sqrt", "lr_scheduler_args": ("timescale=-2",)},
            "timescale=-2: does not work at step 2 of 50",
        ),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:9,-1",)},
            "does not work at step 9 of 50 .the rate is -2e-06.; change its arguments",
        ),
    ],
)
def test_a_schedule_that_does_not_last_is_refused_before_anything_loads(settings, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**settings).check_schedule(50)


@pytest.mark.parametrize("settings", [{"lr_scheduler_timescale": 0}, {"lr_scheduler_min_lr_ratio": -3.0}])
def test_settings_of_schedules_have_bounds(settings):
    with pytest.raises(ConfigError, match=f"--{next(iter(settings))} .*: must be"):
        OptimizerConfig(**settings)


def test_the_lowest_rate_may_be_given_as_a_rate_too():
    given = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ("min_lr=0.25",)}
    OptimizerConfig(**given, learning_rate=1.0).check_schedule(50)
    assert rates(9, **given)[8:] == pytest.approx(
        rates(9, lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.25)[8:]
    )


def test_a_constant_schedule_with_a_warmup_warms_up_and_says_so(caplog):
    caplog.set_level("INFO")
    config = OptimizerConfig(lr_warmup_steps="4")
    config.check_schedule(50)
    assert config.schedule == "constant_with_warmup" and "constant_with_warmup" in caplog.text
    assert rates(6, lr_warmup_steps="4") == [0, 0.25, 0.5, 0.75, 1, 1]
    assert OptimizerConfig(lr_warmup_steps="0").schedule == "constant"


def test_names_of_schedules_may_be_in_capitals():
    arguments = ["--dataset_config", "x", "--output_dir", "x", "--output_name", "x", "--lr_scheduler", "REX"]
    assert wan_train_network.build_parser().parse_args(arguments).lr_scheduler == "rex"
