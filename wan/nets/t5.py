"""The umT5-XXL text encoder: cleaned prompt -> one embedding per token.

The network is that of transformers; its names and those of the official Wan2.1 file meet here.

Rules: docs/formats.md#t5-keys and docs/formats.md#text-cleaning.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor

from utils.errors import ConfigError
from wan.nets.spec import TEXT_LENGTH

if TYPE_CHECKING:  # importing transformers takes seconds, too long for --help
    from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

_EMBEDDING = "token_embedding.weight"
OUTSIDE = {_EMBEDDING: "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
IN_BLOCK = {  # official name after `blocks.<i>.` -> transformers' after `encoder.block.<i>.`
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def clean_prompt(text: str) -> str:
    """Repaired Unicode, HTML entities resolved (twice: some captions are escaped twice), single blanks."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def official_name(stored: str) -> str:
    """A key of a T5 file -> its official name: full umT5 files have an `encoder.` in front."""
    return stored.replace("encoder.", "")


def t5_key(official: str) -> str:
    """`blocks.3.attn.q.weight` -> `encoder.block.3.layer.0.SelfAttention.q.weight`; KeyError for unknown names."""
    name = official_name(official)
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, index, part = name.split(".", 2)
    return f"encoder.block.{index}.{IN_BLOCK[part]}"


def t5_config(shapes: Mapping[str, tuple[int, ...]]) -> UMT5Config:
    """Dimensions from official names and shapes. umT5-XXL: width 4096, 24 layers of 64 heads, FFN 10240.

    Raises ConfigError when the tensors that tell the dimensions are missing or have another rank.
    """
    from transformers import UMT5Config

    try:
        vocabulary, width = shapes[_EMBEDDING]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        attention_width, _ = shapes["blocks.0.attn.q.weight"]
        ffn_width, _ = shapes["blocks.0.ffn.fc1.weight"]
        head_width = attention_width // heads
    except (KeyError, ValueError, ZeroDivisionError):
        raise ConfigError(
            "is not a umT5 encoder with the official Wan2.1 names; use models_t5_umt5-xxl-enc-bf16.pth"
        ) from None
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=head_width,
        d_ff=ffn_width,
        num_heads=heads,
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,  # this and the next two: wan/modules/t5.py of Wan2.1
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        # Like the original: scores + position bias + mask, softmax
        attn_implementation="eager",  # type: ignore[call-arg]  # among the keyword arguments of the base class
    )


def build_t5(shapes: Mapping[str, tuple[int, ...]]) -> UMT5EncoderModel:
    """The encoder for a file with these official names and shapes. Under torch.device("meta") it costs nothing."""
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel(t5_config(shapes))
    model.set_input_embeddings(model.shared)  # one module under both names: no second copy after loading or moving
    return model


def t5_shapes(model: UMT5EncoderModel) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of every tensor that `model` needs."""
    state = model.state_dict()
    names = [*OUTSIDE, *(f"blocks.{i}.{part}" for i in range(model.config.num_layers) for part in IN_BLOCK)]
    return {name: tuple(state[t5_key(name)].shape) for name in names}


def t5_tensors(official: str, tensor: Tensor) -> dict[str, Tensor]:
    """The entries of the model's state dict that one official tensor fills; the embedding stands under two names."""
    keys = [t5_key(official)] + ["encoder.embed_tokens.weight"] * (official == _EMBEDDING)
    return dict.fromkeys(keys, tensor)


def token_counts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt, `</s>` included. The encoder reads the first TEXT_LENGTH of them."""
    if not prompts:
        return []
    return [len(ids) for ids in tokenizer([clean_prompt(prompt) for prompt in prompts]).input_ids]


@torch.no_grad()
def encode_text(
    model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], device: torch.device
) -> list[Tensor]:
    """One [L, text width] per prompt in the model's dtype; L counts its tokens and `</s>`, at most TEXT_LENGTH.

    Padding is masked and cut off, so the length of the longest prompt of a batch changes the others only by rounding.
    Raises ConfigError when the tokenizer knows more tokens than the model.
    """
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding=True,
        truncation=True,
        max_length=TEXT_LENGTH,
        add_special_tokens=True,
        return_tensors="pt",
    )
    known = model.config.vocab_size
    if (highest := int(tokens.input_ids.max())) >= known:
        raise ConfigError(f"--t5_tokenizer: token {highest} is beyond the {known} that --t5 knows; use its tokenizer")
    mask = tokens.attention_mask.to(device)
    hidden = model(input_ids=tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
    return [states[kept] for states, kept in zip(hidden, mask.bool(), strict=True)]
