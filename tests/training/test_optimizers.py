"""Optimizers are tried before anything loads."""

import pytest

from utils.errors import ConfigError
from wan.training.optimizers import OptimizerConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer_type": "SparseAdam"}, "--optimizer_type SparseAdam .*: cannot take a step"),
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
