"""LoRA: the reference's merged output and gradients, and what training, saving and loading promise each other."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from tests.helpers import GOLDEN, TINY, golden, needs_shared, rel_l2
from utils.errors import ConfigError
from wan.checkpoint import load_dit
from wan.config import DiTSpec
from wan.dit import WanDiT, pad_text
from wan.lora import LoRANetwork, Merger, check_lora, inject_lora_, lora_name, merge_weight, read_lora, save_lora
from wan.timesteps import add_noise, velocity_target


def toy(dtype=torch.float32):
    """Blocks of two linear layers, one of which has a forbidden name, and a linear layer outside the blocks."""

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(6, 10), nn.GELU()), "head": nn.Linear(10, 6)})
                for _ in range(2)
            )
            self.img_emb = nn.Linear(6, 6)

        def forward(self, x):
            x = self.img_emb(x)
            for block in self.blocks:
                x = block["head"](block["ffn"](x))
            return x

    torch.manual_seed(0)
    return Toy().to(dtype)


def trained(model, rank=3, alpha=2.0, **options) -> LoRANetwork:
    """A network with random instead of zero up weights."""
    network = inject_lora_(model, rank, alpha, generator=torch.Generator().manual_seed(1), **options)
    with torch.no_grad():
        for layer in network.layers.values():
            layer.lora_up.weight.normal_(generator=torch.Generator().manual_seed(2))
    return network


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def merged_copy(path, dtype, multiplier=1.0):
    """The toy with a file merged into its weights, as the loader does it."""
    model = toy(dtype)
    merger = Merger([(read_lora(path), multiplier)], shapes_of(model))
    model.load_state_dict({name: merger(name, tensor) for name, tensor in model.state_dict().items()})
    return model


@needs_shared
@pytest.mark.parametrize("multiplier", [1, 0.6])
def test_a_merged_file_gives_the_recorded_output(multiplier):
    case = golden("dit_i2v")
    shapes = {name: tensor.shape for name, tensor in load_file(TINY / "tiny_dit_i2v.safetensors").items()}
    merger = Merger([(read_lora(GOLDEN / "lora_musubi_format.safetensors"), multiplier)], shapes)
    model = load_dit(
        TINY / "tiny_dit_i2v.safetensors", torch.float32, "cpu", merge=lambda n, w: merger(n, w.float())
    ).eval()
    with torch.no_grad():
        out = model(
            case["x0"][None],
            case["y0"][None],
            case["t"][:1],
            pad_text([case["context0"]]),
            case["clip_fea"][:1],
            torch.tensor([[0, 8]]),
        )
    assert rel_l2(out[0], golden("lora_merge")[f"out0_f_0_8_lora_{multiplier}"]) < 1e-5
    assert merger.report() == [f"lora_musubi_format.safetensors x {multiplier:g}: merged 36 of 36 modules"]


@needs_shared
@pytest.mark.parametrize(("prefix", "indices"), [("", [0, 1]), ("f_0_8_", [0, 8])])
def test_a_training_step_gives_the_recorded_loss_and_gradients(prefix, indices):
    step = golden("training_step")
    model = load_dit(TINY / "tiny_dit_i2v.safetensors", torch.float32, "cpu")
    network = inject_lora_(model, rank=4, alpha=2.0)
    network.load_file(read_lora(GOLDEN / "lora_musubi_format.safetensors"))
    model.train()
    noisy = add_noise(step["latents"], step["noise"], step["t"] / 1000 - 1e-3)
    assert rel_l2(noisy, step["noisy"]) < 1e-6
    pred = model(noisy, step["y"], step["t"], pad_text([step["context"]]), step["clip_fea"], torch.tensor([indices]))
    loss = ((pred - velocity_target(step["latents"], step["noise"])) ** 2).mean()
    loss.backward()

    assert rel_l2(pred.detach(), step[f"{prefix}pred"]) < 1e-5
    assert loss.item() == pytest.approx(float(step[f"{prefix}loss"]), rel=1e-6)
    parameters = {}
    for dotted, layer in network.layers.items():
        for part in ("lora_down", "lora_up"):
            parameters[f"{prefix}grad.{lora_name(dotted)}.{part}.weight"] = getattr(layer, part).weight
    recorded = {name for name in step if name.startswith(f"{prefix}grad.")}
    assert recorded
    for name in recorded:
        assert rel_l2(parameters[name].grad, step[name]) < 1e-5, name
    norm = torch.stack([parameter.grad.double().norm() for parameter in network.parameters()]).norm()
    assert float(norm) == pytest.approx(float(step[f"{prefix}grad_norm_all"]), rel=1e-5)


@pytest.mark.parametrize(("image_dim", "per_block"), [(160, 12), (None, 10)])
def test_all_linear_layers_of_the_blocks_are_trained_and_no_others(image_dim, per_block):
    kind, channels = ("i2v", 36) if image_dim else ("t2v", 16)
    spec = DiTSpec(kind, dim=128, ffn_dim=64, num_layers=2, in_dim=channels, text_dim=16, image_dim=image_dim)
    model = WanDiT(spec)
    network = inject_lora_(model, rank=2, alpha=1.0)
    attention = [f"{module}.{layer}" for module in ("self_attn", "cross_attn") for layer in "qkvo"]
    names = {*attention, "ffn.0", "ffn.2"} | ({"cross_attn.k_img", "cross_attn.v_img"} if image_dim else set())
    assert len(names) == per_block
    assert set(network.layers) == {f"blocks.{block}.{name}" for block in range(2) for name in names}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in network.parameters()}


def test_names_that_mean_norm_or_head_are_left_out():
    assert list(inject_lora_(toy(), 2, 1.0).layers) == ["blocks.0.ffn.0", "blocks.1.ffn.0"]


def test_a_fresh_network_changes_nothing_and_is_the_same_for_the_same_seed():
    model, x = toy(), torch.randn(5, 6)
    before = model(x)
    first = inject_lora_(model, 4, 1.0, generator=torch.Generator().manual_seed(3)).state_dict()
    assert torch.equal(model.train()(x), before)
    second = inject_lora_(toy(), 4, 1.0, generator=torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    down = first["lora_unet_blocks_0_ffn_0.lora_down.weight"]
    assert 0.5 * 6**-0.5 < down.abs().max() <= 6**-0.5  # Kaiming uniform with a = sqrt(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_mode_equals_the_saved_and_merged_file_bit_for_bit(dtype, tmp_path):
    model, x = toy(dtype), torch.randn(5, 6).to(dtype)
    network = trained(model)
    save_lora(tmp_path / "lora.safetensors", network, {})
    out = model.eval()(x)
    assert torch.equal(out, merged_copy(tmp_path / "lora.safetensors", dtype)(x))
    assert not torch.equal(out, toy(dtype)(x))


def test_train_mode_equals_the_merged_weights_up_to_rounding():
    model, x = toy(), torch.randn(5, 6)
    trained(model)
    assert rel_l2(model.train()(x).detach(), model.eval()(x).detach()) < 1e-6


def test_train_mode_works_in_the_dtype_of_its_input_and_keeps_float32_parameters():
    model = toy(torch.bfloat16)
    network = trained(model)
    out = model.train()(torch.randn(5, 6).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}


def test_dropout_acts_in_train_mode_only():
    model, x = toy(), torch.randn(5, 6)
    trained(model, dropout=0.5)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_the_merge_follows_its_formula_in_float32():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=random).bfloat16()
    down, up = torch.randn(2, 4, generator=random), torch.randn(5, 2, generator=random)
    merged = merge_weight(weight, down, up, 0.3)
    exact = weight.double() + 0.3 * up.double() @ down.double()
    assert merged.dtype == torch.bfloat16
    assert_close(merged.double(), exact, atol=0, rtol=2**-8)
    assert_close(merge_weight(weight.float(), down, up, 0.3).double(), exact, atol=1e-6, rtol=1e-6)
    assert merge_weight(weight.to(torch.float8_e4m3fn), down, up, 0.3).dtype == torch.float8_e4m3fn


def test_several_files_add_up_with_their_multipliers(tmp_path):
    base, first, second = toy(), toy(), toy()
    save_lora(tmp_path / "a.safetensors", trained(first), {})
    save_lora(tmp_path / "b.safetensors", trained(second, rank=2, alpha=4.0), {})
    a, b = read_lora(tmp_path / "a.safetensors"), read_lora(tmp_path / "b.safetensors")
    name, weight = "blocks.1.ffn.0.weight", base.state_dict()["blocks.1.ffn.0.weight"]
    expected = weight.double()
    for file, scale in ((a, 0.5 * 2 / 3), (b, -1.0 * 4 / 2)):
        down, up, _ = file.modules[lora_name("blocks.1.ffn.0")]
        expected = expected + scale * up.double() @ down.double()
    merger = Merger([(a, 0.5), (b, -1.0)], shapes_of(base))
    assert_close(merger(name, weight).double(), expected, atol=1e-6, rtol=1e-6)
    untouched = base.state_dict()["img_emb.weight"]
    assert torch.equal(merger("img_emb.weight", untouched), untouched)
    assert merger.report() == [
        "a.safetensors x 0.5: merged 1 of 2 modules",
        "b.safetensors x -1: merged 1 of 2 modules",
    ]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_file_holds_the_network_under_the_documented_keys(dtype, tmp_path):
    network = trained(toy())
    save_lora(tmp_path / "lora.safetensors", network, {"ss_network_dim": "3"}, dtype)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"lora_unet_blocks_{block}_ffn_0.{part}": shape
        for block in range(2)
        for part, shape in (("lora_down.weight", (3, 6)), ("lora_up.weight", (10, 3)), ("alpha", ()))
    }
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    other = inject_lora_(toy(), 3, 2.0)
    other.load_state_dict(tensors)
    for key, tensor in network.state_dict(dtype).items():
        assert torch.equal(other.state_dict(dtype)[key], tensor), key


def test_the_hashes_are_those_of_the_file_with_training_metadata_alone(tmp_path):
    """Recomputed from two files, the real one and one with `ss_` keys only; over 1 MiB, so that both see data."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(3000, 200)])
    network = trained(model, rank=120)
    path, plain = tmp_path / "lora.safetensors", tmp_path / "plain.safetensors"
    save_lora(path, network, {"ss_steps": "7", "modelspec.title": "x" * 100})
    save_file(load_file(path), plain, {"ss_steps": "7"})

    def header_and_data(file):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end])["__metadata__"], content[end:]

    metadata, data = header_and_data(path)
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    window = plain.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert len(window) == 0x10000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]
    assert metadata["modelspec.title"] == "x" * 100
    assert read_lora(path).metadata == metadata


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_missing_or_zero_alpha_means_the_rank(alpha, tmp_path):
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(3, 4), "lora_unet_a.lora_up.weight": torch.ones(5, 3)}
    if alpha is not None:
        tensors["lora_unet_a.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    merger = Merger([(read_lora(tmp_path / "lora.safetensors"), 1.0)], {"a.weight": (5, 4)})
    assert torch.equal(merger("a.weight", torch.zeros(5, 4)), torch.full((5, 4), 3.0))


PAIR = {"lora_down.weight": (3, 4), "lora_up.weight": (5, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": (3, 4)}, "dialect ComfyUI is not supported yet"),
        ({"transformer.blocks.0.ffn.net.0.proj.lora_A.weight": (3, 4)}, "dialect diffusers is not supported yet"),
        ({"base_model.model.blocks.0.ffn.0.lora_A.weight": (3, 4)}, "dialect PEFT is not supported yet"),
        ({"blocks.0.ffn.0.lora_A.weight": (3, 4)}, "dialect PEFT is not supported yet"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": (3, 4)}, "dialect LoHa is not supported yet"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": (3, 4)}, "dialect LoKr is not supported yet"),
        ({"lora_te_text_model.lora_up.weight": (3, 4)}, "'lora_te_text_model.lora_up.weight' is no key"),
        ({"blocks.0.ffn.0.weight": (3, 4)}, "'blocks.0.ffn.0.weight' is no key"),
        ({"lora_unet_a.lora_down.weight": (3, 4)}, "lora_unet_a is no pair"),
        ({"lora_unet_a.lora_down.weight": (3, 4), "lora_unet_a.lora_up.weight": (5, 2)}, "lora_unet_a is no pair"),
        ({"lora_unet_a.lora_down.weight": (0, 4), "lora_unet_a.lora_up.weight": (5, 0)}, "lora_unet_a is no pair"),
        ({f"lora_unet_a.{part}": (*shape, 1, 1) for part, shape in PAIR.items()}, "lora_unet_a is no pair"),
        ({f"lora_unet_a.{part}": shape for part, shape in PAIR.items()} | {"lora_unet_a.alpha": (2,)}, "is no pair"),
        ({}, "holds no tensors"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(shapes, message, tmp_path):
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=rf"^--lora_weight .*other.safetensors: .*{message}"):
        read_lora(tmp_path / "other.safetensors")


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match=r"--lora_weight .*cut.safetensors: is no readable safetensors file"):
        read_lora(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match=r"--network_weights .*none.safetensors: does not exist"):
        read_lora(tmp_path / "none.safetensors", "--network_weights")


def test_a_file_without_a_counterpart_or_of_another_size_is_refused(tmp_path):
    save_lora(tmp_path / "lora.safetensors", trained(toy()), {})
    lora = read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"none of its 2 modules is in the model, .* lora_unet_blocks_0_ffn_0"):
        Merger([(lora, 1.0)], {"model.diffusion_model.blocks.0.ffn.0.weight": (10, 6)})
    with pytest.raises(ConfigError, match=r"blocks_1_ffn_0 is for a weight \[10, 6\], the model has \[9, 6\]"):
        Merger([(lora, 1.0)], {"blocks.0.ffn.0.weight": (10, 6), "blocks.1.ffn.0.weight": (9, 6)})
    match = check_lora(lora, {"blocks.0.ffn.0.weight": (10, 6), "blocks.0.ffn.0.bias": (10,)})
    assert match.weights == {"blocks.0.ffn.0.weight": "lora_unet_blocks_0_ffn_0"}
    assert match.unmatched == ("lora_unet_blocks_1_ffn_0",)
    assert "not in this model: 1, e.g. lora_unet_blocks_1_ffn_0" in str(
        Merger([(lora, 1.0)], {"blocks.0.ffn.0.weight": (10, 6)}).report()
    )


