"""CLIP: against recorded outputs, transformers with weights under the official names, and OpenCV's resize."""

import cv2
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers import golden, rel_l2
from wan.files.load import load_clip
from wan.nets.clip import MEAN, STD, encode_image, preprocess

BLOCKS, WIDTH = 3, 160


def both(name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


@pytest.fixture(scope="module")
def plain() -> CLIPVisionModel:
    """A small random encoder as transformers builds it, with all blocks."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=200,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModel(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.01, std=0.1)
    return model


@pytest.fixture(scope="module")
def official(plain) -> dict[str, torch.Tensor]:
    """Its weights under the names of the published file, written out by hand."""
    embeddings = plain.embeddings
    weights = {
        "visual.cls_embedding": embeddings.class_embedding[None, None],
        "visual.pos_embedding": embeddings.position_embedding.weight[None],
        "visual.patch_embedding.weight": embeddings.patch_embedding.weight,
        **both("visual.pre_norm", plain.pre_layrnorm),
        **both("visual.post_norm", plain.post_layernorm),
        "visual.head": torch.randn(WIDTH, 64),
        "log_scale": torch.tensor(1.0),
        "textual.token_embedding.weight": torch.randn(7, 5),
    }
    for i, block in enumerate(plain.encoder.layers):
        name, attention = f"visual.transformer.{i}", block.self_attn
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights |= both(f"{name}.norm1", block.layer_norm1) | both(f"{name}.norm2", block.layer_norm2)
        weights |= both(f"{name}.attn.proj", attention.out_proj)
        weights |= both(f"{name}.mlp.0", block.mlp.fc1) | both(f"{name}.mlp.2", block.mlp.fc2)
        weights[f"{name}.attn.to_qkv.weight"] = torch.cat([part.weight for part in qkv])
        weights[f"{name}.attn.to_qkv.bias"] = torch.cat([part.bias for part in qkv])
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.fixture
def load(tmp_path):
    def save_and_load(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
        path = tmp_path / f"clip{len(list(tmp_path.iterdir()))}.safetensors"  # a loaded file stays mapped
        save_file(weights, path)
        return load_clip(path, dtype, "cpu")

    return save_and_load


def test_features_are_what_transformers_has_before_its_last_block(plain, official, load):
    pixels = torch.rand(2, 3, 60, 90) * 2 - 1
    with torch.no_grad():
        states = plain(pixel_values=preprocess(pixels), output_hidden_states=True).hidden_states
    features = encode_image(load(official), pixels)
    assert rel_l2(features, states[-2]) <= 1e-5
    assert rel_l2(features, states[-1]) > 1e-2


def test_the_loaded_model_leaves_out_the_last_block(official, load):
    model = load(official)
    assert len(model.encoder.layers) == BLOCKS - 1
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    "unused",
    [
        "textual.",
        "log_scale",
        "visual.head",
        "visual.post_norm.",
        "visual.transformer.2.norm2",
        "textual.token_embedding",
    ],
)
def test_tensors_that_the_features_do_not_need_may_be_absent(unused, official, load):
    pixels = torch.rand(1, 3, 32, 32)
    kept = {name: tensor for name, tensor in official.items() if not name.startswith(unused)}
    assert len(kept) < len(official)
    assert_close(encode_image(load(kept), pixels), encode_image(load(official), pixels), rtol=0, atol=0)


def test_features_have_the_dtype_of_the_model(official, load):
    features = encode_image(load(official, torch.bfloat16), torch.rand(1, 3, 30, 30))
    assert (features.dtype, features.shape) == (torch.bfloat16, (1, 257, WIDTH))


@pytest.mark.parametrize("size", [(300, 500), (96, 64), (224, 224)])
def test_preprocessing_resizes_like_bicubic_opencv(size):
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    resized = torch.from_numpy(cv2.resize(pixels.permute(1, 2, 0).numpy(), (224, 224), interpolation=cv2.INTER_CUBIC))
    expected = (resized * 0.5 + 0.5 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert_close(preprocess(pixels[None])[0], expected.permute(2, 0, 1), rtol=1e-4, atol=1e-3)


def test_a_mean_coloured_image_is_zero_for_the_network():
    pixels = (torch.tensor(MEAN) * 2 - 1).view(1, 3, 1, 1).expand(1, 3, 40, 70)
    assert_close(preprocess(pixels), torch.zeros(1, 3, 224, 224), rtol=0, atol=1e-5)


def test_recorded_images_give_the_recorded_features(tiny):
    expected = golden("clip")
    model = load_clip(tiny["clip"], torch.float32, "cpu")
    for i in "01":
        assert rel_l2(encode_image(model, expected[f"image{i}"][None]), expected[f"feature{i}"]) <= 1e-5
    pair = torch.stack([expected["image0"], expected["image0"].flip(-1)])
    assert rel_l2(encode_image(model, pair), expected["feature_pair"]) <= 1e-5
    assert rel_l2(preprocess(expected["image1"][None])[..., ::4, ::4], expected["preprocessed1"]) <= 1e-6
