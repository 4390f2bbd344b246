"""Training states: folders from which a run goes on as if it had never stopped.

A state is written under a temporary name and renamed when complete, so a folder with the right name can be trusted.
All randomness of training has an address (seed, epoch, item), so there are no random states to keep.
"""

import io
import json
import logging
import math
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from utils.errors import ConfigError
from utils.files import make_accessible, make_folder, sync, temporary_prefix
from utils.text import some

log = logging.getLogger(__name__)

_SUFFIXES = r"(-\d{6}|-step\d{8})?(-state)?"  # of all files and folders that a run writes beside its samples
_WEIGHTS, _OPTIMIZER, _PROGRESS = "model.safetensors", "optimizer.bin", "progress.json"
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
    if not (path / _PROGRESS).is_file():
        raise ConfigError(f"--resume {path}: is not a state folder of this trainer; give one that --save_state wrote")
    try:
        written = json.loads((path / _PROGRESS).read_text())
        known = {field.name for field in fields(Progress)}
        progress = Progress(**{key: value for key, value in written["progress"].items() if key in known})
        progress.losses = tuple(progress.losses)
        facts = dict(written["facts"])
        weights = load_file(path / _WEIGHTS)
        optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of damaged files raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--resume {path}: is damaged ({reason}); resume from an earlier state") from None
    return State(path, progress, facts, weights, optimizer)


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
    states = [path for path in found if path.is_dir() and (path.name.endswith("-state") or (path / _PROGRESS).exists())]
    damaged = []
    for path in sorted(states, key=_place, reverse=True):
        try:
            return load_state(path)
        except ConfigError as error:
            log.warning("%s", error)
            damaged.append(path.name)
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
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
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
