"""LoRA layers: the reference's gradients, and what training, saving and loading promise each other."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from tests.helpers import golden, golden_path, rel_l2
from tests.lora_models import config, merged_copy, toy, trained
from utils.errors import ConfigError
from wan.files.dit_names import lora_name
from wan.files.load import load_dit
from wan.lora.files import read_lora
from wan.lora.layers import LoRALinear
from wan.lora.module import add_delta
from wan.lora.network import inject_lora_, save_lora
from wan.lora.product import lora_products
from wan.memory.recompute import recompute_blocks_
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.training.timesteps import add_noise, velocity_target


@pytest.mark.parametrize(("prefix", "indices"), [("", [0, 1]), ("f_0_8_", [0, 8])])
def test_a_training_step_gives_the_recorded_loss_and_gradients(tiny, prefix, indices):
    step = golden("training_step")
    model = load_dit(tiny["i2v"], torch.float32, "cpu")
    network = inject_lora_(model, config(4, 2.0))
    network.load_file(read_lora(golden_path("lora_musubi_format.safetensors")))
    model.train()
    noisy = add_noise(step["latents"], step["noise"], step["t"] / 1000 - 1e-3)
    assert rel_l2(noisy, step["noisy"]) < 1e-6
    conditioning = Conditioning(step["y"], step["clip_fea"][:, None])
    pred = model(noisy, conditioning, step["t"], pad_text([step["context"]]), torch.tensor([indices]))
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


@pytest.mark.parametrize("x_needs_gradient", [True, False])
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
@pytest.mark.parametrize("ranks", [(3,), (3, 1, 4)], ids=str)
def test_layers_of_one_input_and_their_lora_as_one_operation_have_the_gradients_of_autograd(
    ranks, shape, x_needs_gradient
):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def layer(rank):
        made = LoRALinear(nn.Linear(16, 24).double(), rank, 0.7 * rank, config(), torch.device("cpu"), None).double()
        made.base.requires_grad_(False)
        made.lora_up.weight.data = draw(24, rank)
        return made

    x, layers = draw(*shape).requires_grad_(x_needs_gradient), [layer(rank) for rank in ranks]
    wanted = [*(m for one in layers for m in one.trained.values()), *([x] if x_needs_gradient else [])]
    results = []
    for outputs in (
        lora_products(x, layers),
        [x @ (one.base.weight + 0.7 * one.lora_up.weight @ one.lora_down.weight).T + one.base.bias for one in layers],
    ):
        loss = sum((i + out).sin().sum() for i, out in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, wanted)])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("image_dim", "per_block"), [(160, 12), (None, 10)])
def test_all_linear_layers_of_the_blocks_are_trained_and_no_others(image_dim, per_block):
    kind, channels = ("i2v", 36) if image_dim else ("t2v", 16)
    spec = DiTSpec(kind, dim=128, ffn_dim=64, num_layers=2, in_dim=channels, text_dim=16, image_dim=image_dim)
    model = WanDiT(spec)
    network = inject_lora_(model, config(2, 1.0))
    attention = [f"{module}.{layer}" for module in ("self_attn", "cross_attn") for layer in "qkvo"]
    names = {*attention, "ffn.0", "ffn.2"} | ({"cross_attn.k_img", "cross_attn.v_img"} if image_dim else set())
    assert len(names) == per_block
    assert set(network.layers) == {f"blocks.{block}.{name}" for block in range(2) for name in names}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in network.parameters()}


def test_names_that_mean_norm_or_head_are_left_out():
    assert list(inject_lora_(toy(), config(2, 1.0)).layers) == ["blocks.0.ffn.0", "blocks.1.ffn.0"]


def test_a_fresh_network_changes_nothing_and_is_the_same_for_the_same_seed():
    model, x = toy(), torch.randn(5, 6)
    before = model(x)
    first = inject_lora_(model, config(4, 1.0), generator=torch.Generator().manual_seed(3)).state_dict()
    assert torch.equal(model.train()(x), before)
    assert not any(layer.training for layer in inject_lora_(toy().eval(), config()).layers.values())
    second = inject_lora_(toy(), config(4, 1.0), generator=torch.Generator().manual_seed(3)).state_dict()
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
    trained(model, network_dropout=0.5)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


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
    (group,) = network.param_groups(1e-4)
    assert (group["name"], group["lr"], len(group["params"])) == ("unet", 1e-4, 4)
    down, up = network.param_groups(1e-4, loraplus_lr_ratio=4.0)
    assert (down["lr"], up["lr"]) == (1e-4, 4e-4)
    assert (down["name"], up["name"]) == ("unet", "unet plus")
    assert [tuple(parameter.shape) for parameter in up["params"]] == [(10, 3), (10, 3)]
    assert [tuple(parameter.shape) for parameter in down["params"]] == [(3, 6), (3, 6)]


def lora_layer(*args, rank=8):
    """One layer of 6 inputs and 10 outputs in train mode, as injected."""
    model = toy()
    layer = trained(model, rank, 8.0, *args).layers["blocks.0.ffn.0"]
    return layer.train()


def test_rank_dropout_leaves_out_whole_ranks_of_an_item_and_scales_up_the_others():
    layer, x = lora_layer("rank_dropout=0.5"), torch.randn(4, 7, 6)
    torch.manual_seed(0)
    added = layer(x) - layer.base(x)
    low = x @ layer.lora_down.weight.T
    seen = set()
    for out, values in zip(added, low, strict=True):
        # Which ranks take part is found by solving for their weights: 0 or 1 / (1 - p) for the whole item.
        columns = torch.stack([(values[:, r, None] * layer.lora_up.weight[:, r]).flatten() for r in range(8)], dim=1)
        weights = torch.linalg.lstsq(columns, out.reshape(-1, 1)).solution[:, 0]
        assert_close(weights, (weights > 1).float() * 2, atol=1e-3, rtol=0)
        seen.add(tuple((weights > 1).tolist()))
    assert len(seen) > 1, "each item draws its own ranks"


def test_module_dropout_leaves_out_the_module_now_and_then():
    layer, x = lora_layer("module_dropout=0.25"), torch.randn(5, 6)
    torch.manual_seed(0)
    base, whole = layer.base(x), layer.base(x) + layer.branch(x)
    outputs = [layer(x) for _ in range(200)]
    left_out = sum(torch.equal(out, base) for out in outputs)
    assert left_out + sum(torch.equal(out, whole) for out in outputs) == 200
    assert 25 <= left_out <= 75
    while not torch.equal(out := layer(x), base):
        pass
    out.sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.trained.values()), "gradients are there, and 0"


def test_dropouts_do_nothing_in_eval_mode_and_follow_the_global_seed():
    layer, x = lora_layer("rank_dropout=0.5", "module_dropout=0.25"), torch.randn(5, 7, 6)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert rel_l2(layer.eval()(x).detach(), lora_layer()(x).detach()) < 1e-6


def test_a_recomputed_block_repeats_its_dropouts():
    """What checkpointing saves and restores covers every random number that a layer draws."""
    gradients = []
    for recompute in (False, True):
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Sequential(toy().img_emb, toy().img_emb)])
        model.runner = lambda block, x: block(x)
        network = trained(model, 3, 2.0, "rank_dropout=0.5", "module_dropout=0.5", network_dropout=0.5)
        if recompute:
            recompute_blocks_(model.train())
        torch.manual_seed(1)
        for _ in range(4):
            model.runner(model.blocks[0], torch.ones(5, 7, 6)).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def names_of(network):
    return {name.removeprefix("blocks.") for name in network.layers}


def test_patterns_choose_the_layers_by_whole_names(caplog):
    assert names_of(inject_lora_(toy(), config(2, 1.0, r"exclude_patterns=['.*\.1\..*']"))) == {"0.ffn.0"}
    both = config(2, 1.0, "exclude_patterns=['.*ffn.*']", r"include_patterns=['blocks\.0\..*']")
    assert names_of(inject_lora_(toy(), both)) == {"0.ffn.0", "0.head"}
    assert not caplog.records
    unanchored = config(2, 1.0, "exclude_patterns=['ffn']", "include_patterns=['.*ffn.*', 'head']")
    assert names_of(inject_lora_(toy(), unanchored)) == {"0.ffn.0", "1.ffn.0"}
    assert [record.getMessage() for record in caplog.records] == [
        "--network_args exclude_patterns: 'ffn' matches no layer of the blocks",
        "--network_args include_patterns: '.*ffn.*' matches no excluded layer of the blocks",
        "--network_args include_patterns: 'head' matches no excluded layer of the blocks",
    ]


def test_ranks_and_alphas_per_module_win_over_the_flags():
    args = (
        r"module_ranks={'.*\.0\.ffn.*': 5, '.*ffn.*': 2}",
        r"module_alphas={'.*\.1\..*': 0, '.*nothing|.*ffn.*': 3.5}",
    )
    layers = inject_lora_(toy(), config(7, 1.0, *args)).layers
    assert {name: (layer.rank, layer.alpha) for name, layer in layers.items()} == {
        "blocks.0.ffn.0": (5, 3.5),
        "blocks.1.ffn.0": (2, 2.0),
    }
    assert layers["blocks.0.ffn.0"].lora_down.weight.shape == (5, 6)
    only_rank = inject_lora_(toy(), config(7, 4.0, r"module_ranks={'blocks\.0.*': 3}")).layers
    assert [(layer.rank, layer.alpha) for layer in only_rank.values()] == [(3, 4.0), (7, 4.0)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["exclude_patterns=['.*']"], "exclude_patterns: leave none of 4 layers to train"),
        (["module_ranks={'.*head.*': 2}"], r"module_ranks: '.\*head.\*' matches no trained layer"),
        (["module_alphas={'ffn': 2}"], "module_alphas: 'ffn' matches no trained layer"),
    ],
)
def test_patterns_without_effect_are_refused_before_the_model_changes(args, message):
    model = toy()
    with pytest.raises(ConfigError, match=f"--network_args {message}"):
        inject_lora_(model, config(2, 1.0, *args))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_every_module_is_named_in_the_log_when_asked_for(caplog):
    caplog.set_level("INFO")
    inject_lora_(toy(), config(2, 1.0))
    assert not caplog.records
    inject_lora_(toy(), config(2, 1.0, "verbose=True", "conv_dim=4"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1:] == ["blocks.0.ffn.0: rank 2, alpha 1", "blocks.1.ffn.0: rank 2, alpha 1"]
    assert "no convolutions" in lines[0]


def uneven_file(tmp_path):
    """A LoRA on block 1 only, of a rank and alpha unlike the flags'."""
    network = trained(toy(), 5, 3.0, r"exclude_patterns=['.*\.0\..*']")
    save_lora(tmp_path / "uneven.safetensors", network, {})
    return network, tmp_path / "uneven.safetensors"


