"""LoHa and LoKr through the package lycoris-lora, where it is installed."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.helpers import rel_l2
from tests.lora_models import config, shapes_of
from utils.errors import ConfigError
from wan.lora.files import read_lora
from wan.lora.merge import Merger
from wan.lora.network import inject_lora_, save_lora

LYCORIS = {
    "loha": ("networks.loha", ()),
    "lokr": ("networks.lokr", ("factor=2",)),
    "lokr, both factors decomposed": ("networks.lokr", ("factor=16", "decompose_both=True")),
    "lokr, full matrices": ("lycoris.kohya", ("algo=lokr", "full_matrix=True")),
}


def wide():
    """Blocks of a single linear layer, wide enough that LoKr decomposes it."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(64, 96)])
    return model


@pytest.fixture(params=LYCORIS, ids=str)
def lycoris(request):
    """Settings of each kind of network that the package provides."""
    pytest.importorskip("lycoris.modules", reason="the lycoris extra is not installed")
    module, args = LYCORIS[request.param]
    return config(2, 3.0, *args, network_module=module)


def randomised(model, settings):
    network = inject_lora_(model, settings)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5, generator=random)
    return network


def test_lycoris_layers_compute_in_train_mode_what_their_file_merges(lycoris, tmp_path):
    model, x = wide(), torch.randn(2, 5, 64)
    network = randomised(model, lycoris)
    save_lora(tmp_path / "lora.safetensors", network, {})
    plain = wide()
    weight = Merger([(read_lora(tmp_path / "lora.safetensors"), 1.0)], shapes_of(plain))(
        "blocks.0.weight", plain.blocks[0].weight
    )
    merged = nn.functional.linear(x, weight, plain.blocks[0].bias)
    assert torch.equal(model.blocks[0].eval()(x), merged)
    assert rel_l2(model.blocks[0].train()(x).detach(), merged.detach()) < 1e-5
    assert rel_l2(weight.detach(), plain.blocks[0].weight.detach()) > 0.1


def test_lycoris_layers_save_the_package_s_own_keys(lycoris):
    network = randomised(wide(), lycoris)
    own = network.layers["blocks.0"].adapter.state_dict()
    saved = {key.removeprefix("lora_unet_blocks_0."): tensor for key, tensor in network.state_dict().items()}
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key].detach()) for key in own)


def test_fresh_lycoris_layers_change_nothing_and_follow_their_seed(lycoris):
    model, x = wide(), torch.randn(5, 64)
    before = model.blocks[0](x)
    torch.manual_seed(9)
    first = inject_lora_(model, lycoris, generator=torch.Generator().manual_seed(3)).state_dict()
    after = torch.rand(1)
    torch.manual_seed(9)
    second = inject_lora_(wide(), lycoris, generator=torch.Generator().manual_seed(3)).state_dict()
    other = inject_lora_(wide(), lycoris, generator=torch.Generator().manual_seed(4)).state_dict()
    assert torch.equal(model.blocks[0].train()(x), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    torch.manual_seed(9)
    assert torch.equal(torch.rand(1), after), "the global generator is left as it was"


def test_lycoris_layers_train_in_the_dtype_of_their_input(lycoris):
    model = wide().bfloat16()
    network = randomised(model, lycoris)
    model.train()
    assert network.summary().parameters == sum(parameter.numel() for parameter in network.parameters())
    out = model.blocks[0](torch.randn(2, 5, 64).bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(parameter.grad.any() for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network.layers["blocks.0"].base.parameters())


def test_lycoris_files_can_be_continued_and_misfits_are_refused(lycoris, tmp_path):
    network = randomised(wide(), lycoris)
    save_lora(tmp_path / "lora.safetensors", network, {})
    found = read_lora(tmp_path / "lora.safetensors")
    other = inject_lora_(wide(), lycoris, weights=found)
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in other.state_dict().items())
    with pytest.raises(ConfigError, match=r"lora_unet_blocks_0 is .* instead of"):
        inject_lora_(wide(), config(2, 3.0), weights=found)
    with torch.device("meta"):
        inject_lora_(wide(), lycoris, weights=found)


def test_max_norm_scales_lycoris_layers_too(lycoris):
    network = randomised(wide(), lycoris)
    layer = network.layers["blocks.0"]
    before = layer.delta().detach()
    count, mean, largest = network.apply_max_norm(1.0)
    assert (count, mean, largest) == (1, pytest.approx(1, rel=1e-5), pytest.approx(1, rel=1e-5))
    assert_close(layer.delta().detach(), before / before.norm())


def test_lycoris_rank_dropout_leaves_out_outputs_and_scales_up_the_others(lycoris):
    settings = config(2, 3.0, *lycoris.network_args, "rank_dropout=0.5", network_module=lycoris.network_module)
    model, x = wide(), torch.randn(5, 64)
    layer = randomised(model, settings).layers["blocks.0"].train()
    whole = x @ layer.delta().detach().T
    added = (layer(x) - layer.base(x)).detach()
    dropped = (added == 0).all(0)
    assert 20 < dropped.sum() < 76
    assert_close(added[:, ~dropped], 2 * whole[:, ~dropped], atol=1e-3, rtol=1e-3)
