"""All problems of a dataset at once. Caching stops at the first one, and does not look at the pictures themselves."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dataset.cache import latent_cache_path, latent_source_reason, list_latent_caches, parse_latent_name
from dataset.config import DatasetsConfig, ImageDatasetConfig, ImageFolder, ImageList, image_source, read_config
from dataset.pictures import look
from dataset.problems import ERROR, BucketRow, Problem, Report
from dataset.sources import (
    Item,
    Source,
    caption_files,
    list_images,
    list_other_pictures,
    masks_beside,
    match_controls,
    parse_line,
    read_text,
    stem_key,
)
from dataset.text_cache import list_text_caches, read_text_header, text_cache_path
from utils.errors import ConfigError
from utils.files import fingerprint, name_key, require_writable_dir, unusable_name, written_whole
from utils.images import IMAGE_SUFFIXES
from utils.options import option
from wan.frames.layout import LayoutConfig, OneFrameLayout
from wan.frames.sizes import Size
from wan.nets.spec import TEXT_LENGTH

_FIRST_WIDE_LETTER = 0x2E80  # CJK starts here in Unicode: about a token a letter, others about four letters a token


@dataclass(frozen=True, kw_only=True)
class CheckConfig(LayoutConfig):
    """checking"""

    dataset_config: Path = option(help="dataset TOML")
    alignment: bool = option(False, help="also look for targets that are shifted against their control")
    json: Path | None = option(None, help="write the problems and the bucket table to this file too")


def run_check(run: CheckConfig) -> None:
    """Print the report. Raises ConfigError when it has errors, which stop caching or training."""
    if run.json is not None:
        require_writable_dir(run.json.parent, "--json")
    report = check(run.dataset_config, run.one_frame_layout, run.alignment, run.alpha)
    print(*report.lines(), sep="\n")
    if run.json is not None:
        with written_whole(run.json) as temporary:
            temporary.write_text(json.dumps(report.as_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    if report.count(ERROR):
        raise ConfigError(f"{run.dataset_config}: {report.summary}; fix the problems listed above")


def check(path: Path, layout: str | None = None, alignment: bool = False, alpha: str | None = None) -> Report:
    """Look at everything that a dataset configuration file names, without changing anything.

    layout, alpha: of the datasets that don't name theirs; alignment: also look for targets that are shifted against
    their control. Raises nothing for mistakes: they are what is reported.
    """
    try:
        config = read_config(path, layout=layout, alpha=alpha)
    except ConfigError as error:
        return Report((Problem.of_error("D01", path, error),), ())
    found: list[Problem] = []
    items: list[Item] = []
    for i, dataset in enumerate(config.datasets):
        place = f"{config.path}: datasets[{i}]"
        sources = _sources(found, dataset, place)
        shared = _layout(found, dataset, sources, place) if sources else None
        usable = _items(found, sources, dataset, i, shared, alignment) if shared else []
        usable = [item for item in usable if _can_be_cached(found, dataset, item)]
        if not usable:
            found.append(Problem("D28", place, "has no usable item", "fix the problems of its files"))
        _check_caches(found, dataset, usable, {source.target.stem for source in sources})
        items += usable
    _check_twins(found, config, items)
    buckets = tuple(_buckets(config, items))
    for row in buckets:
        size = config.datasets[row.dataset].batch_size
        if row.items * config.datasets[row.dataset].num_repeats < size:
            place = f"{config.path}: datasets[{row.dataset}]"
            message = f"{row.items} items of {row.width}x{row.height} never fill batch_size {size}"
            found.append(Problem("D27", place, message, "crop them to the shape of others, or lower batch_size"))
    return Report(tuple(found), buckets)


def _sources(found: list[Problem], dataset: ImageDatasetConfig, place: str) -> list[Source]:
    """Entries of the folders or the list, in their order, without those that no item can be made of."""
    try:
        where = image_source("", dataset)
        sources = _of_folder(found, where) if isinstance(where, ImageFolder) else _of_list(found, where, dataset)
    except ConfigError as error:
        found.append(Problem.of_error("D02", place, ConfigError(str(error).removeprefix("."))))
        return []
    except OSError as error:
        found.append(Problem("D02", str(error.filename), f"cannot be read ({error.strerror})", "check the permissions"))
        return []
    first: dict[str, Path] = {}
    for source in sources:
        same = first.setdefault(stem_key(source.target), source.target)
        if same is not source.target:
            message = f"would share its cache files with {same}"
            fix = "copy or link it under another name" if same == source.target else "rename one of them"
            found.append(Problem("D04", str(source.target), message, fix))
    for source in sources:
        _check_caption(found, source)
    return sources


def _check_caption(found: list[Problem], source: Source) -> None:
    if not source.caption.strip():
        found.append(Problem("D12", str(source.target), "its caption is empty", "say what the edit does"))
    tokens = sum(1 if ord(letter) >= _FIRST_WIDE_LETTER else 0.25 for letter in source.caption)
    if tokens > TEXT_LENGTH:
        message = f"its caption has about {tokens:.0f} tokens, and the model reads the first {TEXT_LENGTH}"
        found.append(Problem("D13", str(source.target), message, "shorten it"))


def _of_folder(found: list[Problem], folder: ImageFolder) -> list[Source]:
    targets = list_images(folder.targets)
    stems = {stem_key(target) for target in targets}
    controls: dict[str, tuple[Path, ...]] = {}
    masks: dict[Path, Path] = {}
    target_masks: dict[str, Path] = {}
    if folder.controls is not None:
        masks, candidates = masks_beside(stems, list_images(folder.controls))
        controls, _ = match_controls(stems, candidates)
        claimed = {path for paths in controls.values() for path in paths}
        for path in candidates:
            if path not in claimed:
                fix = f"add a target of that name to {folder.targets}, or end the name in _<number>"
                found.append(Problem("D07", str(path), "belongs to no target", fix))
    if folder.target_masks is not None:
        for mask in list_images(folder.target_masks):
            if stem_key(mask) in stems:
                target_masks[stem_key(mask)] = mask
            else:
                found.append(Problem("D10", str(mask), "belongs to no target", "name it like its target"))
    for path in filter(None, (folder.targets, folder.controls)):
        for other in list_other_pictures(path):
            fix = f"save it as one that ends in {', '.join(IMAGE_SUFFIXES)}"
            found.append(Problem("D37", str(other), "is left out, because of the end of its name", fix))
    caption_paths = caption_files(folder)
    sources = []
    for target in targets:
        captions = caption_paths.get(stem_key(target))
        if captions is None:
            fix = f"write {target.with_name(target.stem + folder.caption_extension)}"
            found.append(Problem("D11", str(target), "is left out, because it has no caption", fix))
            continue
        try:
            caption = read_text(captions, "").strip()
        except ConfigError as error:
            found.append(Problem.of_error("D14", captions, ConfigError(str(error).lstrip())))
            continue
        except OSError as error:
            found.append(Problem("D14", str(captions), f"cannot be read ({error.strerror})", "check the file"))
            continue
        own = controls.get(stem_key(target), ())
        sources.append(Source(target, caption, own, tuple(map(masks.get, own)), target_masks.get(stem_key(target))))
    return sources


def _of_list(found: list[Problem], source: ImageList, dataset: ImageDatasetConfig) -> list[Source]:
    path, sources = source.path, []
    for number, line in enumerate(read_text(path, "image_jsonl_file").split("\n"), start=1):
        if line.strip():
            try:
                sources.append(parse_line(line, dataset))
            except ConfigError as error:
                found.append(Problem.of_error("D03", f"{path}:{number}", error))
    return sources


def _layout(
    found: list[Problem], dataset: ImageDatasetConfig, sources: Sequence[Source], place: str
) -> OneFrameLayout | None:
    """The layout of the items without one of their own; None when there is none that fits."""
    most = max((len(source.controls) for source in sources if source.layout is None), default=0)
    assumed = max(most, 1) if dataset.clean_indices is None else None
    try:
        return dataset.layout_of(dataset.clean_indices, dataset.target_index, assumed)
    except ConfigError as error:
        found.append(Problem.of_error("D05", place, error))
        return None


def _items(
    found: list[Problem],
    sources: Sequence[Source],
    dataset: ImageDatasetConfig,
    index: int,
    shared: OneFrameLayout,
    alignment: bool,
) -> list[Item]:
    """The items that can be made; their pictures are looked at in threads."""
    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(partial(look, dataset, index, shared, alignment), sources))
    found += [problem for _, problems in looked for problem in problems]
    return [item for item, _ in looked if item is not None]


def _can_be_cached(found: list[Problem], dataset: ImageDatasetConfig, item: Item) -> bool:
    """Whether its caches can have the names that they must have."""
    folder = dataset.cache_directory
    names = latent_cache_path(folder, item.stem, item.size), text_cache_path(folder, item.stem)
    reason = next(filter(None, map(unusable_name, names)), None)
    if reason is not None:
        message, _, fix = reason.partition("; ")
        found.append(Problem("D38", str(item.target), f"can't be cached: {message}", fix))
    return reason is None


def _check_twins(found: list[Problem], config: DatasetsConfig, items: Iterable[Item]) -> None:
    """Items made of the same bytes, in one use or in both."""
    trained: dict[str, Path] = {}
    first: dict[Hashable, Path] = {}
    by_use = sorted(items, key=lambda item: config.datasets[item.dataset].validation)
    for item in by_use:
        validation, target = config.datasets[item.dataset].validation, fingerprint(item.target)
        if not validation:
            trained.setdefault(target, item.target)
        elif target in trained:
            message = f"is for validation, but {trained[target]} is the same picture and trained on"
            found.append(Problem("D30", str(item.target), message, "keep one of them"))
        made_of = (validation, target, *map(fingerprint, item.controls), item.caption)
        same = first.setdefault(made_of, item.target)
        if same is not item.target:
            message = f"is the same as {same}, controls and caption too"
            found.append(Problem("D29", str(item.target), message, "remove one; num_repeats repeats on purpose"))


def _buckets(config: DatasetsConfig, items: Iterable[Item]) -> Iterable[BucketRow]:
    groups: dict[tuple[int, Size, tuple[Size, ...], int], list[Item]] = defaultdict(list)
    for item in items:
        controls = item.sizes[:-1] if len(set(item.sizes)) > 1 else ()
        groups[item.dataset, item.bucket, controls, 1 + len(item.controls)].append(item)
    for (index, (width, height), controls, frames), group in sorted(groups.items()):
        dataset = config.datasets[index]
        count = len(group) * dataset.num_repeats
        batches = -(-count // dataset.batch_size)
        fits = [item.target_fit for item in group]
        scales, losses = [fit.scale for fit in fits], [fit.cropped for fit in fits]
        yield BucketRow(
            dataset=index,
            width=width,
            height=height,
            controls=controls,
            frames=frames,
            items=len(group),
            batches=batches,
            unused_places=batches * dataset.batch_size - count,
            scale=(min(scales), max(scales)),
            cropped_mean=sum(losses) / len(losses),
            cropped_most=max(losses),
        )


def _check_caches(found: list[Problem], dataset: ImageDatasetConfig, items: Sequence[Item], stems: set[str]) -> None:
    """stems: those of all entries, also of the ones that are no usable items."""
    folder, warned = dataset.cache_directory, set[Path]()
    if not folder.is_dir():
        return
    again = "run wan_cache_latents.py again"
    latents = {latent_cache_path(folder, item.stem, item.size): item for item in items}
    cached = list_latent_caches(folder)
    for path, item in latents.items():
        if not path.is_file():
            if cached:
                found.append(Problem("D34", str(item.target), "has no latent cache, others have", again))
            continue
        try:
            if reason := latent_source_reason(path, item, warned):
                found.append(Problem("D32", str(path), reason, again))
        except ConfigError as error:
            found.append(Problem.of_error("D31", path, error))
    _check_texts(found, dataset, items)
    failed = stems - {item.stem for item in items}
    texts = {text_cache_path(folder, item.stem) for item in items}
    texts |= {text_cache_path(folder, stem) for stem in failed}
    latent_strangers = [path for path in _strangers(cached, latents) if parse_latent_name(path)[0] not in failed]
    for path in (*latent_strangers, *_strangers(list_text_caches(folder), texts)):
        message = "belongs to no item; training would use it all the same"
        found.append(Problem("D35", str(path), message, "delete it, or cache again without --keep_cache"))


def _strangers(paths: Iterable[Path], known: Iterable[Path]) -> list[Path]:
    names = set(map(name_key, known))
    return [path for path in paths if name_key(path) not in names]


def _check_texts(found: list[Problem], dataset: ImageDatasetConfig, items: Iterable[Item]) -> None:
    folder, again = dataset.cache_directory, "run wan_cache_text_encoder_outputs.py again"
    some = bool(list_text_caches(folder))
    for item in items:
        path = text_cache_path(folder, item.stem)
        if not path.is_file():
            if some:
                found.append(Problem("D34", str(item.target), "has no text cache, others have", again))
            continue
        try:
            if read_text_header(path).caption != item.caption:
                found.append(Problem("D33", str(path), "the caption has changed", again))
        except ConfigError as error:
            found.append(Problem.of_error("D31", path, error))
