"""LoRA files and states of a run: written, named, and deleted when old (docs/formats.md#files-of-a-run)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.files import delete
from wan.training.cadence import Action, Every
from wan.training.options import SaveConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    """LoRA files or states: the end of their names, how one is written, and for how long it is kept."""

    ending: str
    write: Callable[[Path], None]
    keep_steps: int | None
    keep_epochs: int | None


class Saver:
    """Names, writes and deletes the LoRA files and states of one run.

    write_lora(path) and write_state(path) do the writing. deletes: False in the other processes of a run, which leave
    the folder to the first. A full disk costs the file that did not fit, never an older one: old files are deleted only
    after the new one is complete.
    """

    def __init__(
        self,
        config: SaveConfig,
        write_lora: Callable[[Path], None],
        write_state: Callable[[Path], None],
        deletes: bool = True,
    ) -> None:
        self._config, self._deletes = config, deletes
        self.latest: Path | None = None  # of the files of this run
        self._loras = _Kind(".safetensors", write_lora, config.save_last_n_steps, config.save_last_n_epochs)
        self._states = _Kind("-state", write_state, config.keep_steps_of_states, config.keep_epochs_of_states)

    @property
    def lora_action(self) -> Action:
        """Save the LoRA, except after the last epoch, when the final file follows."""
        return self._action(self._loras, self._config.every)

    @property
    def state_action(self) -> Action:
        """Save a state whenever a LoRA is saved, if states are wanted."""
        return self._action(self._states, self._config.every if self._config.save_state else Every())

    def catch_up(self, step: int, epoch: int) -> None:
        """Delete what was due to be deleted after this step and epoch, where a kill came in between."""
        config = self._config
        for kind in (self._loras, self._states):
            if every := config.save_every_n_steps:
                step = step // every * every
                self._replace_old(kind, _step(step), _step(_expired_step(step, every, kind.keep_steps)))
            if every := config.save_every_n_epochs:
                epoch = epoch // every * every
                self._replace_old(kind, _epoch(epoch), _epoch(_expired_epoch(epoch, every, kind.keep_epochs)))

    def _replace_old(self, kind: _Kind, new: str, old: str) -> None:
        if self._path(kind, new).exists():
            self._delete(self._path(kind, old))

    def save_interrupted(self, step: int) -> Path | None:
        """Save a state to go on from after a stop, whatever the settings; None when it could not be written."""
        path = self._path(self._states, _step(step))
        return path if self._save(path, self._states.write) else None

    def save_final(self) -> Path:
        """Save the finished LoRA, and the last state if wanted. Raises OSError when the LoRA can't be written."""
        path = self._path(self._loras, "")
        self._loras.write(path)
        log.info("saved %s", path)
        if self._config.save_state or self._config.save_state_on_train_end:
            self._save(self._path(self._states, ""), self._states.write)
        return path

    def _action(self, kind: _Kind, every: Every) -> Action:
        after_step, after_epoch = partial(self._after_step, kind), partial(self._after_epoch, kind)
        return Action(every, after_step, after_epoch, once=False, at_end=False)

    def _after_step(self, kind: _Kind, step: int) -> None:
        old = _expired_step(step, self._config.save_every_n_steps, kind.keep_steps)
        self._replace(kind, _step(step), _step(old) if old else None)

    def _after_epoch(self, kind: _Kind, epoch: int) -> None:
        old = _expired_epoch(epoch, self._config.save_every_n_epochs, kind.keep_epochs)
        self._replace(kind, _epoch(epoch), _epoch(old) if old else None)

    def _replace(self, kind: _Kind, suffix: str, old: str | None) -> None:
        if self._save(self._path(kind, suffix), kind.write) and old is not None:
            self._delete(self._path(kind, old))

    def _path(self, kind: _Kind, suffix: str) -> Path:
        return self._config.output_dir / f"{self._config.output_name}{suffix}{kind.ending}"

    def _save(self, path: Path, write: Callable[[Path], None]) -> bool:
        try:
            write(path)
        except OSError as error:
            log.error("%s could not be written (%s); earlier files are intact, training goes on", path, error.strerror)
            return False
        self.latest = path
        log.info("saved %s", path)
        return True

    def _delete(self, path: Path) -> None:
        if not self._deletes or not path.exists():
            return
        try:
            delete(path)
        except OSError as error:
            once = {"once": "old files that stay"}
            log.warning("%s could not be deleted (%s) and stays; training goes on", path, error.strerror, extra=once)
        else:
            log.info("deleted %s", path)


def _step(step: int) -> str:
    return f"-step{step:08d}"


def _epoch(epoch: int) -> str:
    return f"-{epoch:06d}"


def _expired_step(step: int, every: int | None, keep: int | None) -> int:
    """The multiple of `every` that is at most step - keep - 1; 0 when nothing expires."""
    if every is None or keep is None:
        return 0
    return max(0, (step - keep - 1) // every * every)


def _expired_epoch(epoch: int, every: int | None, keep: int | None) -> int:
    """epoch - every * keep; 0 when nothing expires. The newest epoch itself never does."""
    if every is None or keep is None:
        return 0
    return max(0, epoch - every * max(keep, 1))
