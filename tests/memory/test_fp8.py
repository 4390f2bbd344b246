"""fp8 weights: the rounding against its definition, and models that use them against ones with the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tests.dit_cases import CPU, SPEC, lora_gradients, random_dit, velocity, with_lora
from tests.helpers import golden, rel_l2
from wan.files.load import dit_dtype, load_dit, load_t5
from wan.lora.module import add_delta
from wan.memory.fp8 import FP8, Fp8Linear, dequantize, fp8_entries, is_dit_weight, quantize, quantize_rows, use_fp8_
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.nets.t5 import encode_text, t5_key, t5_shapes

KINDS = ["cast", "scaled"]


def random_weight(rows: int = 5, columns: int = 192, size: float = 0.03) -> torch.Tensor:
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def in_fp8(model, kind):
    """The same model with fp8 weights, made by way of a state dict."""
    state = model.state_dict()
    layers = use_fp8_(model, torch.float32, kind, is_dit_weight)
    entries = {}
    for key, tensor in state.items():
        entries |= fp8_entries(layers, key, tensor.clone())
    model.load_state_dict(entries, assign=True)
    return model.requires_grad_(False)


def with_rounded_weights(model, kind):
    """The same model, computing in full precision with the numbers that fp8 leaves."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            module.weight.data = dequantize(*quantize(module.weight.data, kind), torch.float32)
    return model


# Rounding


