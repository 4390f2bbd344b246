"""The VAE against diffusers, exact answers and the reference, in float32."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.testing import assert_close

from tests.helpers import golden, manifest_shapes, rel_l2
from utils.errors import ConfigError
from wan.nets.vae import VAE_MEAN, VAE_STD, CausalConv3d, WanVAE, vae_base_dim

# (ours, diffusers'), applied in this order
DIFFUSERS_NAMES = [
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.upsamples\.(\d+)\.", lambda match: _up_block(int(match[1]))),
]


def _up_block(number):
    """Ours are numbered through; diffusers' decoder has levels of three residual blocks and an upsampler."""
    level, place = divmod(number, 4)
    return f".up_blocks.{level}." + ("upsamplers.0." if place == 3 else f"resnets.{place}.")


@torch.no_grad()
def random_vae(base_dim=8):
    torch.manual_seed(0)
    vae = WanVAE(base_dim)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return vae.eval()


def diffusers_vae(vae):
    other = AutoencoderKLWan(base_dim=8)
    state = {}
    for name, tensor in vae.state_dict().items():
        for ours, theirs in DIFFUSERS_NAMES:
            name = re.sub(ours, theirs, name)
        state[name] = tensor
    other.load_state_dict(state, strict=True)
    return other.eval()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_latents_and_pixels_are_those_of_diffusers(frames):
    vae = random_vae()
    other = diffusers_vae(vae)
    mean, std = (
        torch.tensor(values).view(16, 1, 1, 1) for values in (other.config.latents_mean, other.config.latents_std)
    )
    pixels = torch.rand(2, 3, frames, 32, 24) * 2 - 1
    latents = vae.encode(pixels)
    assert latents.shape == (2, 16, 1 + (frames - 1) // 4, 4, 3)
    assert rel_l2(latents, (other.encode(pixels).latent_dist.mode() - mean) / std) < 1e-5
    latents = torch.randn_like(latents)
    decoded = vae.decode(latents)
    assert decoded.shape == pixels.shape
    assert 0.001 < (decoded.abs() == 1).float().mean() < 0.999  # clamping takes part
    assert rel_l2(decoded, other.decode(latents * std + mean).sample) < 1e-5


def test_the_latent_statistics_are_those_of_diffusers():
    config = AutoencoderKLWan(base_dim=8).config
    assert list(VAE_MEAN) == config.latents_mean
    assert list(VAE_STD) == config.latents_std


@torch.no_grad()
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_a_convolution_of_one_frame_is_the_3d_one_after_zero_frames(kernel):
    torch.manual_seed(0)
    conv = CausalConv3d(4, 6, kernel)
    frame = torch.randn(2, 4, 1, 5, 7)
    frames = torch.cat([torch.zeros(2, 4, kernel[0] - 1, 5, 7), frame], dim=2)
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    expected = nn.functional.conv3d(frames, conv.weight, conv.bias, padding=padding)
    assert_close(conv(frame), expected)
    assert_close(conv(frame[:, :, 0]), expected[:, :, 0])


@torch.no_grad()
def test_one_frame_in_two_dimensions_is_one_frame_in_three():
    vae = random_vae()
    frame = torch.rand(2, 3, 1, 16, 24) * 2 - 1
    moments = vae.encoder(frame[:, :, 0])
    assert rel_l2(moments[:, :, None], vae.encoder(frame)) < 1e-5
    latents = moments[:, :16]
    assert rel_l2(vae.decoder(latents)[:, :, None], vae.decoder(latents[:, :, None])) < 1e-5


@torch.no_grad()
def test_the_first_frame_knows_nothing_of_later_ones():
    vae = random_vae()
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    latents = vae.encode(video)
    assert rel_l2(latents[:, :, :1], vae.encode(video[:, :, :1])) < 1e-5
    assert rel_l2(latents[:, :, :2], vae.encode(video[:, :, :5])) < 1e-5
    assert rel_l2(vae.decode(latents)[:, :, :1], vae.decode(latents[:, :, :1])) < 1e-5
    video[:, :, 0] = 0
    assert rel_l2(vae.encode(video)[:, :, 2], latents[:, :, 2]) > 1e-4


@torch.no_grad()
def test_items_of_a_batch_equal_single_calls():
    vae = random_vae()
    images = torch.rand(3, 3, 1, 32, 16) * 2 - 1
    latents = vae.encode(images)
    for i in range(3):
        assert rel_l2(latents[i : i + 1], vae.encode(images[i : i + 1])) < 1e-5
        assert rel_l2(vae.decode(latents)[i : i + 1], vae.decode(latents[i : i + 1])) < 1e-5


@torch.no_grad()
def test_bfloat16_weights_take_and_give_float32():
    vae = random_vae()
    image = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    expected = vae.encode(image)
    pixels = vae.decode(expected)
    half = vae.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.encode(image).dtype == half.decode(expected).dtype == torch.float32
    assert rel_l2(half.encode(image), expected) < 0.05
    assert rel_l2(half.decode(expected), pixels) < 0.05


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "4 frames; the VAE takes 1 or 1 [+] a multiple of 4"),
        ((1, 3, 1, 12, 16), "12 x 16 pixels; both sides must be multiples of 8"),
        ((1, 3, 1, 16, 20), "16 x 20 pixels"),
    ],
)
def test_other_sizes_are_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        random_vae().encode(torch.zeros(shape))


def test_the_base_dim_is_read_from_the_shapes_and_other_files_are_refused():
    shapes = {key: tuple(tensor.shape) for key, tensor in WanVAE(24).state_dict().items()}
    assert vae_base_dim(shapes) == 24
    for other in ({}, {"encoder.conv_in.weight": (96, 3, 3, 3, 3)}, shapes | {"conv2.weight": (48, 48, 1, 1, 1)}):
        with pytest.raises(ConfigError, match=r"Wan2\.1"):
            vae_base_dim(other)


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    published = manifest_shapes("vae")
    with torch.device("meta"):
        vae = WanVAE(vae_base_dim(published))
    assert {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()} == published


@pytest.fixture(scope="module")
def tiny_vae(tiny):
    state = torch.load(tiny["vae"], weights_only=True)
    with torch.device("meta"):
        vae = WanVAE(vae_base_dim({key: tuple(tensor.shape) for key, tensor in state.items()}))
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["image", "video"])
def test_latents_match_the_reference(tiny_vae, name):
    reference = golden("vae")
    assert rel_l2(tiny_vae.encode(reference[name][None])[0], reference[f"{name}_latent"]) < 1e-5


@torch.no_grad()
def test_the_latent_of_zeros_matches_the_reference(tiny_vae):
    assert rel_l2(tiny_vae.encode(torch.zeros(1, 3, 1, 64, 96))[0], golden("vae")["black_latent_64x96"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["z1", "image_latent", "z2", "video_latent"])
def test_pixels_match_the_reference(tiny_vae, name):
    reference = golden("vae")
    assert rel_l2(tiny_vae.decode(reference[name][None])[0], reference[f"{name}_decoded"]) < 1e-5
