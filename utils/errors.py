"""The one exception that means "the user can fix this", and suggestions for misspelt names."""

import difflib
import errno
from collections.abc import Iterable

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
"""Numbers of an OSError that tells nothing about the file that was to be opened."""


_ABBREVIATION = 4  # characters; what is not longer begins too many names


class ConfigError(Exception):
    """A mistake in flags or files. The message is one line naming the place, the key, the value and the fix.

    `utils.cli.run` prints it without a traceback and exits with code 1. The class that knows a rule raises it; the
    layer that knows the file or flag puts that in front (`raise ConfigError(f"{path}: {error}") from None`).
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string when none is near.

    The shortest one that `name` begins is nearer than any other.
    """
    known = list(known)
    longer = sorted((one for one in known if len(name) > _ABBREVIATION and one.startswith(name)), key=len)
    near = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
