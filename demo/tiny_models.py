"""Small models with random weights in the layouts of the official files, and a tokenizer: for the demo and for tests.

Everything but the size is as in the real files (docs/formats.md#model-files), so every code path runs; pictures are
noise.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.nets.vae import WanVAE

Shapes = dict[str, tuple[int, ...]]

TEXT_DIM, CLIP_DIM, VAE_DIM = 64, 160, 8
LETTERS = [chr(code) for code in range(33, 127)]
VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((letter, -4.0) for letter in LETTERS)]

FILES = {  # kind of model -> file name of the published checkpoint that it stands for
    "i2v": "wan2.1_i2v_480p_14B_bf16.safetensors",
    "flf2v": "wan2.1_flf2v_720p_14B_fp16.safetensors",
    "vae": "Wan2.1_VAE.pth",
    "t5": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "tokenizer": "tokenizer",
}


def write_models(folder: Path, seed: int = 0) -> None:
    """Write all of FILES into `folder`, which is created; the same seed gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for kind, dtype in (("i2v", torch.bfloat16), ("flf2v", torch.float16)):
        spec = DiTSpec(kind, dim=256, ffn_dim=384, num_layers=2, in_dim=36, text_dim=TEXT_DIM, image_dim=CLIP_DIM)
        save_file(_random(_shapes(WanDiT, spec), generator, dtype), folder / FILES[kind])
    torch.save(_random(_shapes(WanVAE, VAE_DIM), generator), folder / FILES["vae"])
    torch.save(_random(dict(_t5_shapes()), generator, torch.bfloat16), folder / FILES["t5"])
    torch.save(_random(dict(_clip_shapes()), generator, torch.float16), folder / FILES["clip"])
    write_tokenizer(folder / FILES["tokenizer"])


def write_tokenizer(folder: Path) -> None:
    """A unigram tokenizer of single letters with umT5's special tokens; it puts `</s>` at the end."""
    tokenizer = Tokenizer(models.Unigram(VOCABULARY, unk_id=2))
    tokenizer.add_special_tokens([name for name, _ in VOCABULARY[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def _shapes(build: type[torch.nn.Module], *arguments: object) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build(*arguments).state_dict().items()}


def _t5_shapes(blocks: int = 2, heads: int = 2, ffn: int = 160) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embedding.weight", (len(VOCABULARY), TEXT_DIM)
    yield "norm.weight", (TEXT_DIM,)
    for i in range(blocks):
        yield f"blocks.{i}.pos_embedding.embedding.weight", (32, heads)
        yield from ((f"blocks.{i}.norm{n}.weight", (TEXT_DIM,)) for n in (1, 2))
        yield from ((f"blocks.{i}.attn.{name}.weight", (TEXT_DIM, TEXT_DIM)) for name in "qkvo")
        yield from ((f"blocks.{i}.ffn.{name}.weight", (ffn, TEXT_DIM)) for name in ("gate.0", "fc1"))
        yield f"blocks.{i}.ffn.fc2.weight", (TEXT_DIM, ffn)


def _clip_shapes(blocks: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The visual part, 224 pixels in patches of 14; the last block is in the file and never used."""
    dim = CLIP_DIM
    yield from {"visual.cls_embedding": (1, 1, dim), "visual.pos_embedding": (1, 257, dim)}.items()
    yield from {"visual.patch_embedding.weight": (dim, 3, 14, 14), "visual.head": (dim, 64)}.items()
    linear = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.0": (4 * dim, dim), "mlp.2": (dim, 4 * dim)}
    layers = {"visual.pre_norm": (dim,), "visual.post_norm": (dim,)}
    for i in range(blocks):
        layers |= {f"visual.transformer.{i}.norm{n}": (dim,) for n in (1, 2)}
        layers |= {f"visual.transformer.{i}.{name}": shape for name, shape in linear.items()}
    for name, shape in layers.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def _random(shapes: Shapes, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights that keep the size of activations: scales near 1, matrices by their number of inputs, the rest small."""
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        is_weight = name.endswith(".weight")
        if name.endswith(".gamma") or (is_weight and len(shape) == 1):
            values = 1 + 0.1 * values
        elif is_weight and "token_embedding" not in name:
            values = values / math.sqrt(math.prod(shape[1:]))
        elif not is_weight:
            values = 0.1 * values
        tensors[name] = values.to(dtype)
    return tensors
