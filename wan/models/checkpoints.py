"""The model files of a run after their headers were read: which they are, in which dtype they load, and loading them.

Sections of `wan.models.options` resolve to these, before any weights load.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wan.files import load
from wan.files.tokenizer import load_tokenizer
from wan.fused.dit import can_fuse
from wan.fused.vae import fuse_vae_
from wan.lora.merge import Merger
from wan.models.memory_options import MemoryConfig
from wan.models.tasks import TaskSpec
from wan.nets.attention import Attention, sdpa
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.nets.vae import WanVAE

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

log = logging.getLogger(__name__)


def default_dtype(device: torch.device, on_gpu: torch.dtype) -> torch.dtype:
    """The reference's half precision on a GPU; float32 on a CPU, where half precision is slow or missing."""
    return torch.float32 if device.type == "cpu" else on_gpu


@dataclass(frozen=True)
class DiTCheckpoint:
    """A DiT file of a kind that takes control images."""

    path: Path
    task: TaskSpec
    spec: DiTSpec
    stored_dtype: torch.dtype
    chosen_dtype: torch.dtype | None = None  # of --dit_dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is loaded in unless the run asks for another."""
        return self.chosen_dtype or load.usual_dit_dtype(self.stored_dtype)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model, by official name."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in WanDiT(self.spec).state_dict().items()}

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        merger: Merger | None = None,
        attention: Attention = sdpa,
        memory: MemoryConfig | None = None,
    ) -> WanDiT:
        """The frozen DiT; `--dit_dtype` wins over `dtype`, which wins over the file's.

        memory: fp8 weights and blocks in host memory are made while loading; `apply_memory_options_` does the rest.
        """
        fp8, on_host = (memory.fp8_kind, memory.blocks_to_swap) if memory else (None, 0)
        dtype = self.chosen_dtype or dtype
        dit = load.load_dit(self.path, dtype, device, merger, attention, fp8=fp8, blocks_on_host=on_host)
        if merger is not None:
            _log_merged(merger)
        return dit

    def merge_again_(self, dit: WanDiT, device: torch.device, merger: Merger) -> None:
        """Merge the LoRA files into the loaded `dit` at other multipliers, in place of what was merged before."""
        load.merge_again_(dit, self.path, device, merger, merger.names)
        _log_merged(merger)


def _log_merged(merger: Merger) -> None:
    for line in merger.report():
        log.info("LoRA %s", line)


@dataclass(frozen=True)
class VAECheckpoint:
    """A Wan2.1 VAE file."""

    path: Path
    chosen_dtype: torch.dtype | None = None  # of --vae_dtype
    may_fuse: bool = True

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that images are encoded and decoded in."""
        return self.chosen_dtype or default_dtype(device, torch.bfloat16)

    def load(self, device: torch.device) -> WanVAE:
        """The VAE in its dtype; with fused operations where they run, on CUDA with Triton in 16 bits."""
        vae = load.load_vae(self.path, self.dtype(device), device)
        if self.may_fuse and self.dtype(device).itemsize == 2 and can_fuse(device):
            fuse_vae_(vae)
        return vae


@dataclass(frozen=True)
class T5Checkpoint:
    """A umT5-XXL encoder file and its tokenizer."""

    path: Path
    tokenizer: Path | None = None  # folder; None: google/umt5-xxl from the hub
    chosen_dtype: torch.dtype | None = None  # of --t5_dtype
    fp8: bool = False  # linear layers in fp8

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that captions are encoded in."""
        return self.chosen_dtype or default_dtype(device, torch.bfloat16)

    def size(self, device: torch.device) -> int:
        """Bytes of its weights on `device`, without fp8."""
        return load.count_t5(self.path) * self.dtype(device).itemsize

    def load(self, device: torch.device) -> "tuple[UMT5EncoderModel, PreTrainedTokenizerBase]":
        """(T5 encoder, tokenizer)."""
        tokenizer = load_tokenizer(self.tokenizer)
        return load.load_t5(self.path, self.dtype(device), device, "cast" if self.fp8 else None), tokenizer


@dataclass(frozen=True)
class CLIPCheckpoint:
    """A CLIP image encoder file."""

    path: Path
    chosen_dtype: torch.dtype | None = None  # of --clip_dtype

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that CLIP features are computed in."""
        return self.chosen_dtype or default_dtype(device, torch.float16)

    def load(self, device: torch.device) -> "CLIPVisionModel":
        """The image encoder in its dtype."""
        return load.load_clip(self.path, self.dtype(device), device)
