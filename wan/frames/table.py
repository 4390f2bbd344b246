"""Frame tables of `--explain`: one row per slot with index, file, size and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from utils.images import Resize, open_masked
from utils.options import option
from utils.text import table
from wan.frames.encode import latent_mask
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import Size
from wan.nets.spec import CLIP_TOKENS, TEXT_LENGTH
from wan.nets.tokens import frame_tokens

SHOWN = 8  # frame tables of one run


@dataclass(frozen=True)
class ExplainConfig:
    """explaining"""

    explain: bool = option(
        False, help="print frames, sizes, tokens and expected memory of the run, and end before weights are loaded"
    )


@dataclass(frozen=True)
class TableFrame:
    """The image of one slot, as a row shows it."""

    name: str  # "control 0", "target"
    file: str
    size: Size  # width and height in pixels
    fit: Resize | None  # None: nothing is resized
    used: float | None  # share that its mask leaves; None without a mask


def frame_table(layout: OneFrameLayout, frames: Sequence[TableFrame]) -> list[str]:
    """A row per slot. frames: the controls as given, then the target."""
    rows = [("slot", "role", "RoPE index", "file", "size", "cropped", "mask used", "tokens")]
    for number, slot in enumerate(layout.clip.slots):
        frame = frames[slot.source]
        wide = "{}x{}".format(*frame.size)
        rows.append(
            (
                *(str(number), frame.name, str(slot.time_index), frame.file),
                "{}x{} -> {}".format(*frame.fit.size, wide) if frame.fit else wide,
                f"{frame.fit.cropped:.1%}" if frame.fit else "",
                "all" if frame.used is None else f"{frame.used:.0%}",
                str(frame_tokens(frame.size)),
            )
        )
    return table(rows)


def file_frame(name: str, path: Path, mask: Path | None, fit: Resize, masked: bool, alpha: bool) -> TableFrame:
    """masked: whether a mask counts at all; alpha: whether the alpha channel is one."""
    coverage = open_masked(path, name, mask, alpha)[1] if masked else None
    used = None if coverage is None else float(latent_mask(coverage, fit.bucket, fit.crop_only).mean())
    return TableFrame(name, str(path), fit.bucket, fit, used)


class WithControls(Protocol):
    """An item of a dataset or a request: control images with their masks and fits, in the order as given."""

    @property
    def layout(self) -> OneFrameLayout: ...
    @property
    def controls(self) -> Sequence[Path]: ...
    @property
    def control_masks(self) -> Sequence[Path | None]: ...
    @property
    def control_fits(self) -> Sequence[Resize]: ...
    @property
    def alpha(self) -> bool: ...


def control_frames(made: WithControls) -> list[TableFrame]:
    """Table rows of the control images of an item or a request. Not every encoding takes masks of them."""
    files = zip(made.controls, made.control_masks, made.control_fits, strict=True)
    masked = made.layout.encoding.takes_masks
    return [file_frame(f"control {i}", *file, masked, made.alpha) for i, file in enumerate(files)]


def tokens_line(layout: OneFrameLayout, frames: Sequence[TableFrame], images: int) -> str:
    each = [frame_tokens(frames[i].size) for i in layout.clip.order]
    counts = f"{len(each)} frames x {each[0]}" if len(set(each)) == 1 else " + ".join(map(str, each))
    context = f"{TEXT_LENGTH} of the text and {CLIP_TOKENS * images} of CLIP"
    return f"tokens per forward: {counts} = {sum(each)}, which also look at {context}"


def left_out(count: int) -> list[str]:
    return [f"... and {count - SHOWN} more", ""] if count > SHOWN else []
