"""Shared by both kinds of cache files: writing them whole, opening them, and when one is out of date."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import ConfigError
from utils.files import name_key, written_whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

RECIPE = 2  # raise it when the same images, captions and models give other tensors than before

_COMMON_METADATA = {"architecture": "wan", "format_version": "1.0.1"}


def remove_except(caches: Iterable[Path], keep: Collection[Path]) -> list[Path]:
    """Delete the listed caches that are not in `keep`; returns them.

    One that `keep` has in another Unicode form stays only where the system takes both forms for one name: elsewhere it
    is another file, of an image that was renamed.
    """
    listed = set(caches)
    kept, there = set(map(name_key, keep)), {name_key(path) for path in listed & set(keep)}
    removed = [path for path in sorted(listed - set(keep)) if (key := name_key(path)) not in kept or key in there]
    for path in removed:
        path.unlink()
    return removed


def strangers(caches: Iterable[Path], keep: Collection[Path], source: str) -> dict[str, list[Path]]:
    """Folder or list -> its caches, of those listed that are neither in `keep` nor of `source`.

    Only folders and lists that are still there count, and caches that name theirs.
    """
    kept, found = set(map(name_key, keep)), dict[str, list[Path]]()
    for path in caches:
        if (
            name_key(path) not in kept
            and (other := _recorded_source(path)) not in ("", source)
            and Path(other).exists()
            and not Path(other).samefile(source)
        ):
            found.setdefault(other, []).append(path)
    return found


def _recorded_source(path: Path) -> str:
    """The folder or list that a cache names as the source of its item; empty where it names none."""
    try:
        with opened(path, "") as file:
            settings = json.loads((file.metadata() or {}).get("settings", "{}"))
        return str(settings.get("source", ""))
    except (ConfigError, ValueError, AttributeError):
        return ""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: "DataclassInstance | None"
) -> None:
    """Write a cache whole, from tensors on any device, with `settings` as JSON in its metadata.

    A run syncs what it has written at its end. NaNs become 0 with a warning, as in the reference.
    """
    metadata = {**metadata, **_COMMON_METADATA}
    metadata.pop("settings", None)
    if settings is not None:
        metadata["settings"] = json.dumps(asdict(settings))
    with written_whole(path, durable=False) as temporary:
        save_file({key: _clean(path, key, tensor) for key, tensor in tensors.items()}, temporary, metadata)


def _clean(path: Path, key: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point() and (missing := tensor.isnan()).any():
        log.warning("%s: %s holds %d NaNs; replaced by 0", path, key, int(missing.sum()))
        tensor = tensor.masked_fill(missing, 0)
    return tensor


@contextmanager
def opened(path: Path, script: str) -> Iterator[Any]:
    """The open safetensors file. Raises ConfigError, naming the script that makes it anew, when it can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); delete it and run {script} again") from None


def keys_of(file: Any) -> list[str]:
    """Keys of the tensors of an open file."""
    return list(file.keys())


def find_key(file: Any, pattern: re.Pattern[str]) -> str | None:
    """The first key of an open file that matches as a whole."""
    return next((key for key in keys_of(file) if pattern.fullmatch(key)), None)


def changed_reason(
    path: Path,
    metadata: Mapping[str, str],
    expected: "DataclassInstance",
    reasons: Mapping[str, str],
    warned: set[Path],
) -> str | None:
    """The reason of the first setting that differs from the recorded one, or None.

    reasons: by name of the setting; `{} -> {}` in one shows both values. A file without settings is kept, with a
    warning unless its folder is in `warned`, to which the folder is added.
    """
    if "settings" not in metadata:
        if path.parent not in warned:
            warned.add(path.parent)
            log.warning(
                "%s: holds caches without recorded settings (made by musubi-tuner); they are kept where their size "
                "fits. Run without --skip_existing to replace them",
                path.parent,
            )
        return None
    try:
        recorded = dict(json.loads(metadata["settings"]))
    except ValueError:
        return "unreadable settings"
    wanted = json.loads(json.dumps(asdict(expected)))  # tuples become lists, as in the file
    for key, reason in reasons.items():
        if recorded.get(key) != wanted[key]:
            return reason.format(recorded.get(key), wanted[key])
    return None
