"""Checkpoints: every accepted spelling of a file gives the same module, every damaged or foreign one a single line."""

import builtins
import json
import os
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import manifest
from utils.errors import ConfigError
from wan.files import load as checkpoint
from wan.files import tokenizer as tokenizer_module
from wan.files.formats import Checkpoint, TensorInfo, check_tensors
from wan.nets.conditioning import Conditioning
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.nets.vae import WanVAE

SPEC = DiTSpec("i2v", dim=128, ffn_dim=96, num_layers=2, in_dim=36, text_dim=24, image_dim=40)
PROBE = "blocks.0.cross_attn.k.weight"
PREFIX = "model.diffusion_model."


def random_state(module: torch.nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def dit_state() -> dict[str, Tensor]:
    return random_state(WanDiT(SPEC))


@pytest.fixture(scope="module")
def vae_state() -> dict[str, Tensor]:
    return random_state(WanVAE(4))


@pytest.fixture
def dit_file(dit_state, tmp_path) -> Path:
    save_file(dit_state, tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def save_parts(state: dict[str, Tensor], folder: Path, count: int = 3) -> list[Path]:
    names = list(state)
    paths = [folder / f"dit-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        save_file({name: state[name] for name in names[i::count]}, path)
    return paths


def assert_holds(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    assert_close(dict(module.state_dict()), state, rtol=0, atol=0)


def one_line_error(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.isprintable(), message  # so without line breaks
    assert len(message) < 800
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)
    return message


# What loads


def test_a_dit_file_gives_its_spec_and_a_frozen_module_with_its_weights(dit_file, dit_state):
    assert checkpoint.inspect_dit(dit_file) == SPEC
    model = checkpoint.load_dit(dit_file, torch.float32, "cpu")
    assert_holds(model, dit_state)
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def test_a_prefixed_file_gives_the_same_module(dit_state, tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file({PREFIX + name: tensor for name, tensor in dit_state.items()}, path)
    assert_holds(checkpoint.load_dit(path, torch.float32, "cpu"), dit_state)


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_of_a_split_model_stands_for_all(named, dit_state, tmp_path):
    part = save_parts(dit_state, tmp_path)[named]
    assert checkpoint.inspect_dit(part) == SPEC
    assert_holds(checkpoint.load_dit(part, torch.float32, "cpu"), dit_state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_pickles_of_tensors_load_in_the_new_and_the_old_format(suffix, zipped, vae_state, tmp_path):
    path = tmp_path / f"vae{suffix}"
    torch.save(vae_state, path, _use_new_zipfile_serialization=zipped)
    assert checkpoint.inspect_vae(path) == 4
    assert_holds(checkpoint.load_vae(path, torch.float32, "cpu"), vae_state)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, None, torch.float32),
        (torch.float8_e4m3fn, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_without_a_dtype_the_dit_keeps_that_of_the_file_but_not_fp8(stored, asked, expected, dit_state, tmp_path):
    path = tmp_path / "dit.safetensors"
    # the one tensor that tells the dtype decides for all
    state = {name: tensor.to(stored if name == PROBE else torch.float32) for name, tensor in dit_state.items()}
    save_file(state, path)
    assert_holds(checkpoint.load_dit(path, asked, "cpu"), {name: tensor.to(expected) for name, tensor in state.items()})


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_merging_sees_every_weight_under_its_official_name_in_the_dtype_of_the_model(prefix, dit_state, tmp_path):
    path, seen = tmp_path / "dit.safetensors", []
    save_file({prefix + name: tensor for name, tensor in dit_state.items()}, path)

    def merge(name: str, weight: Tensor) -> Tensor:
        seen.append(name)
        return weight + 1e-3 if name == PROBE else weight

    cast = {name: tensor.to(torch.bfloat16) for name, tensor in dit_state.items()}
    model = checkpoint.load_dit(path, torch.bfloat16, "cpu", merge=merge)
    assert_holds(model, cast | {PROBE: cast[PROBE] + 1e-3})
    assert sorted(seen) == sorted(dit_state)


def test_merging_in_place_leaves_the_file_alone(dit_file, dit_state):
    checkpoint.load_dit(dit_file, torch.float32, "cpu", merge=lambda name, weight: weight.zero_())
    assert_close(load_file(dit_file), dit_state, rtol=0, atol=0)


def test_the_attention_function_is_handed_on(dit_file):
    calls = []

    def attention(q, k, v):
        calls.append(q.shape)
        return q

    model = checkpoint.load_dit(dit_file, torch.float32, "cpu", attention=attention)
    latents = torch.zeros(1, 16, 1, 2, 2)
    model(
        latents,
        Conditioning(torch.zeros(1, 20, 1, 2, 2), torch.zeros(1, 1, 257, 40)),
        torch.tensor([500.0]),
        torch.zeros(1, 512, 24),
        torch.tensor([[0]]),
    )
    assert len(calls) == 3 * SPEC.num_layers  # self, text and image attention


def test_inspecting_reads_no_weights(dit_file, vae_state, tmp_path, monkeypatch):
    save_file(vae_state, tmp_path / "vae.safetensors")

    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    assert checkpoint.inspect_dit(dit_file) == SPEC
    assert checkpoint.inspect_vae(tmp_path / "vae.safetensors") == 4


def test_importing_loads_neither_transformers_nor_cuda():
    code = "import sys, torch, wan.files.load; print('transformers' in sys.modules, torch.cuda.is_initialized())"
    root = Path(checkpoint.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


# What does not load


class Hostile:
    """Runs code when it is unpickled without care."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.hostile_code_ran = True",))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
WEB_PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


def broken_files(folder: Path, state: dict[str, Tensor]) -> dict[str, tuple[Path, str]]:
    """{case: (file, words of the message)}"""
    for name in ("dit.safetensors", "whole.pth"):
        (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    whole, pickled = (folder / "dit.safetensors").read_bytes(), (folder / "whole.pth").read_bytes()
    noise = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(3)).tolist())
    strange = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    contents = {
        "cut.safetensors": (whole[: len(whole) // 2], "damaged or incomplete"),
        "cut_in_header.safetensors": (whole[:1000], "damaged or incomplete"),
        "empty.safetensors": (b"", "damaged or incomplete"),
        "noise.safetensors": (noise, "damaged or incomplete"),
        "long_header.safetensors": (struct.pack("<Q", 10**6) + b'{"a": 1}', "damaged or incomplete"),
        **{f"pointer{suffix}": (LFS_POINTER, "is a Git LFS pointer") for suffix in (".safetensors", ".pth", ".gguf")},
        **{f"page{suffix}": (WEB_PAGE, "is a web page") for suffix in (".safetensors", ".pth", ".gguf")},
        "page.index.json": (WEB_PAGE, "is a web page"),
        "list.index.json": (b"[]", "is not the index of a split model"),
        "deep.index.json": (b"[" * 10**5, "is not the index of a split model"),
        "outside.index.json": (b'{"weight_map": {"a": "../dit.safetensors"}}', "is not the index of a split model"),
        "odd.index.json": (b'{"weight_map": {"a": "", "b": 3}}', "is not the index of a split model"),
        "parts.index.json": (
            b'{"weight_map": {"a": "x\\nx.safetensors"}}',
            "not all of its 1 parts are here (x x.safe",
        ),
        "dtype.safetensors": (struct.pack("<Q", len(strange)) + strange + bytes(4), "F8_E8M0"),
        "cut.pth": (pickled[: len(pickled) // 2], "damaged"),
        "empty.pth": (b"", "damaged"),
        "noise.pth": (noise, "damaged"),
        "noise.gguf": (noise, "damaged or incomplete" if find_spec("gguf") else "the package gguf"),
        "model.onnx": (noise, "not named like a model file"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    objects = {"code.pth": {"weight": Hostile()}, "list.pth": [torch.zeros(1)], "nested.pth": {"state_dict": state}}
    for name, content in objects.items():
        torch.save(content, folder / name)
    (folder / "folder.safetensors").mkdir()
    words = {"code.pth": "never run", "list.pth": "something else", "nested.pth": "something else"}
    words |= {name: text for name, (_, text) in contents.items()}
    words |= {"folder.safetensors": "is a folder", "absent.safetensors": "does not exist"}
    return {name: (folder / name, text) for name, text in words.items()}


def test_unreadable_files_are_one_line_with_flag_path_and_reason(dit_state, tmp_path):
    inspectors = {
        "--dit": checkpoint.inspect_dit,
        "--vae": checkpoint.inspect_vae,
        "--t5": checkpoint.inspect_t5,
        "--clip": checkpoint.inspect_clip,
    }
    for path, words in broken_files(tmp_path, dit_state).values():
        for flag, inspect in inspectors.items():
            message = one_line_error(inspect, path)
            assert message.startswith(f"{flag} {path}: ") and words in message and ("; " in message), message
    assert not hasattr(builtins, "hostile_code_ran")


@pytest.mark.parametrize("prefix", ["model.", "diffusion_model."])
def test_the_prefixes_of_repackaged_files_are_dropped(prefix, dit_state, vae_state, tmp_path):
    state, load = (vae_state, checkpoint.load_vae) if prefix == "model." else (dit_state, checkpoint.load_dit)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "in.safetensors")
    assert_holds(load(tmp_path / "in.safetensors", torch.float32, "cpu"), state)


def test_a_split_model_is_read_by_its_index_whatever_its_parts_are_called(dit_state, tmp_path):
    parts = [path.rename(tmp_path / f"part{i}.safetensors") for i, path in enumerate(save_parts(dit_state, tmp_path))]
    weight_map = {name: parts[i % 3].name for i, name in enumerate(dit_state)}
    index = tmp_path / "dit.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_holds(checkpoint.load_dit(index, None, "cpu"), dit_state)
    parts[1].unlink()
    assert "not all of its 3 parts are here (part1.safetensors); down" in one_line_error(checkpoint.inspect_dit, index)


def test_a_missing_part_is_named(dit_state, tmp_path):
    first, second, third = save_parts(dit_state, tmp_path)
    second.unlink()
    for part in (first, third):
        assert second.name in one_line_error(checkpoint.inspect_dit, part)


def test_a_tensor_in_two_parts_or_under_two_names_is_an_error(dit_state, tmp_path):
    parts = save_parts(dit_state, tmp_path)
    for part in parts[1:]:
        save_file({PROBE: dit_state[PROBE]}, part)
    assert f"'{PROBE}' appears twice" in one_line_error(checkpoint.inspect_dit, parts[0])
    save_file(dit_state | {PREFIX + PROBE: dit_state[PROBE].clone()}, tmp_path / "both.safetensors")
    assert f"'{PROBE}' appears twice" in one_line_error(checkpoint.inspect_dit, tmp_path / "both.safetensors")


NORM = "blocks.1.norm3.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NORM: None}, f"1 missing ({NORM})"),
        ({"blocks.0.extra.weight": torch.zeros(2)}, "1 unexpected (blocks.0.extra.weight)"),
        ({NORM: torch.zeros(3)}, f"1 of the wrong shape ({NORM} is [3] instead of [128])"),
        ({NORM: torch.zeros(128, dtype=torch.int8)}, "quantised"),
        ({"blocks.0.ffn.0.scale_weight": torch.ones(2, 96)}, "blocks.0.ffn.0.scale_weight is [2, 96] for a weight"),
        ({"blocks.0.ffn.0.scale_weight": torch.ones(96, 3, 1)}, "[96, 3, 1] for a weight of [96, 128]"),
        ({"blocks.0.ffn.0.scale_weight": torch.tensor(1)}, "blocks.0.ffn.0.scale_weight is torch.int64"),
        ({"blocks.0.ffn.9.scale_weight": torch.ones(())}, "1 unexpected (blocks.0.ffn.9.scale_weight)"),
        ({"line\nbreak\x1b[31m": torch.zeros(2)}, "1 unexpected (line break"),
        ({"patch_embedding.weight": None}, "patch_embedding.weight"),
        ({"patch_embedding.weight": torch.zeros(128, 48, 1, 2, 2)}, "not supported"),
    ],
)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_dit_with_other_tensors_is_refused_before_loading(prefix, change, words, dit_state, tmp_path):
    state = {name: tensor for name, tensor in (dit_state | change).items() if tensor is not None}
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "dit.safetensors")
    for function, args in ((checkpoint.inspect_dit, ()), (checkpoint.load_dit, (None, "cpu"))):
        message = one_line_error(function, tmp_path / "dit.safetensors", *args)
        assert message.startswith("--dit ") and words in message


def test_all_differences_are_counted_and_the_first_are_named():
    expected = {f"w{i}": (2, 2) for i in range(10)}
    found = {"w0": (2, 2), "w1": (2, 3), "x": (1,), **{f"w{i}": (2, 2) for i in range(6, 10)}}
    assert one_line_error(check_tensors, expected, found, "--dit a") == (
        "--dit a: of its tensors 4 missing (w2, w3, w4, ...), 1 unexpected (x), "
        "1 of the wrong shape (w1 is [2, 3] instead of [2, 2]); use a file in the original Wan2.1 layout"
    )
    check_tensors(expected, dict(reversed(expected.items())), "--dit a")


def test_a_file_of_another_model_is_refused_under_every_flag(dit_file, vae_state, tmp_path):
    save_file(vae_state, tmp_path / "vae.safetensors")
    for inspect in (checkpoint.inspect_vae, checkpoint.inspect_t5, checkpoint.inspect_clip):
        one_line_error(inspect, dit_file)
    for inspect in (checkpoint.inspect_dit, checkpoint.inspect_t5, checkpoint.inspect_clip):
        one_line_error(inspect, tmp_path / "vae.safetensors")


def test_a_vae_with_a_missing_tensor_is_refused_as_safetensors_too(vae_state, tmp_path):
    kept = {name: tensor for name, tensor in vae_state.items() if name != "decoder.head.0.gamma"}
    save_file(kept, tmp_path / "vae.safetensors")
    assert "1 missing (decoder.head.0.gamma)" in one_line_error(
        checkpoint.load_vae, tmp_path / "vae.safetensors", torch.float32, "cpu"
    )


# The tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    """A unigram tokenizer with the normalisation that AutoTokenizer of transformers 5 drops for class T5Tokenizer."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("F", -2.0), ("fi", -2.0), (",", -2.0)]
    built = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    built.normalizer = normalizers.NFKC()
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    return tmp_path


def test_the_tokenizer_file_is_used_as_it_is(tokenizer_dir):
    tokenizer_module.check_tokenizer(tokenizer_dir)
    tokenizer = tokenizer_module.load_tokenizer(tokenizer_dir)
    assert tokenizer("Ｆﬁ，").input_ids == [3, 4, 5, 6, 1]
    assert tokenizer.pad_token_id == 0


def test_a_folder_without_a_tokenizer_is_an_error_before_loading(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        message = one_line_error(tokenizer_module.check_tokenizer, folder)
        assert message.startswith(f"--t5_tokenizer {folder}: ") and "google/umt5-xxl" in message
        assert one_line_error(tokenizer_module.load_tokenizer, folder) == message


@pytest.mark.parametrize("broken", ["{", '{"model": 3}', None])
def test_a_damaged_tokenizer_or_one_without_an_end_token_is_an_error(broken, tokenizer_dir):
    path = tokenizer_dir / "tokenizer.json"
    if broken is None:
        content = json.loads(path.read_text(encoding="utf-8"))
        broken = json.dumps(content | {"post_processor": None})
    path.write_text(broken, encoding="utf-8")
    assert "is not a umT5 tokenizer" in one_line_error(tokenizer_module.load_tokenizer, tokenizer_dir)


def test_a_pointer_in_the_place_of_a_tokenizer_is_named(tokenizer_dir):
    (tokenizer_dir / "tokenizer.json").write_bytes(LFS_POINTER)
    assert "is a Git LFS pointer, not the file" in one_line_error(tokenizer_module.load_tokenizer, tokenizer_dir)


def test_without_a_folder_the_tokenizer_comes_from_the_hub(tokenizer_dir, monkeypatch):
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tokenizer_dir / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer_module.check_tokenizer(None)
    assert asked == []
    assert tokenizer_module.load_tokenizer(None)("F").input_ids == [3, 4, 1]
    assert asked == [("google/umt5-xxl", "tokenizer.json")]


def test_an_unreachable_hub_is_one_line_that_says_what_to_download(monkeypatch):
    def fail(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = one_line_error(tokenizer_module.load_tokenizer, None)
    assert "tokenizer.json of google/umt5-xxl" in message and "--t5_tokenizer DIR" in message


# The published layouts


def open_manifest(name: str, change: dict[str, TensorInfo | None] | None = None):
    """Stands in for open_checkpoint: the names and shapes of a published file, without weights."""
    tensors = {key: TensorInfo(shape, dtype) for key, (shape, dtype) in manifest(name).items()}
    tensors = {key: info for key, info in (tensors | (change or {})).items() if info is not None}

    def reader(info: TensorInfo):
        return lambda: torch.empty(info.shape, dtype=info.dtype, device="meta")

    def open_(path, flag, rename=str) -> Checkpoint:
        assert [rename(key) for key in tensors] == list(tensors)
        return Checkpoint(flag, Path(path), tensors, {key: reader(info) for key, info in tensors.items()})

    return open_


CLIP_UNUSED = 12 * 1280**2 + 13 * 1280 + 2 * 1280 + 1280 * 1024  # the last block, post_norm and head
PUBLISHED = [  # manifest, loader, parameters of the module, a tensor it needs
    ("dit_i2v-14B", checkpoint.load_dit, 16_394_878_784, "blocks.39.cross_attn.k_img.bias"),
    ("dit_flf2v-14B", checkpoint.load_dit, 16_395_536_704, "blocks.0.cross_attn.norm_k_img.weight"),
    ("dit_t2v-14B", checkpoint.load_dit, 14_288_491_584, "head.modulation"),
    ("dit_t2v-1.3B", checkpoint.load_dit, 1_418_996_800, "blocks.29.ffn.2.bias"),
    ("vae", checkpoint.load_vae, 126_892_531, "encoder.downsamples.5.time_conv.bias"),
    ("t5_umt5-xxl-enc", checkpoint.load_t5, 5_680_910_336, "blocks.23.ffn.gate.0.weight"),
    ("clip_xlm-roberta-vit-h-14", checkpoint.load_clip, 632_076_800 - CLIP_UNUSED, "visual.transformer.30.mlp.0.bias"),
]


@pytest.mark.parametrize(("name", "load", "parameters", "one_tensor"), PUBLISHED)
def test_the_published_file_fills_the_whole_module_and_nothing_is_left_over(
    name, load, parameters, one_tensor, monkeypatch
):
    monkeypatch.setattr(checkpoint, "open_checkpoint", open_manifest(name))
    model = load("file", torch.bfloat16, "meta")
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    extra = f"{one_tensor}.more"
    for change, words in (
        ({one_tensor: None}, f"1 missing ({one_tensor})"),
        ({extra: TensorInfo((1,), torch.float32)}, f"1 unexpected ({extra})"),
        ({one_tensor: TensorInfo((7, 7, 7), torch.float32)}, f"1 of the wrong shape ({one_tensor} "),
    ):
        monkeypatch.setattr(checkpoint, "open_checkpoint", open_manifest(name, change))
        assert words in one_line_error(load, "file", torch.bfloat16, "meta")


def test_the_published_files_tell_their_dimensions(monkeypatch):
    expected = {"dit_i2v-14B": ("i2v", 5120, 40, 1280), "dit_flf2v-14B": ("flf2v", 5120, 40, 1280)}
    expected |= {"dit_t2v-14B": ("t2v", 5120, 40, None), "dit_t2v-1.3B": ("t2v", 1536, 30, None)}
    for name, dimensions in expected.items():
        monkeypatch.setattr(checkpoint, "open_checkpoint", open_manifest(name))
        spec = checkpoint.inspect_dit("file")
        assert (spec.model_type, spec.dim, spec.num_layers, spec.image_dim) == dimensions
        assert spec.text_dim == 4096
    others = {"vae": checkpoint.inspect_vae, "t5_umt5-xxl-enc": checkpoint.inspect_t5}
    others["clip_xlm-roberta-vit-h-14"] = checkpoint.inspect_clip
    for (name, inspect), width in zip(others.items(), (96, 4096, 1280), strict=True):
        monkeypatch.setattr(checkpoint, "open_checkpoint", open_manifest(name))
        assert inspect("file") == width


def test_a_wan22_checkpoint_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(checkpoint, "open_checkpoint", open_manifest("dit_i2v-A14B"))
    assert "Wan2.2" in one_line_error(checkpoint.inspect_dit, "file")


def test_the_small_files_in_the_official_layouts_load(tiny):
    for kind in ("i2v", "flf2v"):
        assert checkpoint.inspect_dit(tiny[kind]).model_type == kind
        assert_holds(checkpoint.load_dit(tiny[kind], None, "cpu"), load_file(tiny[kind]))
    stored = torch.load(tiny["vae"], weights_only=True)
    assert checkpoint.inspect_vae(tiny["vae"]) == 8
    assert_holds(checkpoint.load_vae(tiny["vae"], torch.float32, "cpu"), stored)
    assert checkpoint.inspect_t5(tiny["t5"]) == 64
    assert checkpoint.inspect_clip(tiny["clip"]) == 160


def test_transformers_is_never_imported_on_the_meta_device(tiny):
    code = """if True:
    import sys, torch
    class Watch:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "transformers" and torch.get_default_device().type == "meta":
                raise AssertionError(name)
    sys.meta_path.insert(0, Watch())
    from wan.files import load
    load.inspect_t5(sys.argv[1])
    load.inspect_clip(sys.argv[2])
    """
    run = subprocess.run([sys.executable, "-c", code, tiny["t5"], tiny["clip"]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_ends_in_zeros_is_named(cut, dit_state, tmp_path, caplog):
    """As where room was reserved for a download that broke off; what is there is read all the same."""
    path = tmp_path / "dit.safetensors"
    save_file(dit_state, path)
    size = path.stat().st_size
    assert size > 1 << 20
    if cut:
        os.truncate(path, size - (1 << 17))
        os.truncate(path, size)
    checkpoint.load_dit(path, None, torch.device("cpu"))
    assert ("ends in zeros" in caplog.text) == cut