def test_a_cast_keeps_the_numbers_of_fp8_and_cuts_larger_ones_off():
    exact = torch.tensor([[0.0, 1.0, -1.125, 448.0, 2**-9, -(2**-6)]])
    assert torch.equal(dequantize(*quantize(exact, "cast"), torch.float32), exact)
    assert quantize(torch.tensor([[500.0, -1e6]]), "cast")[0].tolist() == [[448.0, -448.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_moves_further_than_half_a_step_of_fp8(kind, dtype):
    weight = random_weight(64).to(dtype)
    quantized, scale = quantize(weight, kind)
    assert quantized.dtype == FP8
    unit = torch.ones(64, 192) if scale is None else scale.float().expand(64, 3, 64).reshape(64, 192)
    exponent = torch.frexp(weight.float() / unit).exponent.clamp(min=-5)  # below 2^-6 the steps stay the same
    half_step = unit * 2.0 ** (exponent - 5)
    error = (dequantize(quantized, scale, torch.float32) - weight.float()).abs()
    assert (error <= half_step * 1.0001).all()
    assert error.max() > 0


def test_a_scale_belongs_to_a_row_and_64_columns_and_makes_their_largest_weight_448():
    weight = random_weight()
    quantized, scale = quantize(weight, "scaled")
    assert scale.shape == (5, 3, 1) and scale.dtype == weight.dtype
    assert (quantized.float().unflatten(1, (3, 64)).abs().amax(-1) == 448).all()
    louder = weight.clone()
    louder[2, 64:128] *= 2**10  # a power of two changes the scale and nothing else
    other, other_scale = quantize(louder, "scaled")
    assert torch.equal(other.float(), quantized.float())
    scale[2, 1] *= 2**10
    assert torch.equal(other_scale, scale)


def test_rows_that_64_does_not_divide_have_one_scale():
    quantized, scale = quantize(random_weight(columns=160), "scaled")
    assert scale.shape == (5, 1) and (quantized.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_zero_stay_zero(dtype):
    zeros = torch.zeros(2, 128, dtype=dtype)
    assert torch.equal(dequantize(*quantize(zeros, "scaled"), dtype), zeros)


def test_scales_keep_small_weights_that_a_cast_loses():
    weight = random_weight(64, 256, size=1e-3)
    cast, scaled = (rel_l2(dequantize(*quantize(weight, kind), torch.float32), weight) for kind in KINDS)
    assert scaled < 0.03 < 0.3 < cast


def test_rows_of_numbers_keep_their_largest_and_half_a_step_of_the_others():
    x = random_weight(3, 64) * torch.tensor([[1e-3], [1.0], [1e3]])
    values, scale = quantize_rows(x)
    assert values.dtype == FP8 and scale.shape == (3, 1) and scale.dtype == torch.float32
    assert (values.float().abs().amax(1) == 448).all()
    error = (values.float() * scale - x).abs()
    assert (error <= (x.abs() / 16).maximum(scale * 2**-10) * 1.0001).all() and error.max() > 0
    assert quantize_rows(torch.zeros(2, 3)).values.float().eq(0).all()
    weight = quantize(x, "rows")
    assert_close(dequantize(*weight, torch.float32), values.float() * scale, rtol=0, atol=0)


# Layers


def test_a_layer_of_the_kind_rows_multiplies_rounded_inputs_and_rounded_weights():
    layer, entries = fp8_layer("rows")
    x = torch.randn(2, 7, 192, generator=torch.Generator().manual_seed(1))
    weight = entries["0.quantized"].double() * entries["0.scale_weight"].double()
    values, scale = quantize_rows(x)
    expected = (values.double() * scale.double()) @ weight.T + entries["0.bias"].double()
    assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert 1e-3 < rel_l2(layer(x), F.linear(x, random_weight(), entries["0.bias"])) < 0.1


def fp8_layer(kind, bias=True):
    base = nn.Linear(192, 5, bias=bias)
    holder = nn.Sequential(base)
    state = {"0.weight": random_weight()} | ({"0.bias": torch.linspace(-1, 1, 5)} if bias else {})
    layers = use_fp8_(holder, torch.float32, kind)
    entries = {}
    for key, tensor in state.items():
        entries |= fp8_entries(layers, key, tensor)
    holder.load_state_dict(entries, assign=True)
    return holder[0], entries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_dequantised_weight_forwards_and_backwards(kind, bias):
    layer, entries = fp8_layer(kind, bias)
    names = {"quantized"} | ({"scale_weight"} if kind == "scaled" else set()) | ({"bias"} if bias else set())
    assert set(layer.state_dict()) == names and {f"0.{name}" for name in names} == set(entries)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (192, 5)
    assert_close(layer.weight, random_weight(), rtol=0, atol=0.01)
    x = torch.randn(2, 3, 192, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, plain = layer(x), F.linear(y, layer.weight, layer.bias)
    assert torch.equal(ours, plain)
    ours.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_full_weight_waits_for_the_backward_pass(kind):
    layer, _ = fp8_layer(kind)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 192, requires_grad=True))
    assert kept and all(tensor.data_ptr() in {p.data_ptr() for p in layer.parameters()} for tensor in kept)


# Models


def test_the_linear_layers_of_the_blocks_and_no_others_are_in_fp8():
    model = in_fp8(random_dit(), "scaled")
    layers = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    parts = [f"{attention}.{x}" for attention in ("self_attn", "cross_attn") for x in "qkvo"]
    parts += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
    assert layers == {f"blocks.{i}.{part}" for i in range(SPEC.num_layers) for part in parts}
    weights = [tensor for name, tensor in model.state_dict().items() if name.endswith("quantized")]
    assert len(weights) == len(layers) and all(weight.dtype == FP8 for weight in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dit_in_fp8_is_the_dit_with_rounded_weights_forwards_and_backwards(kind):
    exact = velocity(random_dit())
    ours, same = in_fp8(random_dit(), kind), with_rounded_weights(random_dit(), kind)
    assert torch.equal(velocity(ours), velocity(same))
    assert 1e-4 < rel_l2(velocity(ours), exact) < {"cast": 0.02, "scaled": 0.01}[kind]
    network, other = with_lora(ours), with_lora(same)
    assert len(network.layers) == 12 * SPEC.num_layers
    for mode in (True, False):  # beside the layer, and merged into its weight
        expected = lora_gradients(same.train(mode), other)
        assert torch.equal(lora_gradients(ours.train(mode), network), expected) and expected.norm() > 0


@pytest.fixture
def dit_file(tmp_path):
    save_file(random_dit().state_dict(), tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_after_merging(kind, dit_file):
    change = 0.1 * torch.randn(128, 128)

    def merge(name, weight):
        return add_delta(weight, change) if name.endswith("self_attn.q.weight") else weight

    loaded = load_dit(dit_file, None, CPU, merge, fp8=kind)
    merged = load_dit(dit_file, None, CPU, merge)
    assert_close(loaded.state_dict(), in_fp8(merged, kind).state_dict(), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_first_and_the_last_block_are_loaded_as_they_are_when_products_are_in_fp8(dit_file):
    loaded = load_dit(dit_file, None, CPU, fp8="rows")
    found = {name.split(".")[1] for name, module in loaded.named_modules() if isinstance(module, Fp8Linear)}
    assert found == {"1", "2"}
    assert rel_l2(velocity(loaded), velocity(random_dit())) < 0.05


def test_an_fp8_file_keeps_its_numbers_in_a_cast(tmp_path):
    path = tmp_path / "dit.safetensors"
    state = {name: tensor.to(FP8) for name, tensor in random_dit().state_dict().items()}
    save_file(state, path)
    assert dit_dtype(path) == FP8
    loaded = load_dit(path, None, CPU, fp8="cast").state_dict()
    for name in ("blocks.0.self_attn.q", "blocks.3.ffn.2"):
        assert torch.equal(loaded[f"{name}.quantized"].float(), state[f"{name}.weight"].float())
    assert loaded["head.head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_output_is_met_within_the_error_of_fp8(tiny, kind):
    case = golden("dit_i2v")
    model = load_dit(tiny["i2v"], torch.float32, CPU, fp8=kind)
    text = pad_text([case["context0"]])
    with torch.inference_mode():
        conditioning = Conditioning(case["y0"][None], case["clip_fea"][:1, None])
        out = model(case["x0"][None], conditioning, case["t"][:1], text, torch.tensor([[0, 8]]))
    assert rel_l2(out[0], case["out0_f_0_8"]) < 0.08


# T5


@pytest.fixture
def t5_file(tmp_path):
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=40, d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=8)
    model = UMT5EncoderModel(config).eval()
    state = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file({name: state[t5_key(name)] for name in t5_shapes(model)}, tmp_path / "t5.safetensors")
    return tmp_path / "t5.safetensors"


def test_a_t5_in_fp8_rounds_its_linear_layers_only(t5_file):
    model, stored = load_t5(t5_file, torch.bfloat16, CPU, fp8="cast"), load_file(t5_file)
    state = model.state_dict()
    for official, tensor in stored.items():
        name = t5_key(official)
        if "attn" in official or "ffn" in official:
            expected = quantize(tensor.bfloat16(), "cast")[0]
            assert torch.equal(state[name.removesuffix("weight") + "quantized"].float(), expected.float())
        else:
            assert torch.equal(state[name], tensor.bfloat16())
    assert len(state) == len(stored) + 1  # the embedding stands under two names


def test_a_t5_in_fp8_gives_nearly_the_same_embeddings(t5_file):
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 40)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    plain, rounded = (
        encode_text(load_t5(t5_file, torch.float32, CPU, fp8), tokenizer, ["w5 w8 w3"], CPU)[0]
        for fp8 in (None, "cast")
    )
    assert 1e-4 < rel_l2(rounded, plain) < 0.05
