"""Prompts with options, from a line, a text, TOML or JSON file (docs/formats.md#prompt-lines)."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, suggest
from utils.files import parse_json, read_toml, require_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One image to make, as far as it was specified: None leaves the value to the command line or the task.

    The field names are the keys of TOML and JSON prompt files.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    frame_count: int | None = None  # no effect: one-frame use makes one image
    seed: int | None = None
    sample_steps: int | None = None
    cfg_scale: float | None = None
    guidance_scale: float | None = None  # embedded guidance, which Wan does not have
    discrete_flow_shift: float | None = None
    image_path: str | None = None
    end_image_path: str | None = None
    control_image_path: tuple[str, ...] | None = None
    control_image_mask_path: tuple[str, ...] | None = None
    one_frame: str | None = None
    place: str = "prompt"  # where it stands, for messages

    def over(self, base: "Prompt") -> "Prompt":
        """These values, and those of `base` wherever this prompt leaves one open."""
        given = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        return replace(base, **given)


_KEYS = tuple(field.name for field in fields(Prompt) if field.name != "place")

# Option letters of a prompt line -> (key, how its text is read).
_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "f": ("frame_count", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("cfg_scale", float),
    "g": ("guidance_scale", float),
    "fs": ("discrete_flow_shift", float),
    "n": ("negative_prompt", str),
    "i": ("image_path", str),
    "ei": ("end_image_path", str),
    "ci": ("control_image_path", str),
    "cim": ("control_image_mask_path", str),
    "of": ("one_frame", str),
}
_UNSUPPORTED = {"cn": "control videos belong to Fun-Control models, which are not supported"}
_COLLECTED = ("control_image_path", "control_image_mask_path")


def parse_line(line: str, place: str, *, training: bool) -> Prompt:
    """`text --w 384 --h 576 --of target_index=1,control_index=0 ...` -> Prompt.

    Options start at a blank and two hyphens; the last of a repeated one wins, `--ci` and `--cim` collect. The text
    before the first option is never read as an option. In generation `--g` is another name of `--l`, as in the
    reference; in `training` it is embedded guidance, which Wan does not have, and a negative seed means a random one.
    Raises ConfigError naming `place` and the option.
    """
    text, *pieces = re.split(r"\s--(?=\S)", " " + line.strip())
    values: dict[str, Any] = {"prompt": text.strip()}
    for piece in pieces:
        name, _, argument = piece.strip().partition(" ")
        name, argument = name.lower(), argument.strip()
        if name in _UNSUPPORTED:
            raise ConfigError(f"{place}: --{name}: {_UNSUPPORTED[name]}")
        if name not in _OPTIONS:
            raise ConfigError(
                f"{place}: unknown option --{name}{suggest(name, _OPTIONS)}; known: --{' --'.join(_OPTIONS)}"
            )
        key, read = _OPTIONS[name]
        if name == "g" and not training:
            key = "cfg_scale"
        if not argument and name != "n":
            raise ConfigError(f"{place}: --{name} has no value")
        value = _read(read, argument, f"{place}: --{name} {argument}")
        values[key] = (*values.get(key, ()), value) if key in _COLLECTED else value
    return _checked(values, place, training)


def parse_value(key: str, text: str, place: str) -> Prompt:
    """The text of one value, a number or a string, -> Prompt with nothing else set. `key` is that of TOML files.

    Raises ConfigError, starting with `place`, for a value that a prompt line could not have.
    """
    return _checked({key: _read(dict(_OPTIONS.values())[key], text, f"{place}: {key} = {text}")}, place, training=False)


def _read(read: Callable[[str], Any], text: str, place: str) -> Any:
    try:
        return read(text)
    except ValueError:
        raise ConfigError(f"{place}: is no {'whole number' if read is int else 'number'}") from None


def read_file(path: Path, flag: str, *, training: bool) -> list[Prompt]:
    """The prompts of a `.txt`, `.json` or `.toml` file; in generation any other file is read as text lines.

    Raises ConfigError naming the file, the place in it and the fix; also when there is no prompt in it.
    """
    require_file(path, flag)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: is not UTF-8 text; save it as UTF-8") from None
    suffix = path.suffix.lower()
    if suffix == ".json":
        prompts = list(_from_json(text, path, training))
    elif suffix == ".toml":
        prompts = list(_from_toml(path, flag, training))
    elif suffix == ".txt" or not training:
        prompts = list(_from_lines(text.splitlines(), path, training))
    else:
        raise ConfigError(f"{flag} {path}: unknown kind of prompt file '{suffix}'; use .txt, .toml or .json")
    if not prompts:
        raise ConfigError(f"{flag} {path}: holds no prompt; write one per line")
    return prompts


def _from_lines(lines: Iterable[str], path: Path, training: bool) -> Iterator[Prompt]:
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.strip().startswith("#"):
            yield parse_line(line, f"{path}:{number}", training=training)


def _from_json(text: str, path: Path, training: bool) -> Iterator[Prompt]:
    try:
        entries = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}; fix the JSON") from None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: must be a list of prompts, is a {type(entries).__name__}")
    for i, entry in enumerate(entries):
        if isinstance(entry, str):
            yield parse_line(entry, f"{path}[{i}]", training=training)
        else:
            yield _from_dict(entry, f"{path}[{i}]", training)


def _from_toml(path: Path, flag: str, training: bool) -> Iterator[Prompt]:
    tables = read_toml(path, flag)
    shared = tables.get("prompt")
    if not isinstance(shared, dict) or len(tables) != 1:
        raise ConfigError(
            f"{path}: must hold a table [prompt] (shared keys) with [[prompt.subset]] entries, and no other"
        )
    subsets = shared.pop("subset", [{}])
    if not isinstance(subsets, list):
        raise ConfigError(f"{path}: prompt.subset must be an array of tables; write [[prompt.subset]]")
    for i, subset in enumerate(subsets):
        yield _from_dict({**shared, **subset}, f"{path}: prompt.subset[{i}]", training)


def _from_dict(entry: Any, place: str, training: bool) -> Prompt:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: must be a prompt line or a table of options, is a {type(entry).__name__}")
    values = {}
    for key, value in entry.items():
        if key == "control_video_path":
            raise ConfigError(f"{place}: {key}: {_UNSUPPORTED['cn']}")
        if key not in _KEYS:
            raise ConfigError(f"{place}: unknown key '{key}'{suggest(key, _KEYS)}")
        if key in _COLLECTED:
            value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        values[key] = _typed(key, value, place)
    return _checked(values, place, training)


def _typed(key: str, value: Any, place: str) -> Any:
    readers = dict(_OPTIONS.values())
    expected = {int: (int,), float: (int, float), str: (str,)}[readers.get(key, str)]
    for part in value if key in _COLLECTED and isinstance(value, tuple) else (value,):
        if not isinstance(part, expected) or isinstance(part, bool):
            raise ConfigError(f"{place}: {key} = {value!r}: must be a {expected[-1].__name__}")
    try:
        return float(value) if float in expected else value
    except OverflowError:
        raise ConfigError(f"{place}: {key}: has too many digits") from None


def _checked(values: dict[str, Any], place: str, training: bool) -> Prompt:
    prompt = Prompt(**values, place=place)
    for name, low, high in (("width", 16, 1 << 14), ("height", 16, 1 << 14), ("sample_steps", 1, 1000)):
        value = getattr(prompt, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{place}: {name} = {value}: must be {low} to {high}")
    if prompt.guidance_scale is not None:
        log.warning("%s: --g (embedded guidance) has no effect on Wan; --l sets the guidance scale", place)
    if training and prompt.seed is not None and prompt.seed < 0:
        prompt = replace(prompt, seed=None)
    return prompt
