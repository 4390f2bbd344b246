"""Command lines and option files to sections of settings and back; how a script ends."""

import argparse
import dataclasses
import errno
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from safetensors import SafetensorError

from utils import process
from utils.errors import TOO_MANY_FILES, ConfigError, suggest
from utils.files import read_toml
from utils.options import Option, built_sections, declared_options, flag_name, is_section
from utils.text import one_line, printable

log = logging.getLogger(__name__)

_LONGEST = 2000  # characters of an error message
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES_WORDS = ("Too many open files", "os error 24")  # of torch's workers; of safetensors
Built = TypeVar("Built")


class Stopped(Exception):  # noqa: N818 no error: the user asked for it
    """A run that ended before its end on request. The message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors: one line, exit code 1, the nearest known flag named."""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        self._known: dict[str, argparse.Action] = {}
        self._config_flag: str | None = None
        self._hints: dict[str, str] = {}
        # A name cut short would mean another flag, even a refused one, as soon as one is added.
        super().__init__(*positional, **{"allow_abbrev": False} | keywords)

    def add_argument(self, *flags: str, **keywords: Any) -> argparse.Action:
        """Add a flag or a positional argument, as argparse does."""
        return self.know(super().add_argument(*flags, **keywords))

    def know(self, action: argparse.Action) -> argparse.Action:
        """Remember what was added to one of this parser's groups, as a flag of option files."""
        self._known |= dict.fromkeys(action.option_strings, action)
        return action

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def parse_args(  # type: ignore[override] # argparse takes any object as a namespace, and lets it pass
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The values of all flags: those of the command line over those of the option file and of `namespace`."""
        args = sys.argv[1:] if args is None else list(args)
        if self._config_flag:
            args = [*self._config_arguments(self._config_flag, args), *args]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag in self._hints:
                raise ConfigError(f"{flag}: {self._hints[flag]}")
            raise ConfigError(
                f"unknown argument '{unknown[0]}'{suggest(flag, self._known) or '; --help lists the flags'}"
            )
        return parsed

    def hint(self, flags: Mapping[str, str]) -> None:
        """Say this of flags that do not exist, in place of the nearest known one."""
        self._hints |= flags

    def read_options_from(self, flag: str) -> None:
        """Add `flag FILE`: a TOML file of options, checked like the command line, which overrides it.

        Keys are flag names without hyphens in front; tables only group them.
        """
        self._config_flag = flag
        self.add_argument(flag, type=Path, help="TOML file with options; those on the command line override it")

    def _config_arguments(self, flag: str, args: list[str]) -> list[str]:
        """The options of the file that `flag` names in `args`, as arguments."""
        path = file_named(flag, args)
        if path is None:
            return []
        if not path.suffix:
            path = path.with_suffix(".toml")
        place, arguments = f"{flag} {path}", []
        for key, value in _flattened(read_toml(path, flag)):
            action = self._action(key, place)
            words = _words(key, action, value, place)
            for word in words or ():  # alone first, so that what is wrong with it is told with its place
                _value(f"--{key}", action, word, place)
            arguments += [] if words is None else [f"--{key}", *words]
        return arguments

    def typed(self, options: Mapping[str, Any], place: str) -> argparse.Namespace:
        """Options by name, as JSON has them, checked like the command line's: what `parse_args` may start from.

        ConfigErrors start with `place`.
        """
        found = argparse.Namespace()
        for key, value in options.items():
            action = self._action(key, place)
            words = _words(key, action, value, place) or []
            values = tuple(_value(f"--{key}", action, word, place) for word in words)
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
        action = self._known.get(f"--{key}")
        if action is None:
            raise ConfigError(f"{place}: unknown key '{key}'{suggest(f'--{key}', self._known).replace('--', '')}")
        return action


def add_fields(parser: Parser, *kinds: type) -> None:
    """Add the flags of sections and of groups of them: one flag per option.

    The flags of a section are grouped under the first line of its docstring. A group is a dataclass whose fields are
    sections or groups; their flags come in the order of the fields.
    """
    for section in (section for kind in kinds for section in _sections_of(kind)):
        group = parser.add_argument_group((section.__doc__ or section.__name__).strip().splitlines()[0])
        hints = typing.get_type_hints(section)
        for field, declared in declared_options(section):
            parser.know(
                group.add_argument(f"--{flag_name(field)}", **_argparse_keywords(field, declared, hints[field.name]))
            )


def build(section: type[Built], args: argparse.Namespace) -> Built:
    """The section filled from parsed arguments. Raises ConfigError when it refuses the values."""
    return section(**{field.name: getattr(args, flag_name(field)) for field, _ in declared_options(section)})


def build_group(group: type[Built], args: argparse.Namespace) -> Built:
    """The group with each of its sections filled from parsed arguments; the type of a field says which section it is.

    Fields of other types keep their defaults. Raises ConfigError when a section refuses its values.
    """
    if is_section(group):
        return build(group, args)
    hints = typing.get_type_hints(group).items()
    return group(**{name: build_group(kind, args) for name, kind in hints if _is_dataclass(kind)})


def _sections_of(kind: type) -> Iterator[type]:
    if is_section(kind):
        yield kind
    else:
        for part in filter(_is_dataclass, typing.get_type_hints(kind).values()):
            yield from _sections_of(part)


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def refuse(parser: Parser, flags: Mapping[str, str]) -> None:
    """Flags that other tools have and we do not support: using one is an error that gives the reason."""
    _add_known(parser, flags, _Refuse)


def ignore(parser: Parser, flags: Mapping[str, str]) -> None:
    """Flags that other tools have and that can't matter here: accepted with a warning that gives the reason."""
    _add_known(parser, flags, _Ignore)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: logging to stderr; a ConfigError is printed as one line and ends with exit code 1."""
    process.keep_messages_harmless()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Once())
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a prompt or path must never end a run on a narrow console
    try:
        with process.ended_by_signals():
            main()
        sys.stdout.flush()
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        # The reader has seen enough, as in `--explain | head`; Python's own flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ConfigError as error:
        print(f"error: {one_line(error, _LONGEST, keep_end=True)}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped; everything finished so far is kept", file=sys.stderr)
        sys.exit(130)
    except process.Ended as end:
        print(f"stopped by {end.name}; everything finished so far is kept", file=sys.stderr)
        sys.exit(128 + end.number)
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        line = _refused_by_the_system(error)
        if line is None:
            raise
        print(f"error: {one_line(line, _LONGEST, keep_end=True)}", file=sys.stderr)
        sys.exit(1)


def _refused_by_the_system(error: Exception) -> str | None:
    """The message for want of disk, files, memory or rights; None for any other error."""
    number, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number in _DISK_FULL:
        return f"the disk is full{f' ({file})' if file else ''}; finished files are intact: free space and run again"
    if number in TOO_MANY_FILES or any(words in str(error) for words in _TOO_MANY_FILES_WORDS):
        return "too many open files for the limit of this shell; run `ulimit -n 4096` and start again"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "the memory of the computer (not of the GPU) does not suffice; ask for smaller sizes or ranks"
    if isinstance(error, OSError) and file:
        return f"{file}: {error.strerror}; check the path and its permissions"
    return None


class _Printable(logging.Formatter):
    """Messages without what steers a terminal: they quote file names, recipes and prompts of other people."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Once(logging.Filter):
    """Lets the first record of each kind pass, of records that have one: `extra={"once": "transparent pixels"}`."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = getattr(record, "once", None)
        if kind is None:
            return True
        known = kind in self._seen
        self._seen.add(kind)
        return not known


def quiet_unless(main_process: bool) -> None:
    """Let only warnings through in the other processes of a run."""
    if not main_process:
        logging.getLogger().setLevel(logging.WARNING)


def file_named(flag: str, args: Sequence[str]) -> Path | None:
    """The file that `flag` names in a command line, before the rest of it is read."""
    finder = Parser(add_help=False)
    finder.add_argument(flag, type=Path, dest="path")
    found: Path | None = finder.parse_known_args(args)[0].path
    return found


def values(*groups: object) -> dict[str, Any]:
    """The value of each option of built sections, and of groups of them, by name."""
    sections = [section for group in groups for section in built_sections(group)]
    return {flag_name(field): getattr(one, field.name) for one in sections for field, _ in declared_options(type(one))}


def settings(*groups: object) -> dict[str, Any]:
    """`values` as TOML and JSON can hold them; what is unset is left out."""
    found = {name: value for name, value in values(*groups).items() if value not in (None, ())}
    return {name: [*map(_plain, value)] if isinstance(value, tuple) else _plain(value) for name, value in found.items()}


def to_toml(*groups: object) -> str:
    """The settings of built sections as TOML, which `read_options_from` reads again."""
    return tomli_w.dumps(settings(*groups))


def _plain(value: Any) -> Any:
    return value.as_posix() if isinstance(value, Path) else value


def _flattened(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield key, value


def _words(key: str, action: argparse.Action, value: Any, place: str) -> list[str] | None:
    """The words that would follow the flag `--key` for a TOML value; None for a switch that is off."""
    if isinstance(value, bool) and action.const is not None:  # a switch, or an option that may stand without a value
        return [] if value else None
    if isinstance(value, bool) or action.nargs == 0:
        if not isinstance(value, bool) or (action.nargs != 0 and value):
            kind = "true or false" if action.nargs == 0 else "not a switch; give its value"
            raise ConfigError(f"{place}: {key} = {value!r}: is {kind}")
        return [] if value else None
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs is None:
        raise ConfigError(f"{place}: {key} = {value!r}: takes one value, not a list")
    return [*map(str, values)]


def _value(flag: str, action: argparse.Action, word: str, place: str) -> Any:
    """The value that one word after `flag` stands for, which may begin with a hyphen."""
    reader = Parser(add_help=False)
    reader.add_argument(flag, dest="value", type=action.type, choices=action.choices)
    try:
        return reader.parse_args([f"{flag}={word}"]).value
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _argparse_keywords(field: "dataclasses.Field[Any]", declared: Option, hint: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = {"help": declared.help.replace("%", "%%")}
    required = field.default is dataclasses.MISSING
    kind, many = value_type(hint)
    if kind is bool:
        return keywords | {"action": "store_true"}
    keywords |= {"type": kind, "choices": declared.choices, "required": required}
    if not required:
        keywords["default"] = field.default
        if field.default not in (None, (), ""):
            keywords["help"] += f" (default: {field.default})"
    if many:
        keywords |= {"nargs": "*", "action": _Tuple}
    return keywords | declared.argparse_keywords


def value_type(hint: Any) -> tuple[type, bool]:
    """`int | None` -> (int, False); `tuple[Path, ...]` -> (Path, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if hint not in (str, int, float, bool, Path):
        raise TypeError(f"no flag can be made from a field of type {hint}")
    return hint, False


def _add_known(parser: Parser, flags: Mapping[str, str], action: type[argparse.Action]) -> None:
    for flag, reason in flags.items():
        parser.add_argument(
            flag, action=action, nargs="*", help=argparse.SUPPRESS, const=reason, default=argparse.SUPPRESS
        )


class _Tuple(argparse.Action):
    """Values as a tuple, so that the section stays hashable."""

    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class Collected(argparse.Action):
    """Values as a tuple, of all places where the flag stands; for `action=` of an `option`."""

    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


class _Refuse(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        raise ConfigError(f"{option_string}: {self.const}")


class _Ignore(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        log.warning("%s has no effect: %s", option_string, self.const)
