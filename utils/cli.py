"""Frozen dataclasses <-> command-line flags: a setting is declared once, as a field made by `option`."""

import argparse
import dataclasses
import errno
import logging
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from utils.errors import ConfigError, suggest
from utils.files import read_toml

log = logging.getLogger(__name__)

_LONGEST = 2000  # characters of an error message
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Section = TypeVar("Section")


def option(default: Any = dataclasses.MISSING, *, help: str, choices: Sequence[str] | None = None, **argparse_keywords):
    """A dataclass field that is also a flag `--<field name>`.

    The annotation gives the type: `str`, `int`, `float`, `Path`, `bool` (a switch), `X | None` (optional) or
    `tuple[X, ...]` (any number of values after the flag). Without a default the flag is required. Further keywords
    (`nargs`, `metavar`) go to argparse.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "argparse": argparse_keywords}
    )


class Stopped(Exception):  # noqa: N818 no error: the user asked for it
    """A run that ended before its end on request. The message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors: one line, exit code 1, the nearest known flag named."""

    config_flag: str | None = None

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        if self.config_flag:
            args = [*self._config_arguments(args), *args]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = suggest(unknown[0].split("=")[0], self._flags()) or "; --help lists the flags"
            raise ConfigError(f"unknown argument '{unknown[0]}'{hint}")
        return parsed

    def read_options_from(self, flag: str) -> None:
        """Add `flag FILE`: a TOML file of options, checked like the command line, which goes over it.

        Keys are flag names without hyphens in front; tables only group them.
        """
        self.config_flag = flag
        self.add_argument(flag, type=Path, help="TOML file with options; those of the command line go over it")

    def _config_arguments(self, args: list[str]) -> list[str]:
        """The options of the file that `args` name, as arguments."""
        path = file_named(self.config_flag, args)
        if path is None:
            return []
        if not path.suffix:
            path = path.with_suffix(".toml")
        place, arguments = f"{self.config_flag} {path}", []
        for key, value in _flattened(read_toml(path, self.config_flag)):
            action = self._action(key, place)
            tokens = _tokens(f"--{key}", action, value, place)
            try:
                if tokens:  # alone, so that what is wrong with it is told with its place
                    self._get_values(action, tokens[1:])
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
            except argparse.ArgumentError as error:
                raise ConfigError(f"{place}: {str(error).removeprefix('argument ')}") from None
            arguments += tokens
        return arguments

    def typed(self, options: Mapping[str, Any], place: str) -> argparse.Namespace:
        """Options by name, as JSON has them, checked like the command line's: what `parse_args` may start from.

        ConfigErrors start with `place`.
        """
        found = argparse.Namespace()
        for key, value in options.items():
            action = self._action(key, place)
            words = _tokens(f"--{key}", action, value, place)[1:]
            try:
                values = tuple(self._get_value(action, word) for word in words)
                for one in values:
                    self._check_value(action, one)
            except argparse.ArgumentError as error:
                raise ConfigError(f"{place}: {str(error).removeprefix('argument ')}") from None
            if action.nargs == 0:
                setattr(found, action.dest, value)
            elif value is False:
                continue  # as good as left out, like in TOML
            elif isinstance(action.nargs, int) and len(values) != action.nargs:
                raise ConfigError(f"{place}: {key} = {value!r}: takes {action.nargs} values")
            else:
                setattr(found, action.dest, values if action.nargs else values[0])
        return found

    def _action(self, key: str, place: str) -> argparse.Action:
        action = self._option_string_actions.get(f"--{key}")
        if action is None:
            raise ConfigError(f"{place}: unknown key '{key}'{suggest(f'--{key}', self._flags()).replace('--', '')}")
        return action

    def _flags(self) -> list[str]:
        return list(self._option_string_actions)


def add_fields(parser: argparse.ArgumentParser, *sections: type) -> None:
    """Add one flag per field of each dataclass, grouped under the first line of the class's docstring."""
    for section in sections:
        group = parser.add_argument_group((section.__doc__ or section.__name__).strip().splitlines()[0])
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if "help" in field.metadata:
                group.add_argument(f"--{field.name}", **_argparse_keywords(field, hints[field.name]))


def build(section: type[Section], args: argparse.Namespace) -> Section:
    """The dataclass filled from parsed arguments. Raises ConfigError when the class refuses the values."""
    names = [field.name for field in dataclasses.fields(section) if "help" in field.metadata]
    return section(**{name: getattr(args, name) for name in names})


def refuse(parser: argparse.ArgumentParser, flags: Mapping[str, str]) -> None:
    """Flags that other tools have and we do not support: using one is an error that gives the reason."""
    _add_known(parser, flags, _Refuse)


