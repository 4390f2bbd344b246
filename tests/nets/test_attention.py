"""Attention backends: the reference against its formula, the others by what they hand to their packages."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.testing import assert_close

import wan.nets.attention
from utils.errors import ConfigError
from wan.models.options import AttentionConfig, AttentionSwitches
from wan.nets.attention import sdpa, select_attention

SHAPES = [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)]  # q, k, v: [B, L, N, D]
PACKAGES = {"flash_attn", "flash_attn_interface", "xformers", "sageattention"}


def softmax_attention(q, k, v):
    """[B, L, N, D], written out."""
    weights = (torch.einsum("blnd,bmnd->bnlm", q.float(), k.float()) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bnlm,bmnd->blnd", weights, v.float()).to(q.dtype)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.fixture(autouse=True)
def install(monkeypatch):
    """Nothing optional is installed until a test calls this with a module's name and content."""
    modules = {}
    monkeypatch.setattr(
        wan.nets.attention, "find_spec", lambda name: modules.get(name) if name in PACKAGES else find_spec(name)
    )
    for name in PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def put(name, **content):
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
        monkeypatch.setitem(sys.modules, name, modules[name])
        return modules[name]

    return put


def test_sdpa_is_softmax_attention():
    assert_close(sdpa(*inputs()), softmax_attention(*inputs()))


def test_the_reference_has_two_names_and_is_the_default():
    assert select_attention("sdpa") is select_attention("torch") is sdpa
    assert AttentionConfig().function is AttentionSwitches().function is AttentionSwitches(sdpa=True).function is sdpa


def test_cudnn_comes_first_and_the_order_is_as_before_afterwards(monkeypatch):
    orders = []
    before = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(wan.nets.attention, "sdpa", lambda *_: orders.append(torch._C._get_sdp_priority_order()))
    select_attention("cudnn")(*inputs())
    assert orders[0][0] == int(SDPBackend.CUDNN_ATTENTION) and torch._C._get_sdp_priority_order() == before
    monkeypatch.undo()
    assert_close(select_attention("cudnn")(*inputs()), softmax_attention(*inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "module", "function", "options"),
    [
        ("flash", "flash_attn", "flash_attn_func", {}),
        ("flash2", "flash_attn", "flash_attn_func", {}),
        ("flash3", "flash_attn_interface", "flash_attn_func", {}),
        ("sageattn", "sageattention", "sageattn", {"tensor_layout": "NHD"}),
    ],
)
def test_16_bit_packages_get_their_layout_and_never_float32(name, module, function, options, dtype, install):
    calls = []

    def attend(q, k, v, **given):
        calls.append(given)
        assert [q.shape, k.shape, v.shape] == SHAPES
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16 if dtype == torch.float32 else dtype}
        return softmax_attention(q, k, v)

    install(module, **{function: attend})
    out = select_attention(name)(*inputs(dtype))
    assert out.dtype == dtype and calls == [options]
    assert_close(out.float(), softmax_attention(*inputs()), rtol=0.03, atol=0.03)


def test_xformers_gets_its_layout_in_the_dtype_of_the_model(install):
    ops = install("xformers.ops", memory_efficient_attention=lambda q, k, v: softmax_attention(q, k, v))
    install("xformers", ops=ops)
    assert_close(select_attention("xformers")(*inputs()), softmax_attention(*inputs()))


def test_a_flash3_that_also_returns_the_normaliser_is_understood(install):
    install("flash_attn_interface", flash_attn_func=lambda *qkv: (softmax_attention(*qkv), torch.zeros(1)))
    assert torch.equal(select_attention("flash3")(*inputs(torch.float16)), softmax_attention(*inputs(torch.float16)))


@pytest.mark.parametrize(
    ("name", "package"),
    [("flash", "flash-attn;"), ("flash3", "flash-attn-3"), ("xformers", "xformers"), ("sageattn", "sageattention")],
)
def test_a_missing_package_is_named(name, package):
    with pytest.raises(ConfigError, match=f"--attn_mode {name} needs the package {package}.*use --attn_mode sdpa"):
        AttentionConfig(attn_mode=name)


def test_an_unknown_backend_gets_a_suggestion():
    with pytest.raises(ConfigError, match="--attn_mode spda: unknown; did you mean 'sdpa'"):
        AttentionConfig(attn_mode="spda")


@pytest.mark.parametrize("switch", ["flash_attn", "xformers", "flash3"])
def test_a_switch_of_the_training_script_is_named_when_its_package_is_missing(switch):
    with pytest.raises(ConfigError, match=f"^--{switch} needs the package .* use --sdpa$"):
        AttentionSwitches(**{switch: True})


def test_of_several_switches_the_first_in_musubi_tuners_order_wins(install):
    for name in PACKAGES:
        install(name)
    order = [("sdpa", "sdpa"), ("flash_attn", "flash2"), ("xformers", "xformers"), ("flash3", "flash3")]
    for i, (_, expected) in enumerate(order):
        switches = AttentionSwitches(**{switch: True for switch, _ in order[i:]})
        assert switches.function is getattr(wan.nets.attention, expected)
