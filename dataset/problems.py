"""The kinds of problems that a dataset can have, and how they are told. `dataset.check` finds them."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from utils.errors import ConfigError
from utils.text import table

ERROR, WARNING = "error", "warning"
_SHOWN = 10  # problems of one kind that are listed


@dataclass(frozen=True)
class Kind:
    """One kind of problem. An error stops caching or training, a warning makes the result worse."""

    severity: str
    title: str


# Codes are for scripts and searches: they never change their meaning, and one that is given up stays unused.
KINDS = {
    "D01": Kind(ERROR, "configuration file"),
    "D02": Kind(ERROR, "folder or list of a dataset"),
    "D03": Kind(ERROR, "line of a list"),
    "D04": Kind(ERROR, "two targets of one name"),
    "D05": Kind(ERROR, "time indices"),
    "D06": Kind(ERROR, "control image missing"),
    "D07": Kind(WARNING, "control image without a target"),
    "D08": Kind(WARNING, "control image not used"),
    "D09": Kind(WARNING, "one picture twice among the controls of an item"),
    "D10": Kind(WARNING, "mask without a target"),
    "D11": Kind(WARNING, "caption missing"),
    "D12": Kind(WARNING, "caption empty"),
    "D13": Kind(WARNING, "caption too long"),
    "D14": Kind(ERROR, "caption unreadable"),
    "D15": Kind(ERROR, "image unreadable"),
    "D16": Kind(ERROR, "target too small"),
    "D17": Kind(WARNING, "image enlarged"),
    "D18": Kind(WARNING, "image far larger than needed"),
    "D19": Kind(WARNING, "target cropped"),
    "D20": Kind(WARNING, "control and target in different shapes"),
    "D21": Kind(WARNING, "control and target nearly identical"),
    "D22": Kind(WARNING, "target shifted against its control"),
    "D23": Kind(ERROR, "mask of another size than its image"),
    "D24": Kind(ERROR, "target mask entirely black"),
    "D25": Kind(WARNING, "control mask entirely black"),
    "D26": Kind(ERROR, "control mask in the causal layout"),
    "D27": Kind(WARNING, "batch size larger than bucket"),
    "D28": Kind(ERROR, "no usable item"),
    "D29": Kind(WARNING, "item twice"),
    "D30": Kind(WARNING, "target both trained on and for validation"),
    "D31": Kind(ERROR, "cache damaged"),
    "D32": Kind(WARNING, "latent cache out of date"),
    "D33": Kind(WARNING, "text cache out of date"),
    "D34": Kind(WARNING, "item not cached"),
    "D35": Kind(WARNING, "cache without an item"),
    "D36": Kind(ERROR, "control image too small"),
    "D37": Kind(WARNING, "picture of a kind that is not taken"),
    "D38": Kind(ERROR, "name that no cache can have"),
}


@dataclass(frozen=True)
class Problem:
    """One thing to fix."""

    code: str  # a key of KINDS
    file: str  # or the place in the configuration
    message: str
    fix: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.code]

    def __str__(self) -> str:
        return f"{self.code} {self.kind.severity:<7} {self.file}: {self.message}{self.fix and f'; {self.fix}'}"

    @classmethod
    def of_error(cls, code: str, file: object, error: ConfigError) -> "Problem":
        """A ConfigError, whose message ends in a semicolon and the fix, as a problem of `file`."""
        message, _, fix = str(error).removeprefix(f"{file}: ").rpartition("; ")
        return cls(code, str(file), message or fix, fix if message else "")


@dataclass(frozen=True)
class BucketRow:
    """Items of one dataset, size and number of frames: how they fill batches, and what resizing costs them."""

    dataset: int
    width: int  # pixels
    height: int
    controls: tuple[tuple[int, int], ...]  # width and height of each; empty where they are the target's
    frames: int  # controls and target
    items: int
    batches: int  # an epoch, repeats included
    unused_places: int  # of the last batch
    scale: tuple[float, float]  # least and largest factor that targets are resized by
    cropped_mean: float  # share of the targets' pixels that is cut off
    cropped_most: float


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    problems: tuple[Problem, ...]
    buckets: tuple[BucketRow, ...]

    def count(self, severity: str) -> int:
        """How many problems are errors, or warnings."""
        return sum(problem.kind.severity == severity for problem in self.problems)

    @property
    def summary(self) -> str:
        """`2 errors, 1 warning`."""
        counts = ((self.count(severity), severity) for severity in (ERROR, WARNING))
        return ", ".join(f"{count} {severity}{'s' * (count != 1)}" for count, severity in counts)

    def lines(self) -> Iterator[str]:
        """The bucket table, then the problems by kind, errors first."""
        yield from bucket_table(self.buckets)
        by_code = defaultdict(list)
        for problem in self.problems:
            by_code[problem.code].append(problem)
        for code in sorted(by_code, key=lambda code: (KINDS[code].severity != ERROR, code)):
            yield ""
            yield f"{code} {KINDS[code].title}: {len(by_code[code])}"
            yield from (f"  {problem}" for problem in by_code[code][:_SHOWN])
            if (more := len(by_code[code]) - _SHOWN) > 0:
                yield f"  ... and {more} more; --json lists all"
        yield ""
        yield self.summary

    def as_json(self) -> dict[str, Any]:
        """Problems with severity and title, and the bucket table."""
        return {
            "problems": [asdict(problem) | asdict(problem.kind) for problem in self.problems],
            "buckets": [asdict(row) for row in self.buckets],
            "counts": dict(Counter(problem.code for problem in self.problems)),
        }


def bucket_table(rows: Sequence[BucketRow]) -> list[str]:
    """The rows as lines with a heading; nothing without rows."""
    heading = ("dataset", "bucket", "frames", "items", "batches", "unused places", "resized by", "cropped mean", "most")
    cells = [
        (
            *(str(row.dataset), _sizes(row), str(row.frames), str(row.items), str(row.batches)),
            *(str(row.unused_places), f"{row.scale[0]:.2f}-{row.scale[1]:.2f}"),
            *(f"{row.cropped_mean:.1%}", f"{row.cropped_most:.1%}"),
        )
        for row in rows
    ]
    return table([heading, *cells]) if cells else []


def _sizes(row: BucketRow) -> str:
    """`64x48`, with controls of other sizes `32x32, 64x48`."""
    return ", ".join("{}x{}".format(*size) for size in (*row.controls, (row.width, row.height)))
