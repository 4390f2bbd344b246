"""Batches for training: cached items in groups, in an order that depends on (seed, epoch) alone.

Items come from the cache folders, not from the images (docs/formats.md#reading-caches). Some are kept for validation.
"""

import atexit
import ctypes
import hashlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.cache import (
    LatentHeader,
    latent_cache_name,
    list_latent_caches,
    parse_latent_name,
    read_header,
    read_latent_cache,
)
from dataset.config import DatasetsConfig, ImageDatasetConfig
from dataset.text_cache import read_text_cache, read_text_header, text_cache_path
from utils.errors import ConfigError
from utils.randomness import stratified_uniform
from utils.text import some
from wan.frames.condition import clip_controls
from wan.frames.layout import OneFrameLayout
from wan.frames.sizes import Size, frame_of, pad_to
from wan.nets.conditioning import Conditioning
from wan.nets.tokens import FrameSizes, token_count

log = logging.getLogger(__name__)

_NO_CLIP = "holds no CLIP features; run wan_cache_latents.py again with --clip"


@dataclass(frozen=True)
class TrainingItem:
    """A cached item. `layout`: where its frames shall sit, whatever the cache says."""

    key: str  # "<dataset>/<stem>_<W>x<H>/<repeat>": the same in every run, for random numbers of its own
    dataset: int  # position of its dataset in the configuration
    latents: Path
    text: Path
    layout: OneFrameLayout


@dataclass(frozen=True)
class BatchItems:
    """Items to load together: all have the same shapes. `uniform`: their stratified random numbers in [0, 1)."""

    items: tuple[TrainingItem, ...]
    uniform: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Tensors are float32, except text, which keeps its stored dtype."""

    latents: Tensor  # [B, 16, F, H, W], frames in time order
    conditioning: Conditioning  # channels [B, 20, F, H, W]; clip usually of every control image, as they are given
    target_masks: Tensor | None  # [B, H, W], 1 where the loss counts; None when that is everywhere in all items
    text: list[Tensor]  # [L, D] each
    layouts: tuple[OneFrameLayout, ...]
    frame_indices: Tensor  # [B, F] int64
    item_keys: tuple[str, ...]
    uniform: Tensor | None  # [B]
    frame_sizes: FrameSizes | None = None  # of all items

    @property
    def target_size(self) -> tuple[int, int]:
        """Rows and columns of the target's latents, in all items."""
        if self.frame_sizes is None:
            height, width = self.latents.shape[3:]
            return height, width
        return self.frame_sizes[self.layouts[0].clip.target_slot]


@dataclass(frozen=True)
class _Bucket:
    """Items with equal buckets can be stacked into one batch."""

    dataset: int
    frames: int
    height: int
    width: int
    clip_images: int
    frame_sizes: FrameSizes | None
    target: Size | None  # None like `frame_sizes`


@dataclass(frozen=True)
class _Cached:
    """A latent cache with its text cache."""

    name: str  # "<dataset>/<stem>_<W>x<H>"
    stem: str
    bucket: _Bucket
    latents: Path
    text: Path
    layout: OneFrameLayout

    def item(self, repeat: int) -> TrainingItem:
        return TrainingItem(f"{self.name}/{repeat}", self.bucket.dataset, self.latents, self.text, self.layout)


