"""Text for messages and the console: foreign text on one line, the first names of a list, tables."""

import re
from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """The text with spaces for what steers a terminal; line breaks, tabs and lone surrogates stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or "\ud800" <= c <= "\udfff" else " " for c in text)


def one_line(text: object, limit: int = 150, *, keep_end: bool = False) -> str:
    """Foreign text for a message: one line without what steers a terminal, of at most `limit` characters.

    Runs of white space become one space; lone surrogates, which stand for odd bytes in file names, stay. What is too
    long loses its end, or with `keep_end` its middle.
    """
    line = re.sub("[ \n\t]+", " ", printable(str(text))).rstrip()
    if len(line) <= limit:
        return line
    return f"{line[: limit // 2 - 3]} [...] {line[-limit // 2 + 4 :]}" if keep_end else line[: limit - 3] + "..."


def some(names: Iterable[object], limit: int = 3, rest: str = " and {} more") -> str:
    """`a, b, c and 2 more`. rest: stands for the names beyond `limit`, with their number in place of `{}`."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (rest.format(len(listed) - limit) if len(listed) > limit else "")


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells -> lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
