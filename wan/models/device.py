"""The processes that `accelerate launch` or torchrun start together for one run; each of them runs the whole script."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePath
from typing import TypeVar

import psutil
import torch

from utils.errors import ConfigError
from utils.options import Section, option
from utils.text import one_line

Item = TypeVar("Item")

_LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate-script", "torchrun", "torchrun-script")  # also .exe
_PATIENCE = timedelta(days=1)  # shares take differently long; a process that died is noticed by the launcher


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is. By default it is alone."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process does what is done once."""
        return self.index == 0

    def rank_slice(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a list that is the same in all of them."""
        return list(items[self.index :: self.count])

    def gathered(self, items: list[Item]) -> list[Item]:
        """The lists of all processes in a row, the same everywhere; all have to call it."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        found: list[Item] = gather_object(items)
        return found

    def raise_anywhere(self, failure: Exception | None) -> None:
        """Raise the failure of any process in all of them, which so stay in step; all have to call it."""
        for found in self.gathered([failure]):
            if found is not None:
                raise found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


ALONE = Processes()

_STRANGE_LAUNCHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Variables by which `accelerate launch` asks for what is not supported, and its name."""


def check_launcher() -> None:
    """Raise ConfigError when `accelerate` was set to share out the work in a way that is not supported.

    Looks at the environment alone: accelerate itself would import packages for it, or fail without them.
    """
    for variable, name in _STRANGE_LAUNCHERS.items():
        if _is_on(variable):
            raise ConfigError(
                f"accelerate is set to {name}, which is not supported; launch with --config_file "
                "docs/accelerate_ddp.yaml, or docs/accelerate_fsdp2.yaml for a model that fits no single GPU"
            )
    if _is_on("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate is set to FSDP 1; set fsdp_version to 2, as in docs/accelerate_fsdp2.yaml")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class DeviceConfig(Section):
    """device"""

    device: str | None = option(None, help="torch device; default cuda if there is one, else cpu")

    @property
    def is_cpu(self) -> bool:
        """Whether the models run on the CPU; touches no device."""
        return (self.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu"

    def resolve(self) -> torch.device:
        """The device that the models run on, after a first tensor on it. Raises ConfigError when it can't be used.

        Prepares PyTorch's allocator, so that it has to come before anything else that uses a GPU.
        """
        _let_reserves_grow()
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"--device {name}: is no device that PyTorch knows; use cuda, cuda:1 or cpu") from None
        try:
            torch.zeros(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = f" ({one_line(str(error).splitlines()[0])})" if device.type == "cuda" else ""
            raise ConfigError(f"--device {name}: can't be used on this computer{reason}; use cuda or cpu") from None
        if device.type == "meta":
            raise ConfigError("--device meta: holds no numbers; use cuda or cpu")
        return device


def _let_reserves_grow() -> None:
    """Have PyTorch grow what it reserves on a GPU, unless the user has set its allocator; before it is first used.

    Otherwise a tenth of a small GPU ends up in pieces that nothing fits into. Windows has no such memory.
    """
    if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def init_processes(config: DeviceConfig) -> tuple[Processes, torch.device]:
    """Meet the other processes, if a launcher has started several, and find this one's device.

    ConfigError for a device that they can't all have.
    """
    check_launcher()
    device = config.resolve()
    launched = "LOCAL_RANK" in os.environ  # by either; WORLD_SIZE alone is set in some containers
    if not launched or int(os.environ["WORLD_SIZE"]) < 2:
        return Processes(), device
    if config.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {config.device}: several processes take cpu or cuda; each finds a GPU of its own")
    from accelerate import PartialState  # imported only where there is someone to meet

    state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes), state.device


@dataclass(frozen=True)
class Launcher:
    """The `accelerate launch` or torchrun that has started this process.

    A signal to the launcher alone ends it, and its process would go on unseen.
    """

    process: psutil.Process

    @classmethod
    def find(cls) -> "Launcher | None":
        """The launcher of this process; None when a user, a shell or a batch system has started it."""
        try:
            parent = psutil.Process().parent()
            words = parent.cmdline()[:3] if parent is not None else []
        except psutil.Error:
            return None
        by_name = any(PurePath(word).stem in _LAUNCHERS for word in words)
        by_module = any(word.startswith(("accelerate.", "torch.distributed.")) for word in words)
        return cls(parent) if parent is not None and (by_name or by_module) else None

    @property
    def has_ended(self) -> bool:
        """Whether this process has lost its parent."""
        return os.getppid() != self.process.pid or not self.process.is_running()


def write_on_main(write: Callable[[], None]) -> None:
    """Let the first process write while the others wait. Its OSError is raised in all, which so stay in step."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    failure = None
    if PartialState().is_main_process:
        try:
            write()
        except OSError as error:
            failure = error
    failure = broadcast_object_list([failure])[0]
    if failure is not None:
        raise failure
