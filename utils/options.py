"""Settings as frozen dataclasses: what is declared once as a field is a flag, a key of option files and a rule."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from utils.errors import ConfigError

_OFF = (None, False, 0, (), "none")  # values of an option that asks for nothing


@dataclass(frozen=True)
class Option:
    """Declaration of an option beside the name, type and default of its field."""

    help: str
    flag: str | None
    choices: Sequence[str] | None
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    rule: str | None
    needs: str | None
    any_bytes: bool
    finite: bool
    argparse_keywords: dict[str, Any]

    KEY: ClassVar[str] = "option"  # of the metadata of a dataclass field

    def admits(self, value: Any) -> bool:
        """Whether a value, or each of a tuple, is within the bounds. None, the unset option, always is."""
        if value is None or isinstance(value, tuple):
            return all(map(self.admits, value or ()))
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def bounds(self) -> str:
        """The rule as a message says it: `must be at least 1`."""
        if self.rule is not None:
            return self.rule
        if self.minimum is not None and self.maximum is not None:
            return f"must be {self.minimum:g} to {self.maximum:g}"
        words = {"at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        return "must be " + " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    rule: str | None = None,
    needs: str | None = None,
    any_bytes: bool = False,
    finite: bool = True,
    **argparse_keywords: Any,
) -> Any:
    """A field of a `Section` that is also a flag `--<field name>`, or `--<flag>` where that is given.

    The annotation gives the type: `str`, `int`, `float`, `Path`, `bool` (a switch), `X | None` (optional) or
    `tuple[X, ...]` (any number of values after the flag). Without a default the flag is required.

    minimum, maximum: the smallest and largest value that is allowed; above, below: values that are just not allowed.
    They hold for each value of a tuple; an unset option (None) has none. A value beyond them is a ConfigError
    `--steps 0: must be at least 1`.
    rule: replaces those last words, to add an example or a special value: `rule="must be above 0; try 1e-4"`.
    needs: the flag without which this one means nothing, in the words of the message: `needs="--logging_dir FOLDER"`
    gives `--log_with wandb needs --logging_dir FOLDER`. An option is unset when it is None, False, 0, empty or "none".
    any_bytes: text and paths may hold bytes that are not UTF-8, which Python has as lone surrogates: for files that are
    opened by Python alone and are named in no file. Others are refused; safetensors opens no such file.
    finite: False leaves NaN and infinity to a rule of the section, which says more; else they are refused.
    Further keywords (`nargs`, `metavar`) go to argparse.
    """
    bounds = (minimum, maximum, above, below)
    declared = Option(help, flag, choices, *bounds, rule, needs, any_bytes, finite, argparse_keywords)
    return dataclasses.field(default=default, metadata={Option.KEY: declared})


@dataclass(frozen=True)
class Section:
    """Settings of one subject: the base of a frozen dataclass whose fields are made by `option`.

    Making one is pure: it looks at the values alone, at no file, environment or device. A section with rules of its
    own extends `__post_init__`, and begins it with `super().__post_init__()`.
    """

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that is no text or beyond its bounds, or an option without what it needs.

        No number may be NaN or infinite.
        """
        for field, declared in declared_options(type(self)):
            value = getattr(self, field.name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            _check_text(f"--{flag_name(field)}", value, declared.any_bytes)
            if not declared.admits(value):
                raise ConfigError(f"--{flag_name(field)} {shown}: {declared.bounds}")
            if declared.finite and not all(map(math.isfinite, _floats(value))):
                raise ConfigError(f"--{flag_name(field)} {shown}: must be a finite number")
        for field, declared in declared_options(type(self)):
            value = getattr(self, field.name)
            if declared.needs is not None and value not in _OFF:
                needed = declared.needs.split()[0].strip("-,;")
                if getattr(self, needed) in _OFF:
                    words = f" {value}" if isinstance(value, str) else ""
                    raise ConfigError(f"--{flag_name(field)}{words} needs {declared.needs}")


def _check_text(flag: str, value: Any, any_bytes: bool) -> None:
    """Raise ConfigError for text or a path, or one of a tuple, with a zero byte or, unless `any_bytes`, no UTF-8."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, str | Path):
            if "\0" in str(part):
                raise ConfigError(f"{flag} {part}: holds a zero byte; leave it out")
            if any_bytes:
                continue
            try:
                str(part).encode()
            except UnicodeEncodeError:
                fix = "rename it" if isinstance(part, Path) else "write it as UTF-8"
                raise ConfigError(f"{flag} {part}: holds bytes that are not UTF-8 text; {fix}") from None


def _floats(value: Any) -> list[float]:
    return [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, float)]


def declared_options(section: type) -> Iterator[tuple["dataclasses.Field[Any]", Option]]:
    """The fields of a section that are options, in order."""
    for field in dataclasses.fields(section):
        if Option.KEY in field.metadata:
            yield field, field.metadata[Option.KEY]


def flag_name(field: "dataclasses.Field[Any]") -> str:
    """The flag of a field made by `option`, without hyphens in front."""
    declared: Option = field.metadata[Option.KEY]
    return declared.flag or field.name


def is_section(kind: type) -> bool:
    """Whether a dataclass holds options itself; a group of sections does not."""
    return any(True for _ in declared_options(kind))


def built_sections(group: object) -> Iterator[object]:
    """The sections of a built group, in the order of its fields; a section is a group of one."""
    if is_section(type(group)):
        yield group
    else:
        for field in dataclasses.fields(group):  # type: ignore[arg-type] # groups are dataclasses
            part = getattr(group, field.name)
            if dataclasses.is_dataclass(part):
                yield from built_sections(part)
