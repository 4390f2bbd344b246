"""Inputs of a DiT that stay the same over all steps: padded texts, rotary tables, context of the cross attention."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.nets.spec import TEXT_LENGTH

_ROW_MULTIPLE = 64  # texts get a multiple of it, so that few sizes of tensors serve texts of all lengths


def pad_text(embeddings: list[Tensor]) -> Tensor:
    """Text embeddings, each [L, text_dim] -> [B, rows, text_dim], zeros after the end.

    The model was trained without a text mask, so zeros up to TEXT_LENGTH take part in the attention. They are all the
    same: `rows` has room for one of them behind the longest text, which WanDiT takes for all that are left out.
    ValueError when a text is longer than TEXT_LENGTH.
    """
    longest = max(len(embedding) for embedding in embeddings)
    if longest > TEXT_LENGTH:
        raise ValueError(f"text embedding of {longest} tokens; at most {TEXT_LENGTH} fit")
    rows = min((longest // _ROW_MULTIPLE + 1) * _ROW_MULTIPLE, TEXT_LENGTH)
    return torch.stack([F.pad(embedding, (0, 0, 0, rows - len(embedding))) for embedding in embeddings])


class KeysValues(NamedTuple):
    """Keys and values of a cross attention, [B, rows, N, D] each: the rows of the text, then those of the image.

    The last row of the text stands for all up to TEXT_LENGTH, see `pad_text`.
    """

    keys: Tensor
    values: Tensor
    text_rows: int

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all TEXT_LENGTH rows."""
        return self._all_rows(self.keys), self._all_rows(self.values)

    @property
    def image(self) -> tuple[Tensor, Tensor]:
        """Keys and values; of no row in t2v."""
        return self.keys[:, self.text_rows :], self.values[:, self.text_rows :]

    def _all_rows(self, x: Tensor) -> Tensor:
        padding = x[:, self.text_rows - 1, None].expand(-1, TEXT_LENGTH - self.text_rows, -1, -1)
        return torch.cat([x[:, : self.text_rows], padding], 1)


@dataclass
class Context:
    """Cross-attention context of one block: image tokens, then text tokens.

    tokens: [B, image tokens + text_rows, dim]; 257 image tokens in i2v, 514 in flf2v. The last of the text rows stands
    for all up to TEXT_LENGTH. keep: the keys and values of the first call serve the next ones too.
    """

    tokens: Tensor
    text_rows: int
    keep: bool = False
    kept: KeysValues | None = None

    @property
    def image(self) -> Tensor:
        """[B, image tokens, dim]"""
        return self.tokens[:, : -self.text_rows]

    @property
    def text(self) -> Tensor:
        """[B, text_rows, dim]"""
        return self.tokens[:, -self.text_rows :]


@dataclass(eq=False)
class Prepared:
    """Inputs that stay the same over all steps: rotary tables and, per block, the projected context."""

    cos: Tensor  # [B, L, D / 2] float32
    sin: Tensor
    contexts: list[Context]


@dataclass(eq=False)
class StepCache:
    """Shared by calls with the same text, image, frame indices and sizes: the first fills it, the others read it."""

    prepared: Prepared | None = None
