"""Files for tests/fuzz.py: sound ones of every kind, and the ways in which they go wrong."""

import json
import pickle
import struct
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from demo.tiny_models import write_tokenizer
from wan.generation import recipe
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

CODE_RAN = "hostile_code_ran"


class Hostile:
    """Runs code when it is unpickled without care."""

    def __reduce__(self):
        return exec, (f"import builtins; builtins.{CODE_RAN} = True",)


# --- files to begin with

DATASET = """
[general]
resolution = [48, 48]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
[[datasets]]
image_directory = "images"
control_directory = "controls"
cache_directory = "cache"
fp_1f_clean_indices = [0]
fp_1f_target_index = 1
num_repeats = 2
"""
LISTED = '{"image_path": "images/cat.png", "caption": "a cat", "control_path": "controls/cat.png"}\n'
PROMPT_LINE = (
    "a cat --w 48 --h 32 --s 2 --d 1 --l 2.5 --ci controls/cat.png --of control_index=0,target_index=1 --n ugly"
)
PROMPT_TOML = """
[prompt]
width = 48
negative_prompt = "ugly"
[[prompt.subset]]
prompt = "a cat"
control_image_path = ["controls/cat.png"]
one_frame = "control_index=0,target_index=1"
cfg_scale = 2.5
seed = 1
"""
OPTIONS = 'learning_rate = 1e-4\nnetwork_args = ["rank_dropout=0.1"]\n[more]\nsdpa = true\nmax_train_steps = 3\n'
RECIPE = {
    "options": {"prompt": "a", "seed": 1, "video_size": [48, 48], "sample_solver": "unipc", "fp8": False},
    "files": {"controls/cat.png": "0" * 16},
    "made_by": {"torch": "2"},
}
LORAS = [
    {
        "lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.ones(2, 4),
        "lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.ones(4, 2),
        "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(1.0),
        "lora_unet_blocks_1_ffn_0.diff": torch.ones(4, 4),
        "lora_unet_blocks_1_ffn_0.diff_b": torch.ones(4),
    },
    {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(4, 2),
        "transformer.blocks.0.attn1.to_q.lora_B.bias": torch.ones(4),
    },
    {
        **{f"diffusion_model.blocks.0.self_attn.q.hada_{part}": torch.ones(4, 2) for part in ("w1_a", "w2_a")},
        **{f"diffusion_model.blocks.0.self_attn.q.hada_{part}": torch.ones(2, 4) for part in ("w1_b", "w2_b")},
        "diffusion_model.blocks.1.ffn.0.lokr_w1": torch.ones(2, 2),
        "diffusion_model.blocks.1.ffn.0.lokr_w2_a": torch.ones(2, 1),
        "diffusion_model.blocks.1.ffn.0.lokr_w2_b": torch.ones(1, 2),
    },
]
LORA_METADATA = {
    "ss_one_frame": "control_index=0,target_index=1",
    "ss_network_args": '{"rank_dropout": "0.1"}',
    "ss_datasets": "[{}]",
    "lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 2}',
}
CONDITION = torch.cat([torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(4, 2, 2, 2), torch.zeros(16, 2, 2, 2)])
CACHE = {
    "latents_2x2x2_bfloat16": torch.zeros(16, 2, 2, 2),
    "latents_image_2x2x2_bfloat16": CONDITION.contiguous(),
    "clip_bfloat16": torch.zeros(1, 257, 4),
    "f_indices_int32": torch.tensor([0, 1], dtype=torch.int32),
}
TEXT_CACHE = {"varlen_t5_bfloat16": torch.zeros(3, 4)}
LATENT = {"latent": torch.zeros(16, 1, 2, 2)}
MODEL = {"blocks.0.cross_attn.k.weight": torch.zeros(4, 4), "blocks.0.self_attn.q.scale_weight": torch.ones(1)}
CACHE_METADATA = {"one_frame": "control_index=0,target_index=1", "caption1": "a", "seeds": "1", "settings": "{}"}


def pickled(content: object, **options: bool) -> bytes:
    file = BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


PICKLES = [
    *(pickled({"a": torch.ones(2)}, _use_new_zipfile_serialization=zipped) for zipped in (True, False)),
    *(pickled({"a": Hostile()}, _use_new_zipfile_serialization=zipped) for zipped in (True, False)),
    pickle.dumps(Hostile()),
]


def dit() -> dict[str, torch.Tensor]:
    """A model of the smallest size there can be."""
    spec = DiTSpec("i2v", dim=128, ffn_dim=16, num_layers=1, in_dim=36, text_dim=8, image_dim=16)
    with torch.device("meta"):
        state = WanDiT(spec).state_dict()
    return {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in state.items()}


def in_gguf() -> bytes:
    """Some tensors of each kind, and metadata."""
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "x.gguf", "wan")
        writer.add_array("comfy.gguf.orig_shape.a", [2, 32])
        for name, kind in {"a": "F32", "b": "Q8_0", "blocks.0.cross_attn.k.weight": "BF16"}.items():
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(np.ones((2, 32), np.float32), number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "x.gguf").read_bytes()


