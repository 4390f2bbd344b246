"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds that the stages of a run took, in the order of their ends. What is inside another counts for itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]  # of each stage that is open, and of none: the seconds of the stages in it

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block belongs to the stage `name`, which may come again."""
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] += took - self._inside.pop()
            self._inside[-1] += took

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
