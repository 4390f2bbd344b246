"""The miniature family: the sizes of its networks, and its files in the layouts of the official ones.

Everything but the size is as in the published models, so the same loaders, caches and LoRA files serve both.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from demo.tiny_models import FILES
from demo.world import vocabulary
from wan.nets.clip import build_clip, clip_keys, clip_shapes
from wan.nets.spec import DiTSpec, ModelType
from wan.nets.t5 import build_t5, t5_key, t5_shapes

FOLDER = Path(__file__).resolve().parent / "miniature"

VAE_DIM = 16
TEXT_DIM, TEXT_BLOCKS, TEXT_HEADS, TEXT_FFN = 64, 2, 2, 128
CLIP_DIM, CLIP_BLOCKS = 80, 2  # of which the last is in the file and never used, as in the official one
SPECIAL = ("<pad>", "</s>", "<unk>")


def dit_spec(kind: ModelType) -> DiTSpec:
    """Sizes of the i2v or the flf2v model."""
    return DiTSpec(kind, dim=256, ffn_dim=512, num_layers=5, in_dim=36, text_dim=TEXT_DIM, image_dim=CLIP_DIM)


def build_tokenizer() -> Tokenizer:
    """One token per word of the world's captions, lower case; `</s>` at the end, unknown words are `<unk>`."""
    words = {word: number for number, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def new_t5(generator: torch.Generator) -> UMT5EncoderModel:
    """A T5 with random weights."""
    shapes = {
        "token_embedding.weight": (len(SPECIAL) + len(vocabulary()), TEXT_DIM),
        "norm.weight": (TEXT_DIM,),
    }
    for i in range(TEXT_BLOCKS):
        shapes[f"blocks.{i}.pos_embedding.embedding.weight"] = (32, TEXT_HEADS)
        shapes |= {f"blocks.{i}.norm{n}.weight": (TEXT_DIM,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{name}.weight": (TEXT_DIM, TEXT_DIM) for name in "qkvo"}
        shapes |= {f"blocks.{i}.ffn.{name}.weight": (TEXT_FFN, TEXT_DIM) for name in ("gate.0", "fc1")}
        shapes[f"blocks.{i}.ffn.fc2.weight"] = (TEXT_DIM, TEXT_FFN)
    model = build_t5(shapes).eval()  # eval: no dropout, also while it is trained
    _randomise_(model, generator)
    return model


def new_clip(generator: torch.Generator) -> CLIPVisionModel:
    """An image encoder with random weights; its features are random projections of what is in each patch."""
    model = build_clip(dict(_clip_sizes())).eval().requires_grad_(False)
    _randomise_(model, generator)
    return model


def _clip_sizes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes that tell the dimensions of CLIP."""
    yield "visual.patch_embedding.weight", (CLIP_DIM, 3, 14, 14)
    yield from ((f"visual.transformer.{i}.mlp.0.weight", (2 * CLIP_DIM, CLIP_DIM)) for i in range(CLIP_BLOCKS))


@torch.no_grad()
def _randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Scales near 1, matrices by their number of inputs, everything else small: activations keep their size."""
    for name, tensor in model.named_parameters():
        values = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(values * 0.02 + (0.0 if name.endswith("bias") else 1.0))
        elif name.endswith("bias") or "relative" in name:
            tensor.copy_(values * 0.1)
        elif "shared" in name or "embed_tokens" in name or "position" in name or "class" in name:
            tensor.copy_(values * 0.5)
        else:
            tensor.copy_(values / math.sqrt(math.prod(tensor.shape[1:])))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json in the folder that FILES names"""
    (folder / FILES["tokenizer"]).mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / FILES["tokenizer"] / "tokenizer.json"))


def write_dit(folder: Path, kind: ModelType, dit: nn.Module) -> None:
    """bfloat16"""
    save_file({name: _plain(tensor, torch.bfloat16) for name, tensor in dit.state_dict().items()}, folder / FILES[kind])


def write_vae(folder: Path, vae: nn.Module) -> None:
    """float16: half the size, and a finer step than the 8 bits of a pixel"""
    torch.save(
        {name: _plain(tensor, torch.float16) for name, tensor in vae.state_dict().items()}, folder / FILES["vae"]
    )


def write_t5(folder: Path, model: UMT5EncoderModel) -> None:
    """bfloat16, official names"""
    state = model.state_dict()
    tensors = {name: _plain(state[t5_key(name)], torch.bfloat16) for name in t5_shapes(model)}
    torch.save(tensors, folder / FILES["t5"])


def write_clip(folder: Path, model: CLIPVisionModel) -> None:
    """float16, official names, with a last block of zeros"""
    state = model.state_dict()
    tensors = {
        name: _plain(torch.cat([state[key] for key in clip_keys(name)]).reshape(shape), torch.float16)
        for name, shape in clip_shapes(model).items()
    }
    first, last = "visual.transformer.0.", f"visual.transformer.{CLIP_BLOCKS - 1}."
    unused = {name.replace(first, last): torch.zeros_like(tensors[name]) for name in tensors if name.startswith(first)}
    torch.save(tensors | unused, folder / FILES["clip"])


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
