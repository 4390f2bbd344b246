"""Logs of a run: a file of metrics always, TensorBoard and Weights & Biases when asked for."""

import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from utils.errors import ConfigError
from utils.files import require_writable_dir, written_whole
from utils.images import open_image
from utils.options import Section, option
from utils.parsing import read_toml

log = logging.getLogger(__name__)

_TRACKERS = ("tensorboard", "wandb")
_DEFAULT_NAME = "network_train"  # musubi-tuner's
_PATHS_AS_TEXT = ("resume",)  # options that may be a word instead, such as auto
_SECRET = re.compile(r"token(?!izer)|api_?key|password|secret", re.IGNORECASE)


@dataclass(frozen=True)
class TrackingConfig(Section):
    """logging"""

    logging_dir: Path | None = option(None, help="folder for TensorBoard logs, a new one inside for each run")
    log_with: str | None = option(
        None, help="further logs; default: tensorboard if there is a --logging_dir", choices=(*_TRACKERS, "all")
    )
    log_prefix: str | None = option(None, help="start of the run's folder name in --logging_dir")
    log_tracker_name: str | None = option(None, help=f"wandb project and TensorBoard folder; default {_DEFAULT_NAME}")
    log_tracker_config: Path | None = option(None, help="TOML with tables [tensorboard], [wandb]: further arguments")
    wandb_run_name: str | None = option(None, help="name of the run in wandb")
    wandb_api_key: str | None = option(None, help="logs in to wandb; better: run `wandb login` once")
    log_config: bool = option(False, help="send the settings of the run to the logs, without keys and folders")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "tensorboard" in self.trackers and self.logging_dir is None:
            raise ConfigError(f"--log_with {self.log_with} needs --logging_dir FOLDER")
        for name in ("log_prefix", "log_tracker_name"):
            value = getattr(self, name)
            if value is not None and PurePath(value).name != value:
                raise ConfigError(f"--{name} {value}: must be a name without folders")

    @property
    def trackers(self) -> tuple[str, ...]:
        """`tensorboard`, `wandb`, both or none."""
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return _TRACKERS if self.log_with == "all" else (self.log_with,)

    @property
    def name(self) -> str:
        """`log_tracker_name` or its default."""
        return self.log_tracker_name or _DEFAULT_NAME

    def check(self) -> None:
        """Raise ConfigError unless packages, folder and file are there. Cheap: for before anything loads."""
        for package in self.trackers:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:  # a folder of runs named "wandb" is no package
                cause = "--logging_dir" if self.log_with is None else f"--log_with {self.log_with}"
                raise ConfigError(f'{cause} needs the package {package}; run: pip install ".[{package}]"')
        if self.logging_dir is not None:
            require_writable_dir(self.logging_dir, "--logging_dir")
        self.arguments()

    def arguments(self) -> dict[str, dict[str, Any]]:
        """`log_tracker_config`: tracker -> further arguments of its constructor."""
        if self.log_tracker_config is None:
            return {}
        tables = read_toml(self.log_tracker_config, "--log_tracker_config")
        for key, table in tables.items():
            if key not in _TRACKERS or not isinstance(table, dict):
                place = f"--log_tracker_config {self.log_tracker_config}: {key}"
                raise ConfigError(f"{place}: is not a table of a tracker; write [tensorboard] or [wandb]")
        return tables


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them, without keys and tokens, and paths without their folders."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [plain(part) for part in value]
        if isinstance(value, PurePath):
            return value.name
        return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

    shown = {key: plain(value) for key, value in settings.items() if not _SECRET.search(key)}
    return shown | {key: PurePath(shown[key]).name for key in _PATHS_AS_TEXT if shown.get(key)}