def test_modules_ranks_and_alphas_come_from_the_file_when_asked_for(tmp_path, caplog):
    caplog.set_level("INFO")
    network, path = uneven_file(tmp_path)
    settings = config(7, 1.0, network_weights=path, dim_from_weights=True)
    other = inject_lora_(toy(), settings, weights=read_lora(path))
    assert {name: (layer.rank, layer.alpha) for name, layer in other.layers.items()} == {"blocks.1.ffn.0": (5, 3.0)}
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in other.state_dict().items())
    assert "1 layers are in the file, 1 are not" in caplog.text
    assert other.summary().metadata == {"network_dim": "5", "network_alpha": "3.0"}

    with pytest.raises(ConfigError, match=r"1 of 2 modules are missing and 0 are unknown.*--dim_from_weights"):
        inject_lora_(toy(), config(5, 3.0, network_weights=path), weights=read_lora(path))
    excluded = config(5, 3.0, "exclude_patterns=['.*1.ffn.*']", network_weights=path, dim_from_weights=True)
    with pytest.raises(ConfigError, match=r"1 of its 1 modules are not among .* lora_unet_blocks_1_ffn_0"):
        inject_lora_(toy(), excluded, weights=read_lora(path))


def test_a_model_without_weights_is_enough_to_find_a_file_that_does_not_fit(tmp_path):
    _, path = uneven_file(tmp_path)
    right = config(5, 3.0, r"exclude_patterns=['.*\.0\..*']", network_weights=path)
    with torch.device("meta"):
        assert inject_lora_(toy(), right, weights=read_lora(path)).summary().modules == 1
        for rank, alpha, message in ((4, 3.0, "--network_dim 5"), (5, 2.0, "--network_alpha 3")):
            wrong = config(rank, alpha, *right.network_args, network_weights=path)
            with pytest.raises(ConfigError, match=message):
                inject_lora_(toy(), wrong, weights=read_lora(path))


