"""The caching runs: the images and captions of a dataset configuration -> cache files, one item at a time."""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset.cache import (
    EncoderFacts,
    LatentCache,
    LatentSettings,
    latent_cache_path,
    latent_settings,
    latent_stale_reason,
    list_latent_caches,
    write_latent_cache,
)
from dataset.cache_files import remove_except, strangers
from dataset.config import DatasetsConfig, read_config
from dataset.sources import Item, find_all_items, find_all_targets
from dataset.text_cache import TextSettings, list_text_caches, text_cache_path, text_stale_reason, write_text_cache
from utils.dtypes import dtype_name
from utils.errors import ConfigError
from utils.files import fingerprint, require_writable_dir, sync_all, unusable_name
from utils.images import Resize, has_alpha, open_masked, to_levels
from utils.options import Section, option
from utils.text import counted
from wan.frames.encode import encode_clip, frame_levels, latent_mask
from wan.frames.encoding import Blanks, Pictures
from wan.frames.layout import LayoutConfig
from wan.models.device import Processes
from wan.models.options import CLIPConfig, T5Config, VAEConfig
from wan.nets.spec import TEXT_LENGTH
from wan.nets.t5 import encode_text, token_counts
from wan.nets.vae import WanVAE

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import CLIPVisionModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
ALONE = Processes()
Job = TypeVar("Job")
Loaded = TypeVar("Loaded")
Group = tuple[Any, ...]  # what items that are encoded together have in common: their dataset, then what else
_WRITERS = 1  # threads: a file takes a third of the time that a GPU takes for its item


@dataclass(frozen=True, kw_only=True)
class CachingConfig(Section):
    """caching"""

    dataset_config: Path = option(help="dataset TOML")
    batch_size: int | None = option(
        None,
        help="most items to encode together; also the default of the datasets' batch_size",
        minimum=1,
    )
    num_workers: int | None = option(
        None, help="threads that read files ahead; default: one less than the CPU has", minimum=1
    )
    skip_existing: bool = option(False, help="keep caches that were made with the same settings from the same files")
    keep_cache: bool = option(False, help="keep caches in the cache folders that belong to no item")

    @property
    def workers(self) -> int:
        """Number of reading threads."""
        return self.num_workers or max(1, (os.cpu_count() or 1) - 1)

    def read(
        self,
        find: Callable[[DatasetsConfig], list[Item]],
        path_of: Callable[[DatasetsConfig, Item], Path],
        flags: LayoutConfig | None = None,
    ) -> tuple[DatasetsConfig, list[Item]]:
        """The configuration and all its items. Creates the cache folders; raises ConfigError for any mistake.

        find: `find_all_items` or `find_all_targets`; path_of: the cache of an item; flags: layout and alpha of the
        datasets that don't name theirs.
        """
        flags = flags or LayoutConfig()
        config = read_config(self.dataset_config, self.batch_size, flags.one_frame_layout, flags.alpha)
        items = find(config)
        for i, dataset in enumerate(config.datasets):
            require_writable_dir(dataset.cache_directory, f"{config.path}: datasets[{i}].cache_directory")
        for item in items:
            path = path_of(config, item)
            if reason := unusable_name(path):
                raise ConfigError(f"{config.path}: {item.target}: can't be cached as {path.name}: {reason}")
        return config, items


@dataclass(frozen=True, kw_only=True)
class LatentCachingConfig(CachingConfig, LayoutConfig):
    """caching"""

    one_frame: bool = option(False, help="one-frame caching; required, as there is no other kind here")
    disable_cudnn_backend: bool = option(False, help="do without cuDNN, for drivers where it fails")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.one_frame:
            raise ConfigError("--one_frame is missing; only one-frame caching is supported, add --one_frame")


