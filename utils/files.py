"""Files that appear whole or not at all, and fingerprints that tell whether a file is still the same."""

import errno
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import psutil
from safetensors import SafetensorError

from utils.errors import ConfigError

_CHUNK, _TAIL = 1 << 20, 1 << 16  # bytes
_DAY = 24 * 60 * 60  # seconds
_LEFTOVER = re.compile(r"\.tmp-.+-(?:([0-9a-f]{4})([0-9a-f]{8}))?\w{8}(?:\.\w+)?", re.DOTALL)
"""A name of `written_whole`: the letters of the computer and the number of the process there, which were not always."""
_RANDOM_LETTERS = 8  # that the tempfile module puts into a name
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of file systems that can't sync
_HASH_WHOLE_BELOW = 64 << 20


@contextmanager
def written_whole(path: str | Path, *, replaces: bool = True, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    replaces: False raises FileExistsError where `path` is there already, also when another process was faster.
    durable: content and name are on disk when this returns, so that after a power cut the old content or the new is
    there. Without it the file may then be empty: for what is soon replaced, or synced later with many others.
    Raises OSError when the disk refuses, also where safetensors has its own exception for that.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path), suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            sync(temporary)
        make_accessible(temporary, 0o666)  # mkstemp makes files private
        if not replaces:
            _claim(path, temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        error.filename = str(path)  # writing names no file at all, or else the temporary one
        raise
    finally:
        with suppress(OSError):  # on Windows while another program looks at it; the next run tries again
            temporary.unlink(missing_ok=True)


def _claim(path: Path, content: Path) -> None:
    """Have `path` be another name of the file `content`. Raises FileExistsError when it is taken."""
    try:
        path.hardlink_to(content)
    except FileExistsError:
        raise
    except OSError:  # no such links on this file system: as good as it gets there
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None


def make_accessible(path: Path, mode: int) -> None:
    """Give a file or folder the user's usual rights, `mode` without the umask, where the file system knows rights."""
    with suppress(OSError):
        path.chmod(mode & ~umask())


def delete(path: Path) -> None:
    """Delete a file or a folder, which first loses its name: what a kill leaves of it can't be taken for whole.

    Raises OSError, with everything as it was, where it may not be deleted or, on Windows, is in use.
    """
    if not path.is_dir():
        path.unlink()
        return
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path)))
    try:
        path.replace(doomed / path.name)
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is deleted afterwards. Raises BlockingIOError while another process holds it.

    The system lets go of it when a process ends, in whatever way. Where a file system knows no locks, none is held.
    """
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("ab"))
            try:
                _lock(file)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    raise BlockingIOError(errno.EAGAIN, "is in use", str(path)) from None
            if _is_still(path, file):
                break
            stack.close()  # whoever held it has just deleted it
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file
                path.unlink()
    with suppress(OSError):
        if sys.platform == "win32":
            path.unlink()


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Whether the open file has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes]) -> None:
    """Lock an open file for this process alone, not for those that it forks."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on disk. Raises OSError when a file can't be.

    Folders that can't be synced, as on Windows and some network file systems, are left to the file system.
    """
    if path.is_dir():
        with suppress(OSError):
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)  # Windows syncs only what may be written


def sync_all(files: Iterable[Path]) -> None:
    """`sync` files that were not written `durable`, and their folders: by now most are on disk, so it is quick."""
    found = dict.fromkeys(files)
    for path in (*found, *dict.fromkeys(file.parent for file in found)):
        sync(path)


def make_folder(path: Path) -> None:
    """Create a folder and the missing ones above it, unless it is there; the names are on disk when this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def temporary_prefix(path: Path) -> str:
    """How the temporary names of what will be `path` begin; random letters follow, of which the first are the owner's.

    After a kill they tell whose leftovers they are, see `remove_leftovers`.
    """
    return f".tmp-{path.name}-{_owner_letters()}{os.getpid():08x}"


@lru_cache
def _owner_letters() -> str:
    """Four hex digits of this computer, or of the container that counts its own processes."""
    place = platform.node()
    with suppress(OSError):
        place += str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(place.encode(errors="replace")).hexdigest()[:4]


