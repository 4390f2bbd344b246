"""The workflow for ComfyUI: its links fit, its files are those of the pages, and ComfyUI would find the LoRA's keys."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lora_models import trained
from wan.lora.network import save_lora
from wan.lora.tools import convert
from wan.models.tasks import TASKS
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "comfyui.md").read_text(encoding="utf-8")
WORKFLOW = json.loads((DOCS / "comfyui_one_frame.json").read_text(encoding="utf-8"))
NUMBERS = {"scale_x", "shift_x", "scale_y", "shift_y", "scale_t", "shift_t"}
CONDITIONING = "CONDITIONING"
# Class of ComfyUI -> the inputs that are links, with their types; the names of the others; the types of its outputs
NODES = {
    "UNETLoader": ({}, {"unet_name", "weight_dtype"}, ["MODEL"]),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, {"lora_name", "strength_model"}, ["MODEL"]),
    "ScaleROPE": ({"model": "MODEL"}, NUMBERS, ["MODEL"]),
    "ModelSamplingSD3": ({"model": "MODEL"}, {"shift"}, ["MODEL"]),
    "CLIPLoader": ({}, {"clip_name", "type", "device"}, ["CLIP"]),
    "CLIPTextEncode": ({"clip": "CLIP"}, {"text"}, [CONDITIONING]),
    "LoadImage": ({}, {"image"}, ["IMAGE", "MASK"]),
    "CLIPVisionLoader": ({}, {"clip_name"}, ["CLIP_VISION"]),
    "CLIPVisionEncode": ({"clip_vision": "CLIP_VISION", "image": "IMAGE"}, {"crop"}, ["CLIP_VISION_OUTPUT"]),
    "VAELoader": ({}, {"vae_name"}, ["VAE"]),
    "WanImageToVideo": (
        {
            **{"positive": CONDITIONING, "negative": CONDITIONING, "vae": "VAE"},
            **{"clip_vision_output": "CLIP_VISION_OUTPUT", "start_image": "IMAGE"},
        },
        {"width", "height", "length", "batch_size"},
        [CONDITIONING, CONDITIONING, "LATENT"],
    ),
    "KSampler": (
        {"model": "MODEL", "positive": CONDITIONING, "negative": CONDITIONING, "latent_image": "LATENT"},
        {"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"},
        ["LATENT"],
    ),
    "LatentCut": ({"samples": "LATENT"}, {"dim", "index", "amount"}, ["LATENT"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, set(), ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE"}, {"filename_prefix"}, []),
}


def node(kind: str) -> dict:
    (found,) = [node for node in WORKFLOW.values() if node["class_type"] == kind]
    return found["inputs"]


def test_every_link_leads_to_an_output_of_the_type_that_the_input_takes():
    for number, node in WORKFLOW.items():
        links, values, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == links.keys() | values, number
        for name, kind in links.items():
            source, slot = node["inputs"][name]
            assert NODES[WORKFLOW[source]["class_type"]][2][slot] == kind, (number, name)
        assert not any(isinstance(node["inputs"][name], list) for name in values)


def test_every_node_leads_to_the_saved_picture():
    wanted, found = [number for number, node in WORKFLOW.items() if node["class_type"] == "SaveImage"], set()
    while wanted:
        number = wanted.pop()
        found.add(number)
        wanted += [value[0] for value in WORKFLOW[number]["inputs"].values() if isinstance(value, list)]
    assert found == WORKFLOW.keys()


def test_two_latent_frames_are_made_and_the_second_is_decoded_with_the_settings_of_the_guide():
    made = node("WanImageToVideo")
    assert (made["length"] - 1) // 4 + 1 == 2 and made["width"] % 16 == made["height"] % 16 == 0
    assert (node("LatentCut")["dim"], node("LatentCut")["index"], node("LatentCut")["amount"]) == ("t", 1, 1)
    guide = (DOCS / "one_frame.md").read_text(encoding="utf-8")
    command = re.search(r"\*\*4\. Generate\.\*\*.*?```bash\n(.*?)```", guide, re.DOTALL)[1]
    for flag, value in {
        "control_index=0,target_index": f"{node('ScaleROPE')['scale_t']:g}",
        "--video_size": f"{made['height']} {made['width']}",
        "--infer_steps": str(node("KSampler")["steps"]),
        "--flow_shift": f"{node('ModelSamplingSD3')['shift']:g}",
        "--guidance_scale": f"{node('KSampler')['cfg']:g}",
        "--seed": str(node("KSampler")["seed"]),
    }.items():
        assert re.search(rf"{re.escape(flag)}[ =]{value}\b", command), flag
    texts = [node["inputs"]["text"] for node in WORKFLOW.values() if node["class_type"] == "CLIPTextEncode"]
    assert f'--prompt "{texts[0]}"' in command and texts[1] == TASKS["i2v-14B"].negative_prompt


def test_the_files_are_those_of_the_pages():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "one_frame.md", DOCS / "interop.md"))
    names = {value for node in WORKFLOW.values() for key, value in node["inputs"].items() if key.endswith("_name")}
    names = {name for name in names if name.endswith(".safetensors")}
    assert len(names) == 5
    for name in names:
        assert f"`{name}`" in PAGE and name.removesuffix(".safetensors") in pages, name


@pytest.mark.parametrize("dialect", ["musubi", "comfyui"])
def test_comfyui_finds_a_module_for_each_key_of_a_trained_lora(dialect, tmp_path):
    """ComfyUI knows a module by its official name behind `diffusion_model.`, or by `lora_unet_` and underscores."""
    spec = DiTSpec("i2v", dim=128, ffn_dim=128, num_layers=1, in_dim=36, text_dim=64, image_dim=160)
    with torch.device("meta"):
        weights = [name.removesuffix(".weight") for name in WanDiT(spec).state_dict() if name.endswith(".weight")]
    known = {f"diffusion_model.{name}" for name in weights} | {
        f"lora_unet_{name.replace('.', '_')}" for name in weights
    }
    path = tmp_path / "my-lora.safetensors"
    save_lora(path, trained(WanDiT(spec)), {})
    if dialect == "comfyui":
        convert(path, tmp_path / "converted.safetensors", "comfyui")
        path = tmp_path / "converted.safetensors"
    keys = list(load_file(path))
    endings = ("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha")
    for key in keys:
        (ending,) = [ending for ending in endings if key.endswith(f".{ending}")]
        assert key.removesuffix(f".{ending}") in known, key
    assert len({key.split(".lora")[0].removesuffix(".alpha") for key in keys}) == 12