@dataclass(frozen=True)
class BucketCount:
    """How many items of one dataset and size an epoch has; height and width of the latents."""

    dataset: int
    frames: int
    height: int
    width: int
    items: int
    batch_size: int
    frame_sizes: FrameSizes | None = None

    @property
    def batches(self) -> int:
        return -(-self.items // self.batch_size)

    @property
    def tokens(self) -> int:
        """Tokens of one item, of all its frames."""
        return token_count((self.frames, self.height, self.width), self.frame_sizes)


@dataclass(frozen=True)
class ValidationSet:
    """Items held back from training to measure it by, each once whatever its dataset's num_repeats."""

    items: tuple[TrainingItem, ...]


class TrainingSet:
    """All cached items of a dataset configuration but those for validation. Only headers are read here.

    seed: of the order; timestep_buckets: `--num_timestep_buckets`, with 2 or more every plan gets `uniform`.
    validation_split: share below 1 or number of the file stems that `validation` holds, besides the datasets that are
    for validation. The same stems are chosen in every run, in all datasets and sizes that have them.
    Raises ConfigError when there is nothing to train on, or a cache is damaged or doesn't fit the configuration.
    """

    def __init__(
        self, config: DatasetsConfig, seed: int, timestep_buckets: int | None = None, validation_split: float = 0
    ) -> None:
        self.seed, self.timestep_buckets = seed, timestep_buckets
        self._batch_sizes = [dataset.batch_size for dataset in config.datasets]
        self._buckets: dict[_Bucket, list[TrainingItem]] = defaultdict(list)
        self._widths: dict[tuple[int, int], Path] = {}  # (CLIP, text) -> a file that has them
        trained: list[_Cached] = []
        held_back: list[_Cached] = []
        for i, dataset in enumerate(config.datasets):
            try:
                (held_back if dataset.validation else trained).extend(self._find(i, dataset))
            except ConfigError as error:
                raise ConfigError(f"{config.path}: datasets[{i}]: {error}") from None
        for use, found in ((False, trained), (True, held_back)):
            folders = [str(dataset.cache_directory) for dataset in config.datasets if dataset.validation is use]
            if folders and not found:
                raise ConfigError(
                    f"{config.path}: no cached items in {', '.join(folders)}; run wan_cache_latents.py --one_frame and "
                    "wan_cache_text_encoder_outputs.py with this file"
                )
        if not trained:
            raise ConfigError(f"{config.path}: every dataset has validation = true; add one to train on")
        stems = _held_back_stems({cached.stem for cached in trained}, validation_split)
        held_back += [cached for cached in trained if cached.stem in stems]
        for cached in trained:
            if cached.stem not in stems:
                repeats = config.datasets[cached.bucket.dataset].num_repeats
                self._buckets[cached.bucket] += [cached.item(repeat) for repeat in range(repeats)]
        self.validation = ValidationSet(tuple(cached.item(0) for cached in held_back))

    @property
    def items(self) -> list[TrainingItem]:
        """Every item, once per repeat."""
        return [item for bucket in self._buckets.values() for item in bucket]

    @property
    def buckets(self) -> list[BucketCount]:
        """Number of items of each dataset and size."""
        return [
            BucketCount(key.dataset, key.frames, key.height, key.width, len(items), size, key.frame_sizes)
            for key, items in self._buckets.items()
            for size in [self._batch_sizes[key.dataset]]
        ]

    @property
    def layouts(self) -> list[OneFrameLayout]:
        """The different layouts in use, most frequent first."""
        return [layout for layout, _ in Counter(item.layout for item in self.items).most_common()]

    def check_widths(self, clip: int | None, text: int) -> None:
        """Raise ConfigError unless the cached features are as wide as the DiT takes; clip: None if it takes none."""
        for (cached_clip, cached_text), path in self._widths.items():
            for name, cached, wanted in (("CLIP", cached_clip, clip), ("text", cached_text, text)):
                if cached != wanted:
                    raise ConfigError(
                        f"{path}: its {name} features are {cached} wide, the DiT takes {wanted}; "
                        "cache again with the encoders of the DiT"
                    )

    def epoch_batches(self, epoch: int) -> list[BatchItems]:
        """The batches of one epoch: items are shuffled within their bucket, then the batches of all datasets."""
        return [plan for step in self.epoch_steps(epoch, 1) for plan in step]

    def epoch_steps(self, epoch: int, batches_per_step: int) -> list[list[BatchItems]]:
        """The batches of each optimizer step of an epoch, of all processes and accumulated batches together.

        A step's batches come from one bucket as long as that has enough, so that the step equals one over a single
        batch of all these items. What is left over of the buckets is mixed; the last step may be short.
        """
        rng = random.Random(f"{self.seed}/{epoch}")  # seeded by text: the same on every platform and Python
        by_dataset: dict[int, list[list[list[TrainingItem]]]] = defaultdict(list)
        for bucket, items in self._buckets.items():
            size = self._batch_sizes[bucket.dataset]
            items = rng.sample(items, len(items))
            by_dataset[bucket.dataset].append([items[start : start + size] for start in range(0, len(items), size)])
        steps, rest = [], []
        for i, buckets in by_dataset.items():
            plans = iter(self._plans([batch for batches in buckets for batch in batches], self._batch_sizes[i], rng))
            for batches in buckets:
                chunks = _chunks(list(itertools.islice(plans, len(batches))), batches_per_step)
                rest += chunks.pop() if len(chunks[-1]) < batches_per_step else []
                steps += chunks
        rng.shuffle(rest)
        mixed = _chunks(rest, batches_per_step)
        short = [mixed.pop()] if mixed and len(mixed[-1]) < batches_per_step else []
        steps += mixed
        rng.shuffle(steps)
        return steps + short

    def _plans(self, batches: list[list[TrainingItem]], size: int, rng: random.Random) -> list[BatchItems]:
        if self.timestep_buckets is None or self.timestep_buckets < 2:
            return [BatchItems(tuple(items)) for items in batches]
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        uniform = torch.split(stratified_uniform(len(batches) * size, self.timestep_buckets, generator), size)
        return [
            BatchItems(tuple(items), tuple(values[: len(items)].tolist()))
            for items, values in zip(batches, uniform, strict=True)
        ]

    def _find(self, index: int, dataset: ImageDatasetConfig) -> list[_Cached]:
        folder = dataset.cache_directory
        caches = list_latent_caches(folder) if folder.is_dir() else []
        found, texts_missing, other_sizes = [], [], []
        for path in caches:
            stem, size = parse_latent_name(path)
            text = text_cache_path(folder, stem)
            if not text.is_file():
                texts_missing.append(path.name)
                continue
            header, text_header = read_header(path), read_text_header(text)
            if header.clip is None:
                raise ConfigError(f"{path}: {_NO_CLIP}")
            self._widths.setdefault((header.clip[1], text_header.width), path)
            if header.bucket != dataset.buckets.choose(size):
                other_sizes.append("{} ({}x{})".format(path.name, *header.bucket))
            layout = _layout(path, header, dataset)
            sizes = header.sizes and layout.clip.frame_sizes(header.sizes)
            shape = header.frames, header.height, header.width
            bucket = _Bucket(index, *shape, header.clip[0], sizes, header.bucket if sizes else None)
            name = f"{index}/{latent_cache_name(stem, size)}"
            found.append(_Cached(name, stem, bucket, path, text, layout))
        _warn(index, texts_missing, "have no text cache and are skipped; run wan_cache_text_encoder_outputs.py")
        _warn(index, other_sizes, "have another size than this file asks for and are used as they are")
        return found


def load_batch(plan: BatchItems) -> TrainingBatch:
    """Read the files of a plan. Raises ConfigError naming a file that can't be read."""
    caches = [read_latent_cache(item.latents) for item in plan.items]
    layouts = tuple(item.layout for item in plan.items)
    slots = [layout.slots_of(cache.layout) for layout, cache in zip(layouts, caches, strict=True)]
    read = list(zip(caches, slots, strict=True))
    latents = [cache.latents.float()[:, places] for cache, places in read]
    conditioning = [cache.conditioning.map(Tensor.float).select(places) for cache, places in read]
    sizes = caches[0].sizes and layouts[0].clip.frame_sizes(caches[0].sizes)
    target = frame_of(latents[0], layouts[0].clip.target_slot, sizes)
    masks = [cache.target_mask for cache in caches]
    whole = sizes is None and all(mask is None for mask in masks)
    full = [pad_to(torch.ones(target.shape[2:]) if mask is None else mask, *latents[0].shape[2:]) for mask in masks]
    return TrainingBatch(
        latents=torch.stack(latents),
        conditioning=Conditioning.stack(conditioning),
        target_masks=None if whole else torch.stack(full),
        text=[read_text_cache(item.text) for item in plan.items],
        layouts=layouts,
        frame_indices=torch.tensor([layout.clip.time_indices for layout in layouts]),
        item_keys=tuple(item.key for item in plan.items),
        uniform=None if plan.uniform is None else torch.tensor(plan.uniform, dtype=torch.float64),
        frame_sizes=sizes,
    )


def clip_for(batch: TrainingBatch, images: int) -> Tensor | None:
    """CLIP features [B, images, 257, D] for a model that takes none, 1 (i2v) or 2 (flf2v) images; None for none.

    Features are those of the earliest and the latest control. A cache that doesn't hold one image per control, but as
    many as wanted, is taken as it is. Raises ConfigError for another number.
    """
    if not images:
        return None
    features = batch.conditioning.clip
    if features is None:
        raise ConfigError(f"{batch.item_keys[0]}: {_NO_CLIP}")
    found, controls = features.shape[1], len(batch.layouts[0].control_indices)
    if found == controls:
        chosen = [clip_controls(layout.clip, images) for layout in batch.layouts]
        return torch.stack([item[controls] for item, controls in zip(features, chosen, strict=True)])
    if found == images:
        return features
    raise ConfigError(
        f"{batch.item_keys[0]}: its cache holds CLIP features of {found} images for {controls} control images; "
        "run wan_cache_latents.py again"
    )


def rank_slice(plans: Sequence[BatchItems], process_index: int, num_processes: int) -> list[BatchItems]:
    """The plans of one process; the first ones are repeated at the end so that all processes get equally many."""
    padded = itertools.islice(itertools.cycle(plans), -(-len(plans) // num_processes) * num_processes)
    return list(padded)[process_index::num_processes]


def _chunks(plans: list[BatchItems], size: int) -> list[list[BatchItems]]:
    return [plans[start : start + size] for start in range(0, len(plans), size)]


class BatchLoader:
    """Loads batches ahead in `workers` processes (0: in this one). Draws nothing from the global random generators.

    persistent: keep the workers between epochs.
    """

    def __init__(self, workers: int = 0, persistent: bool = False, context: str | None = None) -> None:
        workers = min(workers, os.cpu_count() or 1)
        leaving = multiprocessing.get_context(context).RawValue("b", 0)  # no lock, which a handler could wait for
        if workers:
            atexit.register(setattr, leaving, "value", 1)
        self._plans: list[BatchItems] = []
        self._loader = DataLoader(
            _Files(),
            batch_size=None,
            sampler=_Current(self),
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            multiprocessing_context=context if workers else None,
            worker_init_fn=partial(_leave_signals_to_the_trainer, leaving),
            generator=torch.Generator(),
        )

    def load(self, plans: Iterable[BatchItems]) -> Iterator[TrainingBatch]:
        """The batches of the plans, in their order.

        Raises ConfigError naming a file that can't be read, or saying that a loader process was killed, and OSError
        when the system lets no loader process start.
        """
        self._plans = list(plans)
        try:
            with _children_die_quietly():
                batches = iter(self._loader)
            for batch in batches:
                if isinstance(batch, ConfigError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise ConfigError(
                "a loader process was killed, as systems do that run out of memory; "
                "use a smaller --max_data_loader_n_workers"
            ) from None


@contextmanager
def _children_die_quietly() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD out: it raises wherever the trainer happens to be, even inside an update.

    Without it the loader notices within seconds, when it waits for the next batch, that a process of its own is gone.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    before = number and signal.getsignal(number)
    yield
    if number and signal.getsignal(number) != before:
        signal.signal(number, before)


def _leave_signals_to_the_trainer(leaving: "ctypes.c_byte", _worker: int) -> None:
    """A terminal or a batch system signals every process of a group; the step under way still needs its data.

    leaving: is 1 when the trainer ends, which then ends by SIGTERM whatever workers are left.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        if leaving.value:
            os._exit(0)

    for name in ("SIGINT", "SIGHUP"):  # there is no SIGHUP on Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


class _Files(Dataset[TrainingBatch | ConfigError]):
    """Runs in the workers. Hands errors over as values, because torch would wrap them in a worker's traceback."""

    def __getitem__(self, plan: BatchItems) -> TrainingBatch | ConfigError:
        try:
            return load_batch(plan)
        except ConfigError as error:
            return error


class _Current:
    """A sampler that yields the plans that the loader has at the time, so that persistent workers get new epochs."""

    def __init__(self, loader: BatchLoader) -> None:
        self._owner = loader

    def __iter__(self) -> Iterator[BatchItems]:
        return iter(self._owner._plans)

    def __len__(self) -> int:
        return len(self._owner._plans)


def _held_back_stems(stems: set[str], split: float) -> set[str]:
    """Stems with the lowest hashes, so that few change sides when the dataset grows. split: a share or a number."""
    if not split:
        return set()
    count = int(split) if split >= 1 else max(1, round(split * len(stems)))
    if count >= len(stems):
        raise ConfigError(f"--validation_split {split:g}: leaves none of {len(stems)} items to train on; use less")
    return set(sorted(stems, key=lambda stem: hashlib.sha256(stem.encode(errors="surrogateescape")).digest())[:count])


def _layout(path: Path, header: LatentHeader, dataset: ImageDatasetConfig) -> OneFrameLayout:
    """The layout that item, else configuration, else cache asks for. ConfigError when the cache is made for another."""
    try:
        wanted = dataset.layout_of_cached(header.layout, header.owns_layout)
    except ConfigError as error:
        raise ConfigError(f"{error} (so {path.name} is cached), or run wan_cache_latents.py") from None
    try:
        wanted.check_latents(made_for=header.layout)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    return wanted


def _warn(index: int, names: list[str], message: str) -> None:
    if names:
        log.warning("datasets[%d]: %d cached items %s: %s", index, len(names), message, some(names, rest=", ..."))
