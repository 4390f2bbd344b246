"""The graphs for ComfyUI: their links fit, their files are those of the pages, and ComfyUI finds a LoRA's keys."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.comfyui.stand_in import installed
from tests.lora_models import trained
from wan.lora.network import save_lora
from wan.lora.tools import convert
from wan.models.tasks import TASKS
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "comfyui.md").read_text(encoding="utf-8")
GRAPHS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "comfyui").glob("*.json"))}
WITHOUT_NODES = ("one_frame", "one_frame_before_0.3.68")
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
    "KSamplerSelect": ({}, {"sampler_name"}, ["SAMPLER"]),
    "BasicScheduler": ({"model": "MODEL"}, {"scheduler", "steps", "denoise"}, ["SIGMAS"]),
    "SamplerCustom": (
        {
            **{"model": "MODEL", "positive": CONDITIONING, "negative": CONDITIONING},
            **{"sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        },
        {"add_noise", "noise_seed", "cfg"},
        ["LATENT", "LATENT"],
    ),
    "LatentCut": ({"samples": "LATENT"}, {"dim", "index", "amount"}, ["LATENT"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, set(), ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE"}, {"filename_prefix"}, []),
}
VALUES = ("STRING", "INT", "FLOAT")


@pytest.fixture(scope="module")
def nodes() -> dict:
    """NODES and ours, whose optional inputs are all taken for links that may be left out."""
    with installed({}):
        ours = importlib.import_module("comfyui.wan_one_frame").NODE_CLASS_MAPPINGS
        found = dict(NODES)
        for name, node in ours.items():
            inputs = node.INPUT_TYPES()
            kinds = {key: kind[0] for part in inputs.values() for key, kind in part.items()}
            values = {key for key, kind in kinds.items() if kind in VALUES or isinstance(kind, list)}
            found[name] = (kinds, values, list(node.RETURN_TYPES))
    return found


def only(graph: dict, kind: str) -> dict:
    (found,) = [node for node in graph.values() if node["class_type"] == kind]
    return found["inputs"]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_link_leads_to_an_output_of_the_type_that_the_input_takes(name, nodes):
    graph = GRAPHS[name]
    for number, node in graph.items():
        kinds, values, _ = nodes[node["class_type"]]
        if node["class_type"] in NODES:
            assert node["inputs"].keys() == kinds.keys() | values, number
        assert node["inputs"].keys() <= kinds.keys() | values, number
        for key, given in node["inputs"].items():
            if isinstance(given, list):
                source, slot = given
                assert nodes[graph[source]["class_type"]][2][slot] == kinds[key], (number, key)
            else:
                assert key in values, (number, key)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_leads_to_the_saved_picture(name):
    graph = GRAPHS[name]
    wanted, found = [number for number, node in graph.items() if node["class_type"] == "SaveImage"], set()
    while wanted:
        number = wanted.pop()
        found.add(number)
        wanted += [value[0] for value in graph[number]["inputs"].values() if isinstance(value, list)]
    assert found == graph.keys()


@pytest.mark.parametrize("name", WITHOUT_NODES)
def test_two_latent_frames_are_made_and_the_second_is_decoded(name):
    made = only(GRAPHS[name], "WanImageToVideo")
    assert (made["length"] - 1) // 4 + 1 == 2 and made["width"] % 16 == made["height"] % 16 == 0
    cut = only(GRAPHS[name], "LatentCut")
    assert (cut["dim"], cut["index"], cut["amount"]) == ("t", 1, 1)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_settings_are_those_of_the_guide(name):
    graph = GRAPHS[name]
    guide = (DOCS / "one_frame.md").read_text(encoding="utf-8")
    command = re.search(r"\*\*4\. Generate\.\*\*.*?```bash\n(.*?)```", guide, re.DOTALL)[1]
    flags = {
        "--infer_steps": str(only(graph, "BasicScheduler")["steps"]),
        "--flow_shift": f"{only(graph, 'ModelSamplingSD3')['shift']:g}",
        "--guidance_scale": f"{only(graph, 'SamplerCustom')['cfg']:g}",
        "--seed": str(only(graph, "SamplerCustom")["noise_seed"]),
    }
    if name in WITHOUT_NODES:
        made = only(graph, "WanImageToVideo")
        flags["--video_size"] = f"{made['height']} {made['width']}"
    if name == "one_frame":
        flags["control_index=0,target_index"] = f"{only(graph, 'ScaleROPE')['scale_t']:g}"
    for flag, value in flags.items():
        assert re.search(rf"{re.escape(flag)}[ =]{value}\b", command), flag
    texts = [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    assert f'--prompt "{texts[0]}"' in command and texts[1] == TASKS["i2v-14B"].negative_prompt


@pytest.mark.parametrize("name", GRAPHS)
def test_the_files_are_those_of_the_pages(name):
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "one_frame.md", DOCS / "interop.md"))
    names = {value for node in GRAPHS[name].values() for key, value in node["inputs"].items() if key.endswith("_name")}
    names = {name for name in names if isinstance(name, str) and name.endswith(".safetensors")}
    assert len(names) == 5
    for file in names:
        assert f"`{file}`" in PAGE and file.removesuffix(".safetensors") in pages, file


def test_the_page_names_every_graph():
    for name in GRAPHS:
        assert f"(../comfyui/{name}.json)" in PAGE


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