def one_block(tensors):
    return {key: tensor for key, tensor in tensors.items() if "blocks_0" in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_block, "1 of 2 modules are missing and 0 are unknown"),
        (lambda t: t | {key.replace("_0_", "_7_", 1): v for key, v in one_block(t).items()}, "0 of 2 .* 1 are unknown"),
        (
            lambda t: {key: v[:2] if "down" in key else v[:, :2] if v.ndim else v for key, v in t.items()},
            "--network_dim 2",
        ),
        (lambda t: {key: v * 3 if "alpha" in key else v for key, v in t.items()}, "alpha is 6 instead of 2"),
    ],
)
def test_loading_other_weights_into_a_network_is_refused_and_changes_nothing(change, message):
    network = trained(toy())
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    other = change({key: tensor + 1 if tensor.ndim else tensor for key, tensor in before.items()})
    with pytest.raises(ConfigError, match=message):
        network.load_state_dict(other)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_lora_plus_puts_the_up_weights_in_a_faster_group():
    network = trained(toy())
    assert [len(group["params"]) for group in network.param_groups(1e-4)] == [4]
    down, up = network.param_groups(1e-4, loraplus_lr_ratio=4.0)
    assert (down["lr"], up["lr"]) == (1e-4, 4e-4)
    assert [tuple(parameter.shape) for parameter in up["params"]] == [(10, 3), (10, 3)]


@pytest.mark.parametrize(
    ("rank", "alpha", "dropout", "flag"),
    [(0, 1.0, 0.0, "network_dim"), (4, 0.0, 0.0, "network_alpha"), (4, 1.0, 1.0, "network_dropout")],
)
def test_impossible_settings_are_refused_before_the_model_changes(rank, alpha, dropout, flag):
    model = toy()
    with pytest.raises(ConfigError, match=f"--{flag}"):
        inject_lora_(model, rank, alpha, dropout=dropout)
    assert all(parameter.requires_grad for parameter in model.parameters())
