"""DiT files in every form of number (fp8 with scales, GGUF) give the output of the plain file; so do files of ours."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from tests.dit_cases import CPU, SPEC, random_dit, velocity
from tests.files.test_load import assert_holds, one_line_error
from tests.helpers import rel_l2
from wan.files import load
from wan.files import names as layouts
from wan.files.formats import TensorInfo, open_checkpoint
from wan.lora.network import inject_lora_
from wan.lora.options import NetworkConfig
from wan.memory.fp8 import FP8, Fp8Linear

State = dict[str, Tensor]
BLOCK_WEIGHT = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.\w+\.weight")
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def random_state() -> State:
    return random_dit().state_dict()


@pytest.fixture(scope="module")
def state(random_state) -> State:
    """Weights that every format holds exactly: float8 numbers."""
    return {name: tensor.to(FP8).float() for name, tensor in random_state.items()}


@pytest.fixture(scope="module")
def expected(state) -> Tensor:
    return output_of(state)


def output_of(state: State) -> Tensor:
    model = random_dit()
    model.load_state_dict(state)
    return velocity(model)


def matrices(state: State) -> list[str]:
    return [name for name in state if BLOCK_WEIGHT.fullmatch(name) and state[name].ndim == 2]


# Writers of one DiT in many forms


def in_dtype(dtype: torch.dtype, prefix: str = "") -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        save_file({prefix + name: tensor.to(dtype) for name, tensor in state.items()}, folder / "dit.safetensors")
        return folder / "dit.safetensors"

    return write


def scaled_by_comfyui(
    state: State,
    folder: Path,
    shape: tuple[int, ...] = (),
    prefix: str = PREFIX,
    new: bool = False,
    round_up: bool = True,
) -> Path:
    """float32 scales beside float8 weights, and the tensors that say how to compute; `new`: under the newer names.

    shape: of a scale, -1 standing for one per row. round_up: to powers of two, which lose nothing.
    """
    names = ("weight_scale", "input_scale") if new else ("scale_weight", "scale_input")
    entries = {name: tensor.to(torch.float16) for name, tensor in state.items()}
    for name in matrices(state):
        module = name.removesuffix("weight")
        scale = (state[name].abs().amax(1, keepdim=True) if -1 in shape else state[name].abs().max()) / 448
        scale = 2 ** scale.log2().ceil() if round_up else scale
        entries[name] = (state[name] / scale).to(FP8)
        entries |= {module + names[0]: scale.reshape(shape), module + names[1]: torch.tensor(0.7)}
        if new:
            entries[module + "comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if not new:
        entries["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    save_file({prefix + name: tensor for name, tensor in entries.items()}, folder / "dit.safetensors")
    return folder / "dit.safetensors"


def scaled_by_musubi(state: State, folder: Path, round_up: bool = True) -> Path:
    """Scales in bfloat16, one per row and 64 columns (docs/formats.md#fp8-weights)."""
    entries = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    for name in matrices(state):
        blocks = state[name].unflatten(1, (-1, 64))
        scale = (blocks.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-8)
        scale = (2 ** scale.log2().ceil() if round_up else scale).to(torch.bfloat16)
        entries[name] = (blocks / scale.float()).clamp(-448, 448).to(FP8).reshape(state[name].shape)
        entries[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(entries, folder / "dit.safetensors")
    return folder / "dit.safetensors"


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_gguf(kind: str, fold: bool = False, drop: bool = False) -> Callable[[State, Path], Path]:
    """Block weights as `kind`, others as F32; `fold`, `drop`: what ggml's tools do to five axes, and to leading 1s."""

    def write(state: State, folder: Path) -> Path:
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(folder / "dit.gguf", "wan")
        for name, tensor in state.items():
            number = gguf.GGMLQuantizationType[kind if name in matrices(state) else "F32"]
            values = tensor.numpy()
            if fold and values.ndim == 5:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
                values = values.reshape(values.shape[0], -1)
            if drop and values.ndim == 3:
                values = values[0]
            writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
        finish(writer)
        return folder / "dit.gguf"

    return write


LOSSLESS = {
    "bf16": in_dtype(torch.bfloat16),
    "fp16": in_dtype(torch.float16),
    "fp32": in_dtype(torch.float32),
    "fp8": in_dtype(FP8),
    "fp8, prefix": in_dtype(FP8, PREFIX),
    "scaled, ComfyUI": scaled_by_comfyui,
    "scaled, ComfyUI, no prefix": lambda state, folder: scaled_by_comfyui(state, folder, prefix=""),
    "scaled, ComfyUI, [1]": lambda state, folder: scaled_by_comfyui(state, folder, shape=(1,)),
    "scaled, newer ComfyUI": lambda state, folder: scaled_by_comfyui(state, folder, new=True),
    "scaled, per row": lambda state, folder: scaled_by_comfyui(state, folder, shape=(-1,)),
    "scaled, per row, [out, 1]": lambda state, folder: scaled_by_comfyui(state, folder, shape=(-1, 1)),
    "scaled, musubi": scaled_by_musubi,
    "gguf F32": in_gguf("F32"),
    "gguf F16": in_gguf("F16"),
    "gguf BF16": in_gguf("BF16"),
    "gguf BF16, folded": in_gguf("BF16", fold=True),
    "gguf BF16, without 1s": in_gguf("BF16", drop=True),
}


@pytest.mark.parametrize("form", LOSSLESS)
def test_a_dit_in_a_form_that_holds_its_weights_exactly_gives_the_plain_output(form, state, expected, tmp_path):
    path = LOSSLESS[form](state, tmp_path)
    assert load.inspect_dit(path) == SPEC
    model = load.load_dit(path, torch.float32, CPU)
    assert_holds(model, state)
    assert rel_l2(velocity(model), expected) < 1e-6


@pytest.mark.parametrize(
    ("form", "weight_error", "error"),  # of matrices, and of the velocity of this model; relative L2
    [
        (lambda state, folder: scaled_by_comfyui(state, folder, round_up=False), 0.03, 0.004),
        (lambda state, folder: scaled_by_musubi(state, folder, round_up=False), 0.03, 0.004),
        (in_gguf("Q8_0"), 0.006, 0.0006),
        (in_gguf("Q4_0"), 0.1, 0.012),
    ],
)
def test_a_rounded_dit_gives_nearly_the_plain_output(form, weight_error, error, random_state, tmp_path):
    path = form(random_state, tmp_path)
    assert load.dit_dtype(path) == torch.bfloat16
    assert load.load_dit(path, None, CPU).dtype == torch.bfloat16
    model = load.load_dit(path, torch.float32, CPU)
    for name in matrices(random_state):
        assert 1e-3 < rel_l2(model.state_dict()[name], random_state[name]) < weight_error
    assert 1e-5 < rel_l2(velocity(model), output_of(random_state)) < error


@pytest.mark.parametrize("write", [scaled_by_comfyui, scaled_by_musubi])
def test_scaled_weights_are_the_stored_numbers_times_their_scales(write, random_state, tmp_path):
    path = write(random_state, tmp_path, round_up=False)
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    model = load.load_dit(path, torch.float32, CPU).state_dict()
    header = layouts.dit_layout(open_checkpoint(path, "--dit", layouts.dit_name)).tensors
    for name in matrices(random_state):
        assert header[name] == TensorInfo(tuple(random_state[name].shape), torch.bfloat16, packed=True)
        scale = stored[name.removesuffix("weight") + "scale_weight"].float()
        blocks = stored[name].float().unflatten(1, (-1, 64) if scale.ndim else (1, -1))
        assert torch.equal(model[name], (blocks * scale).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cast", "scaled"])
@pytest.mark.parametrize("write", [scaled_by_comfyui, scaled_by_musubi])
def test_fp8_options_keep_the_numbers_of_a_scaled_file(write, kind, dtype, random_state, tmp_path):
    path = write(random_state, tmp_path, round_up=False)
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    plain = load.load_dit(path, dtype, CPU)
    model = load.load_dit(path, dtype, CPU, fp8=kind, blocks_on_host=2)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    assert {f"{name}.weight" for name in layers} == set(matrices(random_state))
    for name, layer in layers.items():
        assert torch.equal(layer.quantized.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        exact = dtype == torch.float32  # in bfloat16 scale and product are rounded, each by at most 1 / 256
        assert_close(layer.weight, plain.state_dict()[f"{name}.weight"], rtol=0 if exact else 2**-7, atol=0)
    assert rel_l2(velocity(model), velocity(plain)) < (1e-6 if exact else 0.01)


def test_weights_that_a_lora_changes_are_rounded_anew_and_others_are_not(random_state, tmp_path):
    path = scaled_by_comfyui(random_state, tmp_path, round_up=False)
    changed, kept = "blocks.0.self_attn.q", "blocks.1.self_attn.q"
    plain = load.load_dit(path, torch.float32, CPU)
    model = load.load_dit(
        path,
        torch.float32,
        CPU,
        lambda name, weight: weight + 0.5 if name == f"{changed}.weight" else weight,
        fp8="cast",
    )
    assert rel_l2(model.get_submodule(changed).weight, plain.get_submodule(changed).weight + 0.5) < 0.03
    assert torch.equal(model.get_submodule(kept).weight, plain.get_submodule(kept).weight)


def test_scales_that_float16_cannot_hold_are_replaced(random_state, tmp_path):
    small = {name: tensor * 1e-3 if name in matrices(random_state) else tensor for name, tensor in random_state.items()}
    path = scaled_by_comfyui(small, tmp_path, round_up=False)
    model = load.load_dit(path, torch.float16, CPU, fp8="scaled")
    for name in matrices(small):
        assert rel_l2(model.get_submodule(name.removesuffix(".weight")).weight, small[name]) < 0.05


# GGUF


def test_without_the_package_a_gguf_file_is_an_error_that_names_the_extra(state, tmp_path, monkeypatch):
    path = in_gguf("F16")(state, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert '".[gguf]"' in one_line_error(load.inspect_dit, path)


def test_a_quantisation_that_nothing_reads_is_an_error_with_its_name(state, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "dit.gguf", "wan")
    kind = gguf.GGMLQuantizationType.Q8_K
    data = torch.zeros(gguf.GGML_QUANT_SIZES[kind][1], dtype=torch.uint8).numpy()
    writer.add_tensor("patch_embedding.weight", data[None], raw_dtype=kind)
    finish(writer)
    assert "nothing here reads its quantisation Q8_K" in one_line_error(load.inspect_dit, tmp_path / "dit.gguf")


def test_a_gguf_file_that_claims_more_numbers_than_it_holds_is_an_error(state, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "dit.gguf", "wan")
    for name, tensor in state.items():
        is_patch = name == "patch_embedding.weight"
        writer.add_tensor(name, tensor.flatten(1)[:, :4].numpy() if is_patch else tensor.numpy())
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(state["patch_embedding.weight"].shape))
    finish(writer)
    assert "damaged" in one_line_error(load.inspect_dit, tmp_path / "dit.gguf")


def test_damaged_gguf_files_are_one_line(state, tmp_path):
    few = {name: tensor for name, tensor in state.items() if name.startswith(("blocks.0.ffn", "patch"))}
    whole = in_gguf("Q8_0")(few, tmp_path).read_bytes()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "damaged.gguf"
    for length in (0, 3, 4, 20, 60, 200, 1000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        assert "damaged" in one_line_error(load.inspect_dit, path)
    for _ in range(60):  # bytes of the header changed: some such files are sound, but have other tensors
        places = torch.randint(0, 700, (4,), generator=generator).tolist()
        values = torch.randint(0, 256, (4,), generator=generator).tolist()
        content = bytearray(whole)
        for place, value in zip(places, values, strict=True):
            content[place] = value
        path.write_bytes(content)
        one_line_error(load.inspect_dit, path)


# Writing


def test_a_merged_dit_is_written_under_official_names_and_loads_again(state, tmp_path):
    path = in_dtype(torch.bfloat16)(state, tmp_path)
    model = load.load_dit(path, None, CPU, merge=lambda name, weight: weight * 2)
    load.save_dit(tmp_path / "merged.safetensors", model, {"lora": "a"})
    written = load_file(tmp_path / "merged.safetensors")
    assert_close(written, {name: 2 * tensor.to(torch.bfloat16) for name, tensor in state.items()}, rtol=0, atol=0)
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lora": "a"}
    again = load.load_dit(tmp_path / "merged.safetensors", None, CPU)
    assert torch.equal(velocity(again), velocity(model))


@pytest.mark.parametrize("kind", ["cast", "scaled"])
def test_a_dit_in_fp8_is_written_in_fp8_and_loads_again_as_it_was(kind, random_state, tmp_path):
    model = load.load_dit(in_dtype(torch.bfloat16)(random_state, tmp_path), None, CPU, fp8=kind)
    load.save_dit(tmp_path / "merged.safetensors", model, {})
    stored = load_file(tmp_path / "merged.safetensors")
    assert all(stored[name].dtype == FP8 for name in matrices(random_state))
    again = load.load_dit(tmp_path / "merged.safetensors", None, CPU, fp8=kind)
    assert torch.equal(velocity(again), velocity(model))
    plain = load.load_dit(tmp_path / "merged.safetensors", torch.bfloat16, CPU)
    assert torch.equal(velocity(plain), velocity(model))


def test_a_dit_with_lora_layers_is_not_written(tmp_path):
    model = random_dit()
    inject_lora_(model, NetworkConfig(network_dim=2))
    with pytest.raises(ValueError, match="not the tensors of a plain DiT"):
        load.save_dit(tmp_path / "merged.safetensors", model, {})
    assert list(tmp_path.iterdir()) == []
