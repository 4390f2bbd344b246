"""LoRA files of other tools do here what they do there: PEFT's folders, DoRA, new weights."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.dit_cases import SPEC, random_dit
from tests.helpers import rel_l2
from tests.lora.test_keys import LINEAR, changes, draw, lora_tensors, merged, model_shapes, our_output, saved
from utils.errors import ConfigError
from wan.lora.files import read_lora
from wan.lora.merge import Merger
from wan.lora.module import decomposed
from wan.lora.options import NetworkConfig
from wan.lora.tools import convert, inspect, merge, resize

PATTERNS = {
    "rank_pattern": {"cross_attn.q": 3},
    "alpha_pattern": {r".*cross_attn\.k": 64, r"blocks\.[0-2]\.ffn\.2": 1, "attn.v": 9},  # the last: none
}


def adapter(config, folder):
    """A folder that PEFT saves from our model, all of whose trained weights are random, and the output there."""
    model = get_peft_model(random_dit(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(draw(generator, *parameter.shape))
    model.save_pretrained(folder)
    return our_output(model.eval())


@pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:.*did not match any", "ignore:.*bias")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, **PATTERNS),
        LoHaConfig(r=4, alpha=6, target_modules=LINEAR, **PATTERNS),
        LoKrConfig(r=4, alpha=6, target_modules=LINEAR, **PATTERNS),
        LoKrConfig(r=4, alpha=6, target_modules=LINEAR, decompose_both=True, decompose_factor=8, **PATTERNS),
        LoKrConfig(r=64, alpha=6, target_modules=LINEAR, rank_pattern={r".*\.[qk]": 128}),  # two full matrices
        LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_dora=True, **PATTERNS),
        LoraConfig(r=4, lora_alpha=6, target_modules=["patch_embedding"], use_dora=True),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q"], modules_to_save=["text_embedding", "head.head"]),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q"], bias="all"),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q"], bias="lora_only"),
    ],
    ids=lambda config: f"{config.peft_type.value}",
)
def test_a_folder_of_peft_does_here_what_it_does_there(config, tmp_path):
    expected = adapter(config, tmp_path / "adapter")
    assert rel_l2(our_output(random_dit()), expected) > 1e-3
    assert rel_l2(our_output(merged(tmp_path / "adapter")), expected) < 1e-4
    NetworkConfig(network_weights=tmp_path / "adapter", base_weights=(tmp_path / "adapter",)).check()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_the_base_weights_is_refused(start, tmp_path):
    adapter(LoraConfig(r=4, target_modules=["q"], init_lora_weights=start), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"init_lora_weights = '{start}' changes the base weights as well; save the"):
        read_lora(tmp_path / "adapter")


@pytest.mark.parametrize("size", [(5, 1), (1, 4), (5,)])
@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_dora_gives_rows_or_columns_their_norms(size, multiplier, tmp_path):
    generator = torch.Generator().manual_seed(1)
    down, up, weight = draw(generator, 2, 4), draw(generator, 5, 2), draw(generator, 5, 4)
    norms = torch.rand(size, generator=generator) + 0.5
    name = "diffusion_model.blocks.0.ffn.0"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.dora_scale": norms}
    path = saved(tensors | {f"{name}.alpha": torch.tensor(4.0)}, tmp_path / "in.safetensors")
    key = "blocks.0.ffn.0.weight"
    found = Merger([(read_lora(path), multiplier)], {key: (5, 4)})(key, weight)
    changed = weight.double() + 2 * up.double() @ down.double()
    axis = 0 if size == (1, 4) else 1
    whole = changed / changed.norm(dim=axis, keepdim=True) * norms.reshape((1, 4) if axis == 0 else (5, 1))
    assert_close(found.double(), weight + multiplier * (whole - weight.double()), rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_has_no_direction_and_stays():
    assert torch.equal(decomposed(torch.zeros(2, 3), torch.ones(2, 1)), torch.zeros(2, 3))


def test_new_weights_take_the_place_of_the_old_ones_and_of_a_lora(tmp_path, caplog):
    generator, shapes = torch.Generator().manual_seed(2), model_shapes()
    name = "diffusion_model.blocks.0.ffn.0"
    new, diff = (draw(generator, *shapes["blocks.0.ffn.0.weight"]) for _ in range(2))
    both = lora_tensors(prefix="diffusion_model.")
    plain = changes(saved(both, tmp_path / "plain.safetensors"))
    assert not caplog.records
    found = changes(saved(both | {f"{name}.diff": diff}, tmp_path / "diff.safetensors"))
    assert torch.equal(found["blocks.0.ffn.0.weight"], diff)
    assert "holds two kinds of changes for 1 module, e.g. lora_unet_blocks_0_ffn_0; as in ComfyUI" in caplog.text
    found = changes(saved(both | {f"{name}.diff": diff, f"{name}.set_weight": new}, tmp_path / "set.safetensors"))
    assert torch.equal(found["blocks.0.ffn.0.weight"], new)  # of zeros
    assert all(torch.equal(found[key], plain[key]) for key in plain.keys() - {"blocks.0.ffn.0.weight"})
    merger = Merger([(read_lora(tmp_path / "set.safetensors"), 1.0)], shapes)
    old = random_dit().state_dict()["blocks.0.ffn.0.weight"]
    assert_close(merger("blocks.0.ffn.0.weight", old), new)


@pytest.mark.parametrize("to", ["musubi", "comfyui"])
def test_dora_and_new_weights_are_converted_and_named_but_not_joined_or_resized(to, tmp_path):
    tensors = lora_tensors(prefix="diffusion_model.")
    tensors |= {f"diffusion_model.{name}.dora_scale": torch.ones(SPEC.dim, 1) for name in LINEAR[:3]}
    tensors["diffusion_model.head.head.set_weight"] = torch.ones(64, SPEC.dim)
    source = saved(tensors, tmp_path / "in.safetensors")
    convert(source, tmp_path / "out.safetensors", to)
    weights = random_dit().state_dict()
    first, second = (
        Merger([(read_lora(path), 1.0)], model_shapes()) for path in (source, tmp_path / "out.safetensors")
    )
    assert all(torch.equal(first(name, tensor), second(name, tensor)) for name, tensor in weights.items())
    assert "holds LoRA x 48, DoRA x 3, new weight x 1" in inspect(tmp_path / "out.safetensors")
    for call in (
        lambda: merge([source], [1.0], tmp_path / "more.safetensors"),
        lambda: resize(source, tmp_path / "more.safetensors", 1),
    ):
        with pytest.raises(ConfigError, match=r"in\.safetensors: lora_unet_blocks_\d_\w+ is DoRA or holds new weights"):
            call()
    with pytest.raises(ConfigError, match=r"this form has no DoRA and no new weights here; use --to comfyui"):
        convert(source, tmp_path / "more.safetensors", "diffusers")


@pytest.mark.parametrize("to", ["musubi", "comfyui"])
def test_parameters_without_a_weight_have_the_names_that_comfyui_knows(to, tmp_path):
    """ComfyUI names these in full, and so loads no `diff_m`: `diffusion_model.<parameter>.diff` and `.set_weight`."""
    shapes, generator = model_shapes(), torch.Generator().manual_seed(3)
    names = ["blocks.1.modulation", "head.modulation", "blocks.0.ffn.2.bias"]
    drawn = {name: draw(generator, *shapes[name]) for name in names}
    for ending in ("diff", "set_weight"):
        tensors = {f"diffusion_model.{name}.{ending}": tensor for name, tensor in drawn.items()}
        source, out = saved(tensors, tmp_path / f"{ending}.safetensors"), tmp_path / f"{ending}-out.safetensors"
        convert(source, out, to)
        for path in (source, out):
            found = changes(path)
            assert found.keys() == drawn.keys() and all(torch.equal(found[name], drawn[name]) for name in names)
        kept = names if ending == "set_weight" else names[:2]
        assert {f"diffusion_model.{name}.{ending}" for name in kept} <= load_file(out).keys()


def test_the_older_name_of_a_modulation_is_still_read(tmp_path):
    new = torch.ones(1, 6, SPEC.dim)
    for key in ("diffusion_model.blocks.1.diff_m", "lora_unet_blocks_1.diff_m"):
        assert torch.equal(changes(saved({key: new}, tmp_path / "a.safetensors"))["blocks.1.modulation"], new)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", torch.full((2, 4), torch.nan)),
        ("lora_te1_x.alpha", torch.tensor(3.0)),
        ("text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", torch.ones(2, 4)),
        ("bundle_emb.cat.string_to_param.*", torch.ones(2, 4)),
        ("diffusion_model.patch_embedding.reshape_weight", torch.tensor([128, 64, 1, 2, 2])),
    ],
)
def test_what_a_file_holds_for_something_else_is_left_out_and_said(key, tensor, tmp_path, caplog):
    plain = changes(saved(lora_tensors(prefix="diffusion_model."), tmp_path / "plain.safetensors"))
    assert not caplog.records
    found = changes(saved(lora_tensors(prefix="diffusion_model.") | {key: tensor}, tmp_path / "in.safetensors"))
    assert f"in.safetensors: 1 tensor of something else than the DiT, e.g. '{key}': left out" in caplog.text
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
            "is a Git LFS pointer, not the file",
        ),
        (b"<!doctype html><title>404</title>", "is a web page, not the file itself; download"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page, not the file itself; download"),
        (b'{"error":"Repository not found"}', "is a web page, not the file itself; download"),
    ],
)
def test_what_lies_in_the_place_of_a_lora_is_named(content, words, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^--lora_weight .*a\.safetensors: {words}"):
        read_lora(tmp_path / "a.safetensors")
