"""Optimizers and learning-rate schedules by name (docs/formats.md#optimizers-and-schedules)."""

import ast
import importlib
import inspect
import io
import logging
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from utils.errors import ConfigError, suggest
from utils.options import Section, option
from utils.text import one_line

log = logging.getLogger(__name__)

_REX = {"rex_alpha": 0.1, "rex_beta": 0.9}  # the parameters of REX, with its authors' values
_TRIED_STEPS = 100_000  # of longer runs, steps at even distances are tried
_GIVEN_TO_SCHEDULES = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # not by the user
_SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
    "rex",
)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """optimizer and learning rate"""

    optimizer_type: str = option("AdamW", help="AdamW, AdamW8bit, Adafactor, a torch.optim class or a dotted path")
    optimizer_args: tuple[str, ...] = option((), help="key=value for the optimizer, e.g. weight_decay=0.01")
    learning_rate: float = option(2e-6, above=0, rule="must be above 0; try 1e-4", help="learning rate")
    max_grad_norm: float = option(
        1.0, minimum=0, rule="must be 0 (off) or above", help="clip the gradient norm to this; 0 does not clip"
    )
    lr_scheduler: str = option("constant", help="learning-rate schedule", choices=_SCHEDULES, type=str.lower)
    lr_scheduler_type: str = option(
        "", help="class to use instead of --lr_scheduler: of torch.optim.lr_scheduler or a dotted path"
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), help='key=value for the schedule, e.g. rex_alpha=0.1, "step_rules=1:100,0.1:200,0.01", T_max=1000'
    )
    lr_warmup_steps: str = option("0", help="steps; below 1 or with % a share of all steps")
    lr_decay_steps: str = option("0", help="like --lr_warmup_steps, for warmup_stable_decay")
    lr_scheduler_num_cycles: int = option(1, help="restarts of cosine_with_restarts")
    lr_scheduler_power: float = option(1.0, help="power of polynomial")
    lr_scheduler_timescale: int | None = option(None, minimum=1, help="timescale of inverse_sqrt; default: the warmup")
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="lowest rate as a share of the highest (cosine_with_min_lr, warmup_stable_decay, rex)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _steps_of(self.lr_warmup_steps, "--lr_warmup_steps", 1000)
        _steps_of(self.lr_decay_steps, "--lr_decay_steps", 1000)

    @property
    def schedule(self) -> str:
        """Name of the schedule. A constant one with a warmup is `constant_with_warmup`."""
        if self._warms_up_to_constant:
            return "constant_with_warmup"
        return self.lr_scheduler_type or self.lr_scheduler

    @property
    def _warms_up_to_constant(self) -> bool:
        any_warmup = float(self.lr_warmup_steps.removesuffix("%")) > 0
        return not self.lr_scheduler_type and self.lr_scheduler == "constant" and any_warmup

    def check_schedule(self, total_steps: int) -> None:
        """Raise ConfigError unless the schedule takes its arguments, and lasts for `total_steps` optimizer steps."""
        optimizer = build_optimizer(self, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
        schedule = build_scheduler(self, optimizer, total_steps)
        if self._warms_up_to_constant:
            log.info(
                "--lr_scheduler constant with --lr_warmup_steps %s: runs constant_with_warmup", self.lr_warmup_steps
            )
        if self.lr_scheduler_type and not is_schedule_free(optimizer):
            _try_schedule(self.lr_scheduler_type, schedule, total_steps)
        elif isinstance(schedule, LambdaLR):
            _try_factors(self, schedule, total_steps)
        if is_schedule_free(optimizer) and self.schedule != "constant":
            log.warning(
                "%s has no schedule: --lr_scheduler %s has no effect; for a warmup use --optimizer_args warmup_steps=N",
                self.optimizer_type,
                self.schedule,
            )

    def check(self, on_cpu: bool) -> None:
        """Raise ConfigError unless the optimizer is there, takes its arguments, and can take a step with them.

        Cheap: for before anything loads. The step is a small one on the CPU, which optimizers of torch and transformers
        take anywhere; those of other packages may need their GPU, and are asked only where training runs `on_cpu`.
        """
        known = optimizer_class(self.optimizer_type).__module__.partition(".")[0] in ("torch", "transformers")
        weight = torch.nn.Parameter(torch.zeros(2, 2))
        trial = self
        if not on_cpu:  # capturable works nowhere else
            given = tuple(text for text in self.optimizer_args if text.partition("=")[0] != "capturable")
            trial = replace(self, optimizer_args=given)
        build_optimizer(self, [{"params": [weight]}])
        if known or on_cpu:
            _try_step(trial, weight)


def parse_arguments(arguments: tuple[str, ...], flag: str) -> dict[str, Any]:
    """`("betas=0.9,0.99", "name=x")` -> {"betas": (0.9, 0.99), "name": "x"}: Python literals, or else text."""
    values = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} {argument}: must be key=value")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that `--optimizer_type` names. ConfigError when it, or the package it needs, is not there."""
    short = name.lower()
    if short in ("", "adamw"):
        return torch.optim.AdamW
    if short == "adamw8bit":
        module, attribute = "bitsandbytes.optim", "AdamW8bit"
    elif short == "adafactor":
        module, attribute = "transformers.optimization", "Adafactor"
    else:
        module, _, attribute = f"torch.optim.{name}".rpartition(".") if "." not in name else name.rpartition(".")
    found = _class_named(f"--optimizer_type {name}", module, attribute, "use AdamW")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"--optimizer_type {name}: is not a torch optimizer; use AdamW")
    return found


