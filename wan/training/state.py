"""Training states: folders from which a run goes on as if it had never stopped.

A state is written under a temporary name and renamed when complete, so a folder with the right name can be trusted.
All randomness of training has an address (seed, epoch, item), so there are no random states to keep.
"""

import inspect
import io
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.errors import ConfigError
from utils.files import make_accessible, make_folder, sync, temporary_prefix
from utils.parsing import parse_json
from utils.text import one_line, some

log = logging.getLogger(__name__)

_SUFFIXES = r"(-\d{6}|-step\d{8})?(-state)?"  # of all files and folders that a run writes beside its samples
_WEIGHTS, _OPTIMIZER, _PROGRESS = "model.safetensors", "optimizer.bin", "progress.json"
_RATES_OF_SCHEDULE, _COUNTS_OF_SCHEDULE = ("base_lrs", "_last_lr"), ("last_epoch", "_step_count")  # in all of torch
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of torch's GradScaler
_LARGEST_PROGRESS = 1 << 20  # bytes
_LARGEST_COUNT, _LARGEST_SEED, _LARGEST_NUMBER = 1 << 40, 1 << 64, 1e38
_SMALL = 1024  # elements of tensors that don't depend on the size of a weight, such as the levels of 8-bit optimizers
_LOSS_WINDOW = 100  # steps that the shown loss is averaged over

Facts = dict[str, Any]
"""Settings of a run by name, as JSON holds them: a resumed run compares its own with those of the state."""


