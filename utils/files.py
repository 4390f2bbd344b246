"""Files that appear whole or not at all, and fingerprints that tell whether a file is still the same."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import ConfigError

_CHUNK = 1 << 20
_HASH_WHOLE_BELOW = 64 << 20


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results get the user's usual rights
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_file(path: str | Path, flag: str) -> Path:
    """Return `path`, or raise ConfigError naming `flag` when it is no readable file."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ConfigError(f"{flag} {path}: {kind}; check the path")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{flag} {path}: is not readable; check its permissions")
    return path


def require_writable_dir(path: str | Path, flag: str) -> Path:
    """Create the folder `path` if needed and return it, or raise ConfigError naming `flag` when it can't be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot write there ({error.strerror}); choose another folder") from None
    return path


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