def _class_named(flag: str, module: str, name: str, instead: str) -> Any:
    """`name` of `module`. ConfigError, starting with `flag` and its value, when it is not there."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{flag}: needs the package '{error.name}'; install it, or {instead}") from None
    except Exception as error:  # ".Name" has no module; packages for a GPU raise nearly anything without one
        raise ConfigError(f"{flag}: can't be imported ({one_line(error)}); {instead}") from None
    if not hasattr(found, name):
        raise ConfigError(f"{flag}: there is no {module}.{name}{suggest(name, dir(found)) or f'; {instead}'}")
    return getattr(found, name)


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over `groups` (torch's parameter groups). ConfigError for arguments it does not take."""
    kind = optimizer_class(config.optimizer_type)
    arguments = {"lr": config.learning_rate, **parse_arguments(config.optimizer_args, "--optimizer_args")}
    if kind.__name__ == "Adafactor" and arguments.get("relative_step", True):
        arguments |= {"lr": None, "relative_step": True}  # Adafactor finds its own rate unless told otherwise
    if kind is torch.optim.AdamW and not arguments.keys() & {"fused", "foreach", "differentiable"}:
        arguments["fused"] = all(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    try:
        return kind(groups, **arguments)
    except Exception as error:  # nearly any type: betas=(0.9,) is an IndexError
        known = ", ".join(inspect.signature(kind).parameters)
        raise ConfigError(f"--optimizer_args: {kind.__name__}: {error}; it takes {known}") from None


def remembered(config: OptimizerConfig) -> dict[str, Any] | None:
    """Tensors and numbers by name that the optimizer keeps of a weight of shape [2, 3] after a step.

    None for optimizers that are neither of torch nor of transformers: they may take no step on a CPU.
    """
    if optimizer_class(config.optimizer_type).__module__.partition(".")[0] not in ("torch", "transformers"):
        return None
    given = tuple(text for text in config.optimizer_args if text.partition("=")[0] != "capturable")
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    return dict(_try_step(replace(config, optimizer_args=given), weight).state[weight])


def _try_step(config: OptimizerConfig, weight: torch.nn.Parameter) -> Optimizer:
    """The optimizer after a step of `weight` with a gradient of ones. ConfigError unless that leaves it finite."""
    optimizer = build_optimizer(config, [{"params": [weight]}])
    weight.grad = torch.ones_like(weight)
    if callable(start := getattr(optimizer, "train", None)):
        start()  # schedule-free optimizers take no step without it
    try:
        optimizer.step()
        reason = "" if weight.isfinite().all() else "it makes the weights infinite"
    except Exception as error:  # each optimizer has its own way
        reason = one_line(error) or type(error).__name__
    if reason:
        arguments = f" --optimizer_args {' '.join(config.optimizer_args)}" if config.optimizer_args else ""
        raise ConfigError(
            f"--optimizer_type {config.optimizer_type}{arguments} --learning_rate {config.learning_rate:g}: cannot take"
            f" a step ({reason}); use AdamW and e.g. 1e-4"
        )
    return optimizer


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether it trains other weights than it gives, as schedulefree's do (arXiv 2405.15682).

    Such an optimizer has the methods `train`, which puts the trained weights into the parameters, and `eval`, which
    puts those there that are to be used. It needs no schedule.
    """
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def build_scheduler(config: OptimizerConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps. ConfigError for arguments that it does not take."""
    arguments = parse_arguments(config.lr_scheduler_args, "--lr_scheduler_args")
    if is_schedule_free(optimizer):
        return LambdaLR(optimizer, lambda step: 1.0)
    if config.lr_scheduler_type:
        return _schedule_of_class(config.lr_scheduler_type, optimizer, arguments)
    warmup = _steps_of(config.lr_warmup_steps, "--lr_warmup_steps", total_steps)
    name = "adafactor" if optimizer.defaults.get("relative_step") else config.schedule
    if name == "piecewise_constant":
        _check_arguments(name, arguments, ["step_rules"])
        return LambdaLR(optimizer, _piecewise(str(arguments.get("step_rules", ""))))
    if name == "rex":
        _check_arguments(name, arguments, _REX)
        low, shape = config.lr_scheduler_min_lr_ratio or 0.01, _REX | arguments
        for key, value in shape.items():
            if not (type(value) in (int, float) and math.isfinite(value)):
                raise ConfigError(f"--lr_scheduler_args {key}={value}: is not a number; try {key}={_REX[key]}")
        return LambdaLR(optimizer, lambda step: _rex(step, warmup, total_steps, low, *shape.values()))
    return _schedule_of_transformers(name, config, optimizer, warmup, total_steps, arguments)


def _schedule_of_transformers(
    name: str, config: OptimizerConfig, optimizer: Optimizer, warmup: int, total_steps: int, arguments: dict[str, Any]
) -> LRScheduler:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, Adafactor, get_adafactor_schedule, get_scheduler
    from transformers.trainer_utils import SchedulerType

    schedule: LRScheduler
    if name == "adafactor":
        _check_arguments(name, arguments, [])
        if not isinstance(optimizer, Adafactor):
            raise ConfigError("--lr_scheduler adafactor: is what Adafactor finds; add --optimizer_type Adafactor")
        schedule = get_adafactor_schedule(optimizer, config.learning_rate)
        return schedule
    specific: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": config.lr_scheduler_num_cycles},
        "polynomial": {"power": config.lr_scheduler_power},
        "inverse_sqrt": {"timescale": config.lr_scheduler_timescale},
        "cosine_with_min_lr": {
            "num_cycles": config.lr_scheduler_num_cycles / 2,
            "min_lr_rate": config.lr_scheduler_min_lr_ratio or 0.0,
        },
        "warmup_stable_decay": {
            "num_decay_steps": _steps_of(config.lr_decay_steps, "--lr_decay_steps", total_steps),
            "num_cycles": config.lr_scheduler_num_cycles / 2,
            "min_lr_ratio": config.lr_scheduler_min_lr_ratio or 0.0,
        },
    }
    functions: dict[Any, Any] = TYPE_TO_SCHEDULER_FUNCTION
    known = inspect.signature(functions[SchedulerType(name)]).parameters
    _check_arguments(name, arguments, [key for key in known if key not in _GIVEN_TO_SCHEDULES])
    try:
        more = specific.get(name, {}) | arguments
        if "min_lr" in arguments:  # a rate, in place of a share
            more.pop("min_lr_rate", None)
        schedule = get_scheduler(name, optimizer, warmup, total_steps, scheduler_specific_kwargs=more)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--lr_scheduler {name} --lr_scheduler_args: {one_line(error)}") from None
    return schedule


