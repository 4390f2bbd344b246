"""Which model files a run uses, and in which dtype: one section per model.

A script shows the flags of the models that it uses. `resolve()` reads headers only, and gives the model file that
`wan.models.checkpoints` loads.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from utils.dtypes import parse_dtype
from utils.errors import ConfigError
from utils.files import require_file
from utils.options import Section, option
from utils.text import counted, some
from wan.files import load
from wan.files.names import MODELS, model_in, release_files
from wan.files.tokenizer import check_tokenizer
from wan.frames.layout import OneFrameLayout
from wan.lora.files import LoRAFile, choose_modules, read_lora
from wan.lora.merge import Merger
from wan.lora.trained_for import TrainedFor, layout_from_metadata, size_from_metadata
from wan.models.checkpoints import CLIPCheckpoint, DiTCheckpoint, T5Checkpoint, VAECheckpoint
from wan.models.tasks import TASKS, UNSUPPORTED_TASKS, resolve_task
from wan.nets.attention import Attention, select_attention
from wan.nets.spec import DiTSpec

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
Group = TypeVar("Group", bound="DataclassInstance")


def _dtype(name: str | None, flag: str) -> torch.dtype | None:
    try:
        return None if name is None else parse_dtype(name)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _required(path: Path | None, flag: str, what: str) -> Path:
    if path is None:
        raise ConfigError(f"{flag} is missing; give the {what}")
    return require_file(path, flag)


@dataclass(frozen=True)
class ReleaseConfig(Section):
    """models"""

    ckpt_dir: Path | None = option(
        None,
        help="folder of models, as a release or `run.py weights` has them: serves for model options that are left out",
    )

    def fill(self, group: Group) -> Group:
        """`group`, a section or a group of them, with the paths that were not given taken from the folder.

        A folder that is given for one model stands for the file in it. Raises ConfigError when `--ckpt_dir` is no
        folder, or holds no model.
        """
        return _with_paths(group, {} if self.ckpt_dir is None else self._files(self.ckpt_dir))

    def _files(self, folder: Path) -> dict[str, tuple[Path, ...]]:
        if not folder.is_dir():
            raise ConfigError(f"--ckpt_dir {folder}: is not a folder; check the path")
        files = release_files(folder)
        if not files:
            raise ConfigError(
                f"--ckpt_dir {folder}: holds no file under its official name or ComfyUI's, nor folders as diffusers "
                "has them; give --dit, --vae, --t5 and --clip"
            )
        return files


def _with_paths(group: Group, files: Mapping[str, tuple[Path, ...]]) -> Group:
    """`group` with `files`, by option name, in place of what is None, and files in place of their folders.

    Raises ConfigError where several files could be meant.
    """
    changed: dict[str, Any] = {}
    for field in fields(group):
        part = getattr(group, field.name)
        if is_dataclass(part) and not isinstance(part, type):
            changed[field.name] = _with_paths(part, files)
        elif part is None and field.name in files:
            changed[field.name] = _the_one(files[field.name], field.name, getattr(group, "task", None))
        elif field.name in MODELS and part is not None and part.is_dir():
            changed[field.name] = model_in(part, field.name) or part
    return replace(group, **changed)


def _the_one(paths: Sequence[Path], option: str, task: str | None) -> Path:
    """The file that is meant, of several DiTs the one whose name has the kind of `task`."""
    if task in TASKS:
        paths = [path for path in paths if f"_{TASKS[task].model_type}_" in path.name] or paths
    if len(paths) > 1:
        raise ConfigError(f"--ckpt_dir: {some(path.name for path in paths)}: choose one with --{option}")
    return paths[0]


@dataclass(frozen=True)
class DiTConfig(Section):
    """DiT"""

    task: str | None = option(None, help="i2v-14B or flf2v-14B; default: what the checkpoint is made for")
    dit: Path | None = option(None, help="DiT safetensors; of a split file any part")
    dit_dtype: str | None = option(None, help="DiT dtype; default: that of the file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task in UNSUPPORTED_TASKS:
            raise ConfigError(f"--task {self.task}: {UNSUPPORTED_TASKS[self.task]}")
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(f"--task {self.task}: unknown; use i2v-14B or flf2v-14B")
        dtype = _dtype(self.dit_dtype, "--dit_dtype")
        if dtype is not None and dtype.itemsize == 1:
            raise ConfigError(f"--dit_dtype {self.dit_dtype}: nothing can be computed in fp8; see --fp8_scaled")

    def resolve(self) -> DiTCheckpoint:
        """The checkpoint, from its header. Raises ConfigError unless it is a Wan2.1 DiT of the kind of `--task`.

        Only i2v and flf2v models take control images.
        """
        path = _required(self.dit, "--dit", "DiT checkpoint")
        spec = load.inspect_dit(path)
        task = resolve_task(self.task, spec)
        if task.model_type == "t2v":
            raise ConfigError(f"--dit {path}: is a text-to-video model; one-frame use needs i2v-14B or flf2v-14B")
        return DiTCheckpoint(path, task, spec, load.dit_dtype(path), _dtype(self.dit_dtype, "--dit_dtype"))


@dataclass(frozen=True)
class AttentionConfig(Section):
    """attention"""

    attn_mode: str = option("torch", help="torch (or sdpa), cudnn, flash (or flash2), flash3, xformers or sageattn")

    def __post_init__(self) -> None:
        super().__post_init__()
        select_attention(self.attn_mode)

    @property
    def function(self) -> Attention:
        """The attention that `attn_mode` names."""
        return select_attention(self.attn_mode)


@dataclass(frozen=True)
class AttentionSwitches(Section):
    """attention"""

    sdpa: bool = option(False, help="torch's scaled dot product attention; the default, and wins over the others")
    flash_attn: bool = option(False, help="FlashAttention 2; needs the package flash-attn")
    xformers: bool = option(False, help="memory-efficient attention of the package xformers")
    flash3: bool = option(False, help="FlashAttention 3, for Hopper GPUs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.function  # noqa: B018 checks that its package is there

    @property
    def function(self) -> Attention:
        """The attention of the first switch that is on, in the order of the fields."""
        names = {"sdpa": "sdpa", "flash_attn": "flash2", "xformers": "xformers", "flash3": "flash3"}
        flag = next((flag for flag in names if getattr(self, flag)), "sdpa")
        return select_attention(names[flag], f"--{flag}")


@dataclass(frozen=True)
class LoRAConfig(Section):
    """LoRA"""

    lora_weight: tuple[Path, ...] = option((), help="LoRA files to merge into the DiT")
    lora_multiplier: tuple[float, ...] = option((), help="one per --lora_weight file; default 1")
    include_patterns: tuple[str, ...] = option(
        (), help="one regular expression per file: merge only modules in whose name it is found"
    )
    exclude_patterns: tuple[str, ...] = option((), help="one per file: leave out modules in whose name it is found")

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("include_patterns", "exclude_patterns"):
            patterns = getattr(self, flag)
            if len(patterns) > len(self.lora_weight):
                raise ConfigError(
                    f"--{flag}: {counted(len(patterns), 'pattern')} for {counted(len(self.lora_weight), 'file')}; "
                    "give one per --lora_weight"
                )
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"--{flag} {pattern}: is not a regular expression ({error})") from None

    @property
    def names(self) -> tuple[str, ...]:
        """File names, for metadata."""
        return tuple(path.name for path in self.lora_weight)

    @cached_property
    def files(self) -> list[LoRAFile]:
        """The files, read."""
        return [read_lora(path, "--lora_weight") for path in self.lora_weight]

    @property
    def trained_for(self) -> TrainedFor:
        """Layout and size that the metadata of the files name. ConfigError for metadata that can't be read."""
        layouts: set[OneFrameLayout | None] = set()
        sizes: set[tuple[int, int] | None] = set()
        for file in self.files:
            try:
                layouts.add(layout_from_metadata(file.metadata))
                sizes.add(size_from_metadata(file.metadata))
            except ConfigError as error:
                raise ConfigError(f"--lora_weight {file.path}: {error}") from None
        layouts.discard(None)
        sizes.discard(None)
        if len(layouts) > 1:
            log.warning("the LoRA files were trained at different indices: %s", " and ".join(sorted(map(str, layouts))))
        return TrainedFor(layouts.pop() if len(layouts) == 1 else None, sizes.pop() if len(sizes) == 1 else None)

    def merger(self, dit: DiTCheckpoint, multipliers: tuple[float, ...] | None = None) -> Merger | None:
        """Checks the files. multipliers: in place of `lora_multiplier`."""
        chosen = [
            choose_modules(file, include, exclude)
            for file, include, exclude in zip_longest(self.files, self.include_patterns, self.exclude_patterns)
        ]
        multipliers = self.lora_multiplier if multipliers is None else multipliers
        return build_merger(chosen, multipliers, dit, "--lora_weight", "--lora_multiplier")