def run_latents(
    run: LatentCachingConfig,
    vae: VAEConfig,
    clip: CLIPConfig,
    device: torch.device,
    processes: Processes = ALONE,
) -> None:
    """Check everything, then encode the images of this process's share of the items; `_wan.safetensors` files."""
    config, items = run.read(find_all_items, latent_path, run)
    _check_strangers(run, config, items, list_latent_caches, latent_path)
    vae_file, clip_file = vae.resolve(), clip.resolve()
    torch.backends.cudnn.enabled = torch.backends.cudnn.enabled and not run.disable_cudnn_backend
    models = EncoderFacts(
        vae=fingerprint(vae_file.path),
        clip=fingerprint(clip_file.path),
        vae_dtype=dtype_name(vae_file.dtype(device)),
        clip_dtype=dtype_name(clip_file.dtype(device)),
    )
    todo, warned = items, set[Path]()
    if run.skip_existing:

        def reason(item: Item) -> str | None:
            expected = latent_settings(item, models)
            return latent_stale_reason(latent_path(config, item), expected, item.layout, warned)

        todo = _stale(items, reason, run, processes)
    todo = _rank_items(sorted(todo, key=_size), _size, _sizes(config, run.batch_size), processes)
    transparent = Counter[int]()
    if todo:
        transparent = cache_latents(config, todo, vae_file.load(device), clip_file.load(device), models, run)
        sync_all(latent_path(config, item) for item in todo)
    _tell_transparent(config, processes.gathered([transparent]))
    _clean(run, config, items, list_latent_caches, latent_path, processes)


def run_texts(run: CachingConfig, t5: T5Config, device: torch.device, processes: Processes = ALONE) -> None:
    """Check everything, then encode the captions of this process's share of the items; `_wan_te.safetensors` files."""
    config, items = run.read(find_all_targets, text_path)
    _check_strangers(run, config, items, list_text_caches, text_path)
    t5_file = t5.resolve()
    settings = TextSettings(t5=fingerprint(t5_file.path), dtype=dtype_name(t5_file.dtype(device)))
    todo, warned = items, set[Path]()
    if run.skip_existing:

        def reason(item: Item) -> str | None:
            return text_stale_reason(text_path(config, item), item.caption, settings, warned)

        todo = _stale(items, reason, run, processes)
    todo = _rank_items(sorted(todo, key=_length), _dataset, _sizes(config, run.batch_size), processes)
    if todo:
        model, tokenizer = t5_file.load(device)
        _warn_of_long_captions(todo, tokenizer)
        encode = partial(encode_text, model, tokenizer, device=device)
        cache_texts(config, todo, encode, settings, run.batch_size)
        sync_all(text_path(config, item) for item in todo)
    _clean(run, config, items, list_text_caches, text_path, processes)


def _warn_of_long_captions(items: Sequence[Item], tokenizer: "PreTrainedTokenizerBase") -> None:
    captions = [*{item.caption: None for item in items}]
    counts = dict(zip(captions, token_counts(tokenizer, captions), strict=True))
    for item in items:
        if (count := counts[item.caption]) > TEXT_LENGTH:
            log.warning(
                "%s: its caption has %d tokens; the model reads the first %d, shorten it",
                item.target,
                count,
                TEXT_LENGTH,
            )


def latent_path(config: DatasetsConfig, item: Item) -> Path:
    """Where the latents of an item are cached."""
    return latent_cache_path(config.datasets[item.dataset].cache_directory, item.stem, item.size)


def text_path(config: DatasetsConfig, item: Item) -> Path:
    """Where the caption of an item is cached."""
    return text_cache_path(config.datasets[item.dataset].cache_directory, item.stem)


def cache_latents(
    config: DatasetsConfig,
    items: Sequence[Item],
    vae: WanVAE,
    clip: "CLIPVisionModel",
    models: EncoderFacts,
    run: CachingConfig,
) -> "Counter[int]":
    """Encode and write the items; returns the sum of `LoadedItem.transparent` of each dataset.

    models: what is recorded about VAE and CLIP. The frames of up to a batch of items of one size go through the VAE
    together, unless they are encoded as one video.
    """
    load = partial(load_item, models=models)
    items = sorted(items, key=_size)
    sizes, transparent = _sizes(config, run.batch_size), Counter[int]()
    with tqdm(total=sum(1 + len(item.controls) for item in items), desc="caching latents", unit="image") as bar:
        loaded = _batches(ahead(load, items, run.workers), lambda one: _size(one.item), sizes)
        for one in ahead(partial(_write, config), encode_items(vae, clip, loaded), _WRITERS):
            transparent[one.item.dataset] += one.transparent
            bar.update(len(one.pictures.images))
    return transparent


def _tell_transparent(config: DatasetsConfig, counts: Sequence["Counter[int]"]) -> None:
    """A line per dataset that has such images. counts: of each process."""
    for i, count in sorted(sum(counts, Counter[int]()).items()):
        masked = 'transparent pixels, which are masked out; alpha = "ignore" in the file, or --alpha ignore, uses them'
        what = masked if config.datasets[i].alpha == "mask" else "an alpha channel, which is ignored"
        if count:
            log.info("%s: datasets[%d]: %s with %s", config.path, i, counted(count, "image"), what)


