"""A folder as a power cut would leave it, from the operations of a run that `tests/crash_points.py` has noted.

What the disk has is what was synced. Beyond that, a file system may have written any of the names and no content: of
the possible states the two extremes are made, no unsynced change of names and all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass
class _File:
    """Its content on the disk; `emptied`: when everything but content is written, which unsynced files lack."""

    synced: bytes = b""
    emptied: bytes = b""


@dataclass
class _Folder:
    """Names as programs see them, and as they were when the folder was last synced."""

    names: dict[str, "_File | _Folder"] = field(default_factory=dict)
    synced: dict[str, "_File | _Folder"] = field(default_factory=dict)


class Disk:
    """The files of a folder, all of them safe at first; links and what is behind them are left out."""

    def __init__(self, folder: Path) -> None:
        self._root = _read(folder)

    def apply(self, kind: str, path: str, *facts: Any, copy: Callable[[int], bytes]) -> None:
        """Do an operation as it was noted. copy: the content of a file by the number in the note of its sync."""
        if kind == "said":
            return
        parent, name = self._place(path)
        node = parent.names.get(name) if path else self._root
        if kind == "open":
            new, emptied = facts
            if new:
                parent.names[name] = _File()
            elif emptied and isinstance(node, _File):
                node.emptied = b""
        elif kind == "serialize" and isinstance(node, _File):
            node.emptied = b""
        elif kind == "mkdir":
            parent.names[name] = _Folder()
        elif kind in ("remove", "rmdir"):
            del parent.names[name]
        elif kind in ("rename", "link"):
            target, other = self._place(facts[0])
            if kind == "rename" and target.names.get(other) is not node:
                target.names[other] = parent.names.pop(name)
            elif kind == "link" and other not in target.names:  # else it fails
                target.names[other] = parent.names[name]
        elif kind == "sync" and isinstance(node, _Folder):
            node.synced = dict(node.names)
        elif kind == "sync" and isinstance(node, _File):
            node.synced = node.emptied = copy(facts[0])

    def after_cut(self, names_are_written: bool) -> dict[str, bytes | None]:
        """Content by path; None stands for a folder. Without `names_are_written`: only what was synced."""
        found: dict[str, bytes | None] = {}

        def walk(folder: _Folder, place: PurePosixPath) -> None:
            for name, node in (folder.names if names_are_written else folder.synced).items():
                path = place / name
                if isinstance(node, _Folder):
                    found[str(path)] = None
                    walk(node, path)
                else:
                    found[str(path)] = node.emptied if names_are_written else node.synced

        walk(self._root, PurePosixPath())
        return found

    def _place(self, path: str) -> tuple[_Folder, str]:
        folder, parts = self._root, PurePosixPath(path).parts
        for part in parts[:-1]:
            inner = folder.names[part]
            assert isinstance(inner, _Folder)
            folder = inner
        return folder, parts[-1] if parts else ""


def _read(folder: Path) -> _Folder:
    names: dict[str, _File | _Folder] = {}
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            names[path.name] = _read(path)
        elif not path.is_symlink():
            content = path.read_bytes()
            names[path.name] = _File(content, content)
    return _Folder(names, dict(names))


def write(found: dict[str, bytes | None], folder: Path) -> None:
    """Make the files of `Disk.after_cut` in a folder that has none of them."""
    for path, content in found.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