def _schedule_of_class(name: str, optimizer: Optimizer, arguments: dict[str, Any]) -> LRScheduler:
    """An LRScheduler of torch.optim.lr_scheduler, or of a dotted path."""
    module, _, attribute = name.rpartition(".") if "." in name else ("torch.optim.lr_scheduler", "", name)
    kind = _class_named(f"--lr_scheduler_type {name}", module, attribute, "use e.g. CosineAnnealingLR")
    if not (isinstance(kind, type) and issubclass(kind, LRScheduler)) or kind is ReduceLROnPlateau:
        raise ConfigError(f"--lr_scheduler_type {name}: is no schedule of steps; use e.g. CosineAnnealingLR")
    try:
        return kind(optimizer, **arguments)
    except Exception as error:  # nearly any type
        known = ", ".join(key for key in inspect.signature(kind).parameters if key not in _GIVEN_TO_SCHEDULES)
        raise ConfigError(
            f"--lr_scheduler_type {name} --lr_scheduler_args: {one_line(error)}; it takes {known}"
        ) from None


def _try_schedule(name: str, schedule: LRScheduler, total_steps: int) -> None:
    """Raise ConfigError unless `schedule` takes all steps, and a training state can hold it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedules that go on without an optimizer
            for _ in range(total_steps):
                schedule.step()
        state = io.BytesIO()
        torch.save(schedule.state_dict(), state)
        state.seek(0)
        torch.load(state, weights_only=True)
    except Exception as error:  # each has its own way
        raise ConfigError(
            f"--lr_scheduler_type {name}: does not work for {total_steps} steps ({one_line(error)}); see "
            "--lr_scheduler_args"
        ) from None


def _try_factors(config: OptimizerConfig, schedule: LambdaLR, total_steps: int) -> None:
    """Raise ConfigError unless the rate is a number, and not below 0, at all steps and after the last one."""
    last, factor = total_steps, schedule.lr_lambdas[0]
    stride = max(1, total_steps // _TRIED_STEPS)
    for step in (*range(0, total_steps, stride), last - 1, last):
        try:
            rate = config.learning_rate * factor(step)
            reason = "" if 0 <= rate < math.inf else f"the rate is {rate:g}"
        except Exception as error:  # arguments of nearly any type
            reason = one_line(error) or type(error).__name__
        if reason:
            given = " ".join(("--lr_scheduler_args", *config.lr_scheduler_args)) if config.lr_scheduler_args else ""
            raise ConfigError(
                f"--lr_scheduler {config.schedule} {given}".rstrip() + f": does not work at step {step} of {last}"
                f" ({reason}); change its arguments"
            )


def _check_arguments(name: str, arguments: Iterable[str], known: Collection[str]) -> None:
    for key in arguments:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"--lr_scheduler_args {key}: is not an argument of {name}; {takes}")


def _piecewise(rules: str) -> Callable[[int], float]:
    """`1:10,0.1:20,0.01` -> the factor of the rate: 1 before step 10, 0.1 before step 20, 0.01 from then on."""
    *parts, last = (part.split(":") for part in rules.split(","))
    try:
        pieces = sorted((int(end), float(factor)) for factor, end in parts)
        factors = [factor for _, factor in pieces] + [float(*last)]
        if not all(map(math.isfinite, factors)):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(
            f"--lr_scheduler piecewise_constant: step_rules '{rules}' must be factors with the steps where they end and"
            ' a last factor; try --lr_scheduler_args "step_rules=1:100,0.1:200,0.01"'
        ) from None
    ends = [end for end, _ in pieces]
    return lambda step: factors[bisect_right(ends, step)]


def _rex(step: int, warmup: int, total: int, low: float, alpha: float, beta: float) -> float:
    """REX (arXiv 2107.04197) with a linear warmup from `low`, as a factor of the rate."""
    if step < warmup:
        return low + (1 - low) * step / warmup
    left = max(0.0, 1 - (step - warmup) / max(1, total - warmup))
    return low + (1 - low) * left / (alpha + beta * left)


def _steps_of(text: str, flag: str, total: int) -> int:
    """`10`, `0.1` or `10%` of `total` steps -> steps."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not value >= 0 or not math.isfinite(value) or (value >= 1 and (value % 1 or text.endswith("%"))):
        raise ConfigError(f"{flag} {text}: must be whole steps, a share below 1 or a percentage")
    return int(value) if value >= 1 else int(value * total)