def cache_texts(
    config: DatasetsConfig,
    items: Sequence[Item],
    encode: Callable[[list[str]], list[Tensor]],
    settings: TextSettings,
    batch_size: int | None = None,
) -> None:
    """Encode and write the captions. encode: captions -> [L, D] each; batch_size can lower that of the datasets."""
    with tqdm(total=len(items), desc="caching texts", unit="caption") as bar:
        for batch in _batches(sorted(items, key=_length), _dataset, _sizes(config, batch_size)):
            captions = list(dict.fromkeys(item.caption for item in batch))
            embeddings = dict(zip(captions, encode(captions), strict=True))
            for item in batch:
                made_for = replace(settings, source=item.source)
                write_text_cache(text_path(config, item), embeddings[item.caption], item.caption, made_for)
            bar.update(len(batch))


@dataclass(frozen=True)
class LoadedItem:
    """An item after the reading threads are done with it."""

    item: Item
    settings: LatentSettings
    pictures: Pictures  # the controls and the target
    controls: tuple[Tensor, ...]  # whole, [3, height, width] uint8
    target_mask: Tensor | None  # [H, W], 1 where the loss counts; None: everywhere
    transparent: int  # images whose alpha channel is a mask or, where it is ignored, which have one


def encode_items(
    vae: WanVAE, clip: "CLIPVisionModel", batches: Iterable[Sequence[LoadedItem]]
) -> Iterator[tuple[LoadedItem, LatentCache]]:
    """Each item with its cache, to be written: a GPU may still be at work. A batch has one size and one encoding."""
    blanks: Blanks = {}
    for batch in batches:
        found = encode_clip(clip, [control for one in batch for control in one.controls])
        shares = torch.split(found, [len(one.controls) for one in batch])
        examples = batch[0].item.layout.encoding.examples(vae, [one.pictures for one in batch], blanks)
        for one, (latents, conditioning), features in zip(batch, examples, shares, strict=True):
            conditioning = conditioning._replace(clip=features)
            yield one, LatentCache(latents, conditioning, one.item.layout, one.target_mask, one.item.sizes)


def _write(config: DatasetsConfig, encoded: tuple[LoadedItem, LatentCache]) -> LoadedItem:
    """Wait for the device, in a thread of its own, so that it gets the next item meanwhile."""
    one, cache = encoded
    write_latent_cache(latent_path(config, one.item), cache, one.settings)
    return one


def _size(item: Item) -> Group:
    """Equal for items whose frames may go through the VAE together."""
    return item.dataset, item.bucket, item.sizes if len(set(item.sizes)) > 1 else ()


def _dataset(item: Item) -> Group:
    """Equal for items whose captions may go through T5 together."""
    return (item.dataset,)


def _length(item: Item) -> tuple[int, int, str]:
    """Puts captions into an order in which a batch holds little padding, and equal ones are encoded once."""
    return item.dataset, len(item.caption), item.caption


def _sizes(config: DatasetsConfig, batch_size: int | None) -> list[int]:
    """The largest batch of each dataset."""
    return [min(dataset.batch_size, batch_size or dataset.batch_size) for dataset in config.datasets]


def _batches(items: Iterable[Job], group: Callable[[Job], Group], sizes: Sequence[int]) -> Iterator[list[Job]]:
    """Neighbours with equal `group`, which is (dataset, ...), at most `sizes[dataset]` at a time."""
    for (dataset, *_), together in groupby(items, group):
        while batch := list(islice(together, sizes[dataset])):
            yield batch


def _rank_items(
    items: Sequence[Item], group: Callable[[Item], Group], sizes: Sequence[int], processes: Processes
) -> list[Item]:
    """The items of this process. Batches stay whole, so that the rounding of a GPU doesn't depend on the processes."""
    return [item for batch in processes.rank_slice(list(_batches(items, group, sizes))) for item in batch]


