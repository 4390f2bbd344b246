"""TOML and JSON, whose mistakes are errors that name the place."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from utils.errors import ConfigError
from utils.files import require_file
from utils.text import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_STRANGE_BLANK = re.compile(
    r"(\"{3}(?:\\.|[^\\])*?\"{3}|'{3}.*?'{3}|\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'|\#[^\n]*)|[^\S \t\r\n]", re.DOTALL
)
"""A string or comment of TOML, as group 1, or a blank outside of them that TOML does not have."""


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError, starting with the file, when it is missing or no TOML."""
    require_file(path, flag)
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: is not UTF-8 text; save it as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{flag} {path}: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Blanks of other kinds than TOML's, such as full-width ones, count as blanks too.

    Raises ConfigError, with the line where it is known, when the text is no TOML.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(_STRANGE_BLANK.sub(lambda found: found[1] or " ", text))
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).rpartition(" (at ")
        place = place.partition(",")[0] if place.startswith("line") else f"line {len(text.splitlines())}"
        fix = r"correct the TOML there (brackets, quotes, [[datasets]], a \ in double quotes)"
        raise ConfigError(f"{place}: {one_line(reason)}; {fix}") from None
    except (RecursionError, ValueError) as error:  # too many brackets, too many digits
        raise ConfigError(f"is not valid TOML ({one_line(error)}); check brackets and numbers") from None
    return tables


def parse_json(text: str) -> Any:
    """`json.loads` that raises JSONDecodeError also for a key that is given twice, of which the first would be dropped.

    And for nesting, digits and characters that are too much for Python.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise json.JSONDecodeError(f"The key '{one_line(twice)}' is given twice", text, text.rfind(f'"{twice}"'))
        return found

    try:
        value = json.loads(text, object_pairs_hook=table)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("Too many brackets within brackets", text, 0) from None
    except UnicodeEncodeError:
        raise json.JSONDecodeError("An escape such as \\ud800 is half a character", text, text.index("\\u")) from None
    except ValueError:
        raise json.JSONDecodeError("A number has too many digits", text, 0) from None
    return value