def remove_leftovers(folder: Path) -> None:
    """Delete files that `written_whole` has left in a folder when its process was killed.

    Those of processes of this computer that have ended; those of others, which may be at work, when a day old.
    """
    for path in folder.glob(".tmp-*"):
        found = _LEFTOVER.fullmatch(path.name)
        with suppress(OSError):
            if found is None or not path.is_file():
                continue
            if found[1] == _owner_letters():
                is_dead = not psutil.pid_exists(int(found[2], 16))
            else:
                is_dead = time.time() - path.stat().st_mtime > _DAY
            if is_dead:
                path.unlink()


def name_key(name: str | Path) -> str:
    """Equal for spellings of one name or path: composed or decomposed letters, and on Windows capitals."""
    return os.path.normcase(unicodedata.normalize("NFC", str(name)))


def unusable_name(path: Path) -> str | None:
    """Why no file of this name can be written by `written_whole` and read again, and the fix; None when it can be.

    safetensors reads no name that is not UTF-8, and writing takes a longer name for a while.
    """
    try:
        length = len(path.name.encode())
    except UnicodeEncodeError:
        return "the name is not UTF-8 text; rename it"
    longest = _longest_name(path.parent)
    extra = len(temporary_prefix(path)) - len(path.name) + _RANDOM_LETTERS + len(path.suffix)
    if length + extra > longest:
        return f"the name has {length} bytes, and {longest - extra} are possible; shorten it"
    return None


def _longest_name(folder: Path) -> int:
    """Bytes of the longest name in a folder; of one that is not there yet, what nearly all file systems take."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has no such call
        return 255


def umask() -> int:
    """The permission bits that new files of this process are made without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_file(path: str | Path, flag: str) -> Path:
    """Return `path`, or raise ConfigError naming `flag` when it is no readable file."""
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"{flag} {path}: holds a zero byte, which no name of a file has; correct it")
    try:
        if not path.is_file():
            kind = "is a folder, not a file" if path.is_dir() else "does not exist"
            if path.is_symlink() and not path.exists():
                kind = f"is a link to {path.readlink()}, which does not exist"
            elif not path.exists() and (twin := _twin(path)):
                kind = (
                    f"does not exist, but '{twin}' in another Unicode form does; rename it, or copy its name from there"
                )
                raise ConfigError(f"{flag} {path}: {kind}")
            raise ConfigError(f"{flag} {path}: {kind}; check the path")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ConfigError(f"{flag} {path}: cannot be opened ({error.strerror}); check the path") from None
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{flag} {path}: is not readable; check its permissions")
    return path


def _twin(path: Path) -> str | None:
    """A name beside `path` that is the same in another Unicode form."""
    with suppress(OSError):
        return next((one.name for one in path.parent.iterdir() if name_key(one.name) == name_key(path.name)), None)
    return None


def not_downloaded(path: Path) -> str | None:
    """Why a file is no download, e.g. a Git LFS pointer or a web page, and the fix; None when it may be one."""
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull' there, or download the file"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<!--", b'{"error"')):
        return "is a web page, not the file itself; download the file (on Hugging Face by the link with 'resolve')"
    return None


def ends_in_zeros(path: Path) -> bool:
    """Whether the last 64 KiB of a file of 1 MiB or more are zeros, as where a download reserved room and broke off."""
    if path.stat().st_size < _CHUNK:
        return False
    with path.open("rb") as file:
        file.seek(-_TAIL, os.SEEK_END)
        return not any(file.read(_TAIL))


def require_writable_dir(path: str | Path, flag: str) -> Path:
    """Create the folder `path` if needed and return it, or raise ConfigError naming `flag` when it can't be written.

    What killed runs have left half-written there is removed.
    """
    path = Path(path)
    try:
        make_folder(path)
        with tempfile.TemporaryFile(dir=path):
            pass
        remove_leftovers(path)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot write there ({error.strerror}); choose another folder") from None
    return path


def require_name(path: Path, setting: str) -> None:
    """Raise ConfigError, starting with `setting`, unless a file of this name can be written whole."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path), suffix=path.suffix)
        os.close(handle)
        Path(name).unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{setting}: names that begin so can't be written here ({reason}); use a shorter one, of letters and digits"
        ) from None


def fingerprint(path: str | Path) -> str:
    """16 hex digits that change with the content: SHA-256 of the whole file below 64 MiB, else of size and 64 samples.

    Sampling keeps the check of a multi-gigabyte checkpoint under a second; any re-save of one changes its header.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size < _HASH_WHOLE_BELOW:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        else:
            for i in range(64):
                file.seek(i * (size - _CHUNK) // 63)
                digest.update(file.read(_CHUNK))
    return digest.hexdigest()[:16]
