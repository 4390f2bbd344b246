"""Whether caches are still those of the images and captions behind them.

Training reads caches alone, so without this an image that was replaced after caching would go unnoticed.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.cache import ignores_alpha, latent_source_reason, list_latent_caches, parse_latent_name
from dataset.config import DatasetsConfig, ImageDatasetConfig
from dataset.sources import Source, find_items, read_sources, stem_key
from dataset.text_cache import read_text_header, text_cache_path
from utils.errors import ConfigError
from utils.files import name_key
from utils.text import counted, some

log = logging.getLogger(__name__)


def require_fresh(config: DatasetsConfig) -> None:
    """Raise ConfigError when an image, mask or caption has changed since it was cached; log images without a cache.

    Contents of images are compared where a file is newer than its cache, or alpha channels count otherwise than then. A
    dataset whose images are elsewhere is not compared.
    """
    stale = [found for index, dataset in enumerate(config.datasets) for found in _changed(dataset, index)]
    if stale:
        shown = some((f"{path.name} ({reason})" for path, reason in stale), rest=" and {} more")
        raise ConfigError(
            f"{config.path}: {counted(len(stale), 'cache')} out of date: {shown}; run the two caching scripts again "
            "with --skip_existing, or give --use_stale_caches"
        )


def _changed(dataset: ImageDatasetConfig, index: int) -> Iterator[tuple[Path, str]]:
    folder = dataset.cache_directory
    if not folder.is_dir():
        return
    try:
        sources = read_sources(dataset, index)
    except ConfigError as error:
        log.warning("caches are used without a look at their images: %s", error)
        return
    caches = {name_key(parse_latent_name(path)[0]): path for path in list_latent_caches(folder)}
    bare = [source for source in sources if stem_key(source.target) not in caches]
    if bare and caches:
        names = some(source.target.name for source in bare)
        log.warning("datasets[%d]: %s without a cache, not trained on: %s", index, counted(len(bare), "image"), names)
    known = [source for source in sources if stem_key(source.target) in caches]
    yield from _changed_images(dataset, index, known, caches)
    for source in known:
        path = text_cache_path(folder, source.target.stem)
        if path.is_file() and read_text_header(path).caption not in (None, source.caption):
            yield path, "the caption has changed"


def _changed_images(
    dataset: ImageDatasetConfig, index: int, sources: Sequence[Source], caches: dict[str, Path]
) -> Iterator[tuple[Path, str]]:
    doubtful = {
        stem_key(source.target)
        for source in sources
        for cache in (caches[stem_key(source.target)],)
        if _is_newer(source, cache) or ignores_alpha(cache) != (dataset.alpha == "ignore")
    }
    warned: set[Path] = set()
    for item in find_items(dataset, index) if doubtful else ():
        if (key := stem_key(item.target)) in doubtful and (reason := latent_source_reason(caches[key], item, warned)):
            yield caches[key], reason


def _is_newer(source: Source, cache: Path) -> bool:
    """Whether a file of the item was changed after the cache was made."""
    files = (source.target, *source.controls, *filter(None, (source.target_mask, *source.control_masks)))
    made = cache.stat().st_mtime
    return any(path.exists() and path.stat().st_mtime > made for path in files)
