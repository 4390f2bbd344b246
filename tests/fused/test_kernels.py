"""The Triton kernels against their plain forms, where Triton is installed: on a GPU, or else in its interpreter."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from tests.helpers import rel_l2  # noqa: E402
from wan.fused import kernels, plain, vae_kernels  # noqa: E402
from wan.memory.fp8 import FP8  # noqa: E402
from wan.nets.vae import ChannelNorm  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
B, L, D = 2, 5, 384  # no power of two, as 5120 is none
# Triton's interpreter cuts float32 off to bfloat16 instead of rounding it
ROUNDING = 1e-4 if CUDA else 5e-3


def draw(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


MODULATION = 0.3 * draw(B, 6, D, seed=1)
WEIGHT, BIAS = draw(1, D, dtype=torch.bfloat16, seed=2), draw(1, D, dtype=torch.bfloat16, seed=3)
NORMS = [
    pytest.param(False, None, MODULATION[:, 1], MODULATION[:, 0], True, id="first"),
    pytest.param(True, MODULATION[:, 2], WEIGHT, BIAS, False, id="gated, affine"),
    pytest.param(True, None, MODULATION[:, 4], MODULATION[:, 3], True, id="modulated"),
]


@pytest.mark.parametrize(("adds", "gate", "scale", "shift", "modulated"), NORMS)
def test_residual_and_norm(adds, gate, scale, shift, modulated):
    addend = draw(B, L, D, dtype=torch.bfloat16, seed=4) if adds else None
    results = []
    for module in (kernels, plain):
        x = draw(B, L, D)
        out = module.residual_norm_(x, addend, gate, scale, shift, 1e-6, modulated, torch.bfloat16)
        assert out.dtype == torch.bfloat16
        results.append((x, out))
    (x, out), (expected_x, expected) = results
    assert rel_l2(x, expected_x) < 1e-6 and rel_l2(out.float(), expected.float()) < ROUNDING


@pytest.mark.parametrize(("adds", "gate", "scale", "shift", "modulated"), NORMS)
def test_norms_that_are_quantised(adds, gate, scale, shift, modulated):
    addend = draw(B, L, D, dtype=torch.bfloat16, seed=4) if adds else None
    options = addend, gate, scale, shift, 1e-6, modulated, torch.bfloat16, True
    found, expected = (module.residual_norm_(draw(B, L, D), *options) for module in (kernels, plain))
    assert found.values.dtype == FP8 and rel_l2(found.scale, expected.scale) < 1e-6
    assert rel_l2(found.values.float(), expected.values.float()) < (1e-2 if CUDA else 0.08)


@pytest.mark.parametrize(("adds", "gate", "scale", "shift", "modulated"), NORMS)
def test_gradients_of_residual_and_norm(adds, gate, scale, shift, modulated):
    results = []
    for module in (kernels, plain):
        x = draw(B, L, D).requires_grad_()
        addend = draw(B, L, D, seed=4).requires_grad_() if adds else None
        new, out = module.residual_norm(x, addend, gate, scale, shift, 1e-6, modulated, torch.float32)
        (new * draw(B, L, D, seed=5) + out * draw(B, L, D, seed=6)).sum().backward()
        results.append([x.grad, *([addend.grad] if adds else [])])
    assert all(rel_l2(found, expected) < 1e-5 for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize("gate", [None, MODULATION[:, 2]], ids=["plain", "gated"])
def test_gradients_of_the_residual_alone(gate):
    results = []
    for module in (kernels, plain):
        x, addend = draw(B, L, D).requires_grad_(), draw(B, L, D, seed=4).requires_grad_()
        out = module.residual_add(x, addend, gate)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, addend.grad])
    assert all(rel_l2(found, expected) < 1e-6 for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize("rotates", [True, False])
def test_rms_norm_and_rotation_with_gradient(rotates):
    angles = draw(B, L, 64, seed=7)
    cos, sin = (angles.cos(), angles.sin()) if rotates else (None, None)
    results = []
    for module in (kernels, plain):
        y = draw(B, L, D).requires_grad_()
        out = module.rms_rope(y, WEIGHT[0], cos, sin, 1e-6)
        (out * draw(B, L, D, seed=8)).sum().backward()
        results.append([out.detach(), y.grad])
    assert all(rel_l2(found, expected) < 1e-5 for found, expected in zip(*results, strict=True))


def test_rms_norm_and_rotation_in_the_middle_of_q_k_v_leave_the_rest_alone():
    angles, before = draw(B, L, 64, seed=7), draw(B, L, 3 * D, dtype=torch.bfloat16)
    found, expected = before.clone(), before.clone()
    for module, qkv in ((kernels, found), (plain, expected)):
        module.rms_rope_(qkv.chunk(3, dim=-1)[1], WEIGHT[0], angles.cos(), angles.sin(), 1e-6)
    assert rel_l2(found.float(), expected.float()) < ROUNDING
    assert torch.equal(found[..., :D], before[..., :D]) and torch.equal(found[..., 2 * D :], before[..., 2 * D :])


@pytest.mark.parametrize("gelu", [False, True])
def test_quantised_rows(gelu):
    x = draw(B, L, D, dtype=torch.bfloat16)
    found, expected = (module.quantized(x, gelu) for module in (kernels, plain))
    assert rel_l2(found.scale, expected.scale) < 1e-5
    assert rel_l2(found.values.float(), expected.values.float()) < (1e-2 if CUDA else 0.08)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("channels", [96, 384])
def test_channel_norm_of_the_vae(channels, silu):
    x, norm = draw(2, channels, 5, 7), ChannelNorm(channels, axes=2).to(DEVICE).requires_grad_(False)
    norm.gamma.copy_(draw(channels, 1, 1, seed=9))
    expected = norm(x)
    found = vae_kernels.channel_norm(x, norm.gamma, silu)
    assert rel_l2(found, torch.nn.functional.silu(expected) if silu else expected) < 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_softmax():
    scores = 5 * draw(7, 300)
    assert rel_l2(vae_kernels.softmax(scores, 0.3, torch.float32), (0.3 * scores).softmax(-1)) < 1e-5


@pytest.mark.skipif(not CUDA, reason="cuBLAS")
def test_products_of_cublas_with_more_than_the_product():
    x, weight = draw(2, 16, 256, dtype=torch.bfloat16), 0.1 * draw(128, 256, dtype=torch.bfloat16, seed=1)
    bias = draw(128, dtype=torch.bfloat16, seed=2)
    found, expected = (module.linear_gelu(x, weight, bias).float() for module in (kernels, plain))
    assert rel_l2(found, expected) < 5e-3
    rows = draw(3, 256, seed=3)
    found, expected = (module.linear32(rows, weight, bias) for module in (kernels, plain))
    assert rel_l2(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("batch", "length", "text_rows", "image_rows", "repeats"),
    [(2, 150, 64, 257, 449), (1, 40, 128, 0, 385), (1, 300, 512, 70, 1)],
)
def test_cross_attention_and_its_gradients(batch, length, text_rows, image_rows, repeats):
    dtype = torch.bfloat16 if CUDA else torch.float32
    inputs = [
        draw(batch, rows, 2, 128, seed=rows) for rows in (length, text_rows + image_rows, text_rows + image_rows + 1)
    ]
    inputs[2] = inputs[2][:, 1:]
    results = []
    for module, kind in ((kernels, dtype), (plain, torch.float32)):
        q, k, v = (tensor.to(dtype).to(kind).requires_grad_() for tensor in inputs)
        out = module.cross_attention(q, k, v, text_rows, repeats)
        with torch.no_grad():
            assert torch.equal(module.cross_attention(q, k, v, text_rows, repeats), out)
        (out * draw(*out.shape, dtype=dtype, seed=1)).sum().backward()
        results.append([tensor.detach().float() for tensor in (out, q.grad, k.grad, v.grad)])
    assert all(rel_l2(*pair) < (6e-3 if CUDA else 2e-6) for pair in zip(*results, strict=True))