@dataclass
class Progress:
    """Where a run stands, the same in all processes."""

    step: int = 0
    epoch: int = 0  # finished epochs
    items: int = 0  # seen in the epoch after those, over all processes
    skipped_steps: int = 0  # for a loss or gradient that was no number
    losses: tuple[float, ...] = ()  # the latest, for the shown average
    started: float = 0.0  # Unix time of the first start

    @property
    def average_loss(self) -> float:
        """Mean loss of the latest steps; NaN before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def add_step(self, items: int, loss: float | None) -> None:
        """Count a step that has used up `items` of the epoch; loss: None when the step updated nothing."""
        self.step += 1
        self.items += items
        if loss is None:
            self.skipped_steps += 1
        else:
            self.losses = (*self.losses[1 - _LOSS_WINDOW :], loss)

    def end_epoch(self, items: int) -> None:
        """Count the epoch as finished if all its `items` have been seen."""
        if self.items == items:
            self.epoch, self.items = self.epoch + 1, 0


@dataclass(frozen=True)
class State:
    """The contents of a state folder."""

    path: Path
    progress: Progress
    facts: Facts  # of the run that wrote it
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]  # state dicts: optimizer, scheduler, scaler


def save_state(state: State) -> None:
    """Write the folder, whole or not at all; one of that name is replaced. Raises OSError when it can't be written.

    The new state is on disk before the old one is deleted, so that a power cut costs none.
    """
    path = state.path
    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path)))
    replaced = temporary.with_name(temporary.name + "-old")
    try:
        # Through bytes, so that a full disk is an OSError, whichever library would have written.
        (temporary / _WEIGHTS).write_bytes(save({key: tensor.contiguous() for key, tensor in state.weights.items()}))
        buffer = io.BytesIO()
        torch.save(state.optimizer, buffer)
        (temporary / _OPTIMIZER).write_bytes(buffer.getbuffer())
        (temporary / _PROGRESS).write_text(
            json.dumps({"progress": asdict(state.progress), "facts": state.facts}, indent=1)
        )
        make_accessible(temporary, 0o777)
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
        sync(path.parent)
    finally:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def load_state(path: Path) -> State:
    """Read a state folder to the CPU. Raises ConfigError, starting with `--resume`, when it is none or damaged."""
    if not _is_file(path / _PROGRESS):
        raise ConfigError(f"--resume {path}: is not a state folder of this trainer; give one that --save_state wrote")
    try:
        for name in (_WEIGHTS, _OPTIMIZER):
            if not _is_file(path / name):  # a pipe would be waited for
                raise ValueError(f"{name} is missing")
        progress, facts = _read_progress(path / _PROGRESS)
        weights = load_file(path / _WEIGHTS)
        if not all(tensor.is_floating_point() and bool(tensor.float().isfinite().all()) for tensor in weights.values()):
            raise ValueError(f"{_WEIGHTS} holds NaN, infinity or whole numbers")
        optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
        if not isinstance(optimizer, dict):
            raise ValueError(f"{_OPTIMIZER} holds no dict")
    except Exception as error:  # the readers of damaged files raise nearly anything
        reason = one_line(error) or type(error).__name__
        raise ConfigError(f"--resume {path}: is damaged ({reason}); resume from an earlier state") from None
    return State(path, progress, facts, weights, optimizer)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may not be looked into
        return False


def _read_progress(path: Path) -> tuple[Progress, Facts]:
    """Raises ValueError and others for what no run has written."""
    if path.stat().st_size > _LARGEST_PROGRESS:
        raise ValueError(f"{_PROGRESS} is too large")
    written = parse_json(path.read_text())
    found, facts = written["progress"], written["facts"]
    if not isinstance(facts, dict):
        raise ValueError("the facts are no table")
    counters = {name: found[name] for name in ("step", "epoch", "items", "skipped_steps") if name in found}
    for name, count in counters.items():
        if type(count) is not int or not 0 <= count < _LARGEST_COUNT:
            raise ValueError(f"{name} is {count!r}")
    losses, started = tuple(found.get("losses", ())), found.get("started", 0.0)
    if len(losses) > _LOSS_WINDOW or not all(map(_is_number, (*losses, started))):
        raise ValueError("losses or the time of the start are no numbers")
    seed = facts.get("seed")
    if type(seed) is not int or not 0 <= seed < _LARGEST_SEED:
        raise ValueError(f"the seed is {seed!r}")
    return Progress(**counters, losses=losses, started=started), facts


def check_optimizer(state: State, optimizer: Optimizer, schedule: LRScheduler, kept: Mapping[str, Any] | None) -> None:
    """Raise ConfigError unless the state's optimizer and schedule can go on in these, which are those of the run.

    kept: what this optimizer keeps of a weight of shape [2, 3]; None when that is not known. Lets only numbers, short
    texts and dense tensors of the right shapes pass, so that nothing in a state can surprise a step.
    """
    try:
        found = state.optimizer["optimizer"]
        groups, ours = found["param_groups"], optimizer.param_groups
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in ours]:
            raise ValueError("it trains other groups of weights, as with another loraplus_lr_ratio")
        for group, own in zip(groups, ours, strict=True):
            for name in own.keys() & group.keys() - {"params"}:
                if not _alike(group[name], own[name]):
                    raise ValueError(f"{name} is {one_line(group[name], 40)}")
            _try_settings(optimizer, group)
        parameters = [parameter for group in ours for parameter in group["params"]]
        numbers = [number for group in groups for number in group["params"]]
        if numbers != list(range(len(parameters))) or not set(found["state"]) <= set(numbers):
            raise ValueError("its weights have other numbers")
        for number, values in found["state"].items():
            _check_kept(values, parameters[number].shape, kept)
        schedules = state.optimizer["scheduler"]
        own_schedule = schedule.state_dict()
        for name in places_in_schedule(own_schedule):
            given = schedules.get(name)
            count = name not in _COUNTS_OF_SCHEDULE or (type(given) is int and 0 <= given < _LARGEST_COUNT)
            if not count or not _alike(given, own_schedule[name]):
                raise ValueError(f"{name} of its schedule is {one_line(given, 40)}")
        scaler = state.optimizer["scaler"]
        if scaler and (
            scaler.keys() != _SCALER or not all(_is_number(value) and value >= 0 for value in scaler.values())
        ):
            raise ValueError("its gradient scaler is none")
    except Exception as error:  # what is no dict or list raises nearly anything
        reason = one_line(error) or type(error).__name__
        raise ConfigError(
            f"--resume {state.path}: its optimizer does not fit ({reason}); use the same settings, or begin from its "
            f"weights: --network_weights {state.path / _WEIGHTS}"
        ) from None


def places_in_schedule(own: Mapping[str, Any]) -> list[str]:
    """Names of what says, in the state dict of any schedule of torch, where it stands; the rest are its settings."""
    return [name for name in (*_RATES_OF_SCHEDULE, *_COUNTS_OF_SCHEDULE) if name in own]


def _try_settings(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Have the optimizer's class judge the settings of a group: its bounds of betas, decay ..."""
    known = inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults.keys() & group.keys()
    known -= {name for name in known if optimizer.defaults[name] is None}  # it finds these itself
    unset: dict[str, Any] = {
        name: None for name in inspect.signature(type(optimizer)).parameters if optimizer.defaults.get(name, 0) is None
    }
    type(optimizer)([torch.nn.Parameter(torch.zeros(2, 3))], **unset, **{name: group[name] for name in known})


