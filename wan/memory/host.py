"""How much memory the machine has left."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")  # of the own container, version 2


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of host memory that a program can take without swapping: of the machine, or of its container if less."""
    available = psutil.virtual_memory().available
    limit = _container(cgroup)
    return available if limit is None else min(available, limit)


def _container(folder: Path) -> int | None:
    """Bytes left under the limit of the control group, which psutil does not look at; None without a limit."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + int(cached.get("inactive_file", 0))
