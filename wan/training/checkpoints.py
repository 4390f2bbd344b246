"""Which files of a run are written when, and which old ones are deleted (docs/formats.md#files-of-a-run)."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from wan.training.options import SaveConfig

log = logging.getLogger(__name__)


class Checkpoints:
    """Names and keeps the LoRA files and states of one run.

    write_lora(path) and write_state(path) do the writing. A full disk costs the file that did not fit, never an older
    one: old files are deleted only after the new one is complete.
    """

    def __init__(
        self,
        config: SaveConfig,
        write_lora: Callable[[Path], None],
        write_state: Callable[[Path], None],
        deletes: bool = True,
    ) -> None:
        """deletes: False in the other processes of a run, which leave the folder to the first."""
        self.config, self._write_lora, self._write_state = config, write_lora, write_state
        self._deletes = deletes

    def step_due(self, step: int) -> bool:
        """Whether files are wanted after this step."""
        every = self.config.save_every_n_steps
        return every is not None and step % every == 0

    def epoch_due(self, epoch: int, last: bool) -> bool:
        """Whether files are wanted after this epoch; after the last one there is the final file."""
        every = self.config.save_every_n_epochs
        return every is not None and epoch % every == 0 and not last

    def save_step(self, step: int) -> None:
        """The LoRA after `step`; those of steps long past go."""
        config = self.config
        if self._save(self._lora(_step(step)), self._write_lora):
            old = _expired_step(step, config.save_every_n_steps, config.save_last_n_steps)
            self._delete(old and self._lora(_step(old)))

    def save_step_state(self, step: int) -> None:
        """The state after `step`, if states are wanted; those of steps long past go."""
        config = self.config
        if config.save_state and self._save(self._state(_step(step)), self._write_state):
            keep = (
                config.save_last_n_steps if config.save_last_n_steps_state is None else config.save_last_n_steps_state
            )
            old = _expired_step(step, config.save_every_n_steps, keep)
            self._delete(old and self._state(_step(old)))

    def save_epoch(self, epoch: int) -> None:
        """The LoRA after `epoch`; those of epochs long past go."""
        config = self.config
        if self._save(self._lora(_epoch(epoch)), self._write_lora):
            old = _expired_epoch(epoch, config.save_every_n_epochs, config.save_last_n_epochs)
            self._delete(old and self._lora(_epoch(old)))

    def save_epoch_state(self, epoch: int) -> None:
        """The state after `epoch`, if states are wanted; those of epochs long past go."""
        config = self.config
        if config.save_state and self._save(self._state(_epoch(epoch)), self._write_state):
            keep = (
                config.save_last_n_epochs
                if config.save_last_n_epochs_state is None
                else config.save_last_n_epochs_state
            )
            old = _expired_epoch(epoch, config.save_every_n_epochs, keep)
            self._delete(old and self._state(_epoch(old)))

    def save_interrupted(self, step: int) -> Path | None:
        """A state to go on from after a stop, whatever the settings; None when it could not be written."""
        path = self._state(_step(step))
        return path if self._save(path, self._write_state) else None

    def save_final(self) -> Path:
        """The finished LoRA, and the last state if wanted. Raises OSError when the LoRA can't be written."""
        path = self._lora("")
        self._write_lora(path)
        log.info("saved %s", path)
        if self.config.save_state or self.config.save_state_on_train_end:
            self._save(self._state(""), self._write_state)
        return path

    def _lora(self, suffix: str) -> Path:
        return self.config.output_dir / f"{self.config.output_name}{suffix}.safetensors"

    def _state(self, suffix: str) -> Path:
        return self.config.output_dir / f"{self.config.output_name}{suffix}-state"

    def _save(self, path: Path, write: Callable[[Path], None]) -> bool:
        try:
            write(path)
        except OSError as error:
            log.error("%s could not be written (%s); earlier files are intact, training goes on", path, error.strerror)
            return False
        log.info("saved %s", path)
        return True

    def _delete(self, path: Path | None) -> None:
        if not self._deletes or path is None or not path.exists():
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        log.info("deleted %s", path)


def _step(step: int) -> str:
    return f"-step{step:08d}"


def _epoch(epoch: int) -> str:
    return f"-{epoch:06d}"


def _expired_step(step: int, every: int | None, keep: int | None) -> int | None:
    """The multiple of `every` that is at most step - keep - 1, or None."""
    if every is None or keep is None:
        return None
    return max(0, (step - keep - 1) // every * every) or None


def _expired_epoch(epoch: int, every: int | None, keep: int | None) -> int | None:
    """epoch - every * keep, or None. The newest epoch itself never expires."""
    if every is None or keep is None:
        return None
    return max(0, epoch - every * max(keep, 1)) or None