class _Log(Protocol):
    """A tracker. Steps are optimizer steps, counted from 1."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes numbers and pictures to every log; made by `open`.

    `<output_dir>/<output_name>-metrics.jsonl` gets a line per call of `scalars`, {"step": 3, "loss/current": 0.1, ...},
    and no times, so that equal runs write equal files; a number that is not finite becomes null.
    A log that fails during training is reported and left out from then on; lines that a full disk does not take are
    written when it has space again.
    """

    def __init__(self, metrics: "_Metrics | None", logs: list[_Log]) -> None:
        self._metrics, self._logs = metrics, logs

    @classmethod
    def open(
        cls,
        config: TrackingConfig,
        output_dir: Path,
        output_name: str,
        settings: Mapping[str, Any],
        resume_step: int = 0,
        *,
        main: bool = True,
    ) -> "Tracker":
        """Raises ConfigError when a log can't be started.

        settings: sent with `log_config`, see `public_settings`. resume_step: 0 for a fresh run, which replaces an
        older file of metrics; a run resumed after that step goes on with the file, without what it says on later
        steps. main: False in the other processes of a run, where nothing is written.
        """
        if not main:
            return cls(None, [])
        config.check()
        path = require_writable_dir(output_dir, "--output_dir") / f"{output_name}-metrics.jsonl"
        arguments = config.arguments()
        shown = public_settings(settings) if config.log_config else {}
        openers: dict[str, Callable[..., _Log]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
        folder = config.logging_dir or output_dir
        logs = [openers[name](config, shown, folder, arguments.get(name, {})) for name in config.trackers]
        _rewind(path, resume_step)
        return cls(_Metrics(path), logs)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name. `step`: optimizer steps so far; not lower than in earlier calls."""
        if self._metrics is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._metrics.add(json.dumps({"step": step, **finite}) + "\n")
        self._tell(lambda tracker: tracker.scalars(step, values))

    def image(self, step: int, name: str, path: Path) -> None:
        """Show the picture in `path`. The file of metrics doesn't mention it."""
        self._tell(lambda tracker: tracker.image(step, name, path))

    def close(self) -> None:
        """Finish all logs."""
        self._tell(lambda tracker: tracker.close())
        if self._metrics is not None:
            self._metrics.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _tell(self, call: Callable[[_Log], None]) -> None:
        for tracker in list(self._logs):
            try:
                call(tracker)
            except Exception:
                log.exception("%s failed and is left out from now on", type(tracker).__name__.strip("_"))
                self._logs.remove(tracker)


class _Metrics:
    """The file of metrics; unbuffered, so that a line which is not on the disk is known to be missing."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._waiting = path, path.open("ab", buffering=0), b""

    def add(self, line: str) -> None:
        """Append the line. What can't be written is kept for the next call; the first time is reported."""
        first = not self._waiting
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if first:
                log.warning("%s can't be written (%s); its lines wait, training goes on", self._path, error.strerror)

    def close(self) -> None:
        """Try once more to write what waits."""
        if self._waiting and not self._file.closed:
            self.add("")
        with suppress(OSError):  # network file systems may tell only here that a line did not fit
            self._file.close()


def _rewind(path: Path, step: int) -> None:
    """Cut the file of metrics off after this step; step 0 leaves no line."""
    if not path.is_file():
        if step:
            log.warning("%s does not exist: the metrics up to step %d are missing", path, step)
        return
    if step == 0:
        log.info("replacing %s of an earlier run", path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if step else []
    kept = [line for line in lines if _step_of(line) <= step]
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8", newline="\n")


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite when it is damaged, as the last one is after a crash."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class _TensorBoard:
    """Event files in `<logging_dir>/<log_prefix><time>/<log_tracker_name>`."""

    def __init__(
        self, config: TrackingConfig, settings: dict[str, Any], parent: Path, arguments: dict[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = parent / f"{config.log_prefix or ''}{datetime.now():%Y%m%d%H%M%S}" / config.name
        try:
            self._writer = SummaryWriter(str(folder), **arguments)
        except (TypeError, OSError) as error:
            raise ConfigError(f"--log_with tensorboard cannot write to {folder} ({error})") from None
        if settings:
            rows = [f"| {key} | {json.dumps(value, ensure_ascii=False)} |" for key, value in settings.items()]
            self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._writer.add_image(name, np.asarray(open_image(path, name)), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(
        self, config: TrackingConfig, settings: dict[str, Any], parent: Path, arguments: dict[str, Any]
    ) -> None:
        import wandb

        self._wandb = wandb
        named = {} if config.wandb_run_name is None else {"name": config.wandb_run_name}
        defaults = {"project": config.name, "dir": str(parent), "config": settings or None}
        try:
            if config.wandb_api_key is not None:
                wandb.login(key=config.wandb_api_key)
            self._run = wandb.init(**{**defaults, **arguments, **named})
        except Exception as error:  # its own kinds differ between versions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--log_with {config.log_with}: wandb does not start ({reason})") from None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()