def test_the_summary_counts_what_is_trained():
    summary = inject_lora_(toy(), config(2, 1.0, r"module_ranks={'blocks\.0.*': 3}")).summary()
    assert (summary.kind, summary.modules, summary.excluded, summary.parameters) == ("lora", 2, 2, 16 * 2 + 16 * 3)
    assert str(summary) == "lora of rank 2 to 3 on 2 linear layers of the blocks, 2 left out, 80 parameters"
    assert summary.metadata == {"network_dim": "Dynamic", "network_alpha": "1.0"}
    assert "of rank 4 on" in str(inject_lora_(toy(), config(4, 1.0)).summary())


def test_max_norm_scales_down_only_the_changes_above_the_limit():
    network = trained(toy())
    first, second = network.layers.values()
    with torch.no_grad():
        second.lora_up.weight.mul_(0.01)
    before = [layer.delta().detach() for layer in (first, second)]
    norms = [float(change.double().norm()) for change in before]
    limit = (norms[0] * norms[1]) ** 0.5
    count, mean, largest = network.apply_max_norm(limit)
    assert count == 1
    assert largest == pytest.approx(limit, rel=1e-5)
    assert mean == pytest.approx((limit + norms[1]) / 2, rel=1e-5)
    assert_close(first.delta(), before[0] * (limit / norms[0]))
    assert torch.equal(second.delta(), before[1])
    assert network.apply_max_norm(limit * 2) == (0, pytest.approx(mean, rel=1e-5), pytest.approx(largest, rel=1e-5))


