"""Files of other tools give the model that the plain file gives. They are written here, or by those tools."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

from tests.dit_cases import CPU, all_rows, arguments, random_dit
from tests.files.test_formats import finish
from tests.files.test_load import assert_holds, one_line_error
from tests.helpers import rel_l2
from utils.errors import ConfigError
from wan.files import load
from wan.memory.fp8 import FP8, Fp8Linear
from wan.models.options import CLIPConfig, DiTConfig, ReleaseConfig, T5Config, VAEConfig
from wan.nets.clip import encode_image, preprocess
from wan.nets.conditioning import Conditioning
from wan.nets.vae import VAE_MEAN, VAE_STD, WanVAE

# Releases of diffusers, written by diffusers and transformers


@torch.no_grad()
def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name and parameter.ndim != 2 and not name.endswith("bias")
        parameter.copy_(is_gain + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def diffusers_dit(kind: str) -> WanTransformer3DModel:
    images = {"added_kv_proj_dim": 128, "image_dim": 48, "in_channels": 36} if kind != "t2v" else {"in_channels": 16}
    sizes = {"num_attention_heads": 1, "text_dim": 32, "ffn_dim": 192, "num_layers": 2}
    return randomised(WanTransformer3DModel(**sizes, **images, pos_embed_seq_len=514 if kind == "flf2v" else None))


def small_t5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=40, d_model=64, d_kv=8, d_ff=48, num_layers=2, num_heads=8)
    return randomised(UMT5EncoderModel(config))


def small_clip(kind: type) -> torch.nn.Module:
    sizes = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 2}
    return randomised(kind(CLIPVisionConfig(**sizes, image_size=224, patch_size=14, hidden_act="gelu")))


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """The folder of a diffusers pipeline and the models in it."""
    folder = tmp_path_factory.mktemp("release")
    models = {"transformer": diffusers_dit("i2v"), "vae": randomised(AutoencoderKLWan(base_dim=8))}
    models |= {"text_encoder": small_t5(), "image_encoder": small_clip(CLIPVisionModel)}
    for name, model in models.items():
        parts = {"max_shard_size": "1MB"} if name in ("transformer", "text_encoder") else {}
        model.save_pretrained(folder / name, **parts)
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder, models


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_a_transformer_of_diffusers_gives_its_output(kind, tmp_path):
    theirs = diffusers_dit(kind)
    theirs.save_pretrained(tmp_path)
    ours = load.load_dit(tmp_path / "diffusion_pytorch_model.safetensors", None, CPU)
    assert ours.spec.model_type == kind
    latents, (channels, clip, _), timesteps, text, _ = arguments()
    if kind == "t2v":
        channels = clip = None
    elif kind == "flf2v":
        clip = torch.cat([clip, clip.flip(2)], dim=1)
    inputs = latents if channels is None else torch.cat([latents, channels], dim=1)
    images = None if clip is None else clip.flatten(0, 1)
    out = ours(latents, Conditioning(channels, clip), timesteps, text, torch.tensor([[0, 1]]))
    assert rel_l2(out, theirs(inputs, timesteps, all_rows(text), images).sample) < 3e-5


def test_a_published_transformer_of_diffusers_has_a_norm_that_is_not_used(release, tmp_path):
    folder, models = release
    extra = {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(128) for i in range(2)}
    save_file(dict(models["transformer"].state_dict()) | extra, tmp_path / "dit.safetensors")
    expected = load.load_dit(next((folder / "transformer").glob("*.safetensors")), None, CPU).state_dict()
    assert_holds(load.load_dit(tmp_path / "dit.safetensors", None, CPU), expected)


@torch.no_grad()
def test_a_folder_of_diffusers_serves_for_all_paths(release):
    folder, models = release
    files = ReleaseConfig(ckpt_dir=folder)
    assert files.fill(DiTConfig()).resolve().task.name == "i2v-14B"
    vae, t5, clip = (files.fill(section()).resolve() for section in (VAEConfig, T5Config, CLIPConfig))
    assert t5.tokenizer == folder / "tokenizer"
    pixels = torch.rand(1, 3, 1, 32, 24) * 2 - 1
    mean, std = (torch.tensor(values).view(16, 1, 1, 1) for values in (VAE_MEAN, VAE_STD))
    latents, theirs = vae.load(CPU).encode(pixels), models["vae"].encode(pixels).latent_dist.mode()
    assert rel_l2(latents, (theirs - mean) / std) < 1e-5
    decoded = vae.load(CPU).decode(latents)
    assert rel_l2(decoded, models["vae"].decode(theirs).sample) < 1e-5
    ids = torch.tensor([[5, 3, 17, 1]])
    encoder = load.load_t5(t5.path, torch.float32, CPU)
    assert rel_l2(encoder(ids).last_hidden_state, models["text_encoder"](ids).last_hidden_state) < 1e-6
    assert rel_l2(encode_image(clip.load(CPU), pixels[:, :, 0]), before_last(models["image_encoder"], pixels)) < 1e-6


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_given_for_a_model_stands_for_the_file_in_it(own, release, tmp_path):
    folder, _ = release
    inside = {"dit": "transformer", "vae": "vae", "t5": "text_encoder", "clip": "image_encoder"}
    sections = {"dit": DiTConfig, "vae": VAEConfig, "t5": T5Config, "clip": CLIPConfig}
    for name, section in sections.items():
        filled = ReleaseConfig().fill(section(**{name: folder / inside[name] if own else folder}))
        path = getattr(filled, name)
        assert path.is_file() and path.parent == folder / inside[name]
        empty = section(**{name: tmp_path})
        assert ReleaseConfig().fill(empty) == empty
    assert ReleaseConfig().fill(DiTConfig(dit=folder)).resolve().task.name == "i2v-14B"
    assert "is a folder, not a file" in one_line_error(VAEConfig(vae=tmp_path).resolve)


def before_last(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    return model(pixel_values=preprocess(pixels[:, :, 0]), output_hidden_states=True).hidden_states[-2]


# The official folder


def test_official_names_are_found_and_given_paths_win(tmp_path):
    names = ["diffusion_pytorch_model-00002-of-00002.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors"]
    names += ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = ReleaseConfig(ckpt_dir=tmp_path)
    assert files.fill(DiTConfig(task="i2v-14B")) == DiTConfig(task="i2v-14B", dit=tmp_path / names[1])
    assert files.fill(VAEConfig()) == VAEConfig(vae=tmp_path / "Wan2.1_VAE.pth")
    assert files.fill(VAEConfig(vae=Path("my.pth"))) == VAEConfig(vae=Path("my.pth"))
    assert files.fill(T5Config()) == T5Config(t5=tmp_path / names[3], t5_tokenizer=tmp_path / "google" / "umt5-xxl")
    assert files.fill(CLIPConfig()) == CLIPConfig()
    assert ReleaseConfig().fill(DiTConfig()) == DiTConfig()


def test_a_folder_without_models_and_a_missing_one_are_errors(tmp_path):
    (tmp_path / "readme.txt").touch()
    for folder, words in (
        (tmp_path, "holds no file under its official name"),
        (tmp_path / "absent", "is not a folder"),
    ):
        with pytest.raises(ConfigError, match=f"--ckpt_dir .*: {words}"):
            ReleaseConfig(ckpt_dir=folder).fill(VAEConfig())


# What ComfyUI repackages


@torch.no_grad()
def test_a_t5_in_fp16_with_an_embedded_tokenizer_loads(tmp_path):
    model = small_t5().to(torch.float16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # the embedding under both names
    save_file(state | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "umt5_xxl_fp16.safetensors")
    assert load.inspect_t5(tmp_path / "umt5_xxl_fp16.safetensors") == 64
    ids = torch.tensor([[5, 3, 17, 1]])
    loaded = load.load_t5(tmp_path / "umt5_xxl_fp16.safetensors", torch.float32, CPU)
    assert rel_l2(loaded(ids).last_hidden_state, model.float()(ids).last_hidden_state) < 1e-6


@torch.no_grad()
def test_a_t5_in_scaled_fp8_gives_its_dequantised_output_and_stays_in_fp8_when_asked(tmp_path):
    model = small_t5()
    entries = {"scaled_fp8": torch.zeros(0, dtype=FP8), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    for name, tensor in model.state_dict().items():
        if "SelfAttention" in name or "DenseReluDense" in name or name == "shared.weight":
            scale = tensor.abs().max() / 448
            entries[name] = (tensor / scale).to(FP8)
            entries[name.removesuffix("weight") + "scale_weight"] = scale
            tensor.copy_(entries[name].float() * scale)
        elif "embed_tokens" not in name:
            entries[name] = tensor
    path = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(entries, path)
    ids = torch.tensor([[5, 3, 17, 1]])
    expected = model(ids).last_hidden_state
    loaded = load.load_t5(path, torch.float32, CPU)
    assert rel_l2(loaded(ids).last_hidden_state, expected) < 1e-6
    small = load.load_t5(path, torch.float32, CPU, fp8="cast")
    layers = [layer for layer in small.modules() if isinstance(layer, Fp8Linear)]
    assert len(layers) == 2 * 7 and all(layer.scale_weight is not None for layer in layers)
    assert rel_l2(small(ids).last_hidden_state, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-6), ("Q8_0", 0.05)])
def test_a_t5_under_the_names_of_llama_cpp_gives_the_plain_output(kind, error, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, names = small_t5().half().float(), gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    for name, tensor in model.state_dict().items():
        if "embed_tokens" not in name:
            number = gguf.GGMLQuantizationType[kind if tensor.shape[-1] == 64 and tensor.ndim == 2 else "F32"]
            name = names.get_name(name, try_suffixes=[".weight"])
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), number), raw_dtype=number)
    finish(writer)
    loaded, ids = load.load_t5(tmp_path / "t5.gguf", torch.float32, CPU), torch.tensor([[5, 3, 17, 1]])
    assert rel_l2(loaded(ids).last_hidden_state, model(ids).last_hidden_state) < error


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_clip_vision_h_gives_the_features_of_transformers(dtype, tmp_path):
    model = small_clip(CLIPVisionModelWithProjection).to(dtype)
    path = tmp_path / "clip_vision_h.safetensors"
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors") | {"logit_scale": torch.ones(())}, path)
    assert {"vision_model.encoder.layers.2.self_attn.q_proj.bias", "visual_projection.weight"} <= load_file(path).keys()
    pixels = torch.rand(1, 3, 1, 40, 30) * 2 - 1
    loaded = load.load_clip(path, torch.float32, CPU)
    assert rel_l2(encode_image(loaded, pixels[:, :, 0]), before_last(model.float(), pixels)) < 1e-6


@pytest.mark.parametrize(
    "name", ["x[0/9]y", "x[0/99999999999]y", f"decoder.up_blocks.{5000 * '9'}.resnets.0.conv1.bias"]
)
def test_names_made_to_hurt_are_unexpected_tensors(name, tmp_path):
    save_file(random_dit().state_dict() | {name: torch.zeros(2)}, tmp_path / "any.safetensors")
    assert "1 unexpected" in one_line_error(load.inspect_dit, tmp_path / "any.safetensors")
    for inspect in (load.inspect_vae, load.inspect_t5, load.inspect_clip):
        one_line_error(inspect, tmp_path / "any.safetensors")


KEYS, FUSED = "encoder.layers.0.self_attn.k_proj.weight", "visual.transformer.0.attn.to_qkv.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({KEYS: None}, f"1 missing ({FUSED}), 2 unexpected"),
        ({KEYS: torch.zeros(3, 3)}, f"1 missing ({FUSED}), 3 unexpected"),
        ({FUSED: torch.zeros(480, 160)}, "3 unexpected"),
    ],
)
def test_a_clip_whose_parts_do_not_fit_together_is_an_error(change, words, tmp_path):
    state = small_clip(CLIPVisionModel).state_dict() | change
    path = tmp_path / "clip.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    assert words in one_line_error(load.inspect_clip, path)


def test_a_vae_under_its_official_names_in_safetensors_loads(tmp_path):
    state = randomised(WanVAE(8)).state_dict()
    save_file(state, tmp_path / "wan_2.1_vae.safetensors")
    assert_holds(load.load_vae(tmp_path / "wan_2.1_vae.safetensors", torch.float32, CPU), state)
