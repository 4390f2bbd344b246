"""Command lines and option files to sections of settings and back; how a script ends."""

import argparse
import dataclasses
import errno
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from safetensors import SafetensorError

from utils import logs, process
from utils.errors import TOO_MANY_FILES, ConfigError, suggest
from utils.options import Option, built_sections, declared_options, flag_name, is_section
from utils.parsing import read_toml
from utils.text import one_line

log = logging.getLogger(__name__)

_LONGEST = 2000  # characters of an error message
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES_WORDS = ("Too many open files", "os error 24")  # of torch's workers; of safetensors
_NEGATIVE_NUMBER = re.compile(r"-(\d[\d_]*\.?[\d_]*|\.\d+)(e[+-]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE)
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
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse's own knows no exponents

    def add_argument(self, *flags: str, **keywords: Any) -> argparse.Action:
        """Add a flag or a positional argument, as argparse does."""
        return self.know(super().add_argument(*flags, **keywords))

    def know(self, action: argparse.Action) -> argparse.Action:
        """Remember what was added to one of this parser's groups, as a flag of option files."""
        self._known |= dict.fromkeys(action.option_strings, action)
        return action

    def error(self, message: str) -> typing.NoReturn:
        if "expected one argument" in message:
            message += "; a value that begins with a hyphen is given as --flag=-value"
        raise ConfigError(message.removeprefix("argument "))

    def parse_args(  # type: ignore[override] # argparse takes any object as a namespace, and lets it pass
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The values of all flags: those of the command line over those of the option file and of `namespace`."""
        args = sys.argv[1:] if args is None else list(args)
        namespace = namespace or argparse.Namespace()
        from_file = self._options_of_file(args)
        vars(namespace).update(vars(from_file))
        given = [action for action in self._known.values() if action.required and action.dest in from_file]
        for action in given:
            action.required = False  # argparse looks at the command line alone
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
        finally:
            for action in given:
                action.required = True
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag in self._hints:
                raise ConfigError(f"{flag}: {self._hints[flag]}")
            raise ConfigError(
                f"unknown argument '{unknown[0]}'{suggest(flag, self._known) or '; --help lists the flags'}"
            )
        return parsed

    def parse_known_args(  # type: ignore[override] # as above
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The values, and the words that mean nothing. Raises ConfigError for a list that is given twice.

        argparse calls it for the commands of subparsers too.
        """
        args = sys.argv[1:] if args is None else list(args)
        self._check_repeated(args)
        return super().parse_known_args(args, namespace)

    def _check_repeated(self, args: list[str]) -> None:
        """Raise ConfigError for a second list of values, and warn of a second value, where only the last counts."""
        found: dict[str, list[str]] = {}
        for flag, words in _flags_with_words(args, self._known):
            action, before = self._known[flag], found.get(flag)
            counts_last = isinstance(action, (_Tuple, argparse._StoreAction))
            if counts_last and before is not None and before != words:
                if action.nargs in ("*", "+"):
                    values = " ".join([*before, *words])
                    raise ConfigError(f"{flag} is given twice; write all values after one: {flag} {values}")
                log.warning("%s is given twice: %s counts, %s does not", flag, " ".join(words), " ".join(before))
            found[flag] = words

    def hint(self, flags: Mapping[str, str]) -> None:
        """Say this of flags that do not exist, in place of the nearest known one."""
        self._hints |= flags

    def read_options_from(self, flag: str) -> None:
        """Add `flag FILE`: a TOML file of options, checked like the command line, which overrides it.

        Keys are flag names without hyphens in front; tables only group them.
        """
        self._config_flag = flag
        self.add_argument(flag, type=Path, help="TOML file with options; those on the command line override it")

    def _options_of_file(self, args: list[str]) -> argparse.Namespace:
        """The options of the file that `args` names, if any."""
        flag = self._config_flag
        path = None if flag is None else file_named(flag, args)
        if flag is None or path is None:
            return argparse.Namespace()
        if not path.suffix:
            path = path.with_suffix(".toml")
        options: dict[str, Any] = {}
        for key, value in _flattened(read_toml(path, flag)):
            if key in options:
                raise ConfigError(f"{flag} {path}: {key} is given twice, in different tables; remove one")
            options[key] = value
        return self.typed(options, f"{flag} {path}")

    def typed(self, options: Mapping[str, Any], place: str) -> argparse.Namespace:
        """Options by name, as TOML and JSON have them, checked like the command line's: what `parse_args` starts from.

        ConfigErrors start with `place`.
        """
        found = argparse.Namespace()
        for key, value in options.items():
            action = self._action(key, place)
            words = _words(key, action, value, place)
            values = tuple(_value(f"--{key}", action, word, place) for word in words or ())
            if isinstance(action, _Refuse | _Ignore):
                if words is not None:
                    action(self, found, values, f"--{key}")
            elif action.nargs == 0:
                setattr(found, action.dest, value)
            elif words is None:
                continue  # as good as left out
            elif isinstance(action.nargs, int) and len(values) != action.nargs:
                raise ConfigError(f"{place}: {key} = {value!r}: takes {action.nargs} values")
            elif action.nargs in (None, "?"):
                setattr(found, action.dest, values[0] if values else action.const)
            else:
                setattr(found, action.dest, values)
        return found

    def _action(self, key: str, place: str) -> argparse.Action:
        known = {
            flag.removeprefix("--"): action  # hyphens would make any two names alike
            for flag, action in self._known.items()
            if flag != self._config_flag and not isinstance(action, argparse._HelpAction)
        }
        action = known.get(key) if f"--{key}" in self._known else None
        if action is None:
            raise ConfigError(f"{place}: unknown key '{key}'{suggest(key, known)}")
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
    process.leave_ascii()
    process.keep_messages_harmless()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(logs.Once())
    handler.setFormatter(logs.Printable("%(message)s"))
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


def file_named(flag: str, args: Sequence[str]) -> Path | None:
    """The file that `flag` names in a command line, before the rest of it is read."""
    finder = Parser(add_help=False)
    finder.add_argument(flag, type=Path, dest="path")
    found: Path | None = argparse.ArgumentParser.parse_known_args(finder, args)[0].path
    return found


def values(*groups: object) -> dict[str, Any]:
    """The value of each option of built sections, and of groups of them, by name."""
    return {flag_name(field): value for field, value in _filled(*groups)}


def settings(*groups: object) -> dict[str, Any]:
    """`values` as TOML and JSON can hold them; what is unset is left out."""
    return {
        flag_name(field): [*map(_plain, value)] if isinstance(value, tuple) else _plain(value)
        for field, value in _filled(*groups)
        if value is not None and (value != () or field.default != ())
    }


def _filled(*groups: object) -> Iterator[tuple["dataclasses.Field[Any]", Any]]:
    for one in (section for group in groups for section in built_sections(group)):
        for field, _ in declared_options(type(one)):
            yield field, getattr(one, field.name)


def to_toml(*groups: object) -> str:
    """The settings of built sections as TOML, which `read_options_from` reads again."""
    return tomli_w.dumps(settings(*groups))


def _plain(value: Any) -> Any:
    return value.as_posix() if isinstance(value, Path) else value


def _flags_with_words(args: list[str], known: Mapping[str, argparse.Action]) -> Iterator[tuple[str, list[str]]]:
    """Each known flag of a command line, with the words that stand between it and the next one."""
    if "--" in args:
        args = args[: args.index("--")]
    starts = [i for i, word in enumerate(args) if word.split("=")[0] in known]
    for start, end in zip(starts, [*starts[1:], len(args)], strict=False):
        flag, equals, value = args[start].partition("=")
        yield flag, [*([value] if equals else []), *args[start + 1 : end]]


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
    """The value that one word after `flag` stands for, which may be any word: argparse drops '--'."""
    read = action.type or str
    try:
        value = read(word) if callable(read) else word
    except ValueError:
        name = getattr(read, "__name__", read)
        raise ConfigError(f"{place}: {flag}: invalid {name} value: {word!r}") from None
    if action.choices is not None and value not in action.choices:
        known = ", ".join(map(repr, action.choices))
        raise ConfigError(f"{place}: {flag}: invalid choice: {word!r} (choose from {known})")
    return value


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
