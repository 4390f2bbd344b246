"""LoRA files in the forms of other tools, as they came: what each changes, by its tool's formula in plain torch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import RECORDINGS, rel_l2
from utils.errors import ConfigError
from wan.lora.files import read_lora
from wan.lora.merge import Merger

FOLDER = RECORDINGS / "lora_files"
SHAPES = {
    "blocks.0.self_attn.q.weight": (256, 256),
    "blocks.0.self_attn.q.bias": (256,),
    "blocks.0.cross_attn.k.weight": (256, 256),
    "blocks.0.cross_attn.k.bias": (256,),
    "blocks.0.ffn.2.weight": (256, 512),
    "blocks.0.ffn.2.bias": (256,),
    "blocks.0.modulation": (1, 6, 256),
    "head.head.weight": (64, 256),
    "head.head.bias": (64,),
    "head.modulation": (1, 2, 256),
}
Q, K, FFN = "blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.0.ffn.2"
DIFFUSERS = {Q: "blocks.0.attn1.to_q", K: "blocks.0.attn2.to_k", FFN: "blocks.0.ffn.net.2"}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in SHAPES.items()}


def merged(name):
    """What the file makes of `weights`."""
    merger = Merger([(read_lora(FOLDER / name), 1.0)], SHAPES)
    return {key: merger(key, weight) for key, weight in weights().items()}


def product(tensors, name, endings=("lora_down.weight", "lora_up.weight"), alpha=None):
    """alpha / rank times up down; without alpha as if it were the rank."""
    down, up = (tensors[f"{name}.{ending}"].double() for ending in endings)
    return up @ down * (1.0 if alpha is None else alpha / len(down))


AB = ("lora_A.weight", "lora_B.weight")


def videox_fun(tensors, name):
    key = "lora_unet__" + name.replace(".", "_")
    return product(tensors, key, alpha=float(tensors[f"{key}.alpha"]))


def simpletuner(tensors, name):
    key = "lycoris_" + DIFFUSERS[name].replace(".", "_")
    return product(tensors, key, alpha=float(tensors[f"{key}.alpha"]))


def diffsynth(tensors, name):
    return product(tensors, f"pipe.dit.{name}", ("lora_A.default.weight", "lora_B.default.weight"))


def peft_loha(tensors, name):
    left, right = (
        tensors[f"base_model.model.{DIFFUSERS[name]}.hada_{w}_a"].double()
        @ tensors[f"base_model.model.{DIFFUSERS[name]}.hada_{w}_b"].double()
        for w in ("w1", "w2")
    )
    return left * right * (8 / 4)  # alpha and r of adapter_config.json


def peft_alpha_pattern(tensors, name):
    alpha = {Q: 8, K: 64, FFN: 1}[name]  # lora_alpha, and what the two patterns of adapter_config.json match
    return product(tensors, f"base_model.model.{DIFFUSERS[name]}", AB, alpha)


def comfyui(tensors, name):
    return product(tensors, f"diffusion_model.{name}")


@pytest.mark.parametrize(
    ("file", "delta"),
    [
        ("videox-fun_double_underscore.safetensors", videox_fun),
        ("simpletuner_lycoris_lora_names.safetensors", simpletuner),
        ("diffsynth_pipe.dit.safetensors", diffsynth),
        ("comfy_modulation.diff.safetensors", comfyui),
        ("lora_and_diff_of_one_module.safetensors", comfyui),
        ("peft_loha", peft_loha),
        ("peft_alpha_pattern_regex", peft_alpha_pattern),
    ],
)
def test_low_ranks_change_what_the_formula_of_their_tool_says(file, delta):
    path = FOLDER / file
    tensors = load_file(path / "adapter_model.safetensors" if path.is_dir() else path)
    found, before = merged(file), weights()
    for name in (Q, K, FFN):
        key = f"{name}.weight"
        assert rel_l2(found[key].double() - before[key].double(), delta(tensors, name)) < 1e-5


def test_dora_gives_the_rows_of_a_changed_weight_their_norms():
    tensors, found = load_file(FOLDER / "dora_comfy.safetensors"), merged("dora_comfy.safetensors")
    for name in (Q, K, FFN):
        changed = weights()[f"{name}.weight"].double() + product(tensors, f"diffusion_model.{name}", AB)
        norms = tensors[f"diffusion_model.{name}.dora_scale"].double()
        assert rel_l2(found[f"{name}.weight"].double(), changed / changed.norm(dim=1, keepdim=True) * norms) < 1e-5


def test_differences_of_biases_and_modulations_are_added_in_full():
    file = "comfy_modulation.diff.safetensors"
    tensors, found, before = load_file(FOLDER / file), merged(file), weights()
    for name in (Q, K, FFN):
        change = found[f"{name}.bias"] - before[f"{name}.bias"]
        torch.testing.assert_close(change, tensors[f"diffusion_model.{name}.diff_b"])
    for name in ("blocks.0.modulation", "head.modulation"):
        torch.testing.assert_close(found[name] - before[name], tensors[f"diffusion_model.{name}.diff"])


def test_of_a_lora_and_a_difference_of_one_weight_the_difference_counts():
    file = "lora_and_diff_of_one_module.safetensors"
    tensors, found, before = load_file(FOLDER / file), merged(file), weights()
    change = found["head.head.weight"] - before["head.head.weight"]
    torch.testing.assert_close(change, tensors["diffusion_model.head.head.diff"])
    assert {"diffusion_model.head.head.lora_up.weight", "diffusion_model.head.head.lora_down.weight"} < tensors.keys()


def test_an_adapter_that_also_changes_the_base_is_refused():
    with pytest.raises(ConfigError, match="init_lora_weights = 'pissa' changes the base weights"):
        read_lora(FOLDER / "peft_pissa")


def test_each_file_is_in_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.iterdir() if f'"{path.name}"' not in source] == []