def _check_kept(values: Mapping[str, Any], shape: torch.Size, kept: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless these are values that an optimizer keeps of a weight of this shape."""
    if kept is not None and values and kept.keys() - values.keys():
        raise ValueError(f"'{min(kept.keys() - values.keys())}' of a weight is missing")
    for name, value in values.items():
        if name == "step" and not (_is_number(value) and 0 <= value < _LARGEST_COUNT):
            raise ValueError("'step' of a weight is no count")
        if not torch.is_tensor(value):
            if value is not None and not _is_number(value):
                raise ValueError(f"'{name}' of a weight is {one_line(value, 40)}")
            continue
        own = None if kept is None else kept.get(name)
        if torch.is_tensor(own) and len(shape) == 2:
            wanted = tuple({2: shape[0], 3: shape[-1]}.get(size, size) for size in own.shape)
            if tuple(value.shape) != wanted:
                raise ValueError(f"'{name}' has the shape {list(value.shape)} instead of {list(wanted)}")
        dense = value.layout == torch.strided and value.untyped_storage().nbytes() >= value.numel() * value.itemsize
        if not dense or value.numel() > max(shape.numel(), _SMALL):
            raise ValueError(f"'{name}' has the shape {list(value.shape)} for a weight of {list(shape)}")


def _alike(value: Any, own: Any) -> bool:
    """Whether a setting can stand for `own`: numbers for numbers, as many in a list, texts and switches for theirs."""
    if own is None:
        return value is None or isinstance(value, bool) or _is_number(value)
    if value is None or isinstance(value, bool) or isinstance(own, bool):
        return value is None or (isinstance(value, bool) and isinstance(own, bool))
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(own) and all(map(_alike, value, own))
    return isinstance(value, str) if isinstance(own, str) else _is_number(value)


def _is_number(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.numel() == 1 and math.isfinite(float(value))
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER


def changed_facts(now: Facts, then: Facts) -> list[tuple[str, Any, Any]]:
    """Name, value now and value then of what differs, also in the tables within; older states lack some of it."""
    changed = []
    for name in now.keys() & then.keys():
        if isinstance(now[name], dict) and isinstance(then[name], dict):
            names = now[name].keys() | then[name].keys()
            changed += [(key, now[name].get(key), then[name].get(key)) for key in sorted(names)]
        else:
            changed.append((name, now[name], then[name]))
    return [(name, new, old) for name, new, old in changed if new != old]


def newest_state(folder: Path, name: str) -> State | None:
    """The whole state of the run `name` in `folder` that has come furthest; None where there is none at all.

    Damaged ones are skipped with a warning. Raises ConfigError when there are only such.
    """
    pattern = re.compile(re.escape(name) + _SUFFIXES)
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
    states = [path for path in found if _is_file(path / _PROGRESS) or (path.name.endswith("-state") and path.is_dir())]
    damaged = []
    for path in sorted(states, key=_place, reverse=True):
        try:
            state = load_state(path)
        except ConfigError as error:
            log.warning("%s", error)
            damaged.append(path.name)
            continue
        if state.facts.get("output_name", name) == name:  # states of earlier versions don't say it
            return state
        log.info("%s is a state of --output_name %s: left alone", path, one_line(state.facts["output_name"]))
    if damaged:
        raise ConfigError(
            f"--resume auto: no state of {name} in {folder} can be read ({some(damaged)}); "
            "delete them to start anew, or go on from a LoRA file with --network_weights"
        )
    return None


def _place(state: Path) -> tuple[int, int, str]:
    """Step, epoch and name, by which states sort; unreadable ones come first."""
    try:
        progress = json.loads((state / _PROGRESS).read_text())["progress"]
        return int(progress["step"]), int(progress["epoch"]), state.name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return -1, -1, state.name


def restore_replaced(folder: Path, name: str) -> None:
    """Give the states of the run `name` their names back, where a kill came between the two renames of `save_state`.

    By then the new state was whole; after a power cut it may be gone, and the old one is taken.
    """
    pattern = re.compile(rf"\.tmp-{re.escape(name)}{_SUFFIXES}-\w+-old")
    for old in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(old.name):
            new = old.with_name(old.name.removesuffix("-old"))
            path = old.with_name(new.name.removeprefix(".tmp-").rpartition("-")[0])
            if not path.exists():
                (new if new.is_dir() else old).replace(path)
                sync(folder)
                log.info("restored %s", path)


def remove_leftovers_of(folder: Path, name: str) -> None:
    """Delete what a killed run `name` left half-written in its output folder."""
    pattern = re.compile(r"\.tmp-" + re.escape(name) + _SUFFIXES + r"(\.\w+)?-\w+(-old)?(\.\w+)?")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
