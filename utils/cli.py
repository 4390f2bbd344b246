"""Frozen dataclasses <-> command-line flags: a setting is declared once, as a field made by `option`."""

import argparse
import dataclasses
import logging
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import ConfigError, suggest

log = logging.getLogger(__name__)
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


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors: one line, exit code 1, the nearest known flag named."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            hint = suggest(name, flags) or "; --help lists the flags"
            raise ConfigError(f"unknown argument '{unknown[0]}'{hint}")
        return parsed


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
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; everything finished so far is kept", file=sys.stderr)
        sys.exit(130)


def quiet_unless(main_process: bool) -> None:
    """Let only warnings through in the other processes of a run."""
    if not main_process:
        logging.getLogger().setLevel(logging.WARNING)


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


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise ConfigError(f"{option_string}: {self.const}")


class _Ignore(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        log.warning("%s has no effect: %s", option_string, self.const)
