"""How much memory the machine has left."""

import ctypes
import os
import sys
from pathlib import Path


def available_memory() -> int:
    """Bytes of host memory that a program can take without swapping: of the machine, or of its container if less."""
    if sys.platform == "win32":
        return _windows()
    available = _linux(Path("/proc/meminfo"))
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _container(Path("/sys/fs/cgroup"))
    return available if limit is None else min(available, limit)


def _linux(path: Path) -> int | None:
    """The kernel's own estimate; None where there is no such file."""
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _container(folder: Path) -> int | None:
    """What is left under the limit of the control group (version 2); None without a limit."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + int(cached.get("inactive_file", 0))


def _windows() -> int:
    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API"""

        _fields_ = (
            *((name, ctypes.c_ulong) for name in ("length", "load")),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "page_total", "page")),
            *((name, ctypes.c_ulonglong) for name in ("virtual_total", "virtual", "extended")),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.available