def ignore(parser: argparse.ArgumentParser, flags: Mapping[str, str]) -> None:
    """Flags that other tools have and that can't matter here: accepted with a warning that gives the reason."""
    _add_known(parser, flags, _Ignore)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: logging to stderr; a ConfigError is printed as one line and ends with exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a prompt or path must never end a run on a narrow console
    try:
        main()
    except ConfigError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped; everything finished so far is kept", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in _DISK_FULL and not error.filename:
            raise
        place = f" ({error.filename})" if error.filename else ""
        line = f"the disk is full{place}; finished files are intact: free space and run again"
        if error.errno not in _DISK_FULL:
            line = f"{error.filename}: {error.strerror}; check the path and its permissions"
        print(f"error: {_one_line(line)}", file=sys.stderr)
        sys.exit(1)


def _one_line(message: object) -> str:
    """Messages show values from files: line breaks and what steers a terminal go, and the middle of an endless one."""
    shown = (c if c.isprintable() or "\ud800" <= c <= "\udfff" else " " for c in str(message))  # those: odd file names
    line = " ".join("".join(shown).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"


def quiet_unless(main_process: bool) -> None:
    """Let only warnings through in the other processes of a run."""
    if not main_process:
        logging.getLogger().setLevel(logging.WARNING)


def file_named(flag: str, args: Sequence[str]) -> Path | None:
    """The file that `flag` names in a command line, before the rest of it is read."""
    finder = Parser(add_help=False)
    finder.add_argument(flag, type=Path, dest="path")
    return finder.parse_known_args(args)[0].path


def settings(*sections: Any) -> dict[str, Any]:
    """The settings of built sections by name, as TOML and JSON can hold them; what is unset is left out."""
    found: dict[str, Any] = {}
    for section in sections:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if "help" in field.metadata and value not in (None, ()):
                found[field.name] = [_plain(part) for part in value] if isinstance(value, tuple) else _plain(value)
    return found


def to_toml(*sections: Any) -> str:
    """The settings of built sections as TOML, which `read_options_from` reads again."""
    return tomli_w.dumps(settings(*sections))


def _plain(value: Any) -> Any:
    return value.as_posix() if isinstance(value, Path) else value


def _flattened(table: Mapping[str, Any]) -> typing.Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield key, value


def _tokens(flag: str, action: argparse.Action, value: Any, place: str) -> list[str]:
    """`flag` with the TOML value as the command line would give it; nothing for a switch that is off."""
    if isinstance(value, bool) and action.const is not None:  # a switch, or an option that may stand without a value
        return [flag] if value else []
    if isinstance(value, bool) or action.nargs == 0:
        if not isinstance(value, bool) or (action.nargs != 0 and value):
            kind = "true or false" if action.nargs == 0 else "no switch; give its value"
            raise ConfigError(f"{place}: {flag.lstrip('-')} = {value!r}: is {kind}")
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs is None:
        raise ConfigError(f"{place}: {flag.lstrip('-')} = {value!r}: takes one value, no list")
    return [flag, *map(str, values)]


def _argparse_keywords(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%")}
    required = field.default is dataclasses.MISSING
    kind, many = _value_type(hint)
    if kind is bool:
        return keywords | {"action": "store_true"}
    keywords |= {"type": kind, "choices": field.metadata["choices"], "required": required}
    if not required:
        keywords["default"] = field.default
        if field.default not in (None, (), ""):
            keywords["help"] += f" (default: {field.default})"
    if many:
        keywords |= {"nargs": "*", "action": _Tuple}
    return keywords | field.metadata["argparse"]


def _value_type(hint: Any) -> tuple[type, bool]:
    """`int | None` -> (int, False); `tuple[Path, ...]` -> (Path, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if hint not in (str, int, float, bool, Path):
        raise TypeError(f"no flag can be made from a field of type {hint}")
    return hint, False


def _add_known(parser: argparse.ArgumentParser, flags: Mapping[str, str], action: type[argparse.Action]) -> None:
    for flag, reason in flags.items():
        parser.add_argument(
            flag, action=action, nargs="*", help=argparse.SUPPRESS, const=reason, default=argparse.SUPPRESS
        )


class _Tuple(argparse.Action):
    """Values as a tuple, so that the section stays hashable."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class Collected(argparse.Action):
    """Values as a tuple, of all places where the flag stands; for `action=` of an `option`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise ConfigError(f"{option_string}: {self.const}")


class _Ignore(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        log.warning("%s has no effect: %s", option_string, self.const)
