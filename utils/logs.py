"""Messages of the log: how they are shown, and which of them."""

import logging

from utils.text import printable


class Printable(logging.Formatter):
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
