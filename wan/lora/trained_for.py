"""Indices and size that a LoRA was trained at, from the metadata of its file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from utils.errors import ConfigError
from utils.images import STEP
from utils.text import one_line
from wan.frames.layout import OneFrameLayout
from wan.frames.layout import parse as parse_layout


def layout_from_metadata(metadata: Mapping[str, str]) -> OneFrameLayout | None:
    """The time indices that a LoRA was trained at; None when its file does not tell. ConfigError for other text.

    With `--one_frame_legacy_indices` those are 0 ... F-1 in the order of the ones that were asked for.
    """
    text = metadata.get("ss_one_frame")
    if text is None:
        return None
    try:
        layout = parse_layout(text)
    except ConfigError as error:
        raise ConfigError(f"ss_one_frame = '{one_line(text)}': {one_line(error)}; give the indices yourself") from None
    if metadata.get("ss_one_frame_legacy_indices") != "True":
        return layout
    places = {index: place for place, index in enumerate(layout.clip.time_indices)}
    controls = tuple(places[index] for index in layout.control_indices)
    return replace(layout, control_indices=controls, target_index=places[layout.target_index])


def size_from_metadata(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Width and height in pixels that a LoRA was trained at; None when its file does not tell.

    Raises ConfigError for another text than `832x480`.
    """
    text = metadata.get("ss_one_frame_size")
    if text is None:
        return None
    size = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if size is None or min(map(int, size.groups())) < STEP:
        raise ConfigError(f"ss_one_frame_size = '{one_line(text)}': must be like 832x480; give --video_size yourself")
    return int(size[1]), int(size[2])


@dataclass(frozen=True)
class TrainedFor:
    """Layout and size that LoRA files say they were trained for; None where none says it or they differ."""

    layout: OneFrameLayout | None
    size: tuple[int, int] | None  # width and height in pixels


UNTRAINED = TrainedFor(layout=None, size=None)