def picture(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png_with(text: str) -> bytes:
    info = PngInfo()
    info.add_text(recipe.KEY, text)
    return picture("PNG", pnginfo=info)


PICTURES = [picture("PNG"), picture("PNG", "P"), picture("PNG", "LA"), picture("JPEG", quality=50), picture("WEBP")]
PICTURES += [picture("BMP"), picture("TIFF"), picture("GIF", "P")]


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", -10.0], ["a", -1.0]],
        },
    }
).encode()


def write_folder() -> None:
    """What the files above name, in the working folder."""
    for name in ("images", "controls"):
        Path(name).mkdir()
        Path(name, "cat.png").write_bytes(picture("PNG"))
    Path("images/cat.txt").write_text("a cat", encoding="utf-8")
    Path("list.jsonl").write_text(LISTED, encoding="utf-8")
    write_tokenizer(Path("tokenizer"))


# --- how files go wrong


@st.composite
def damaged(draw, *originals: bytes) -> bytes:
    """An original with some of its bytes changed, left out, doubled or put in."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        at = draw(st.integers(0, len(content)))
        size = draw(st.integers(1, 8) | st.integers(1, 300))
        match draw(st.sampled_from(["cut", "remove", "repeat", "insert", "replace", "flip"])):
            case "cut":
                del content[at:]
            case "remove":
                del content[at : at + size]
            case "repeat":
                content[at:at] = content[at : at + size] * draw(st.sampled_from([1, 2, 200]))
            case "insert":
                content[at:at] = draw(st.binary(max_size=8))
            case "replace":
                part = draw(st.binary(min_size=1, max_size=8))
                content[at : at + len(part)] = part
            case "flip":
                if at < len(content):
                    content[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


WORDS = [
    "",
    "a",
    "\0",
    "\ud800",
    "../x",
    "cat.png",
    "-1",
    "nan",
    "1e999",
    "9" * 5000,
    "control_index=0",
    "[" * 3000,
    "猫",
]
texts = st.sampled_from(WORDS) | st.text(max_size=20)
numbers = st.integers(-3, 2000) | st.sampled_from([2**31, 2**63, -(2**64), 10**400]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def json_bytes(value: object) -> bytes:
    """With lone surrogates as escapes; numbers of any length."""
    sys.set_int_max_str_digits(0) if hasattr(sys, "set_int_max_str_digits") else None
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300) if hasattr(sys, "set_int_max_str_digits") else None


def tables(*keys: str, fixed: dict | None = None) -> SearchStrategy[dict]:
    """Some of the keys, and others, with any values."""
    names = st.sampled_from(keys) | st.text(max_size=8)
    return st.dictionaries(names, values, max_size=5).map(lambda found: {**(fixed or {}), **found})


@st.composite
def toml_lines(draw, *keys: str) -> bytes:
    lines = []
    for _ in range(draw(st.integers(1, 8))):
        key = draw(st.sampled_from(keys) | st.text(max_size=5))
        value = draw(values.map(lambda found: json.dumps(found, default=str)) | st.text(max_size=12))
        lines.append(
            draw(st.sampled_from([f"{key} = {value}", f"[{key}]", f"[[{key}]]", f"{key}", f"{key}.a={value}"]))
        )
    return "\n".join(lines).encode(errors="replace")


@st.composite
def safetensors(draw, kinds: list[dict[str, torch.Tensor]], metadata: dict[str, str]) -> bytes:
    """A file of one of these kinds, sound or damaged, or with its header made up in part."""
    tensors = draw(st.sampled_from(kinds))
    extra = draw(st.dictionaries(st.sampled_from(sorted(metadata)), st.text(max_size=20), max_size=1))
    left_out = draw(st.sampled_from([None, None, None, *tensors]))
    chosen = {name: tensor for name, tensor in tensors.items() if name != left_out}
    if changed := draw(st.sampled_from([None, None, *chosen])):
        old = chosen[changed]
        kind = draw(st.sampled_from([old.dtype, torch.bfloat16, torch.float16, torch.float64, torch.int32]))
        chosen[changed] = draw(st.sampled_from([old * torch.nan, old.flatten()[:1], old[None], old * 1e38, old])).to(
            kind
        )
    content = save(chosen, {**metadata, **extra})
    kind = draw(st.sampled_from(["sound", "damaged", "header", "length"]))
    if kind == "damaged":
        return draw(damaged(content))
    if kind == "sound":
        return content
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    if kind == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length))) + content[8:]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)) | st.text(max_size=5))
        entry = {
            "dtype": draw(st.sampled_from(["F32", "BF16", "F8_E4M3", "I32", "BOOL", "F8_E8M0", "F4", "X"])),
            "shape": draw(st.lists(st.integers(-1, 20) | st.just(2**40), max_size=5)),
            "data_offsets": draw(st.lists(st.integers(-8, len(body) + 8) | st.just(2**63), max_size=3)),
        }
        header[name] = draw(st.just(entry) | values)
    made = json_bytes(header)
    return struct.pack("<Q", len(made)) + made + body