def test_max_norm_leaves_a_fresh_network_alone():
    network = inject_lora_(toy(), config())
    before = network.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    assert network.apply_max_norm(1.0) == (0, 0.0, 0.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


class Dequantising(nn.Module):
    """Stands for a layer that keeps its weight in another form; it has nothing but the attributes of nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("quantised", linear.weight.detach().to(torch.float8_e4m3fn))

    @property
    def weight(self):
        return self.quantised.bfloat16()

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_a_layer_that_dequantises_its_weight_can_be_trained():
    model, x = toy(torch.bfloat16), torch.randn(5, 6).bfloat16()
    for block in model.blocks:
        block["ffn"][0] = Dequantising(block["ffn"][0])
    layer = trained(model).layers["blocks.0.ffn.0"]
    assert isinstance(layer.base, Dequantising)
    merged = nn.functional.linear(x, add_delta(layer.base.weight, layer.delta()), layer.base.bias)
    assert torch.equal(layer.eval()(x), merged)
    out = layer.train()(x)
    assert out.dtype == torch.bfloat16
    assert rel_l2(out.detach(), merged.detach()) < 2**-7
    out.sum().backward()
    assert layer.lora_up.weight.grad.abs().sum() > 0


def test_trained_matrices_go_to_the_device_that_is_asked_for():
    network = inject_lora_(toy(), config(), device=torch.device("meta"))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.fixture
def process_group(tmp_path):
    """A world of one process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_sharded_weights_are_saved_loaded_and_scaled_whole(process_group, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain_model, model, x = toy(), toy(), torch.randn(5, 6)
    plain, network = trained(plain_model), trained(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        for layer in (block["ffn"], block["head"]):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert torch.equal(model.eval()(x), plain_model.eval()(x))
    assert plain.apply_max_norm(1.0) == network.apply_max_norm(1.0)
    save_lora(tmp_path / "none.safetensors", network, {}, write=False)
    save_lora(tmp_path / "lora.safetensors", network, {})
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora.safetensors"]
    saved, expected = load_file(tmp_path / "lora.safetensors"), plain.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())
    network.load_state_dict({key: tensor * 2 if tensor.ndim else tensor for key, tensor in saved.items()})
    assert all(
        torch.equal(tensor, expected[key] * (2 if tensor.ndim else 1)) for key, tensor in network.state_dict().items()
    )
