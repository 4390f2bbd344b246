"""Prompts with options, from a line, a text, TOML or JSON file (docs/formats.md#prompt-lines)."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, suggest
from utils.files import require_file
from utils.parsing import parse_json, read_toml
from wan.generation.prompt import LETTERS, OPTIONS, Prompt, PromptOption

log = logging.getLogger(__name__)

_KINDS = {int: "a whole number", float: "a number", str: "text in quotes"}
_UNSUPPORTED = {"cn": "control videos belong to Fun-Control models, which are not supported"}


@dataclass(frozen=True)
class Dialect:
    """Rules of prompts in which the programs of musubi-tuner differ."""

    keys: Mapping[str, str] = field(default_factory=dict)  # letters in prompt lines -> key, where it is another one
    negative_seed_is_random: bool = False
    needs_suffix: bool = (
        False  # refuses files of other names than .txt, .toml and .json instead of reading them as text
    )


GENERATION = Dialect(keys={"g": "cfg_scale"})
"""`--g` is another name of `--l`."""

TRAINING = Dialect(negative_seed_is_random=True, needs_suffix=True)
"""`--g` is embedded guidance, which Wan does not have."""


def parse_line(line: str, place: str, dialect: Dialect) -> Prompt:
    """`text --w 384 --h 576 --of target_index=1,control_index=0 ...` -> Prompt.

    Options start at a blank and two hyphens; the last of a repeated one wins, with a warning where the values differ;
    `--ci` and `--cim` collect. The text before the first option is never read as an option. Raises ConfigError naming
    `place` and the option.
    """
    text, *pieces = re.split(r"\s--(?=\S)", " " + line.strip())
    values: dict[str, Any] = {"prompt": text.strip()}
    for piece in pieces:
        name, argument = [*piece.split(maxsplit=1), ""][:2]  # by any blank: tabs and full-width ones too
        name, argument = name.lower(), argument.strip()
        if name in _UNSUPPORTED:
            raise ConfigError(f"{place}: --{name}: {_UNSUPPORTED[name]}")
        if name not in LETTERS:
            raise ConfigError(f"{place}: unknown option --{name}{_meant(name)}; known: --{' --'.join(LETTERS)}")
        if not argument and name != "n":
            raise ConfigError(f"{place}: --{name} has no value")
        option = LETTERS[name]
        key = dialect.keys.get(name, option.key)
        value = _read(option.kind, argument, f"{place}: --{name} {argument}")
        if not option.is_list and key in values and values[key] != value and key != "prompt":
            log.warning("%s: --%s is given twice: %s counts, %s does not", place, name, value, values[key])
        values[key] = (*values.get(key, ()), value) if option.is_list else value
    return _checked(values, place, dialect)


def _meant(name: str) -> str:
    """A hint for what is no option of prompt lines: `--seed 7` and `--d=7` of the command line are `--d 7` there."""
    given, equals, _ = name.partition("=")
    names = {name: letters for letters, option in LETTERS.items() for name in (option.flag, option.key, letters)}
    if given == "video_size":
        return "; here it is --w and --h"
    if given in names and (equals or given not in LETTERS):
        return f"; here it is --{names[given]}, a blank and the value"
    return suggest(name, LETTERS)


def parse_value(option: PromptOption, text: str, place: str) -> Prompt:
    """The text of one value -> Prompt with nothing else set.

    Raises ConfigError, starting with `place`, for a value that a prompt line could not have.
    """
    value = _read(option.kind, text, f"{place}: {option.key} = {text}")
    return _checked({option.key: value}, place, GENERATION)


def _read(kind: type, text: str, place: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{place}: is not a {'whole number' if kind is int else 'number'}") from None


def read_file(path: Path, flag: str, dialect: Dialect) -> list[Prompt]:
    """The prompts of a `.txt`, `.json` or `.toml` file.

    Raises ConfigError naming the file, the place in it and the fix; also when there is no prompt in it.
    """
    require_file(path, flag)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: is not UTF-8 text; save it as UTF-8") from None
    suffix = path.suffix.lower()
    if suffix == ".json":
        prompts = list(_from_json(text, path, dialect))
    elif suffix == ".toml":
        prompts = list(_from_toml(path, flag, dialect))
    elif suffix == ".txt" or not dialect.needs_suffix:
        prompts = list(_from_lines(text.split("\n"), path, dialect))
    else:
        raise ConfigError(f"{flag} {path}: unknown kind of prompt file '{suffix}'; use .txt, .toml or .json")
    if not prompts:
        raise ConfigError(f"{flag} {path}: holds no prompt; write one per line")
    return prompts


def _from_lines(lines: Iterable[str], path: Path, dialect: Dialect) -> Iterator[Prompt]:
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.strip().startswith("#"):
            yield parse_line(line, f"{path}:{number}", dialect)


def _from_json(text: str, path: Path, dialect: Dialect) -> Iterator[Prompt]:
    try:
        entries = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}; fix the JSON") from None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: must be a list of prompts, is a {type(entries).__name__}")
    for i, entry in enumerate(entries):
        if isinstance(entry, str):
            yield parse_line(entry, f"{path}[{i}]", dialect)
        else:
            yield _from_dict(entry, f"{path}[{i}]", dialect)


def _from_toml(path: Path, flag: str, dialect: Dialect) -> Iterator[Prompt]:
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
        yield _from_dict(
            {**shared, **subset} if isinstance(subset, dict) else subset, f"{path}: prompt.subset[{i}]", dialect
        )


def _from_dict(entry: Any, place: str, dialect: Dialect) -> Prompt:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: must be a prompt line or a table of options, is a {type(entry).__name__}")
    values = {}
    for key, value in entry.items():
        if key == "control_video_path":
            raise ConfigError(f"{place}: {key}: {_UNSUPPORTED['cn']}")
        if key not in OPTIONS:
            raise ConfigError(f"{place}: unknown key '{key}'{suggest(key, OPTIONS)}")
        values[key] = _typed(OPTIONS[key], value, place)
    return _checked(values, place, dialect)


def _typed(option: PromptOption, value: Any, place: str) -> Any:
    """A value of TOML or JSON as `Prompt` has it. One string may stand for a list of one."""
    if option.is_list and isinstance(value, str | list):
        value = (value,) if isinstance(value, str) else tuple(value)
    expected = (int, float) if option.kind is float else (option.kind,)
    for part in value if option.is_list and isinstance(value, tuple) else (value,):
        if not isinstance(part, expected) or isinstance(part, bool):
            raise ConfigError(f"{place}: {option.key} = {value!r}: must be {_KINDS[option.kind]}")
    try:
        return float(value) if option.kind is float else value
    except OverflowError:
        raise ConfigError(f"{place}: {option.key}: has too many digits") from None


def _checked(values: dict[str, Any], place: str, dialect: Dialect) -> Prompt:
    prompt = Prompt(**values, place=place)
    for key, option in OPTIONS.items():
        option.check(getattr(prompt, key), f"{place}: {key} = {getattr(prompt, key)}")
    if prompt.guidance_scale is not None:
        log.warning("%s: --g (embedded guidance) has no effect on Wan; --l sets the guidance scale", place)
    if dialect.negative_seed_is_random and prompt.seed is not None and prompt.seed < 0:
        prompt = replace(prompt, seed=None)
    return prompt