def load_item(item: Item, models: EncoderFacts) -> LoadedItem:
    """Read and resize. models: as for `cache_latents`."""
    target, coverage = open_masked(item.target, "target image", item.target_mask, item.alpha)
    target_mask = _mask(coverage, item.target_fit)
    if target_mask is not None and not target_mask.any():
        raise ConfigError(f"mask of target image {item.target}: is entirely black; leave the item out or paint it")
    files, open_control = zip(item.controls, item.control_masks, strict=True), item.layout.encoding.open_control
    opened = [open_control(path, mask, item.alpha) for path, mask in files]
    used = {path for path, (_, mask) in zip(item.controls, opened, strict=True) if mask is not None}
    used |= {item.target} if coverage is not None else set()
    transparent = sum(path in used if item.alpha else has_alpha(path, "image") for path in item.unmasked)
    images, fits = [*(image for image, _ in opened), target], (*item.control_fits, item.target_fit)
    pictures = Pictures(
        clip=item.layout.clip,
        images=[frame_levels(image, fit.bucket, fit.crop_only) for image, fit in zip(images, fits, strict=True)],
        masks=[_mask(coverage, fit) for (_, coverage), fit in zip(opened, item.control_fits, strict=True)],
        size=item.bucket,
    )
    whole = tuple(map(to_levels, images[:-1]))
    return LoadedItem(item, latent_settings(item, models), pictures, whole, target_mask, transparent)


def _mask(coverage: Image.Image | None, fit: Resize) -> Tensor | None:
    return None if coverage is None else latent_mask(coverage, fit.bucket, fit.crop_only)


def ahead(load: Callable[[Job], Loaded], jobs: Iterable[Job], workers: int) -> Iterator[Loaded]:
    """load(job) of each job, in order; threads work on the next ones meanwhile, one per worker."""
    waiting: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            waiting.append(pool.submit(load, job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _stale(
    items: list[Item], reason: Callable[[Item], str | None], run: CachingConfig, processes: Processes
) -> list[Item]:
    """The items that have a reason to be cached again; logs how many there are for each reason."""
    own = processes.rank_slice(range(len(items)))
    own_reasons = tqdm(
        ahead(lambda number: reason(items[number]), own, run.workers),
        total=len(own),
        desc="checking caches",
        unit="file",
        disable=not processes.is_main,
    )
    found = dict(processes.gathered(list(zip(own, own_reasons, strict=True))))
    reasons = [found[number] for number in range(len(items))]
    counts = Counter(filter(None, reasons))
    log.info("%d of %d caches are up to date", len(items) - counts.total(), len(items))
    for text, count in counts.most_common():
        log.info("%d to be made: %s", count, text)
    return [item for item, text in zip(items, reasons, strict=True) if text]


def _check_strangers(
    run: CachingConfig,
    config: DatasetsConfig,
    items: Sequence[Item],
    list_caches: Callable[[Path], list[Path]],
    path_of: Callable[[DatasetsConfig, Item], Path],
) -> None:
    """Raise ConfigError, unless told to keep them, for caches of other images, which `_clean` would delete.

    Those of images of equal names are replaced, with a warning.
    """
    kept = {path_of(config, item) for item in items}
    for i, dataset in enumerate(config.datasets):
        own = [path for path in list_caches(dataset.cache_directory) if path in kept]
        for source, paths in strangers(own, (), dataset.source).items():
            log.warning(
                "%s: datasets[%d].cache_directory %s: holds %s of %s, e.g. %s, in whose place this dataset has its "
                "own; give each a folder to keep both",
                *(config.path, i, dataset.cache_directory, counted(len(paths), "cache"), source, paths[0].name),
            )
    for i, dataset in () if run.keep_cache else enumerate(config.datasets):
        for source, paths in strangers(list_caches(dataset.cache_directory), kept, dataset.source).items():
            raise ConfigError(
                f"{config.path}: datasets[{i}].cache_directory {dataset.cache_directory}: holds "
                f"{counted(len(paths), 'cache')} of {source}, e.g. {paths[0].name}, which would be deleted; give this "
                f"dataset a folder of its own, delete them, or keep them by --keep_cache"
            )


def _clean(
    run: CachingConfig,
    config: DatasetsConfig,
    items: Sequence[Item],
    list_caches: Callable[[Path], list[Path]],
    path_of: Callable[[DatasetsConfig, Item], Path],
    processes: Processes,
) -> None:
    """Once all processes are done, delete the caches that belong to no item, unless they are to be kept."""
    processes.wait()
    if run.keep_cache or not processes.is_main:
        return
    kept = {path_of(config, item) for item in items}
    for dataset in config.datasets:
        if removed := remove_except(list_caches(dataset.cache_directory), kept):
            log.info("%s: deleted %d caches that belong to no item", dataset.cache_directory, len(removed))
