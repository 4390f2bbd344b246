"""Half-written files that killed processes have left under temporary names, told from those still being written."""

import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = re.compile(r"\.tmp-.+-\w{8}\.(safetensors|png|html?|json|toml|txt)")  # as `written_whole` makes them
_BUSY = (errno.EACCES, errno.EAGAIN)
_NEW = 5  # seconds, in which a file may not have got its lock yet
_DAY = 24 * 60 * 60


@contextmanager
def being_written(handle: int) -> Iterator[None]:
    """In the block, `remove_leftovers` of other processes leaves the open file alone; closes it.

    The system lets go of the lock when the process ends, in whatever way. Windows renames no open file: there the age
    of a file has to tell.
    """
    try:
        if sys.platform == "win32":
            os.close(handle)
        else:
            import fcntl

            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if sys.platform != "win32":
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete what no process is writing any more. What can't be deleted stays."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name):
            with suppress(OSError):  # another process was faster
                if _is_abandoned(path):
                    path.unlink()


def _is_abandoned(path: Path) -> bool:
    age = time.time() - path.stat().st_mtime
    if sys.platform == "win32":
        return age > _DAY
    if age < _NEW:
        return False
    import fcntl

    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY and age > _DAY
    finally:
        os.close(handle)
    return True