def build_merger(
    files: Sequence[LoRAFile], multipliers: tuple[float, ...], dit: DiTCheckpoint, flag: str, multiplier_flag: str
) -> Merger | None:
    """Merger of LoRA files, checked against the DiT's header; None without files. Missing multipliers are 1."""
    if len(multipliers) > len(files):
        raise ConfigError(
            f"{multiplier_flag}: {counted(len(multipliers), 'number')} for {counted(len(files), 'file')}; "
            f"give one per {flag}"
        )
    if not files:
        return None
    multipliers = (*multipliers, *[1.0] * (len(files) - len(multipliers)))
    return Merger(list(zip(files, multipliers, strict=True)), dit.shapes)


@dataclass(frozen=True)
class VAEConfig(Section):
    """VAE"""

    vae: Path | None = option(None, help="VAE checkpoint (Wan2.1_VAE.pth or safetensors)")
    vae_dtype: str | None = option(None, help="VAE dtype; default bfloat16, float32 on a CPU")
    vae_backend: str = option(
        "auto",
        help="auto: fused kernels where they run (CUDA with Triton, 16 bits); plain: PyTorch alone",
        choices=("auto", "plain"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _dtype(self.vae_dtype, "--vae_dtype")

    def resolve(self) -> VAECheckpoint:
        """The checkpoint. Raises ConfigError unless its header is that of a Wan2.1 VAE."""
        path = _required(self.vae, "--vae", "Wan2.1 VAE")
        load.inspect_vae(path)
        return VAECheckpoint(path, _dtype(self.vae_dtype, "--vae_dtype"), may_fuse=self.vae_backend == "auto")


@dataclass(frozen=True)
class T5Config(Section):
    """text encoder"""

    t5: Path | None = option(None, help="umT5-XXL encoder checkpoint (models_t5_umt5-xxl-enc-bf16.pth)")
    t5_dtype: str | None = option(None, help="T5 dtype; default bfloat16, float32 on a CPU")
    fp8_t5: bool = option(False, help="keep the T5's linear layers in fp8: 6 GB instead of 11")
    t5_tokenizer: Path | None = option(None, help="folder of the tokenizer; default: google/umt5-xxl from the hub")

    def __post_init__(self) -> None:
        super().__post_init__()
        _dtype(self.t5_dtype, "--t5_dtype")

    def resolve(self, spec: DiTSpec | None = None) -> T5Checkpoint:
        """The checkpoint and its tokenizer.

        Raises ConfigError unless it is a umT5 encoder, of the width that the DiT of `spec` takes, and has a tokenizer.
        """
        path = _required(self.t5, "--t5", "umT5-XXL encoder")
        width = load.inspect_t5(path)
        if spec is not None and width != spec.text_dim:
            raise ConfigError(
                f"--t5 {path}: its width is {width}, the DiT takes {spec.text_dim}; use the T5 of the DiT"
            )
        check_tokenizer(self.t5_tokenizer)
        return T5Checkpoint(path, self.t5_tokenizer, _dtype(self.t5_dtype, "--t5_dtype"), self.fp8_t5)


@dataclass(frozen=True)
class CLIPConfig(Section):
    """image encoder"""

    clip: Path | None = option(None, help="CLIP checkpoint (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth)")
    clip_dtype: str | None = option(None, help="CLIP dtype; default float16, float32 on a CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        _dtype(self.clip_dtype, "--clip_dtype")

    def resolve(self, spec: DiTSpec | None = None) -> CLIPCheckpoint:
        """The checkpoint. Raises ConfigError unless it is a CLIP image encoder, of the width that the DiT takes."""
        path = _required(self.clip, "--clip", "CLIP image encoder")
        width = load.inspect_clip(path)
        if spec is not None and width != spec.image_dim:
            raise ConfigError(f"--clip {path}: its width is {width}, the DiT takes {spec.image_dim}; use its CLIP")
        return CLIPCheckpoint(path, _dtype(self.clip_dtype, "--clip_dtype"))
